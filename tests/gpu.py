"""The first thing to do where a GPU is at hand: tests and figures of it, in ten minutes.

    python tests/gpu.py --out results/gpu.json
    python tests/gpu.py --device cpu --preset tiny --seconds 60      how it works, without one

It runs tests/test_cuda.py, 60 seconds of fitting (rays and steps a second), a training step of each
network at growing batch (samples a second, memory), sampling (seconds an avatar), and with what
time is left tests/bench.py. Each part is a process with a share of the time, whose failure is
written down and is not the end of the others; what is known is written after each part.
"""
import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import rodinhd as rh  # noqa: E402
import running  # noqa: E402

# Part: the share of the time that it may take
SHARES = {'tests': 0.3, 'fit': 0.2, 'base': 0.1, 'upsample': 0.15, 'sample': 0.1, 'bench': 0.15}


# Parts --------------------------------------------------------------------------------------------
def waits(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def memory(device):
    """GiB that were in use at most since the last call; None on a CPU."""
    if device.type != 'cuda':
        return None
    most = torch.cuda.max_memory_allocated(device) / 2 ** 30
    torch.cuda.reset_peak_memory_stats(device)
    return round(most, 2)


def some_views(config, device):
    """Views of a ball in front of eight cameras, as large as the portrait of a config times 4."""
    size = min(4 * config.portrait, 1024)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    image = torch.stack([x % 256, y % 256, (x + y) % 256, torch.full_like(x, 255)], dim=-1).byte()
    outside = (x - size / 2) ** 2 + (y - size / 2) ** 2 > (0.3 * size) ** 2
    image[outside] = 0
    poses = torch.stack([rh.orbit_pose(45 * i, 10) for i in range(8)])
    intrinsics = rh.intrinsics_of(rh.PORTRAIT_FOV, size).expand(8, 4).contiguous()
    return rh.Views(image.expand(8, *image.shape).contiguous(), poses, intrinsics, True)


def fit_part(config, device, seconds):
    """Fitting, first for a while to warm up: rays and steps a second, with and without a decoder
    that learns."""
    found = {}
    views = some_views(config, device)
    for name in ('planes', 'decoder'):
        decoder = rh.Decoder(config).to(device)
        start = rh.new_planes(decoder, config, torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(decoder.parameters(), lr=config.lr_decoder, fused=True)
        joint = rh.Joint(optimizer, None, lambda: None) if name == 'decoder' else None
        prepared = rh.prepare(views, config, device, joint is not None)
        for part in (seconds / 8, seconds / 4):
            steps = 0

            def pace(part=part):
                nonlocal steps
                for done in rh.by_seconds(part):
                    steps += 1
                    yield done

            began = time.perf_counter()
            rh.fit_avatar(prepared, start, decoder, config, pace(), joint=joint)
            waits(device)
            took = time.perf_counter() - began
        found[name] = {
            'steps_a_second': steps / took,
            'rays_a_second': steps * config.rays / took,
            'minutes_for_all_steps': config.fit_steps / (steps / took) / 60,
            'gib': memory(device),
        }
    return found


def step_part(stage, config, device, seconds):
    """A training step at batches 1, 2, 4 ... until memory or time is out."""
    from bench import Bench, training_step
    network, step = training_step(Bench(device, 0.1), config, stage)
    found = []
    end = time.monotonic() + 0.7 * seconds
    batch = 1
    while time.monotonic() < end and batch <= 256:
        try:
            step(batch, True)
            waits(device)
            began = time.perf_counter()
            step(batch, True)
            waits(device)
        except torch.cuda.OutOfMemoryError:
            found.append({'batch': batch, 'out_of_memory': True})
            break
        took = time.perf_counter() - began
        row = {'batch': batch, 'seconds': took, 'samples_a_second': batch / took}
        found.append({**row, 'gib': memory(device)})
        batch *= 2
    predicted = running.memory_of_training(stage, config, True, network.checkpoint)
    return {'steps': found, 'predicted_gib': [x / 2 ** 30 for x in predicted]}


def sample_part(config, device, seconds):
    """Portrait to planes with random weights, twice: the second time is what it takes."""
    models = {}
    for kind in ('vae', 'base', 'upsample'):
        models[kind] = running.build(kind, config).to(device).eval().requires_grad_(False)
    portrait = torch.zeros(1, 3, config.portrait, config.portrait)
    found = []
    for bf16 in (False, False, True, True):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            rh.generate(models, portrait)
        waits(device)
        took = time.perf_counter() - began
        found.append({'bf16': bf16, 'seconds': took, 'gib': memory(device)})
    return found


def of_part(args):
    """What a part that is run in this process found."""
    _, _, device = running.start(args.device, 0)
    config = rh.make_config(args.preset, args.set)
    if args.part == 'fit':
        return fit_part(config, device, args.seconds)
    if args.part == 'sample':
        return sample_part(config, device, args.seconds)
    return step_part(args.part, config, device, args.seconds)


# The command --------------------------------------------------------------------------------------
def command_of(part, args, seconds, out):
    """The command of a part, which may take so many seconds and may write JSON to `out`."""
    program = [sys.executable]
    if part == 'tests':
        tests = ROOT / 'tests/test_cuda.py'
        return [*program, '-m', 'pytest', '-q', '--tb=short', str(tests)]
    options = ['--device', args.device, '--preset', args.preset, '--out', str(out)]
    changes = ['--set', *args.set] if args.set else []
    if part == 'bench':
        options += ['--fit', str(seconds / 10), '--seconds', str(seconds / 200)]
        return [*program, str(ROOT / 'tests/bench.py'), *options, *changes]
    options += ['--part', part, '--seconds', str(seconds)]
    return [*program, __file__, *options, *changes]


def run_part(part, args):
    """Runs a part as a process -> a dict of what it found, or of how it failed."""
    seconds = SHARES[part] * args.seconds
    out = args.out.with_name(f'.{part}.{args.out.name}')
    began = time.monotonic()
    env = {**os.environ, 'RODINHD_DEVICE': args.device.split(':')[0]}
    try:
        done = subprocess.run(
            command_of(part, args, seconds, out),
            capture_output=True, text=True, timeout=seconds, env=env, check=False,
        )
        status = done.returncode
        said = (done.stdout + done.stderr).strip().splitlines()[-15:]
    except subprocess.TimeoutExpired:
        status = 'out of time'
        said = []
    found = {'status': status, 'seconds': time.monotonic() - began}
    with contextlib.suppress(OSError, ValueError):
        found['found'] = json.loads(out.read_text())
    out.unlink(missing_ok=True)
    if status != 0 or part == 'tests':
        found['said'] = said
    return found


def main(args):
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.part:
        running.write_json(args.out, of_part(args))
        return
    name = platform.processor() or platform.machine()
    if args.device.startswith('cuda') and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    git = ['git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD']
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    content = {
        'command': ' '.join(sys.argv),
        'commit': commit,
        'machine': name,
        'torch': torch.__version__,
        'preset': args.preset,
        'seed': 0,
    }
    for part in args.parts:
        content[part] = run_part(part, args)
        running.write_json(args.out, content)
        print(f'{part}: {json.dumps(content[part])[:400]}', flush=True)


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--device', default='cuda')
    p.add_argument('--preset', default='paper', choices=rh.PRESETS)
    p.add_argument('--seconds', type=float, default=580, help='for all parts together')
    p.add_argument('--out', type=Path, default=Path('results/gpu.json'))
    p.add_argument('--parts', nargs='+', default=list(SHARES), choices=SHARES)
    p.add_argument('--part', choices=SHARES, help='one of them, in this process')
    p.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE',
                   help='override settings of the preset')
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
