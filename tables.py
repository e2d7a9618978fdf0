"""The papers' tables, run here: each row is one value of one option, beside the paper's figures.

    python tables.py run 4a --data train --test test --seeds 3      results/table_4a.json; goes on after an interruption
    python tables.py run 4b --seeds 3 --once B --jobs 2             one seed of row B, whose effect is large; two commands side by side
    python tables.py run 4b --data train --test test --fits fits    begins with planes, decoder and runs/vae.pt that are there
    python tables.py readme                                         writes the tables of results/ into README.md

4a (replay, weight decay, consolidation), 6 (resolution, channels), 4b (schedule, conditioning), rodin2 (latent, roll-out, 3D-aware
convolution), rodin3 (image loss, condition augmentation). Rows without the paper's figures are what else was tried. --set changes
settings of all rows alike; what rows share is trained once.
"""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import rodinhd as rh

HERE = Path(__file__).parent
NO_REPLAY = ['outer=1', 'inner={triple}', 'weight_iwc=0']         # Table 5: one visit of 15,000 steps, or 30 of 5,000
PLAIN = ['tokens=none', 'up_aware=0']                # an upsample network with neither
GENERATED = ('PSNR', 'SSIM', 'VAE', 'FD-VAE')
TABLES = {                              # title, columns, {row: (settings of each command, the paper's figures)}
    '4a': ('Fitting (RodinHD, Table 4a): planes under the frozen decoder, avatars that it was not trained on', ('PSNR', 'SSIM', 'VAE'), {
        'A each avatar once, half the resolution': (
            {'fit': [*NO_REPLAY, 'resolution={half}']}, {'PSNR': 30.31, 'LPIPS': 0.131, 'SSIM': 0.862}),
        'B each avatar once': ({'fit': NO_REPLAY}, {'PSNR': 30.56, 'LPIPS': 0.129, 'SSIM': 0.863}),
        'C + task replay': ({'fit': ['weight_iwc=0']}, {'PSNR': 30.93, 'LPIPS': 0.106, 'SSIM': 0.890}),
        'D + weight decay': ({'fit': ['weight_iwc=0', 'weight_decay=1e-4']}, {'PSNR': 31.00, 'LPIPS': 0.094, 'SSIM': 0.909}),
        'E + consolidation in its place': ({'fit': []}, {'PSNR': 31.45, 'LPIPS': 0.086, 'SSIM': 0.911}),
        'F as B, as many steps as C to E': ({'fit': ['outer=1', 'inner={total}', 'weight_iwc=0']}, {}),
        'G as D, a hundredth of the decay': ({'fit': ['weight_iwc=0', 'weight_decay=1e-6']}, {})}),
    '6': ('Resolution and channels (RodinHD, Table 6): one avatar with a decoder of its own', ('PSNR',), {
        f'{size} x {channels}': ({'scene': [f'resolution={{{size}}}', f'channels={channels}']}, {'PSNR': paper})
        for size, row in (('quarter', (30.15, 30.71, 31.21)), ('half', (30.24, 31.01, 31.44)), ('full', (30.38, 31.31, 31.60)))
        for channels, paper in zip((4, 8, 16), row)}),
    '4b': ('Generation (RodinHD, Table 4b)', GENERATED, {
        'B linear schedules, global token': (
            {'base': ['tokens=none', 'base_schedule=linear'], 'upsample': ['tokens=none', 'up_schedule=linear']},
            {'SSIM': 0.740, 'LPIPS': 0.324, 'FID': 35.84}),
        'C + stronger schedules': ({'base': ['tokens=none'], 'upsample': ['tokens=none']}, {'SSIM': 0.745, 'LPIPS': 0.318, 'FID': 27.74}),
        'D + single-scale tokens': ({'base': ['tokens=single'], 'upsample': []}, {'SSIM': 0.763, 'LPIPS': 0.301, 'FID': 27.13}),
        'E + multi-scale tokens': ({'base': [], 'upsample': []}, {'SSIM': 0.765, 'LPIPS': 0.299, 'FID': 26.49})}),
    'rodin2': ('Base model (Rodin, Table 2)', GENERATED, {
        'A planes as channels, no portrait': (
            {'base': ['tokens=none', 'roll_out=0', 'condition_drop=1'], 'upsample': PLAIN}, {'FID': 39.2}),
        'B + latent conditioning': ({'base': ['tokens=none', 'roll_out=0'], 'upsample': PLAIN}, {'FID': 37.4}),
        'C + roll-out': ({'base': ['tokens=none', 'base_aware=0'], 'upsample': PLAIN}, {'FID': 28.4}),
        'D + 3D-aware convolution': ({'base': ['tokens=none'], 'upsample': ['tokens=none']}, {'FID': 26.1})}),
    'rodin3': ('Upsample model (Rodin, Table 3)', GENERATED, {
        'A loss on the planes': ({'base': [], 'upsample': ['patches=0', 'up_degrade=0']}, {'FID': 48.5}),
        'B + loss on images': ({'base': [], 'upsample': ['up_degrade=0']}, {'FID': 38.6}),
        'C + condition augmentation': ({'base': [], 'upsample': []}, {'FID': 26.1})}),
}


def call(args, script, *options):
    """One of the project's commands, under torchrun where there are several ranks; its failure ends this one."""
    launcher = [] if args.ranks == 1 else ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={args.ranks}']
    command = [sys.executable, *launcher, str(HERE / script), *map(str, options)]
    print('+', ' '.join(command[1:]), flush=True)
    threads = {'OMP_NUM_THREADS': str(max(os.cpu_count() // args.jobs, 1))} if args.jobs > 1 else {}
    if subprocess.run(command, env={**os.environ, **threads}).returncode:
        rh.stop(f'tables.py: {script} failed; the same command goes on')


def settings_of(settings, args):
    """Options of a row: the preset, --set, and what the row changes, in sizes of the preset."""
    config = rh.make_config(args.preset, args.set)
    sizes = dict(quarter=config.resolution // 4, half=config.resolution // 2, full=config.resolution, triple=3 * config.inner,
                 total=config.inner * config.outer)
    changed = [*args.set, *(s.format(**sizes) for s in settings)]
    return ['--preset', args.preset, *(['--set', *changed] if changed else [])]


def fitted(args, settings, seed):
    """A decoder from --data, then planes of --test under it -> figures of the row, and the commits that made them."""
    commit = commit_of(folder := folder_of(args, 'fit', settings, f'seed{seed}'))
    for data in (['--decoder', '--data', args.data], ['--fresh', '--data', args.test]):        # no row begins with another's mean planes
        call(args, 'fit.py', *data, '--fits', folder, '--seed', seed, '--downscale', args.downscale, '--held-out', 1,
             *settings_of(settings, args))
    return measured(args, folder, 'fitted', seed), [commit]


def scene(args, settings, seed):
    """Avatar number `seed` of --test with a decoder of its own."""
    avatars = rh.list_avatars(args.test)
    avatar = avatars[seed * len(avatars) // args.seeds]
    commit = commit_of(folder := folder_of(args, 'scene', settings, avatar.name))
    call(args, 'fit.py', '--decoder', '--data', avatar, '--fits', folder, '--downscale', args.downscale, *settings_of(settings, args))
    return {'PSNR': json.loads((folder / 'decoder.json').read_text())['psnr'][avatar.name]}, [commit]


def trained(args, stage, settings, seed):
    """A model of train.py, from --fits and runs/vae.pt -> its file, and the commit that made it."""
    commit = commit_of(runs := folder_of(args, stage, settings, f'seed{seed}'))
    link(runs / 'vae.pt', args.runs / 'vae.pt')
    call(args, 'train.py', '--stage', stage, '--data', args.data, '--fits', args.fits, '--runs', runs, '--seed', seed,
         *(['--bf16'] if args.bf16 else []), *settings_of(['components=0', 'aligned=0', *settings], args))     # the papers' networks
    return runs / f'{stage}.pt', commit


def generated(args, models, seed):
    """Both models (futures of `trained`), measured on avatars generated for --test."""
    (base, *commits), (upsample, commit) = (future.result() for future in models)
    folder = args.work / f'both-{base.parent.name}-{upsample.parent.name}'
    commits += [commit, commit_of(folder)]
    for path in (base, upsample, args.runs / 'vae.pt', args.fits / 'decoder.pt'):
        link(folder / path.name, path)
    return measured(args, folder, 'generated', seed), commits


def measured(args, folder, row, seed):
    """Figures of a row of evaluate.py, for avatars of --test and what is in folder; generated by the papers' models alone."""
    path = folder / f'{args.test.resolve().name}.json'
    if not path.exists():
        call(args, 'evaluate.py', '--data', args.test, '--fits', folder, '--runs', folder, '--out', folder, '--name', path.stem,
             '--downscale', args.downscale, '--seed', seed, '--refine', 0, '--rows', row)
    return json.loads(path.read_text())['mean'][row]


def link(path, target):
    if not path.is_symlink():
        path.symlink_to(target.resolve())


def commit_of(folder):
    """The commit of this project that made a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / 'commit'
    if not note.exists():
        found = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=HERE, capture_output=True, text=True).stdout.strip()
        note.write_text(found or 'unknown')
    return note.read_text()


def folder_of(args, stage, settings, last):
    """Where a trained stage lies: named by what is special about it, so that rows which share it find it."""
    return args.work / re.sub(r'[^\w.=-]', '', '_'.join([stage, *settings, last]))


def run(args):
    title, columns, rows = TABLES[args.table]
    path = args.out / f'table_{args.table}.json'
    table = {'title': title, 'command': f'python tables.py {" ".join(map(str, args.words))}', 'commit': '',
             'hardware': torch.cuda.get_device_name() if torch.cuda.is_available() else f'{os.cpu_count()} CPU cores, {platform.machine()}',
             'rows': {row: {'paper': paper, 'ours': {c: [] for c in columns}} for row, (_, paper) in rows.items()}}
    models, cells = {}, []              # {(stage, *settings, seed): future of `trained`}, [(row, future of its figures)]
    pool = ThreadPoolExecutor(args.jobs)
    for seed in range(args.seeds):      # a whole table of one seed first
        now = {row: of_command for row, (of_command, _) in rows.items() if not seed or row.split()[0] not in args.once}
        for stage in ('base', 'upsample'):
            for settings in (of_command[stage] for of_command in now.values() if stage in of_command):
                if (key := (stage, *settings, seed)) not in models:
                    models[key] = pool.submit(trained, args, stage, settings, seed)
        for row, of_command in now.items():
            (kind, settings), *_ = of_command.items()
            figures = (pool.submit({'fit': fitted, 'scene': scene}[kind], args, settings, seed) if kind != 'base' else
                       pool.submit(generated, args, [models[stage, *s, seed] for stage, s in of_command.items()], seed))
            cells.append((row, figures))
    try:
        for row, future in cells:
            figures, commits = future.result()
            table['commit'] = ', '.join(sorted({*table['commit'].split(', '), *commits} - {''}))
            for c in columns:
                table['rows'][row]['ours'][c].append(round(figures[c], 4))
            with rh.atomic(path) as temporary:
                temporary.write_text(json.dumps(table, indent=1) + '\n')
    finally:
        pool.shutdown(cancel_futures=True)
    print(as_markdown(table))


def as_markdown(table):
    """A table of results/ as README.md shows it: the paper's columns, then ours, mean and standard deviation over the seeds."""
    rows = list(table['rows'].values())
    theirs, ours = list(dict.fromkeys(c for row in rows for c in row['paper'])), list(rows[0]['ours'])
    def cell(values):
        digits = 2 if max(map(abs, values), default=0) >= 5 else 3
        spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
        return f'{statistics.mean(values):.{digits}f}{spread}' if values else ''
    head = ' | '.join([f'paper: {c}' for c in theirs] + [f'here: {c}' for c in ours])
    lines = [f'**{table["title"]}**', '', f'| | {head} |', '|' + '---|' * (1 + len(theirs) + len(ours))]
    lines += [f'| {name} | ' + ' | '.join([str(row['paper'].get(c, '')) for c in theirs] + [cell(row['ours'][c]) for c in ours]) + ' |'
              for name, row in table['rows'].items()]
    seeds = [len(row['ours'][ours[0]]) for row in rows]
    note = f'{max(seeds)} seed(s)' + (', one where there is no ±' if 1 in seeds and max(seeds) > 1 else '')
    return '\n'.join([*lines, '', f'`{table["command"]}`, {note}, {table["hardware"]}, commit {table["commit"]}.'])


def readme(args):
    """Puts each table of results/ between its two marks in README.md."""
    text = (HERE / 'README.md').read_text()
    for name in TABLES:
        path, marks = args.out / f'table_{name}.json', (f'<!-- table {name} -->', '<!-- end -->')
        if path.exists() and marks[0] in text:
            before, after = text.split(marks[0])
            text = f'{before}{marks[0]}\n{as_markdown(json.loads(path.read_text()))}\n{marks[1]}{after.split(marks[1], 1)[1]}'
    with rh.atomic(HERE / 'README.md') as temporary:
        temporary.write_text(text)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest='command', required=True)
    r = commands.add_parser('run', help='a table')
    r.add_argument('table', choices=TABLES)
    r.add_argument('--data', type=Path, default=Path('data'), help='avatars to train on')
    r.add_argument('--test', type=Path, default=Path('test'), help='avatars to measure')
    r.add_argument('--fits', type=Path, default=Path('fits'), help='4b, rodin2, rodin3: planes and decoder')
    r.add_argument('--runs', type=Path, default=Path('runs'), help='4b, rodin2, rodin3: where vae.pt is')
    r.add_argument('--work', type=Path, default=Path('tables'), help='for what is trained; another one for other --data, --set ...')
    r.add_argument('--seeds', type=int, default=1)
    r.add_argument('--once', nargs='*', default=[], metavar='ROW', help='letters of rows that get one seed')
    r.add_argument('--jobs', type=int, default=1, help='commands side by side')
    r.add_argument('--ranks', type=int, default=1, help='processes of each command')
    r.add_argument('--downscale', type=int, default=1, help='average the images down by this factor, in fit.py and evaluate.py')
    r.add_argument('--bf16', action='store_true', help='train.py in bfloat16 on a CPU, too')
    r.add_argument('--preset', default='small', choices=rh.PRESETS)
    r.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help='override settings of the preset in all rows')
    for q in (r, commands.add_parser('readme', help='the tables of --out into README.md')):
        q.add_argument('--out', type=Path, default=HERE / 'results')
    args = p.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    return args


if __name__ == '__main__':
    args = parse()
    {'run': run, 'readme': readme}[args.command](args)
