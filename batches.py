"""What a training step sees: items from disk, and all that is random about them.

Training meets what will come later: portraits as people have them (`photo`; `disturb` measures what that costs), and low-resolution planes
as the base model makes them (`degrade`). All that is random about a sample follows from the seed, the step and its place in the batch, so a
run that was interrupted sees the same as one that was not, and any number of ranks and workers see the same batches.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import rodinhd as rh


class Images(torch.utils.data.Dataset):
    """All training images of all avatars, for the VAE: portrait (3, P, P) in [-1, 1] and alpha (1, P, P)."""
    def __init__(self, data, config):
        self.size = config.portrait
        self.paths = [frame['path'] for folder in rh.list_avatars(data) for frame in rh.read_frames(folder, 'train')[1]]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return dict(zip(('portrait', 'alpha'), rh.read_portrait(self.paths[i], self.size)))

class Planes(torch.utils.data.Dataset):
    """Fitted planes (3, C, R, R) in [-1, 1] of the avatars in `fits` (with low only `low` (3, C, r, r): 46 K avatars of `paper` are 2.3
    TB), portrait (3, P, P) in [-1, 1], alpha (1, P, P) in 0..1: dicts, read when asked for."""
    def __init__(self, fits, data, config, low=False):
        self.config, self.name = config, 'low' if low else 'planes'
        self.folders = [p for p in rh.list_avatars(data) if (Path(fits) / f'{p.name}.pt').is_file()]
        self.paths = [Path(fits) / f'{p.name}.pt' for p in self.folders]
        if not self.paths:
            rh.stop(f'{fits}: holds no fitted planes of the avatars in {data}; run fit.py --decoder, then fit.py')
        shapes = [tuple(rh.read_checkpoint(self.paths[0], 'planes')[k].shape[1:3]) for k in ('planes', 'low')]
        if shapes != [(config.channels, config.resolution), (config.channels, config.base_resolution)]:
            rh.stop(f'{self.paths[0]}: planes of {shapes} channels and texels do not fit preset {config.preset}; fit again with it')

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        planes = rh.read_checkpoint(self.paths[i], 'planes')[self.name].float().clamp(-1, 1)
        planes.isfinite().all() or rh.stop(f'{self.paths[i]}: holds NaN or infinite values; delete it and fit it again')
        rgb, alpha = rh.read_portrait(rh.portrait_path(self.folders[i]), self.config.portrait)
        return {'x_start': planes, 'portrait': rgb, 'alpha': alpha}

class Draws(torch.utils.data.Dataset):
    """What a step sees. Index (step, j, i): sample j of the step's batch, made of item i by draw(item, i, j), with all that is random."""
    def __init__(self, items, draw, seed):
        self.items, self.draw, self.seed = items, draw, seed

    def __getitem__(self, index):
        step, j, i = index
        torch.manual_seed(((self.seed * 1_000_003 + step) * 4096 + j) % 2 ** 63)
        return self.draw(self.items[i], i, j)

def indices(n, batch, begin, steps, seed, rank, world):
    """Indices of Draws for each step of this rank: every world-th sample of a batch of items below n that follows from seed and step."""
    for step in range(begin, steps):
        picks = np.random.default_rng((seed % 2 ** 32, step)).integers(n, size=batch).tolist()
        yield [(step, j, picks[j]) for j in range(rank, batch, world)]

def collate(samples):
    """Samples to a batch; what only some samples have stays a list."""
    keys = {k for s in samples for k in s}
    return {k: torch.stack(v) if len(v := [s[k] for s in samples if k in s]) == len(samples) and torch.is_tensor(v[0]) else v for k in keys}

def place(rgb, alpha, scale, shift):
    """Premultiplied RGBA (B, 4, P, P) in 0..1 of a portrait (rgb (B, 3, P, P) in [-1, 1], alpha (B, 1, P, P)), shrunk by scale (B,) and
    shifted by shift (B, 2), in image widths."""
    theta = torch.cat([torch.eye(2, device=rgb.device) * scale[:, None, None], 2 * shift[:, :, None]], dim=2)
    rgba = torch.cat([(rgb + 1) / 2 * alpha, alpha], dim=1)
    return F.grid_sample(rgba, F.affine_grid(theta.double(), rgba.shape, align_corners=False).float(), align_corners=False)

def photo(rgb, alpha):
    """Portraits (B, 3, P, P) in [-1, 1] with alpha (B, 1, P, P) -> (B, 3, P, P): shifted by up to 5 %, scaled by up to 10 %, jittered in
    brightness, contrast and saturation, sometimes blurred, on white (half of them), a flat colour or a soft pattern."""
    B, _, P, _ = rgb.shape
    def uniform(low, high):
        return low + (high - low) * torch.rand(B, 1, 1, 1, device=rgb.device)
    rgba = place(rgb, alpha, uniform(0.9, 1.1).flatten(), 0.05 * (2 * torch.rand(B, 2, device=rgb.device) - 1))
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

def disturb(rgb, alpha, photographs, seed):
    """A portrait (3, P, P) in [-1, 1] with alpha (1, P, P) -> (3, P, P): shifted by up to 5 %, scaled by up to 10 %, on a flat colour or,
    every other time where there are any, on a piece of one of the image files `photographs`."""
    P, generator = rgb.shape[-1], torch.Generator().manual_seed(seed)
    scale, x, y, kind, *colour = torch.rand(7, generator=generator).tolist()
    ground = torch.tensor(colour)[:, None, None]
    if photographs and kind < 0.5:
        pick, top, left = (int(torch.randint(n, (), generator=generator)) for n in (len(photographs), P, P))
        ground = (rh.read_portrait(photographs[pick], 2 * P)[0][:, top:top + P, left:left + P] + 1) / 2
    rgba = place(rgb[None], alpha[None], torch.tensor([0.9 + 0.2 * scale]), torch.tensor([[0.1 * x - 0.05, 0.1 * y - 0.05]]))[0]
    return (rgba[:3] + (1 - rgba[3:]) * ground) * 2 - 1

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

def random_patch(folder, path, p):
    """A random p x p crop of a random training view, scaled to a width of 2, 4 or 8 p (Eq. 6): {rays_o, rays_d (p, p, 3), rgb (3, p, p)}"""
    file = rh.read_checkpoint(path, 'planes')
    pick, spread = int(torch.randint(2 ** 30, ())), 2 ** int(1 + torch.multinomial(torch.tensor([0.35, 0.45, 0.2]), 1))
    views = rh.load_views(folder, 'train', box := (file['centre'], file['half']), pick=pick)
    if views.images.shape[1] >= 2 * p * spread:
        views = rh.load_views(folder, 'train', box, views.images.shape[1] // (p * spread), pick=pick)
    height, width = views.images.shape[1:3]
    for _ in range(2):                  # an almost white crop is drawn again, once
        y, x = (int(torch.randint(max(n - p, 0) + 1, ())) for n in (height, width))
        crop = rh.on_white(views.images[0, y:y + p, x:x + p])
        if crop.mean() < 0.7:
            break
    rays = (r.view(height, width, 3)[y:y + p, x:x + p] for r in rh.view_rays(views.c2w[0], views.intrinsics[0], height, width))
    return {**dict(zip(('rays_o', 'rays_d'), rays)), 'rgb': crop.permute(2, 0, 1)}
