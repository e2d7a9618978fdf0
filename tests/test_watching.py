"""Training that can be watched: the log, the loss on fixed noise, the pictures, the last line."""
import importlib.util
import json

import pytest
import torch

import batches
import rodinhd as rh
import running
import train
import watching
from papers import figures

STEPS = 'vae_steps=4', 'vae_batch=2'


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """The folder of a VAE's run, with a checkpoint after two steps, and what was printed."""
    runs = tmp_path_factory.mktemp('watched')
    how = '--stage', 'vae', '--preset', 'tiny', '--save-every', '2', '--log-every', '3'
    where = '--data', data, '--runs', runs, '--held-out', data, '--picture-every', 2
    train.main(train.parse([*map(str, (*how, *where)), '--set', *STEPS]))
    return runs


def test_a_log_says_what_one_wants_to_know(trained, tiny):
    lines = watching.lines_of(trained / 'vae.jsonl')
    assert [line['step'] for line in lines] == [0, 1, 3]  # each third, and those that are saved
    for line in lines:
        assert {'l1', 'lr', 'norm', 'seconds'} <= line.keys()
        assert line['norm'] > 0
        assert line['seconds'] > 0
    assert ['held_out' in line for line in lines] == [False, True, True]
    assert lines[1]['held_out'] != lines[2]['held_out']


def test_pictures_are_numbered(trained):
    pictures = sorted(path.name for path in trained.glob('*.png'))
    assert pictures == ['vae-000002.png', 'vae-000004.png']


def test_the_loss_on_fixed_noise_is_the_same_again(data, tiny):
    config = rh.make_config('tiny', STEPS)
    args = train.parse(['--stage', 'vae', '--preset', 'tiny', '--data', str(data)])
    stage = train.prepare_vae(args, config, torch.device('cpu'))
    fixed = watching.fixed_of(stage, train.prepare_vae, args, config, torch.device('cpu'), 3)
    assert fixed.name == 'fixed'
    losses = [watching.loss_on(fixed, stage.network, stage.loss, 'cpu') for _ in range(2)]
    assert losses[0] == losses[1]

    # As one batch of all samples has it, and the weights are put back
    indices = [(0, j, j * len(stage.data.items) // 8) for j in range(8)]
    batch = batches.collate([stage.data[index] for index in indices])
    seen = batches.drawn(batch, stage.draw, 'cpu')
    with torch.no_grad():
        expected = float(sum(stage.loss(stage.network, seen).values()))
    assert losses[0] == pytest.approx(expected, rel=1e-4)

    ema = running.EMA(stage.network, 0.9)
    before = [p.clone() for p in stage.network.parameters()]
    for x in ema.shadow.values():
        x.add_(0.05)
    with watching.averaged(stage.network, ema):
        assert watching.loss_on(fixed, stage.network, stage.loss, 'cpu') != losses[0]
    assert all(map(torch.equal, before, stage.network.parameters()))


def test_the_last_line(trained, capsys):
    args = train.parse(['--stage', 'vae', '--runs', str(trained)])
    watching.last_line(args, 4, [trained / 'vae.pt'])
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f'written: {trained / "vae.pt"}; loss held out ')
    assert line.endswith('steps; next: python train.py --stage base')


def test_curves(trained, tmp_path):
    pytest.importorskip('matplotlib')
    options = ['curves', '--runs', str(trained), '--out', str(tmp_path)]
    figures.main(figures.parse(options))
    assert (tmp_path / 'curves.png').exists()
    numbers = json.loads((tmp_path / 'curves.json').read_text())
    assert list(numbers['vae, held out']) == ['2', '4']
    with pytest.raises(rh.Stop, match='holds no log'):
        figures.main(figures.parse(['curves', '--runs', str(tmp_path)]))


def test_tensorboard(tmp_path, monkeypatch):
    if importlib.util.find_spec('tensorboard'):
        log = watching.Log(tmp_path / 'vae.jsonl', 0, tensorboard=True)
        log.write(0, {'l1': 0.5, 'norm': None})
        assert list((tmp_path / 'tensorboard/vae').glob('events*'))
    monkeypatch.setitem(__import__('sys').modules, 'torch.utils.tensorboard', None)
    with pytest.raises(rh.Stop, match='pip install tensorboard'):
        watching.Log(tmp_path / 'vae.jsonl', 0, tensorboard=True)
