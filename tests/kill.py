"""Kills every stage many times (kill -9) at random moments, starts it again each time, and compares
with a run that nobody killed.

    python tests/kill.py --kills 20                 about 15 minutes on 2 cores; results/kills.json
    python tests/kill.py --kills 5 --ranks 2        the same under torchrun; results/kills2.json
    python tests/kill.py --stages base lora --avatars 8 --moments 5 20 --out /tmp
                                                    some stages, of few avatars, killed later

LoRA is trained where diffusers and peft are installed, on a Stable Diffusion of random weights.
After every kill each file must be readable, and each avatar that was finished must still be there,
the same; in the end all bits of the weights, EMA, optimiser and log must be those of the
undisturbed run.
"""
import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import rodinhd as rh  # noqa: E402
import running  # noqa: E402

TINY = ['--preset', 'tiny']
OFTEN = ['--save-every', '5', '--log-every', '1']


class Stage(NamedTuple):
    command: list
    settings: list
    results: list  # files


def fitting(options, settings, results):
    return Stage(['fit.py', *options, *TINY], settings, results)


def training(stage, settings):
    names = (f'{stage}-state.pt', f'{stage}.pt', f'{stage}.jsonl')
    command = ['train.py', '--stage', stage, *TINY, *OFTEN]
    return Stage(command, settings, [f'runs/{name}' for name in names])


STAGES = {
    'decoder': fitting(
        ['--decoder'],
        ['inner=10', 'outer=12', 'fit_avatars=8'],
        ['fits/decoder.pt', 'fits/decoder.jsonl'],
    ),
    'planes': fitting([], ['fit_steps=60'], []),  # its results depend on how many avatars there are
    'vae': training('vae', ['vae_steps=300']),
    'base': training('base', ['base_steps=200']),
    'upsample': training('upsample', ['up_steps=120']),
    'lora': Stage(
        ['train.py', '--stage', 'lora', '--sd', 'sd', '--data', 'portraits', *OFTEN],
        ['lora_rank=2', 'lora_batch=2', 'lora_steps=40'],
        ['runs/lora-state.pt', 'runs/lora.safetensors', 'runs/lora.jsonl'],
    ),
}


def make_pipeline(folder):
    """Writes what LoRA is trained on: folder/sd, a pipeline, and folder/portraits, six of them."""
    from test_words import tiny_pipeline  # which asks for diffusers, transformers and peft
    tiny_pipeline(folder / 'sd')
    (folder / 'portraits').mkdir()
    for i in range(6):
        pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.byte().numpy()).save(folder / f'portraits/{i}.png')
        (folder / f'portraits/{i}.txt').write_text(f'person number {i}')


# Processes ----------------------------------------------------------------------------------------
def begin(folder, stage, ranks):
    """Starts a stage in a folder."""
    script, *options = stage.command
    command = [sys.executable]
    if ranks > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    command += [str(ROOT / script), *options, '--set', *stage.settings]
    with open(folder / 'stderr', 'wb') as stderr:  # no pipe: nobody would read the progress bar
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        )


def complaint(folder):
    """The end of what a process in a folder said."""
    return (folder / 'stderr').read_text()[-300:]


def kill(process):
    """Kills a process and its children, torchrun first, so that it does not see them die."""
    pgrep = ['pgrep', '-P', str(process.pid)]
    children = subprocess.run(pgrep, capture_output=True, text=True).stdout.split()
    for pid in (process.pid, *map(int, children)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


# Files --------------------------------------------------------------------------------------------
def flat(x):
    """Nested content as a string that tells two of them apart: tensors by their bytes."""
    if torch.is_tensor(x):
        data = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return str((tuple(x.shape), x.dtype, hash(data)))
    if isinstance(x, dict):
        return str({key: flat(value) for key, value in x.items()})
    if isinstance(x, (list, tuple)):
        return str([flat(value) for value in x])
    return str(x)


def content(path):
    """What a file holds, as a string that tells two files apart."""
    if path.suffix == '.safetensors':
        from safetensors.torch import load_file
        return flat(dict(sorted(load_file(path).items())))  # the order in its header varies
    if path.suffix != '.pt':
        return re.sub(r', "seconds": [^,}]*', '', path.read_text())  # the clock's, no result
    return flat(torch.load(path, weights_only=True))


def unreadable(folder):
    """How many files there are that readers would look at and cannot read."""
    bad = 0
    for path in (*(folder / 'fits').rglob('[!.]*.*'), *(folder / 'runs').glob('[!.]*.*')):
        try:
            if path.suffix == '.png':
                Image.open(path).load()
            elif path.suffix in ('.pt', '.safetensors'):
                content(path)
            elif path.suffix == '.json':
                json.loads(path.read_text())
        except Exception:  # torch.load raises many types on damaged files
            bad += 1
    return bad


def finished(folder):
    """The content of all avatars that are finished."""
    return {path.name: content(path) for path in (folder / 'fits').glob('avatar_*.pt')}


# Torture ------------------------------------------------------------------------------------------
def run_and_kill(name, folder, row, args, rng):
    """Runs a stage to its end, and kills it again and again as long as there are kills left.

    It counts in `row` what happens.
    """
    there = {}
    while True:
        process = begin(folder, STAGES[name], args.ranks)
        patience = None
        if row['kills'] < args.kills:
            patience = rng.uniform(*args.moments) + 5 * (args.ranks > 1)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            kill(process)
            now = finished(folder)
            row['kills'] += 1
            row['unreadable'] += unreadable(folder)
            row['lost avatars'] += sum(now.get(avatar) != x for avatar, x in there.items())
            there = now
            continue
        if process.returncode:
            rh.stop(f'{name}: {complaint(folder)}')
        return


def results_of(name, folder):
    """Paths of the files that a stage has written, of which each bit must be the same."""
    if name == 'planes':
        return [path.relative_to(folder) for path in sorted((folder / 'fits').glob('avatar_*.pt'))]
    return STAGES[name].results


def torture(name, before, args, rng):
    """Kills a stage as often as asked for -> a row of the table, and a folder with the stage's
    result; no row where the stage is only there for those after it.

    before: a folder with what the stage needs.
    """
    calm = before.with_name(f'{name}-calm')
    shutil.copytree(before, calm, symlinks=True)
    row = dict.fromkeys(('kills', 'unreadable', 'lost avatars', 'runs', 'different'), 0)
    began = time.monotonic()
    if begin(calm, STAGES[name], args.ranks).wait(1200):
        rh.stop(f'{name}: failed undisturbed: {complaint(calm)}')
    if name not in args.stages:
        return None, calm
    row['seconds undisturbed'] = round(time.monotonic() - began, 1)

    wild = before.with_name(f'{name}-wild')
    while row['kills'] < args.kills or not row['runs']:
        shutil.rmtree(wild, ignore_errors=True)
        shutil.copytree(before, wild, symlinks=True)
        run_and_kill(name, wild, row, args, rng)
        row['runs'] += 1
        results = results_of(name, calm)
        row['different'] += any(content(calm / path) != content(wild / path) for path in results)
    return row, calm


def needed(stages):
    """The stages to run: those that are asked for and, but for LoRA, all before them."""
    names = list(STAGES)
    others = [names.index(name) for name in stages if name != 'lora']
    return names[:max(others, default=-1) + 1] + ['lora'] * ('lora' in stages)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--kills', type=int, default=20, help='of each stage')
    p.add_argument('--ranks', type=int, default=1, help='with several, results/kills<ranks>.json')
    p.add_argument('--stages', nargs='+', default=list(STAGES), choices=STAGES,
                   help='to kill; what they need is made undisturbed')
    p.add_argument('--avatars', type=int, default=60)
    p.add_argument('--moments', nargs=2, type=float, default=[1.5, 6], metavar='SECONDS',
                   help='a kill comes so long after a start, between the two')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=ROOT / 'results')
    args = p.parse_args()
    table = {}
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / 'data'
        draw = [sys.executable, str(ROOT / 'avatars.py'), *TINY]
        subprocess.run([*draw, '--count', str(args.avatars), '--data', str(data)], check=True)
        before = Path(folder) / 'start'
        before.mkdir()
        (before / 'data').symlink_to(data)
        if 'lora' in args.stages:
            make_pipeline(before)
        for name in needed(args.stages):
            row, before = torture(name, before, args, rng)
            if row is None:
                continue
            table[name] = row
            counts = ', '.join(f'{what} {number}' for what, number in row.items())
            print(f'{name:10s}{counts}', flush=True)
    suffix = args.ranks if args.ranks > 1 else ''
    running.write_json(args.out / f'kills{suffix}.json', table)


if __name__ == '__main__':
    main()
