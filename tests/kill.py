"""Kills every stage many times (kill -9) at random moments, starts it again each time, and compares
with a run that nobody killed.

    python tests/kill.py --kills 20                 about 15 minutes on 2 cores; results/kills.json
    python tests/kill.py --kills 5 --ranks 2        the same under torchrun; results/kills2.json

After every kill each file must be readable, and each avatar that was finished must still be there,
the same; in the end all bits of the weights, EMA, optimiser and log must be those of the
undisturbed run.
"""
import argparse
import contextlib
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import rodinhd as rh  # noqa: E402
import running  # noqa: E402

AVATARS = 60
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
    'planes': fitting(
        [],
        ['fit_steps=60'],
        [f'fits/avatar_{i:04d}.pt' for i in range(AVATARS)],
    ),
    'vae': training('vae', ['vae_steps=300']),
    'base': training('base', ['base_steps=200']),
    'upsample': training('upsample', ['up_steps=120']),
}


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
    if path.suffix != '.pt':
        return re.sub(r', "seconds": [^,}]*', '', path.read_text())  # the clock's, no result
    return flat(torch.load(path, weights_only=True))


def unreadable(folder):
    """How many files there are that readers would look at and cannot read."""
    bad = 0
    for path in (*(folder / 'fits').rglob('[!.]*.pt'), *(folder / 'runs').glob('[!.]*.pt')):
        try:
            torch.load(path, weights_only=True)
        except Exception:  # torch.load raises many types on damaged files
            bad += 1
    return bad


def finished(folder):
    """The content of all avatars that are finished."""
    return {path.name: content(path) for path in (folder / 'fits').glob('avatar_*.pt')}


# Torture ------------------------------------------------------------------------------------------
def run_and_kill(name, folder, row, kills, ranks, rng):
    """Runs a stage to its end, and kills it again and again as long as there are kills left.

    It counts in `row` what happens.
    """
    there = {}
    while True:
        process = begin(folder, STAGES[name], ranks)
        patience = None
        if row['kills'] < kills:
            patience = rng.uniform(1.5, 6) + 5 * (ranks > 1)
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


def torture(name, before, kills, ranks, rng):
    """Kills a stage `kills` times -> a row of the table, and a folder with the stage's result.

    before: a folder with what the stage needs.
    """
    calm = before.with_name(f'{name}-calm')
    shutil.copytree(before, calm, symlinks=True)
    row = dict.fromkeys(('kills', 'unreadable', 'lost avatars', 'runs', 'different'), 0)
    began = time.monotonic()
    if begin(calm, STAGES[name], ranks).wait(1200):
        rh.stop(f'{name}: failed undisturbed: {complaint(calm)}')
    row['seconds undisturbed'] = round(time.monotonic() - began, 1)

    wild = before.with_name(f'{name}-wild')
    while row['kills'] < kills or not row['runs']:
        shutil.rmtree(wild, ignore_errors=True)
        shutil.copytree(before, wild, symlinks=True)
        run_and_kill(name, wild, row, kills, ranks, rng)
        row['runs'] += 1
        results = STAGES[name].results
        row['different'] += any(content(calm / path) != content(wild / path) for path in results)
    return row, calm


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--kills', type=int, default=20, help='of each stage')
    p.add_argument('--ranks', type=int, default=1, help='with several, results/kills<ranks>.json')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=ROOT / 'results')
    args = p.parse_args()
    table = {}
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / 'data'
        draw = [sys.executable, str(ROOT / 'avatars.py'), *TINY]
        subprocess.run([*draw, '--count', str(AVATARS), '--data', str(data)], check=True)
        before = Path(folder) / 'start'
        before.mkdir()
        (before / 'data').symlink_to(data)
        for name in STAGES:
            row, before = torture(name, before, args.kills, args.ranks, rng)
            table[name] = row
            counts = ', '.join(f'{what} {number}' for what, number in row.items())
            print(f'{name:10s}{counts}', flush=True)
    suffix = args.ranks if args.ranks > 1 else ''
    running.write_json(args.out / f'kills{suffix}.json', table)


if __name__ == '__main__':
    main()
