"""The benchmark's parts, at sizes that take no time: what they compare is equal, and every row is complete."""
import json

import bench
import torch

import rodinhd as rh


def test_every_part_gives_a_row(tiny, data):
    device = torch.device('cpu')
    b = bench.Bench(device, 0.0)
    args = bench.parse(['--preset', 'tiny', '--data', str(data), '--fit', '0.5'])
    decoder = rh.Decoder(tiny).requires_grad_(False)
    decoder.config = tiny
    avatar = bench.fitted(args, tiny, decoder, device)
    bench.bench_lookup(b, 4, 16, N=200)
    bench.bench_rendering(b, avatar, size=48)
    bench.bench_rays(b, avatar, 32)
    bench.bench_fitting(b, avatar)
    bench.bench_convolution(b, 8, c=8)
    bench.bench_training(b, tiny, 'upsample', [2])
    assert len(b.rows) == 2 + 1 + 2 + 1 + 1 + 1
    assert all(r['rate'] > 0 and r['ratio'] > 0 and r['seconds'] > 0 for r in b.rows)
    assert float(next(r['note'] for r in b.rows if 'a view' in r['part']).split()[-1]) < 2e-3


def test_a_widened_decoder_shows_the_same_field(tiny):
    decoder, features, dirs = rh.Decoder(tiny), torch.randn(50, 8), torch.randn(50, 3)
    decoder.config, D = tiny, decoder.density_channels
    twice = torch.cat([features[:, :-D]] * 2 + [features[:, -D:]] * 2, 1)
    for a, b in zip(decoder(features, dirs), bench.widened(decoder, 2)(twice, dirs), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_row_reads_well():
    row = {'part': 'a', 'note': '', 'seconds': 0.5, 'rate': 2.5e6, 'unit': 'rays', 'peak_mib': None, 'ratio': 3.0, 'reference': 'b',
           'bound': 'memory', 'bound_share': 0.25}
    assert bench.format_row(row) == '| a | 500.0 ms | 2.5 Mrays/s |  | b | 3.0 x | memory (25%) |'


def test_the_readme_shows_what_was_measured():
    readme, rows = (bench.ROOT / 'README.md').read_text(), json.loads((bench.ROOT / 'results/bench.json').read_text())['rows']
    assert len(rows) > 15 and all(bench.format_row(row) in readme for row in rows)
