"""Stage 1: posed images -> triplanes and the decoder that they share (section 3.1, Algorithm 1).

    python fit.py --decoder                                    the decoder, on a subset of the avatars (task replay + IWC)
    python fit.py --decoder --init weights                     the same, beginning with the decoder that ships
    python fit.py                                              planes of all avatars under the frozen decoder
    torchrun --standalone --nproc_per_node=8 fit.py ...        one avatar a GPU at a time; several machines: torchrun --nnodes
    python fit.py --decoder --data lego --downscale 2 --seconds 200     one scene in NeRF-synthetic format with its own decoder

Reads data/<id>/, writes fits/decoder.pt, fits/<id>.pt (fp16 planes), held-out PSNR (decoder.json, fit.json). Goes on if interrupted.
"""
import argparse
import contextlib
import json
import shutil
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import rodinhd as rh

SETTINGS = ('resolution', 'base_resolution', 'grid', 'steps', 'fit_steps', 'rays', 'lr_planes', 'weight_tv', 'weight_l2',
            'weight_empty', 'rescale')                                          # that an avatar's planes depend on

def load(folder, args):
    """Training views, held-out views (or None) and box of an avatar."""
    box = rh.read_box(folder)
    return rh.load_views(folder, 'train', box, args.downscale), rh.load_views(folder, 'test', box, args.downscale, args.held_out), box

def load_decoder(folder, config, device):
    """The decoder of a folder, frozen; stops where it has other sizes than config."""
    decoder = rh.load_model('decoder', folder, device)
    if differing := [k for k in ('channels', 'decoder_width') if getattr(decoder.config, k) != getattr(config, k)]:
        rh.stop(f'{folder}/decoder.pt: has other {" and ".join(differing)}; use --preset {decoder.config.preset}, or train it again')
    return decoder

@torch.no_grad()
def new_planes(decoder, generator):
    """Planes (3, C, R/4, R/4) where the first visit to an avatar starts: 0.1 N(0, 1), around the smallest density feature that the decoder
    takes for a light fog (sigma 1 to 5). Around zero, a trained decoder sees thin air or a wall, and there is no gradient in either."""
    (_, C, r, _), D, device = decoder.start.shape, decoder.density_channels, decoder.start.device
    features = torch.zeros(2 ** 14, C)
    features[:, -D:] = (2 * torch.rand(2 ** 14, D, generator=generator) - 1) * torch.linspace(0, 1, 2 ** 14)[:, None]
    sigma = decoder(features.to(device))[0].cpu()
    best = (features.norm(dim=1) + 10 * ((sigma + 1e-9).log() - 0.8).abs().sub(0.8).clamp(min=0)).argmin()
    return (features[best] + 0.1 * torch.randn(3, r, r, C, generator=generator)).permute(0, 3, 1, 2)

def average_gradients(parameters, active=True):
    """Averages gradients over the ranks that are active; a rank that has nothing to do gives zeros and waits for no one."""
    parameters = list(parameters)
    if dist.get_world_size() == 1:
        return
    flat = torch.cat([(p.grad if p.grad is not None and active else torch.zeros_like(p)).reshape(-1) for p in parameters]
                     + [torch.tensor([float(active)], device=parameters[0].device)])
    dist.all_reduce(flat)
    flat /= flat[-1].clamp(min=1).item()
    for p, g in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p).clone()

def held_out_psnr(field, views, config, grid):
    """PSNR of each held-out view, a list."""
    (height, width), device = views.images.shape[1:3], grid.values.device
    return [rh.psnr(rh.render_view(field, c2w.to(device), k.to(device), height, width, config.steps, grid)[0].cpu(), rh.on_white(image))
            for image, c2w, k in zip(views.images, views.c2w, views.intrinsics)]

def visit_psnr(saved, views, decoder, config):
    """held_out_psnr of an avatar as its last visit left it ('visit' checkpoint), under the decoder of this moment."""
    device = next(decoder.parameters()).device
    grid = rh.OccupancyGrid(config.grid, config.steps, device)
    grid.values = saved['grid'].to(device)
    grid.refresh()
    return held_out_psnr(rh.PlaneField(saved['planes'].to(device), decoder), views, config, grid)

def fingerprint(decoder):
    """A number that tells decoders apart: planes mean nothing under another one."""
    return zlib.crc32(b''.join(p.detach().cpu().numpy().tobytes() for p in decoder.parameters()))

def write_planes(path, planes, box, config, decoder, scores, settings):
    """One avatar's file: planes and low-resolution planes in fp16, box, held-out PSNR, and what it was fitted with."""
    low, planes = rh.resize_planes(planes.cpu(), config.base_resolution), planes.cpu().contiguous()
    rh.write_checkpoint(path, 'planes', {'planes': planes.half(), 'low': low.half(), 'centre': box[0], 'half': box[1],
                                         'psnr': scores, 'decoder': fingerprint(decoder), 'settings': settings})

def finished(path, decoder, settings):
    """The content of an avatar's file if it was fitted under this decoder; stops if that was with other settings."""
    saved = rh.read_checkpoint(path, 'planes') if path.exists() else {}
    if saved.get('decoder') != fingerprint(decoder):
        return None
    if differing := [k for k in settings if settings[k] != saved['settings'].get(k, False)]:
        rh.stop(f'{path}: was fitted with other settings ({", ".join(differing)}); delete it, or give another folder with --fits')
    return saved

def summary(args, name, scores):
    """Gathers {avatar: held-out PSNRs} of all ranks; rank 0 prints the table and writes it as JSON."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, scores)
    if dist.get_rank() == 0:
        table = {k: sum(v) / len(v) for part in gathered for k, v in sorted(part.items()) if v}
        print(*(f'{key:32s} {value:6.2f} dB' for key, value in table.items()), sep='\n')
        if table:
            print(f'{"mean held-out PSNR":32s} {sum(table.values()) / len(table):6.2f} dB over {len(table)} avatars')
        with rh.atomic(args.fits / f'{name}.json') as temporary:
            temporary.write_text(json.dumps({'psnr': table}, indent=1))

def fit_decoder(args, config, rank, world, device):
    """Task replay: outer rounds of short visits, one avatar a rank; the decoder's gradients are averaged over the ranks (Algorithm 1)."""
    folders = rh.list_avatars(args.data)
    count = min(config.fit_avatars, len(folders))
    folders = [folders[i * len(folders) // count] for i in range(count)]        # spread, so that neighbours in name do not crowd it
    outer, inner = (config.outer, config.inner) if count > 1 else (1, config.outer * config.inner)     # one avatar cannot be forgotten
    folder, config_dict = args.fits / 'decoder-state', {**vars(config), 'seed': args.seed, 'downscale': args.downscale, 'ranks': world,
                          'seconds': args.seconds, 'init': str(args.init), 'avatars': [path.name for path in folders]}
    if (args.fits / 'decoder.pt').exists() and not folder.exists() and rh.load_model('decoder', args.fits, device).config == config:
        return print(f'{args.fits}/decoder.pt is trained with these settings already; delete it to train again')
    decoder = load_decoder(args.init, config, device).requires_grad_(True) if args.init else rh.Decoder(config).to(device)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=config.lr_decoder, betas=(0.9, 0.99), eps=1e-15, weight_decay=config.weight_decay)
    begin, history, rounds = 0, [], -(-count // world)
    if (folder / 'state.pt').exists():                                          # an interrupted run: go on after its last round
        state = rh.read_checkpoint(folder / 'state.pt', 'decoder-state')
        if differing := [k for k in config_dict if config_dict[k] != state['config'].get(k)]:
            rh.stop(f'{folder}: an interrupted run with other settings ({", ".join(differing)}); delete the folder to start anew')
        decoder.load_state_dict(state['decoder'])
        optimizer.load_state_dict(state['optimizer'])
        begin, history = state['done'], state['history']
    for p in decoder.parameters():                                              # all ranks start from rank 0's weights
        dist.broadcast(p.data, 0)
    bar = tqdm(total=outer * rounds, initial=begin, disable=rank > 0, desc='decoder')
    for n in range(begin, outer * rounds):
        e, place = n // rounds, n % rounds * world + rank
        def before_step(done, n=n, active=place < count):
            optimizer.param_groups[0]['lr'] = config.lr_decoder * 0.1 ** ((n + done) / (outer * rounds))
            average_gradients(decoder.parameters(), active)
        if place < count:
            terms, name = {}, folders[place].name
            path = folder / str(e % 2) / f'{name}.pt'                           # two sets in turn: a repeated round finds what it read
            saved = rh.read_checkpoint(folder / str((e - 1) % 2) / path.name, 'visit') if e else None
            first = decoder.start if args.init else new_planes(decoder, torch.Generator().manual_seed(args.seed + place))
            memory = saved and config.weight_iwc and {k: {m: v.to(device) for m, v in d.items()} for k, d in saved['memory'].items()}
            planes, grid, memory = rh.fit_avatar(
                load(folders[place], args)[0], saved['planes'] if saved else first, decoder, config, span=(e / outer, (e + 1) / outer),
                memory=memory or None, steps=None if args.seconds else inner, seconds=args.seconds and args.seconds / outer,
                seed=args.seed + n, decoder_optimizer=optimizer, sync=before_step, report=lambda done, t, terms=terms, name=name:
                terms.update(t) or bar.set_postfix_str(f'{name} {done:4.0%} rgb loss {t["rgb"]:.5f}'))
            rh.write_checkpoint(path, 'visit', {'planes': planes.cpu(), 'memory': memory, 'grid': grid.values.cpu()})
        else:                                                                   # more ranks than avatars: keep step with the others
            finite = rh.Finite('decoder')
            for i in range(inner):
                before_step(i / inner)
                if finite(*(p.grad for p in decoder.parameters())):
                    optimizer.step()
            optimizer.zero_grad()
        dist.barrier()
        if rank == 0:
            record = {'visit': n, 'avatar': name, 'fisher_max': max(v.max().item() for v in memory['fisher'].values()), **terms}
            if args.watch:
                record['first_avatar_psnr'] = watch(folders[0], folder / str(e % 2), decoder, config, args)
            history.append(record)
            rh.write_checkpoint(folder / 'state.pt', 'decoder-state', {'config': config_dict, 'done': n + 1, 'history': history,
                                'decoder': decoder.state_dict(), 'optimizer': optimizer.state_dict()})
        bar.update()
    bar.close()
    last = folder / str((outer - 1) % 2)
    if rank == 0:
        visits = (rh.read_checkpoint(last / f'{path.name}.pt', 'visit')['planes'] for path in folders)
        decoder.start = sum(rh.resize_planes(planes, config.resolution // 4) for planes in visits).to(device) / count
        rh.write_model(args.fits / 'decoder.pt', 'decoder', config, decoder.state_dict(), outer * rounds)
        with rh.atomic(args.fits / 'decoder.jsonl') as temporary:
            temporary.write_text(''.join(json.dumps(r) + '\n' for r in history))
    measure_decoder(folders, last, decoder, config, args, config_dict)
    if rank == 0:                                                               # at once: half of it would be taken for another run
        shutil.rmtree(done := folder.with_name('.decoder-state.done'), ignore_errors=True)
        shutil.rmtree(folder.rename(done), ignore_errors=True)

def measure_decoder(folders, last, decoder, config, args, settings):
    """Held-out PSNR of the planes in folder `last` under the finished decoder; a lone scene's are written: it is done."""
    scores = {}
    for path in folders[dist.get_rank()::dist.get_world_size()]:
        _, held_out, box = load(path, args)
        saved = rh.read_checkpoint(last / f'{path.name}.pt', 'visit')
        scores[path.name] = visit_psnr(saved, held_out, decoder, config) if held_out else []
        if len(folders) == 1:
            write_planes(args.fits / f'{path.name}.pt', saved['planes'], box, config, decoder, scores[path.name], settings)
    summary(args, 'decoder', scores)

def watch(path, folder, decoder, config, args):
    """PSNR of the first avatar's planes, as they stand, under the decoder of this moment: the forgetting curve (Fig. 2)."""
    saved, box = rh.read_checkpoint(folder / f'{path.name}.pt', 'visit'), rh.read_box(path)
    views = rh.load_views(path, 'test', box, args.downscale, 2) or rh.load_views(path, 'train', box, args.downscale, 2)
    return sum(scores := visit_psnr(saved, views, decoder, config)) / len(scores)

def fit_planes(args, config, rank, world, device):
    """Second stage: the decoder is frozen, avatars are independent, each rank takes every world-th; finished ones are skipped."""
    decoder = load_decoder(args.fits, config, device)
    scores, folders = {}, rh.list_avatars(args.data)[:args.count]
    start = new_planes(decoder, torch.Generator().manual_seed(args.seed)) if args.fresh else decoder.start
    settings = {**{k: getattr(config, k) for k in SETTINGS}, **{k: getattr(args, k) for k in ('seed', 'downscale', 'seconds', 'fresh')}}
    bar = tqdm(folders[rank::world], disable=rank > 0, desc='avatars')
    for folder in bar:
        path = args.fits / f'{folder.name}.pt'
        with rh.claim(path) as mine:
            if not mine:
                bar.write(f'{folder.name}: left to another process, which is fitting it')
                continue
            if saved := finished(path, decoder, settings):
                scores[folder.name] = saved['psnr']
                continue
            views, held_out, box = load(folder, args)
            planes, grid, _ = rh.fit_avatar(
                views, start, decoder, config, seed=args.seed,
                steps=None if args.seconds else config.fit_steps, seconds=args.seconds,
                report=lambda done, t, name=folder.name: bar.set_postfix_str(f'{name} {done:4.0%} rgb loss {t["rgb"]:.5f}'))
            scores[folder.name] = held_out_psnr(rh.PlaneField(planes, decoder), held_out, config, grid) if held_out else []
            write_planes(path, planes, box, config, decoder, scores[folder.name], settings)
    summary(args, 'fit', scores)

def main(args):
    config = rh.make_config(args.preset, args.set)
    rank, world, device = rh.start(args.device, args.seed)
    if min(args.downscale, args.held_out, 1 if args.count is None else args.count) < 1 or not (args.seconds is None or args.seconds > 0):
        rh.stop('--downscale, --held-out, --count and --seconds must be positive')
    if args.seconds and world > 1 and args.decoder:
        rh.stop('--seconds with --decoder needs one rank: ranks must agree on the number of steps')
    with contextlib.nullcontext(True) if rank or not args.decoder else rh.claim(args.fits / 'decoder.pt') as mine:
        mine or rh.stop(f'{args.fits}/decoder.pt: another process is training it')
        (fit_decoder if args.decoder else fit_planes)(args, config, rank, world, device)
        dist.barrier()

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--decoder', action='store_true', help='train the shared decoder on a subset, instead of all planes')
    p.add_argument('--init', type=Path, metavar='FOLDER', help='with --decoder: go on from the decoder.pt of another folder (weights)')
    p.add_argument('--preset', default='small', choices=rh.PRESETS)
    p.add_argument('--data', type=Path, default=Path('data'), help='folder of avatars, or one avatar')
    p.add_argument('--fits', type=Path, default=Path('fits'))
    p.add_argument('--count', type=int, help='only the first COUNT avatars (second stage)')
    p.add_argument('--seconds', type=float, help='time to fit an avatar, instead of a number of steps')
    p.add_argument('--downscale', type=int, default=1, help='average images down by this factor')
    p.add_argument('--held-out', type=int, default=10, help='at most this many held-out views are measured')
    p.add_argument('--fresh', action='store_true', help='planes begin with noise, not with the mean of those that trained the decoder')
    p.add_argument('--watch', action='store_true', help='with --decoder: log the PSNR of the first avatar after each visit')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', help='cuda where there is one, else cpu')
    p.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help='override settings of the preset')
    return p.parse_args(argv)

if __name__ == '__main__':
    main(parse())
