"""Does memory grow? Runs fit.py over 200 tiny avatars and train.py over 2,000 tiny steps of each
stage, and watches their resident memory from outside.

    python tests/soak.py                            about 15 minutes on 2 cores; results/soak.json

Prints the mean of the first and of the last tenth of each run, its start (10 seconds) left out.
Linux.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import rodinhd as rh  # noqa: E402
import running  # noqa: E402

TINY = ['--preset', 'tiny']
PAUSE = 0.2  # seconds between looks


def resident(pid):
    """Resident memory of a process in MiB; 0 if it has just ended."""
    fields = Path(f'/proc/{pid}/statm').read_text().split()
    pages = int(fields[1]) if fields else 0
    return pages * os.sysconf('SC_PAGE_SIZE') / 2 ** 20


def mean(values):
    return sum(values) / len(values)


def watch(folder, name, *command):
    """Runs a script in `folder` -> resident MiB of its first and last tenth, and their ratio."""
    script, *options = command
    began = time.monotonic()
    with open(Path(folder) / 'stderr', 'wb') as stderr:  # no pipe: nobody would read the bar
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *map(str, options)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        )
    sizes = []
    while process.poll() is None:
        sizes.append(resident(process.pid))
        time.sleep(PAUSE)
    if process.returncode:
        complaint = (Path(folder) / 'stderr').read_text()[-300:]
        rh.stop(f'{name}: {complaint}')

    # Without the start; and without the last look, when the process may have been ending
    start = round(10 / PAUSE)
    if len(sizes) > 2 * start:
        sizes = sizes[start:]
    tenth = max(len(sizes) // 10, 1)
    first = mean(sizes[:tenth])
    last = mean(sizes[-tenth - 1:-1] or sizes[-1:])
    row = {
        'seconds': round(time.monotonic() - began),
        'first': round(first, 1),
        'last': round(last, 1),
        'ratio': round(last / first, 4),
    }
    numbers = ', '.join(f'{what} {number}' for what, number in row.items())
    print(f'{name:10s}{numbers}', flush=True)
    return row


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--avatars', type=int, default=200)
    p.add_argument('--steps', type=int, default=2000)
    p.add_argument('--out', type=Path, default=ROOT / 'results')
    args = p.parse_args()
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        watch(folder, 'avatars', 'avatars.py', *TINY, '--count', args.avatars)
        watch(folder, 'decoder', 'fit.py', '--decoder', *TINY, '--set', 'inner=20')
        table['planes'] = watch(folder, 'planes', 'fit.py', *TINY, '--set', 'fit_steps=50')

        # Checkpoints and pictures belong to the start, too
        often = ['--save-every', args.steps // 40]
        for stage, prefix in (('vae', 'vae'), ('base', 'base'), ('upsample', 'up')):
            command = ['train.py', '--stage', stage, *TINY, *often]
            steps = f'{prefix}_steps={args.steps}'
            table[stage] = watch(folder, stage, *command, '--set', steps)
    running.write_json(args.out / 'soak.json', table)


if __name__ == '__main__':
    main()
