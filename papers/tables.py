"""The papers' tables, run here: each row is one value of one option, beside the paper's figures.

    python -m papers.tables run 4a --data train --test test --seeds 3    results/table_4a.json
    python -m papers.tables run 4b --seeds 3 --once B --jobs 2
    python -m papers.tables run 4b --data train --test test --fits fits
    python -m papers.tables docs             the tables of results/ into docs/results.md

All of them go on after an interruption. The second gives one seed to row B, whose effect is large,
and runs two commands side by side. 4b, rodin2 and rodin3 begin with the planes, the decoder and
runs/vae.pt that are there.

Tables are 4a (replay, weight decay, consolidation), 6 (resolution, channels), 4b (schedule,
conditioning) of RodinHD, regularisers (of fitting), rodin2 (latent, roll-out, 3D-aware convolution)
and rodin3 (image loss, condition augmentation) of Rodin. rodinhd1, rodinhd2, rodinhd3, rodin1,
rodin2z and rodin4 compare with Rodin itself; they need runs/clip.pt, prior.pt and a refiner, too
(docs/measuring.md). Rows without the paper's figures are what else was tried. --set changes
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
from typing import NamedTuple

import endings  # noqa: F401  # isort: skip  # before PyTorch, whose import takes seconds
import torch

import rodinhd as rh
import running
import scenes

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'results.md'


# The tables ---------------------------------------------------------------------------------------
class Row(NamedTuple):
    """Holds what makes a row, and what the paper found.

    The settings are those of fit.py over all avatars ('fit'), of its second stage alone ('planes'),
    of fit.py for one avatar ('scene'), or of both stages of train.py ('base' and 'upsample'). Names
    in braces are sizes, relative to those of the preset or of runs/clip.pt: see `settings_of`.
    """
    settings: dict  # {command: list of name=value}
    paper: dict  # {metric: the paper's figure}
    measure: str = 'generated'  # the row of evaluate.py, in any of its modes, that is measured
    how: tuple = ()  # what evaluate.py is told besides


class Table(NamedTuple):
    title: str
    columns: tuple  # metrics that are measured here
    rows: dict  # {name: Row}


# RodinHD's Table 5: each avatar has one visit of 15,000 steps, or 30 visits of 5,000.
# Rows are of the papers' networks, training and sampling: without our shortcuts, views and mirror
# images, and without what is kept of the upsampled density and the one step of vectors
PAPERS = [
    'components=0', 'aligned=0', 'base_aligned=0', 'base_views=0', 'mirror=0', 'up_density=1',
    'vector_steps=0', 'up_sample_steps=0',
]
# None of our shortcuts is left: the papers' choices alone, which noise prediction is the first of
NOISE = [
    'base_predict=noise', 'identity_start=0', 'positions=0', 'augment=0', 'clip_grad=0',
    'final_lr=1', 'sample_steps=10',
]
NO_REPLAY = ['outer=1', 'inner={triple}', 'weight_iwc=0']

TABLE_4A = Table(
    'Fitting (RodinHD, Table 4a): planes under the frozen decoder, '
    'avatars that it was not trained on',
    ('PSNR', 'SSIM', 'VAE'),
    {
        'A each avatar once, half the resolution': Row(
            {'fit': [*NO_REPLAY, 'resolution={half}']},
            {'PSNR': 30.31, 'LPIPS': 0.131, 'SSIM': 0.862},
        ),
        'B each avatar once': Row(
            {'fit': NO_REPLAY},
            {'PSNR': 30.56, 'LPIPS': 0.129, 'SSIM': 0.863},
        ),
        'C + task replay': Row(
            {'fit': ['weight_iwc=0']},
            {'PSNR': 30.93, 'LPIPS': 0.106, 'SSIM': 0.890},
        ),
        'D + weight decay': Row(
            {'fit': ['weight_iwc=0', 'weight_decay=1e-4']},
            {'PSNR': 31.00, 'LPIPS': 0.094, 'SSIM': 0.909},
        ),
        'E + consolidation in its place': Row(
            {'fit': []},
            {'PSNR': 31.45, 'LPIPS': 0.086, 'SSIM': 0.911},
        ),
        'F as B, as many steps as C to E': Row(
            {'fit': ['outer=1', 'inner={total}', 'weight_iwc=0']},
            {},
        ),
        'G as D, a hundredth of the decay': Row(
            {'fit': ['weight_iwc=0', 'weight_decay=1e-6']},
            {},
        ),
    },
)


def rows_of_table_6():
    """Makes the rows of Table 6: a decoder for a single avatar, at each size of its planes."""
    paper = {
        'quarter': (30.15, 30.71, 31.21),
        'half': (30.24, 31.01, 31.44),
        'full': (30.38, 31.31, 31.60),
    }
    rows = {}
    for size, figures in paper.items():
        for channels, psnr in zip((4, 8, 16), figures):
            settings = [f'resolution={{{size}}}', f'channels={channels}']
            rows[f'{size} x {channels}'] = Row({'scene': settings}, {'PSNR': psnr})
    return rows


TABLE_6 = Table(
    'Resolution and channels (RodinHD, Table 6): one avatar with a decoder of its own',
    ('PSNR',),
    rows_of_table_6(),
)

# Fits as the papers': nothing is known of where avatars are not, and rays are of all pixels.
NO_HULL = ['hull_start=0', 'weight_empty=0', 'silhouette_rays=0']

TABLE_REGULARISERS = Table(
    'Regularisers of fitting (Rodin, appendix B.2, which gives no figures): planes under the '
    'frozen decoder',
    ('PSNR', 'SSIM', 'haze'),
    {
        'A none': Row({'planes': NO_HULL}, {}),
        'B sparse, 1e-3': Row({'planes': [*NO_HULL, 'weight_sparse=1e-3']}, {}),
        'C sparse, 1e-2': Row({'planes': [*NO_HULL, 'weight_sparse=1e-2']}, {}),
        'D smooth, 1e-2': Row({'planes': [*NO_HULL, 'weight_smooth=1e-2']}, {}),
        'E distortion, 1e-1': Row({'planes': [*NO_HULL, 'weight_distortion=1e-1']}, {}),
        'F distortion, 1': Row({'planes': [*NO_HULL, 'weight_distortion=1']}, {}),
        'G the visual hull in their place (ours)': Row({'planes': []}, {}),
    },
)

GENERATED = ('PSNR', 'SSIM', 'VAE', 'FD-VAE')

TABLE_4B = Table(
    'Generation (RodinHD, Table 4b)',
    GENERATED,
    {
        'B linear schedules, global token': Row(
            {
                'base': ['tokens=none', 'base_schedule=linear'],
                'upsample': ['tokens=none', 'up_schedule=linear'],
            },
            {'SSIM': 0.740, 'LPIPS': 0.324, 'FID': 35.84},
        ),
        'C + stronger schedules': Row(
            {'base': ['tokens=none'], 'upsample': ['tokens=none']},
            {'SSIM': 0.745, 'LPIPS': 0.318, 'FID': 27.74},
        ),
        'D + single-scale tokens': Row(
            {'base': ['tokens=single'], 'upsample': []},
            {'SSIM': 0.763, 'LPIPS': 0.301, 'FID': 27.13},
        ),
        'E + multi-scale tokens': Row(
            {'base': [], 'upsample': []},
            {'SSIM': 0.765, 'LPIPS': 0.299, 'FID': 26.49},
        ),
    },
)

# An upsample network with neither attention to the portrait nor 3D-aware convolution.
PLAIN = ['tokens=none', 'up_aware=0']

TABLE_RODIN_2 = Table(
    'Base model (Rodin, Table 2)',
    GENERATED,
    {
        'A planes as channels, no portrait': Row(
            {'base': ['tokens=none', 'roll_out=0', 'condition_drop=1'], 'upsample': PLAIN},
            {'FID': 39.2},
        ),
        'B + latent conditioning': Row(
            {'base': ['tokens=none', 'roll_out=0'], 'upsample': PLAIN},
            {'FID': 37.4},
        ),
        'C + roll-out': Row(
            {'base': ['tokens=none', 'base_aware=0'], 'upsample': PLAIN},
            {'FID': 28.4},
        ),
        'D + 3D-aware convolution': Row(
            {'base': ['tokens=none'], 'upsample': ['tokens=none']},
            {'FID': 26.1},
        ),
    },
)

TABLE_RODIN_3 = Table(
    'Upsample model (Rodin, Table 3)',
    GENERATED,
    {
        'A loss on the planes': Row(
            {'base': [], 'upsample': ['patches=0', 'up_degrade=0']},
            {'FID': 48.5},
        ),
        'B + loss on images': Row(
            {'base': [], 'upsample': ['up_degrade=0']},
            {'FID': 38.6},
        ),
        'C + condition augmentation': Row(
            {'base': [], 'upsample': []},
            {'FID': 26.1},
        ),
    },
)

# Rodin, on planes of the preset's size: CLIP's vector alone, linear schedules.
RODIN = {
    'base': ['tokens=none', 'condition_drop=1', 'latent_width={latent}', 'base_schedule=linear'],
    'upsample': ['tokens=none', 'condition_drop=1', 'up_schedule=linear'],
}
RODINHD = {'base': [], 'upsample': []}

TABLE_RODINHD_1 = Table(
    'Generation beside Rodin (RodinHD, Tables 1 and 7); Rodin* is with its refiner',
    GENERATED,
    {
        'A Rodin': Row(
            RODIN,
            {'FID': 33.20, 'LPIPS': 0.323, 'SSIM': 0.758, 'PSNR': 18.28},
            'latent',
        ),
        'B Rodin*': Row(RODIN, {'FID': 20.51, 'PSNR': 17.31}, 'latent, refined', ('--refiner',)),
        'C RodinHD': Row(
            RODINHD, {'FID': 26.49, 'LPIPS': 0.299, 'SSIM': 0.765, 'PSNR': 20.33},
        ),
        'D as C, by noise prediction, without any shortcut': Row(
            {'base': NOISE, 'upsample': NOISE[1:]}, {},
        ),
    },
)

TABLE_RODINHD_2 = Table(
    'Avatars of nobody (RodinHD, Table 2): Rodin by its prior of vectors',
    ('FD-VAE', 'sample_to_sample'),
    {
        'A Rodin': Row(RODIN, {'FID': 45.70}, how=('--unconditional', 64)),
        'B Rodin, the null condition': Row(RODIN, {}, how=('--unconditional', 64, '--null')),
        'C RodinHD': Row(RODINHD, {'FID': 32.62}, how=('--unconditional', 64)),
    },
)

TABLE_RODINHD_3 = Table(
    'A surface fitted to renders of generated avatars (RodinHD, Table 3)',
    ('PSNR', 'SSIM', 'VAE'),
    {
        'A refined, as Rodin* is': Row(
            RODINHD,
            {'PSNR': 31.73, 'LPIPS': 0.051, 'SSIM': 0.973},
            'refined',
            ('--consistency', 6, '--refiner'),
        ),
        'B rendered': Row(
            RODINHD,
            {'PSNR': 35.46, 'LPIPS': 0.041, 'SSIM': 0.975},
            'surface',
            ('--consistency', 6, '--refiner'),
        ),
    },
)

TABLE_RODIN_1 = Table(
    'The auto-encoder (Rodin, Table 1, which is of avatars of nobody; here they are of portraits)',
    GENERATED,
    {
        'A auto-encoder': Row(
            {
                'base': ['tokens=none', 'autoencoder=1', 'base_predict=x_start'],
                'upsample': RODIN['upsample'],
            },
            {'FID': 67.4},
        ),
        'B Rodin': Row(RODIN, {'FID': 26.1}, 'latent'),
    },
)

# Table 2 of Rodin again, with CLIP's vector in place of what is pooled of the VAE's latent.
VECTOR = ['tokens=none', 'condition_drop=1', 'latent_width={latent}']
ALONE = [*PLAIN, 'condition_drop=1']

TABLE_RODIN_2Z = Table(
    "Base model, of CLIP's vector (Rodin, Table 2)",
    GENERATED,
    {
        'A planes as channels, no portrait': Row(
            {'base': ['tokens=none', 'condition_drop=1', 'roll_out=0'], 'upsample': ALONE},
            {'FID': 39.2},
        ),
        'B + latent conditioning': Row(
            {'base': [*VECTOR, 'roll_out=0'], 'upsample': ALONE}, {'FID': 37.4}, 'latent',
        ),
        'C + roll-out': Row(
            {'base': [*VECTOR, 'base_aware=0'], 'upsample': ALONE}, {'FID': 28.4}, 'latent',
        ),
        'D + 3D-aware convolution': Row(
            {'base': VECTOR, 'upsample': ['tokens=none', 'condition_drop=1']},
            {'FID': 26.1},
            'latent',
        ),
    },
)


def rows_of_rodin_4():
    """Makes the rows of Rodin's Table 4: one pair of models, with more and more guidance."""
    paper = {
        '1': (24.06, 0.795, 0.128),
        '1.2': (24.21, 0.794, 0.121),
        '1.5': (24.07, 0.792, 0.133),
        '3': (24.05, 0.782, 0.141),
        '6': (24.15, 0.775, 0.146),
    }
    rows = {}
    for letter, (guidance, figures) in zip('ABCDE', paper.items()):
        name = f'{letter} guidance {guidance}' if guidance != '1' else 'A no guidance'
        found = dict(zip(('PSNR', 'SSIM', 'LPIPS'), figures))
        rows[name] = Row(RODIN, found, 'latent', ('--guidance', guidance))
    return rows


TABLE_RODIN_4 = Table('Guidance (Rodin, Table 4)', GENERATED, rows_of_rodin_4())

TABLES = {
    '4a': TABLE_4A,
    '6': TABLE_6,
    'regularisers': TABLE_REGULARISERS,
    '4b': TABLE_4B,
    'rodin2': TABLE_RODIN_2,
    'rodin3': TABLE_RODIN_3,
    'rodinhd1': TABLE_RODINHD_1,
    'rodinhd2': TABLE_RODINHD_2,
    'rodinhd3': TABLE_RODINHD_3,
    'rodin1': TABLE_RODIN_1,
    'rodin2z': TABLE_RODIN_2Z,
    'rodin4': TABLE_RODIN_4,
}


# The commands of a row ----------------------------------------------------------------------------
def call(args, script, *options):
    """Runs one of the project's commands; if it fails, this one ends.

    It runs under torchrun where there are several ranks, and shares the cores with other jobs.
    """
    launcher = []
    if args.ranks > 1:
        launcher = ['-m', 'torch.distributed.run', '--standalone']
        launcher += [f'--nproc_per_node={args.ranks}']
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, options)]
    print('+', ' '.join(command[1:]), flush=True)

    environment = dict(os.environ)
    if args.jobs > 1:
        environment['OMP_NUM_THREADS'] = str(max(os.cpu_count() // args.jobs, 1))
    if subprocess.run(command, env=environment).returncode:
        rh.stop(f'tables.py: {script} failed; the same command goes on')


def settings_of(settings, args):
    """Lists a row's options: the preset, --set, and what the row changes, with sizes filled in."""
    config = rh.make_config(args.preset, args.set)
    sizes = {
        'quarter': config.resolution // 4,
        'half': config.resolution // 2,
        'full': config.resolution,
        'triple': 3 * config.inner,
        'total': config.inner * config.outer,
        'latent': width_of_clip(args) or config.latent_width or 96,
    }
    changed = [*args.set, *(setting.format(**sizes) for setting in settings)]
    if not changed:
        return ['--preset', args.preset]
    return ['--preset', args.preset, '--set', *changed]


def width_of_clip(args):
    """Returns how many values the vectors of --runs/clip.pt have; 0 where there is none."""
    if not (args.runs / 'clip.pt').exists():
        return 0
    return running.load_model('clip', args.runs, 'cpu').config.latent_width


def folder_of(args, stage, settings, last):
    """Names the folder of a trained stage by what is special about it, so that rows share it."""
    return args.work / re.sub(r'[^\w.=-]', '', '_'.join([stage, *settings, last]))


def commit_of(folder):
    """Returns the commit of this project that made a folder, and makes it if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / 'commit'
    if not note.exists():
        ask = ['git', 'rev-parse', '--short', 'HEAD']
        answer = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
        note.write_text(answer.stdout.strip() or 'unknown')
    return note.read_text()


def link(path, target):
    if not path.is_symlink():
        path.symlink_to(target.resolve())


class Cell(NamedTuple):
    """Holds what one seed of a row gave."""
    figures: dict  # {metric: value}
    commits: list  # of what it was made with


class Trained(NamedTuple):
    path: Path  # of the model
    commit: str


def fitted(args, settings, seed):
    """Trains a decoder on --data, then fits planes of --test under it -> Cell."""
    folder = folder_of(args, 'fit', settings, f'seed{seed}')
    commit = commit_of(folder)
    options = ['--fits', folder, '--seed', seed, '--downscale', args.downscale, '--held-out', 1]
    options += settings_of(settings, args)
    call(args, 'fit.py', '--decoder', '--data', args.data, *options)
    # fresh: no row begins with the mean planes of another
    call(args, 'fit.py', '--fresh', '--data', args.test, *options)
    return Cell(measured(args, folder, 'fitted', seed), [commit])


def fitted_under(args, settings, seed):
    """Fits planes of --test under the decoder of --fits -> Cell."""
    folder = folder_of(args, 'planes', settings, f'seed{seed}')
    commit = commit_of(folder)
    link(folder / 'decoder.pt', args.fits / 'decoder.pt')
    options = ['--fits', folder, '--seed', seed, '--downscale', args.downscale, '--held-out', 1]
    call(args, 'fit.py', '--data', args.test, *options, *settings_of(settings, args))
    return Cell(measured(args, folder, 'fitted', seed), [commit])


def scene(args, settings, seed):
    """Trains a decoder for avatar number `seed` of --test alone -> Cell."""
    avatars = scenes.list_avatars(args.test)
    avatar = avatars[seed * len(avatars) // args.seeds]
    folder = folder_of(args, 'scene', settings, avatar.name)
    commit = commit_of(folder)
    options = ['--data', avatar, '--fits', folder, '--downscale', args.downscale]
    call(args, 'fit.py', '--decoder', *options, *settings_of(settings, args))

    found = json.loads((folder / 'decoder.json').read_text())
    return Cell({'PSNR': found['psnr'][avatar.name]}, [commit])


ENCODERS = ('vae.pt', 'clip.pt', 'clip', 'prior.pt', 'refiner.pt')


def link_encoders(folder, args):
    """Puts into a folder what all rows share of --runs, as far as it is there."""
    for name in ENCODERS:
        if name == 'vae.pt' or (args.runs / name).exists():
            link(folder / name, args.runs / name)


def trained(args, stage, settings, seed):
    """Trains a stage of train.py on --fits and runs/vae.pt -> Trained."""
    runs = folder_of(args, stage, settings, f'seed{seed}')
    commit = commit_of(runs)
    link_encoders(runs, args)
    options = ['--data', args.data, '--fits', args.fits, '--runs', runs, '--seed', seed]
    if args.bf16:
        options.append('--bf16')
    papers = [*PAPERS, *settings]
    call(args, 'train.py', '--stage', stage, *options, *settings_of(papers, args))
    return Trained(runs / f'{stage}.pt', commit)


def generated(args, row, models, seed):
    """Measures a Row of two models, futures of base and upsample, for avatars of --test -> Cell."""
    base, upsample = (future.result() for future in models)
    folder = args.work / f'both-{base.path.parent.name}-{upsample.path.parent.name}'
    commits = [base.commit, upsample.commit, commit_of(folder)]
    link_encoders(folder, args)
    for path in (base.path, upsample.path, args.fits / 'decoder.pt'):
        link(folder / path.name, path)
    if '--unconditional' in row.how:  # the training avatars' planes are asked for, too
        for path in args.fits.glob('*.pt'):
            link(folder / path.name, path)
    return Cell(measured(args, folder, row.measure, seed, row.how), commits)


def measured(args, folder, row, seed, how=()):
    """Measures a row of evaluate.py, which is told `how`, for avatars of --test and what lies in
    folder.

    Avatars are as the papers' models generate them, not fitted to the portrait.
    """
    name = '_'.join([args.test.resolve().name, *(str(x).strip('-') for x in how)])
    path = folder / f'{name}.json'
    unconditional = '--unconditional' in how
    if unconditional:
        how = [*how, '--train', args.data]
    elif '--consistency' in how:
        how = [*how, '--refine', 0]
    else:
        how = [*how, '--refine', 0, '--rows', row.partition(',')[0]]
    if not path.exists():
        options = ['--data', args.test, '--fits', folder, '--runs', folder, '--out', folder]
        options += ['--name', name, '--downscale', args.downscale, '--seed', seed]
        call(args, 'evaluate.py', *options, *how)
    found = json.loads(path.read_text())
    return found if unconditional else found['mean'][row]


# A whole table ------------------------------------------------------------------------------------
def queue_models(args, rows, seed, pool):
    """Queues the training of all models of some rows -> {(stage, *settings): future of Trained}."""
    models = {}
    for stage in ('base', 'upsample'):
        for row in rows.values():
            if stage not in row.settings:
                continue
            settings = row.settings[stage]
            key = stage, *settings
            if key not in models:
                models[key] = pool.submit(trained, args, stage, settings, seed)
    return models


def queue_cell(args, row, models, seed, pool):
    """Queues what makes a row, of `models` where it is generated -> future of its Cell."""
    if 'fit' in row.settings:
        return pool.submit(fitted, args, row.settings['fit'], seed)
    if 'planes' in row.settings:
        return pool.submit(fitted_under, args, row.settings['planes'], seed)
    if 'scene' in row.settings:
        return pool.submit(scene, args, row.settings['scene'], seed)
    both = [models[stage, *settings] for stage, settings in row.settings.items()]
    return pool.submit(generated, args, row, both, seed)


def queue_table(args, rows, pool):
    """Queues all rows and seeds, a whole table of one seed first -> [(name, future of Cell)]."""
    cells = []
    for seed in range(args.seeds):
        chosen = {}
        for name, row in rows.items():
            letter = name.split()[0]
            if seed == 0 or letter not in args.once:
                chosen[name] = row
        models = queue_models(args, chosen, seed, pool)
        for name, row in chosen.items():
            cells.append((name, queue_cell(args, row, models, seed, pool)))
    return cells


def hardware():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'{os.cpu_count()} CPU cores, {platform.machine()}'


def empty_result(args, table):
    """Makes what is written of a table before anything is measured."""
    rows = {}
    for name, row in table.rows.items():
        rows[name] = {'paper': row.paper, 'ours': {column: [] for column in table.columns}}
    words = ' '.join(map(str, args.words))
    return {
        'title': table.title,
        'command': f'python -m papers.tables {words}',
        'commit': '',
        'hardware': hardware(),
        'rows': rows,
    }


def add_cell(result, name, cell):
    """Adds a seed of a row to what is written of the table."""
    commits = {*result['commit'].split(', '), *cell.commits} - {''}
    result['commit'] = ', '.join(sorted(commits))
    for column, values in result['rows'][name]['ours'].items():
        values.append(round(cell.figures[column], 4))


def run(args):
    table = TABLES[args.table]
    result = empty_result(args, table)
    pool = ThreadPoolExecutor(args.jobs)
    cells = queue_table(args, table.rows, pool)
    try:
        for name, future in cells:
            add_cell(result, name, future.result())
            running.write_json(args.out / f'table_{args.table}.json', result)
    finally:
        pool.shutdown(cancel_futures=True)
    print(as_markdown(result))


# Tables as text -----------------------------------------------------------------------------------
def cell_text(values):
    """Writes the mean of the seeds' values and, if there are several, its standard deviation."""
    if not values:
        return ''
    digits = 2 if max(map(abs, values)) >= 5 else 3
    text = f'{statistics.mean(values):.{digits}f}'
    if len(values) > 1:
        text += f' ± {statistics.stdev(values):.{digits}f}'
    return text


def note_of(table, seeds):
    """Writes how a table was made; seeds: how many each row has."""
    note = f'{max(seeds)} seed(s)'
    if 1 in seeds and max(seeds) > 1:
        note += ', one where there is no ±'
    return f'`{table["command"]}`, {note}, {table["hardware"]}, commit {table["commit"]}.'


def as_markdown(table):
    """Writes a table of results/ as docs/results.md shows it: the paper's columns, then ours."""
    rows = table['rows']
    theirs = {}
    for row in rows.values():
        theirs.update(row['paper'])
    ours = list(next(iter(rows.values()))['ours'])

    head = [f'paper: {column}' for column in theirs] + [f'here: {column}' for column in ours]
    lines = [f'**{table["title"]}**', '']
    lines.append('| | ' + ' | '.join(head) + ' |')
    lines.append('|' + '---|' * (1 + len(head)))
    for name, row in rows.items():
        cells = [str(row['paper'].get(column, '')) for column in theirs]
        cells += [cell_text(row['ours'][column]) for column in ours]
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')

    seeds = [len(row['ours'][ours[0]]) for row in rows.values()]
    return '\n'.join([*lines, '', note_of(table, seeds)])


def docs(args):
    """Puts each table of --out between its two marks in docs/results.md."""
    text = PAGE.read_text()
    for name in TABLES:
        path = args.out / f'table_{name}.json'
        begin, end = f'<!-- table {name} -->', '<!-- end -->'
        if path.exists() and begin in text:
            before, _, rest = text.partition(begin)
            after = rest[rest.index(end):]
            table = as_markdown(json.loads(path.read_text()))
            text = f'{before}{begin}\n{table}\n{after}'
    with running.atomic(PAGE) as temporary:
        temporary.write_text(text)


# The command --------------------------------------------------------------------------------------
def main(args):
    if args.command == 'run':
        run(args)
    else:
        docs(args)


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest='command', required=True)
    r = commands.add_parser('run', help='a table')
    d = commands.add_parser('docs', help='the tables of --out into docs/results.md')
    for q in (r, d):
        q.add_argument('--out', type=Path, default=Path(__file__).parents[1] / 'results')

    add = r.add_argument
    add('table', choices=TABLES)
    add('--data', type=Path, default=Path('data'), help='avatars to train on')
    add('--test', type=Path, default=Path('test'), help='avatars to measure')
    add('--fits', type=Path, default=Path('fits'), help='4b, rodin2, rodin3: planes and decoder')
    add('--runs', type=Path, default=Path('runs'), help='4b, rodin2, rodin3: where vae.pt is')
    work = 'for what is trained; another one for other --data, --set ...'
    add('--work', type=Path, default=Path('tables'), help=work)
    add('--seeds', type=int, default=1)
    once = 'letters of rows that get one seed'
    add('--once', nargs='*', default=[], metavar='ROW', help=once)
    add('--jobs', type=int, default=1, help='commands side by side')
    add('--ranks', type=int, default=1, help='processes of each command')
    downscale = 'average the images down by this factor, in fit.py and evaluate.py'
    add('--downscale', type=int, default=1, help=downscale)
    add('--bf16', action='store_true', help='train.py in bfloat16 on a CPU, too')
    add('--preset', default='small', choices=rh.PRESETS)
    changes = 'override settings of the preset in all rows'
    add('--set', nargs='*', default=[], metavar='NAME=VALUE', help=changes)

    args = p.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    return args


if __name__ == '__main__':
    main(parse())
