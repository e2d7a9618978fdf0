"""The project's commands, at tiny size: the whole walk from nothing to an avatar, what they resume
and refuse, and runs of several ranks."""
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import avatars
import evaluate
import export
import fit
import likeness
import meshes
import metrics
import pictures
import rodinhd as rh
import running
import sample
import train
import watching
from papers import figures, tables

pytestmark = pytest.mark.usefixtures('brief_descent')

SCRIPTS = {
    'avatars.py': avatars,
    'fit.py': fit,
    'train.py': train,
    'sample.py': sample,
    'evaluate.py': evaluate,
    'papers.figures': figures,
    'papers.tables': tables,
}
TINY = ('--preset', 'tiny')
COARSE = ('steps=16', 'grid=8')  # fewer samples a ray, on a coarser grid
FIRST = 'data/avatar_0000/train/r_000.png'
SECOND = 'data/avatar_0001/train/r_000.png'
ONE_FRAME = ('--frames', 1, '--size', 16)


def run(module, *args):
    module.main(module.parse([str(arg) for arg in args]))


def command(*args, cwd):
    """Runs Python with these arguments in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )


def two_ranks(*args, cwd):
    """Runs a script under torchrun; it has to succeed."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    result = command(*launcher, *args, cwd=cwd)
    of_ranks, _, of_torchrun = result.stderr.partition('failed (exitcode')
    assert result.returncode == 0, of_ranks[-2000:] + of_torchrun[:200]


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def copy_to(folder, *paths):
    """Copies files into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        (folder / path.name).write_bytes(path.read_bytes())


def planes_in(name):
    """The planes that sample.py wrote to samples/<name>/, (B, 3, C, R, R)."""
    content = running.read_checkpoint(f'samples/{name}/planes.pt', 'avatars')
    return content['planes'].float()


# The walk -----------------------------------------------------------------------------------------
@pytest.fixture(scope='module', autouse=True)
def lpips_is_asked_for_once(brief_descent):
    """LPIPS looks for its weights once, and not in every evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, 'lpips_metric', functools.cache(metrics.lpips_metric))
        yield


def train_briefly(stage, steps):
    """Trains a stage whose samples take two steps, and whose avatars are fitted in five."""
    settings = *COARSE, 'sample_steps=2', 'likeness_steps=5'
    run(train, '--stage', stage, *TINY, '--set', steps, *settings)


@pytest.fixture(scope='module')
def walk(tmp_path_factory, data):
    """Every stage once, a few steps each: the folder that then holds data, fits, runs, samples,
    measured and assets."""
    folder = tmp_path_factory.mktemp('walk')
    (folder / 'data').symlink_to(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        visits = 'inner=10', 'outer=2', 'fit_steps=10'
        run(fit, '--decoder', *TINY, '--watch', '--set', *COARSE, *visits)
        run(fit, *TINY, '--set', *COARSE, 'fit_steps=40')
        train_briefly('vae', 'vae_steps=4')
        train_briefly('base', 'base_steps=4')
        train_briefly('upsample', 'up_steps=4')
        train_briefly('refiner', 'refiner_steps=3')

        frames = '--frames', 2, '--size', 32
        run(sample, '--unconditional', '--count', 2, *frames)
        how = '--count', 2, '--bf16', '--refine', 3, '--name', 'me'
        run(sample, '--portrait', FIRST, SECOND, *how, *frames)

        run(evaluate, '--views', 2, '--disturb', 'data', '--guidance', 1, 2, '--refine', 0)
        rows = '--rows', 'fitted', 'generated', 'sampled', 'nearest'
        one = '--name', 'one', '--refiner'
        run(evaluate, '--count', 1, '--views', 1, '--refine', 3, *rows, *one)
        run(evaluate, '--consistency', 1, '--refine', 3, '--images', 'other=data', '--refiner')
        run(evaluate, '--unconditional', 2)
        run(figures, 'forgetting')
    return folder


def test_the_walk_fits(walk):
    names = {'.lock', 'decoder.pt', 'decoder.json', 'decoder.jsonl', 'fit.json'}
    assert names_in(walk / 'fits') == names | {'avatar_0000.pt', 'avatar_0001.pt'}
    content = running.read_checkpoint(walk / 'fits/avatar_0000.pt', 'planes')
    assert content['planes'].shape == (3, 8, 32, 32)
    assert content['planes'].dtype == torch.float16
    assert content['low'].shape == (3, 8, 8, 8)

    # Consolidation acts from the second visit on
    lines = (walk / 'fits/decoder.jsonl').read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert len(log) == 4
    assert 'iwc' in log[-1]
    assert 'iwc' not in log[0]
    assert (walk / 'assets/forgetting.png').exists()


@pytest.mark.parametrize(
    ('stage', 'terms'),
    [
        ('vae', {'l1', 'edges', 'thumb', 'kl'}),
        ('base', {'mse', 'vlb'}),
        ('upsample', {'mse', 'pixel', 'perceptual'}),
        ('refiner', {'l1', 'perceptual'}),
    ],
)
def test_the_walk_trains(walk, stage, terms):
    endings = ('.pt', '-state.pt', '.jsonl')
    stages = {'vae': 4, 'base': 4, 'upsample': 4, 'refiner': 3}  # steps of each
    expected = {f'{name}{ending}' for name in stages for ending in endings}
    expected |= {f'{name}-{steps:06d}.png' for name, steps in stages.items()}
    assert names_in(walk / 'runs') == expected | {'.lock'}

    last = json.loads((walk / f'runs/{stage}.jsonl').read_text().splitlines()[-1])
    assert last['step'] == stages[stage] - 1
    assert terms | {'lr', 'norm', 'seconds', 'fixed'} <= last.keys()
    assert last['seconds'] > 0


def test_the_walk_samples(walk):
    expected = {'grid.png', 'turntable.webp', 'turntable.gif', 'planes.pt'}
    expected |= {'portrait.png', 'portrait1.png'}
    expected |= {'viewer.html', 'viewer1.html', 'viewer2.html', 'viewer3.html'}
    if importlib.util.find_spec('imageio_ffmpeg'):
        expected.add('turntable.mp4')
    assert names_in(walk / 'samples/me') == expected

    # Two portraits, two avatars each
    assert Image.open(walk / 'samples/me/grid.png').size == (7 * 32, 4 * 32)
    assert Image.open(walk / 'samples/unconditional/turntable.gif').n_frames == 2


def measured(walk, name):
    return json.loads((walk / 'measured' / f'{name}.json').read_text())


def test_the_walk_evaluates(walk):
    names = ('evaluate', 'one', 'consistency', 'unconditional')
    expected = {f'{name}{suffix}' for name in names for suffix in ('.json', '.png')}
    assert names_in(walk / 'measured') == expected

    table = measured(walk, 'evaluate')['mean']
    rows = ('generated', 'disturbed')
    generated = {f'{row}, s={s}, 2 steps' for row in rows for s in (1, 2)}
    assert table.keys() == {'fitted', *generated, 'nearest', 'mean'}
    assert {'PSNR', 'SSIM', 'VAE', 'front', 'FD-VAE'} <= table['fitted'].keys()
    assert table['fitted']['front'] > table['mean']['front']
    assert all(row['FD-VAE'] > 0 for row in table.values())  # by a VAE that has learnt nothing yet

    # Of one view there is no Frechet distance
    one = measured(walk, 'one')['mean']
    rows = {'fitted', 'generated', 'sampled'}
    assert one.keys() == {*rows, *(f'{row}, refined' for row in rows), 'nearest'}
    assert 'FD-VAE' not in one['fitted']


def test_the_walk_measures_consistency_and_avatars_of_nobody(walk):
    agree = measured(walk, 'consistency')
    assert agree['avatars'].keys() == {'avatar_0000'}
    assert agree['mean'].keys() == {'planes', 'surface', 'refined', 'other'}
    assert {'PSNR', 'SSIM'} <= agree['mean']['surface'].keys()

    nobody = measured(walk, 'unconditional')
    assert nobody['samples'] == 2
    assert nobody['views'] == 2 * 4
    assert nobody['FD-VAE'] > 0
    with pytest.raises(rh.Stop, match='--unconditional has no use for --no-truth'):
        run(evaluate, '--unconditional', 2, '--no-truth')


def test_the_readmes_python_runs(walk, monkeypatch):
    """The lines for those who write Python, as they stand, on tiny models, whose thin air has no
    mesh."""
    trimesh = pytest.importorskip('trimesh')
    monkeypatch.setattr(meshes, 'mesh_of', lambda *field, **how: trimesh.creation.box())
    monkeypatch.chdir(walk)
    text = (ROOT / 'README.md').read_text()
    program, = re.findall(r'^```python\n(.*?)^```', text, re.M | re.S)
    program = program.replace('me.png', FIRST).replace('192', '16')  # samples a ray
    scope = {}
    exec(program, scope)
    assert scope['view'].shape == (256, 256, 3)
    assert (walk / 'me.glb').stat().st_size > 500


# Going on -----------------------------------------------------------------------------------------
class Killed(Exception):
    pass


def test_finished_work_is_skipped(walk, monkeypatch):
    monkeypatch.chdir(walk)
    paths = list((walk / 'fits').glob('avatar*.pt'))
    before = [path.stat().st_mtime_ns for path in paths]
    run(fit, *TINY, '--set', *COARSE, 'fit_steps=40')
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_training_goes_on_to_the_same_weights(walk, monkeypatch, tmp_path):
    """Six steps at once, and three with an interruption then three, give the same bits."""
    monkeypatch.chdir(walk)
    options = ['--stage', 'base', *TINY, '--save-every', 3, '--log-every', 1]
    settings = ['--set', *COARSE, 'base_steps=6', 'base_batch=2', 'sample_steps=1']
    whole = tmp_path / 'whole'
    halves = tmp_path / 'halves'
    for runs in (whole, halves):
        copy_to(runs, walk / 'runs/vae.pt')
    run(train, *options, '--runs', whole, *settings)

    update = running.EMA.update

    def killed(self, module):
        if self.updates == 4:
            raise Killed
        update(self, module)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(running.EMA, 'update', killed)
        run(train, *options, '--runs', halves, *settings)
    run(train, *options, '--runs', halves, *settings)

    states = (runs / 'base-state.pt' for runs in (whole, halves))
    a, b = (running.read_checkpoint(state, 'base-state') for state in states)
    for part in ('model', 'ema'):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    logs = [watching.lines_of(folder / 'base.jsonl') for folder in (whole, halves)]
    for lines in logs:
        assert all(line.pop('seconds') > 0 for line in lines)
    assert logs[0] == logs[1]
    assert len(names_in(whole)) == len(names_in(halves))
    with pytest.raises(rh.Stop, match=r'other settings .base_lr'):
        run(train, *options, '--runs', halves, *settings, 'base_lr=1')


def test_fitting_the_decoder_goes_on_to_the_same_weights(walk, monkeypatch, tmp_path):
    """Killed between a visit and the record of its round, which is then repeated from what it had
    read."""
    monkeypatch.chdir(walk)
    options = ['--decoder', *TINY, '--set', *COARSE, 'inner=5', 'outer=2', '--fits']
    whole = tmp_path / 'whole'
    halves = tmp_path / 'halves'
    run(fit, *options, whole)

    write = running.write_checkpoint

    def killed(path, kind, content):
        if kind == 'decoder-state' and content['done'] == 3:
            raise Killed
        write(path, kind, content)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(running, 'write_checkpoint', killed)
        run(fit, *options, halves)
    run(fit, *options, halves)
    a, b = (running.read_checkpoint(x / 'decoder.pt', 'decoder')['model'] for x in (whole, halves))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_decoder_goes_on_from_another_one(walk, monkeypatch, tmp_path):
    """lr_decoder=0 keeps it as it was; its starting planes become those of the new avatars."""
    monkeypatch.chdir(walk)
    options = ['--decoder', *TINY, '--init', 'fits', '--fits', tmp_path]
    options += ['--set', 'inner=3', 'outer=1']
    refusal = r'fits/decoder\.pt: decoder_width is 32, not 12; use --preset tiny'
    with pytest.raises(rh.Stop, match=refusal):
        run(fit, *options, 'decoder_width=12')

    run(fit, *options, 'lr_decoder=0', 'weight_decay=0')
    a, b = (running.load_model('decoder', fits, 'cpu').state_dict() for fits in ('fits', tmp_path))
    assert all(torch.equal(a[name], b[name]) == (name != 'start') for name in a)


def test_planes_of_another_decoder_are_fitted_again(walk, monkeypatch, tmp_path):
    monkeypatch.chdir(walk)
    options = [*TINY, '--count', 1, '--fits', tmp_path]
    options += ['--set', 'inner=3', 'outer=1', 'fit_steps=3']
    path = tmp_path / 'avatar_0000.pt'
    run(fit, '--decoder', *options)
    run(fit, *options)
    before = path.stat().st_mtime_ns

    # The same settings: nothing to do
    run(fit, '--decoder', *options)
    run(fit, *options)
    assert path.stat().st_mtime_ns == before

    (tmp_path / 'decoder.pt').unlink()
    run(fit, '--decoder', *options, 'lr_decoder=0.1')
    run(fit, *options)
    assert path.stat().st_mtime_ns != before


# Models -------------------------------------------------------------------------------------------
@pytest.fixture
def random_runs(tiny, tmp_path):
    """write(kind, *settings) writes a random model of `tiny` into a folder; all four are there."""
    def write(kind, *settings):
        build, _ = running.MODELS[kind]
        config = rh.make_config('tiny', settings)
        weights = build(config).state_dict()
        running.write_model(tmp_path / f'{kind}.pt', kind, config, weights, 0)

    for kind in running.MODELS:
        write(kind)
    return write


@pytest.mark.parametrize(
    ('kind', 'setting'),
    [
        ('decoder', 'portrait=128'),
        ('decoder', 'vae_widths=8,8,8,8'),
        ('vae', 'channels=16'),
        ('vae', 'resolution=64'),
    ],
)
def test_models_need_to_share_what_both_use_alone(random_runs, tmp_path, kind, setting):
    """A decoder knows no portraits, and a VAE no planes."""
    random_runs(kind, setting)
    models = running.load_models(tmp_path, tmp_path)
    name = setting.partition('=')[0]
    assert getattr(models[kind].config, name) != getattr(models['upsample'].config, name)


@pytest.mark.parametrize(
    ('kind', 'setting', 'message'),
    [
        ('decoder', 'channels=16', r'channels is 16 in decoder\.pt, 8 in upsample\.pt'),
        ('decoder', 'resolution=64', r'resolution is 64 in decoder\.pt, 32 in upsample\.pt'),
        ('vae', 'portrait=128', r'portrait is 128 in vae\.pt, 64 in upsample\.pt'),
        ('vae', 'vae_widths=8,8,8,8', r'vae_widths is \(8, 8, 8, 8\) in vae\.pt, \(8, 8, 16, 16\)'),
        ('base', 'channels=16', r'channels is 16 in base\.pt, 8 in upsample\.pt'),
        ('base', 'portrait=128', r'portrait is 128 in base\.pt, 64 in upsample\.pt'),
    ],
)
def test_models_of_different_presets_are_refused(random_runs, tmp_path, kind, setting, message):
    """The value that differs is named, in one line."""
    random_runs(kind, setting)
    with pytest.raises(rh.Stop, match=message) as stopped:
        running.load_models(tmp_path, tmp_path)
    assert 'are of different presets' in str(stopped.value)
    assert '\n' not in str(stopped.value)


# Sampling -----------------------------------------------------------------------------------------
def test_a_seed_gives_the_same_avatar_in_any_batch(walk, monkeypatch):
    """Avatar 1 of seed 0 is avatar 0 of seed 1."""
    monkeypatch.chdir(walk)
    run(sample, '--unconditional', *ONE_FRAME, '--seed', 1, '--name', 'alone')
    assert torch.allclose(planes_in('unconditional')[1], planes_in('alone')[0], atol=2e-2)


def in_its_place(*_, **__):
    """Stands in for likeness.register, which takes a second, where a portrait is in its place."""
    return None


def test_avatars_are_fitted_as_long_as_the_model_says(walk, monkeypatch):
    """Without --refine it is the likeness_steps of the model's config, not of its preset."""
    monkeypatch.chdir(walk)
    monkeypatch.setattr(likeness, 'register', in_its_place)
    steps = []

    def fit_to_portrait(planes, seen, decoder, count, *args, **how):
        steps.append(count)
        return planes

    monkeypatch.setattr(likeness, 'fit_to_portrait', fit_to_portrait)
    run(sample, '--portrait', FIRST, *ONE_FRAME, '--name', 'default')
    run(sample, '--portrait', FIRST, *ONE_FRAME, '--name', 'asked', '--refine', 7)
    how = '--count', 1, '--views', 1, '--rows', 'generated', '--name', 'default'
    run(evaluate, *how, '--out', 'elsewhere')
    assert steps == [5, 7, 5]
    content = running.read_checkpoint('samples/default/planes.pt', 'avatars')
    assert content['refine'] == 5
    assert names_in(walk / 'elsewhere') == {'default.json', 'default.png'}


def apart(a, b):
    return (a - b).square().mean().sqrt()


def test_from_one_portrait_to_another(walk, monkeypatch):
    """The ends are the avatars of the two portraits, each with its own noise."""
    monkeypatch.chdir(walk)
    monkeypatch.setattr(likeness, 'register', in_its_place)
    how = '--frames', 4, '--size', 16, '--refine', 3, '--name'
    run(sample, '--portrait', FIRST, '--interpolate', SECOND, '--count', 3, *how, 'between')
    run(sample, '--portrait', FIRST, *how, 'first')
    run(sample, '--portrait', SECOND, '--seed', 1, *how, 'last')
    first, middle, last = planes_in('between')
    a = planes_in('first')[0]
    b = planes_in('last')[0]
    assert torch.allclose(first, a, atol=5e-3)
    assert torch.allclose(last, b, atol=5e-3)
    for end in (a, b):
        assert apart(middle, end) > 0.3 * apart(a, b) > 3e-3

    assert Image.open('samples/between/strip.png').size == (3 * 16, 2 * 16)
    assert Image.open('samples/between/turntable.webp').n_frames == 4
    with pytest.raises(rh.Stop, match='--interpolate needs one --portrait'):
        run(sample, '--unconditional', '--interpolate', SECOND)


def test_an_interruption_keeps_what_is_there_and_says_so(walk, monkeypatch):
    """An earlier run of the name had a mesh, which does not stay among the new files."""
    monkeypatch.chdir(walk)
    how = '--unconditional', '--size', 16, '--frames', 6, '--name', 'stopped'
    run(sample, *how)
    folder = walk / 'samples/stopped'
    assert (folder / 'turntable.gif').exists()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, 'write_turntable', interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(sample, *how, '--seed', 1)
    there = 'grid.png, planes.pt, viewer.html'
    expected = f'in samples/stopped there are {there}; the same command begins anew'
    assert str(stopped.value) == expected
    assert names_in(folder) == set(there.split(', '))

    monkeypatch.setattr(sample, 'sample', interrupted)
    with pytest.raises(KeyboardInterrupt, match='nothing is written; the same command begins'):
        run(sample, *how)
    assert names_in(folder) == set(there.split(', '))


def test_a_turntable_of_few_frames_leaves_the_grid_its_sides(walk, monkeypatch):
    monkeypatch.chdir(walk)
    how = '--unconditional', '--size', 16, '--no-tag', '--name'
    run(sample, *how, 'six', '--frames', 6)
    run(sample, *how, 'one', '--frames', 1)
    six, one = (Image.open(f'samples/{name}/grid.png') for name in ('six', 'one'))
    assert six.size == (6 * 16, 16)
    assert np.array_equal(six, one)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--unconditional', '--align'], '--align has nothing to align with --unconditional'),
        (['--unconditional', '--view', 'a.png:9'], '--view goes with one --portrait'),
        (['--portrait', 'a.png', '--view', 'left.png'], 'give IMAGE:DEGREES'),
        (['--portrait', 'a.png', '--view', 'left.png:200'], 'from -180 to 180'),
        (['--portrait', 'a.png', '--view', 'b.png:9', '--refine', 0], 'leave out --refine 0'),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(rh.Stop, match=message):
        run(sample, *options)


def test_further_photographs(walk, monkeypatch, capsys):
    """Of the same avatar, from its side; where they were taken from is found, and said."""
    monkeypatch.chdir(walk)
    monkeypatch.setattr(likeness, 'TURNS', (0, 5))
    monkeypatch.setattr(likeness, 'HEIGHTS', (0,))
    monkeypatch.setattr(likeness, 'register', in_its_place)
    how = '--portrait', FIRST, '--refine', 2, *ONE_FRAME, '--name'
    view = FIRST.replace('/r_000', '/r_001')
    run(sample, *how, 'further', '--view', f'{view}:-60', '--count', 2)
    run(sample, *how, 'alone', '--count', 2)
    printed = capsys.readouterr().out
    found = r'--view number 1, given at -60 degrees: found at -(6[0-3]|5[2-9]), from -?[0-3] above'
    assert re.search(found, printed)
    assert apart(planes_in('further'), planes_in('alone')) > 1e-3
    content = running.read_checkpoint('samples/further/planes.pt', 'avatars')
    assert content['views'] == [f'{view}:-60']


def test_pictures_and_films_say_that_they_are_synthetic(tmp_path):
    picture = np.full((256, 256, 3), 255, dtype=np.uint8)
    tagged = export.tagged(picture)
    changed = (tagged != picture).any(2)
    assert changed[-30:, -80:].any()
    assert not changed[:-30].any()
    assert not changed[:, :-80].any()
    small = picture[:32, :32]
    assert export.tagged(small) is small

    export.save_animation(tmp_path, [tagged] * 2, tag=True)
    export.save_image(tmp_path / 'a.png', Image.fromarray(tagged), tag=True)
    source = b'digitalsourcetype/trainedAlgorithmicMedia'
    assert source in (tmp_path / 'a.png').read_bytes()
    assert source in (tmp_path / 'turntable.webp').read_bytes()
    assert Image.open(tmp_path / 'turntable.gif').info['comment'].startswith(b'Synthetic')
    assert Image.open(tmp_path / 'a.png').info['Description'] == export.SAYS
    export.save_image(tmp_path / 'b.png', Image.fromarray(picture))
    assert 'Description' not in Image.open(tmp_path / 'b.png').info


def test_an_apple_gpu_is_refused_with_the_reason():
    with pytest.raises(rh.Stop, match='--device mps: Apple GPUs have no 64-bit floats'):
        running.start('mps')


def test_bars_in_a_file_are_lines(capfd, monkeypatch):
    monkeypatch.setattr(running, 'SECONDS_A_LINE', 0)
    with running.Bar(total=3, desc='counting') as bar:
        for k in range(3):
            bar.update()
            bar.set_postfix_str(f'{k} dB')
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith('counting: ') and '\r' not in line for line in lines)
    assert '3/3' in lines[-1]
    assert '2 dB' in lines[-1]


def test_sampling_from_a_crop(walk, monkeypatch):
    if not hasattr(pytest.importorskip('cv2'), 'CascadeClassifier'):
        pytest.skip('this OpenCV has no face cascades')
    monkeypatch.chdir(walk)
    crop = '--crop', 0, 0, 64
    run(sample, '--portrait', FIRST, *crop, *ONE_FRAME, '--refine', 0, '--name', 'cropped')
    folder = walk / 'samples/cropped'
    assert (folder / 'align.png').exists()
    assert Image.open(folder / 'portrait.png').size == (64, 64)
    with pytest.raises(rh.Stop, match='--crop goes with one portrait'):
        run(sample, '--portrait', FIRST, FIRST, *crop)


def test_films(tmp_path):
    """Of even sides that are no multiples of 16."""
    ffmpeg = pytest.importorskip('imageio_ffmpeg')
    frames = [np.full((34, 50, 3), 20 * i, dtype=np.uint8) for i in range(12)]
    assert 'turntable.mp4' in export.save_animation(tmp_path, frames)
    meta, *read = ffmpeg.read_frames(str(tmp_path / 'turntable.mp4'))
    assert meta['size'] == (50, 34)
    assert meta['fps'] == 12
    assert len(read) == 12
    assert abs(int(np.frombuffer(read[6], np.uint8).mean()) - 120) < 6


@pytest.mark.parametrize('script', sorted(SCRIPTS))
def test_help_needs_no_pytorch(script):
    """Python lists what it imports."""
    args = ['-m', script] if script.startswith('papers') else [ROOT / script]
    result = command('-X', 'importtime', *args, '--help', cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('usage: '), result.stdout
    assert 'endings' in result.stderr
    assert 'torch' not in result.stderr


# What is refused ----------------------------------------------------------------------------------
def without_bars(text):
    """The lines of a process's stderr that are no progress bar."""
    return [line for line in text.splitlines() if line.strip() and '%|' not in line]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (
            ['fit.py', '--data', 'nothing', *TINY, '--decoder'],
            'draw some with `python avatars.py`',
        ),
        (
            ['fit.py', '--data', 'data', '--fits', 'nothing', *TINY],
            'make it with python fit.py --decoder',
        ),
        (
            ['train.py', '--stage', 'base', *TINY, '--fits', 'nothing'],
            'run fit.py --decoder, then fit.py',
        ),
        (
            ['train.py', '--stage', 'base', *TINY, '--runs', 'nothing'],
            'make it with python train.py --stage vae',
        ),
        (['train.py', '--stage', 'base', '--preset', 'small'], 'do not fit preset small'),
        (['sample.py', '--portrait', 'missing.png'], 'no such image'),
        (['avatars.py', '--count', '0'], 'count'),
        (['evaluate.py', '--unconditional', '1'], '--unconditional at least 2'),
        (['evaluate.py', '--steps', '5000'], 'timesteps'),
        (
            ['evaluate.py', '--unconditional', '2', '--images', 'other=renders'],
            'leave out one of them',
        ),
        (
            ['evaluate.py', '--consistency', '1', '--images', 'other=renders'],
            'there is no such file; an avatar is a folder',
        ),
        (['papers.figures', 'schedules', '--size', '8'], '--size must be at least 16'),
        (['papers.figures', 'denoising'], 'denoising needs --portrait'),
        (['papers.tables', 'run', '4b', '--set', 'nothing=1'], 'no such setting'),
    ],
)
def test_what_is_out_of_order_ends_in_one_line(walk, monkeypatch, capfd, args, message):
    monkeypatch.chdir(walk)
    script, *options = args
    with pytest.raises(rh.Stop) as stopped:
        run(SCRIPTS[script], *options)
    lines = without_bars(capfd.readouterr().err)
    lines += str(stopped.value).splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not list(walk.rglob('*.tmp*'))


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([ROOT / 'sample.py', '--portrait', 'missing.png'], 'no such image'),
        (['-m', 'papers.tables', 'run', '4b', '--set', 'nothing=1'], 'no such setting'),
    ],
    ids=['script', 'module'],
)
def test_a_process_that_is_out_of_order_ends_in_one_line(walk, args, message):
    result = command(*args, cwd=walk)
    lines = without_bars(result.stderr)
    assert result.returncode in (1, 2)
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
    assert not list(walk.rglob('*.tmp*'))


# Several ranks ------------------------------------------------------------------------------------
SEVERAL = '''
import torch
import evaluate, fit, running, train

def run(module, options):
    module.main(module.parse(options.split()))

three = '--preset tiny --data three'
run(fit, f'--decoder {three} --fits fits2 --set steps=16 grid=8 inner=5 outer=2')
run(fit, f'{three} --fits fits3 --set steps=16 grid=8 fit_steps=5')
short = 'steps=16 grid=8 up_steps=2 up_batch=2 sample_steps=1'
run(train, f'--stage upsample --preset tiny --runs runs2 --set {short}')
run(evaluate, '--views 1 --refine 0 --out measured2')

rank, _, _ = running.start()
p = torch.nn.Parameter(torch.zeros(3))
for active, expected in ((True, 3.0), (rank == 0, 2.0)):
    p.grad = torch.full((3,), 2.0 + 2 * rank)
    running.average_gradients([p], active)
    assert p.grad.tolist() == 3 * [expected], p.grad
'''


def test_two_ranks_of_several_commands(walk, tmp_path):
    """One after the other, which spares their starts. There are three avatars for two ranks, so one
    of them has nothing to do at the end of a round. Last, gradients 2 and 4 of two ranks average to
    3; with the second idle, to 2."""
    run(avatars, *TINY, '--count', 3, '--views', 6, '--data', walk / 'three')
    copy_to(walk / 'fits3', walk / 'fits/decoder.pt')
    copy_to(walk / 'runs2', walk / 'runs/vae.pt')
    program = tmp_path / 'several.py'
    program.write_text(SEVERAL)
    two_ranks(program, cwd=walk)

    decoder = {'.lock', 'decoder.pt', 'decoder.json', 'decoder.jsonl'}
    assert names_in(walk / 'fits2') == decoder
    planes = {f'avatar_000{i}.pt' for i in range(3)}
    assert names_in(walk / 'fits3') == {'.lock', 'decoder.pt', 'fit.json', *planes}
    assert {'upsample.pt', 'upsample-state.pt'} < names_in(walk / 'runs2')
    assert names_in(walk / 'measured2') == {'evaluate.json', 'evaluate.png'}
    content = json.loads((walk / 'measured2/evaluate.json').read_text())
    assert content['avatars'].keys() == {'avatar_0000', 'avatar_0001'}
    assert {'command', 'commit', 'machine', 'seed', 'standard_error'} <= content.keys()
    assert content['identities'] == {name: name for name in content['avatars']}


# Tables -------------------------------------------------------------------------------------------
@pytest.fixture
def small_tables(walk, monkeypatch):
    """Options of tables at a few steps, without a process a command, in the walk's folder."""
    def call(args, script, *options):
        run(SCRIPTS[script], *options)

    monkeypatch.chdir(walk)
    monkeypatch.setattr(tables, 'call', call)
    numbers = ('inner', 'outer', 'fit_steps', 'base_steps', 'up_steps', 'base_batch', 'up_batch')
    options = [*TINY, '--test', 'data', '--downscale', '2', '--set']
    return [*options, *COARSE, *(f'{name}=2' for name in numbers), 'sample_steps=1']


def run_table(table, options):
    """Runs a table -> what it wrote."""
    tables.run(tables.parse(['run', table, *options, '--out', 'shown']))
    with open(f'shown/table_{table}.json') as file:
        return json.load(file)


def seeds_of(content):
    """How many values each metric of each row has."""
    return [len(values) for row in content['rows'].values() for values in row['ours'].values()]


def test_a_table_of_fitting(small_tables, capsys):
    content = run_table('6', small_tables)
    assert len(content['rows']) == 9
    assert seeds_of(content) == [1] * 9
    assert content['command'].startswith('python -m papers.tables run 6 --preset tiny')
    assert tables.as_markdown(content) in capsys.readouterr().out


def test_a_table_of_generation(walk, small_tables, capsys):
    """What rows share is trained once; --once gives rows one seed."""
    content = run_table('4b', ['--seeds', '2', '--once', 'B', 'C', *small_tables])
    assert len(content['rows']) == 4
    assert seeds_of(content) == [1] * 8 + [2] * 8
    assert tables.as_markdown(content) in capsys.readouterr().out

    # B's, C's, and two seeds of what D and E share
    assert len(list((walk / 'tables').glob('upsample_*'))) == 4
    found = []
    for special in ('tokens=none_base_schedule=linear_', ''):
        folder = walk / 'tables' / f'base_{special}seed0'
        config = running.load_model('base', folder, 'cpu').config
        found.append((config.tokens, config.base_schedule))
    assert found == [('none', 'linear'), ('multi', 'cosine')]


def test_a_row_of_fitting_begins_with_fresh_planes(walk, small_tables):
    args = tables.parse(['run', '4a', *small_tables])
    cell = tables.fitted(args, ['weight_iwc=0'], 0)
    assert cell.figures['SSIM'] < 1
    path = walk / 'tables/fit_weight_iwc=0_seed0/avatar_0000.pt'
    assert running.read_checkpoint(path, 'planes')['settings']['fresh']


def test_a_command_that_fails_ends_the_table(small_tables):
    """What waits is dropped."""
    options = [*small_tables, '--work', 'other', '--fits', 'nothing']
    with pytest.raises(rh.Stop, match='nothing'):
        run_table('4b', options)


def test_all_rows_have_settings_that_exist(small_tables):
    args = tables.parse(['run', '4a', *small_tables])
    for table in tables.TABLES.values():
        for row in table.rows.values():
            for settings in row.settings.values():
                options = tables.settings_of(settings, args)
                changes = options[options.index('--set') + 1:]
                rh.make_config('tiny', [*tables.PAPERS, *changes])


# On a GPU -----------------------------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_rendering_on_a_gpu_is_rendering_on_the_cpu(tiny):
    planes = torch.randn(3, 8, 32, 32) * 0.3
    decoder = rh.Decoder(tiny)
    camera = rh.orbit_pose(30, 10), rh.intrinsics_of(34.0, 32)

    def view(device):
        field = rh.PlaneField(planes.to(device), decoder.to(device))
        c2w, intrinsics = (x.to(device) for x in camera)
        return rh.render_view(field, c2w, intrinsics, 32, 32, tiny.steps).rgb.cpu()

    assert (view('cpu') - view('cuda')).abs().max() < 1e-3
