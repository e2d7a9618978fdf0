"""Stage 1: posed images -> triplanes, and the decoder that they share (section 3.1, Algorithm 1).

    python fit.py --decoder                     the decoder, on some of the avatars (task replay)
    python fit.py --decoder --init weights      the same, beginning with the decoder that ships
    python fit.py                               planes of all avatars under the frozen decoder
    torchrun --standalone --nproc_per_node=8 fit.py ...
                                                an avatar a GPU at a time (machines: --nnodes)
    python fit.py --decoder --data lego --downscale 2 --seconds 200
                                                one NeRF-synthetic scene with a decoder of its own

Reads data/<id>/. Writes fits/decoder.pt, fits/<id>.pt (fp16 planes) and the PSNR of held-out views
(decoder.json, fit.json). The same command goes on after an interruption.
"""
import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import endings  # noqa: F401  # isort: skip  # before PyTorch, whose import takes seconds
import torch
import torch.distributed as dist

import provenance
import rodinhd as rh
import running
import scenes
import together

PATIENCE = 4  # minutes that a rank may keep the others waiting
SETTINGS = (  # that an avatar's planes depend on, under a given decoder
    'resolution', 'base_resolution', 'grid', 'steps', 'fit_steps', 'rays', 'lr_planes',
    'weight_tv', 'weight_l2', 'weight_sparse', 'weight_smooth', 'weight_distortion',
    'weight_empty', 'rescale', 'coarse_to_fine', 'hull_start',
    'silhouette_rays', 'regulariser_every', 'cull', 'planes_final_lr', 'mean_start',
)


# Avatars and decoders -----------------------------------------------------------------------------
def training_views(folder, args):
    return scenes.load_views(folder, 'train', scenes.read_box(folder), args.downscale)


def held_out_views(folder, args, most):
    """At most so many held-out views of an avatar; None where it has none."""
    box = scenes.read_box(folder)
    return scenes.load_views(folder, 'test', box, args.downscale, most)


def load_decoder(folder, config, device):
    """The decoder of a folder, frozen; stops where it has other sizes than config."""
    decoder = running.load_model('decoder', folder, device)
    for name in ('channels', 'decoder_width', 'decoder_layers'):
        theirs = getattr(decoder.config, name)
        ours = getattr(config, name)
        if theirs != ours:
            rh.stop(f'{folder}/decoder.pt: {name} is {theirs}, not {ours}; '
                    f'use --preset {decoder.config.preset}, or train it again')
    return decoder


def avatars_of(data):
    """The folders of avatars; stops where one's planes would be written over the decoder."""
    folders = scenes.list_avatars(data)
    for folder in folders:
        if folder.name.lower() == 'decoder':
            rh.stop(f'{folder}: its planes would be written to decoder.pt, which is the decoder; '
                    'give the folder another name')
    return folders


def write_planes(path, planes, box, config, decoder, scores, settings, source=None, portrait=None):
    """One avatar's file: planes and low-resolution planes in fp16, its box, the PSNR of held-out
    views, and what it was fitted with. source, portrait: of provenance.of_avatar, of_portrait."""
    planes = planes.cpu()
    low = rh.resize_planes(planes, config.base_resolution).half()
    planes = planes.contiguous().half()
    if not planes.isfinite().all():
        rh.stop(f'{path}: not written: its planes have NaN or infinite values')
    centre, half = box
    number = provenance.fingerprint(decoder)
    running.write_checkpoint(path, 'planes', {
        'planes': planes,
        'low': low,
        'centre': centre,
        'half': half,
        'psnr': scores,
        'decoder': number,
        'settings': settings,
        'made_with': {'decoder': number, **(source or {})},
        'sum_of_low': provenance.of_tensor(low),
        **({'portrait': portrait} if portrait else {}),
    })


def finished(path, folder, decoder, settings):
    """The content of an avatar's file, or None if it was not fitted under this decoder.

    Stops if it was fitted with other settings, or to other images.
    """
    if not path.exists():
        return None
    saved = running.read_checkpoint(path, 'planes')
    if saved.get('decoder') != provenance.fingerprint(decoder):
        return None
    if names := running.differing(settings, saved.get('settings', {})):
        rh.stop(f'{path}: was fitted with other settings ({", ".join(names)}); '
                'delete it, or give another folder with --fits')
    if not provenance.same_avatar(folder, saved.get('made_with')):
        rh.stop(f'{path}: was fitted to other images or cameras than those in {folder}; '
                'delete it, or give another folder with --fits')
    return saved


# Measuring ----------------------------------------------------------------------------------------
def held_out_psnr(field, views, config, grid):
    """PSNR of each of the held-out views, a list."""
    height, width = views.images.shape[1:3]
    device = grid.values.device
    scores = []
    for i, (image, c2w, intrinsics) in enumerate(zip(*views[:3])):
        camera = c2w.to(device), intrinsics.to(device)
        shown = rh.render_view(field, *camera, height, width, config.steps, grid).rgb
        scores.append(rh.psnr(*views.known_pixels(i, shown.cpu(), rh.on_white(image))))
    return scores


def visit_psnr(saved, views, decoder, config):
    """held_out_psnr of an avatar as its last visit left it, under the decoder of this moment."""
    device = next(decoder.parameters()).device
    grid = rh.OccupancyGrid(config.grid, config.steps, device)
    grid.values = saved['grid'].to(device)
    grid.refresh()
    return held_out_psnr(rh.PlaneField(saved['planes'].to(device), decoder), views, config, grid)


def summary(args, name, scores):
    """Gathers {avatar: PSNRs} of all ranks; rank 0 prints the means and writes them as JSON."""
    running.wait_for_ranks(name)  # shares of avatars are uneven
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, scores)
    if dist.get_rank() > 0:
        return
    table = {}
    for part in gathered:
        for avatar, values in sorted(part.items()):
            if values:
                table[avatar] = sum(values) / len(values)
    with running.atomic(args.fits / f'{name}.json') as temporary:
        temporary.write_text(json.dumps({'psnr': table}, indent=1))
    for avatar, value in table.items():
        print(f'{avatar:32s} {value:6.2f} dB')
    if table:
        mean = sum(table.values()) / len(table)
        print(f'{"mean held-out PSNR":32s} {mean:6.2f} dB over {len(table)} avatars')


# The decoder --------------------------------------------------------------------------------------
PREPARED_OF = ('grid', 'silhouette_rays', 'hull_start')  # settings that rodinhd.prepare sees


class Tasks:
    """The avatars of stage 1, as rodinhd.replay asks for them: on disk between their visits.

    Each rank visits every world-th avatar. There are two sets of files in turn, 0/ and 1/, of
    which a round of visits reads one and writes the other: a round that is repeated after an
    interruption finds what it read. Images are decoded and made rays of at the first visit, and
    kept in views/; while an avatar is visited, the next one is read.
    """
    def __init__(self, args, folders, sources, decoder, config, begin):
        self.args = args
        self.folders = folders
        self.sources = sources  # {avatar: what its images are}, of provenance.of_avatar
        self.decoder = decoder
        self.config = config
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.state = args.fits / 'decoder-state'
        self.rounds = -(-len(folders) // self.world)
        self.terms = {}  # of the loss, as they were reported last
        self.ahead = running.Ahead()
        self.bar = running.Bar(
            total=config.outer * self.rounds,
            initial=begin,
            disable=self.rank > 0,
            desc='decoder',
        )

    def place(self, n):
        """Number of the avatar of visit n; those from len(folders) on do not exist."""
        return n % self.rounds * self.world + self.rank

    def path(self, place, outer):
        """The file that an avatar's visit number `outer` leaves."""
        return self.state / str(outer % 2) / f'{self.folders[place].name}.pt'

    def load(self, n):
        place = self.place(n)
        outer = n // self.rounds
        if place >= len(self.folders):
            return None
        views = self.ahead.take(place, functools.partial(self.prepared, place))
        following = self.place(n + 1)
        if n + 1 < self.config.outer * self.rounds and following < len(self.folders):
            self.ahead.begin(following, functools.partial(self.prepared, following))
        if outer > 0:
            path = self.path(place, outer - 1)
            saved = running.read_checkpoint(path, 'visit')
            device = next(self.decoder.parameters()).device
            with running.reading(path, f'delete {self.state} to start anew'):
                memory = {
                    kind: {name: x.to(device) for name, x in tensors.items()}
                    for kind, tensors in saved['memory'].items()
                }
                return rh.Task(views, saved['planes'], memory)
        if self.args.init:
            return rh.Task(views, self.decoder.start, None)
        generator = torch.Generator().manual_seed(self.args.seed + place)
        return rh.Task(views, rh.new_planes(self.decoder, self.config, generator), None)

    def prepared(self, place):
        """The views of an avatar as rodinhd.prepare makes them: kept ones, where they are of these
        images and settings."""
        folder = self.folders[place]
        path = self.state / 'views' / f'{folder.name}.pt'
        key = {name: getattr(self.config, name) for name in PREPARED_OF}
        key |= provenance.outline_of(folder) | {'downscale': self.args.downscale}
        if path.exists():
            kept = running.read_checkpoint(path, 'views', whole=False)
            if kept['key'] == key:
                return rh.Prepared(rh.Rays.of(kept['rays']), kept['hull'])

        views = training_views(folder, self.args)
        made = rh.prepare(views, self.config, 'cpu', decoder_learns=True)
        if self.config.outer > 1:
            try:
                content = {'key': key, 'rays': vars(made.rays), 'hull': made.hull}
                running.write_checkpoint(path, 'views', content)
            except rh.Stop as stop:  # a full disk is no reason to end
                rh.note(f'{stop}; images are decoded again at each visit')
        return made

    def keep(self, n, visit):
        running.write_checkpoint(self.path(self.place(n), n // self.rounds), 'visit', {
            'planes': visit.planes.cpu(),
            'memory': visit.memory,
            'grid': visit.grid.values.cpu(),
        })

    def average(self, active):
        running.average_gradients(self.decoder.parameters(), active)

    def report(self, n, done, terms):
        running.sign_of_life()
        self.terms = terms if done == 0 else self.terms | terms
        name = self.folders[self.place(n)].name
        self.bar.set_postfix_str(f'{name} {done:4.0%} rgb loss {terms["rgb"]:.5f}')


def fit_decoder(args, config, rank, world, device):
    """The first stage: rodinhd.replay over a subset of the avatars, resumable after each visit."""
    # A subset that is spread, so that neighbours in name do not crowd it
    folders = avatars_of(args.data)
    count = min(config.fit_avatars, len(folders))
    folders = [folders[i * len(folders) // count] for i in range(count)]
    schedule = config
    if count == 1:
        # It cannot be forgotten: one long visit. And no network will make it in low resolution
        visits = dict(outer=1, inner=config.outer * config.inner)
        robust = any(item.startswith('rescale=') for item in args.set)
        rescale = config.rescale if robust else 0.0
        schedule = dataclasses.replace(config, **visits, rescale=rescale)

    state_path = args.fits / 'decoder-state' / 'state.pt'
    if args.init:
        decoder = load_decoder(args.init, config, device).requires_grad_(True)
    else:
        decoder = running.build('decoder', config).to(device)
    optimizer = torch.optim.Adam(
        decoder.parameters(),
        lr=config.lr_decoder,
        betas=(0.9, 0.99),
        eps=1e-15,
        weight_decay=config.weight_decay,
        fused=True,
    )
    sources = sources_of(folders, state_path, args.fits / 'decoder.pt')
    settings = {
        **vars(config),
        'seed': args.seed,
        'downscale': args.downscale,
        'ranks': world,
        'seconds': args.seconds,
        'init': str(args.init),
        'init_decoder': provenance.fingerprint(decoder) if args.init else None,
        'avatars': [path.name for path in folders],
        'images': [sources[path.name]['data'] for path in folders],
    }
    if already_trained(args, settings, config, device):
        if rank == 0:
            print(f'{args.fits}/decoder.pt is trained with these settings already; '
                  'delete it to train again')
        return

    begin, history = resume(state_path, settings, decoder, optimizer)
    if world > 1:
        for p in decoder.parameters():  # all ranks start from rank 0's weights
            dist.broadcast(p.data, 0)

    tasks = Tasks(args, folders, sources, decoder, schedule, begin)
    visits = rh.replay(
        tasks,
        decoder,
        schedule,
        optimizer=optimizer,
        begin=begin,
        seconds=args.seconds and args.seconds / schedule.outer,
        seed=args.seed,
    )
    for n, visit in visits:
        dist.barrier()
        if rank == 0:
            history.append(record_of(tasks, n, visit))
            running.write_checkpoint(state_path, 'decoder-state', {
                'config': settings,
                'sources': sources,
                'done': n + 1,
                'history': history,
                'decoder': decoder.state_dict(),
                'optimizer': optimizer.state_dict(),
            })
        tasks.bar.update()
    tasks.bar.close()

    if rank == 0:
        write_decoder(tasks, config, history, settings)
    measure_decoder(tasks, config, settings)
    if rank == 0:  # at once: half of the folder would be taken for another run
        done = state_path.parent.with_name('.decoder-state.done')
        shutil.rmtree(done, ignore_errors=True)
        shutil.rmtree(state_path.parent.rename(done), ignore_errors=True)


def sources_of(folders, *before):
    """{avatar: what its images are}; each rank reads those of its share.

    before: checkpoints that may know it already.
    """
    known = {}
    for path in before:
        if path.exists():
            kind = 'decoder-state' if path.stem == 'state' else path.stem
            known = known or running.read_checkpoint(path, kind).get('sources', {})
    share = {}
    for folder in folders[dist.get_rank()::dist.get_world_size()]:
        share[folder.name] = provenance.of_avatar(folder, known.get(folder.name))
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, share)
    return {name: source for part in parts for name, source in part.items()}


def already_trained(args, settings, config, device):
    """Whether fits/decoder.pt is there, finished, and of these settings; stops if of others.

    One that ships, or of an older version, knows its config alone.
    """
    path = args.fits / 'decoder.pt'
    if not path.exists() or (args.fits / 'decoder-state').exists():
        return False
    decoder = running.load_model('decoder', args.fits, device)
    if not decoder.settings:
        return decoder.config == config
    names = running.differing(settings, decoder.settings)
    if names := [name for name in names if name != 'ranks']:
        rh.stop(f'{path}: was trained with other settings ({", ".join(names)}); '
                'delete it to train again, or give another folder with --fits')
    return True


def resume(path, settings, decoder, optimizer):
    """Takes up an interrupted run, if any -> the visit to go on with, and the history so far."""
    if not path.exists():
        return 0, []
    state = running.read_checkpoint(path, 'decoder-state')
    with running.reading(path, f'delete {path.parent} to start anew'):
        if names := running.differing(settings, state['config']):
            rh.stop(f'{path.parent}: an interrupted run with other settings ({", ".join(names)}); '
                    'delete the folder to start anew')
        decoder.load_state_dict(state['decoder'])
        running.check_finite(state['decoder'], 'the decoder')
        running.load_optimizer(optimizer, state['optimizer'])
        return running.counted(state, 'done'), list(state['history'])


def record_of(tasks, n, visit):
    """What decoder.jsonl says of a visit of rank 0."""
    fisher = visit.memory['fisher']
    record = {
        'visit': n,
        'avatar': tasks.folders[tasks.place(n)].name,
        'fisher_max': max(x.max().item() for x in fisher.values()),
        **tasks.terms,
    }
    if tasks.args.watch:
        record['first_avatar_psnr'] = first_avatar_psnr(tasks, n // tasks.rounds)
    return record


def first_avatar_psnr(tasks, outer):
    """PSNR of the first avatar's planes, as they stand, under the decoder of this moment.

    Over the visits that is the curve of forgetting (Fig. 2).
    """
    saved = running.read_checkpoint(tasks.path(0, outer), 'visit')
    folder = tasks.folders[0]
    views = held_out_views(folder, tasks.args, 2)
    if views is None:
        box = scenes.read_box(folder)
        views = scenes.load_views(folder, 'train', box, tasks.args.downscale, 2)
    scores = visit_psnr(saved, views, tasks.decoder, tasks.config)
    return sum(scores) / len(scores)


def write_decoder(tasks, config, history, settings):
    """Writes the finished decoder, with the mean of all planes as `start`, and its log."""
    decoder = tasks.decoder
    device = decoder.start.device
    total = 0
    for place in range(len(tasks.folders)):
        saved = running.read_checkpoint(tasks.path(place, tasks.config.outer - 1), 'visit')
        total = total + rh.resize_planes(saved['planes'], config.resolution // 4)
    decoder.start = total.to(device) / len(tasks.folders)

    visits = tasks.config.outer * tasks.rounds
    path = tasks.args.fits / 'decoder.pt'
    running.write_model(
        path,
        'decoder',
        config,
        decoder.state_dict(),
        visits,
        settings=settings,
        sources=tasks.sources,
        made_with={'images': settings['images'], 'init': settings['init_decoder']},
    )
    with running.atomic(path.with_suffix('.jsonl')) as temporary:
        temporary.write_text(''.join(json.dumps(record) + '\n' for record in history))


def measure_decoder(tasks, config, settings):
    """PSNR of held-out views of what the last visits left, under the finished decoder.

    A lone scene's planes are written, too: it is done.
    """
    args = tasks.args
    scores = {}
    for place in range(tasks.rank, len(tasks.folders), tasks.world):
        folder = tasks.folders[place]
        views = held_out_views(folder, args, args.held_out)
        saved = running.read_checkpoint(tasks.path(place, tasks.config.outer - 1), 'visit')
        scores[folder.name] = []
        if views:
            scores[folder.name] = visit_psnr(saved, views, tasks.decoder, config)
        if len(tasks.folders) == 1:
            path = args.fits / f'{folder.name}.pt'
            box = scenes.read_box(folder)
            write_planes(
                path,
                saved['planes'],
                box,
                config,
                tasks.decoder,
                scores[folder.name],
                settings,
                tasks.sources[folder.name],
                provenance.of_portrait(folder, config.portrait),
            )
    summary(args, 'decoder', scores)


# Planes -------------------------------------------------------------------------------------------
class Avatar(NamedTuple):
    """All that is read of an avatar to fit its planes."""
    source: dict  # of provenance.of_avatar
    box: tuple
    views: rh.Prepared
    held_out: rh.Views | None
    portrait: dict  # of provenance.of_portrait


def read_avatar(folder, args, config):
    """Reads an Avatar. What is fitted is what was there before: images that are replaced meanwhile
    are noticed."""
    source = provenance.of_avatar(folder)
    box = scenes.read_box(folder)
    views = scenes.load_views(folder, 'train', box, args.downscale)
    return Avatar(
        source,
        box,
        rh.prepare(views, config, 'cpu', decoder_learns=False),
        held_out_views(folder, args, args.held_out),
        provenance.of_portrait(folder, config.portrait),
    )


def fit_group(avatars, start, decoder, config, args, report):
    """Fits a list of Avatars -> a rodinhd.Visit of each."""
    views = [avatar.views for avatar in avatars]
    if len(views) > 1:
        return together.fit(
            views, start, decoder, config, config.fit_steps, seed=args.seed, report=report
        )
    pace = rh.by_seconds(args.seconds) if args.seconds else rh.by_steps(config.fit_steps)
    visit = rh.fit_avatar(
        views[0], start, decoder, config, pace, seed=args.seed, report=report
    )
    return [visit]


def fit_planes(args, config, rank, world, device):
    """The second stage: avatars are independent under the frozen decoder.

    Each rank takes every world-th, args.together at a time; those that are finished are skipped,
    and those that cannot be fitted, which are named at the end. While avatars are fitted, the next
    ones are read.
    """
    decoder = load_decoder(args.fits, config, device)
    if config.mean_start and not args.fresh:
        start = decoder.start
    else:
        start = rh.new_planes(decoder, config, torch.Generator().manual_seed(args.seed))
    settings = {name: getattr(config, name) for name in SETTINGS}
    for name in ('seed', 'downscale', 'seconds', 'fresh'):
        settings[name] = getattr(args, name)

    scores = {}
    left = []
    failed = {}  # {name: why}
    ahead = running.Ahead()
    folders = avatars_of(args.data)[:args.count]
    share = folders[rank::world]
    groups = [tuple(share[k:k + args.together]) for k in range(0, len(share), args.together)]
    after = dict(itertools.pairwise(groups))
    bar = running.Bar(total=len(share), disable=rank > 0, desc='avatars')

    def place(folder):
        return args.fits / f'{folder.name}.pt'

    def read(folder):
        """An Avatar, or the Stop that says why it cannot be read."""
        try:
            return read_avatar(folder, args, config)
        except rh.Stop as stop:
            return stop

    def read_all(group):
        return {folder: read(folder) for folder in group if not place(folder).exists()}

    def leave_out(folder, stop):  # one of 46 thousand is not the end of all
        failed[folder.name] = str(stop)
        print(f'{folder.name} is left out: {stop}', file=sys.stderr, flush=True)

    for group in running.claimed(groups, lambda group: place(group[0]), left):
        avatars = ahead.take(group, functools.partial(read_all, group))
        if group in after:
            ahead.begin(after[group], functools.partial(read_all, after[group]))
        for folder in group:
            saved = finished(place(folder), folder, decoder, settings)
            if saved:
                scores[folder.name] = saved['psnr']
                avatars.pop(folder, None)
            elif folder not in avatars:  # its planes are of another decoder
                avatars[folder] = read(folder)
        for folder in [folder for folder, found in avatars.items() if isinstance(found, rh.Stop)]:
            leave_out(folder, avatars.pop(folder))

        visits = []
        if avatars:
            name = ', '.join(folder.name for folder in list(avatars)[:2])
            try:
                said = functools.partial(report, bar, name)
                visits = fit_group(list(avatars.values()), start, decoder, config, args, said)
            except rh.Stop as stop:
                for folder in avatars:
                    leave_out(folder, stop)
        for (folder, avatar), visit in zip(avatars.items(), visits):
            scores[folder.name] = []
            if avatar.held_out:
                field = rh.PlaneField(visit.planes, decoder)
                scores[folder.name] = held_out_psnr(field, avatar.held_out, config, visit.grid)
            write_planes(
                place(folder),
                visit.planes,
                avatar.box,
                config,
                decoder,
                scores[folder.name],
                settings,
                avatar.source,
                avatar.portrait,
            )
        bar.update(len(group))
    bar.close()
    summary(args, 'fit', scores)
    left = [folder for group in left for folder in group]
    say_what_is_left(left, failed, len(folders))


def say_what_is_left(left, failed, count):
    """Ends with status 1 where avatars of any rank were not fitted: `left` to other processes, or
    `failed`, {name: why}."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, ([folder.name for folder in left], failed))
    names = sorted(name for part, _ in gathered for name in part)
    failed = {name: why for _, part in gathered for name, why in part.items()}
    dist.barrier()
    if failed and dist.get_rank() == 0:
        rh.stop(f'{len(failed)} of {count} avatars cannot be fitted: '
                f'{", ".join(sorted(failed)[:10])}{" ..." if len(failed) > 10 else ""}; '
                f'{next(iter(failed.values()))}')
    if names and dist.get_rank() == 0:
        rh.stop(f'{len(names)} of {count} avatars not fitted: other processes still fit '
                f'{", ".join(names[:3])}{" ..." if names[3:] else ""}; '
                'the same command fits what they leave')


def report(bar, name, done, terms):
    running.sign_of_life()
    bar.set_postfix_str(f'{name} {done:4.0%} rgb loss {terms["rgb"]:.5f}')


def main(args):
    config = rh.make_config(args.preset, args.set)
    rank, world, device = running.start(args.device, args.seed, PATIENCE)
    numbers = [args.downscale, args.held_out, args.together]
    if args.count is not None:
        numbers.append(args.count)
    seconds = 1.0 if args.seconds is None else args.seconds
    if min(numbers) < 1 or not 0 < seconds < math.inf:
        rh.stop('--downscale, --held-out, --together, --count and --seconds must be positive')
    if args.together > 1 and (args.decoder or args.seconds):
        rh.stop('--together is for the second stage (without --decoder), and for steps: without '
                '--seconds')
    if args.seconds and world > 1 and args.decoder:
        rh.stop('--seconds with --decoder needs one rank: ranks must agree on the number of steps')

    if rank == 0:
        running.print_departures(config)
    if not args.decoder:
        fit_planes(args, config, rank, world, device)
        dist.barrier()
        return
    path = args.fits / 'decoder.pt'
    claimed = contextlib.nullcontext(True)
    if rank == 0:
        claimed = running.claim(path, *(path.with_suffix(x) for x in ('.json', '.jsonl')))
    with claimed as mine:
        if not mine:
            rh.stop(f'{path}: another process is training it')
        if rank == 0:
            running.remove_all_leftovers(args.fits / 'decoder-state')
        fit_decoder(args, config, rank, world, device)
        dist.barrier()


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--decoder', action='store_true',
                   help='train the shared decoder on a subset, instead of all planes')
    p.add_argument('--init', type=Path, metavar='FOLDER',
                   help='with --decoder: go on from the decoder.pt of another folder (weights)')
    p.add_argument('--preset', default='small', choices=rh.PRESETS)
    p.add_argument('--data', type=Path, default=Path('data'),
                   help='folder of avatars, or one avatar')
    p.add_argument('--fits', type=Path, default=Path('fits'))
    p.add_argument('--count', type=int, help='only the first COUNT avatars (second stage)')
    p.add_argument('--seconds', type=float,
                   help='time to fit an avatar, instead of a number of steps')
    p.add_argument('--together', type=int, default=1, metavar='N',
                   help='fit so many avatars at once (second stage); a GPU takes little longer for '
                        '64 of 128 x 128 texels than for one')
    p.add_argument('--downscale', type=int, default=1, help='average images down by this factor')
    p.add_argument('--held-out', type=int, default=10,
                   help='at most this many held-out views are measured')
    p.add_argument('--fresh', action='store_true',
                   help='planes begin with noise, not with the mean of those that trained the '
                        'decoder')
    p.add_argument('--watch', action='store_true',
                   help='with --decoder: log the PSNR of the first avatar after each visit')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', help='cuda where there is one, else cpu')
    p.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE',
                   help='override settings of the preset')
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
