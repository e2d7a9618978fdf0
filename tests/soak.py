"""Does memory grow? fit.py over 200 tiny avatars and train.py over 2,000 tiny steps of each stage, resident memory watched from outside.

    python tests/soak.py                            about 15 minutes on 2 cores; writes results/soak.json

Prints the mean of the first and of the last tenth of each run, its start (10 seconds) left out. Linux.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import rodinhd as rh  # noqa: E402

TINY = ['--preset', 'tiny']


def watch(folder, name, *command):
    """Runs a script in `folder`: resident MiB of its first and last tenth, and their ratio."""
    with open(Path(folder) / 'stderr', 'wb') as stderr:                 # no pipe: nobody would read the progress bar
        process = subprocess.Popen([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], cwd=folder, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=stderr, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    began, sizes = time.monotonic(), []
    while process.poll() is None:
        with open(f'/proc/{process.pid}/statm') as file:
            sizes.append(int((file.read().split() or [0, 0])[1]) * os.sysconf('SC_PAGE_SIZE') / 2 ** 20)
        time.sleep(0.2)
    if process.returncode:
        rh.stop(f'{name}: {(Path(folder) / "stderr").read_text()[-300:]}')
    sizes = sizes[50:] if len(sizes) > 100 else sizes
    tenth = max(len(sizes) // 10, 1)
    first, last = (sum(part) / tenth for part in (sizes[:tenth], sizes[-tenth - 1:-1] or sizes[-1:]))
    row = {'seconds': round(time.monotonic() - began), 'first': round(first, 1), 'last': round(last, 1), 'ratio': round(last / first, 4)}
    print(f'{name:10s}' + ', '.join(f'{k} {v}' for k, v in row.items()), flush=True)
    return row


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--avatars', type=int, default=200)
    p.add_argument('--steps', type=int, default=2000)
    p.add_argument('--out', type=Path, default=ROOT / 'results')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        watch(folder, 'avatars', 'avatars.py', *TINY, '--count', args.avatars)
        watch(folder, 'decoder', 'fit.py', '--decoder', *TINY, '--set', 'inner=20')
        table = {'planes': watch(folder, 'planes', 'fit.py', *TINY, '--set', 'fit_steps=50')}
        for stage, name in (('vae', 'vae'), ('base', 'base'), ('upsample', 'up')):
            table[stage] = watch(folder, stage, 'train.py', '--stage', stage, *TINY, '--save-every', args.steps // 40,
                                 '--set', f'{name}_steps={args.steps}')     # checkpoints and pictures belong to the start, too
    with rh.atomic(args.out / 'soak.json') as temporary:
        temporary.write_text(json.dumps(table, indent=1) + '\n')


if __name__ == '__main__':
    main()
