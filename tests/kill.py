"""Kills every stage many times (kill -9) at random moments, starts it again each time, and compares with a run that nobody killed.

    python tests/kill.py --kills 20                 about 15 minutes on 2 cores; writes results/kills.json
    python tests/kill.py --kills 5 --ranks 2        the same under torchrun; writes results/kills2.json

After every kill each file must be readable and each avatar that was finished must still be there, the same; in the end all bits of the
weights, EMA, optimiser and log must be those of the undisturbed run.
"""
import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import rodinhd as rh  # noqa: E402

TINY = ['--preset', 'tiny']
STAGES = {                              # name: command, settings, files of the result
    'decoder': (['fit.py', '--decoder', *TINY], ['inner=10', 'outer=12', 'fit_avatars=8'], ['fits/decoder.pt', 'fits/decoder.jsonl']),
    'planes': (['fit.py', *TINY], ['fit_steps=60'], [f'fits/avatar_{i:04d}.pt' for i in range(60)]),
    'vae': (['train.py', '--stage', 'vae', *TINY, '--save-every', '5', '--log-every', '1'], ['vae_steps=300'],
            ['runs/vae-state.pt', 'runs/vae.pt', 'runs/vae.jsonl']),
    'base': (['train.py', '--stage', 'base', *TINY, '--save-every', '5', '--log-every', '1'], ['base_steps=200'],
             ['runs/base-state.pt', 'runs/base.pt', 'runs/base.jsonl']),
    'upsample': (['train.py', '--stage', 'upsample', *TINY, '--save-every', '5', '--log-every', '1'], ['up_steps=120'],
                 ['runs/upsample-state.pt', 'runs/upsample.pt', 'runs/upsample.jsonl'])}


def begin(folder, command, settings, ranks):
    script, *options = command
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks > 1 else []
    with open(folder / 'stderr', 'wb') as stderr:                       # no pipe: nobody would read the progress bar
        return subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *options, '--set', *settings], cwd=folder,
                                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                                env={**os.environ, 'OMP_NUM_THREADS': '1'})


def finish(folder, command, settings, ranks):
    if begin(folder, command, settings, ranks).wait(1200):
        rh.stop(f'{command}: failed undisturbed: {(folder / "stderr").read_text()[-300:]}')


def content(path):
    """What a file holds, as a string that tells two files apart: tensors by their bytes."""
    if path.suffix != '.pt':
        return path.read_text()
    def flat(x):
        if torch.is_tensor(x):
            return str((tuple(x.shape), x.dtype, hash(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())))
        if isinstance(x, dict):
            return str({k: flat(v) for k, v in x.items()})
        return str([flat(v) for v in x] if isinstance(x, (list, tuple)) else x)
    return flat(torch.load(path, weights_only=True))


def unreadable(folder):
    """Files that readers would look at and could not read, and how many avatars are finished."""
    bad = 0
    for path in [*(folder / 'fits').rglob('[!.]*.pt'), *(folder / 'runs').glob('[!.]*.pt')]:
        try:
            torch.load(path, weights_only=True)
        except Exception:
            bad += 1
    return bad, {p.name: content(p) for p in (folder / 'fits').glob('avatar_*.pt')}


def torture(stage, before, kills, ranks, rng):
    """Kills one stage `kills` times; `before`: a folder with what the stage needs -> a row of the table, folder with its result."""
    command, settings, results = STAGES[stage]
    calm, wild = before.with_name(f'{stage}-calm'), before.with_name(f'{stage}-wild')
    shutil.copytree(before, calm, symlinks=True)
    began = time.monotonic()
    finish(calm, command, settings, ranks)
    row = dict.fromkeys(('kills', 'unreadable', 'lost avatars', 'runs', 'different'), 0)
    row['seconds undisturbed'] = round(time.monotonic() - began, 1)
    while row['kills'] < kills or not row['runs']:
        shutil.rmtree(wild, ignore_errors=True)
        shutil.copytree(before, wild, symlinks=True)
        done, there = False, {}
        while not done:
            process = begin(wild, command, settings, ranks)
            try:
                process.wait(rng.uniform(1.5, 6) + 5 * (ranks > 1) if row['kills'] < kills else None)
                done = process.returncode == 0
                if not done:
                    rh.stop(f'{stage}: {(wild / "stderr").read_text()[-300:]}')
            except subprocess.TimeoutExpired:
                children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
                for pid in (process.pid, *map(int, children)):          # torchrun first, so that it does not see them die
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
                bad, now = unreadable(wild)
                row['kills'] += 1
                row['unreadable'] += bad
                row['lost avatars'] += sum(now.get(k) != v for k, v in there.items())
                there = now
        row['runs'] += 1
        row['different'] += any(content(calm / r) != content(wild / r) for r in results)
    return row, calm


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kills', type=int, default=20, help='of each stage')
    p.add_argument('--ranks', type=int, default=1, help='with several, results/kills<ranks>.json')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=ROOT / 'results')
    args = p.parse_args()
    table, rng = {}, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / 'start'
        before.mkdir()
        subprocess.run([sys.executable, str(ROOT / 'avatars.py'), *TINY, '--count', '60', '--data', str(Path(folder) / 'data')], check=True)
        (before / 'data').symlink_to(Path(folder) / 'data')
        for stage in STAGES:
            table[stage], before = torture(stage, before, args.kills, args.ranks, rng)
            print(f'{stage:10s}' + ', '.join(f'{k} {v}' for k, v in table[stage].items()), flush=True)
    with rh.atomic(args.out / f'kills{args.ranks if args.ranks > 1 else ""}.json') as temporary:
        temporary.write_text(json.dumps(table, indent=1) + '\n')


if __name__ == '__main__':
    main()
