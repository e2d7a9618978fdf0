"""The commands of the README, at tiny size: the whole walk from nothing to an avatar, under python and under torchrun."""
import importlib.util
import json
import re
import shlex
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
import figures
import fit
import rodinhd as rh
import sample
import tables
import train

SCRIPTS = {'avatars.py': avatars, 'fit.py': fit, 'train.py': train, 'sample.py': sample, 'evaluate.py': evaluate, 'figures.py': figures,
           'tables.py': tables}


def run(module, *args):
    module.main(module.parse([str(a) for a in args]))


@pytest.fixture(scope='module')
def walk(tmp_path_factory, data):
    """Every stage once, a few steps each: the folder that then holds data, fits, runs, samples and results."""
    folder = tmp_path_factory.mktemp('walk')
    (folder / 'data').symlink_to(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(fit, '--decoder', '--preset', 'tiny', '--watch', '--set', 'inner=10', 'outer=2', 'fit_steps=40')
        run(fit, '--preset', 'tiny', '--set', 'fit_steps=40')
        run(train, '--stage', 'vae', '--preset', 'tiny', '--set', 'vae_steps=4')
        run(train, '--stage', 'base', '--preset', 'tiny', '--set', 'base_steps=4')
        run(train, '--stage', 'upsample', '--preset', 'tiny', '--set', 'up_steps=4')
        run(sample, '--unconditional', '--count', 2, '--frames', 2, '--size', 32)
        run(sample, '--portrait', 'data/avatar_0000/train/r_000.png', 'data/avatar_0001/train/r_000.png', '--count', 2, '--frames', 2,
            '--size', 32, '--bf16', '--name', 'me', '--refine', 3)
        run(evaluate, '--views', 2, '--disturb', 'data', '--guidance', 1, 2, '--refine', 3)
        run(evaluate, '--count', 1, '--views', 1, '--rows', 'fitted', 'nearest', '--name', 'one')
        run(evaluate, '--consistency', 1, '--refine', 3, '--images', 'other=data')
        with pytest.raises(SystemExit, match='--unconditional has no use for --no-truth'):
            run(evaluate, '--unconditional', 2, '--no-truth')
        run(evaluate, '--unconditional', 2)
        run(figures, 'forgetting')
    return folder


def test_the_whole_walk(walk):
    assert {p.name for p in (walk / 'fits').iterdir()} == {
        '.lock', 'decoder.pt', 'decoder.json', 'decoder.jsonl', 'fit.json', 'avatar_0000.pt', 'avatar_0001.pt'}
    planes = rh.read_checkpoint(walk / 'fits/avatar_0000.pt', 'planes')
    assert planes['planes'].shape == (3, 8, 32, 32) and planes['planes'].dtype == torch.float16 and planes['low'].shape == (3, 8, 8, 8)
    assert {f'{s}{e}' for s in ('vae', 'base', 'upsample') for e in ('.pt', '-state.pt', '.jsonl', '.png')} | {'.lock'} == {
        p.name for p in (walk / 'runs').iterdir()}
    for stage, terms in {'vae': {'l1', 'edges', 'thumb', 'kl'}, 'base': {'mse', 'vlb'}, 'upsample': {'mse', 'pixel', 'perceptual'}}.items():
        line = json.loads((walk / f'runs/{stage}.jsonl').read_text().splitlines()[-1])
        assert line['step'] == 3 and terms < line.keys()
    assert {p.name for p in (walk / 'samples/me').iterdir()} == {
        'portrait.png', 'portrait1.png', 'grid.png', 'turntable.webp', 'turntable.gif', 'planes.pt',
        'viewer.html', 'viewer1.html', 'viewer2.html', 'viewer3.html'} | {
        'turntable.mp4' for _ in ['imageio_ffmpeg'] if importlib.util.find_spec(_)}
    assert Image.open(walk / 'samples/me/grid.png').size == (7 * 32, 4 * 32)                       # two portraits, two avatars each
    assert Image.open(walk / 'samples/unconditional/turntable.gif').n_frames == 2
    table = json.loads((walk / 'results/evaluate.json').read_text())['mean']
    generated = {f'{row}, s={s}, 10 steps' for row in ('generated', 'disturbed') for s in (1, 2)}
    assert table.keys() == {'fitted', *generated, 'nearest', 'mean'}
    assert {'PSNR', 'SSIM', 'VAE', 'front', 'FD-VAE'} <= table['fitted'].keys()
    one = json.loads((walk / 'results/one.json').read_text())['mean']
    assert one.keys() == {'fitted', 'nearest'} and 'FD-VAE' not in one['fitted']        # of one view there is none
    assert table['fitted']['front'] > table['mean']['front'] and table['fitted']['FD-VAE'] < table['mean']['FD-VAE']
    assert {p.name for p in (walk / 'results').iterdir()} == {
        f'{name}{suffix}' for name in ('evaluate', 'one', 'consistency', 'unconditional') for suffix in ('.json', '.png')}
    agree = json.loads((walk / 'results/consistency.json').read_text())
    assert agree['avatars'].keys() == {'avatar_0000'} and {'PSNR', 'SSIM'} <= agree['mean']['surface'].keys()
    assert agree['mean'].keys() == {'planes', 'surface', 'sharpened', 'other'}
    assert (walk / 'assets/forgetting.png').exists()
    nobody = json.loads((walk / 'results/unconditional.json').read_text())
    assert nobody['samples'] == 2 and nobody['views'] == 2 * 4 and nobody['FD-VAE'] > 0
    log = [json.loads(line) for line in (walk / 'fits/decoder.jsonl').read_text().splitlines()]
    assert len(log) == 4 and 'iwc' in log[-1] and 'iwc' not in log[0]   # consolidation acts from the second visit on


def test_finished_work_is_skipped(walk, monkeypatch):
    monkeypatch.chdir(walk)
    before = {p: p.stat().st_mtime_ns for p in (walk / 'fits').glob('avatar*.pt')}
    run(fit, '--preset', 'tiny', '--set', 'fit_steps=40')
    assert before == {p: p.stat().st_mtime_ns for p in (walk / 'fits').glob('avatar*.pt')}


def test_training_goes_on_to_the_same_weights(walk, monkeypatch, tmp_path):
    """Six steps at once, and three with an interruption then three, give the same bits."""
    monkeypatch.chdir(walk)
    command = ['--stage', 'base', '--preset', 'tiny', '--save-every', 3, '--log-every', 1, '--set', 'base_steps=6']
    for runs in ('whole', 'halves'):
        (tmp_path / runs).mkdir()
        (tmp_path / runs / 'vae.pt').write_bytes((walk / 'runs/vae.pt').read_bytes())
    run(train, *command, '--runs', tmp_path / 'whole')

    class Killed(Exception):
        pass

    def die(step, original=train.EMA.update):
        def update(self, module):
            if self.updates == step:
                raise Killed
            original(self, module)
        return update
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.EMA, 'update', die(4))
        run(train, *command, '--runs', tmp_path / 'halves')
    run(train, *command, '--runs', tmp_path / 'halves')
    a, b = (rh.read_checkpoint(tmp_path / r / 'base-state.pt', 'base-state') for r in ('whole', 'halves'))
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])
    assert all(torch.equal(a['ema'][k], b['ema'][k]) for k in a['ema'])
    assert (tmp_path / 'whole/base.jsonl').read_text() == (tmp_path / 'halves/base.jsonl').read_text()
    with pytest.raises(SystemExit, match=r'other settings .base_lr'):
        run(train, *command, 'base_lr=1', '--runs', tmp_path / 'halves')


def test_fitting_the_decoder_goes_on_to_the_same_weights(walk, monkeypatch, tmp_path):
    """Killed between a visit and the record of its round, which is then repeated from what it had read."""
    monkeypatch.chdir(walk)
    command = ['--decoder', '--preset', 'tiny', '--set', 'inner=5', 'outer=2', '--fits']
    run(fit, *command, tmp_path / 'whole')

    class Killed(Exception):
        pass

    def die(path, kind, content, original=rh.write_checkpoint):
        if kind == 'decoder-state' and content['done'] == 3:
            raise Killed
        original(path, kind, content)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rh, 'write_checkpoint', die)
        run(fit, *command, tmp_path / 'halves')
    run(fit, *command, tmp_path / 'halves')
    a, b = (rh.read_checkpoint(tmp_path / r / 'decoder.pt', 'decoder')['model'] for r in ('whole', 'halves'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_decoder_goes_on_from_another_one(walk, monkeypatch, tmp_path):
    """lr_decoder=0 keeps it as it was; its starting planes become those of the new avatars."""
    monkeypatch.chdir(walk)
    command = ['--decoder', '--preset', 'tiny', '--init', 'fits', '--fits', tmp_path, '--set', 'inner=3', 'outer=1']
    with pytest.raises(SystemExit, match=r'fits/decoder\.pt: has other decoder_width; use --preset tiny'):
        run(fit, *command, 'decoder_width=12')
    run(fit, *command, 'lr_decoder=0', 'weight_decay=0')
    a, b = (rh.load_model('decoder', folder, 'cpu').state_dict() for folder in ('fits', tmp_path))
    assert all(torch.equal(a[k], b[k]) == (k != 'start') for k in a)


def test_planes_of_another_decoder_are_fitted_again(walk, monkeypatch, tmp_path):
    monkeypatch.chdir(walk)
    command = ['--preset', 'tiny', '--count', 1, '--fits', tmp_path, '--set', 'inner=3', 'outer=1', 'fit_steps=3']
    run(fit, '--decoder', *command)
    run(fit, *command)
    before = (tmp_path / 'avatar_0000.pt').stat().st_mtime_ns
    run(fit, '--decoder', *command)                                     # the same settings: nothing to do
    run(fit, *command)
    assert (tmp_path / 'avatar_0000.pt').stat().st_mtime_ns == before
    (tmp_path / 'decoder.pt').unlink()
    run(fit, '--decoder', *command, 'lr_decoder=0.1')
    run(fit, *command)
    assert (tmp_path / 'avatar_0000.pt').stat().st_mtime_ns != before


def test_a_seed_gives_the_same_avatar_in_any_batch(walk, monkeypatch):
    monkeypatch.chdir(walk)
    run(sample, '--unconditional', '--frames', 1, '--size', 16, '--seed', 1, '--name', 'alone')
    together, alone = (rh.read_checkpoint(walk / f'samples/{n}/planes.pt', 'avatars')['planes'] for n in ('unconditional', 'alone'))
    assert torch.allclose(together[1], alone[0], atol=2e-2)             # avatar 1 of seed 0 is avatar 0 of seed 1


def test_from_one_portrait_to_another(walk, monkeypatch):
    """The ends are the avatars of the two portraits, each with its own noise."""
    monkeypatch.chdir(walk)
    first, last = (f'data/avatar_000{i}/train/r_000.png' for i in (0, 1))
    how = ['--frames', 4, '--size', 16, '--refine', 3, '--name']
    run(sample, '--portrait', first, '--interpolate', last, '--count', 3, *how, 'between')
    run(sample, '--portrait', first, *how, 'first')
    run(sample, '--portrait', last, '--seed', 1, *how, 'last')
    between, a, b = (rh.read_checkpoint(f'samples/{n}/planes.pt', 'avatars')['planes'].float() for n in ('between', 'first', 'last'))
    assert torch.allclose(between[0], a[0], atol=5e-3) and torch.allclose(between[2], b[0], atol=5e-3)
    def apart(x, y):
        return (x - y).square().mean().sqrt()
    assert all(apart(between[1], x) > 0.3 * apart(a[0], b[0]) > 3e-3 for x in (a[0], b[0]))
    assert Image.open('samples/between/strip.png').size == (3 * 16, 2 * 16)
    assert Image.open('samples/between/turntable.webp').n_frames == 4
    with pytest.raises(SystemExit, match='--interpolate needs one --portrait'):
        run(sample, '--unconditional', '--interpolate', last)


def test_sampling_from_a_crop(walk, monkeypatch):
    if not hasattr(pytest.importorskip('cv2'), 'CascadeClassifier'):
        pytest.skip('this OpenCV has no face cascades')
    monkeypatch.chdir(walk)
    face = 'data/avatar_0000/train/r_000.png'
    run(sample, '--portrait', face, '--crop', 0, 0, 64, '--frames', 1, '--size', 16, '--refine', 0, '--name', 'cropped')
    assert (walk / 'samples/cropped/align.png').exists() and Image.open(walk / 'samples/cropped/portrait.png').size == (64, 64)
    with pytest.raises(SystemExit, match='--crop goes with one portrait'):
        run(sample, '--portrait', face, face, '--crop', 0, 0, 64)


def test_films(tmp_path):
    ffmpeg = pytest.importorskip('imageio_ffmpeg')
    frames = [np.full((34, 50, 3), 20 * i, dtype=np.uint8) for i in range(12)]                      # even sides, no multiples of 16
    assert 'turntable.mp4' in export.save_animation(tmp_path, frames)
    meta, *read = ffmpeg.read_frames(str(tmp_path / 'turntable.mp4'))
    assert meta['size'] == (50, 34) and meta['fps'] == 12 and len(read) == 12
    assert abs(int(np.frombuffer(read[6], np.uint8).mean()) - 120) < 6


def command(*args, cwd):
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(('args', 'message'), [
    (['fit.py', '--data', 'nothing', '--preset', 'tiny', '--decoder'], 'draw some with `python avatars.py`'),
    (['fit.py', '--data', 'data', '--fits', 'nothing', '--preset', 'tiny'], 'make it with python fit.py --decoder'),
    (['train.py', '--stage', 'base', '--preset', 'tiny', '--fits', 'nothing'], 'run fit.py --decoder, then fit.py'),
    (['train.py', '--stage', 'base', '--preset', 'tiny', '--runs', 'nothing'], 'make it with python train.py --stage vae'),
    (['train.py', '--stage', 'base', '--preset', 'small'], 'do not fit preset small'),
    (['sample.py', '--portrait', 'missing.png'], 'no such image'),
    (['avatars.py', '--count', '0'], 'count'),
    (['evaluate.py', '--unconditional', '1'], '--unconditional at least 2'),
    (['evaluate.py', '--steps', '5000'], 'timesteps'),
    (['evaluate.py', '--unconditional', '2', '--images', 'other=renders'], 'leave out one of them'),
    (['evaluate.py', '--consistency', '1', '--images', 'other=renders'], 'there is no such file; an avatar is a folder'),
])
def test_what_is_out_of_order_ends_in_one_line(walk, args, message):
    result = command(ROOT / args[0], *args[1:], cwd=walk)
    lines = [line for line in result.stderr.splitlines() if line.strip() and '%|' not in line]
    assert result.returncode in (1, 2) and len(lines) == 1 and message in lines[0], result.stderr
    assert not list(walk.rglob('*.tmp'))


@pytest.mark.parametrize('args', [
    ['fit.py', '--decoder', '--preset', 'tiny', '--data', 'three', '--fits', 'fits2', '--set', 'inner=5', 'outer=2'],
    ['fit.py', '--preset', 'tiny', '--data', 'three', '--fits', 'fits3', '--set', 'fit_steps=5'],
    ['train.py', '--stage', 'upsample', '--preset', 'tiny', '--runs', 'runs2', '--set', 'up_steps=2'],
    ['evaluate.py', '--views', '1', '--refine', '3', '--out', 'results2'],
], ids=['fit-decoder', 'fit', 'train', 'evaluate'])
def test_two_ranks(walk, args):
    """Under torchrun; three avatars for two ranks, so one of them has nothing to do at the end of a round."""
    if not (walk / 'three').exists():
        run(avatars, '--preset', 'tiny', '--count', 3, '--views', 6, '--data', walk / 'three')
    for folder, kept in {'fits3': 'fits/decoder.pt', 'runs2': 'runs/vae.pt'}.items():
        (walk / folder).mkdir(exist_ok=True)
        (walk / folder / kept.split('/')[1]).write_bytes((walk / kept).read_bytes())
    result = command('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / args[0], *args[1:], cwd=walk)
    assert result.returncode == 0, result.stderr[-2000:]


def test_two_ranks_average_what_is_active():
    """Gradients 2 and 4 of two ranks average to 3; with the second idle, to 2."""
    program = f'''import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, fit, rodinhd as rh
rank, world, device = rh.start('cpu')
p = torch.nn.Parameter(torch.zeros(3)); p.grad = torch.full((3,), 2.0 + 2 * rank)
fit.average_gradients([p]); assert p.grad.tolist() == [3.0] * 3, p.grad
p.grad = torch.full((3,), 2.0 + 2 * rank)
fit.average_gradients([p], active=rank == 0); assert p.grad.tolist() == [2.0] * 3, p.grad
'''
    script = ROOT / 'tests' / '.average.py'
    script.write_text(program)
    try:
        result = command('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', script, cwd=ROOT)
    finally:
        script.unlink()
    assert result.returncode == 0, result.stderr[-2000:]


def test_tables(walk, monkeypatch, capsys):
    """Two tables at a few steps each, without a process a command; what rows share is trained once."""
    monkeypatch.chdir(walk)
    monkeypatch.setattr(tables, 'call', lambda args, script, *options: run(SCRIPTS[script], *options))
    small = ['--preset', 'tiny', '--test', 'data', '--downscale', '2',
             '--set', 'inner=2', 'outer=2', 'fit_steps=2', 'base_steps=2', 'up_steps=2']
    for table, rows, seeds in (('6', 9, ()), ('4b', 4, ('--seeds', '2', '--once', 'B', 'C'))):
        tables.run(tables.parse(['run', table, *seeds, *small, '--out', 'shown']))
        content = json.loads((walk / f'shown/table_{table}.json').read_text())
        lengths = [len(v) for row in content['rows'].values() for v in row['ours'].values()]
        assert lengths == ([1] * 9 if table == '6' else [1] * 8 + [2] * 8)
        assert len(content['rows']) == rows and tables.as_markdown(content) in capsys.readouterr().out
    args = tables.parse(['run', '4a', *small])
    assert tables.fitted(args, ['weight_iwc=0'], 0)[0]['SSIM'] < 1 and rh.read_checkpoint(
        walk / 'tables/fit_weight_iwc=0_seed0/avatar_0000.pt', 'planes')['settings']['fresh']
    for of_command in [row for _, _, rows in tables.TABLES.values() for row, _ in rows.values()]:
        for settings in of_command.values():
            rh.make_config('tiny', tables.settings_of(settings, args)[3:])
    with pytest.raises(SystemExit, match='nothing'):                    # a command that fails ends the table, and what waits is dropped
        tables.run(tables.parse(['run', '4b', *small, '--work', 'other', '--fits', 'nothing', '--out', 'shown']))
    assert len(list((walk / 'tables').glob('upsample_*'))) == 4         # 4b: B's, C's, and two seeds of what D and E share
    models = [rh.load_model('base', walk / 'tables' / f'base_{s}seed0', 'cpu') for s in ('tokens=none_base_schedule=linear_', '')]
    assert [(m.config.tokens, m.config.base_schedule) for m in models] == [('none', 'linear'), ('multi', 'cosine')]


def test_the_readmes_tables_are_those_of_the_results():
    text = (ROOT / 'README.md').read_text()
    for path in (ROOT / 'results').glob('table_*.json'):
        assert tables.as_markdown(json.loads(path.read_text())) in text, f'{path.name}: run python tables.py readme'


def readme_commands():
    text = (ROOT / 'README.md').read_text()
    blocks = re.findall(r'```(?:sh|bash)?\n(.*?)```', text, re.S)
    lines = [line.split('#')[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r'(python|torchrun)\b.*\.py', line)]


def test_the_readmes_commands_parse():
    """Every command line of the README that runs one of our scripts names options that exist."""
    commands = readme_commands()
    assert len(commands) >= 8
    for line in commands:
        words = shlex.split(line)
        script = next((w for w in words if w in SCRIPTS), None)
        if script:
            SCRIPTS[script].parse(words[words.index(script) + 1:])


def test_the_readmes_python_runs(walk, monkeypatch):
    """The lines for those who write Python, as they stand, on tiny models, whose thin air has no mesh."""
    trimesh = pytest.importorskip('trimesh')
    monkeypatch.setattr(export, 'mesh_of', lambda field, grid: trimesh.creation.box())
    program, = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    monkeypatch.chdir(walk)
    scope = {}
    exec(program.replace('me.png', 'data/avatar_0000/train/r_000.png'), scope)
    assert scope['view'].shape == (256, 256, 3) and (walk / 'me.glb').stat().st_size > 500


def test_layout():
    """Chapters in order, two files a command: scripts import rodinhd and never one another; the budgets of lines hold."""
    lines = (ROOT / 'rodinhd.py').read_text().splitlines()
    chapters = [int(m.group(1)) for line in lines if (m := re.match(r'# (\d+) .*---$', line))]
    assert chapters == list(range(1, 12)) and len(lines) <= 1300
    for name in [*SCRIPTS, 'batches.py', 'export.py', 'photo.py', 'refine.py', 'shortcuts.py', 'words.py']:
        text = (ROOT / name).read_text()
        assert len(text.splitlines()) <= (450 if name == 'evaluate.py' else 250)
        assert not re.search(r'^\s*(?:import|from) (?:avatars|fit|train|sample|evaluate|figures|tables)\b', text, re.M)
    assert set((ROOT / 'requirements.txt').read_text().split()) == {'torch', 'numpy', 'pillow', 'tqdm', 'lpips', 'scipy'}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_rendering_on_a_gpu_is_rendering_on_the_cpu(tiny):
    planes, decoder = torch.randn(3, 8, 32, 32) * 0.3, rh.Decoder(tiny)
    pose, k = rh.orbit_pose(30, 10), rh.intrinsics_of(34.0, 32)
    cpu = rh.render_view(rh.PlaneField(planes, decoder), pose, k, 32, 32, tiny.steps)[0]
    gpu = rh.render_view(rh.PlaneField(planes.cuda(), decoder.cuda()), pose.cuda(), k.cuda(), 32, 32, tiny.steps)[0]
    assert (cpu - gpu.cpu()).abs().max() < 1e-3
