"""Stage 2: the portrait's VAE and the two diffusion models (sections 3.2 and 3.3, supplement A).

    python train.py --stage vae                 then base, then upsample; each about minutes with --preset tiny
    torchrun --standalone --nproc_per_node=8 train.py --stage base --preset paper
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --stage base --preset paper
    python train.py --stage base --init weights --set base_lr=1e-4      the model that ships, trained on with other avatars

`paper` conditions on SDXL's VAE: `--stage vae --vae sdxl_vae.safetensors` takes published weights instead of training. `--stage lora` tunes
Stable Diffusion on portraits with captions in --data (see words.py) and writes runs/lora.safetensors. Reads data/ and
fits/, writes runs/<stage>.pt (EMA weights, fp16), <stage>-state.pt (the same command goes on after an interruption), <stage>.jsonl (a line
a logged step) and pictures. A run that was interrupted gives the same bits as one that was not, and any number of ranks does the same
mathematics (see batches.py).
"""
import argparse
import contextlib
import json
import math
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import batches
import rodinhd as rh
import words


class EMA:
    """Exponential moving average of a module's parameters in fp32, with a warm-up: decay = min(decay, (1 + n) / (10 + n))."""
    def __init__(self, module, decay):
        self.decay, self.updates = decay, 0
        self.shadow = {n: p.detach().float().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for n, p in module.named_parameters():
            self.shadow[n].lerp_(p.float(), 1 - decay)

def perceptual(config, vae, device):
    """Distance of two batches of patches (B, 3, p, p) in [-1, 1]: sum over layers of the mean squared feature difference (Eq. 6)."""
    if config.perceptual == 'vae':
        return lambda a, b: sum(F.mse_loss(x, y) / y.var() for x, y in zip(vae.features(a), vae.features(b)))
    import lpips
    try:
        network = lpips.LPIPS(net='vgg', lpips=False, verbose=False).to(device).requires_grad_(False)
    except Exception as error:          # a download that fails raises many types
        rh.stop(f'the VGG weights of --set perceptual=vgg could not be had ({type(error).__name__}); put vgg16-397923af.pth into '
                f'{torch.hub.get_dir()}/checkpoints, or use --set perceptual=vae')
    return lambda a, b: network(a, b).mean()

@torch.autocast('cpu', enabled=False)
@torch.autocast('cuda', enabled=False)
def image_loss(x_start, patches, config, decoder, distance):
    """Image-level supervision (Eq. 6): patches (of batches.random_patch) rendered from predicted planes x_start (one (3, C, R, R) each) ->
    {'pixel', 'perceptual'}, sums over the patches, 0 for none, over how many the whole batch has."""
    count = min(config.patches, config.up_batch)
    terms = {'pixel': torch.zeros((), device=x_start.device), 'perceptual': torch.zeros((), device=x_start.device)}
    for planes, patch in zip(x_start, patches):
        patch = {k: v.to(x_start.device) for k, v in patch.items()}
        field, grid = rh.PlaneField(planes.clamp(-1, 1).float(), decoder), None         # no grid: cheaper for small patches and planes
        if config.patch_grid_updates:
            grid = rh.grid_for(field, config, x_start.device, config.patch_grid_updates)
        rgb, _, _ = rh.render(field, patch['rays_o'].reshape(-1, 3), patch['rays_d'].reshape(-1, 3), config.steps, grid)
        ours, truth = (x[None] * 2 - 1 for x in (rgb.T.reshape(patch['rgb'].shape), patch['rgb']))
        terms['pixel'] = terms['pixel'] + F.mse_loss(ours, truth) / 4 / count
        terms['perceptual'] = terms['perceptual'] + 0.5 * distance(ours, truth) / count
    return terms

def prepare_vae(args, config, device, world):
    """Data, network, loss(network, batch) -> dict of terms, and picture(network) -> images (3, H, W) in [-1, 1] in a row."""
    items, network, crop = batches.Images(args.data, config), rh.VAE(config), min(config.portrait, 96)
    network.quant_conv.bias.data[config.vae_latent:] -= 6               # little noise at first, or the decoder learns to ignore the latent
    def draw(item, i, j):
        image = batches.photo(item['portrait'][None], item['alpha'][None])[0]
        y, x = (int(torch.randint(config.portrait - crop + 1, ())) for _ in range(2))
        return {'image': image[:, y:y + crop, x:x + crop], 'noise': torch.randn(config.vae_latent, crop // 8, crop // 8)}
    def loss(network, batch):
        images = batch['image']
        out, mean, logvar = network(images, batch['noise'])
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        edges = sum(F.l1_loss(torch.diff(out, dim=d), torch.diff(images, dim=d)) for d in (2, 3))
        thumb = F.l1_loss(mean[:, :3], F.avg_pool2d(images, 8))         # without it, thousands of steps pass before the latent has colours
        return {'l1': F.l1_loss(out, images), 'edges': edges, 'thumb': thumb, 'kl': 1e-4 * kl}
    def picture(network):
        shown = [items[i * len(items) // 6] for i in range(6)]
        images = torch.stack([rh.portrait_on_white(x['portrait'], x['alpha']) for x in shown]).to(device)
        return torch.cat([images, network.decode(network.encode(images)[0])], dim=2)
    return batches.Draws(items, draw, args.seed), network, loss, picture

def prepare_diffusion(args, config, device, world):
    """The same for base and upsample."""
    base = args.stage == 'base'
    items = batches.Planes(args.fits, args.data, config, low=base)
    vae, decoder = rh.load_model('vae', args.runs, device), rh.load_model('decoder', args.fits, device)
    if (vae.config.portrait, vae.config.vae_widths, decoder.config.channels) != (config.portrait, config.vae_widths, config.channels):
        rh.stop(f'{args.runs}/vae.pt or {args.fits}/decoder.pt are of another preset than {config.preset}')
    network, diffusion = (rh.BaseUNet if base else rh.UpsampleUNet)(config), rh.diffusion_of(args.stage, config)
    if network.prior:                   # of at most 500 avatars; the upsample network starts from the enlarged planes: of what these lack
        planes = (items[i]['x_start'] for i in range(0, len(items), -(-len(items) // 500)))
        network.prior.learn(x if base else x - rh.resize_planes(rh.resize_planes(x, config.base_resolution), x.shape[-1]) for x in planes)
    network.checkpoint = not base and config.resolution > 128           # planes of 512 x 512 do not fit otherwise
    distance = None if base or not config.patches else perceptual(config, vae, device)
    def draw(item, i, j):
        x_start = item['x_start']
        sample = {'x_start': x_start, 'noise': torch.randn_like(x_start), 't': torch.randint(diffusion.timesteps, ()),
                  'portrait': batches.photo(item['portrait'][None], item['alpha'][None])[0],
                  'keep': torch.rand(()) >= config.condition_drop}
        if not base:
            sample['lr'] = (batches.degrade if config.up_degrade else rh.resize_planes)(x_start[None], config.base_resolution)[0]
        if not base and j < config.patches:
            sample['patch'] = batches.random_patch(items.folders[i], items.paths[i], config.patch)
        return sample
    def loss(network, batch):
        portrait = rh.drop(rh.encode_portrait(vae, batch['portrait'], config), batch['keep'])._replace(lr=batch.get('lr'))
        terms, predicted = diffusion.loss(network, batch['x_start'], batch['t'], batch['noise'], portrait)
        if distance:                    # ranks are averaged, and patches are not on every rank
            terms.update({k: v * world for k, v in image_loss(predicted, batch.get('patch', []), config, decoder, distance).items()})
        return terms
    def picture(network):
        shown, P = [items[i * len(items) // 6] for i in range(6)], config.portrait
        images = torch.stack([rh.portrait_on_white(x['portrait'], x['alpha']) for x in shown]).to(device)
        def sample(x, image):           # one at a time: planes of `paper` are large
            low = None if base else rh.resize_planes(x['x_start'][None], config.base_resolution).to(device)
            return rh.sample_stage(args.stage, network, rh.encode_portrait(vae, image[None], config), low)
        planes = torch.cat([sample(x, image) for x, image in zip(shown, images)])
        fields = [rh.PlaneField(p, decoder) for p in rh.resize_planes(planes, config.resolution)]
        camera = rh.orbit_pose(0, 2).to(device), rh.intrinsics_of(34.0, P).to(device), P, P, config.steps
        views = torch.stack([rh.render_view(field, *camera, rh.grid_for(field, config, device, 4))[0] for field in fields])
        return torch.cat([images, views.permute(0, 3, 1, 2) * 2 - 1], dim=2)
    return batches.Draws(items, draw, args.seed), network, loss, picture

def resume(path, settings, network, optimizer, ema, finite, log):
    """Takes up an interrupted run from its state, if any -> the step to begin with; the log loses what came after that state."""
    state = rh.read_checkpoint(path, path.stem) if path.exists() else {'step': 0, 'settings': settings}
    if differing := [k for k in settings if settings[k] != state['settings'].get(k)]:
        rh.stop(f'{path}: an interrupted run with other settings ({", ".join(differing)}); delete it to start anew')
    if log.exists() and dist.get_rank() == 0:
        lines = log.read_text().splitlines(keepends=True)
        with rh.atomic(log) as temporary:
            temporary.write_text(''.join(line for line in lines if line.endswith('\n') and json.loads(line)['step'] < state['step']))
    if not state['step']:
        return 0
    network.load_state_dict(state['model'])
    optimizer.load_state_dict(state['optimizer'])
    ema.shadow, ema.updates = {k: v.clone().to(ema.shadow[k].device) for k, v in state['ema'].items()}, state['updates']
    finite.skipped, finite.row = state['skipped'], state['row']
    return state['step']

def main(args):
    config = words.make_settings(args.sd, args.set) if args.stage == 'lora' else rh.make_config(args.preset, args.set)
    rank, world, device = rh.start(args.device, args.seed)
    if args.stage == 'vae' and args.vae:
        return rh.write_model(args.runs / 'vae.pt', 'vae', config, rh.load_vae(args.vae, config).state_dict(), 0)
    with contextlib.nullcontext(True) if rank else rh.claim(args.runs / f'{args.stage}.pt') as mine:
        if not mine:
            rh.stop(f'{args.runs}/{args.stage}.pt: another process is training it')
        train(args, config, rank, world, device)

def train(args, config, rank, world, device):
    steps, batch, lr = (getattr(config, f'{ {"upsample": "up"}.get(args.stage, args.stage) }_{x}') for x in ('steps', 'batch', 'lr'))
    prepare = {'vae': prepare_vae, 'lora': words.prepare_lora}.get(args.stage, prepare_diffusion)
    data, network, loss_of, picture = prepare(args, config, device, world)
    if args.init:
        trained = rh.load_model(args.stage, args.init, 'cpu')
        try:
            network.load_state_dict(trained.state_dict())
        except RuntimeError:
            rh.stop(f'{args.init}/{args.stage}.pt: has other sizes than asked for; use --preset {trained.config.preset}, or no --init')
    batch, path, log = max(batch // world, 1) * world, args.runs / f'{args.stage}-state.pt', args.runs / f'{args.stage}.jsonl'
    ema, finite = EMA(network.to(device), config.ema), rh.Finite(args.stage)
    bf16 = device.type == 'cuda' if args.bf16 is None else args.bf16
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    files = zlib.crc32('\n'.join(Path(p).parent.name + Path(p).name for p in data.items.paths).encode())
    settings = {**vars(config), 'batch': batch, 'seed': args.seed, 'bf16': bf16, 'data': files, 'init': args.init and str(args.init)}
    begin = resume(path, settings, network, optimizer, ema, finite, log)
    if args.compile:
        network.compile()
    model = nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == 'cuda' else None)
    indices = batches.indices(len(data.items), batch, begin, steps, args.seed, rank, world)
    loader = torch.utils.data.DataLoader(data, batch_sampler=indices, collate_fn=batches.collate, num_workers=args.workers)
    def to_device(x):
        return x.to(device) if torch.is_tensor(x) else x
    for step, items in enumerate(bar := tqdm(loader, initial=begin, total=steps, disable=rank > 0, desc=args.stage), start=begin):
        for group in optimizer.param_groups:                                    # warm-up of 2 %, then a cosine to final_lr
            warm = min(1.0, (step + 1) / max(0.02 * steps, 1)) if config.final_lr < 1 else 1.0
            group['lr'] = lr * warm * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            terms = loss_of(model, {k: to_device(v) for k, v in items.items()})
        optimizer.zero_grad()
        sum(terms.values()).backward()
        if finite(nn.utils.clip_grad_norm_(network.parameters(), 1.0)):         # of the averaged gradients: the same on all ranks
            optimizer.step()
            ema.update(network)
        if rank == 0 and (step % max(args.log_every, 1) == 0 or step == steps - 1):
            values = {k: round(v.item(), 6) for k, v in terms.items()} | ({'skipped': finite.skipped} if finite.skipped else {})
            bar.set_postfix(values)
            with open(log, 'a') as file:
                file.write(json.dumps({'step': step, **values}) + '\n')
        if rank == 0 and ((step + 1) % max(args.save_every, 1) == 0 or step == steps - 1):
            if args.stage == 'lora':
                words.write_lora(args.runs / 'lora.safetensors', network, ema.shadow, config.trigger)
            else:
                rh.write_model(args.runs / f'{args.stage}.pt', args.stage, config, ema.shadow, step + 1)
            rh.write_checkpoint(path, path.stem, {
                'settings': settings, 'step': step + 1, 'ema': ema.shadow, 'updates': ema.updates, 'skipped': finite.skipped,
                'row': finite.row, 'model': network.state_dict(), 'optimizer': optimizer.state_dict()})
            with torch.no_grad():
                image = picture(ema.shadow if args.stage == 'lora' else rh.load_model(args.stage, args.runs, device))
                image = image.clamp(-1, 1).permute(2, 0, 3, 1).flatten(1, 2)
            with rh.atomic(args.runs / f'{args.stage}.png') as temporary:
                Image.fromarray(((image + 1) * 127.5).round().byte().cpu().numpy()).save(temporary)
    dist.barrier()

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--stage', required=True, choices=('vae', 'base', 'upsample', 'lora'))
    p.add_argument('--preset', default='small', choices=rh.PRESETS)
    for folder in ('data', 'fits', 'runs'):
        p.add_argument(f'--{folder}', type=Path, default=Path(folder))
    p.add_argument('--vae', type=Path, help='with --stage vae: published AutoencoderKL weights to take instead of training')
    p.add_argument('--init', type=Path, metavar='FOLDER', help='begin with the weights of FOLDER/<stage>.pt (not for lora)')
    p.add_argument('--sd', default=words.SD, help='with --stage lora: folder or model id of a Stable Diffusion pipeline')
    p.add_argument('--workers', type=int, default=0, help='processes that read data')
    p.add_argument('--log-every', type=int, default=20, help='steps between log lines')
    p.add_argument('--save-every', type=int, default=500, help='steps between checkpoints and pictures')
    p.add_argument('--compile', action='store_true', help='torch.compile the network: a minute at the start, faster steps')
    p.add_argument('--bf16', action=argparse.BooleanOptionalAction, help='autocast to bfloat16 (default: on a GPU)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', help='cuda where there is one, else cpu')
    p.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help='override settings of the preset')
    args = p.parse_args(argv)
    if args.init and args.stage == 'lora':
        p.error('--init: not with --stage lora')
    return args

if __name__ == '__main__':
    main(parse())
