"""How fast each part is: its rate, peak memory, ratio to a reference in the same run, and how far it is from what the machine can do.

    python tests/bench.py                                  a synthetic avatar, preset small, the models in weights/
    python tests/bench.py --data data/x --out bench.json   an avatar of your own
    python tests/bench.py --device cuda --preset paper     networks of that preset with random weights, fitting at its sizes

Ours and the reference run in turn (a, b, a, b, ...), medians are compared: time on a busy machine is noise, ratios are less so. Bounds:
`arithmetic` is the time of the part's multiplications at the rate of a large matrix product, `memory` that of reading its inputs and
writing its outputs once at the rate of a large copy; the share says how much of the measured time the larger one explains.
"""
import argparse
import contextlib
import copy
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import avatars  # noqa: E402
import fit  # noqa: E402
import rodinhd as rh  # noqa: E402
from references import dense_render, grid_sample_planes, naive_aware_conv  # noqa: E402

ROOT = Path(__file__).parent.parent


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


class Peak:
    """Peak memory in MiB that a block adds to what was in use before (GPU memory, or on Linux the process's)."""
    def __init__(self, device):
        self.device, self.mib = device, None

    def resident(self, key):
        return next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key)) / 1024

    def __enter__(self):
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2 ** 20
        elif sys.platform == 'linux':
            Path('/proc/self/clear_refs').write_text('5')               # resets VmHWM
            self.before = self.resident('VmRSS')
        return self

    def __exit__(self, *_):
        if self.device.type == 'cuda':
            self.mib = torch.cuda.max_memory_allocated(self.device) / 2 ** 20 - self.before
        elif sys.platform == 'linux':
            self.mib = max(self.resident('VmHWM') - self.before, 0.0)


class Bench:
    """Measures parts against references, and collects the rows of the table."""
    def __init__(self, device, seconds):
        self.device, self.seconds, self.rows = device, seconds, []
        a = torch.randn(2048, 2048, device=device)
        b = torch.randn(2 ** 26, device=device)                         # 256 MiB
        target = torch.zeros_like(b)
        block = torch.zeros(2 ** 23 - 2 ** 10)                         # 32 MiB: once freed, glibc keeps smaller blocks, as in a long run
        del block
        self.flops = 2 * 2048 ** 3 / self.time({'': lambda: a @ a})['']
        self.bytes = 2 * 4 * len(b) / self.time({'': lambda: target.copy_(b)})['']

    def time(self, parts):
        """Median seconds of each part (name: function), run in turn."""
        times = {name: [] for name in parts}
        for part in parts.values():     # warm-up
            part()
        synchronize(self.device)
        end = time.monotonic() + self.seconds * len(parts)
        while time.monotonic() < end or len(next(iter(times.values()))) < 3:
            for name, part in parts.items():
                began = time.perf_counter()
                part()
                synchronize(self.device)
                times[name].append(time.perf_counter() - began)
        return {name: statistics.median(t) for name, t in times.items()}

    def row(self, part, unit, amount, ours, reference, against, traffic=0, note=''):
        """Measures `ours` against `reference` (functions); amount: units a call; traffic: bytes that must move, at least."""
        ours()
        with Peak(self.device) as peak:
            ours()
            synchronize(self.device)
        with FlopCounterMode(display=False) as counter:
            ours()
        t = self.time({'ours': ours, 'reference': reference})
        bounds = {'arithmetic': counter.get_total_flops() / self.flops, 'memory': traffic / self.bytes}
        bound = max(bounds, key=bounds.get)
        self.rows.append({'part': part, 'seconds': t['ours'], 'rate': amount / t['ours'], 'unit': unit, 'peak_mib': peak.mib,
                          'ratio': t['reference'] / t['ours'], 'reference': against, 'bound': bound,
                          'bound_share': bounds[bound] / t['ours'], 'note': note})
        print(format_row(self.rows[-1]), flush=True)


HEADER = '| part | time | rate | peak memory | against | ratio | bound (share of the time) |\n|---|---|---|---|---|---|---|'

def format_row(r):
    value, prefix = next(((r['rate'] / s, p) for s, p in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')) if r['rate'] >= s), (r['rate'], ''))
    peak = '' if r['peak_mib'] is None else f'{r["peak_mib"]:,.0f} MiB'
    share = f'{r["bound"]} ({r["bound_share"]:.0%})' if r['bound_share'] else ''
    note = f' ({r["note"]})' if r['note'] else ''
    return (f'| {r["part"]}{note} | {1e3 * r["seconds"]:,.1f} ms | {value:.3g} {prefix}{r["unit"]}/s | {peak} | {r["reference"]} | '
            f'{r["ratio"]:.1f} x | {share} |')

def gradient_of(loss, leaves):
    def both():
        loss().backward()
        for leaf in leaves:
            leaf.grad = None
    return both

def as_stored(planes):                  # (3, C, R, R) -> the table (3, R, R, C) in which fit_avatar keeps them
    return planes.detach().permute(0, 2, 3, 1).contiguous().requires_grad_()

def widened(decoder, times):
    """A decoder for planes whose channels are repeated `times`: the same field, at the price of more channels."""
    wide = copy.deepcopy(decoder)
    config = wide.config = copy.copy(decoder.config)
    D, rest = decoder.density_channels, decoder.config.channels - decoder.density_channels
    def repeat(weight, n):              # the columns of n frequency-encoded channels
        return (weight.unflatten(1, (5, n)).repeat(1, 1, times) / times).flatten(1)
    wide.density_channels, config.channels = D * times, decoder.config.channels * times
    wide.sigma_net[0].weight.data = repeat(decoder.sigma_net[0].weight.data, D)
    first = decoder.color_net[0].weight.data
    wide.color_net[0].weight.data = torch.cat([repeat(first[:, :5 * rest], rest), first[:, 5 * rest:]], 1)
    return wide

def bench_lookup(bench, C, R, N=131072):
    points, g = torch.rand(N, 3, device=bench.device) * 2 - 1, torch.randn(N, C, device=bench.device)
    other = torch.randn(3, C, R, R, device=bench.device, requires_grad=True)                       # the layout that grid_sample likes
    name, traffic, table = f'plane lookup, C={C} R={R}', 12 * N * 4 * C, as_stored(other)
    def ours():
        return rh.sample_planes(table.permute(0, 3, 1, 2), points)
    with torch.no_grad():
        bench.row(name, 'points', N, ours, lambda: grid_sample_planes(other, points), '`grid_sample`', traffic)
    bench.row(f'{name}, with gradient', 'points', N, gradient_of(lambda: (ours() * g).sum(), [table]),
              gradient_of(lambda: (grid_sample_planes(other, points) * g).sum(), [other]), '`grid_sample`', 3 * traffic + 4 * table.numel())

def bench_rendering(bench, avatar, size=256):
    planes, decoder, _, _, config = avatar
    device, steps, field = bench.device, config.steps, rh.PlaneField(planes, decoder)
    camera = rh.orbit_pose(30, 5).to(device), rh.intrinsics_of(34.0, size).to(device), size, size
    grid = rh.grid_for(field, config, device)
    rays_o, rays_d = rh.view_rays(*camera)
    @torch.no_grad()
    def dense():                        # every lattice point of every ray
        marched = ((*rh.march(o, d, steps), d) for o, d in zip(rays_o.split(4096), rays_d.split(4096), strict=True))
        return torch.cat([rh.composite(*field(p, d[r]), t, r, len(d), 2 * math.sqrt(3) / steps)[0] for r, t, p, d in marched])
    ours = rh.render_view(field, *camera, steps, grid)[0]
    difference = (ours - dense().view(size, size, 3).clamp(0, 1)).abs().max().item()
    bench.row(f'a view of {size} x {size}', 'views', 1, lambda: rh.render_view(field, *camera, steps, grid), dense,
              'dense lattice', note=f'largest difference {difference:.0e}')

def bench_rays(bench, avatar, R, channels=32, lattice=64):
    """1,024 rays across an avatar's box, at a lattice of 64 points from face to face."""
    planes, decoder, grid, views, config = avatar
    height, width = views.images.shape[1:3]
    pixel = torch.randint(len(views.images) * height * width, (8192,), generator=torch.Generator().manual_seed(0))
    view = pixel // (height * width)
    o, d = rh.pixel_rays(views.c2w[view], views.intrinsics[view], pixel % width, pixel // width % height)
    near, far = rh.intersect_box(o, d)
    o, d = (x[near < far][:1024].to(bench.device) for x in (o, d))      # those that meet the box
    wide, times, D = widened(decoder, channels // config.channels), channels // config.channels, decoder.density_channels
    steps = math.ceil(lattice * math.sqrt(3))
    coarse = rh.OccupancyGrid(grid.G, steps, bench.device, grid.occupied)
    p = rh.resize_planes(planes, R)
    q = torch.cat([p[:, :-D]] * times + [p[:, -D:]] * times, 1).contiguous().requires_grad_()
    table = as_stored(q)
    def ours():
        return rh.render(rh.PlaneField(table.permute(0, 3, 1, 2), wide), o, d, steps, coarse)[0]
    def dense():
        return dense_render(q, wide, o, d, lattice)
    name = f'1,024 rays x {lattice}, C={channels} R={R}'
    with torch.no_grad():
        note = f'PSNR of the two {rh.psnr(ours(), dense()):.0f} dB'
        bench.row(name, 'rays', 1024, ours, dense, 'dense, `grid_sample`', note=note)
    bench.row(f'{name}, with gradient', 'rays', 1024, gradient_of(lambda: ours().square().mean(), [table]),
              gradient_of(lambda: dense().square().mean(), [q]), 'dense, `grid_sample`')

def bench_fitting(bench, avatar):
    """A step of fitting (rays, gradient, Adam) against the same with a dense lattice and grid_sample."""
    planes, decoder, grid, views, config = avatar
    rays, generator = rh.Rays(views, bench.device, 8), torch.Generator().manual_seed(0)
    table, q, steps = as_stored(planes), planes.detach().contiguous().requires_grad_(), config.steps
    def step(leaf, optimizer, draw):
        o, d, target = rays.draw(config.rays, generator)
        F.mse_loss(draw(o, d), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = (table, torch.optim.Adam([table], lr=1e-4, fused=True))
    theirs = (q, torch.optim.Adam([q], lr=1e-4, fused=True))
    def fast(o, d):
        return rh.render(rh.PlaneField(table.permute(0, 3, 1, 2), decoder), o, d, steps, grid)[0]
    def slow(o, d):                     # as many points as the lattice has, in pieces that fit
        return torch.cat([dense_render(q, decoder, a, b, int(steps / math.sqrt(3))) for a, b in zip(o.split(1024), d.split(1024))])
    bench.row(f'fitting step, {config.rays:,} rays', 'rays', config.rays, lambda: step(*ours, fast), lambda: step(*theirs, slow),
              'dense, `grid_sample`')

def bench_convolution(bench, H, c=64):
    conv, x = rh.AwareConv(c, c).to(bench.device), torch.randn(1, c, H, 3 * H, device=bench.device, requires_grad=True)
    for w in conv.parameters():
        torch.nn.init.normal_(w, std=0.05)
    inputs = [x, *conv.parameters()]
    bench.row(f'3D-aware convolution {H} x {H}, {c} channels, with gradient', 'triplanes', 1, gradient_of(lambda: conv(x).sum(), inputs),
              gradient_of(lambda: naive_aware_conv(x, conv).sum(), inputs), '3C concatenation')

@torch.no_grad()
def bench_sampling(bench, models, decoder):
    """A portrait to planes; models: vae, base, upsample."""
    config, device, psnr = models['base'].config, bench.device, ''
    rgb, alpha = rh.read_portrait(ROOT / 'examples/portrait.png', config.portrait)
    image = rh.portrait_on_white(rgb, alpha)[None].to(device)
    def sample(count=1, bf16=False, steps=10, **options):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return rh.generate(models, image.expand(count, -1, -1, -1), steps=steps, **options)[0]
    bench.row('portrait to planes, 10 + 10 steps', 'avatars', 1, sample, lambda: sample(steps=100), '100 + 100 steps')
    bench.row('the same, guidance 1', 'avatars', 1, lambda: sample(guidance=1.0), lambda: sample(guidance=1.3), 'guidance 1.3')
    bench.row('the same, 4 in one go', 'avatars', 4, lambda: sample(4), lambda: [sample() for _ in range(4)], 'one by one')
    if decoder:
        pose, k = rh.orbit_pose(30, 5).to(device), rh.intrinsics_of(34.0, 256).to(device)
        views = [rh.render_view(f := rh.PlaneField(sample(bf16=b)[0], decoder), pose, k, 256, 256, config.steps,
                                rh.grid_for(f, config, device))[0] for b in (False, True)]
        psnr = f'same picture to {rh.psnr(*views):.1f} dB'
    bench.row('the same, bf16', 'avatars', 1, lambda: sample(bf16=True), sample, 'fp32', note=psnr)

def bench_training(bench, config, stage, batches):
    """Training steps of a network (forward, backward, AdamW) at growing batches, bf16 against fp32; on a GPU compiled, too."""
    device, base = bench.device, stage == 'base'
    network, diffusion = (rh.BaseUNet if base else rh.UpsampleUNet)(config).to(device), rh.diffusion_of(stage, config)
    network.checkpoint, size = not base and config.resolution > 128, config.base_resolution if base else config.resolution
    vae, optimizer = rh.VAE(config).to(device).requires_grad_(False), torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    def step(batch, bf16):
        portrait = rh.encode_portrait(vae, torch.zeros(batch, 3, config.portrait, config.portrait, device=device), config)
        portrait = portrait._replace(lr=torch.zeros(batch, 3, config.channels, *[config.base_resolution] * 2, device=device))
        x = torch.zeros(batch, 3, config.channels, size, size, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            t = torch.randint(diffusion.timesteps, (batch,), device=device)
            terms, _ = diffusion.loss(network, x, t, torch.randn_like(x), portrait)
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    def row(name, batch, ours, reference, against, note=''):
        try:
            bench.row(f'training step of the {stage} network, batch {batch}, {name}', 'samples', batch, ours, reference, against, note=note)
        except torch.cuda.OutOfMemoryError:
            print(f'{stage} network, batch {batch}: out of memory')
    for batch in batches:
        row('bf16', batch, lambda batch=batch: step(batch, True), lambda batch=batch: step(batch, False), 'fp32')
    if device.type == 'cuda':
        eager = bench.time({'': lambda: step(batches[0], True)})['']
        began = time.perf_counter()
        network.compile()
        step(batches[0], True)
        note = f'eager {1e3 * eager:,.0f} ms, first step {time.perf_counter() - began:.0f} s'
        row('compiled', batches[0], lambda: step(batches[0], True), lambda: step(batches[0], False), 'fp32, compiled', note)

def fitted(args, config, decoder, device):
    """(planes, decoder, grid, views, config) of one avatar after --fit seconds of fitting."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            with contextlib.redirect_stdout(sys.stderr):
                avatars.main(avatars.parse(['--preset', 'small', '--count', '1', '--data', folder]))
        path = rh.list_avatars(args.data or folder)[0]
        views = rh.load_views(path, 'train', rh.read_box(path))
    start = fit.new_planes(decoder, torch.Generator().manual_seed(0))
    planes, grid, _ = rh.fit_avatar(views, start, decoder, config, seconds=args.fit)
    return planes, decoder, grid, views, config

def main(args):
    _, _, device = rh.start(args.device, 0)
    config, weights = rh.make_config(args.preset, args.set), ROOT / 'weights'
    small = args.preset == 'small' and not args.set
    bench = Bench(device, args.seconds)
    print(f'matrix product {bench.flops / 1e9:,.0f} GFLOP/s, copy {bench.bytes / 1e9:,.0f} GB/s\n\n{HEADER}')
    models = {k: rh.load_model(k, weights, device) for k in ('vae', 'base', 'upsample', 'decoder')} if small else {}
    decoder = models.pop('decoder') if small else rh.Decoder(config).to(device).requires_grad_(False)
    decoder.config = config
    if not small:
        models = {k: build(config).to(device).eval().requires_grad_(False) for k, build in
                  (('vae', rh.VAE), ('base', rh.BaseUNet), ('upsample', rh.UpsampleUNet))}
        for model in models.values():
            model.config = config
    for C, R in ((16, 128), (32, 512)):
        bench_lookup(bench, C, R)
    avatar = fitted(args, config, decoder, device)
    bench_rendering(bench, avatar)
    for R in (64, 256, 512):
        bench_rays(bench, avatar, R)
    bench_fitting(bench, avatar)
    for H in (128, 32):
        bench_convolution(bench, H)
    bench_sampling(bench, models, decoder if small else None)
    for stage in ('base', 'upsample'):
        bench_training(bench, config, stage, args.batch)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.processor() or platform.machine()}'
    result = {'device': name, 'threads': torch.get_num_threads(), 'torch': torch.__version__, 'preset': args.preset,
              'matmul_gflops': bench.flops / 1e9, 'copy_gbs': bench.bytes / 1e9, 'rows': bench.rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--preset', default='small', choices=rh.PRESETS)
    p.add_argument('--data', type=Path, help='an avatar, or a folder of them whose first is taken (default: a synthetic one)')
    p.add_argument('--fit', type=float, default=20, help='seconds to fit it')
    p.add_argument('--seconds', type=float, default=2, help='time for each side of a comparison')
    p.add_argument('--batch', type=int, nargs='+', default=[1], help='batch sizes of the training steps')
    p.add_argument('--out', type=Path, default=Path('results/bench.json'))
    p.add_argument('--device', help='cuda where there is one, else cpu')
    p.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help='override settings of the preset')
    return p.parse_args(argv)

if __name__ == '__main__':
    main(parse())
