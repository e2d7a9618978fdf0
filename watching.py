"""Training that can be watched: log, loss on fixed noise, numbered pictures, TensorBoard."""
import argparse
import contextlib
import json
import math
import time
from typing import NamedTuple

import torch

import batches
import rodinhd as rh

MOST_FIXED = 8  # samples of the loss on fixed noise

NEXT = {  # what comes after a stage
    'vae': 'python train.py --stage base',
    'base': 'python train.py --stage upsample',
    'upsample': 'python sample.py --unconditional, or --portrait',
    'refiner': 'python sample.py --unconditional, or --portrait',
    'lora': 'python sample.py --prompt, with --lora',
    'clip': 'python train.py --stage prior',
    'prior': 'python train.py --stage text',
    'text': 'python sample.py --prompt',
}


class Fixed(NamedTuple):
    """Samples whose noise and times are the same at every save."""

    name: str  # 'held_out' or, of avatars that are trained on, 'fixed'
    data: torch.utils.data.Dataset  # batches.Draws
    draw: object
    size: int  # of the batches that are in memory


def fixed_of(stage, prepare, args, config, device, size):
    """The Fixed of a stage: of the avatars of --held-out, else of those that are trained on."""
    data, draw, *_ = stage  # of train.py or of latents.py
    if not args.held_out:
        return Fixed('fixed', data, draw, size)
    others = argparse.Namespace(**{**vars(args), 'data': args.held_out})
    with torch.random.fork_rng():  # it makes a network, too
        data, draw, *_ = prepare(others, config, device)
    return Fixed('held_out', data, draw, size)


@torch.no_grad()
def loss_on(fixed, network, loss, device):
    """The mean loss of a network on a Fixed."""
    n = len(fixed.data.items)
    count = min(MOST_FIXED, n)
    indices = [(0, j, j * n // count) for j in range(count)]
    total = 0.0
    for first in range(0, count, fixed.size):
        some = indices[first : first + fixed.size]
        batch = batches.collate([fixed.data[index] for index in some])
        seen = batches.drawn(batch, fixed.draw, device)
        total += float(sum(loss(network, seen).values())) * len(some) / count
    return total


@contextlib.contextmanager
def averaged(network, ema):
    """Gives a network the weights of its EMA for a while."""
    own = {name: p.detach().clone() for name, p in network.named_parameters()}
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(ema.shadow[name])
    try:
        yield network
    finally:
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(own[name])


class Log:
    """The log of a stage: lines of JSON, and with --tensorboard what TensorBoard reads."""

    def __init__(self, path, begin, tensorboard=False):
        self.path = path
        self.began = time.monotonic()
        self.before = begin  # steps that were done at that time
        self.writer = writer_of(path) if tensorboard else None

    def write(self, step, values):
        """Writes values of a step, and the seconds a step since the line before."""
        now = time.monotonic()
        seconds = (now - self.began) / max(step + 1 - self.before, 1)
        self.began = now
        self.before = step + 1
        line = {'step': step, **values, 'seconds': round(seconds, 4)}
        with open(self.path, 'a') as file:
            file.write(json.dumps(line) + '\n')
        if self.writer:
            for name, value in line.items():
                if name != 'step' and value is not None:
                    self.writer.add_scalar(name, value, step)
            self.writer.flush()


def writer_of(log):
    """What writes for TensorBoard, into a folder beside a log."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        rh.stop('--tensorboard needs the tensorboard package: pip install tensorboard')
    return SummaryWriter(log.parent / 'tensorboard' / log.stem)


def finite_or_none(x):
    """A number as JSON has it, which knows no NaN."""
    x = float(x)
    return round(x, 6) if math.isfinite(x) else None


def picture_path(runs, stage, step):
    """Where the picture of a stage goes after so many steps."""
    return runs / f'{stage}-{step:06d}.png'


def lines_of(path):
    """The lines of a log, dicts; those that are not whole are left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding='utf-8').splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def last_line(args, steps, written):
    """Says what a stage has written, how good it is, and what comes next."""
    lines = lines_of(args.runs / f'{args.stage}.jsonl')
    said = f'written: {", ".join(map(str, written))}'
    for name, what in (('held_out', 'loss held out'), ('fixed', 'loss on fixed noise')):
        values = [(line[name], line['step'] + 1) for line in lines if name in line]
        if values:
            lowest, step = min(values)
            said += f'; {what} {values[-1][0]:.4g}, lowest {lowest:.4g} after {step} steps'
    print(f'{said}; next: {NEXT[args.stage]}')


def remove_half_pictures(runs, stage):
    """Removes what killed processes have left of writing pictures."""
    for path in runs.glob(f'.*.tmp.{stage}-*.png'):
        path.unlink(missing_ok=True)
