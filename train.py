"""Stage 2: the portrait's VAE and the two diffusion models (sections 3.2 and 3.3, supplement A).

    python train.py --stage vae                 then base, then upsample; each about minutes with --preset tiny
    torchrun --standalone --nproc_per_node=8 train.py --stage base --preset paper
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --stage base --preset paper

`paper` conditions on SDXL's VAE: `--stage vae --vae sdxl_vae.safetensors` takes published weights instead of training. Reads data/ and
fits/, writes runs/<stage>.pt (EMA weights, fp16), <stage>-state.pt (the same command goes on after an interruption), <stage>.jsonl (a line
a logged step) and pictures. All that is random follows from the seed and the step.
"""
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import rodinhd as rh


class Views(torch.utils.data.Dataset):
    """All training images of all avatars, for the VAE: portrait (3, P, P) in [-1, 1] and alpha (1, P, P)."""
    def __init__(self, data, config):
        self.size = config.portrait
        self.paths = [frame['path'] for folder in rh.list_avatars(data) for frame in rh.read_frames(folder, 'train')[1]]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return dict(zip(('portrait', 'alpha'), rh.read_portrait(self.paths[i], self.size)))

def batches(n, batch, begin, steps, seed, rank):
    """Lists of indices below n that follow from seed, step and rank alone; any number of items serves any batch size."""
    for step in range(begin, steps):
        yield np.random.default_rng((seed % 2 ** 32, step, rank)).integers(n, size=batch).tolist()

def augment_portraits(rgb, alpha):
    """Portraits as people have them: (B, 3, P, P) in [-1, 1], alpha (B, 1, P, P) -> (B, 3, P, P): shifted by up to 5 %, scaled by up to
    10 %, jittered in brightness, contrast and saturation, sometimes blurred, on white (half of them), a flat colour or a soft pattern."""
    B, _, P, _ = rgb.shape
    def uniform(low, high):
        return low + (high - low) * torch.rand(B, 1, 1, 1, device=rgb.device)
    scale, shift = uniform(0.9, 1.1).view(B, 1, 1), 0.1 * (2 * torch.rand(B, 2, 1, device=rgb.device) - 1)
    theta = torch.cat([torch.eye(2, device=rgb.device) * scale, shift], dim=2)
    rgba = torch.cat([(rgb + 1) / 2 * alpha, alpha], dim=1)             # premultiplied
    rgba = F.grid_sample(rgba, F.affine_grid(theta.double(), rgba.shape, align_corners=False).float(), align_corners=False)
    rgb, alpha, grey = rgba[:, :3], rgba[:, 3:], rgba[:, :3].mean(1, keepdim=True)
    mean = rgb.mean((1, 2, 3), keepdim=True) / alpha.mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
    rgb = grey + (rgb - grey) * uniform(0.85, 1.15)
    rgb = (mean * alpha + (rgb - mean * alpha) * uniform(0.9, 1.1)) * uniform(0.9, 1.1)
    kind, flat = uniform(0, 1), torch.rand(B, 3, 1, 1, device=rgb.device)
    pattern = F.interpolate(torch.rand(B, 3, 5, 5, device=rgb.device), size=P, mode='bicubic').clamp(0, 1)
    ground = torch.where(kind < 0.5, torch.ones_like(flat), torch.where(kind < 0.75, flat, pattern))
    rgb = (rgb + (1 - alpha) * ground).clamp(0, 1)
    soft = F.avg_pool2d(F.pad(rgb, (1, 1, 1, 1), mode='replicate'), 3, stride=1)
    return torch.lerp(rgb, soft, uniform(-1, 1).clamp(min=0)) * 2 - 1

def degrade(planes, size):
    """Condition augmentation (Rodin; a light BSRGAN degradation): planes (B, 3, C, R, R) -> low-resolution planes as a base model might
    make them: downsampled through a random intermediate size (half of them), blurred (a quarter), noisy (80 %, sigma 5/255 to 25/255)."""
    out = []
    for x in planes:
        if torch.rand(()) < 0.5:
            middle = int(size * (1 + torch.rand(()) * (x.shape[-1] / size - 1)))
            x = F.interpolate(x, size=middle, mode='bilinear' if torch.rand(()) < 0.5 else 'bicubic', align_corners=True)
        x = rh.resize_planes(x.double(), size).float()                  # doubles are exempt from autocast
        if torch.rand(()) < 0.25:
            sigma = 0.1 + 0.7 * torch.rand((), device=x.device)
            tap = torch.exp(-torch.arange(-2, 3, device=x.device) ** 2 / (2 * sigma ** 2))
            kernel = (tap[:, None] * tap / tap.sum() ** 2).expand(x.shape[1], 1, 5, 5)
            x = F.conv2d(F.pad(x, (2, 2, 2, 2), mode='replicate'), kernel, groups=x.shape[1])
        kind, sigma = torch.rand(()), (5 + 20 * torch.rand((), device=x.device)) / 255
        if kind < 0.8:                  # independent, or one map for all planes and channels
            x = x + sigma * torch.randn_like(x if kind < 0.4 else x[:1, :1])
        out.append(x)
    return torch.stack(out).clamp(-1, 1)

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

class ImageLoss:
    """Image-level supervision (Eq. 6): a patch of a random training view, rendered from predicted planes, against the photograph."""
    def __init__(self, data, config, decoder, vae, device):
        self.data, self.config, self.decoder = data, config, decoder
        self.distance, self.device = perceptual(config, vae, device), device

    @torch.autocast('cpu', enabled=False)
    @torch.autocast('cuda', enabled=False)
    def __call__(self, x_start, index):
        """x_start (B, 3, C, R, R), indices of the avatars (B,) -> {'pixel', 'perceptual'}."""
        ours, truth, p = [], [], self.config.patch
        for planes, i in zip(x_start, index.tolist()):
            folder, file = self.data.folders[i], rh.read_checkpoint(self.data.files[i], 'planes')
            pick, spread = int(torch.randint(2 ** 30, ())), 2 ** int(1 + torch.multinomial(torch.tensor([0.35, 0.45, 0.2]), 1))
            views = rh.load_views(folder, 'train', box := (file['centre'], file['half']), pick=pick)
            if views.images.shape[1] >= 2 * p * spread:                 # the image becomes 2, 4 or 8 patches wide
                views = rh.load_views(folder, 'train', box, views.images.shape[1] // (p * spread), pick=pick)
            height, width = views.images.shape[1:3]
            for _ in range(2):          # an almost white crop is drawn again, once
                y, x = (int(torch.randint(max(n - p, 0) + 1, ())) for n in (height, width))
                crop = views.rgb(0)[y:y + p, x:x + p]
                if crop.mean() < 0.7:
                    break
            yy, xx = torch.meshgrid(torch.arange(y, y + crop.shape[0]), torch.arange(x, x + crop.shape[1]), indexing='ij')
            rays_o, rays_d = rh.pixel_rays(views.c2w[0], views.intrinsics[0], xx.reshape(-1), yy.reshape(-1))
            field, grid = rh.PlaneField(planes.clamp(-1, 1).float(), self.decoder), None    # no grid: cheaper for small patches and planes
            if self.config.patch_grid_updates:
                grid = rh.grid_for(field, self.config, self.device, self.config.patch_grid_updates)
            rgb, _, _ = rh.render(field, rays_o.to(self.device), rays_d.to(self.device), self.config.steps, grid)
            ours.append(rgb.view(*crop.shape).permute(2, 0, 1) * 2 - 1)
            truth.append(crop.permute(2, 0, 1).to(self.device) * 2 - 1)
        ours, truth = torch.stack(ours), torch.stack(truth)
        return {'pixel': F.mse_loss(ours, truth) / 4, 'perceptual': 0.5 * self.distance(ours, truth)}

def prepare(args, config, device):
    """Data set, network, and loss(network, batch) -> dict of terms, of a stage; and picture(network) -> image (H, W, 3) uint8."""
    def portraits():
        items = [data[i * len(data) // 6] for i in range(6)]
        return items, torch.stack([rh.portrait_on_white(x['portrait'], x['alpha']) for x in items]).to(device)
    if args.stage == 'vae':
        data, network, crop = Views(args.data, config), rh.VAE(config), min(config.portrait, 96)
        def loss(network, batch):
            images = augment_portraits(batch['portrait'], batch['alpha'])
            y, x = (int(torch.randint(config.portrait - crop + 1, ())) for _ in range(2))
            images = images[:, :, y:y + crop, x:x + crop]
            out, mean, logvar = network(images)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            edges = sum(F.l1_loss(torch.diff(out, dim=d), torch.diff(images, dim=d)) for d in (2, 3))
            return {'l1': F.l1_loss(out, images), 'edges': edges, 'kl': 1e-4 * kl}
        def picture(network):
            images = portraits()[1]
            return torch.cat([images, network.decode(network.encode(images)[0])], dim=2)
        return data, network, loss, picture

    base = args.stage == 'base'
    data = rh.PlaneDataset(args.fits, args.data, config, low=base)
    vae, decoder = rh.load_model('vae', args.runs, device), rh.load_model('decoder', args.fits, device)
    if (vae.config.portrait, vae.config.vae_widths, decoder.config.channels) != (config.portrait, config.vae_widths, config.channels):
        rh.stop(f'{args.runs}/vae.pt or {args.fits}/decoder.pt are of another preset than {config.preset}')
    network, diffusion = (rh.BaseUNet if base else rh.UpsampleUNet)(config), rh.diffusion_of(args.stage, config)
    network.checkpoint = not base and bool(config.up_recompute)
    image_loss = None if base else ImageLoss(data, config, decoder, vae, device)
    def loss(network, batch):
        portrait = rh.encode_portrait(vae, augment_portraits(batch['portrait'], batch['alpha']), config)
        portrait = rh.drop(portrait, torch.rand(len(batch['index']), device=device) >= config.condition_drop)
        x_start = batch['low' if base else 'planes']
        if not base:
            portrait = portrait._replace(lr=degrade(x_start, config.base_resolution))
        t = torch.randint(diffusion.timesteps, (len(x_start),), device=device)
        terms, predicted = diffusion.loss(network, x_start, t, torch.randn_like(x_start), portrait)
        return terms if base else {**terms, **image_loss(predicted[:config.patches], batch['index'][:config.patches])}
    def picture(network):
        items, images = portraits()
        def sample(x, image):           # one at a time: planes of `paper` are large
            low = None if base else rh.resize_planes(x['planes'][None], config.base_resolution).to(device)
            return rh.sample_stage(args.stage, network, rh.encode_portrait(vae, image[None], config), config, low, guidance=1.0)
        planes = torch.cat([sample(x, image) for x, image in zip(items, images)])
        P, fields = config.portrait, [rh.PlaneField(p, decoder) for p in rh.resize_planes(planes, config.resolution)]
        camera = rh.orbit_pose(0, 2).to(device), rh.intrinsics_of(34.0, P).to(device), P, P, config.steps
        views = torch.stack([rh.render_view(field, *camera, rh.grid_for(field, config, device, 4))[0] for field in fields])
        return torch.cat([images, views.permute(0, 3, 1, 2) * 2 - 1], dim=2)
    return data, network, loss, picture

def main(args):
    config = rh.make_config(args.preset, args.set)
    rank, world, device = rh.start(args.device, args.seed)
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.stage == 'vae' and args.vae:
        return rh.write_model(args.runs / 'vae.pt', 'vae', config, rh.load_vae(args.vae, config).state_dict(), 0)
    steps, batch, lr = (getattr(config, f'{ {"upsample": "up"}.get(args.stage, args.stage) }_{x}') for x in ('steps', 'batch', 'lr'))
    data, network, loss_of, picture = prepare(args, config, device)
    ema = rh.EMA(network.to(device), config.ema)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    begin, state_path = 0, args.runs / f'{args.stage}-state.pt'
    if state_path.exists():
        state = rh.read_checkpoint(state_path, f'{args.stage}-state')
        if differing := [k for k in vars(config) if vars(config)[k] != state['config'].get(k)]:
            rh.stop(f'{state_path}: an interrupted run with other settings ({", ".join(differing)}); delete it to start anew')
        network.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        ema.shadow, ema.updates, begin = {k: v.clone().to(device) for k, v in state['ema'].items()}, state['step'], state['step']
    if args.compile:
        network.compile()
    model = nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == 'cuda' else None)
    indices = batches(len(data), max(batch // world, 1), begin, steps, args.seed, rank)
    loader = torch.utils.data.DataLoader(data, batch_sampler=indices, num_workers=args.workers)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 if args.bf16 is not None else device.type == 'cuda')
    began, bar = time.monotonic(), tqdm(loader, initial=begin, total=steps, disable=rank > 0, desc=args.stage)
    for step, items in enumerate(bar, start=begin):
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)        # all that is random follows from the step
        for group in optimizer.param_groups:                                    # warm-up of 2 %, then a cosine to final_lr
            warm = min(1.0, (step + 1) / max(0.02 * steps, 1)) if config.final_lr < 1 else 1.0
            group['lr'] = lr * warm * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        with amp:
            terms = loss_of(model, {k: v.to(device) for k, v in items.items()})
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        ema.update(network)
        if rank == 0 and (step % max(args.log, 1) == 0 or step == steps - 1):
            values = {k: round(v.item(), 6) for k, v in terms.items()}
            bar.set_postfix(values)
            with open(args.runs / f'{args.stage}.jsonl', 'a') as log:
                log.write(json.dumps({'step': step, **values, 'seconds': round(time.monotonic() - began, 1)}) + '\n')
        if rank == 0 and ((step + 1) % max(args.save, 1) == 0 or step == steps - 1):
            rh.write_model(args.runs / f'{args.stage}.pt', args.stage, config, ema.shadow, step + 1)
            rh.write_checkpoint(state_path, f'{args.stage}-state', {'config': vars(config), 'step': step + 1, 'ema': ema.shadow,
                                                                    'model': network.state_dict(), 'optimizer': optimizer.state_dict()})
            with torch.no_grad():
                image = picture(rh.load_model(args.stage, args.runs, device)).clamp(-1, 1).permute(2, 0, 3, 1).flatten(1, 2)
            Image.fromarray(((image + 1) * 127.5).round().byte().cpu().numpy()).save(args.runs / f'{args.stage}.png')
    dist.barrier()

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--stage', required=True, choices=('vae', 'base', 'upsample'))
    p.add_argument('--preset', default='small', choices=rh.PRESETS)
    for folder in ('data', 'fits', 'runs'):
        p.add_argument(f'--{folder}', type=Path, default=Path(folder))
    p.add_argument('--vae', type=Path, help='with --stage vae: published AutoencoderKL weights to take instead of training')
    p.add_argument('--workers', type=int, default=0, help='processes that read data')
    p.add_argument('--log', type=int, default=20, help='steps between log lines')
    p.add_argument('--save', type=int, default=500, help='steps between checkpoints and pictures')
    p.add_argument('--compile', action='store_true', help='torch.compile the network: a minute at the start, faster steps')
    p.add_argument('--bf16', action=argparse.BooleanOptionalAction, help='autocast to bfloat16 (default: on a GPU)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', help='cuda where there is one, else cpu')
    p.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help='override settings of the preset')
    return p.parse_args(argv)

if __name__ == '__main__':
    main(parse())
