"""Files say what they were made with: what does not belong together is refused, in one line that
names both; what is damaged, too large or of no sense as well; what is written is on the disk."""
import errno
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import forks
import pytest
import torch
from conftest import ROOT

import avatars
import batches
import evaluate
import fit
import provenance
import rodinhd as rh
import running
import sample
import scenes
import ship
import train

NO_TRAINING = ['fit_steps=2', 'base_steps=2', 'base_batch=2', 'inner=2', 'outer=1', 'fit_avatars=2']


@pytest.fixture(scope='module')
def made(data, tiny, tmp_path_factory):
    """A folder with data/, fits/ and runs/: random networks and planes that belong together."""
    folder = tmp_path_factory.mktemp('provenance')
    shutil.copytree(data, folder / 'data')
    torch.manual_seed(0)
    write_decoder(folder, tiny)
    decoder = running.load_model('decoder', folder / 'fits', 'cpu')
    for avatar in scenes.list_avatars(folder / 'data'):
        path = folder / 'fits' / f'{avatar.name}.pt'
        planes = 0.3 * torch.randn(3, 8, 32, 32)
        box = scenes.read_box(avatar)
        source = provenance.of_avatar(avatar)
        fit.write_planes(path, planes, box, tiny, decoder, [20.0], {'fit_steps': 2}, source)
    write_networks(folder, tiny, decoder)
    return folder


def write_decoder(folder, config, seed=0):
    torch.manual_seed(seed)
    state = rh.Decoder(config).state_dict()
    running.write_model(folder / 'fits/decoder.pt', 'decoder', config, state, 0)


def write_networks(folder, config, decoder):
    runs = folder / 'runs'
    running.write_model(runs / 'vae.pt', 'vae', config, rh.VAE(config).state_dict(), 0)
    vae = running.load_model('vae', runs, 'cpu')
    made_with = {'decoder': decoder.fingerprint, 'vae': vae.fingerprint}
    for kind in ('base', 'upsample'):
        state = running.build(kind, config).state_dict()
        running.write_model(runs / f'{kind}.pt', kind, config, state, 0, made_with=made_with)


@pytest.fixture
def copy(made, tmp_path):
    """A copy of it, to be spoilt."""
    shutil.copytree(made, tmp_path / 'copy')
    return tmp_path / 'copy'


def folders_of(copy, runs=True):
    options = ['--data', copy / 'data', '--fits', copy / 'fits']
    return [str(x) for x in options + runs * ['--runs', copy / 'runs']]


def refused(work, *parts):
    """Does what must end in one line, which names all of the parts."""
    with pytest.raises(rh.Stop) as stopped:
        work()
    message = str(stopped.value)
    assert '\n' not in message, message
    for part in parts:
        assert str(part) in message, message


# What does not belong together --------------------------------------------------------------------
def test_what_belongs_together_is_read(made, tiny):
    models = running.load_models(made / 'runs', made / 'fits')
    decoder = models['decoder']
    for avatar in scenes.list_avatars(made / 'data'):
        running.read_planes(made / f'fits/{avatar.name}.pt', decoder, avatar)


def test_files_of_before_are_read(copy, tiny):
    """They say nothing of what they were made with, besides the decoder."""
    path = copy / 'fits/avatar_0000.pt'
    content = torch.load(path, weights_only=True)
    for name in ('made_with', 'sum_of_low'):
        del content[name]
    torch.save(content, path)
    decoder = running.load_model('decoder', copy / 'fits', 'cpu')
    for low in (False, True):
        running.read_planes(path, decoder, copy / 'data/avatar_0001', low)
    write_decoder(copy, tiny, seed=1)
    decoder = running.load_model('decoder', copy / 'fits', 'cpu')
    refused(lambda: running.read_planes(path, decoder), path, 'decoder.pt')
    running.load_models(ROOT / 'nothing', ROOT / 'nothing')  # what ships


@pytest.mark.parametrize('stage', ['base', 'upsample'])
def test_another_decoder_is_noticed_by_training(copy, tiny, stage):
    write_decoder(copy, tiny, seed=1)
    args = train.parse(['--stage', stage, '--preset', 'tiny', *folders_of(copy)])
    refused(lambda: train.prepare_diffusion(args, tiny, 'cpu'), 'avatar_0000.pt', 'decoder.pt')


def test_another_decoder_is_noticed_by_the_models(copy, tiny):
    write_decoder(copy, tiny, seed=1)
    load = lambda: running.load_models(copy / 'runs', copy / 'fits')
    refused(load, 'base.pt', 'fits/decoder.pt', 'train it again')


def test_another_vae_is_noticed_by_the_models(copy, tiny):
    torch.manual_seed(1)
    state = rh.VAE(tiny).state_dict()
    running.write_model(copy / 'runs/vae.pt', 'vae', tiny, state, 0)
    load = lambda: running.load_models(copy / 'runs', copy / 'fits')
    refused(load, 'base.pt', 'runs/vae.pt', 'train it again')


def test_other_planes_than_the_decoders_are_not_evaluated(copy, tiny):
    write_decoder(copy, tiny, seed=1)
    decoder = running.load_model('decoder', copy / 'fits', 'cpu')
    path = copy / 'fits/avatar_0000.pt'
    avatar = copy / 'data/avatar_0000'
    refused(lambda: evaluate.read_planes(path, decoder, avatar, 'cpu'), path, 'decoder.pt')


def test_planes_of_others_of_the_same_name_are_noticed(copy):
    one, two = (copy / f'data/avatar_{i:04d}' for i in range(2))
    path = copy / 'fits/avatar_0000.pt'
    refused(lambda: running.read_planes(path, None, two), path, two, 'other images')
    running.read_planes(path, None, one)


def test_images_that_were_edited_are_noticed(copy):
    """Their times tell where to look; a copy of the same bytes is the same."""
    folder = copy / 'data/avatar_0000'
    path = copy / 'fits/avatar_0000.pt'
    image = folder / 'train/r_003.png'
    os.utime(image, (1, 1))
    running.read_planes(path, None, folder)

    data = bytearray(image.read_bytes())
    data[-1] ^= 1  # of the same size
    image.write_bytes(data)
    refused(lambda: running.read_planes(path, None, folder), path, folder, 'other images')


def test_another_front_is_noticed(copy, monkeypatch):
    folder = copy / 'data/avatar_0000'
    path = copy / 'fits/avatar_0000.pt'
    monkeypatch.setattr(scenes, 'front_turns', lambda folder: 1)
    refused(lambda: running.read_planes(path, None, folder), path, folder, 'front elsewhere')
    refused(lambda: fitting(copy, '--count', '1'), path, folder, 'other images')


def fitting(copy, *more):
    options = ['--preset', 'tiny', *folders_of(copy, runs=False), *more, '--set', *NO_TRAINING]
    fit.main(fit.parse(options))


def test_fitting_calls_finished_what_was_fitted_to_these_images(copy, capsys):
    """Times of files may change, as they do in a copy; pixels may not."""
    written = (copy / 'fits/avatar_0000.pt').stat().st_mtime_ns
    image = copy / 'data/avatar_0000/train/r_003.png'
    os.utime(image, (1, 1))
    fitting(copy, '--count', '1')
    assert (copy / 'fits/avatar_0000.pt').stat().st_mtime_ns == written

    pixels = scenes.open_image(image)
    pixels.putpixel((30, 30), (255, 0, 0, 255))
    pixels.save(image)
    refused(lambda: fitting(copy, '--count', '1'), 'avatar_0000.pt', 'other images', '--fits')


def test_a_finished_decoder_is_of_its_seed_and_images(copy):
    shutil.rmtree(copy / 'fits')
    fitting(copy, '--decoder')
    before = (copy / 'fits/decoder.pt').read_bytes()
    fitting(copy, '--decoder')
    refused(lambda: fitting(copy, '--decoder', '--seed', '5'), 'decoder.pt', 'seed')
    refused(lambda: fitting(copy, '--decoder', '--downscale', '2'), 'decoder.pt', 'downscale')
    images = copy / 'data/avatar_0001/train'
    shutil.copy(images / 'r_001.png', images / 'r_002.png')
    refused(lambda: fitting(copy, '--decoder'), 'decoder.pt', 'images')
    assert (copy / 'fits/decoder.pt').read_bytes() == before


def test_an_interrupted_stage_goes_on_with_what_it_began_with(copy, tiny):
    options = ['--stage', 'base', '--preset', 'tiny', *folders_of(copy), '--save-every', '1']
    brief = [*NO_TRAINING, 'steps=16', 'grid=8', 'sample_steps=2']  # pictures, above all
    args = train.parse([*options, '--set', *brief])
    train.main(args)
    train.main(args)
    assert running.load_model('base', copy / 'runs', 'cpu').made_with.keys() >= {'decoder', 'vae'}

    path = copy / 'fits/avatar_0001.pt'
    content = torch.load(path, weights_only=True)
    content['planes'][0, 0, 0, 0] += 1
    running.write_checkpoint(path, 'planes', content)
    refused(lambda: train.main(args), 'base-state.pt', 'another fitted planes')


def test_an_avatar_is_not_called_decoder(copy):
    (copy / 'data/avatar_0001').rename(copy / 'data/decoder')
    before = (copy / 'fits/decoder.pt').read_bytes()
    refused(lambda: fitting(copy), 'data/decoder', 'another name')
    refused(lambda: fitting(copy, '--decoder'), 'data/decoder', 'another name')
    assert (copy / 'fits/decoder.pt').read_bytes() == before


def test_avatars_of_another_seed_have_other_names(tmp_path):
    how = ['--count', '1', '--size', '8', '--views', '1', '--held-out', '0', '--data', tmp_path]
    for seed in (0, 5):
        avatars.main(avatars.parse([*map(str, how), '--seed', str(seed)]))
    names = sorted(path.name for path in scenes.list_avatars(tmp_path))
    assert names == ['avatar_0000', 'avatar_5_0000']
    how[how.index('8')] = 16
    refused(lambda: avatars.main(avatars.parse([*map(str, how)])), 'avatar_0000', '8 pixels', '16')


# Claims -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(('number', 'mine'), [
    (errno.EAGAIN, False), (errno.EACCES, False), (errno.ENOLCK, True), (errno.ENOSYS, True),
])
def test_only_a_lock_of_another_process_is_respected(tmp_path, monkeypatch, number, mine):
    fcntl = pytest.importorskip('fcntl')

    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'lockf', lockf)
    with running.claim(tmp_path / 'a.pt') as found:
        assert found == mine


def test_what_another_process_holds_comes_last_or_is_said(tmp_path, monkeypatch):
    running.start('cpu')
    holder = forks.hold(tmp_path / 'b')
    left = []
    clock = iter(range(0, 10 ** 6, 5))
    with monkeypatch.context() as patched:
        patched.setattr(running.time, 'monotonic', lambda: next(clock))
        found = list(running.claimed('abc', lambda name: tmp_path / name, left))
    assert (found, left) == (['a', 'c'], ['b'])
    refused(lambda: fit.say_what_is_left([tmp_path / 'b'], {}, 3), '1 of 3 avatars not fitted')

    left = []
    found = []
    for name in running.claimed('abc', lambda name: tmp_path / name, left):
        found.append(name)
        holder.kill()
        holder.join()
    assert (found, left) == (['a', 'c', 'b'], []) or (found, left) == (['a', 'b', 'c'], [])


def test_what_killed_processes_left_is_removed_by_the_next_holder(tmp_path):
    for name in ('.0a1b2c3d.tmp.a.pt', '.0a1b2c3d.tmp.b.pt'):
        (tmp_path / name).write_bytes(b'half')
    with running.claim(tmp_path / 'a.pt'):
        pass
    assert [path.name for path in tmp_path.glob('.*.tmp.*')] == ['.0a1b2c3d.tmp.b.pt']


# Files --------------------------------------------------------------------------------------------
def test_the_same_content_is_the_same_file(tmp_path):
    sums = []
    for name in ('a.pt', 'another.pt'):
        running.write_checkpoint(tmp_path / name, 'x', {'x': torch.arange(9.0)})
        sums.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert sums[0] == sums[1]


def test_file_and_folder_are_on_the_disk_before_and_after_the_new_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def noted(number):
        steps.append(os.readlink(f'/proc/self/fd/{number}'))
        fsync(number)

    def renamed(source, target):
        steps.append('rename')
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', noted)
    monkeypatch.setattr(os, 'replace', renamed)
    running.write_checkpoint(tmp_path / 'a.pt', 'x', {})
    assert steps[0].endswith('.tmp.a.pt')
    assert steps[1:] == ['rename', str(tmp_path)]


def flipped(path, wanted):
    """Flips a bit amid a tensor's bytes; wanted: of the part of the archive that is so long."""
    with zipfile.ZipFile(path) as archive:
        part = next(part for part in archive.infolist() if part.file_size == wanted)
    data = bytearray(path.read_bytes())
    header = data[part.header_offset:part.header_offset + 30]
    start = part.header_offset + 30 + sum(
        int.from_bytes(header[i:i + 2], 'little') for i in (26, 28)
    )
    data[start + wanted // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(('low', 'side'), [(False, 32), (True, 8)])
def test_a_flipped_bit_of_planes_is_noticed(copy, low, side):
    path = copy / 'fits/avatar_0000.pt'
    flipped(path, 3 * 8 * side ** 2 * 2)
    refused(lambda: running.read_planes(path, low=low), path, 'delete it')


def test_a_flipped_bit_of_a_model_is_noticed(copy):
    path = copy / 'runs/base.pt'
    state = torch.load(path, weights_only=True)['model']
    flipped(path, max(x.nbytes for x in state.values()))
    refused(lambda: running.load_model('base', copy / 'runs', 'cpu'), path, 'damaged')


def test_weights_that_fp16_cannot_hold_are_not_written(tmp_path, tiny):
    state = rh.VAE(tiny).state_dict()
    path = tmp_path / 'vae.pt'
    running.write_model(path, 'vae', tiny, state, 0)
    before = path.read_bytes()
    name = next(iter(state))
    state[name][0] = 7e4
    refused(lambda: running.write_model(path, 'vae', tiny, state, 1), path, name, '7e+04')
    assert path.read_bytes() == before


def test_damaged_lines_of_a_log_are_dropped():
    assert train.is_of(b'{"step": 1}\n', 5)
    for line in (b'\0\0\0\n', b'\xff\n', b'{"step"', b'{"step": 9}\n', b'[]\n', b'1\n'):
        assert not train.is_of(line, 5)


def test_a_state_that_lacks_something_ends_in_one_line(copy, tiny):
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    path = copy / 'runs/x-state.pt'
    for content in ({}, {'settings': {}}, {'settings': {}, 'step': 1}, {'settings': 3}):
        running.write_checkpoint(path, 'x-state', content)
        resume = lambda: train.resume(
            path, 9, {'a': 1}, {}, network, optimizer, running.EMA(network, 0.9), None, copy / 'no'
        )
        refused(resume, path, 'delete it')


def changed(content, *keys, to):
    """Nested dicts and lists with another value in one place."""
    key, *others = keys
    copied = content.copy()
    copied[key] = changed(content[key], *others, to=to) if others else to
    return copied


@pytest.mark.parametrize(('keys', 'value'), [
    (('step',), 10), (('step',), -1), (('step',), 2.5), (('step',), math.nan), (('step',), True),
    (('updates',), 'a'), (('updates',), -1), (('skipped',), 'a'), (('row',), math.nan),
    (('model', 'weight'), torch.full((2, 2), math.nan)),
    (('ema', 'weight'), torch.full((2, 2), math.inf)),
    (('optimizer', 'state', 0, 'exp_avg'), torch.full((2, 2), math.nan)),
    (('optimizer', 'state', 0, 'exp_avg_sq'), torch.full((2, 2), -1.0)),
    (('optimizer', 'state', 0, 'step'), torch.tensor(-3.0)),
    (('made_with',), 5), (('settings',), None),
])
def test_hostile_numbers_of_a_state_end_in_one_line(tmp_path, keys, value):
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    ema = running.EMA(network, 0.9)
    state = {
        'settings': {'a': 1}, 'made_with': {}, 'step': 3, 'updates': 3, 'skipped': 0, 'row': 0,
        'model': network.state_dict(), 'ema': ema.shadow, 'optimizer': optimizer.state_dict(),
    }
    path = tmp_path / 'x-state.pt'

    def resume(content):
        running.write_checkpoint(path, 'x-state', content)
        finite = rh.Finite('x')
        settings = {'a': 1}
        no_log = tmp_path / 'no'
        return train.resume(path, 9, settings, {}, network, optimizer, ema, finite, no_log)

    assert resume(state) == 3
    refused(lambda: resume(changed(state, *keys, to=value)), path, 'delete it')


def test_settings_of_an_optimizer_are_not_those_of_a_file():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p], lr=0.5)
    state = optimizer.state_dict()
    running.load_optimizer(optimizer, changed(state, 'param_groups', 0, 'betas', to='ab'))
    assert optimizer.param_groups[0]['betas'] == (0.9, 0.999)
    assert optimizer.param_groups[0]['lr'] == 0.5


def test_an_optimizer_is_taken_up_as_it_was():
    """A weight that was never used has no state, then and afterwards; sizes are compared."""
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))

    def optimizer():
        return torch.optim.AdamW([used, unused])

    first = optimizer()
    used.grad = torch.ones(2)
    first.step()
    second = optimizer()
    running.load_optimizer(second, first.state_dict())
    assert second.state_dict()['state'].keys() == {0}

    spoilt = first.state_dict()
    spoilt['state'][0]['exp_avg'] = torch.zeros(3)
    with pytest.raises(ValueError, match='exp_avg'):
        running.load_optimizer(optimizer(), spoilt)


def test_names_that_cannot_be_printed_end_no_work(tmp_path, monkeypatch):
    """What fit.py has measured is written, and printed with question marks."""
    printed = io.TextIOWrapper(io.BytesIO(), 'cp1252')
    monkeypatch.setattr(sys, 'stdout', printed)
    running.start('cpu')
    args = fit.parse(['--fits', str(tmp_path)])
    fit.summary(args, 'fit', {'\u65e5\u672c': [20.0]})
    printed.flush()
    assert b'??' in printed.buffer.getvalue()
    assert json.loads((tmp_path / 'fit.json').read_text()) == {'psnr': {'\u65e5\u672c': 20.0}}


# Values from strangers ----------------------------------------------------------------------------
HOSTILE = {
    'grid': (2000, 33, '32', -8, True, math.nan),
    'decoder_width': (40000, 3),
    'base_blocks': (10 ** 7,),
    'base_mult': ((1,) * 99, (10 ** 6,), 4, ('a',)),
    'ema': (math.nan, 2.0),
    'tokens': ('all', 3),
    'preset': ('a\nb', 3),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_checkpoints_config_is_checked_as_the_command_lines_is(copy, name):
    path = copy / 'runs/base.pt'
    content = torch.load(path, weights_only=True)
    for value in HOSTILE[name]:
        content['config'][name] = value
        torch.save(content, path)
        refused(lambda: running.load_model('base', copy / 'runs', 'cpu'), path, 'train.py')


def test_a_network_that_is_larger_than_its_weights_takes_no_memory(copy):
    path = copy / 'runs/base.pt'
    content = torch.load(path, weights_only=True)
    content['config']['base_width'] = 8192  # hundreds of GB
    torch.save(content, path)
    began = time.monotonic()
    refused(lambda: running.load_model('base', copy / 'runs', 'cpu'), path)
    assert time.monotonic() - began < 20


def spoilt(content, name, value):
    return {**content, name: value}


def test_planes_are_checked_in_every_file(copy, tiny):
    path = copy / 'fits/avatar_0001.pt'
    good = torch.load(path, weights_only=True)
    wide = torch.zeros(1, dtype=torch.float16).expand(3, 8, 32, 32)
    wrong = {
        'planes': (torch.zeros(3, 8, 32, 16).half(), torch.zeros(3, 8, 32, 32), wide, 3, None),
        'low': (good['low'].transpose(2, 3), torch.zeros(3, 8, 8, 8, dtype=torch.int16)),
        'centre': (torch.zeros(2), torch.full((3,), math.nan), torch.full((3,), 1e30), [0] * 3),
        'half': (0.0, -1.0, 1e-45, math.inf, math.nan, True, torch.ones(1), 'a', None),
    }
    for name, values in wrong.items():
        for value in values:
            torch.save(spoilt(good, name, value), path)
            refused(lambda: batches.Planes(copy / 'fits', copy / 'data', tiny)[1], path)
    torch.save({'kind': 'planes'}, path)
    refused(lambda: batches.Planes(copy / 'fits', copy / 'data', tiny)[1], path)


def test_a_pipe_in_place_of_a_checkpoint_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / 'decoder.pt')
    refused(lambda: running.load_model('decoder', tmp_path, 'cpu'), 'decoder.pt')


@pytest.mark.parametrize('options', [
    '--guidance nan', '--guidance inf', '--size 1000000', '--seed 100000000000000000000',
    '--seed -1', '--name ..', '--name a/b', '--eta nan', '--count 1000000000', '--frames 999999',
])
def test_values_of_no_sense_end_in_one_line_at_the_start(options, tmp_path):
    args = sample.parse(['--unconditional', '--out', str(tmp_path / 'out'), *options.split()])
    refused(lambda: sample.main(args), options.split()[0])
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(('file', 'name'), [
    ('...png', 'portrait'), ('a.png', 'a'), ('.. .png', 'portrait'), ('x\\y.png', 'x-y'),
])
def test_names_of_samples_stay_in_their_folder(file, name, tmp_path):
    path = tmp_path / file
    path.write_bytes(b'x')
    args = sample.parse(['--portrait', str(path), '--out', str(tmp_path / 'out')])
    assert sample.folder_of(args, [path]) == tmp_path / 'out' / name


def test_two_portraits_of_one_name_have_two_folders(tmp_path):
    folders = []
    args = sample.parse(['--portrait', 'x', '--out', str(tmp_path / 'out')])
    for text in ('one', 'two', 'one'):
        path = tmp_path / text / 'me.png'
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        folder = sample.folder_of(args, [path])
        folders.append(folder.name)
        made_with = {'source': sample.source_of(args, [path])}
        content = {'made_with': made_with, 'mesh': 'm.obj'}
        running.write_checkpoint(folder / 'planes.pt', 'avatars', content)
    assert folders == ['me', 'me-2', 'me']


def test_files_of_an_earlier_run_do_not_stay_among_the_new_ones(tmp_path):
    old = ['viewer.html', 'viewer3.html', 'portrait2.png', 'm.obj', 'm2.obj', 'grid.png']
    old += ['m.mtl', 'm2-texture.png', 's.ply', 's1.ply']
    kept = ['notes.txt', 'my viewer.html', 'other.ply']
    for name in old + kept:
        (tmp_path / name).write_text('old')
    states = sample.states_of(tmp_path)
    with running.atomic(tmp_path / 'viewer.html') as temporary:
        temporary.write_text('new')
    sample.remove_old(tmp_path, states, ['m.obj', 's.ply'])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['viewer.html', *kept])


# How programs end ---------------------------------------------------------------------------------
def program_of(text, **variables):
    """Starts a program that imports what scripts do, and that Ctrl-C interrupts: what was started
    in the background, as a suite may be, ignores it."""
    return subprocess.Popen(
        [sys.executable, '-c', text],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **variables},
    )


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_import_of_torch_is_one_line(number):
    process = program_of("import endings\nprint('here', flush=True)\nimport torch, fit, time\n")
    assert process.stdout.readline() == 'here\n'
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode
    assert err == 'interrupted; the same command goes on after the last file written\n', err


def test_sigterm_leaves_no_half_file(tmp_path):
    text = (
        'import running, time\n'
        f"with running.atomic({str(tmp_path / 'a.pt')!r}) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    print('here', flush=True)\n"
        '    time.sleep(60)\n'
    )
    process = program_of(text)
    assert process.stdout.readline() == 'here\n'
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert err.startswith('interrupted') and err.count('\n') == 1, err
    assert list(tmp_path.iterdir()) == []


def test_some_of_what_torchrun_sets_is_no_torchrun(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in (('RANK', '3'), ('WORLD_SIZE', '8'), ('MASTER_ADDR', 'localhost')):
        monkeypatch.setenv(name, value)
        assert not running.under_torchrun()
    monkeypatch.setenv('MASTER_PORT', '1')
    assert running.under_torchrun()


def test_models_that_ship_are_packed(tmp_path, capsys):
    """In a little more than half of the bytes, and each value to half a step of its block."""
    config = rh.make_config('tiny')
    network = running.build('base', config)
    torch.manual_seed(0)
    for p in network.parameters():
        torch.nn.init.normal_(p)
    folder = tmp_path / 'runs'
    folder.mkdir()
    running.write_model(folder / 'base.pt', 'base', config, network.state_dict(), 3)
    ship.main(ship.parse([str(folder / 'base.pt'), '--out', str(tmp_path)]))
    assert 'base.pt: ' in capsys.readouterr().out
    assert (tmp_path / 'base.pt').stat().st_size < 0.6 * (folder / 'base.pt').stat().st_size

    plain = running.load_model('base', folder, 'cpu').state_dict()
    again = running.load_model('base', tmp_path, 'cpu').state_dict()
    for name, x in plain.items():
        if x.numel() < 1024:
            assert torch.equal(again[name], x)
        else:  # half a step, which is a 127th of the largest value of a block, and fp16's error
            assert (again[name] - x).abs().max() <= x.abs().max() * (0.5 / 127 + 1e-3)

    first = tmp_path / 'first'
    first.mkdir()
    halved = {name: x / 2 for name, x in network.state_dict().items()}
    running.write_model(first / 'base.pt', 'base', config, halved, 3)
    ship.main(ship.parse([
        str(folder / 'base.pt'), '--out', str(tmp_path), '--after', str(first), '0.5'
    ]))
    between = running.load_model('base', tmp_path, 'cpu').state_dict()
    for name, x in plain.items():
        assert (between[name] - 0.75 * x).abs().max() <= x.abs().max() * (0.5 / 127 + 1e-3)

    refused(lambda: ship.pack(tmp_path / 'base.pt', folder), 'is packed already')
    content = torch.load(tmp_path / 'base.pt', weights_only=True)
    name = next(iter(content['steps']))
    content['steps'][name] = content['steps'][name][:-1]
    running.write_checkpoint(tmp_path / 'base.pt', 'base', content)
    refused(lambda: running.load_model('base', tmp_path, 'cpu'), f'the steps of {name}')


@pytest.mark.parametrize('more, expected', [
    (['fit_avatars=2'], 0.25),
    (['fit_avatars=1'], 0),  # a single scene: nothing is made of it in low resolution
    (['fit_avatars=1', 'rescale=0.5'], 0.5),
])
def test_a_single_scene_is_not_rescaled(copy, monkeypatch, more, expected):
    shutil.rmtree(copy / 'fits')
    seen = []

    def replay(tasks, decoder, config, **how):
        seen.append(config.rescale)
        rh.stop('far enough')

    monkeypatch.setattr(rh, 'replay', replay)
    with pytest.raises(rh.Stop, match='far enough'):
        options = ['--preset', 'tiny', '--decoder', *folders_of(copy, runs=False)]
        fit.main(fit.parse([*options, '--set', *NO_TRAINING, *more]))
    assert seen == [expected]
