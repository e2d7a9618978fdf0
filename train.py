"""Stage 2: the portrait's VAE and the two diffusion models (section 3.2, supplement A).

    python train.py --stage vae                 then base, then upsample; minutes with --preset tiny
    torchrun --standalone --nproc_per_node=8 train.py --stage base --preset paper
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
             train.py --stage base --preset paper
    python train.py --stage base --init weights --set base_lr=1e-4
                                                the model that ships, trained on with other avatars

`paper` conditions on SDXL's VAE: `--stage vae --vae sdxl_vae.safetensors` takes published weights
instead of training. `--stage lora` tunes Stable Diffusion on portraits with captions in --data (see
words.py) and writes runs/lora.safetensors.

Reads data/ and fits/. Writes runs/<stage>.pt (EMA weights, fp16), <stage>-state.pt (the same
command goes on after an interruption), <stage>.jsonl (a line a logged step: loss, learning rate,
norm of the gradient, seconds a step, and at each save the loss on fixed noise) and a picture at
each save, <stage>-<steps>.png. `python -m papers.figures curves` draws the logs. A run that was
interrupted gives the same bits as one that was not, and any number of ranks does the same
mathematics (see batches.py).
"""
import argparse
import contextlib
import functools
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import endings  # noqa: F401  # isort: skip  # before PyTorch, whose import takes seconds
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import batches
import frozen
import latents
import provenance
import refiner
import rodinhd as rh
import running
import scenes
import together
import watching
import words

STAGES = ('vae', 'base', 'upsample', 'clip', 'prior', 'text', 'refiner', 'lora')
VIEW_STEPS = 64  # of a ray through low-resolution planes, beside views of so many ...
VIEW_SIDE = 32  # ... pixels a side


class Stage(NamedTuple):
    """What is special about a stage; `train` is the same for all."""
    data: torch.utils.data.Dataset  # batches.Draws
    draw: Callable  # draw(batch, dice) -> dict: what the loss needs, on the device; see batches
    network: nn.Module
    loss: Callable  # loss(network, batch) -> dict of terms, means over samples; the loss is the sum
    picture: Callable  # picture(network) -> images (6, 3, H, W) in [-1, 1]: portraits, results


# Losses -------------------------------------------------------------------------------------------
def vae_loss(network, batch):
    """Reconstruction and its edges, and a little of the Kullback-Leibler divergence."""
    images = batch['image']
    out, mean, logvar = network(images, batch['noise'])
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    edges = sum(F.l1_loss(torch.diff(out, dim=d), torch.diff(images, dim=d)) for d in (2, 3))
    # without a thumbnail in it, thousands of steps pass before the latent has colours
    thumb = F.l1_loss(mean[:, :3], F.avg_pool2d(images, 8))
    return {'l1': F.l1_loss(out, images), 'edges': edges, 'thumb': thumb, 'kl': 1e-4 * kl}


def perceptual(config, vae, device):
    """The distance of two batches of patches (B, 3, p, p) in [-1, 1], as a function (Eq. 6).

    It is a sum over layers of the mean squared difference of features: of VGG by lpips, or of our
    own VAE, relative to their variance.
    """
    if config.perceptual == 'vae':
        def distance(a, b):
            pairs = zip(vae.features(a), vae.features(b))
            return sum(F.mse_loss(x, y) / y.var() for x, y in pairs)
        return distance

    import lpips
    try:
        network = lpips.LPIPS(net='vgg', lpips=False, verbose=False)
    except Exception as error:  # a download that fails raises many types
        rh.stop('the VGG weights of --set perceptual=vgg could not be had '
                f'({type(error).__name__}); put vgg16-397923af.pth into '
                f'{torch.hub.get_dir()}/checkpoints, or use --set perceptual=vae')
    network = network.to(device).requires_grad_(False)
    return lambda a, b: network(a, b).mean()


@torch.autocast('cpu', enabled=False)
@torch.autocast('cuda', enabled=False)
def image_loss(x_start, patches, config, decoder, distance):
    """Image-level supervision (Eq. 6) of predicted planes x_start (B, 3, C, R, R), the first of
    which have a patch each.

    patches: of batches.random_patch. Returns {'pixel', 'perceptual'}. A sample without a patch
    counts as 0, and one with it as much more: the mean over the samples of a whole batch is that
    over its patches, in whatever parts they come.
    """
    device = x_start.device
    count = len(x_start) * min(config.patches, config.up_batch) / config.up_batch
    pixel = torch.zeros((), device=device)
    feature = torch.zeros((), device=device)
    for planes, patch in zip(x_start, patches):
        rays_o = patch['rays_o'].reshape(-1, 3)
        rays_d = patch['rays_d'].reshape(-1, 3)
        truth = patch['rgb']  # (3, p, p)

        field = rh.PlaneField(planes.clamp(-1, 1).float(), decoder)
        grid = None  # none is cheaper for small patches and planes
        if config.patch_grid_updates:
            grid = rh.grid_by_updates(field, config, device, config.patch_grid_updates)
        rgb = rh.render(field, rays_o, rays_d, config.steps, grid).rgb
        ours = rgb.T.reshape(truth.shape)
        truth = torch.where(patch['known'], truth, ours.detach())

        ours = ours[None] * 2 - 1
        truth = truth[None] * 2 - 1
        pixel = pixel + F.mse_loss(ours, truth) / 4 / count
        feature = feature + 0.5 * distance(ours, truth) / count
    return {'pixel': pixel, 'perceptual': feature}


@torch.autocast('cpu', enabled=False)
@torch.autocast('cuda', enabled=False)
def view_loss(x_start, rays, config, decoder):
    """The mean squared error of views, rendered of predicted low-resolution planes (B, 3, C, r, r),
    the first of which have a view each.

    rays: of batches.whole_view, joined, with a ground for each, lest outlines count in some colours
    alone, and an offset of its samples; None where there are no views. Returns {'view'}, counted as
    image_loss counts.
    """
    if rays is None:
        return {'view': torch.zeros((), device=x_start.device)}
    count = len(x_start) * min(config.base_views, config.base_batch) / config.base_batch
    ground = rays['ground']
    fields = together.Fields(x_start.clamp(-1, 1).float(), decoder)
    rendered = together.render(
        fields, None, rays['owner'], rays['rays_o'], rays['rays_d'],
        VIEW_STEPS, rays['offset'], ground,
    )
    truth = rays['rgb'] + (1 - rays['alpha']) * ground
    error = (rendered.rgb - truth).square().mean(1)
    return {'view': (rays['share'] * error).sum() / count}


# Stages -------------------------------------------------------------------------------------------
def six_of(items):
    """Six items, evenly spread, for pictures."""
    return [items[i * len(items) // 6] for i in range(6)]


def portraits_of(shown, device):
    """The portraits (B, 3, P, P) of items in floats, on white, in [-1, 1]."""
    images = [scenes.portrait_on_white(x['portrait'], x['alpha']) for x in shown]
    return torch.stack(images).to(device)


def portraits_in_training(batch, config, dice):
    """The portraits (B, 3, P, P) of a batch as training shows them: like photographs, or as they
    are."""
    if config.augment:
        return batches.photo(batch['portrait'], batch['alpha'], dice)
    return scenes.portrait_on_white(batch['portrait'], batch['alpha'])


def prepare_vae(args, config, device):
    items = batches.Images(args.data, config)
    network = running.build('vae', config)
    # little noise at first, or the decoder learns to ignore the latent
    network.quant_conv.bias.data[config.vae_latent:] -= 6
    crop = min(config.portrait, 96)

    def draw(batch, dice):
        images = portraits_in_training(batch, config, dice)
        rows, columns = (
            dice.below(config.portrait - crop + 1)[:, None] + torch.arange(crop, device=device)
            for _ in range(2)
        )
        return {
            'image': batches.picked(images, rows, columns),
            'noise': dice.normal(config.vae_latent, crop // 8, crop // 8),
        }

    def picture(network):
        shown = [batches.in_floats(item) for item in six_of(items)]
        images = portraits_of(shown, device)
        return torch.cat([images, network.decode(network.encode(images)[0])], dim=2)

    return Stage(batches.Draws(items, args.seed), draw, network, vae_loss, picture)


def check_preset(path, model, names, config):
    """Stops unless the model of a path has the settings of these names that config has."""
    for name in names:
        theirs = getattr(model.config, name)
        if theirs != getattr(config, name):
            rh.stop(f'{path}: is of another preset than {config.preset}: '
                    f'{name} is {theirs}, not {getattr(config, name)}')


def prepare_diffusion(args, config, device):
    base = args.stage == 'base'
    items = batches.Planes(args.fits, args.data, config, low=base)
    vae = running.load_model('vae', args.runs, device)
    decoder = running.load_model('decoder', args.fits, device)
    items.check_decoder(decoder)
    if items.missing and dist.is_initialized() and dist.get_rank() == 0:
        total = len(items) + items.missing
        print(f'planes of {len(items)} of {total} avatars in {args.data}: '
              'python fit.py fits the others')
    items.made_with = {'decoder': decoder.fingerprint, 'vae': vae.fingerprint}
    clip = None
    if base and config.latent_width:
        clip = latents.clip_of(args, config, device)
        items.made_with['clip'] = clip.fingerprint
        vae.vector = clip.encode_images
    check_preset(args.runs / 'vae.pt', vae, rh.ENCODER_SETTINGS, config)
    check_preset(args.fits / 'decoder.pt', decoder, ('channels',), config)

    network = running.build(args.stage, config)
    learn_prior(network, items, config)
    network.checkpoint = not base and config.resolution > 128  # on a GPU as its memory asks for
    diffusion = rh.diffusion_of(args.stage, config)
    distance = None
    if not base and config.patches:
        distance = perceptual(config, vae, device)

    def draw(batch, dice):
        if config.mirror:
            batch = batches.mirrored(batch, dice.uniform() < 0.5)
        x_start = batch['x_start']
        made = {
            'x_start': x_start,
            'noise': dice.normal(*x_start.shape[1:]),
            't': dice.below(diffusion.timesteps),
            'portrait': portraits_in_training(batch, config, dice),
            'keep': dice.uniform() >= config.condition_drop,
        }
        if clip is not None:
            made['keep_vector'] = dice.uniform() >= config.latent_drop
        if not base and config.up_degrade:
            made['lr'] = batches.degrade(x_start, config.base_resolution, dice)
        elif not base:
            made['lr'] = rh.resize_planes(x_start, config.base_resolution)
        for name in ('rays', 'patch'):
            if name in batch:
                made[name] = batch[name]
        return made

    def loss(network, batch):
        portrait = rh.encode_portrait(vae, batch['portrait'], config)
        portrait = rh.drop(portrait, batch['keep'], batch.get('keep_vector'))
        portrait = portrait._replace(lr=batch.get('lr'))
        terms, predicted = diffusion.loss(
            network, batch['x_start'], batch['t'], batch['noise'], portrait
        )
        if base and config.base_views:
            terms |= view_loss(predicted, batch.get('rays'), config, decoder)
        if distance:
            patches = batch.get('patch', [])
            terms |= image_loss(predicted, patches, config, decoder, distance)
        return terms

    def picture(network):
        shown = [batches.in_floats(item) for item in six_of(items)]
        images = portraits_of(shown, device)
        planes = []
        for x, image in zip(shown, images):  # one at a time: planes of `paper` are large
            low = None
            if not base:
                low = rh.resize_planes(x['x_start'][None], config.base_resolution).to(device)
            portrait = rh.encode_portrait(vae, image[None], config)
            planes.append(rh.sample_stage(args.stage, network, portrait, low))
        planes = rh.resize_planes(torch.cat(planes), config.resolution)
        views = torch.stack([front_view(x, decoder, config) for x in planes])
        return torch.cat([images, views.permute(0, 3, 1, 2) * 2 - 1], dim=2)

    if base:
        data = batches.Draws(items, args.seed, config.base_views, VIEW_SIDE)
    else:
        data = batches.Draws(items, args.seed, config.patches, config.patch, config.patch_front)
    return Stage(data, draw, network, loss, picture)


# Rodin's refiner (refiner.py)
def refiner_loss(network, batch, distance, weight):
    """How far refined patches are from true ones: absolute differences, and those of features.

    batch: of refiner.random_pair. Pixels that are masked count as right.
    """
    ours = network(batch['rendered'])
    truth = torch.where(batch['known'], batch['truth'], ours.detach())
    return {'l1': F.l1_loss(ours, truth), 'perceptual': weight * distance(ours, truth)}


class PlanesAndViews(batches.Planes):
    """Reads fitted planes of avatars, and of each a random training view, an rh.Views of one."""
    def __getitem__(self, i):
        file = self.read(i)
        view = refiner.random_view(self.folder(i), (file['centre'], file['half']))
        return {'planes': file['planes'].clone(), 'view': view, 'avatar': i}


def prepare_refiner(args, config, device):
    items = PlanesAndViews(args.fits, args.data, config)
    decoder = running.load_model('decoder', args.fits, device)
    items.check_decoder(decoder)
    items.made_with = {'decoder': decoder.fingerprint}
    vae = None
    if config.perceptual == 'vae':
        vae = running.load_model('vae', args.runs, device)
        items.made_with['vae'] = vae.fingerprint
    distance = perceptual(config, vae, device)
    network = running.build('refiner', config)
    grids = {}  # by number of the avatar, as many as fit into memory

    def grid_of(avatar, field):
        if avatar not in grids:
            if len(grids) == 256:
                grids.clear()
            grids[avatar] = rh.grid_for(field, config, device)
        return grids[avatar]

    def draw(batch, dice):
        pairs = []
        for k in dice.one_by_one():
            field = rh.PlaneField(batch['x_start'][k], decoder)
            grid = grid_of(batch['avatar'][k], field)
            pairs.append(refiner.random_pair(field, grid, batch['view'][k], config, device))
        return batches.collate(pairs)

    def loss(network, batch):
        return refiner_loss(network, batch, distance, config.refiner_perceptual)

    def picture(network):
        """Renders, enlarged without and with the network."""
        size = config.portrait // network.scale
        views = []
        for item in six_of(items):
            sample = batches.in_floats(batches.moved(item, device))
            field = rh.PlaneField(sample['x_start'], decoder)
            grid = grid_of(sample['avatar'], field)
            camera = rh.portrait_camera(size, device)
            rgb = rh.render_view(field, *camera, size, size, config.steps, grid).rgb
            views.append(rgb.permute(2, 0, 1) * 2 - 1)
        views = torch.stack(views)
        plain = F.interpolate(views, scale_factor=network.scale, mode='bicubic')
        return torch.cat([plain, network(views)], dim=2)

    return Stage(batches.Draws(items, args.seed), draw, network, loss, picture)


def learn_prior(network, items, config):
    """Shows a network's Prior, if it has one (shortcuts.py), at most 500 avatars."""
    prior = getattr(network, 'prior', None)
    if prior is None:
        return

    def planes():
        for i in range(0, len(items), -(-len(items) // 500)):
            x = batches.in_floats(items[i])['x_start']
            size = x.shape[-1]
            if size == config.base_resolution:
                yield x
            else:  # the network starts from the enlarged planes: what these lack
                yield x - rh.resize_planes(rh.resize_planes(x, config.base_resolution), size)

    prior.learn(planes())


def front_view(planes, decoder, config):
    """Planes (3, C, R, R) as a portrait shows them, (P, P, 3) in 0..1."""
    P = config.portrait
    camera = rh.portrait_camera(P, planes.device)
    return frozen.render_view(frozen.freeze(planes, decoder), *camera, P, P).rgb


# Training -----------------------------------------------------------------------------------------
def learning_rate(lr, step, steps, config):
    """The learning rate at a step: constant or, with final_lr below 1, a warm-up of 2 % and then a
    cosine down to that share."""
    if config.final_lr == 1:
        return lr
    warm = min(1.0, (step + 1) / max(0.02 * steps, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return lr * warm * (config.final_lr + (1 - config.final_lr) * cosine)


def initialise(network, stage, folder):
    """Begins with the weights of folder/<stage>.pt -> their fingerprint.

    Layers that these do not have yet, and that start at zero, stay as they are.
    """
    trained = running.load_model(stage, folder, 'cpu')
    weights = trained.state_dict()
    for name, x in network.state_dict().items():
        if name not in weights and name.startswith(getattr(network, 'added', ())):
            weights[name] = x
    try:
        network.load_state_dict(weights)
    except RuntimeError:
        rh.stop(f'{folder}/{stage}.pt: has other sizes than asked for; '
                f'use --preset {trained.config.preset}, or no --init')
    return trained.fingerprint


def resume(path, steps, settings, made_with, network, optimizer, ema, finite, log):
    """Takes up an interrupted run of so many steps from its state, if any -> the step to begin
    with.

    The log loses what came after that state.
    """
    state = {'step': 0, 'settings': settings}
    if path.exists():
        state = running.read_checkpoint(path, path.stem)
    with running.reading(path, 'delete it to start anew'):
        if names := running.differing(settings, state['settings']):
            rh.stop(f'{path}: an interrupted run with other settings ({", ".join(names)}); '
                    'delete it to start anew')
        if names := running.differing(made_with, dict(state.get('made_with', {}))):
            rh.stop(f'{path}: an interrupted run that was made with another {" and ".join(names)}; '
                    'put back what was there, or delete it to start anew')
        step = running.counted(state, 'step', steps)
        if step > 0:
            restore(state, network, optimizer, ema, finite)
    if log.exists() and dist.get_rank() == 0:
        kept = [line for line in log.read_bytes().splitlines(keepends=True) if is_of(line, step)]
        with running.atomic(log) as temporary:
            temporary.write_bytes(b''.join(kept))
    return step


def is_of(line, step):
    """Whether a line of a log is whole, and of a step before this one. After a power loss there
    may be anything in it."""
    try:
        return line.endswith(b'\n') and json.loads(line)['step'] < step
    except (ValueError, TypeError, KeyError):
        return False


def restore(state, network, optimizer, ema, finite):
    """Puts a run into a state that was saved; where that is of another network, a ValueError,
    KeyError or RuntimeError."""
    network.load_state_dict(state['model'])
    running.load_optimizer(optimizer, state['optimizer'])
    if state['ema'].keys() != ema.shadow.keys():
        raise ValueError('its EMA is of another network')
    for name, x in state['ema'].items():
        if x.shape != ema.shadow[name].shape:
            raise ValueError(f'{name} of the EMA is {tuple(x.shape)}')
    ema.shadow = {n: x.clone().to(ema.shadow[n].device) for n, x in state['ema'].items()}
    running.check_finite(state['model'], 'the model')
    running.check_finite(ema.shadow, 'the EMA')
    ema.updates = running.counted(state, 'updates')
    finite.skipped = running.counted(state, 'skipped')
    finite.row = running.counted(state, 'row')


def state_of(network, optimizer, ema, finite):
    """What `restore` puts a run back into."""
    return {
        'ema': ema.shadow,
        'updates': ema.updates,
        'skipped': finite.skipped,
        'row': finite.row,
        'model': network.state_dict(),
        'optimizer': optimizer.state_dict(),
    }


def write_picture(path, image):
    """Writes images (B, 3, H, W) in [-1, 1] side by side."""
    image = image.clamp(-1, 1).permute(2, 0, 3, 1).flatten(1, 2)  # (H, B W, 3)
    pixels = ((image + 1) * 127.5).round().byte().cpu().numpy()
    with running.atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary)


def prepare_of(name):
    """The function that makes a Stage of a name of STAGES, of (args, config, device)."""
    special = {
        'vae': prepare_vae,
        'clip': latents.prepare_clip,
        'prior': latents.prepare_latents,
        'text': latents.prepare_latents,
        'refiner': prepare_refiner,
        'lora': words.prepare_lora,
    }
    return special.get(name, prepare_diffusion)


def backward(stage, model, samples, parts, weight, alone, bf16):
    """The gradient of the mean loss of a whole batch, in parts -> this rank's share of its terms, a
    dict of scalars.

    samples: yields what was read, for one part after the other. parts, weight: of batches.shares.
    alone: of running.parallel. Ranks' gradients are averaged after the last part, where their sum
    is meant.
    """
    device = next(model.parameters()).device
    total = {}
    for places in parts:
        is_last = places is parts[-1]
        waiting = contextlib.nullcontext() if is_last else alone()
        seen = batches.drawn(next(samples), stage.draw, device)
        share = weight * len(places)
        with waiting:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                terms = stage.loss(model, seen)
            (sum(terms.values()) * share * dist.get_world_size()).backward()
        for name, term in terms.items():
            total[name] = total.get(name, 0) + share * term.detach()
    return total


def settings_of(args, config, batch, bf16, items):
    """What a run has to have in common with the one that it goes on with, a dict."""
    names = '\n'.join(items.names())
    return {
        **vars(config),
        'batch': batch,
        'seed': args.seed,
        'bf16': bf16,
        'data': zlib.crc32(names.encode(errors='surrogateescape')),
        'init': args.init and str(args.init),
    }


def recomputes(stage, config, network, parts, bf16, device):
    """Whether a network on a GPU recomputes activations, as its memory asks for; parts: of
    batches.shares."""
    free, _ = torch.cuda.mem_get_info(device)
    available = free + 12 * sum(p.numel() for p in network.parameters())  # it is there already
    most = max(map(len, parts))
    return running.fit_memory(stage, config, most, bf16, available)


def show_learned(args, steps, ema, picture, device):
    """Writes the picture of what a stage has learned in so many steps."""
    trained = ema.shadow
    if args.stage != 'lora':
        trained = running.load_model(args.stage, args.runs, device)
    path = watching.picture_path(args.runs, args.stage, steps)
    write_picture(path, picture(trained))


def say_last(args, steps, log):
    """Says what was written, how good it is, and what comes next."""
    suffix = '.safetensors' if args.stage == 'lora' else '.pt'
    weights = args.runs / f'{args.stage}{suffix}'
    pictures = watching.picture_path(args.runs, args.stage, steps)
    watching.last_line(args, steps, [weights, log, pictures])


def train(args, config, rank, world, device):
    prefix = 'up' if args.stage == 'upsample' else args.stage
    steps = getattr(config, f'{prefix}_steps')
    batch = getattr(config, f'{prefix}_batch')
    lr = getattr(config, f'{prefix}_lr')
    bf16 = device.type == 'cuda' if args.bf16 is None else args.bf16

    prepare = prepare_of(args.stage)
    stage = Stage(*prepare(args, config, device))
    data, _, network, loss_of, picture = stage
    made_with = data.items.made_with
    if made_with:
        made_with['fitted planes'] = provenance.of_files(list(data.items.paths()))
    if args.init:
        made_with['init'] = initialise(network, args.stage, args.init)
    network.to(device)
    ema = running.EMA(network, config.ema)
    finite = rh.Finite(args.stage)
    on_gpu = device.type == 'cuda'
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0, fused=on_gpu)

    # Go on with an interrupted run, if it was the same run
    state_path = args.runs / f'{args.stage}-state.pt'
    log = args.runs / f'{args.stage}.jsonl'
    settings = settings_of(args, config, batch, bf16, data.items)
    begin = resume(
        state_path, steps, settings, made_with, network, optimizer, ema, finite, log
    )

    if args.compile:
        network.compile()
    model, alone = running.parallel(network, device)
    parts, weight = batches.shares(batch, rank, world, args.micro_batch)
    if device.type == 'cuda' and args.stage in ('base', 'upsample'):
        network.checkpoint = recomputes(args.stage, config, network, parts, bf16, device)
    indices = batches.indices(len(data.items), batch, begin, steps, args.seed, parts)
    fixed = None
    if rank == 0:
        fixed = watching.fixed_of(stage, prepare, args, config, device, len(parts[0]))
        lines = watching.Log(log, begin, args.tensorboard)
    samples = iter(loader_of(data, indices, args.workers, device))
    todo = range(begin, steps)
    bar = running.Bar(todo, initial=begin, total=steps, disable=rank > 0, desc=args.stage)

    chores = running.Chores(args.save_every)
    behind = running.Behind()
    for step in bar:
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(lr, step, steps, config)

        optimizer.zero_grad()
        total = backward(stage, model, samples, parts, weight, alone, bf16)

        # The norm is of the averaged gradients: the same on all ranks, so all of them step, or none
        norm = nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad or math.inf)
        finite.step(optimizer, norm)
        ema.update(network)

        last = step == steps - 1
        every = args.picture_every
        shown = last or (every > 0 and (step + 1) % every == 0)
        saves = shown or (args.save_every is not None and chores.due(step))
        if step % max(args.log_every, 1) == 0 or saves:  # the same on all ranks
            values = over_ranks(total)
            finite.look()
            saves = saves or chores.due(step)
            if finite.skipped:
                values['skipped'] = finite.skipped
            bar.set_postfix(values)
            values['lr'] = optimizer.param_groups[0]['lr']
            values['norm'] = watching.finite_or_none(norm)
            if rank == 0 and saves:
                with chores.doing(), watching.averaged(network, ema):
                    on_fixed = watching.loss_on(fixed, network, loss_of, device)
                values[fixed.name] = watching.finite_or_none(on_fixed)
            if rank == 0:
                lines.write(step, values)

        if rank == 0 and saves:
            with chores.doing():
                state = running.copied({
                    'settings': settings,
                    'made_with': made_with,
                    'step': step + 1,
                    **state_of(network, optimizer, ema, finite),
                })
                behind.begin(functools.partial(save, args, config, network, log, state_path, state))
                if args.stage == 'lora':  # which is written through the network
                    behind.wait()
        if rank == 0 and shown:
            with chores.doing(), torch.no_grad():
                behind.wait()
                show_learned(args, step + 1, ema, picture, device)
    if rank == 0:
        say_last(args, steps, log)
    dist.barrier()


def loader_of(data, indices, workers, device):
    """The samples of each list of indices, a list, read by so many processes (None: as many as this
    rank has cores for; on the CPU, which trains meanwhile, none)."""
    if workers is None:
        workers = 0 if device.type == 'cpu' else running.spare_cores()
    return torch.utils.data.DataLoader(
        data,
        batch_sampler=indices,
        collate_fn=batches.collate,
        num_workers=workers,
        pin_memory=device.type == 'cuda',
    )


def over_ranks(total):
    """The terms of the whole batch's loss, as numbers: sums over the ranks' shares of them."""
    values = torch.stack([term.float() for term in total.values()])
    numbers = running.summed(values).tolist()
    return {name: round(x, 6) for name, x in zip(total, numbers, strict=True)}


def save(args, config, network, log, path, state):
    """Writes what a stage is for, a model or a LoRA, and then the state, which comes after the
    lines of the log that are of before it."""
    running.synchronise(log)
    ema = state['ema']
    if args.stage == 'lora':
        words.write_lora(args.runs / 'lora.safetensors', network, ema, config.trigger)
    else:
        made_with = state['made_with']
        weights = args.runs / f'{args.stage}.pt'
        running.write_model(weights, args.stage, config, ema, state['step'], made_with=made_with)
    running.write_checkpoint(path, path.stem, state)


def of_init(args):
    """What a base network takes over from the one of --init that it begins with, where --set does
    not say otherwise: that it is given vectors, and how often it is given nothing."""
    if args.stage != 'base' or not args.init:
        return []
    trained = running.load_model('base', args.init, 'cpu').config
    names = ('latent_width', 'latent_drop', 'condition_drop')
    return [f'{name}={getattr(trained, name)}' for name in names]


def main(args):
    if args.stage == 'lora':
        config = words.make_settings(args.sd, args.set)
    else:
        config = rh.make_config(args.preset, [*of_init(args), *args.set])
    rank, world, device = running.start(args.device, args.seed, args.patience)
    if args.stage == 'vae' and (args.vae or config.vae_steps == 0):  # nothing to train
        if args.vae:
            encoder = running.load_vae(args.vae, config)
        else:
            encoder = running.build('vae', config)
        running.write_model(args.runs / 'vae.pt', 'vae', config, encoder.state_dict(), 0)
        return
    if args.stage == 'clip' and args.clip:
        latents.keep_published(args.clip, args.runs)
        return
    path = args.runs / f'{args.stage}.pt'
    claimed = contextlib.nullcontext(True)
    if rank == 0:
        names = ('-state.pt', '.jsonl', '.safetensors')
        claimed = running.claim(path, *(args.runs / f'{args.stage}{name}' for name in names))
    with claimed as mine:
        if not mine:
            rh.stop(f'{path}: another process is training it')
        if rank == 0:
            watching.remove_half_pictures(args.runs, args.stage)
        if rank == 0 and args.stage != 'lora':
            running.print_departures(config)
        train(args, config, rank, world, device)


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--stage', required=True, choices=STAGES)
    p.add_argument('--preset', default='small', choices=rh.PRESETS)
    p.add_argument('--data', type=Path, default=Path('data'))
    p.add_argument('--fits', type=Path, default=Path('fits'))
    p.add_argument('--runs', type=Path, default=Path('runs'))
    p.add_argument('--vae', type=Path,
                   help='with --stage vae: published AutoencoderKL weights to take instead of '
                        'training')
    p.add_argument('--clip', metavar='CLIP',
                   help='with --stage clip: folder or hub name of a published CLIP to take instead '
                        'of training')
    p.add_argument('--init', type=Path, metavar='FOLDER',
                   help='begin with the weights of FOLDER/<stage>.pt (not for lora)')
    p.add_argument('--sd', default=words.SD,
                   help='with --stage lora: folder or model id of a Stable Diffusion pipeline')
    p.add_argument('--workers', type=int,
                   help='processes of each rank that read data (default: one a core that is left '
                        'on a GPU machine, else none)')
    p.add_argument('--micro-batch', type=int, default=0, metavar='N',
                   help='samples of a rank that are in memory at a time (default: all of a step); '
                        'changes nothing else')
    p.add_argument('--log-every', type=int, default=20, help='steps between log lines')
    p.add_argument('--save-every', type=int, metavar='STEPS',
                   help='steps between checkpoints (default: ten minutes, and at most 2 %% of the '
                        'time)')
    p.add_argument('--picture-every', type=int, default=0, metavar='STEPS',
                   help='steps between pictures (default: one, at the end)')
    p.add_argument('--held-out', type=Path, metavar='DATA',
                   help='avatars that are not trained on, with planes in --fits: their loss on '
                        'fixed noise is logged at each save (default: that of a few of --data)')
    p.add_argument('--tensorboard', action='store_true',
                   help='log for TensorBoard, too, into <runs>/tensorboard/<stage>')
    p.add_argument('--patience', type=float, default=4, metavar='MINUTES',
                   help='the job ends where a rank keeps the others waiting for longer; give more '
                        'where a checkpoint takes as long to write')
    p.add_argument('--compile', action='store_true',
                   help='torch.compile the network: a minute at the start, faster steps')
    p.add_argument('--bf16', action=argparse.BooleanOptionalAction,
                   help='autocast to bfloat16 (default: on a GPU)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', help='cuda where there is one, else cpu')
    p.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE',
                   help='override settings of the preset')
    args = p.parse_args(argv)
    if args.workers is not None and not 0 <= args.workers <= 1024:
        rh.stop('--workers takes 0 to 1024')
    if not 0 < args.patience < 10 ** 6:
        rh.stop('--patience takes a positive number of minutes')
    numbers = (args.log_every, args.save_every or 0, args.picture_every, args.micro_batch)
    if min(numbers) < 0:
        rh.stop('--log-every, --save-every, --picture-every and --micro-batch take at least 0')
    if args.init and args.stage == 'lora':
        p.error('--init: not with --stage lora')
    return args


if __name__ == '__main__':
    main(parse())
