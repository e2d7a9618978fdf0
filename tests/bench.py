"""How fast each part is: rate, peak memory, ratio to a plain form of it, distance from its bound.

    python tests/bench.py                                  a synthetic avatar, preset small, the
                                                           models in weights/
    python tests/bench.py --data data/x --out bench.json   an avatar of your own
    python tests/bench.py --device cuda --preset paper     networks of that preset with random
                                                           weights, fitting at its sizes

Ours and the reference run in turn (a, b, a, b, ...), and medians are compared: time on a busy
machine is noise, ratios are less so. The bounds: `arithmetic` is the time of the part's
multiplications at the rate of a large matrix product, `memory` that of reading its inputs and
writing its outputs once at the rate of a large copy. The share says how much of the measured time
the larger one explains.
"""
import argparse
import contextlib
import copy
import functools
import math
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import avatars  # noqa: E402
import frozen  # noqa: E402
import likeness  # noqa: E402
import rodinhd as rh  # noqa: E402
import running  # noqa: E402
import scenes  # noqa: E402
from references import (  # noqa: E402
    dense_render,
    grid_sample_planes,
    naive_aware_conv,
    ngp_render,
)


# Measuring ----------------------------------------------------------------------------------------
def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def resident(key):
    """A line of Linux's account of this process's memory, in MiB."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


class Peak:
    """Measures the peak memory in MiB that a block adds to what was in use before.

    It is that of the GPU or, on Linux, of the process; else None.
    """
    def __init__(self, device):
        self.device = device
        self.mib = None

    def __enter__(self):
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2 ** 20
        elif sys.platform == 'linux':
            Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
            self.before = resident('VmRSS')
        return self

    def __exit__(self, *_):
        if self.device.type == 'cuda':
            self.mib = torch.cuda.max_memory_allocated(self.device) / 2 ** 20 - self.before
        elif sys.platform == 'linux':
            self.mib = max(resident('VmHWM') - self.before, 0.0)


class Bench:
    """Measures parts against references, and collects the rows of the table."""
    def __init__(
        self,
        device,
        seconds,
        clock=time.perf_counter,
        turns=3,  # of each comparison, at least
        keep=lambda: None,  # called after each row
    ):
        self.device = device
        self.turns = turns
        self.keep = keep
        self.clock = clock
        self.seconds = seconds
        self.rows = []
        a = torch.randn(2048, 2048, device=device)
        source = torch.randn(2 ** 26, device=device)  # 256 MiB
        target = torch.zeros_like(source)
        # 32 MiB: once they are freed, glibc keeps smaller blocks, as in a long run
        block = torch.zeros(2 ** 23 - 2 ** 10)
        del block

        product = self.time({'': lambda: a @ a})['']
        copying = self.time({'': lambda: target.copy_(source)})['']
        self.flops = 2 * 2048 ** 3 / product
        self.bytes = 2 * 4 * len(source) / copying

    def time(self, parts):
        """Median seconds of each part (name: function), run in turn."""
        times = {name: [] for name in parts}
        for part in parts.values():  # warm-up
            part()
        synchronize(self.device)

        end = time.monotonic() + self.seconds * len(parts)
        turns = 0
        while time.monotonic() < end or turns < self.turns:
            for name, part in parts.items():
                began = self.clock()
                part()
                synchronize(self.device)
                times[name].append(self.clock() - began)
            turns += 1
        return {name: statistics.median(seconds) for name, seconds in times.items()}

    def row(
        self,
        part,
        unit,
        amount,  # units a call
        ours,
        reference,  # functions that are called without arguments
        against,  # what the reference is
        traffic=0,  # bytes that must move, at least
        note='',
    ):
        """Measures `ours` against `reference`, prints the row and keeps it."""
        ours()
        with Peak(self.device) as peak:
            ours()
            synchronize(self.device)
        with FlopCounterMode(display=False) as counter:
            ours()

        times = self.time({'ours': ours, 'reference': reference})
        seconds = times['ours']
        bounds = {
            'arithmetic': counter.get_total_flops() / self.flops,
            'memory': traffic / self.bytes,
        }
        bound = max(bounds, key=bounds.get)
        self.rows.append({
            'part': part,
            'seconds': seconds,
            'rate': amount / seconds,
            'unit': unit,
            'peak_mib': peak.mib,
            'ratio': times['reference'] / seconds,
            'reference': against,
            'bound': bound,
            'bound_share': bounds[bound] / seconds,
            'note': note,
        })
        print(format_row(self.rows[-1]), flush=True)
        self.keep()


# The table as text --------------------------------------------------------------------------------
COLUMNS = (
    'part', 'time', 'rate', 'peak memory', 'against', 'ratio', 'bound (share of the time)',
)
HEADER = '| ' + ' | '.join(COLUMNS) + ' |\n' + '|---' * len(COLUMNS) + '|'
PREFIXES = ((1e9, 'G'), (1e6, 'M'), (1e3, 'k'))


def format_rate(rate, unit):
    for size, prefix in PREFIXES:
        if rate >= size:
            return f'{rate / size:.3g} {prefix}{unit}/s'
    return f'{rate:.3g} {unit}/s'


def format_row(row):
    """A row of results/bench.json as docs/speed.md shows it."""
    part = row['part']
    if row['note']:
        part += f' ({row["note"]})'
    peak = ''
    if row['peak_mib'] is not None:
        peak = f'{row["peak_mib"]:,.0f} MiB'
    share = ''
    if row['bound_share']:
        share = f'{row["bound"]} ({row["bound_share"]:.0%})'
    cells = [
        part,
        f'{1e3 * row["seconds"]:,.1f} ms',
        format_rate(row['rate'], row['unit']),
        peak,
        row['reference'],
        f'{row["ratio"]:.1f} x',
        share,
    ]
    return '| ' + ' | '.join(cells) + ' |'


# What parts are measured with ---------------------------------------------------------------------
class Fitted(NamedTuple):
    """Holds an avatar after a while of fitting."""
    planes: torch.Tensor  # (3, C, R, R)
    decoder: rh.Decoder
    grid: rh.OccupancyGrid
    views: rh.Views
    config: rh.Config


def with_gradient(loss, leaves):
    """A function that computes the gradients of loss() and drops them."""
    def both():
        loss().backward()
        for leaf in leaves:
            leaf.grad = None

    return both


def as_stored(planes):
    """Planes (3, C, R, R) as a table (3, R, R, C), in which fit_avatar keeps them."""
    return planes.detach().permute(0, 2, 3, 1).contiguous().requires_grad_()


def repeat_columns(weight, times):
    """A layer's weight for frequency-encoded channels that are repeated `times`."""
    by_encoding = weight.unflatten(1, (5, -1))  # (n, 5, channels)
    return (by_encoding.repeat(1, 1, times) / times).flatten(1)


def widened(decoder, times):
    """A decoder for planes whose channels are repeated `times`: the same field, at the price of
    more channels."""
    wide = copy.deepcopy(decoder)
    wide.config = copy.copy(decoder.config)
    wide.config.channels = decoder.config.channels * times
    wide.density_channels = decoder.density_channels * times

    of_density = decoder.sigma_net[0].weight.data
    wide.sigma_net[0].weight.data = repeat_columns(of_density, times)

    colour_channels = decoder.config.channels - decoder.density_channels
    weight = decoder.color_net[0].weight.data
    of_colour = weight[:, :5 * colour_channels]
    others = weight[:, 5 * colour_channels:]
    columns = [repeat_columns(of_colour, times), others]
    wide.color_net[0].weight.data = torch.cat(columns, dim=1)
    return wide


def repeat_channels(planes, density_channels, times):
    """Planes (3, C, R, R) for a decoder that is `widened`."""
    colour = planes[:, :-density_channels]
    density = planes[:, -density_channels:]
    return torch.cat([colour] * times + [density] * times, dim=1)


# The parts ----------------------------------------------------------------------------------------
def bench_lookup(bench, C, R, N=131072):
    """Looks up N points in planes (3, C, R, R), without and with their gradient."""
    points = torch.rand(N, 3, device=bench.device) * 2 - 1
    weight = torch.randn(N, C, device=bench.device)
    planes = torch.randn(3, C, R, R, device=bench.device, requires_grad=True)  # for grid_sample
    table = as_stored(planes)
    name = f'plane lookup, C={C} R={R}'
    traffic = 12 * N * 4 * C

    def ours():
        return rh.sample_planes(table.permute(0, 3, 1, 2), points)

    def theirs():
        return grid_sample_planes(planes, points)

    with torch.no_grad():
        bench.row(name, 'points', N, ours, theirs, '`grid_sample`', traffic)
    bench.row(
        f'{name}, with gradient',
        'points',
        N,
        with_gradient(lambda: (ours() * weight).sum(), [table]),
        with_gradient(lambda: (theirs() * weight).sum(), [planes]),
        '`grid_sample`',
        3 * traffic + 4 * table.numel(),
    )


def bench_rendering(bench, avatar, size=256):
    """Renders a view, as everything but training does."""
    device = bench.device
    config = avatar.config
    field = rh.PlaneField(avatar.planes, avatar.decoder)
    grid = rh.grid_for(field, config, device)
    c2w = rh.orbit_pose(30, 5).to(device)
    intrinsics = rh.intrinsics_of(rh.PORTRAIT_FOV, size).to(device)
    rays_o, rays_d = rh.view_rays(c2w, intrinsics, size, size)
    delta = 2 * math.sqrt(3) / config.steps

    def ours():
        return rh.render_view(field, c2w, intrinsics, size, size, config.steps, grid).rgb

    @torch.no_grad()
    def dense():  # every lattice point of every ray
        parts = []
        for o, d in zip(rays_o.split(4096), rays_d.split(4096), strict=True):
            ray_index, t, points = rh.march(o, d, config.steps)
            sigma, rgb = field(points, d[ray_index])
            parts.append(rh.composite(sigma, rgb, t, ray_index, len(d), delta).rgb)
        return torch.cat(parts)

    truth = dense().view(size, size, 3).clamp(0, 1)
    difference = (ours() - truth).abs().max().item()
    name = f'a view of {size} x {size}'
    note = f'largest difference {difference:.0e}'
    bench.row(name, 'views', 1, ours, dense, 'dense lattice', note=note)


def bench_finished(bench, avatar, size=256):
    """Makes the grid of an avatar, and draws a view of it as it is finished; the references have
    the decoder as it is, and not folded."""
    device = bench.device
    config = avatar.config
    field = rh.PlaneField(avatar.planes, avatar.decoder)
    unfolded = rh.PlaneField(avatar.planes, avatar.decoder)
    unfolded.decode = avatar.decoder

    def at_once():
        return rh.grid_for(field, config, device)

    def by_updates():
        return rh.grid_by_updates(unfolded, config, device)

    bench.row('occupancy grid of a field', 'grids', 1, at_once, by_updates, '24 updates')

    finished = frozen.freeze(avatar.planes, avatar.decoder)
    c2w = rh.orbit_pose(30, 5).to(device)
    intrinsics = rh.intrinsics_of(rh.PORTRAIT_FOV, size).to(device)

    def ours():
        return frozen.render_view(finished, c2w, intrinsics, size, size).rgb

    def plain():
        return rh.render_view(
            unfolded, c2w, intrinsics, size, size, config.steps, finished.grid
        ).rgb

    note = f'largest difference {(ours() - plain()).abs().max():.0e}'
    part = f'a view of {size} x {size}, of a finished avatar'
    bench.row(part, 'views', 1, ours, plain, '`render_view`', note=note)


def rays_across(views, count, device):
    """rays_o and rays_d (count, 3) of random pixels that meet the avatar's box."""
    height, width = views.images.shape[1:3]
    generator = torch.Generator().manual_seed(0)
    pixel = torch.randint(len(views.images) * height * width, (8 * count,), generator=generator)
    view = pixel // (height * width)
    y = pixel // width % height
    x = pixel % width
    rays_o, rays_d = rh.pixel_rays(views.c2w[view], views.intrinsics[view], x, y)
    near, far = rh.intersect_box(rays_o, rays_d)
    meets = near < far
    return rays_o[meets][:count].to(device), rays_d[meets][:count].to(device)


def bench_rays(bench, avatar, R, channels=32, lattice=64, count=1024):
    """Renders rays across an avatar's box, at a lattice of 64 points from face to face."""
    decoder = avatar.decoder
    times = channels // avatar.config.channels
    wide = widened(decoder, times)
    rays_o, rays_d = rays_across(avatar.views, count, bench.device)
    steps = math.ceil(lattice * math.sqrt(3))
    grid = rh.OccupancyGrid(avatar.grid.G, steps, bench.device, avatar.grid.occupied)

    resized = rh.resize_planes(avatar.planes, R)
    planes = repeat_channels(resized, decoder.density_channels, times)
    planes = planes.contiguous().requires_grad_()  # for grid_sample
    table = as_stored(planes)

    def ours():
        field = rh.PlaneField(table.permute(0, 3, 1, 2), wide)
        return rh.render(field, rays_o, rays_d, steps, grid).rgb

    def dense():
        return dense_render(planes, wide, rays_o, rays_d, lattice)

    def ngp():
        return ngp_render(planes, decoder=wide, rays_o=rays_o, rays_d=rays_d, samples=lattice)

    name = f'{count:,} rays x {lattice}, C={channels} R={R}'
    for reference, against in ((dense, 'dense, `grid_sample`'), (ngp, "torch-ngp's pure path")):
        with torch.no_grad():
            note = f'PSNR of the two {rh.psnr(ours(), reference()):.0f} dB'
            bench.row(name, 'rays', count, ours, reference, against, note=note)
        bench.row(
            f'{name}, with gradient',
            'rays',
            count,
            with_gradient(lambda: ours().square().mean(), [table]),
            with_gradient(lambda reference=reference: reference().square().mean(), [planes]),
            against,
        )


def bench_fitting(bench, avatar):
    """Takes a step of fitting (rays, gradient, Adam)."""
    planes, decoder, grid, views, config = avatar
    rays = rh.Rays(views, bench.device, 8)
    generator = torch.Generator().manual_seed(0)
    table = as_stored(planes)
    leaf = planes.detach().contiguous().requires_grad_()  # for grid_sample
    steps = config.steps

    def fast(rays_o, rays_d):
        field = rh.PlaneField(table.permute(0, 3, 1, 2), decoder)
        return rh.render(field, rays_o, rays_d, steps, grid).rgb

    def slow(rays_o, rays_d):  # as many points as the lattice has, in pieces that fit
        samples = int(steps / math.sqrt(3))
        pieces = zip(rays_o.split(1024), rays_d.split(1024), strict=True)
        return torch.cat([dense_render(leaf, decoder, o, d, samples) for o, d in pieces])

    def step(draw, optimizer):
        rays_o, rays_d, target = rays.draw(config.rays, generator)
        F.mse_loss(draw(rays_o, rays_d), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    bench.row(
        f'fitting step, {config.rays:,} rays',
        'rays',
        config.rays,
        functools.partial(step, fast, torch.optim.Adam([table], lr=1e-4, fused=True)),
        functools.partial(step, slow, torch.optim.Adam([leaf], lr=1e-4, fused=True)),
        'dense, `grid_sample`',
    )


def bench_convolution(bench, H, c=64):
    """Convolves planes of H x H texels and c channels."""
    conv = rh.AwareConv(c, c).to(bench.device)
    for w in conv.parameters():
        torch.nn.init.normal_(w, std=0.05)
    x = torch.randn(1, c, H, 3 * H, device=bench.device, requires_grad=True)
    leaves = [x, *conv.parameters()]
    bench.row(
        f'3D-aware convolution {H} x {H}, {c} channels, with gradient',
        'triplanes',
        1,
        with_gradient(lambda: conv(x).sum(), leaves),
        with_gradient(lambda: naive_aware_conv(x, conv).sum(), leaves),
        '3C concatenation',
    )


@torch.no_grad()
def bench_sampling(bench, models, decoder):
    """Makes planes of a portrait; models: vae, base, upsample; decoder: to compare views, or None.

    The VAE, the condition and the two U-Nets are in it, likeness.py is not.
    """
    device = bench.device
    config = models['base'].config
    rgb, alpha = scenes.read_portrait(ROOT / 'examples/portrait.png', config.portrait)
    image = scenes.portrait_on_white(rgb, alpha)[None].to(device)

    def sample(count=1, bf16=False, steps=10, **options):
        images = image.expand(count, -1, -1, -1)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return rh.generate(models, images, steps=steps, **options).planes

    def row(part, count, ours, reference, against, note=''):
        bench.row(part, 'avatars', count, ours, reference, against, note=note)

    def one_by_one():
        return [sample() for _ in range(4)]

    part = functools.partial
    row('portrait to planes, 10 + 10 steps', 1, sample, part(sample, steps=100), '100 + 100 steps')
    plain = part(sample, guidance=1.0)
    row('the same, guidance 1', 1, plain, part(sample, guidance=1.3), 'guidance 1.3')
    row('the same, 4 in one go', 4, part(sample, 4), one_by_one, 'one by one')

    note = ''
    if decoder:
        c2w = rh.orbit_pose(30, 5).to(device)
        intrinsics = rh.intrinsics_of(rh.PORTRAIT_FOV, 256).to(device)
        views = []
        for bf16 in (False, True):
            field = rh.PlaneField(sample(bf16=bf16)[0], decoder)
            grid = rh.grid_for(field, config, device)
            picture = rh.render_view(field, c2w, intrinsics, 256, 256, config.steps, grid)
            views.append(picture.rgb)
        note = f'same picture to {rh.psnr(*views):.1f} dB'
    row('the same, bf16', 1, part(sample, bf16=True), sample, 'fp32', note)


def training_step(bench, config, stage):
    """A network, and step(batch, bf16) of its training: forward, backward, AdamW."""
    device = bench.device
    base = stage == 'base'
    size = config.base_resolution if base else config.resolution
    build, _ = running.MODELS[stage]
    network = build(config).to(device)
    network.checkpoint = not base and config.resolution > 128
    vae = rh.VAE(config).to(device).requires_grad_(False)
    diffusion = rh.diffusion_of(stage, config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def zeros(*shape):
        return torch.zeros(*shape, device=device)

    def step(batch, bf16):
        images = zeros(batch, 3, config.portrait, config.portrait)
        r = config.base_resolution
        low = zeros(batch, 3, config.channels, r, r)
        portrait = rh.encode_portrait(vae, images, config)._replace(lr=low)
        x = zeros(batch, 3, config.channels, size, size)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            t = torch.randint(diffusion.timesteps, (batch,), device=device)
            terms, _ = diffusion.loss(network, x, t, torch.randn_like(x), portrait)
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return network, step


def bench_training(bench, config, stage, batches):
    """Trains a network at growing batches, bf16 against fp32; on a GPU compiled, too."""
    network, step = training_step(bench, config, stage)

    def row(name, batch, against, note=''):
        part = f'training step of the {stage} network, batch {batch}, {name}'
        ours = functools.partial(step, batch, True)
        reference = functools.partial(step, batch, False)
        try:
            bench.row(part, 'samples', batch, ours, reference, against, note=note)
        except torch.cuda.OutOfMemoryError:
            print(f'{stage} network, batch {batch}: out of memory')

    for batch in batches:
        row('bf16', batch, 'fp32')
    if bench.device.type != 'cuda':
        return

    eager = bench.time({'': functools.partial(step, batches[0], True)})['']
    began = time.perf_counter()
    network.compile()
    step(batches[0], True)
    first = time.perf_counter() - began
    note = f'eager {1e3 * eager:,.0f} ms, first step {first:.0f} s'
    row('compiled', batches[0], 'fp32, compiled', note)


@torch.no_grad()
def bench_portrait(bench, models, decoder):
    """Fits an avatar to its portrait, with the rays of today and with what they were at first:
    2,048 a step, all of them with all samples."""
    config = models['base'].config
    rgb, alpha = scenes.read_portrait(ROOT / 'examples/portrait.png', config.portrait)
    image = scenes.portrait_on_white(rgb, alpha).to(bench.device)
    planes = rh.generate(models, image[None]).planes[0]
    seen = likeness.Seen(image, alpha.to(bench.device), torch.ones_like(alpha).to(bench.device))

    def fit(rays, coarse):
        numbers = mock.patch.multiple(likeness, RAYS=rays, COARSE_STEPS=coarse)
        with numbers, torch.enable_grad():
            return likeness.fit_one(planes, seen, decoder, config.likeness_steps)

    ours = functools.partial(fit, likeness.RAYS, likeness.COARSE_STEPS)
    theirs = functools.partial(fit, 2048, 0.0)
    psnrs = []
    for fitted in (ours(), theirs()):
        field = frozen.freeze(fitted, decoder)
        view = likeness.view_from(field, likeness.FRONT, config.portrait).view
        psnrs.append(rh.psnr(view, image / 2 + 0.5))
    note = 'PSNR of the portrait {:.1f} and {:.1f} dB'.format(*psnrs)
    part = f'fitting to a portrait, {config.likeness_steps} steps'
    bench.row(part, 'avatars', 1, ours, theirs, '2,048 whole rays', note=note)


PARTS = ('lookup', 'view', 'finished', 'rays', 'fitting', 'networks', 'portrait')


# The command --------------------------------------------------------------------------------------
def clock_of(args):
    return time.process_time if args.cpu_seconds else time.perf_counter


def by_clock(clock, seconds):
    """rh.by_seconds of another clock: on a busy machine a fit has seconds of its process."""
    began = clock()
    done = 0.0
    while done < 1:
        yield done
        done = (clock() - began) / seconds


def fitted(args, config, decoder, device):
    """An avatar after --fit seconds of fitting -> Fitted."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            one = ['--preset', 'small', '--count', '1', '--data', folder]
            with contextlib.redirect_stdout(sys.stderr):
                avatars.main(avatars.parse(one))
        path = scenes.list_avatars(args.data or folder)[0]
        views = scenes.load_views(path, 'train', scenes.read_box(path))
    start = rh.new_planes(decoder, config, torch.Generator().manual_seed(0))
    pace = by_clock(clock_of(args), args.fit)
    visit = rh.fit_avatar(views, start, decoder, config, pace)
    return Fitted(visit.planes, decoder, visit.grid, views, config)


def load_models(args, config, device):
    """The four models: those of weights/ for `small` as it is, else random ones."""
    models = {}
    for kind, (build, _) in running.MODELS.items():
        if args.preset == 'small' and not args.set:
            models[kind] = running.load_model(kind, ROOT / 'weights', device)
        else:
            models[kind] = build(config).to(device).eval().requires_grad_(False)
            models[kind].config = config
    models['decoder'].config = config
    return models


def hardware(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def main(args):
    _, _, device = running.start(args.device, 0)
    config = rh.make_config(args.preset, args.set)

    def keep():
        """Writes what is known so far."""
        running.write_json(args.out, {
            **running.origin(device),
            'device': hardware(device),
            'threads': torch.get_num_threads(),
            'clock': 'CPU' if args.cpu_seconds else 'wall',
            'torch': torch.__version__,
            'preset': args.preset,
            'matmul_gflops': gflops,
            'copy_gbs': gbs,
            'rows': bench.rows,
        })

    bench = Bench(device, args.seconds, clock_of(args), keep=keep)
    gflops = bench.flops / 1e9
    gbs = bench.bytes / 1e9
    print(f'matrix product {gflops:,.0f} GFLOP/s, copy {gbs:,.0f} GB/s\n\n{HEADER}')

    models = load_models(args, config, device)
    decoder = models.pop('decoder')
    parts = args.only or PARTS
    if {'view', 'finished', 'rays', 'fitting'} & set(parts):
        avatar = fitted(args, config, decoder, device)
    if 'lookup' in parts:
        for C, R in ((16, 128), (32, 512)):
            bench_lookup(bench, C, R)
    if 'view' in parts:
        bench_rendering(bench, avatar)
    if 'finished' in parts:
        bench_finished(bench, avatar)
    if 'rays' in parts:
        for R in (64, 256, 512):
            bench_rays(bench, avatar, R)
    if 'fitting' in parts:
        bench_fitting(bench, avatar)
    if 'networks' in parts:
        for H in (128, 32):
            bench_convolution(bench, H)
        shipped = args.preset == 'small' and not args.set
        bench_sampling(bench, models, decoder if shipped else None)
        for stage in ('base', 'upsample'):
            bench_training(bench, config, stage, args.batch)
    if 'portrait' in parts:
        bench_portrait(bench, models, decoder)


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add('--preset', default='small', choices=rh.PRESETS)
    data = 'an avatar, or a folder of them whose first is taken (default: a synthetic one)'
    add('--data', type=Path, help=data)
    add('--fit', type=float, default=20, help='seconds to fit it')
    add('--seconds', type=float, default=2, help='time for each side of a comparison')
    batch = 'batch sizes of the training steps'
    add('--batch', type=int, nargs='+', default=[1], help=batch)
    add('--only', nargs='+', choices=PARTS, help='these parts (default: all)')
    busy = 'measure CPU-seconds in place of time, on a machine that does other things'
    add('--cpu-seconds', action='store_true', help=busy)
    add('--out', type=Path, default=Path('results/bench.json'))
    add('--device', help='cuda where there is one, else cpu')
    changes = 'override settings of the preset'
    add('--set', nargs='*', default=[], metavar='NAME=VALUE', help=changes)
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
