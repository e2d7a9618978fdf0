"""What many and large avatars need: nothing is read twice, one damaged avatar is not the end."""
import shutil
import threading

import pytest
import torch
from counting import Counting

import batches
import fit
import provenance
import rodinhd as rh
import running
import scenes
import train

BRIEF = ['fit_avatars=2', 'inner=3', 'outer=2', 'fit_steps=3']


@pytest.fixture
def folder(data, tmp_path):
    """A folder with three avatars, the second of which has an image that is cut off."""
    for name, source in zip('abc', [*scenes.list_avatars(data), scenes.list_avatars(data)[0]]):
        shutil.copytree(source, tmp_path / 'data' / name)
    return tmp_path


def damage(avatar):
    path = scenes.read_frames(avatar, 'train')[1][3]['path']
    path.write_bytes(path.read_bytes()[:200])
    return path


def fitting(folder, *options):
    folders = ['--data', str(folder / 'data'), '--fits', str(folder / 'fits')]
    fit.main(fit.parse([*options, '--preset', 'tiny', *folders, '--set', *BRIEF]))


def test_one_damaged_avatar_is_left_out_and_named(folder, tiny, capfd):
    decoder = rh.Decoder(tiny).state_dict()
    running.write_model(folder / 'fits/decoder.pt', 'decoder', tiny, decoder, 0)
    path = damage(folder / 'data/b')
    message = f'1 of 3 avatars cannot be fitted: b; {path}: not a readable'
    with pytest.raises(rh.Stop, match=message):
        fitting(folder)
    assert 'b is left out' in capfd.readouterr().err
    assert sorted(path.name for path in folder.glob('fits/?.pt')) == ['a.pt', 'c.pt']


def test_images_are_decoded_at_the_first_of_all_visits(folder, monkeypatch):
    """That gives the planes that decoding them at each visit gives."""
    read = []

    def watched(avatar, args, original=fit.training_views):
        read.append(avatar.name)
        return original(avatar, args)

    monkeypatch.setattr(fit, 'training_views', watched)
    fitting(folder, '--decoder')
    assert sorted(read) == ['a', 'b']
    first = running.load_model('decoder', folder / 'fits', 'cpu')
    assert not list(folder.glob('fits/*state*'))

    shutil.rmtree(folder / 'fits')
    write = running.write_checkpoint

    def forgetful(path, kind, content):
        if kind != 'views':
            write(path, kind, content)

    monkeypatch.setattr(running, 'write_checkpoint', forgetful)
    fitting(folder, '--decoder')
    assert sorted(read) == ['a'] * 3 + ['b'] * 3  # once before, twice now
    assert running.load_model('decoder', folder / 'fits', 'cpu').fingerprint == first.fingerprint


def test_views_are_decoded_again_where_images_are_others(folder, monkeypatch):
    args = fit.parse(['--data', str(folder / 'data'), '--fits', str(folder / 'fits')])
    folders = scenes.list_avatars(args.data)
    config = rh.make_config('tiny', BRIEF)
    running.start('cpu')
    tasks = fit.Tasks(args, folders, {}, rh.Decoder(config), config, 0)
    first = tasks.prepared(0)
    kept = tasks.prepared(0)
    assert vars(first.rays).keys() == vars(kept.rays).keys()
    assert (first.rays.pixels == kept.rays.pixels).all()

    frames = scenes.read_frames(folders[0], 'train')[1]
    shutil.copy(frames[1]['path'], frames[0]['path'])
    assert not torch.equal(tasks.prepared(0).rays.pixels, first.rays.pixels)


def test_a_run_is_saved_by_time_and_seldom_enough(monkeypatch):
    """A save takes 30 s: at ten minutes, and then when 2 % of the time allow for another."""
    clock = [0.0]
    monkeypatch.setattr(running.time, 'monotonic', lambda: clock[0])
    chores = running.Chores()
    saved = []
    for step in range(600):  # of ten seconds
        clock[0] += 10
        if chores.due(step):
            saved.append(clock[0])
            with chores.doing():
                clock[0] += 30
    assert saved[:3] == [600, 1500, 3000]
    assert len(saved) * 30 <= 0.02 * clock[0] + 30
    assert [step for step in range(7) if running.Chores(3).due(step)] == [2, 5]


def saving(data, runs):
    """Trains a VAE for five steps, and saves each second."""
    options = ['--stage', 'vae', '--preset', 'tiny', '--data', data, '--runs', runs]
    options += ['--save-every', 2, '--set', 'vae_steps=5', 'vae_batch=1']
    train.main(train.parse([str(x) for x in options]))


def test_a_run_goes_on_while_it_is_saved(data, tmp_path, monkeypatch):
    """The first save takes until the third step is done, and holds what was after the second."""
    third_step = threading.Event()
    found = []

    def update(ema, module, original=running.EMA.update):
        original(ema, module)
        if ema.updates == 3:
            third_step.set()

    def write(path, kind, content, original=running.write_checkpoint):
        if kind == 'vae-state' and not found:
            before = [x.clone() for x in content['ema'].values()]
            found.append(third_step.wait(30))
            assert all(map(torch.equal, before, content['ema'].values()))
            assert content['updates'] == content['step'] == 2
        original(path, kind, content)

    monkeypatch.setattr(running.EMA, 'update', update)
    monkeypatch.setattr(running, 'write_checkpoint', write)
    saving(data, tmp_path)
    assert found == [True]
    assert running.read_checkpoint(tmp_path / 'vae-state.pt', 'vae-state')['step'] == 5


def test_a_save_that_fails_ends_the_run(data, tmp_path, monkeypatch):
    def write(path, kind, content):
        rh.stop(f'{path}: cannot be written')

    monkeypatch.setattr(running, 'write_checkpoint', write)
    with pytest.raises(rh.Stop, match='cannot be written'):
        saving(data, tmp_path)


def test_memory_is_told_before_the_run(tiny):
    of_run, plain = running.memory_of_training('base', tiny, False, False)
    _, again = running.memory_of_training('base', tiny, False, True)
    _, half = running.memory_of_training('base', tiny, True, False)
    assert again < plain
    assert half < plain
    assert of_run == 20 * sum(p.numel() for p in running.build('base', tiny).parameters())

    assert running.fit_memory('base', tiny, 4, False, of_run + 4 * plain) is False
    assert running.fit_memory('base', tiny, 4, False, of_run + 4 * again) is True
    with pytest.raises(rh.Stop, match='give --micro-batch 3, which changes nothing else'):
        running.fit_memory('base', tiny, 4, False, of_run + 3.5 * again)
    with pytest.raises(rh.Stop, match='not even one sample fits'):
        running.fit_memory('base', tiny, 4, False, of_run)


def test_autocast_leaves_a_normalisation_in_its_own_type():
    """Of inputs up to 8 it knows 1/64 at worst, and weights are at most 1."""
    torch.manual_seed(0)
    layer = rh.norm(64)
    torch.nn.init.uniform_(layer.weight, 0.5, 1)
    x = (5 + torch.randn(2, 64, 8, 8)).clamp(max=8)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert (out - torch.nn.GroupNorm.forward(layer, x)).abs().max() < 0.05


def test_a_training_step_is_few_kernels_of_the_whole_batch(data, tiny, tmp_path):
    """A sample adds two of them, its numbers and its noise; the host waits for two lists of samples
    of rays."""
    decoder = rh.Decoder(tiny)
    running.write_model(tmp_path / 'decoder.pt', 'decoder', tiny, decoder.state_dict(), 0)
    running.write_model(tmp_path / 'vae.pt', 'vae', tiny, rh.VAE(tiny).state_dict(), 0)
    for avatar in scenes.list_avatars(data):
        portrait = provenance.of_portrait(avatar, tiny.portrait)
        planes = torch.rand(3, 8, 32, 32) * 2 - 1
        path = tmp_path / f'{avatar.name}.pt'
        box = scenes.read_box(avatar)
        fit.write_planes(path, planes, box, tiny, decoder, [], {}, portrait=portrait)
    options = ['--stage', 'base', '--preset', 'tiny', '--data', data, '--fits', tmp_path]
    args = train.parse([str(x) for x in (*options, '--runs', tmp_path)])
    stage = train.prepare_diffusion(args, tiny, torch.device('cpu'))

    kernels = []
    for count in (2, 2, 7):  # the first makes what is kept
        indices = [(0, j, j % 2) for j in range(count)]
        batch = batches.collate([stage.data[index] for index in indices])
        with Counting() as counting:
            seen = batches.drawn(batch, stage.draw, 'cpu')
            sum(stage.loss(stage.network, seen).values()).backward()
        kernels.append(counting.kernels.total())
        assert dict(counting.waits) == {'nonzero': 2}
    assert kernels[2] - kernels[1] == 5 * 2
