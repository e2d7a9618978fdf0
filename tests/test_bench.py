"""The benchmark's parts, at sizes that take no time: what they compare is equal, and every row is
complete."""
import json

import bench
import pytest
import torch

import rodinhd as rh
import running


@pytest.fixture(scope='module')
def machine():
    return bench.Bench(torch.device('cpu'), seconds=0.0, turns=1)


@pytest.fixture
def measuring(machine):
    """A Bench without rows, which measures each part as briefly as it can."""
    machine.rows = []
    return machine


def test_every_part_gives_a_row(measuring, tiny, data):
    args = bench.parse(['--preset', 'tiny', '--data', str(data), '--fit', '0.5'])
    decoder = rh.Decoder(tiny).requires_grad_(False)
    decoder.config = tiny
    avatar = bench.fitted(args, tiny, decoder, measuring.device)
    bench.bench_lookup(measuring, 4, 16, N=200)
    bench.bench_rendering(measuring, avatar, size=48)
    bench.bench_finished(measuring, avatar, size=48)
    bench.bench_rays(measuring, avatar, 32, count=128)
    bench.bench_fitting(measuring, avatar)
    bench.bench_convolution(measuring, 8, c=8)
    bench.bench_training(measuring, tiny, 'upsample', [2])
    rows = measuring.rows
    assert len(rows) == 2 + 1 + 2 + 4 + 1 + 1 + 1
    for row in rows:
        assert row['rate'] > 0
        assert row['ratio'] > 0
        assert row['seconds'] > 0
    notes = [row['note'] for row in rows if 'a view' in row['part']]
    assert len(notes) == 2
    for note in notes:
        assert float(note.split()[-1]) < 2e-3


def test_sampling_is_measured(measuring, monkeypatch):
    """Its four rows, of one step in place of 10 and 100, and pictures of few samples a ray."""
    generate = rh.generate

    def in_one_step(*args, steps, **options):
        return generate(*args, steps=1, **options)

    monkeypatch.setattr(rh, 'generate', in_one_step)
    args = bench.parse(['--preset', 'tiny', '--set', 'steps=8', 'grid=8'])
    models = bench.load_models(args, rh.make_config('tiny', args.set), measuring.device)
    bench.bench_sampling(measuring, models, models['decoder'])
    assert [row['unit'] for row in measuring.rows] == 4 * ['avatars']
    assert measuring.rows[-1]['note'].startswith('same picture to ')


def test_fitting_to_a_portrait_is_measured(measuring):
    args = bench.parse(['--preset', 'tiny', '--set', 'steps=8', 'grid=8', 'likeness_steps=1'])
    models = bench.load_models(args, rh.make_config('tiny', args.set), measuring.device)
    bench.bench_portrait(measuring, models, models['decoder'])
    (row,) = measuring.rows
    assert row['note'].startswith('PSNR of the portrait ')
    assert row['ratio'] > 0


def test_a_widened_decoder_shows_the_same_field(tiny):
    decoder = rh.Decoder(tiny)
    decoder.config = tiny
    features = torch.randn(50, 8)
    directions = torch.randn(50, 3)
    planes = features.T[None, :, :, None]  # (1, C, 50, 1)
    twice = bench.repeat_channels(planes, decoder.density_channels, 2)[0, :, :, 0].T
    theirs = bench.widened(decoder, 2)(twice, directions)
    for a, b in zip(decoder(features, directions), theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_row_reads_well():
    row = {
        'part': 'a',
        'note': '',
        'seconds': 0.5,
        'rate': 2.5e6,
        'unit': 'rays',
        'peak_mib': None,
        'ratio': 3.0,
        'reference': 'b',
        'bound': 'memory',
        'bound_share': 0.25,
    }
    expected = '| a | 500.0 ms | 2.5 Mrays/s |  | b | 3.0 x | memory (25%) |'
    assert bench.format_row(row) == expected


@pytest.mark.parametrize(('name', 'least'), [('bench', 16), ('frozen', 3)])
def test_the_docs_show_what_was_measured(name, least):
    page = (bench.ROOT / 'docs' / 'speed.md').read_text()
    rows = json.loads((bench.ROOT / 'results' / f'{name}.json').read_text())['rows']
    assert len(rows) >= least
    assert bench.HEADER in page
    for row in rows:
        assert bench.format_row(row) in page


def test_models_are_those_that_ship():
    """`small` as it is has the models of weights/; the other presets have random ones."""
    args = bench.parse([])
    models = bench.load_models(args, rh.make_config('small'), torch.device('cpu'))
    assert models.keys() == running.MODELS.keys()
    shipped = running.load_model('vae', bench.ROOT / 'weights', 'cpu').state_dict()
    for name, x in models['vae'].state_dict().items():
        assert torch.equal(x, shipped[name])
