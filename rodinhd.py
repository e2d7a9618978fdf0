"""RodinHD: a portrait becomes a 3D avatar (Zhang et al., ECCV 2024), in one file of plain PyTorch.

Eleven chapters follow the data, leaves first: grep -n '^# [0-9]' rodinhd.py prints where they start. README.md walks through them.
Letters: B batch, V views, N rays or points, S samples, C plane channels, R plane resolution (r low), L portrait tokens, T timesteps, G grid
cells a side, M texels. Planes (B, 3, C, R, R) are xy, xz, yz with (width, height) axes in that order. World Z up, faces look along -Y,
content in [-1, 1]^3. Cameras are camera-to-world, Blender/OpenGL axes, pixel centres at +0.5. Images are composited on white.
References: "the paper" is RodinHD (ECCV 2024); Rodin (CVPR 2023); instant-ngp (occupancy grid); EWC; Improved DDPM; Chen 2023; SDXL.
"""
import atexit
import contextlib
import functools
import json
import math
import os
import sys
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import shortcuts


# 1 Configuration ------------------------------------------------------------------------------------------------------
# Every number of the method in one dataclass. The defaults are the paper's model (supplement A, Tables 5 and 6);
# `small` is the model that ships, `tiny` is for tests. They differ in these values alone. A checkpoint carries its Config.
@dataclass
class Config:
    preset: str = 'paper'
    channels: int = 32                  # C of the planes: the first 3/4 feed colour, the last 1/4 density
    resolution: int = 512               # R
    base_resolution: int = 128          # R of the base diffusion model's planes
    decoder_width: int = 128
    grid: int = 128                     # occupancy cells a side
    steps: int = 1024                   # lattice points along the diagonal of the box
    fit_avatars: int = 64               # stage 1: avatars that train the decoder
    inner: int = 5000                   # steps a visit
    outer: int = 30                     # visits an avatar
    fit_steps: int = 25000              # stage 2 (planes only): steps an avatar
    rays: int = 8192                    # rays a step
    lr_planes: float = 2e-3
    lr_decoder: float = 2e-4
    weight_tv: float = 1e-2
    weight_l2: float = 1e-4
    weight_empty: float = 5e-2          # log density at points outside the visual hull, where images have alpha
    weight_iwc: float = 0.1             # lambda of Eq. 3
    weight_decay: float = 0.0
    rescale: float = 0.0                # share of the steps that see randomly rescaled planes (Rodin, section 3.1)
    portrait: int = 256                 # pixels a side
    vae_widths: tuple = (128, 256, 512, 512)    # VAE; the defaults are SDXL's
    vae_layers: int = 2
    vae_latent: int = 4
    vae_scale: float = 0.13025          # latents times this have unit variance
    token_width: int = 512
    pool_width: int = 64
    base_width: int = 192
    base_mult: tuple = (1, 1, 2, 3, 4)
    base_blocks: int = 3
    base_attention: tuple = (32, 16, 8)  # at these plane heights, to the portrait maps y1, y2, y3 in this order
    base_aware: tuple = (128,)          # plane heights with 3D-aware convolution
    roll_out: int = 1                   # 0: the base network sees the planes as channels, and has no 3D-aware convolution
    tokens: str = 'multi'               # attended to: multi (base y1, y2, y3; upsample y1), single (base y3), none: pooled latent alone
    positions: int = 0                  # 1: tokens and the texels that attend carry a fixed encoding of where they are
    aligned: int = 0                    # 1: the upsample network also sees the portrait laid onto the xz plane (shortcuts.py)
    components: int = 0                 # above 0: networks that predict x_start add what training planes have in common (shortcuts.py)
    head_width: int = 64
    base_schedule: str = 'cosine'       # of the paper; linear is DDPM's
    base_timesteps: int = 1000
    base_predict: str = 'noise'         # or x_start, which learns within hours where noise takes days: `small` and `tiny`
    up_width: int = 128
    up_mult: tuple = (1, 2, 4)
    up_blocks: int = 2
    up_body: int = 3                    # [Res, CrossAttn, Res] times this
    up_head_width: int = 32
    up_aware: int = 1                   # 0: plain convolution in place of 3D-aware
    up_degrade: int = 1                 # 0: no condition augmentation
    up_schedule: str = 'sigmoid'
    up_timesteps: int = 100
    condition_drop: float = 0.2         # share of the portraits that training replaces by the null condition
    sample_steps: int = 10
    guidance: float = 1.3
    vae_steps: int = 100000
    vae_batch: int = 32
    vae_lr: float = 1e-4
    base_steps: int = 500000
    base_batch: int = 96
    base_lr: float = 1e-5
    up_steps: int = 500000
    up_batch: int = 32
    up_lr: float = 1e-5
    final_lr: float = 1.0               # below 1: warm-up, then a cosine down to this share of the learning rate
    ema: float = 0.9999
    patch: int = 64                     # side of the rendered patch of the image-level loss
    patches: int = 32                   # samples of a batch that get the image-level loss; 0: none
    patch_grid_updates: int = 16
    perceptual: str = 'vgg'             # network of the image-level loss: vgg (through lpips) or vae (the project's own encoder)

CHOICES = {'base_predict': ('noise', 'x_start'), 'tokens': ('multi', 'single', 'none'), 'perceptual': ('vgg', 'vae'),
           **dict.fromkeys(('base_schedule', 'up_schedule'), ('cosine', 'sigmoid', 'linear')),
           **dict.fromkeys(('positions', 'aligned', 'roll_out', 'up_aware', 'up_degrade'), ('0', '1'))}
PRESETS = {'paper': {},
    'small': dict(channels=16, resolution=128, base_resolution=32, decoder_width=32, grid=64, steps=256, fit_avatars=16, inner=250, outer=6,
        fit_steps=1500, rays=384, lr_planes=3e-2, lr_decoder=2e-3, weight_iwc=3e3, rescale=0.25, vae_widths=(16, 32, 64, 64), vae_layers=1,
        vae_scale=1.0, token_width=64, pool_width=32, base_width=32, base_mult=(1, 2, 3, 4), base_blocks=1, base_attention=(16, 8, 4),
        base_aware=(32,), positions=1, head_width=32, up_width=16, up_blocks=1, up_body=2, vae_steps=3000, vae_batch=8, vae_lr=1e-3,
        base_steps=5500, base_batch=8, base_lr=5e-4, up_steps=1100, up_batch=2, up_lr=1e-3, guidance=1.0, base_predict='x_start', aligned=1,
        components=20, final_lr=0.05, ema=0.995, sample_steps=6, patch=32, patches=1, patch_grid_updates=0, perceptual='vae'),
    'tiny': dict(channels=8, resolution=32, base_resolution=8, decoder_width=32, grid=32, steps=64, fit_avatars=4, inner=100, outer=3,
        fit_steps=150, rays=512, lr_planes=4e-2, lr_decoder=4e-3, rescale=0.25, portrait=64, vae_widths=(8, 8, 16, 16), vae_layers=1,
        vae_scale=1.0, token_width=32, pool_width=16, base_width=32, base_mult=(1, 1, 1), base_blocks=1, base_attention=(8, 4, 2),
        base_aware=(8,), positions=1, head_width=16, up_width=8, up_mult=(1, 2, 2), up_blocks=1, up_body=1, up_head_width=8, vae_steps=60,
        vae_batch=8, vae_lr=3e-3, base_steps=100, base_batch=8, base_lr=2e-3, up_steps=60, up_batch=4, up_lr=2e-3, base_predict='x_start',
        aligned=1, components=2, final_lr=0.1, ema=0.95, patch=16, patches=1, patch_grid_updates=0, perceptual='vae')}

def stop(message):
    """Ends the program with one line on stderr and exit status 1."""
    raise SystemExit(f'error: {message}')

def make_config(preset, overrides=()):
    """Config of a preset with `name=value` overrides, each checked against the field's name and type."""
    values = dict(PRESETS[preset], preset=preset)
    defaults = {f.name: f.default for f in fields(Config)}
    for item in overrides:
        name, _, text = item.partition('=')
        if name not in defaults or name == 'preset':
            stop(f'--set {item}: no such setting; there are {", ".join(defaults)}')
        kind = type(defaults[name])
        try:
            values[name] = tuple(int(v) for v in text.split(',')) if kind is tuple else kind(text)
            least = kind is int and name not in ('components', 'patches', 'patch_grid_updates')
            assert text in CHOICES[name] if name in CHOICES else kind is tuple or least <= values[name] < math.inf
        except (ValueError, AssertionError):
            wanted = CHOICES.get(name) or ('integers with commas between' if kind is tuple else f'a positive {kind.__name__}')
            stop(f'--set {item}: {name} takes {wanted}')
    config = Config(**values)
    if config.channels % 4 or config.resolution % 4 or config.resolution % config.base_resolution or config.portrait % 64:
        stop(f'channels {config.channels} and resolution {config.resolution} must divide by 4, portrait {config.portrait} by 64, '
             f'and resolution by base_resolution {config.base_resolution}')
    return config

# 2 Cameras and rays ---------------------------------------------------------------------------------------------------
# A camera is a 4x4 camera-to-world matrix (x right, y up, looking down -z) and intrinsics (fx, fy, cx, cy) in pixels.
def orbit_pose(azimuth, elevation, distance=4.0, target=(0.0, 0.0, 0.0)):
    """Camera-to-world (4, 4) of a camera that looks at `target`; degrees; azimuth 0 is the front (-Y), 90 is +X; Z is up."""
    a, e = math.radians(azimuth), math.radians(elevation)
    right, back = torch.tensor([[math.cos(a), math.sin(a), 0.0], [math.sin(a) * math.cos(e), -math.cos(a) * math.cos(e), math.sin(e)]])
    pose = torch.stack([right, torch.linalg.cross(back, right), back, distance * back + torch.tensor(target)], dim=1)
    return torch.cat([pose, torch.eye(4)[3:]])

def intrinsics_of(fov, size):
    """Intrinsics (4,) of a square image of `size` pixels with a field of view of `fov` degrees."""
    focal = 0.5 * size / math.tan(math.radians(fov) / 2)
    return torch.tensor([focal, focal, size / 2, size / 2])

def pixel_rays(c2w, intrinsics, x, y):
    """Rays through pixels: c2w (N, 4, 4) or (4, 4), intrinsics (N, 4) or (4,), column x and row y (N,) -> rays_o, rays_d (N, 3)."""
    fx, fy, cx, cy = intrinsics.unbind(-1)
    d = torch.stack([(x + 0.5 - cx) / fx, -(y + 0.5 - cy) / fy, -torch.ones_like(x, dtype=torch.float32)], dim=-1)
    rays_d = F.normalize((c2w[..., :3, :3] * d[..., None, :]).sum(-1), dim=-1)     # not @, which a GPU rounds to TF32
    return c2w[..., :3, 3].expand_as(rays_d), rays_d

def view_rays(c2w, intrinsics, height, width):
    """All rays of one image in row-major order: rays_o, rays_d (height * width, 3)."""
    y, x = torch.meshgrid(torch.arange(height, device=c2w.device), torch.arange(width, device=c2w.device), indexing='ij')
    return pixel_rays(c2w, intrinsics, x.reshape(-1), y.reshape(-1))

def intersect_box(rays_o, rays_d, min_near=0.2):
    """Where rays (N, 3) enter and leave [-1, 1]^3: near, far (N,), near at least `min_near`; a miss has near >= far."""
    d = torch.where(rays_d.abs() < 1e-9, torch.full_like(rays_d, 1e-9), rays_d)
    t0, t1 = (-1 - rays_o) / d, (1 - rays_o) / d
    return torch.minimum(t0, t1).amax(-1).clamp(min=min_near), torch.maximum(t0, t1).amin(-1)

# 3 Avatars on disk ----------------------------------------------------------------------------------------------------
# One folder an avatar, in the formats of NeRF-synthetic (Blender) and instant-ngp; fitted planes in one fp16 file an avatar. What comes
# from a file is checked here, so that the rest can trust it: errors name the file and what to do.
MAX_PIXELS, MAX_JSON = 64 * 2 ** 20, 64 * 2 ** 20           # refuse to decode larger images, to parse longer files
IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')
WHOLE, TRAIN = 'transforms.json', 'transforms_train.json'

class Views(NamedTuple):
    """Posed images of one avatar, in the coordinates of its box (see read_box)."""
    images: torch.Tensor                # (V, H, W, 4) uint8, straight alpha
    c2w: torch.Tensor                   # (V, 4, 4)
    intrinsics: torch.Tensor            # (V, 4)
    has_alpha: bool                     # some pixel is transparent

def on_white(images):
    """uint8 RGBA (..., 4) -> float RGB (..., 3) in 0..1, composited on white (section 5.2 of Rodin's protocol: white everywhere)."""
    images = images.float() / 255
    return images[..., :3] * images[..., 3:] + 1 - images[..., 3:]

def open_image(path):
    """A decoded RGBA PIL image, upright (EXIF orientation applied); one clear line where that is not possible."""
    try:
        Image.MAX_IMAGE_PIXELS = None   # the check below replaces PIL's warning
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                stop(f'{path}: {image.width} x {image.height} pixels are too many; scale the image down to at most 8192 x 8192')
            return ImageOps.exif_transpose(image).convert('RGBA')
    except Exception as error:          # missing or damaged: PIL raises many types
        stop(f'{path}: there is no such image' if isinstance(error, FileNotFoundError) else
             f'{path}: not a readable image ({str(error).splitlines()[0] if str(error) else type(error).__name__})')

def read_portrait(path, size):
    """Any image file -> rgb (3, size, size) in [-1, 1], alpha (1, size, size) in 0..1; squared by its border's pixels (at sides or top)."""
    image = open_image(path)
    min(image.size) >= 16 or stop(f'{path}: {image.width} x {image.height} pixels are too few for a portrait; give at least 16 x 16')
    side = max(image.size)
    left, top = (side - image.width) // 2, side - image.height
    pixels = np.pad(np.asarray(image), ((top, 0), (left, side - image.width - left), (0, 0)), mode='edge')
    square = Image.fromarray(pixels).convert('RGBa').resize((size, size), Image.LANCZOS).convert('RGBA')     # premultiplied meanwhile
    rgba = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
    return rgba[:3] * 2 - 1, rgba[3:]

def portrait_on_white(rgb, alpha):
    """read_portrait's pair, or a batch of it, composited on white, in [-1, 1]."""
    return rgb * alpha + 1 - alpha

def read_transforms(path):
    """The dict of a transforms*.json, with frames that have a path inside the folder and a finite 4x4 matrix."""
    try:
        meta = json.loads(Path(path).read_text(encoding='utf-8') if Path(path).stat().st_size <= MAX_JSON else '')
    except FileNotFoundError:
        stop(f'{path}: there is no such file; an avatar is a folder with transforms.json or transforms_train.json')
    except (OSError, ValueError, RecursionError) as error:
        stop(f'{path}: not readable as JSON ({str(error)[:80]})')
    if not isinstance(meta, dict) or not isinstance(meta.get('frames'), list) or not meta['frames']:
        stop(f'{path}: has no frames; expected a list of {{"file_path", "transform_matrix"}} under "frames"')
    for i, frame in enumerate(meta['frames']):
        if not isinstance(frame, dict) or not isinstance(frame.get('file_path'), str):
            stop(f'{path}: frame {i} has no file_path')
        matrix = np.zeros(0)
        with contextlib.suppress(TypeError, ValueError, ArithmeticError):
            matrix = np.array(frame.get('transform_matrix'), dtype=np.float32)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
            stop(f'{path}: transform_matrix of frame {i} is not a finite 4 x 4 matrix')
        frame.update(transform_matrix=matrix, path=find_image(Path(path), frame['file_path']))
    return meta

def find_image(json_path, name):
    """The image that a file_path means: relative to the JSON's folder, never outside it, with or without an extension."""
    folder = json_path.parent.resolve()
    path = (folder / name.replace('\\', '/')).resolve()
    path.is_relative_to(folder) or stop(f'{json_path}: file_path {name!r} leaves the folder of the avatar')
    candidates = (path, *(path.with_name(path.name + suffix) for suffix in IMAGE_SUFFIXES))
    return next(filter(Path.is_file, candidates), None) or stop(f'{json_path}: image {name!r} is missing')

def read_frames(folder, split):
    """(meta, frames) of `split` 'train' or 'test'; a lone transforms.json gives every eighth frame, from the fifth, to the test."""
    named = Path(folder) / f'transforms_{split}.json'
    if named.is_file() or named.with_name(TRAIN).is_file():
        meta = read_transforms(named) if named.is_file() else {'frames': []}
        return meta, meta['frames']
    meta = read_transforms(named.with_name(WHOLE))
    return meta, [f for i, f in enumerate(meta['frames']) if (i % 8 == 4) == (split == 'test')]

def read_intrinsics(meta, frame, width, height, where):
    """(fx, fy, cx, cy) in pixels of a width x height image, from a frame's own values or the file's; sizes must agree."""
    values = {**meta, **frame}
    def focal(axis, side):
        return float(values[f'fl_{axis}'] if f'fl_{axis}' in values else side / 2 / math.tan(float(values[f'camera_angle_{axis}']) / 2))
    try:
        w, h = float(values.get('w', width)), float(values.get('h', height))
        fx = focal('x', w)
        fy = focal('y', h) if 'fl_y' in values or 'camera_angle_y' in values else fx
        cx, cy = float(values.get('cx', w / 2)), float(values.get('cy', h / 2))
    except KeyError:
        stop(f'{where}: gives neither camera_angle_x nor fl_x')
    except (TypeError, ValueError, ArithmeticError):
        stop(f'{where}: camera_angle_x, fl_x, fl_y, cx, cy, w and h must be numbers')
    if not all(map(math.isfinite, (fx, fy, cx, cy))) or fx <= 0 or fy <= 0:
        stop(f'{where}: the focal length must be positive and finite, not {fx}, {fy}')
    if (w, h) != (width, height):
        stop(f'{where}: says {w:g} x {h:g} pixels, but {frame["path"].name} has {width} x {height}')
    return fx, fy, cx, cy

def load_views(folder, split, box, downscale=1, most=None, pick=None):
    """Views, None if the split is empty. box: of read_box; downscale: an integer, averages; most: so many, evenly spread; pick: one."""
    meta, frames = read_frames(folder, split)
    frames = frames if pick is None else [frames[pick % len(frames)]]
    frames = [frames[i * len(frames) // most] for i in range(most)] if most and len(frames) > most else frames
    images, poses, intrinsics, (centre, half) = [], [], [], box
    for frame in frames:
        image = open_image(frame['path'])
        values = read_intrinsics(meta, frame, *image.size, where=f'{folder}: {split} set')
        if downscale > 1:               # Image.reduce averages; premultiply so that transparent pixels do not bleed
            image = image.convert('RGBa').reduce(downscale).convert('RGBA')
        images.append(np.asarray(image))
        images[-1].shape == images[0].shape or stop(f'{frame["path"]}: {image.width} x {image.height}; other views have another size')
        poses.append(torch.from_numpy(frame['transform_matrix']))
        intrinsics.append([v / downscale for v in values])
    if not images:
        return None
    images, poses = torch.from_numpy(np.stack(images)), torch.stack(poses)
    poses[:, :3, :3] = F.normalize(poses[:, :3, :3], dim=1)
    poses[:, :3, 3] = (poses[:, :3, 3] - centre) / half
    return Views(images, poses, torch.tensor(intrinsics), bool((images[..., 3] < 255).any()))

def read_box(folder):
    """The cube that holds the avatar: (centre (3,), half side) in its files' world, from `aabb` [[x, y, z], [x, y, z]]; else instant-ngp's
    `scale` and `offset` (scale * x + offset is in the unit cube, times aabb_scale); else the visual hull and 4 %."""
    meta, frames = read_frames(folder, 'train')
    if 'aabb' not in meta and 'scale' not in meta:
        return measure_box(folder, torch.from_numpy(np.stack([f['transform_matrix'] for f in frames])))
    with contextlib.suppress(TypeError, ValueError, ArithmeticError, RuntimeError):
        if 'aabb' in meta:
            low, high = torch.tensor(meta['aabb'], dtype=torch.float32)
            box = (low + high) / 2, float((high - low).max() / 2)
        else:
            scale, offset = float(meta['scale']), torch.tensor(meta.get('offset', [0.5] * 3), dtype=torch.float32)
            box = (0.5 - offset) / scale, 0.5 * float(meta.get('aabb_scale', 1)) / scale
        if box[0].shape == (3,) and box[0].isfinite().all() and 0 < box[1] < math.inf:
            return box
    stop(f'{folder}: aabb (or scale and offset) of the transforms file must be finite numbers that span a box')

def measure_box(folder, c2w):
    """read_box where the file names no box. The first guess is the cube around the point nearest to all optical axes, as wide as the
    cameras are far; the visual hull in it, on a 64^3 grid, tells the extent. Without alpha the guess, inside the cameras, stays."""
    axis, position = F.normalize(c2w[:, :3, 2], dim=-1), c2w[:, :3, 3]
    project = torch.eye(3) - axis[:, :, None] * axis[:, None]           # onto the plane that is normal to each optical axis
    centre = torch.linalg.lstsq(project.sum(0), (project @ position[..., None]).sum(0)).solution[:, 0]
    half = float((position - centre).norm(dim=-1).median())
    for _ in range(2):                  # the second pass measures in the first one's box, at a finer cell
        views = load_views(folder, 'train', (centre, half), downscale=1, most=24)
        if not views.has_alpha:
            return centre, 0.6 * half
        cells = visual_hull(views, 64, seen_by=0.5).nonzero().float()                # (cells, 3)
        len(cells) or stop(f'{folder}: the silhouettes of the views have no point in common; are the camera poses right?')
        low, high = cells.amin(0) / 32 - 1, (cells.amax(0) + 1) / 32 - 1
        centre, half = centre + half * (low + high) / 2, half * min(1.0, 1.04 * float((high - low).max()) / 2)
    return centre, half

def portrait_path(folder):
    """portrait.* where there is one, else the training view whose camera stands most in front (level, its z axis along -Y)."""
    found = next(filter(Path.is_file, (Path(folder) / f'portrait{suffix}' for suffix in IMAGE_SUFFIXES)), None)
    return found or max(read_frames(folder, 'train')[1], key=lambda f: -f['transform_matrix'][1, 2])['path']

def list_avatars(data):
    """Folders of avatars in `data`, sorted; `data` itself where it holds one avatar."""
    data = Path(data).absolute()
    if (data / WHOLE).is_file() or (data / TRAIN).is_file():
        return [data]
    found = sorted({p.parent for p in data.glob('*/transforms*.json') if p.name in (WHOLE, TRAIN) and not p.parent.name.startswith('.')})
    return found or stop(f'{data}: holds no avatars; draw some with `python avatars.py`, or give a folder of such scenes with --data')

# 4 Triplane -----------------------------------------------------------------------------------------------------------
# A point is projected onto three axis-aligned planes; the bilinear features found there are averaged (Rodin sums; the mean keeps the
# decoder's input scale). Texels are rows of a channels-last table: one point reads 12 of them, whatever the size of the planes.
AXES = ((0, 1), (0, 2), (1, 2))         # world axes of (width, height) of planes xy, xz, yz

class PlaneLookup(torch.autograd.Function):
    """Weighted sums of table rows: table (M, C), index and weight (N, 12) -> (N, C). Differentiable in the table alone."""
    @staticmethod
    def forward(ctx, table, index, weight):
        ctx.save_for_backward(index, weight)
        ctx.texels = table.shape[0]
        return F.embedding_bag(index, table, per_sample_weights=weight, mode='sum')

    @staticmethod
    def backward(ctx, grad):
        (index, weight), M = ctx.saved_tensors, ctx.texels
        if len(grad) < 8192:            # few points: 12 scatter-adds; many: sorted by texel, so that each texel sums its own
            table = grad.new_zeros(M, grad.shape[1])
            for i, w in zip(index.T.contiguous(), weight.T.contiguous(), strict=True):
                table.index_add_(0, i, grad * w[:, None])
            return table, None, None
        order, count = index.view(-1).int().argsort(), torch.bincount(index.view(-1), minlength=M)
        weight = weight.view(-1)[order]
        return F.embedding_bag(order // 12, grad, count.cumsum(0) - count, mode='sum', per_sample_weights=weight), None, None

def sample_planes(planes, points):
    """Planes (3, C, R, R), points (N, 3) -> (N, C): bilinear (-1 is texel 0, +1 texel R-1; outside is zero), mean over the planes."""
    _, C, R, _ = planes.shape
    if C <= 8:                          # few channels: measured faster
        x = torch.where(points.abs() > 1, 9.0, points.detach()).T
        where = torch.stack([torch.stack([x[u], x[v]], dim=-1) for u, v in AXES])                  # (3, N, 2)
        return F.grid_sample(planes, where[:, None], align_corners=True)[:, :, 0].sum(0).T / 3
    table = planes.permute(0, 2, 3, 1).reshape(3 * R * R, C)            # no copy where planes are channels-last
    x = points.detach().T.contiguous()                                  # (3, N): arithmetic on whole rows
    inside, x = (x.abs() <= 1).to(x), (x.clamp(-1, 1) + 1) * (0.5 * (R - 1))                       # in texels
    low = x.floor().clamp(max=R - 2)
    high = (x - low) * inside           # along each axis, the weight of the upper texel; nothing counts outside
    w, low, index, weight = (inside - high, high), low.long(), [], []
    for k, (u, v) in enumerate(AXES):
        corner = (low[v] + k * R) * R + low[u]                          # (N,)
        index += [corner, corner + 1, corner + R, corner + R + 1]
        weight += [w[j][v] * w[i][u] for j in (0, 1) for i in (0, 1)]
    return PlaneLookup.apply(table, torch.stack(index, 1), torch.stack(weight, 1) / 3)

def roll_out(planes):
    """planes (B, 3, C, R, R) -> (B, C, R, 3R): side by side along the width, so that a 2D network sees them (Rodin, section 3.2)."""
    return torch.cat(planes.unbind(1), dim=-1)

def roll_in(x):
    """Inverse of roll_out: (B, C, R, 3R) -> (B, 3, C, R, R)."""
    return torch.stack(x.chunk(3, dim=-1), dim=1)

def resize_planes(planes, size):
    """planes (..., R, R) -> (..., size, size), so that sample_planes finds the same content at the same point: a triangle filter between
    lattices whose ends coincide, linear upwards and antialiased downwards."""
    R, device = planes.shape[-1], planes.device
    ratio = (R - 1) / max(size - 1, 1)
    at = torch.arange(size, device=device)[:, None] * ratio - torch.arange(R, device=device)       # (size, R), in texels
    weight = (1 - at.abs() / max(ratio, 1.0)).clamp(min=0)
    weight = (weight / weight.sum(1, keepdim=True)).to(planes.dtype)
    return weight @ planes @ weight.T

def total_variation(planes):
    """Sum over planes (3, C, R, R) of the mean squared difference of neighbours along both axes."""
    return 3 * (F.mse_loss(planes[..., 1:, :], planes[..., :-1, :]) + F.mse_loss(planes[..., 1:], planes[..., :-1]))

# 5 Decoder ------------------------------------------------------------------------------------------------------------
# The MLP that all avatars share: queried features are frequency-encoded (Rodin, section 3.1), density comes from the last quarter of
# the channels, colour from the others, a geometry feature and the view direction. 72,321 parameters at the paper's width.
def trunc_exp(x):
    """exp(x) in fp32 whose gradient sees x clamped to [-15, 15] (instant-ngp)."""
    x, fixed = x.float(), x.float().detach()
    return fixed.exp() + fixed.clamp(-15, 15).exp() * (x - fixed)

def frequency_encoding(v):
    """(N, D) -> (N, 5 D): [v, sin v, cos v, sin 2v, cos 2v], no factor of pi; double angles, so one sine and one cosine suffice."""
    s, c = v.sin(), v.cos()
    return torch.cat([v, s, c, 2 * s * c, 1 - 2 * s * s], dim=-1)

class Decoder(nn.Module):
    """Plane features (N, C) and unit view directions (N, 3) -> density sigma (N,) > 0 per box unit and rgb (N, 3) in 0..1. `start`, small
    planes (3, C, R/4, R/4): where the fit of an avatar under this decoder starts, the mean of those that it was trained on."""
    def __init__(self, config):
        super().__init__()
        width, r, self.density_channels = config.decoder_width, config.resolution // 4, config.channels // 4
        self.register_buffer('start', torch.zeros(3, config.channels, r, r))
        self.sigma_net = nn.Sequential(nn.Linear(5 * self.density_channels, width), nn.Softplus(), nn.Linear(width, 1 + width))
        self.color_net = nn.Sequential(nn.Linear(5 * (config.channels - self.density_channels) + width + 15, width, bias=False), nn.ReLU(),
                                       nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, 3, bias=False))

    def forward(self, features, dirs=None):  # without dirs the colour net is skipped: (sigma, None)
        D, last = self.density_channels, self.sigma_net[2]
        hidden = self.sigma_net[:2](frequency_encoding(features[:, -D:]))                          # (N, width)
        if dirs is None:                # one row of the last layer is enough
            return trunc_exp(F.linear(hidden, last.weight[:1], last.bias[:1])[:, 0]), None
        hidden = last(hidden)                                                                      # (N, 1 + width)
        x = torch.cat([frequency_encoding(features[:, :-D]), hidden[:, 1:], frequency_encoding(dirs)], dim=-1)
        return trunc_exp(hidden[:, 0]), torch.sigmoid(self.color_net(x))                           # (N,), (N, 3)

class PlaneField:
    """The radiance field of one avatar: planes (3, C, R, R) read by a decoder. See `render` for the protocol of fields."""
    def __init__(self, planes, decoder):
        self.planes, self.decoder = planes, decoder
        self.density_planes = planes[:, -decoder.density_channels:].contiguous(memory_format=torch.channels_last)

    def __call__(self, points, dirs=None):  # density alone reads a quarter of the channels
        return self.decoder(sample_planes(self.density_planes if dirs is None else self.planes, points), dirs)

# 6 Volume rendering ---------------------------------------------------------------------------------------------------
# Rays are marched with a constant step, masked by an occupancy grid: the samples of instant-ngp's skipping marcher that matter, packed
# (ray_index says whose). A field is any callable field(points (S, 3), dirs (S, 3) or None) -> (sigma (S,), rgb (S, 3) or None).
T_MIN, W_MIN = 1e-4, 3e-5               # a sample counts if the transmittance before it and its weight are at least these
EMPTY, BLOCK = 2e-3, 8                  # density of a fog that nobody sees; lattice points that march tests in one go

class OccupancyGrid:
    """Decayed running maximum of the density in cells x, y, z (supplement A; instant-ngp); never shared by ranks or avatars. hull: bool
    (G, G, G); cells in it start occupied, others stay empty for ever (-1). Threshold: 10 at 1024 steps, else of the same opacity a step."""
    def __init__(self, G, steps, device='cpu', hull=None):
        self.G, self.steps, self.density_threshold = G, steps, 10 * steps / 1024
        self.values = torch.zeros(G, G, G, device=device) if hull is None else torch.where(hull.to(device), self.density_threshold, -1.0)
        self.refresh()

    def refresh(self):
        """Binarises the grid, and widens it by half a block of lattice points for march's first test."""
        threshold = min(self.values.clamp(min=0).mean().item(), self.density_threshold)
        self.occupied = self.values > (threshold if threshold < self.density_threshold else self.density_threshold * 0.999)
        reach = math.ceil(BLOCK / 2 * 2 * math.sqrt(3) / self.steps * self.G / 2 + 1e-6)
        near = self.occupied[None, None].float()
        for kernel in ((2 * reach + 1, 1, 1), (1, 2 * reach + 1, 1), (1, 1, 2 * reach + 1)):
            near = F.max_pool3d(near, kernel, stride=1, padding=[k // 2 for k in kernel])
        self.near_occupied = near[0, 0] > 0

    def cell(self, points):             # flat cell index (N,) of points (N, 3) in the box
        x, y, z = ((points + 1) * (self.G / 2)).long().clamp(0, self.G - 1).unbind(-1)
        return (x * self.G + y) * self.G + z

    @torch.no_grad()
    def update(self, field, generator=None, cells=None):
        """value <- max(0.95 value, sigma at a random point) of flat `cells` (all that may be occupied)."""
        G, values = self.G, self.values.view(-1)
        for part in ((values >= 0).nonzero()[:, 0] if cells is None else cells).split(2 ** 18):
            centre = torch.stack([part // (G * G), part // G % G, part % G], dim=-1) + 0.5
            jitter = torch.rand(len(part), 3, generator=generator).to(centre.device) - 0.5
            values[part] = torch.maximum(0.95 * values[part], field((centre + jitter) * (2 / G) - 1)[0].float())
        self.refresh()

    def some_cells(self, generator):        # a quarter of the cells at random, and as many of the occupied (instant-ngp)
        sets = [mask.view(-1).nonzero()[:, 0] for mask in (self.values >= 0, self.occupied)]
        quarter = (max(len(sets[0]) // 4, 1),)
        return torch.cat([c[torch.randint(len(c), quarter, generator=generator).to(c.device)] for c in sets if len(c)]).unique()

def grid_for(field, config, device='cpu', updates=24, seed=0, threshold=EMPTY):
    """Occupancy grid of a field that no camera has seen, such as generated planes: of all that is denser than `threshold`; at EMPTY nothing
    visible is skipped (supplement A: 16 full updates, 10). Updates from zero; after four, only of empty cells beside occupied ones."""
    grid, generator = OccupancyGrid(config.grid, config.steps, device), torch.Generator().manual_seed(seed)
    grid.density_threshold = threshold
    for i in range(updates):
        beside = F.max_pool3d(grid.occupied[None].float(), 3, 1, 1)[0] > grid.occupied
        grid.update(field, generator, None if i < 4 else beside.view(-1).nonzero()[:, 0])
    return grid

def transmittance(tau, ray_index, rays):
    """Exclusive transmittance T_i = exp(-sum of tau_j over the samples before i on its ray); tau, ray_index (S,), ascending."""
    before = (tau := tau.clamp(max=64)).double().cumsum(0) - tau        # one flat sum: fp32 would lose the later rays' digits
    first = torch.searchsorted(ray_index, torch.arange(rays, device=tau.device)).clamp(max=max(len(tau) - 1, 0))
    return torch.exp(before[first][ray_index] - before).float() if len(tau) else tau

def near_blocks(rays_o, rays_d, steps, grid=None, offset=None):
    """Blocks of 8 lattice points that may hold samples, tested in one go, at their middle, against the widened grid -> ray (K,) and first
    point (K,), in order; of each ray the lattice's start (N,) and number of points (N,), 0 for a miss."""
    delta, (near, far) = 2 * math.sqrt(3) / steps, intersect_box(rays_o, rays_d)
    start = near if offset is None else near + delta * offset
    count = ((far - start) / delta).ceil().clamp(min=0)
    first = torch.arange(0, int(count.amax()) if len(count) else 0, BLOCK, device=start.device)
    ray, block = (first < count[:, None]).nonzero(as_tuple=True)
    if grid is not None:
        middle = start[ray] + (first[block] + (BLOCK - 1) / 2) * delta
        keep = grid.near_occupied.view(-1)[grid.cell(rays_o[ray] + middle[:, None] * rays_d[ray])]
        ray, block = ray[keep], block[keep]
    return ray, first[block], start, count

@torch.no_grad()
def march(rays_o, rays_d, steps, grid=None, offset=None, field=None):
    """Lattice samples of rays (N, 3) in the box and in occupied cells -> ray_index (S,), t (S,), points (S, 3), in order along each ray.
    steps: lattice points a diagonal, delta = 2 sqrt(3) / steps. offset: (N,) in 0..1 shifts a ray's lattice (training). field: only what
    light reaches, found front to back: a ray's first 2 blocks, the next 2, 4, 8 ... until the light is spent."""
    delta, N = 2 * math.sqrt(3) / steps, len(rays_o)
    ray, first, start, count = near_blocks(rays_o, rays_d, steps, grid, offset)
    rank = torch.arange(len(ray), device=ray.device) - torch.searchsorted(ray, torch.arange(N, device=ray.device))[ray]
    reach, parts, passed = 2 if field else len(ray), [], torch.zeros_like(start)                   # passed: tau behind each ray
    while len(ray) or not parts:
        now = rank < reach
        r, k = ray[now][:, None], first[now][:, None] + torch.arange(BLOCK, device=ray.device)         # (blocks, 1), (blocks, 8)
        t = start[r] + k * delta
        points = (rays_o[r] + t[..., None] * rays_d[r]).clamp(-1, 1)                               # (blocks, 8, 3)
        inside = (k < count[r]) & (grid is None or grid.occupied.view(-1)[grid.cell(points)])
        r, t, points = r.expand_as(k)[inside], t[inside], points[inside]
        if field:
            tau = field(points)[0] * delta
            T = transmittance(tau, r, N) * torch.exp(-passed[r])
            lit = (T >= T_MIN) & (T * tau >= W_MIN)
            passed.index_add_(0, r, tau)
            r, t, points, now = r[lit], t[lit], points[lit], now | (passed[ray] > -math.log(T_MIN))
        parts.append((r, t, points))
        ray, first, rank, reach = ray[~now], first[~now], rank[~now], 2 * reach
    ray_index, t, points = (torch.cat(p) for p in zip(*parts, strict=True))
    order = ray_index.sort(stable=True)[1]
    return ray_index[order], t[order], points[order]

def composite(sigma, rgb, t, ray_index, rays, delta, background=1.0):
    """alpha = 1 - exp(-sigma delta), w = T alpha: pixels (N, 3) = sum w rgb + (1 - sum w) background, opacity and depth (N,)."""
    tau = sigma * delta
    weights = transmittance(tau, ray_index, rays) * -torch.expm1(-tau)  # (S,)
    def add(x):
        return x.new_zeros(rays, *x.shape[1:]).index_add(0, ray_index, x)
    opacity = add(weights)
    return add(weights[:, None] * rgb.float()) + (1 - opacity[:, None]) * background, opacity, add(weights * t)

def render(field, rays_o, rays_d, steps, grid=None, offset=None, background=1.0):
    """Rays (N, 3) -> rgb (N, 3), opacity (N,), depth (N,) (weighted sum). Only what march finds lit gets colour and gradients."""
    ray_index, t, points = march(rays_o, rays_d, steps, grid, offset, field)
    return composite(*field(points, rays_d[ray_index]), t, ray_index, len(rays_o), 2 * math.sqrt(3) / steps, background)

@torch.no_grad()
def render_view(field, c2w, intrinsics, height, width, steps, grid=None):
    """An image (height, width, 3) in 0..1 and its opacity (height, width), rendered in chunks of rays."""
    (rays_o, rays_d), chunk = view_rays(c2w, intrinsics, height, width), max(2 ** (20 if c2w.is_cpu else 22) // steps, 1)
    parts = [render(field, o, d, steps, grid)[:2] for o, d in zip(rays_o.split(chunk), rays_d.split(chunk), strict=True)]
    rgb, opacity = (torch.cat(p) for p in zip(*parts, strict=True))
    return rgb.view(height, width, 3).clamp(0, 1), opacity.view(height, width)

# 7 Fitting ------------------------------------------------------------------------------------------------------------
# Images become planes (section 3.1, Algorithm 1). Task replay is fit.py's loop; here is one visit, and identity-aware weight consolidation
# (IWC, Eq. 3): it pulls the decoder to what the avatar's last visit left, as far as the Fisher information says that the avatar needs it.
def near_silhouette(image, radius):
    """Pixels (H, W) of an RGBA image (H, W, 4) within a square of `radius` pixels around one that is not transparent."""
    wide = F.max_pool2d((image[..., 3] > 0).float()[None], (1, 2 * radius + 1), 1, (0, radius))
    return F.max_pool2d(wide, (2 * radius + 1, 1), 1, (radius, 0))[0] > 0

@torch.no_grad()
def visual_hull(views, G, seen_by=0.0):
    """Cells (G, G, G) of the box, save those whose disc is transparent in some image, or that less than `seen_by` of the views see."""
    axis = (torch.arange(G) + 0.5) * (2 / G) - 1
    cells = torch.stack(torch.meshgrid(axis, axis, axis, indexing='ij'), dim=-1).view(-1, 3)       # (G^3, 3)
    alive, count, (height, width) = torch.arange(len(cells)), torch.zeros(len(cells)), views.images.shape[1:3]
    for image, c2w, (fx, fy, cx, cy) in zip(views.images, views.c2w, views.intrinsics.tolist(), strict=True):
        local = (cells[alive] - c2w[:3, 3]) @ c2w[:3, :3]               # camera coordinates, looking down -z
        depth = (-local[:, 2]).clamp(min=1e-3)
        x, y = fx * local[:, 0] / depth + cx, cy - fy * local[:, 1] / depth
        near = max((mean := float(depth.mean().nan_to_num())) - 1, mean / 2, 0.1)                  # a cell's disc where it is large
        radius = min(int(fx * math.sqrt(3) / G / near) + 1, 64)
        seen = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (local[:, 2] < 0)
        count[alive] += seen / len(views.images)
        flat = y.long().clamp(0, height - 1) * width + x.long().clamp(0, width - 1)
        alive = alive[~seen | near_silhouette(image, radius).view(-1)[flat]]
    return torch.zeros(G ** 3, dtype=torch.bool).index_fill_(0, alive[count[alive] >= seen_by - 1e-4], True).view(G, G, G)

class Rays:
    """Random training rays over all views. A share `edges` is of pixels within 2 of the silhouette's edge, where most of the error is; the
    others of pixels within `margin` of the silhouette: what lies further out misses the visual hull and teaches nothing."""
    def __init__(self, views, device, margin, edges=0.5):
        self.size, self.edges, self.pixels = views.images.shape[1:3], edges, views.images.view(-1, 4).to(device)
        self.c2w, self.intrinsics = views.c2w.to(device), views.intrinsics.to(device)
        near = [near_silhouette(image, margin) for image in views.images]
        edge = [near_silhouette(image, 2) & near_silhouette(255 - image, 2) for image in views.images]
        self.near, self.edge = (torch.stack(masks).view(-1).nonzero()[:, 0].to(device, torch.int32) for masks in (near, edge))
        len(self.near) or stop('all views of an avatar are fully transparent')

    def draw(self, n, generator):
        """rays_o, rays_d (n, 3) and colours on white (n, 3)."""
        device, (height, width), edges = self.pixels.device, self.size, int(self.edges * n) if len(self.edge) else 0
        flat = torch.cat([index[torch.randint(len(index), (k,), generator=generator).to(device)]
                          for index, k in ((self.near, n - edges), (self.edge, edges)) if k]).long()
        view, y, x = flat // (height * width), flat // width % height, flat % width
        return *pixel_rays(self.c2w[view], self.intrinsics[view], x, y), on_white(self.pixels[flat])

def consolidation(decoder, memory):
    """1/2 sum of fisher (w - anchor)^2 (Eq. 3 without lambda); memory: {'fisher', 'anchor'}, each {parameter name: tensor}."""
    return 0.5 * sum((memory['fisher'][n] * (p - memory['anchor'][n]).square()).sum() for n, p in decoder.named_parameters())

def fisher_information(decoder, losses):
    """{name: mean squared gradient of the data loss} over several batches (scalar losses; Algorithm 1's single one is noisy), if finite."""
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    batches = [torch.autograd.grad(loss, parameters) for loss in losses]
    batches = [grads for grads in batches if all(g.isfinite().all() for g in grads)]
    fisher = [sum((grads[i].square() for grads in batches), torch.zeros_like(p)) for i, p in enumerate(parameters)]
    return {n: f / max(len(batches), 1) for n, f in zip(names, fisher, strict=True)}

def fit_avatar(views, planes, decoder, config, *, span=(0.0, 1.0), steps=None, seconds=None,
               decoder_optimizer=None, memory=None, sync=lambda done: None, seed=0, report=None):
    """One visit to an avatar: fits planes (3, C, r, r), and the decoder where `decoder_optimizer` is given -> planes (3, C, R, R) in [-1,
    1], grid, new memory (None without decoder_optimizer). span: the visit's part of the whole fit (size of the planes and learning rate
    follow); `steps` steps, or about `seconds`. memory: IWC state of the last visit. sync(share done): before each step of the decoder."""
    device, generator = next(decoder.parameters()).device, torch.Generator().manual_seed(seed)
    reach = 2 * math.sqrt(3) / config.grid * float(views.intrinsics[:, 0].max() / views.c2w[:, :3, 3].norm(dim=-1).min().clamp(min=0.5))
    rays = Rays(views, device, margin=6 + int(reach), edges=0.5 if decoder_optimizer is None else 0.0)     # pixels that may see the hull
    grid = OccupancyGrid(config.grid, config.steps, device, visual_hull(views, config.grid) if views.has_alpha else None)
    began, step, table, finite, finite_decoder = time.monotonic(), 0, None, Finite('fit'), Finite('decoder')
    def data_loss(planes):
        rays_o, rays_d, target = rays.draw(config.rays, generator)
        shift = torch.rand(len(rays_o), generator=generator).to(device)
        return F.mse_loss(render(PlaneField(planes, decoder), rays_o, rays_d, config.steps, grid, shift)[0], target)

    while (done := step / steps if steps else (time.monotonic() - began) / seconds) < 1:
        progress = span[0] + (span[1] - span[0]) * done
        size = config.resolution // (4 if progress < 0.1 else 2 if progress < 0.3 else 1)          # coarse to fine
        if table is None or table.shape[1] != size:                     # the first step, or the planes double
            source = planes if table is None else table.detach().permute(0, 3, 1, 2)
            table = resize_planes(source.to(device).float(), size).permute(0, 2, 3, 1).contiguous().requires_grad_()
            optimizer = torch.optim.Adam([table], betas=(0.9, 0.99), fused=True)
        view = table.permute(0, 3, 1, 2)                                # (3, C, size, size), channels-last
        optimizer.param_groups[0]['lr'] = config.lr_planes * 0.05 ** progress
        if step % 16 == 0:
            grid.update(PlaneField(view.detach(), decoder), generator, None if step < 256 else grid.some_cells(generator))
        shrink, low = torch.rand((), generator=generator) < config.rescale, int(torch.randint(size // 4, size, (), generator=generator))
        terms = {'rgb': data_loss(resize_planes(view, low) if shrink else view)}
        if step % 8 == 0:               # regularisers cost as much as the rays do: every eighth step, eight times
            terms['tv'] = 8 * config.weight_tv * total_variation(view)
            terms['l2'] = 8 * config.weight_l2 * 3 * view.square().mean()
            if views.has_alpha:         # generated planes are rendered without a hull: keep empty cells empty
                cell = torch.randint(config.grid, (4096, 3), generator=generator).to(device)
                points = (cell + torch.rand(4096, 3, generator=generator).to(device)) * (2 / config.grid) - 1
                sigma = PlaneField(view, decoder)(points)[0]            # a push on log density would harden a decoder in the making
                excess = torch.log(sigma.clamp(min=EMPTY) / EMPTY) if decoder_optimizer is None else 0.2 * torch.log1p(sigma)
                terms['empty'] = 8 * config.weight_empty * (excess * (grid.values[cell.unbind(1)] < 0)).mean()
        if memory is not None:
            terms['iwc'] = config.weight_iwc * consolidation(decoder, memory)
        optimizer.zero_grad()
        (loss := sum(terms.values())).backward()
        if finite(loss, table.grad):
            optimizer.step()
            table.data.clamp_(-1, 1)
        if decoder_optimizer is not None:
            sync(done)
            if finite_decoder(*(p.grad for p in decoder.parameters() if p.grad is not None)):                 # the same on all ranks
                decoder_optimizer.step()
            decoder_optimizer.zero_grad()
        report and step % 50 == 0 and report(done, {k: v.item() for k, v in terms.items()})
        step += 1
    planes = table.detach().permute(0, 3, 1, 2)
    if decoder_optimizer is None:
        return planes, grid, None
    fisher = fisher_information(decoder, (data_loss(planes) for _ in range(16)))
    return planes, grid, {'fisher': fisher, 'anchor': {n: p.detach().clone() for n, p in decoder.named_parameters()}}

def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in 0..1."""
    return -10 * math.log10(max(F.mse_loss(a, b).item(), 1e-10))

# 8 Portrait features --------------------------------------------------------------------------------------------------
# A frozen VAE turns the portrait into a latent (then a vector that joins the time embedding) and three maps (attention tokens, fine to
# coarse; section 3.3), once, as t plays no part. Letters: E width of the time embedding, W of a token, P pixels a side of the portrait.
conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)

def norm(channels, eps=1e-5):
    """GroupNorm in 32 groups, as in the published models; 32 channels and fewer get 8 groups: one of one channel forgets its mean."""
    return nn.GroupNorm(math.gcd(channels, 32 if channels > 32 else 8), channels, eps)

def zero(module):
    """Zeroes a module's parameters: a residual branch that ends in it starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module

def resized(channels, up, **mode):
    """Doubles height and width, or halves them (padding only right and bottom, as published VAE weights expect); convolves."""
    return nn.Sequential(OrderedDict(resize=nn.Upsample(scale_factor=2, **mode), conv=conv(channels, channels)) if up else
                         OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2)))

class ResnetBlock(nn.Module):
    """Residual block of the VAE (emb 0) and of the upsample network (adds the time embedding; `second` is 3D-aware)."""
    def __init__(self, c_in, c_out, emb=0, second=conv):
        super().__init__()
        self.norm1, self.conv1, self.emb = norm(c_in, 1e-6), conv(c_in, c_out), nn.Linear(emb, c_out) if emb else None
        self.norm2, self.conv2 = norm(c_out, 1e-6), second(c_out, c_out)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h if self.emb is None else h + self.emb(F.silu(emb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))

class VAEAttention(nn.Module):
    """Self-attention with a single head over all pixels."""
    def __init__(self, channels):
        super().__init__()
        self.group_norm = norm(channels, 1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))      # in a list for the sake of its name, to_out.0

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]                              # (B, 1, pixels, channels)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h)[:, 0].transpose(1, 2).reshape(x.shape)

class VAEBlock(nn.Module):
    """Residual blocks at one resolution, then a halving, a doubling or neither; the middle has attention after the first."""
    def __init__(self, c_in, c_out, layers, down=False, up=False, middle=False):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_out if i else c_in, c_out) for i in range(layers))
        self.attentions = nn.ModuleList([VAEAttention(c_out)] if middle else [])
        self.downsamplers = nn.ModuleList([resized(c_out, up=False)] if down else [])
        self.upsamplers = nn.ModuleList([resized(c_out, up=True)] if up else [])

    def forward(self, x):
        for layer in (self.resnets[0], *self.attentions, *self.resnets[1:], *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x

class VAE(nn.Module):
    """Image autoencoder with the names and shapes of diffusers' AutoencoderKL; at `paper` SDXL's (83,653,863 parameters).
    Images are (B, 3, P, P) in [-1, 1], P a multiple of 8; latents (B, 4, P/8, P/8), not yet times vae_scale."""
    def __init__(self, config):
        super().__init__()
        widths, layers, latent = config.vae_widths, config.vae_layers, config.vae_latent
        assert len(widths) == 4, f'the VAE has four levels, vae_widths has {len(widths)}'
        top, *_, bottom = widths
        self.encoder = nn.Sequential(OrderedDict(
            conv_in=conv(3, top), down_blocks=nn.Sequential(
                *(VAEBlock(*c, layers, down=i < 3) for i, c in enumerate(zip((top, *widths), widths)))),
            mid_block=VAEBlock(bottom, bottom, 2, middle=True),
            conv_norm_out=norm(bottom, 1e-6), silu=nn.SiLU(), conv_out=conv(bottom, 2 * latent)))
        self.decoder = nn.Sequential(OrderedDict(
            conv_in=conv(latent, bottom), mid_block=VAEBlock(bottom, bottom, 2, middle=True), up_blocks=nn.Sequential(
                *(VAEBlock(*c, layers + 1, up=i < 3) for i, c in enumerate(zip((bottom, *widths[::-1]), widths[::-1])))),
            conv_norm_out=norm(top, 1e-6), silu=nn.SiLU(), conv_out=conv(top, 3)))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1), nn.Conv2d(latent, latent, 1)

    def features(self, images):
        """The maps y1, y2, y3 at P/2, P/4, P/8, widths vae_widths[:3]. Also the features of a perceptual loss."""
        x, maps = self.encoder.conv_in(images), []
        for block in self.encoder.down_blocks[:3]:
            maps.append(x := block(x))
        return maps

    def encode(self, images):
        """Images to posterior mean and log variance (B, 4, P/8, P/8), and `features`."""
        maps = self.features(images)
        x = self.encoder[2:](self.encoder.down_blocks[3](maps[-1]))                             # from mid_block on
        mean, logvar = self.quant_conv(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20), maps

    def forward(self, images, noise):
        """Training: images and noise (B, 4, P/8, P/8) to a reconstruction from a posterior sample, mean, log variance."""
        mean, logvar, _ = self.encode(images)
        return self.decode(mean + (logvar / 2).exp() * noise), mean, logvar

    def decode(self, latent):               # to images (B, 3, P, P), not clamped
        return self.decoder(self.post_quant_conv(latent))

def load_vae(path, config):
    """A VAE with published AutoencoderKL weights (.safetensors, .bin, .pt); stops with one line where they do not fit."""
    try:
        if str(path).endswith('.safetensors'):
            from safetensors.torch import load_file as load
        else:
            load = functools.partial(torch.load, map_location='cpu', weights_only=True)
        state, vae = load(path), VAE(config)
        for old, new in (('query', 'to_q'), ('key', 'to_k'), ('value', 'to_v'), ('proj_attn', 'to_out.0')):     # names until 2023,
            state = {n.replace(f'.{old}.', f'.{new}.'): x for n, x in state.items()}
        vae.load_state_dict({n: x[..., 0, 0] if '.attentions.' in n and x.ndim == 4 else x for n, x in state.items()})     # and 1x1 convs
        return vae
    except ImportError:
        stop(f'{path} needs the safetensors package: pip install safetensors')
    except Exception as error:          # missing, damaged or of another model: many types
        stop(f'{path}: not weights of this VAE ({type(error).__name__}: {" ".join(str(error).split())[:160]})')

class Portrait(NamedTuple):
    """What a network is conditioned on; the upsample network needs `lr` too."""
    latent: torch.Tensor                    # (B, 4, P/8, P/8), posterior mean times vae_scale
    maps: list                              # y1, y2, y3
    lr: torch.Tensor | None = None          # low-resolution planes (B, 3, C, r, r); never dropped

class Condition(NamedTuple):
    """A Portrait after a network's own layers: all that does not depend on t."""
    pooled: torch.Tensor                    # (B, E)
    keys_values: dict                       # of each layer that attends to the portrait: (B, heads, L, head), twice
    lr: torch.Tensor | None = None          # enlarged and rolled out, (B, C, R, 3R)
    front: torch.Tensor | None = None       # what is added to the first features, (B, c, R, 3R)
    prior: torch.Tensor | None = None       # what is added to x_start, (B, 3, C, R, R)

@torch.no_grad()
def encode_portrait(vae, images, config):
    """Images (B, 3, P, P) in [-1, 1] to a Portrait. The posterior's mean, not a sample: the same every time."""
    mean, _, maps = vae.encode(images)
    return Portrait(mean * config.vae_scale, maps)

def drop(portrait, keep=(False,)):
    """Zeroes latent and maps where keep (B,) is false, by default all: the null condition. Its tokens are all alike, a GroupNorm's bias."""
    latent, *maps = (x * torch.as_tensor(keep).to(x).view(-1, 1, 1, 1) for x in (portrait.latent, *portrait.maps))
    return portrait._replace(latent=latent, maps=maps)

def join(a, b):
    """Two Conditions as one batch, for guidance."""
    keys_values = {layer: [torch.cat(pair) for pair in zip(kv, b.keys_values[layer])] for layer, kv in a.keys_values.items()}
    return Condition(torch.cat([a.pooled, b.pooled]), keys_values, *(x if x is None else torch.cat([x, y]) for x, y in zip(a[2:], b[2:])))

class PortraitTokens(nn.Module):
    """Some of the maps y1, y2, y3 (numbers in `used`), each cut into 8 x 8 patches: {number: tokens (B, 64, W)}."""
    def __init__(self, config, used):
        super().__init__()
        assert config.portrait % 64 == 0, f'portrait {config.portrait} is no multiple of 64, so y3 has no 8 x 8 patches'
        self.used, self.positions, sizes = used, config.positions, [config.portrait // n for n in (16, 32, 64)]
        self.patches = nn.ModuleList(nn.Sequential(norm(config.vae_widths[i]), nn.Conv2d(config.vae_widths[i], config.token_width, sizes[i],
                                                                                         stride=sizes[i], bias=False)) for i in used)

    def forward(self, maps):
        tokens = {i: patch(maps[i]).flatten(2).transpose(1, 2) for i, patch in zip(self.used, self.patches)}
        return {i: x + position_encoding(8, 8, x.shape[2]).to(x) for i, x in tokens.items()} if self.positions else tokens

class PooledEmbedding(nn.Module):
    """The latent as one vector (B, E): its four patches, attended to (8 heads) by their mean plus a learned vector."""
    def __init__(self, config, emb):
        super().__init__()
        width, patch = config.pool_width, config.portrait // 16
        assert width % 8 == 0, f'pool_width {width} is no multiple of 8 heads'
        self.patch = nn.Conv2d(config.vae_latent, width, patch, stride=patch, bias=False)
        self.norm, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(emb)
        self.query = nn.Parameter(torch.randn(width) / width ** 0.5)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, n) for n in (width, width, width, emb))

    def forward(self, latent):
        tokens = self.norm(self.patch(latent).flatten(2).transpose(1, 2))                       # (B, 4, width)
        query = tokens.mean(1, keepdim=True) + self.query                                       # (B, 1, width)
        tokens = torch.cat([query, tokens], 1)                                                  # (B, 5, width)
        q, k, v = (x.unflatten(2, (8, -1)).transpose(1, 2) for x in (self.q(query), self.k(tokens), self.v(tokens)))
        return self.norm_out(self.proj(F.scaled_dot_product_attention(q, k, v).flatten(1)))     # (B, E)

# 9 3D-aware U-Net -----------------------------------------------------------------------------------------------------
# Two U-Nets over planes side by side (supplement A). 3D-aware convolution (Rodin, section 3.2) shows each texel the two other planes,
# averaged over the axis that its own lacks. net(x, t, condition): t (B,) in [0, 1000], a Portrait or, faster when repeated, a Condition.
def timestep_embedding(t, width):
    """Cosines, then sines, of t (B,) at width / 2 frequencies from 1 down to almost 1/10000: (B, width)."""
    angles = t.float()[:, None] * torch.exp(-math.log(10000) / (width // 2) * torch.arange(width // 2, device=t.device))
    return torch.cat([angles.cos(), angles.sin()], dim=1)

def position_encoding(rows, columns, width):
    """Where the cells of an image are: (rows * columns, width), the timestep_embedding of row and of column, each from 0 to 100."""
    row, column = torch.meshgrid(torch.linspace(0, 100, rows), torch.linspace(0, 100, columns), indexing='ij')
    return torch.cat([timestep_embedding(x.reshape(-1), width // 2) for x in (row, column)], dim=1)

class AwareConv(nn.Module):
    """3D-aware convolution, (B, c_in, H, 3H) to (B, c_out, H, 3H), H at least 2; starts at zero. Plane p has its own 3 x 3 convolution of 3
    c_in channels: the three planes, the two others averaged over the axis that p lacks. Such a mean is constant along p's other axis, so
    its zero-padded convolution has three distinct lines, first, last and all between, each a 1D convolution: the same for less."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.convs = nn.ModuleList(zero(conv(3 * c_in, c_out)) for _ in range(3))

    def forward(self, x):
        return torch.cat([self.convolve(p, x.chunk(3, dim=3)) for p in range(3)], dim=3)        # planes: 3 x (B, c_in, H, H)

    def convolve(self, p, planes):
        weights = self.convs[p].weight.chunk(3, dim=1)                                          # 3 x (c_out, c_in, 3, 3)
        out = F.conv2d(planes[p], weights[p], self.convs[p].bias, padding=1)                    # (B, c_out, H, H)
        for q in {0, 1, 2} - {p}:
            shared, = set(AXES[p]) & set(AXES[q])
            across = 2 + AXES[p].index(shared)                          # the dimension of p along which q's share is constant
            before, at, after = weights[q].unbind(across)               # kernels of the lines before, at and after the one that is made
            kernels = torch.cat([at + after, before + at + after, before + at])
            lines = F.conv1d(planes[q].mean(2 + AXES[q].index(shared)), kernels, padding=1)     # (B, 3 c_out, H)
            first, between, last = lines.unsqueeze(across).chunk(3, dim=1)
            out = out + torch.cat([first, between.expand_as(out).narrow(across, 1, out.shape[2] - 2), last], across)
        return out

class ResBlock(nn.Module):
    """Residual block of the base network: the time embedding scales and shifts; `resample` is applied before the first conv."""
    def __init__(self, c_in, c_out, emb, aware=False, resample=None):
        super().__init__()
        self.norm1, self.conv1, self.emb = norm(c_in), conv(c_in, c_out), nn.Linear(emb, 2 * c_out)
        self.norm2, self.conv2 = norm(c_out), AwareConv(c_out, c_out) if aware else zero(conv(c_out, c_out))
        self.skip, self.resample = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity(), resample or nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        return self.skip(self.resample(x)) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))

class Attention(nn.Module):
    """Texels (B, c, H, 3H) attend to tokens of portrait map number `map`, if any, and, if `joint`, to all texels, in one softmax."""
    def __init__(self, channels, head, token_width, joint, map, positions=0):
        super().__init__()
        assert channels % head == 0, f'{channels} channels are no multiple of the head width {head}'
        self.head, self.map, self.positions, self.norm = head, map, positions, norm(channels)
        self.qkv, self.proj = nn.Linear(channels, (3 if joint else 1) * channels), zero(nn.Linear(channels, channels))
        self.norm_tokens = nn.Identity() if joint else norm(token_width)
        self.kv = None if map is None else nn.Linear(token_width, 2 * channels)

    def split(self, x):                     # (B, N, parts c), channels by head, then part, to parts (B, heads, N, head)
        return [part.transpose(1, 2) for part in x.unflatten(2, (self.proj.in_features // self.head, -1, self.head)).unbind(3)]

    def keys_values(self, tokens):          # (B, L, W) to (B, heads, L, head), twice
        return self.split(self.kv(self.norm_tokens(tokens.transpose(1, 2)).transpose(1, 2)))

    def forward(self, x, keys_values=()):
        h = self.norm(x).flatten(2).transpose(1, 2)                                             # (B, 3HH, c)
        h = h + position_encoding(*x.shape[2:], x.shape[1]).to(h) if self.positions else h
        q, *own = self.split(self.qkv(h))                                                       # (B, heads, 3HH, head)
        k, v = (torch.cat(parts, 2) for parts in zip(*filter(len, (keys_values, own))))         # (B, heads, L + 3HH, head)
        h = F.scaled_dot_product_attention(q, k, v)                                             # (B, heads, 3HH, head)
        return x + self.proj(h.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)

class UNet(nn.Module):
    """What both networks share. maps: {plane height: number of the map seen there}; components: of a Prior; `checkpoint`: recompute."""
    def __init__(self, config, width, mult, blocks, body, resolution, maps, c, components):
        super().__init__()
        assert resolution % 2 ** (len(mult) - 1) == 0, f'planes of {resolution} cannot be halved {len(mult) - 1} times'
        self.config, self.width, self.emb, self.maps, self.checkpoint = config, width, 4 * width, maps, False
        self.time = nn.Sequential(nn.Linear(width, self.emb), nn.SiLU(), nn.Linear(self.emb, self.emb))
        self.tokens, self.pooled = PortraitTokens(config, sorted({*maps.values()} - {None})), PooledEmbedding(config, self.emb)
        self.prior = None if components is None else shortcuts.Prior(config, resolution, components)
        self.encoder, self.decoder, skips, height = nn.ModuleList(), nn.ModuleList(), [c], resolution
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.encoder.append(nn.ModuleList(self.step(c, m * width, height)))
                skips.append(c := m * width)
            if level < len(mult) - 1:
                self.encoder.append(nn.ModuleList([self.resample(c, up=False)]))
                skips.append(c)
                height //= 2
        self.middle = nn.ModuleList(layer for _ in range(body) for layer in                     # Res, Attention, Res
                                    (*self.step(c, c, height, middle=True), self.step(c, c, height)[0]))
        for level, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.decoder.append(nn.ModuleList(self.step(c + skips.pop(), c := m * width, height)))
            if level:
                self.decoder[-1].append(self.resample(c, up=True))
                height *= 2

    def condition(self, portrait):
        """A Portrait as this network's Condition: all that is the same at every t."""
        tokens = self.tokens(portrait.maps)
        keys_values = {layer: layer.keys_values(tokens[layer.map]) for layer in self.modules() if isinstance(layer, Attention) and layer.kv}
        return Condition(self.pooled(portrait.latent), keys_values, prior=self.prior and self.prior(portrait.latent))

    def run(self, layers, x, emb, kv):      # x through layers, each of which is given what it takes besides
        for layer in layers:
            also = (emb,) if isinstance(layer, (ResBlock, ResnetBlock)) else (kv.get(layer, ()),) if isinstance(layer, Attention) else ()
            x = checkpoint(layer, x, *also, use_reentrant=False) if self.checkpoint and self.training else layer(x, *also)
        return x

    def u(self, h, emb, kv):                # down, through the middle, and up again with skip connections
        skips = [h]
        for layers in self.encoder:
            skips.append(h := self.run(layers, h, emb, kv))
        h = self.run(self.middle, h, emb, kv)
        for layers in self.decoder:
            h = self.run(layers, torch.cat([h, skips.pop()], dim=1), emb, kv)
        return h

    def forward(self, x, t, condition):
        condition = self.condition(condition) if isinstance(condition, Portrait) else condition
        emb = self.time(timestep_embedding(t, self.width)) + condition.pooled                   # (B, E)
        out = roll_in(self.planes(roll_out(x), emb, *condition[1:4]))                           # (B, 3, C or 2C, R, R)
        return out if condition.prior is None else out + F.pad(condition.prior, (0, 0, 0, 0, 0, out.shape[2] - x.shape[2]))

class BaseUNet(UNet):
    """Base network (supplement A, Table 5; 366,823,360 parameters at `paper`): planes (B, 3, C, r, r) to noise, variance (2C)."""
    def __init__(self, config):
        c, fold = config.base_width * config.base_mult[0], 1 if config.roll_out else 3
        maps = {'multi': (0, 1, 2), 'single': (2, 2, 2), 'none': (None,) * 3}[config.tokens]
        super().__init__(config, config.base_width, config.base_mult, config.base_blocks, 1, config.base_resolution,
                         dict(zip(config.base_attention, maps)), c, (config.base_predict == 'x_start' and config.components) or None)
        self.conv_in, self.norm_out, self.conv_out = conv(fold * config.channels, c), norm(c), zero(conv(c, 2 * fold * config.channels))

    def step(self, c_in, c_out, height, middle=False):          # where there is no map, texels attend to one another alone
        res, c = ResBlock(c_in, c_out, self.emb, aware=bool(self.config.roll_out) and height in self.config.base_aware), self.config
        attends = middle or height in self.maps
        return [res, Attention(c_out, c.head_width, c.token_width, True, self.maps.get(height), c.positions)] if attends else [res]

    def resample(self, c, up):
        return ResBlock(c, c, self.emb, resample=nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2))

    def planes(self, x, emb, kv, *_):
        x = x if self.config.roll_out else torch.cat(x.chunk(3, dim=3), dim=1)                  # (B, C, r, 3r) or (B, 3C, r, r)
        x = self.conv_out(F.silu(self.norm_out(self.u(self.conv_in(x), emb, kv))))
        return x if self.config.roll_out else torch.cat(x.chunk(3, dim=1), dim=3)               # (B, 2C, r, 3r)

class UpsampleUNet(UNet):
    """The upsample network (supplement A, Table 6): noisy planes and a Portrait with `lr` to x_start, (B, 3, C, R, R) both. 337,301,920
    parameters at `paper`; the released code, which attends to the latent's 4 patches instead of y1's 64 tokens, has 320,557,728."""
    def __init__(self, config):
        width, planes, lowest = config.up_width, config.channels, config.resolution // 2 ** (len(config.up_mult) - 1)
        self.second = AwareConv if config.up_aware else lambda a, b: zero(conv(a, b))           # both start at zero
        super().__init__(config, width, config.up_mult, config.up_blocks, config.up_body, config.resolution,
                         {} if config.tokens == 'none' else {lowest: 0}, width + planes, 0 if config.components else None)
        self.front = zero(conv(config.vae_latent + config.vae_widths[0], width)) if config.aligned else None
        self.conv_in, self.head = conv(planes, width), nn.ModuleList(self.step(width, width))
        self.tail = nn.ModuleList(self.step(width * config.up_mult[0] + width + planes, width) + self.step(width, planes))
        self.out = ResnetBlock(2 * planes, planes, second=self.second)
        with torch.no_grad():               # the network starts as the identity on the enlarged planes (ours; saves it the first epochs)
            nn.init.zeros_(self.out.conv_shortcut.bias)
            self.out.conv_shortcut.weight[..., 0, 0] = torch.cat([torch.zeros(planes, planes), torch.eye(planes)], dim=1)

    def step(self, c_in, c_out, height=None, middle=False):
        res, c = ResnetBlock(c_in, c_out, self.emb, second=self.second), self.config
        return [res, Attention(c_out, c.up_head_width, c.token_width, False, 0, c.positions)] if middle and self.maps else [res]

    def resample(self, c, up):
        return resized(c, up, mode='bilinear', align_corners=True)

    def condition(self, portrait):
        """A Portrait with `lr`: the planes are enlarged (bicubic) here, once."""
        lr = F.interpolate(portrait.lr.flatten(1, 2), size=self.config.resolution, mode='bicubic', align_corners=True)
        front = self.front and F.pad(self.front(shortcuts.front_features(portrait, R := self.config.resolution)), (R, R))
        return super().condition(portrait)._replace(lr=roll_out(lr.unflatten(1, portrait.lr.shape[1:3])), front=front)

    def planes(self, x, emb, kv, lr, front):
        h = self.run(self.head, self.conv_in(x) + (0 if front is None else front), emb, kv)     # (B, width, R, 3R)
        top = torch.cat([h, lr], dim=1)                                                         # (B, width + C, R, 3R)
        h = torch.cat([self.u(top, emb, kv), top], dim=1)                                       # (B, 2 width + C, R, 3R)
        return self.run([self.out], torch.cat([self.run(self.tail, h, emb, kv), lr], dim=1), None, kv)             # (B, C, R, 3R)

# 10 Diffusion ---------------------------------------------------------------------------------------------------------
# Schedules, losses and sampler (section 3.4). Planes are redundant, noise hides less of them than of an image: both schedules destroy them
# faster than the linear one. A model is any model(x, t, condition); base predicts noise and a variance, upsample x_start.
def noise_schedule(name, timesteps):
    """betas (T,), float64, at most 0.999: Chen's `cosine` (start 0.2, end 1, tau 3) and `sigmoid` (0, 3, 0.1), or `linear` (DDPM)."""
    if name == 'linear':
        return (torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * 1000 / timesteps).clamp(max=0.999)
    t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    curve = {'cosine': torch.cos((0.2 + 0.8 * t) * math.pi / 2) ** 6, 'sigmoid': torch.sigmoid(-30 * t)}[name]
    alpha_bar = (curve - curve[-1]) / (curve[0] - curve[-1])
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)

def discretised_log_likelihood(x, mean, log_std):
    """Log of the mass that a Gaussian puts on the bin of width 2/255 around x in [-1, 1]; the outer bins are open."""
    upper, lower = ((x - mean + side / 255) * torch.exp(-log_std) for side in (1, -1))
    inside = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12).log()
    return torch.where(x > 0.999, torch.special.log_ndtr(-lower), torch.where(x < -0.999, torch.special.log_ndtr(upper), inside))

class Diffusion:
    """A discrete process over planes (B, 3, C, R, R): schedule, loss, sampler; coefficients in float64. The model predicts `noise` or
    `x_start`, with learned_variance twice the channels. t (B,) are integers 0 ... T - 1; the model is always given t * 1000 / T."""
    def __init__(self, schedule, timesteps, predict='noise', learned_variance=False):
        self.timesteps, self.predict, self.learned_variance = timesteps, predict, learned_variance
        self.betas = noise_schedule(schedule, timesteps)
        self.alpha_bar = torch.cumprod(1 - self.betas, 0)
        self.alpha_bar_prev = F.pad(self.alpha_bar[:-1], (1, 0), value=1.0)
        variance = self.betas * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)        # beta~, zero at t = 0:
        self.posterior_logvar = torch.cat([variance[1:2], variance[1:]]).log()          # its log there is that at t = 1

    def at(self, values, t):                # entries t of a float64 table in float32, shaped to multiply planes
        return values.float().to(t.device)[t].view(-1, 1, 1, 1, 1)

    def q_sample(self, x_start, t, noise):
        """x_t = sqrt(alpha_bar) x_start + sqrt(1 - alpha_bar) noise (DDPM, Eq. 4)."""
        return self.at(self.alpha_bar.sqrt(), t) * x_start + self.at((1 - self.alpha_bar).sqrt(), t) * noise

    def posterior(self, x_start, x_t, t):
        """Mean and log variance of q(x_{t-1} | x_t, x_start) (DDPM, Eqs. 6 and 7)."""
        of_start = self.alpha_bar_prev.sqrt() * self.betas / (1 - self.alpha_bar)
        of_t = (1 - self.betas).sqrt() * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        return self.at(of_start, t) * x_start + self.at(of_t, t) * x_t, self.at(self.posterior_logvar, t)

    def x_start_of(self, out, x_t, alpha_bar):
        return out if self.predict == 'x_start' else (x_t - (1 - alpha_bar) ** 0.5 * out) / alpha_bar ** 0.5

    def loss(self, model, x_start, t, noise, condition=None):
        """Terms, a dict of scalars whose sum is the loss, and the predicted x_start, not clamped. mse: of what is predicted; vlb
        (learned variance): bits a value times T / 1000, its mean detached to train the variance alone (Improved DDPM, section 3.1)."""
        x_t = self.q_sample(x_start, t, noise)
        out = model(x_t, t * (1000 / self.timesteps), condition).float()
        out, *share = out.chunk(2, dim=2) if self.learned_variance else [out]
        terms = {'mse': F.mse_loss(out, noise if self.predict == 'noise' else x_start)}
        predicted = self.x_start_of(out, x_t, self.at(self.alpha_bar, t))
        if share:
            (true_mean, low), (mean, _) = self.posterior(x_start, x_t, t), self.posterior(predicted.detach(), x_t, t)
            logvar = low + (share[0] + 1) / 2 * (self.at(self.betas.log(), t) - low)
            kl = (logvar - low + torch.exp(low - logvar) + (true_mean - mean) ** 2 * torch.exp(-logvar) - 1) / 2
            first = t == 0
            kl[first] = -discretised_log_likelihood(x_start[first], mean[first], logvar[first] / 2)
            terms['vlb'] = kl.mean() / math.log(2) * self.timesteps / 1000
        return terms, predicted

    @torch.no_grad()
    def sample(self, model, draw, condition=None, null=None, guidance=1.0, steps=10, eta=1.0, watch=lambda x_start: None, progress=False):
        """Planes (B, 3, C, R, R) in [-1, 1], in `steps` even steps that begin at T - 1; ValueError unless 1 ... T. draw() gives unit noise
        of that shape. guidance: s in null + s (conditional - null); 1 never runs null. eta: 1 ancestral (with the learned variance, if
        any), below 1 DDIM (Eqs. 12, 16). watch: called with each x_start."""
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f'{steps} sampling steps of a process of {self.timesteps} timesteps')
        times = [round((i + 1) * self.timesteps / steps) - 1 for i in range(steps)]     # 99, 199, ..., 999 for 10 of 1000
        x, (halves, both) = draw(), (1, condition) if guidance == 1 else (2, join(condition, null))
        for i in tqdm(reversed(range(steps)), total=steps, desc='sampling', disable=not progress):
            alpha_bar, alpha_bar_prev = self.alpha_bar[times[i]].item(), self.alpha_bar[times[i - 1]].item() if i else 1.0
            beta = 1 - alpha_bar / alpha_bar_prev                                       # of the respaced chain, as is beta~
            beta_tilde = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
            t = torch.full((halves * len(x),), times[i] * 1000 / self.timesteps, device=x.device)
            out, *free = model(torch.cat([x] * halves), t, both).float().chunk(halves)
            guided = free[0] + guidance * (out - free[0]) if free else out
            if self.learned_variance:
                guided, share = guided.chunk(2, dim=2)[0], (out.chunk(2, dim=2)[1] + 1) / 2     # the variance is not guided
            x_start = self.x_start_of(guided, x, alpha_bar).clamp(-1, 1)
            watch(x_start)
            if i:                                                                       # the last step returns x_start
                eps = (x - alpha_bar ** 0.5 * x_start) / (1 - alpha_bar) ** 0.5         # again, from the clamped x_start
                std = eta * beta_tilde ** 0.5
                x = alpha_bar_prev ** 0.5 * x_start + max(1 - alpha_bar_prev - std ** 2, 0) ** 0.5 * eps
                if self.learned_variance and eta == 1:
                    std = torch.exp((share * math.log(beta) + (1 - share) * math.log(beta_tilde)) / 2)
                x = x + std * draw()
        return x_start

# 11 Running -----------------------------------------------------------------------------------------------------------
# A process group always exists (of size 1 without torchrun), so no loop asks whether there is one. Files are whole or not there (atomic),
# have one writer (claim), hold no NaN (Finite), and never run code when they are read (weights_only).
def one_line(kind, error, trace):
    """sys.excepthook of all scripts: what the machine refuses (a full disk, a folder) and Ctrl-C end in one line."""
    if not issubclass(kind, (OSError, KeyboardInterrupt)):
        return sys.__excepthook__(kind, error, trace)
    print(f'error: {error}' if str(error) else 'interrupted; the same command goes on after the last file written', file=sys.stderr)

def start(device=None, seed=0):
    """Starts the process group (patient: shards are uneven), seeds PyTorch by seed and rank -> rank, world, device."""
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device != 'cpu' and not (device.startswith('cuda') and torch.cuda.is_available()):
        stop(f'--device {device}: give cpu, or cuda where PyTorch sees a GPU')
    if not dist.is_initialized():
        store, rank, world = next(dist.rendezvous('env://')) if 'RANK' in os.environ else (dist.HashStore(), 0, 1)
        store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)  # torchrun's still has what dead ranks wrote
        dist.init_process_group('gloo' if device == 'cpu' else 'nccl', store=store, rank=rank, world_size=world, timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    (rank, world), sys.excepthook = (dist.get_rank(), dist.get_world_size()), one_line             # in place of torch.distributed's
    if device.startswith('cuda'):
        device = f'cuda:{os.environ["LOCAL_RANK"]}' if 'LOCAL_RANK' in os.environ else device
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(seed * 1000 + rank)
    return rank, world, torch.device(device)

@contextlib.contextmanager
def atomic(path):
    """A temporary path beside `path` (same suffix) to write to, which becomes `path` if all goes well, and else leaves the old file be."""
    temporary = (path := Path(path)).with_name(f'.{os.getpid()}.tmp.{path.name}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                                    # torch.save raises RuntimeError on a full disk
        stop(f'{path}: cannot be written ({str(error).splitlines()[0][:100]})')
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

@contextlib.contextmanager
def claim(path):
    """Whether this process may write `path`; False while another one may. Locks a byte of <folder>/.lock until the process ends."""
    path, mine = Path(path), True
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / '.lock', 'a') as lock:
        try:
            import fcntl
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(path.name.encode()))
        except (ImportError, OSError) as error:                                 # Windows has no fcntl, so no claims
            mine = isinstance(error, ImportError)
        yield mine

class Finite:
    """finite(tensors): whether a step may be taken: False where a loss or gradient is NaN or infinite. Stops after `most` such in a row."""
    def __init__(self, what, most=5):
        self.what, self.most, self.skipped, self.row = what, most, 0, 0

    def __call__(self, *tensors):
        fine = all(bool(x.isfinite().all()) for x in tensors)
        self.row, self.skipped = 0 if fine else self.row + 1, self.skipped + (not fine)
        if self.row >= self.most:
            stop(f'{self.what}: loss or gradient not finite {self.row} times in a row; lower the learning rate (what is saved is finite)')
        return fine

def write_checkpoint(path, kind, content):
    """Writes a dict of plain types and tensors; kind ('decoder', 'planes', 'vae', ...) is checked by read_checkpoint."""
    with atomic(path) as temporary:
        torch.save({'kind': kind, **content}, temporary)

def read_checkpoint(path, kind, made_by=''):
    """Reads what write_checkpoint wrote; tensors are memory-mapped, so what is not used is not read."""
    try:
        content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except FileNotFoundError:
        stop(f'{path}: there is no such file' + (f'; make it with {made_by}' if made_by else ''))
    except Exception as error:          # torch.load raises many types on damaged files
        stop(f'{path}: not a readable checkpoint, or damaged ({type(error).__name__}); delete it and make it again')
    found = content.get('kind', 'unknown') if isinstance(content, dict) else 'unknown'
    found == kind or stop(f'{path}: is a checkpoint of kind {found!r}, expected {kind!r}')
    return content

MODELS = {'decoder': (Decoder, 'python fit.py --decoder'), 'vae': (VAE, 'python train.py --stage vae'),
          'base': (BaseUNet, 'python train.py --stage base'), 'upsample': (UpsampleUNet, 'python train.py --stage upsample')}

def write_model(path, kind, config, state, step):
    """A model for inference: its Config and weights in fp16 (the decoder's, which are few, in fp32)."""
    dtype = torch.float32 if kind == 'decoder' else torch.float16
    write_checkpoint(path, kind, {'config': vars(config), 'model': {k: v.to('cpu', dtype) for k, v in state.items()}, 'step': step})

def load_model(kind, folder, device):
    """The model of a kind from folder/<kind>.pt, in fp32, frozen, with its Config as .config; one line where that fails."""
    (build, made_by), path = MODELS[kind], Path(folder) / f'{kind}.pt'
    content = read_checkpoint(path, kind, made_by)
    try:
        model = build(config := Config(**{k: v for k, v in content['config'].items() if k in Config.__dataclass_fields__}))
        model.load_state_dict(content['model'])
        assert all(x.isfinite().all() for x in model.state_dict().values()), 'it holds NaN or infinite values'
    except (KeyError, TypeError, RuntimeError, AssertionError) as error:
        stop(f'{path}: does not fit this program ({str(error).splitlines()[0][:80]}); make it again with {made_by}')
    model.config = config
    return model.requires_grad_(False).eval().to(device)

def load_models(runs='runs', fits='fits', device='cpu'):
    """All four models: of `runs`, with the decoder of `fits`, if a diffusion model was trained there, else those that ship, of weights/."""
    trained = any((Path(runs) / f'{kind}.pt').exists() for kind in ('base', 'upsample'))
    folders = {kind: Path(__file__).parent / 'weights' if not trained else fits if kind == 'decoder' else runs for kind in MODELS}
    models = {kind: load_model(kind, folder, device) for kind, folder in folders.items()}
    if len({(m.config.channels, m.config.resolution, m.config.portrait, m.config.vae_widths) for m in models.values()}) > 1:
        stop(f'the models in {runs} and {fits} are of different presets; train all stages with the same one')
    return models

def diffusion_of(stage, config):
    """The Diffusion of stage 'base' (predicts noise or x_start, and a variance) or 'upsample' (predicts x_start)."""
    return (Diffusion(config.base_schedule, config.base_timesteps, config.base_predict, learned_variance=True) if stage == 'base' else
            Diffusion(config.up_schedule, config.up_timesteps, 'x_start'))

@torch.no_grad()
def sample_stage(stage, network, portrait, low=None, guidance=1.0, steps=None, eta=1.0, seed=0, mix=None, **how):
    """Planes (B, 3, C, R, R) in [-1, 1]; noise i is that of seed + i or, with mix (B, n), of n seeds mixed. See Diffusion.sample."""
    portrait, config, device = portrait._replace(lr=low), network.config, portrait.latent.device
    size, count = config.base_resolution if stage == 'base' else config.resolution, len(portrait.latent) if mix is None else mix.shape[1]
    generators = [torch.Generator().manual_seed(2 * (seed + i) + (stage == 'base')) for i in range(count)]
    def draw():
        noise = torch.stack([torch.randn(3, config.channels, size, size, generator=g) for g in generators])
        return (noise if mix is None else torch.tensordot(mix, noise, 1)).to(device)
    condition, null = network.condition(portrait), network.condition(drop(portrait)) if guidance != 1 else None
    return diffusion_of(stage, config).sample(network, draw, condition, null, guidance, steps or config.sample_steps, eta, **how)

def generate(models, portrait, guidance=None, steps=None, eta=1.0, seed=0, mix=None, progress=False):
    """A Portrait, images (B, 3, P, P) in [-1, 1], or a number of avatars of nobody -> planes, low-resolution planes; of load_models."""
    config, device = models['base'].config, next(models['base'].parameters()).device
    images = torch.zeros(portrait, 3, config.portrait, config.portrait) if isinstance(portrait, int) else portrait
    seen = images if isinstance(images, Portrait) else encode_portrait(models['vae'], images.to(device), config)
    nobody = isinstance(portrait, int) or config.condition_drop == 1                       # in the second case portraits were never shown
    seen, guidance = (drop(seen), 1.0) if nobody else (seen, config.guidance if guidance is None else guidance)
    low = sample_stage('base', models['base'], seen, None, guidance, steps, eta, seed, mix, progress=progress)
    return sample_stage('upsample', models['upsample'], seen, low, 1.0, steps, eta, seed, mix, progress=progress), low
