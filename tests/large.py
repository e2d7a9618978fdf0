"""What many and large avatars cost, without a GPU: seconds of one core, counts and shapes.

    python tests/large.py                             all of it, in 10 minutes of a core
    python tests/large.py --only steps memory         parts of it; the others stay as they are

    loader   a sample of `paper`, read by a worker: base, and upsample with its patch
    host     an avatar of 300 views of 1024 x 1024, before the first step of its fit
    steps    kernels and waits of a step of fitting, and of training `small` with a batch of 64
    memory   what a sample of `paper` keeps for the backward pass, in fp32 and in bf16
    many     the start of training with 100,000 planes files, and its memory

Files are synthetic, and the system has them in memory. Writes results/large.json.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from counting import Counting  # noqa: E402
from PIL import Image  # noqa: E402

import batches  # noqa: E402
import fit  # noqa: E402
import provenance  # noqa: E402
import rodinhd as rh  # noqa: E402
import running  # noqa: E402
import scenes  # noqa: E402
import train  # noqa: E402

ROOT = Path(__file__).parent.parent


# Files --------------------------------------------------------------------------------------------
def write_avatar(folder, views, size):
    """Writes an avatar: a ball with a pattern, before so many cameras."""
    (folder / 'train').mkdir(parents=True)
    y, x = np.mgrid[:size, :size]
    radius = np.hypot(x - size / 2, y - size / 2) / size
    frames = []
    for k in range(views):
        colours = [(x * (k + 3)) // 7 % 256, (y + 11 * k) % 256, (x + y) // 3 % 256]
        alpha = np.where(radius < 0.3, 255, 0)
        pixels = np.stack([*colours, alpha], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f'train/{k:03d}.png', compress_level=1)
        pose = rh.orbit_pose(360 * k / views, 20 * math.sin(k)).tolist()
        frames.append({'file_path': f'train/{k:03d}.png', 'transform_matrix': pose})
    angle = math.radians(rh.PORTRAIT_FOV)
    content = {'camera_angle_x': angle, 'aabb': [[-1, -1, -1], [1, 1, 1]], 'frames': frames}
    (folder / 'transforms_train.json').write_text(json.dumps(content))
    return folder


def write_models(folder, config, *kinds):
    """Writes a decoder, and random models of these kinds, and returns the decoder."""
    torch.manual_seed(0)
    decoder = rh.Decoder(config)
    running.write_model(folder / 'fits/decoder.pt', 'decoder', config, decoder.state_dict(), 0)
    for kind in kinds:
        state = running.build(kind, config).state_dict()
        running.write_model(folder / f'runs/{kind}.pt', kind, config, state, 0)
    return decoder


def write_planes(folder, avatar, config, decoder):
    planes = torch.rand(3, config.channels, config.resolution, config.resolution) * 2 - 1
    made_of = {
        'source': provenance.of_avatar(avatar),
        'portrait': provenance.of_portrait(avatar, config.portrait),
    }
    path = folder / f'fits/{avatar.name}.pt'
    fit.write_planes(path, planes, scenes.read_box(avatar), config, decoder, [], {}, **made_of)


# Parts --------------------------------------------------------------------------------------------
def core_seconds(work, times=1):
    """Seconds of the process that a call of work takes, of so many."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times


def loader(folder):
    """Core-seconds of a sample of `paper`, and of the first one of an avatar."""
    config = rh.make_config('paper')
    decoder = write_models(folder, config)
    avatar = write_avatar(folder / 'data/a', 12, 1024)
    write_planes(folder, avatar, config, decoder)
    decoder = running.load_model('decoder', folder / 'fits', 'cpu')
    found = {}
    for name, low, patches in (('base', True, 0), ('upsample_with_patch', False, 1)):
        scenes.cached_front.cache_clear()
        items = batches.Planes(folder / 'fits', folder / 'data', config, low)
        items.check_decoder(decoder)
        items.met.zero_()
        draws = batches.Draws(items, 0, patches, config.patch)
        found[f'{name}_first_meeting'] = core_seconds(lambda: draws[0, 0, 0])  # noqa: B023
        found[name] = core_seconds(lambda: draws[1, 0, 0], 10)  # noqa: B023
    return found


def host(folder):
    """Core-seconds that an avatar of 300 views of 1024 x 1024 takes before its fit's first step."""
    write_avatar(folder / 'data/a', 300, 1024)
    args = fit.parse(['--data', str(folder / 'data'), '--fits', str(folder / 'fits')])
    config = rh.make_config('paper', ['hull_start=1', 'silhouette_rays=1'])
    running.start('cpu')
    folders = scenes.list_avatars(args.data)
    tasks = fit.Tasks(args, folders, {}, rh.Decoder(config), config, 0)
    first = core_seconds(lambda: tasks.prepared(0))
    return {'first_visit': first, 'later_visits': core_seconds(lambda: tasks.prepared(0))}


def counted(work):
    """Kernels and waits of work()."""
    with Counting() as counting:
        work()
    return np.array([counting.kernels.total(), sum(counting.waits.values())])


def steps(folder):
    """Kernels and waits for the device of a step: of fits with `paper`'s settings, at fewer texels
    and rays, and of the base network of `small` with a batch of 64, 8 of which have a view. That
    is counted with 9 samples: two kernels more are of each other one, which a test says."""
    config = rh.make_config('paper', ['resolution=128', 'steps=64', 'rays=256', 'grid=32'])
    avatar = write_avatar(folder / 'data/a', 8, 128)
    views = scenes.load_views(avatar, 'train', scenes.read_box(avatar))
    found = {}
    for name in ('fit', 'fit_with_decoder'):
        decoder = rh.Decoder(config)
        start = rh.new_planes(decoder, config, torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(decoder.parameters(), lr=config.lr_decoder, fused=True)
        joint = rh.Joint(optimizer, None, lambda: None) if name == 'fit_with_decoder' else None
        prepared = rh.prepare(views, config, 'cpu', joint is not None)

        both = []
        for count in (16, 32):  # the grid is updated each 16 steps
            fitted = functools.partial(
                rh.fit_avatar, prepared, start, decoder, config, rh.by_steps(count), joint=joint
            )
            both.append(counted(fitted))
        kernels, waits = (both[1] - both[0]) / 16
        # Two of the waits are for numbers that the CPU itself has drawn
        found[name] = {'kernels': float(kernels), 'waits': float(waits) - 2}

    config = rh.make_config('small', ['latent_width=96', 'base_batch=64'])
    decoder = write_models(folder, config, 'vae', 'clip')
    write_planes(folder, avatar, config, decoder)
    folders = ['--data', folder / 'data', '--fits', folder / 'fits', '--runs', folder / 'runs']
    options = ['--stage', 'base', '--preset', 'small', *folders]
    args = train.parse([str(option) for option in options])
    stage = train.prepare_diffusion(args, config, torch.device('cpu'))
    network = stage.network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    ema = running.EMA(network, config.ema)
    for name, bf16 in (('train_small_base', False), ('train_small_base_bf16', True)):
        for _ in range(2):  # the first makes what is kept
            batch = batches.collate([stage.data[0, j, 0] for j in range(9)])

            def step():
                seen = batches.drawn(batch, stage.draw, 'cpu')  # noqa: B023
                with torch.autocast('cpu', torch.bfloat16, enabled=bf16):  # noqa: B023
                    terms = stage.loss(network, seen)
                sum(terms.values()).backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad)
                optimizer.step()
                ema.update(network)

            kernels, waits = counted(step)
            optimizer.zero_grad()
        kernels += 2 * (config.base_batch - 9)
        found[name] = {'kernels': int(kernels), 'waits': int(waits)}
    return found


def memory(folder):
    """GiB that a sample of `paper` keeps for the backward pass, on a GPU that is made believe."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.cuda.amp import common
    common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    plain = running.Fused.apply

    def attention(q, k, v):
        if torch.is_autocast_enabled('cuda'):
            q, k, v = (x.bfloat16() for x in (q, k, v))
        return plain(q, k, v)

    running.Fused.apply = attention
    config = rh.make_config('paper')
    (channels, pixels), maps = rh.feature_shapes(config)
    found = {}
    for kind, size in (('base', config.base_resolution), ('upsample', config.resolution)):
        for recompute in (False, True):
            for bf16 in (False, True):
                with FakeTensorMode(), torch.device('cuda'):
                    network = running.build(kind, config).train()
                    network.checkpoint = recompute
                    low = torch.zeros(1, 3, config.channels, *[config.base_resolution] * 2)
                    latent = torch.zeros(1, channels, pixels, pixels)
                    seen = [torch.zeros(1, c, p, p) for c, p in maps]
                    planes = torch.zeros(1, 3, config.channels, size, size)
                    inputs = (planes, torch.zeros(1), rh.Portrait(latent, seen, low))
                    with torch.autocast('cuda', torch.bfloat16, enabled=bf16):
                        kept = running.kept_for_backward(network, *inputs)
                    if bf16 and not recompute:  # the weights in bf16 are kept once, for all samples
                        kept -= 2 * sum(p.numel() for p in network.parameters())
                    name = kind + ', recomputed' * recompute
                    found.setdefault(name, {})['bf16' if bf16 else 'fp32'] = kept / 2 ** 30
    running.Fused.apply = plain
    return found


def many(folder, count=100_000):
    """Seconds from the command to the first step of training with so many planes files, and GB of
    its memory. The files are one and the same by links; names are their own."""
    config = rh.make_config('tiny')
    decoder = write_models(folder, config, 'vae')
    avatar = write_avatar(folder / 'data/a00000', 1, 64)
    write_planes(folder, avatar, config, decoder)
    files = [path for path in avatar.rglob('*') if path.is_file()]
    files.append(folder / 'fits/a00000.pt')

    def of(k, path):
        return Path(str(path).replace('a00000', f'a{k:05d}'))

    latest = 0
    for k in range(1, count):
        copied = k % 50_000 == 0  # as no file has more names than 65,000
        for path in files:
            of(k, path).parent.mkdir(parents=True, exist_ok=True)
            if copied:
                shutil.copy2(path, of(k, path))
            else:
                os.link(of(latest, path), of(k, path))
        if copied:
            latest = k
    found = {'files': count}
    for name, avatars in (('one', '--data data/a00000'), ('all', '--data data')):
        command = [sys.executable, ROOT / 'train.py', '--stage', 'base', '--preset', 'tiny']
        command += [*avatars.split(), '--device', 'cpu', '--set', 'base_steps=1', 'sample_steps=1']
        command += ['components=0']
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        subprocess.run([str(word) for word in command], cwd=folder, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found[name] = {
            'core_seconds': after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            'seconds': time.monotonic() - began,
            'gb': after.ru_maxrss / 1e6,  # the largest child so far
        }
        (folder / 'runs/base-state.pt').unlink()
    return found


PARTS = {'loader': loader, 'host': host, 'steps': steps, 'memory': memory, 'many': many}


def main(args):
    torch.set_num_threads(1)
    running.start('cpu')
    content = {}
    with contextlib.suppress(OSError):
        content = json.loads(args.out.read_text())
    for name in args.only:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            found = PARTS[name](Path(folder))
        content[name] = {'found': found, 'seed': 0, **running.origin()}
        print(f'{name}: {json.dumps(found)}', flush=True)
        running.write_json(args.out, content)


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS))
    p.add_argument('--work', type=Path, help='where files are made (default: the temporary folder)')
    p.add_argument('--out', type=Path, default=Path('results/large.json'))
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
