"""The first thing to do where a GPU is at hand: tests and figures of it, in three minutes or ten.

    python tests/gpu.py --out results/gpu.json
    python tests/gpu.py --seconds 170                                the shortest that says enough
    python tests/gpu.py --device cpu --preset tiny --seconds 170     how it works, without one

It runs tests/test_cuda.py, fitting (rays and steps a second), a training step of each network at
growing batch (samples a second, memory), sampling (seconds an avatar), and tests/bench.py. Each
part is a process with a share of the time, which is ended when that is over, with all that it has
started; its failure is written down and is not the end of the others. What is known is written
after each part, and what a part knew when it was ended, too.
"""
import argparse
import contextlib
import json
import os
import platform
import signal
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
SHARES = {'tests': 0.3, 'fit': 0.14, 'base': 0.12, 'upsample': 0.14, 'sample': 0.15, 'bench': 0.15}
STARTING = 8  # seconds of a part that are gone before it measures


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
    that learns. Yields what is known, as all parts do."""
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
        yield found


def step_part(stage, config, device, seconds):
    """A training step at batches 1, 2, 4 ... until memory or time is out."""
    from bench import Bench, training_step
    network, step = training_step(Bench(device, 0.1), config, stage)
    predicted = running.memory_of_training(stage, config, True, network.checkpoint)
    found = {'predicted_gib': [x / 2 ** 30 for x in predicted], 'steps': []}
    end = time.monotonic() + 0.8 * seconds
    batch = 1
    took = 0.0
    while time.monotonic() + 4 * took < end and batch <= 256:  # two steps of twice the batch
        try:
            step(batch, True)
            waits(device)
            began = time.perf_counter()
            step(batch, True)
            waits(device)
        except torch.cuda.OutOfMemoryError:
            found['steps'].append({'batch': batch, 'out_of_memory': True})
            break
        took = time.perf_counter() - began
        row = {'batch': batch, 'seconds': took, 'samples_a_second': batch / took}
        found['steps'].append({**row, 'gib': memory(device)})
        yield found
        batch *= 2
    yield found


def sample_part(config, device, seconds):
    """Portrait to planes with random weights, twice: the second time is what it takes."""
    models = {}
    for kind in ('vae', 'base', 'upsample'):
        models[kind] = running.build(kind, config).to(device).eval().requires_grad_(False)
    portrait = torch.zeros(1, 3, config.portrait, config.portrait)
    found = []
    for bf16 in (True, True, False, False):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            rh.generate(models, portrait)
        waits(device)
        took = time.perf_counter() - began
        found.append({'bf16': bf16, 'seconds': took, 'gib': memory(device)})
        yield found


def of_part(args):
    """Yields what a part that is run in this process has found so far."""
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
    if part == 'tests':  # each with a line of its own: the last ones may not be reached
        how = ['-v', '--tb=short', '-p', 'no:cacheprovider']
        return [*program, '-m', 'pytest', *how, str(ROOT / 'tests/test_cuda.py')]
    options = ['--device', args.device, '--preset', args.preset, '--out', str(out)]
    changes = ['--set', *args.set] if args.set else []
    seconds = max(seconds - STARTING, 1)
    if part == 'bench':
        options += ['--fit', str(seconds / 10), '--seconds', str(seconds / 200)]
        return [*program, str(ROOT / 'tests/bench.py'), *options, *changes]
    options += ['--part', part, '--seconds', str(seconds)]
    return [*program, __file__, *options, *changes]


def ended(command, device, seconds, said):
    """Runs a command, whose words go to the file `said`, for at most so many seconds -> its exit
    status, or None where it had to be ended, with all that it had started."""
    env = {**os.environ, 'RODINHD_DEVICE': device.split(':')[0]}  # of tests/test_cuda.py
    with open(said, 'w') as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env,
            start_new_session=True,
        )
        try:
            return process.wait(seconds - 3)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then says what failed
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
            return None
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)


def run_part(part, args):
    """Runs a part as a process -> a dict of what it found, or of how it failed."""
    seconds = SHARES[part] * args.seconds
    out = args.out.with_name(f'.{part}.{args.out.name}')
    said = out.with_suffix('.txt')
    began = time.monotonic()
    status = ended(command_of(part, args, seconds, out), args.device, seconds, said)
    found = {
        'status': 'out of time' if status is None else status,
        'seconds': time.monotonic() - began,
    }
    with contextlib.suppress(OSError, ValueError):
        found['found'] = json.loads(out.read_text())
    lines = said.read_text(errors='replace').splitlines()
    if part == 'tests':
        found['passed'] = sum('PASSED' in line for line in lines)
        found['failed'] = [line for line in lines if 'FAILED' in line or 'ERROR' in line]
    if status != 0:
        found['said'] = lines[-30:]
    for path in (out, said):
        path.unlink(missing_ok=True)
    return found


def main(args):
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.part:
        for found in of_part(args):
            running.write_json(args.out, found)
        return
    name = platform.processor() or platform.machine()
    if args.device.startswith('cuda') and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    content = {
        'command': ' '.join(sys.argv),
        'commit': args.commit or running.commit_here(),
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
    p.add_argument('--commit', help='of the code, where git cannot say')
    p.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE',
                   help='override settings of the preset')
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
