"""RodinHD: a portrait becomes a 3D avatar. The method, whole and alone, in plain PyTorch.

Ten chapters follow the data, leaves first; `grep -n '^# [0-9]' rodinhd.py` prints where they start.
There are two walks through them:

    fitting      posed views -> Rays -> march -> sample_planes -> Decoder -> composite -> the losses
                 of fit_avatar, + consolidation, over the avatars that replay visits in turn
    generation   portrait -> VAE maps -> PortraitTokens -> BaseUNet (noise to low-resolution planes)
                 -> UpsampleUNet -> planes -> render_view

Letters, bound once and used in every shape:
    B batch, V views, N rays or points, S samples along rays, K blocks of samples,
    C plane channels, R plane resolution, r the low one, M texels, G grid cells a side,
    P pixels a side of a portrait, L portrait tokens, W width of a token, E width of the time
    embedding, T timesteps.

Conventions:
    Planes (B, 3, C, R, R) are xy, xz, yz, with (width, height) axes in that order.
    In the world Z is up, faces look along -Y, and everything is inside of [-1, 1]^3.
    Cameras are camera-to-world matrices with Blender's axes (x right, y up, looking down -z);
    pixel centres are at +0.5. Images are composited on white.

References: "the paper" is RodinHD (Zhang et al., ECCV 2024); Rodin (Wang et al., CVPR 2023);
instant-ngp (Mueller et al. 2022: occupancy grid); EWC (Kirkpatrick et al. 2017); DDPM (Ho et al.
2020); Improved DDPM (Nichol and Dhariwal 2021); DDIM (Song et al. 2021); Chen 2023 (schedules).
"""
import functools
import itertools
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# 1 Configuration ----------------------------------------------------------------------------------
# Every number of the method stands in one dataclass. Its defaults are the paper's (section 4.2 and
# supplement A); `small` is the model that ships, `tiny` is for tests, and both differ from `paper`
# in these values alone. What we add to the papers is the last group: `paper` has all of it off.
Switch = Literal[0, 1]


@dataclass
class Config:
    preset: str = 'paper'

    # Planes and decoder
    channels: int = 32  # C: the first 3/4 feed colour, the last 1/4 density
    resolution: int = 512  # R
    base_resolution: int = 128  # r, of the planes that the base model makes
    decoder_width: int = 128  # of the hidden layers
    decoder_layers: Literal[5, 4] = 5  # two of density, the others of colour; Rodin has four

    # Rendering
    grid: int = 128  # G, occupancy cells a side
    steps: int = 1024  # lattice points along the diagonal of the box

    # Fitting (section 3.1; Table 5). Stage 1 trains the decoder, stage 2 fits planes under it.
    # What planes depend on is listed in fit.py, too (SETTINGS).
    fit_avatars: int = 64  # avatars of stage 1
    inner: int = 5000  # steps a visit
    outer: int = 30  # visits an avatar
    fit_steps: int = 25000  # stage 2: steps an avatar
    rays: int = 8192  # rays a step
    lr_planes: float = 2e-3
    lr_decoder: float = 2e-4
    weight_tv: float = 1e-2  # total variation of the planes
    weight_l2: float = 1e-4  # magnitude of the planes
    weight_iwc: float = 0.1  # lambda of Eq. 3
    weight_decay: float = 0.0  # of the decoder, the alternative in Table 4(a)
    weight_sparse: float = 0.0  # density itself (Rodin, appendix B.2), which names three losses
    weight_smooth: float = 0.0  # differences of density between neighbours (EG3D),
    weight_distortion: float = 0.0  # and how far apart on a ray its weights lie (mip-NeRF 360)
    rescale: float = 0.0  # share of the steps that see rescaled planes (Rodin, section 3.1)

    # Portrait. The VAE's three finest maps are y1, y2, y3 (Eq. 7): at 1/2, 1/4 and 1/8 of the
    # portrait's size, with the first three of vae_widths as channels.
    portrait: int = 256  # P
    vae_widths: tuple = (128, 256, 512, 512)  # channels by level; the defaults are SDXL's
    vae_layers: int = 2  # residual blocks a level
    vae_latent: int = 4  # channels of the latent
    vae_scale: float = 0.13025  # latents times this have unit variance
    vae_steps: int = 100000
    vae_batch: int = 32
    vae_lr: float = 1e-4
    token_width: int = 512  # W
    pool_width: int = 64  # of the attention that pools the latent to one vector
    tokens: Literal['multi', 'single', 'none'] = 'multi'
    # multi: the base network attends to y1, y2, y3, the upsample network to y1 (the paper);
    # single: the base network to y3 alone; none: both see the pooled latent alone (Table 4b)

    # Base network and its training
    base_width: int = 192
    base_mult: tuple = (1, 1, 2, 3, 4)  # width of each level, times base_width
    base_blocks: int = 3  # residual blocks a level
    base_attention: tuple = (32, 16, 8)  # plane heights that attend to y1, y2, y3, in this order
    base_aware: tuple = (128,)  # plane heights with 3D-aware convolution
    head_width: int = 64  # of an attention head
    roll_out: Switch = 1  # 0: planes are channels, without 3D-aware convolution (Rodin, Table 2)
    autoencoder: Switch = 0  # 1: no noise, the baseline of Rodin's Table 1 (autoencoder.py)
    base_schedule: Literal['cosine', 'sigmoid', 'linear'] = 'cosine'
    base_timesteps: int = 1000
    base_steps: int = 500000
    base_batch: int = 96
    base_lr: float = 1e-5

    # Upsample network and its training
    up_width: int = 128
    up_mult: tuple = (1, 2, 4)
    up_blocks: int = 2
    up_body: int = 3  # [residual, attention, residual] times this, at the lowest resolution
    up_head_width: int = 32
    up_aware: Switch = 1  # 0: plain convolution in place of 3D-aware
    up_once: Switch = 0  # 1: one layer goes up from the lowest level to the first (Rodin, Fig. 11)
    up_degrade: Switch = 1  # 0: no condition augmentation
    up_schedule: Literal['cosine', 'sigmoid', 'linear'] = 'sigmoid'
    up_timesteps: int = 100
    up_steps: int = 500000
    up_batch: int = 32
    up_lr: float = 1e-5
    patch: int = 64  # side of the rendered patch of the image-level loss (Eq. 6)
    patches: int = 32  # samples of a batch that get the image-level loss; 0: none
    patch_front: float = 0.0  # share of the patches that are of the head's front (Rodin, 3.3)
    patch_grid_updates: int = 16  # of the occupancy grid that a patch is rendered with; 0: no grid
    perceptual: Literal['vgg', 'vae'] = 'vgg'  # network of that loss: by lpips, or our own VAE's

    # Both diffusion models
    condition_drop: float = 0.2  # share of the portraits that training replaces by nothing
    ema: float = 0.9999
    sample_steps: int = 10
    guidance: float = 1.3  # of the base model; 1 is none

    # Rodin's latents, which RodinHD has dropped (rodin.py): all off in `paper`
    latent_width: int = 0  # of a vector that the base network sees besides the portrait; 0: none
    latent_drop: float = 0.2  # share of the vectors that training replaces by nothing
    clip_width: int = 16  # channels of the first level of our own CLIP's image tower
    clip_steps: int = 500
    clip_batch: int = 48
    clip_lr: float = 2e-3
    prior_layers: int = 20  # of the MLPs that make vectors of noise, and of words and noise
    prior_width: int = 2048
    prior_timesteps: int = 1000
    prior_steps: int = 100000
    prior_batch: int = 96
    prior_lr: float = 4e-5
    text_steps: int = 100000
    text_batch: int = 96
    text_lr: float = 4e-5

    # Rodin's convolutional refiner (refiner.py); its network and training are not described
    refiner_scale: Literal[2, 4] = 2
    refiner_width: int = 64
    refiner_blocks: int = 16
    refiner_patch: int = 256  # pixels a side of what a training step refines to
    refiner_perceptual: float = 0.1  # weight of that loss, beside the absolute difference
    refiner_steps: int = 100000
    refiner_batch: int = 16
    refiner_lr: float = 1e-4

    # Not in the papers, from here to the end (NOT_IN_THE_PAPERS): all off in `paper`;
    # docs/details.md says what each is good for
    augment: Switch = 0  # portraits in training are disturbed, as photographs are
    mirror: Switch = 0  # half of the avatars in training are mirrored, left for right
    coarse_to_fine: Switch = 0  # a fit begins with planes of R/4, which double twice
    hull_start: Switch = 0  # where images have alpha, the visual hull starts the occupancy grid
    weight_empty: float = 0.0  # log density at points outside that hull
    silhouette_rays: Switch = 0  # rays near silhouettes only, in stage 2 half of them at the edge
    regulariser_every: int = 1  # above 1: planes are regularised every so many steps, as much more
    cull: Switch = 0  # a training step leaves out samples that no light reaches
    planes_final_lr: float = 1.0  # a fit's learning rates fall to this share: of the planes,
    decoder_final_lr: float = 1.0  # and of the decoder
    fog_start: Switch = 0  # stage 1 begins where the decoder sees a light fog
    mean_start: Switch = 0  # stage 2 begins with the mean planes of stage 1
    fisher_batches: int = 1  # ray batches of the Fisher information
    positions: Switch = 0  # tokens and texels that attend carry an encoding of where they are
    components: int = 0  # above 0: networks add what training planes share (shortcuts.py)
    aligned: Switch = 0  # the upsample network sees the portrait on the xz plane (shortcuts.py),
    base_aligned: Switch = 0  # and the base network does; not without roll_out
    base_views: int = 0  # samples of a base batch that are rendered and compared with a view
    base_predict: Literal['noise', 'x_start'] = 'noise'  # x_start learns within hours
    identity_start: Switch = 0  # the upsample network begins as the identity
    up_density: float = 1.0  # share of what it changes of density that is kept in sampling
    clip_grad: float = 0.0  # training clips gradients to this norm; 0: not
    final_lr: float = 1.0  # below 1: training warms up, then falls to this share along a cosine
    likeness_steps: int = 0  # of fitting a sampled avatar to its portrait (likeness.py)
    vector_steps: int = 0  # sampling steps of the base model from a vector alone; 0: sample_steps
    up_sample_steps: int = 0  # sampling steps of the upsample model; 0: sample_steps


SETTINGS = [field.name for field in fields(Config)]
NOT_IN_THE_PAPERS = SETTINGS[SETTINGS.index('augment'):]
MAY_BE_ZERO = (
    'base_views', 'components', 'latent_width', 'likeness_steps', 'patches', 'patch_grid_updates',
    'up_sample_steps', 'vae_steps', 'vector_steps',
)

# The largest values: memory grows with these, shares are of 1, the viewer packs cells in eights
LARGEST = dict(
    channels=1024, resolution=4096, base_resolution=4096, decoder_width=8192, grid=512, steps=65536,
    fit_avatars=10**5, rays=2**22, portrait=4096, vae_widths=8192, vae_layers=16, vae_latent=1024,
    vae_batch=2**16, token_width=8192, pool_width=8192, base_width=8192, base_mult=64,
    base_blocks=16, base_attention=4096, base_aware=4096, head_width=8192, base_timesteps=10**5,
    base_batch=2**16, up_width=8192, up_mult=64, up_blocks=16, up_body=64, up_head_width=8192,
    up_timesteps=10**5, up_batch=2**16, patch=4096, patches=2**16, sample_steps=10**5,
    patch_grid_updates=10**4, fisher_batches=10**4, components=10**4, likeness_steps=10**5,
    latent_width=8192, latent_drop=1, vector_steps=10**5, up_sample_steps=10**5,
    clip_width=1024, clip_batch=2**16, prior_layers=256, prior_width=2**16, prior_timesteps=10**5,
    prior_batch=2**16, text_batch=2**16,
    condition_drop=1, ema=1, planes_final_lr=1, decoder_final_lr=1, final_lr=1, rescale=1,
    patch_front=1, up_density=1, base_views=2**16, refiner_width=1024, refiner_blocks=256,
    refiner_patch=4096, refiner_batch=2**16,
)
LARGEST_OF_OTHERS = 10**9
LONGEST = 8  # of a tuple

# What `small` and `tiny` have in common: they are trained for minutes or hours, on 2 cores.
BRIEFLY = dict(
    vae_scale=1.0, vae_layers=1, base_blocks=1, up_blocks=1, patches=1, patch_grid_updates=0,
    perceptual='vae', augment=1, coarse_to_fine=1, hull_start=1, weight_empty=5e-2,
    silhouette_rays=1, regulariser_every=8, cull=1, planes_final_lr=0.05, decoder_final_lr=0.1,
    fog_start=1, mean_start=1, rescale=0.25, fisher_batches=16, positions=1, aligned=1,
    base_aligned=1, mirror=1, base_predict='x_start', identity_start=1, clip_grad=1.0,
    likeness_steps=60, up_density=0.4, vector_steps=1, up_sample_steps=1,
    prior_layers=6, prior_width=128, prior_steps=1500, prior_lr=2e-3, text_steps=2500, text_lr=2e-3,
    refiner_width=32, refiner_blocks=5, refiner_patch=64, refiner_batch=4, refiner_steps=1500,
    refiner_lr=1e-3,
)
PRESETS = {
    'paper': {},
    # Rodin's (its appendix B). Where it gives no number, which is said here, the number is
    # RodinHD's: decoder_width, up_width, up_body, learning rates and steps of fitting, TV off.
    'rodin': dict(
        resolution=256, base_resolution=64, decoder_layers=4,
        fit_avatars=1000, inner=15000, outer=1, weight_iwc=0.0, weight_tv=0.0, weight_l2=0.0,
        weight_sparse=1e-5, weight_smooth=1e-5, weight_distortion=1e-3, rescale=1.0,
        tokens='none', condition_drop=1.0, latent_width=512, latent_drop=0.2,
        base_mult=(1, 2, 3, 4), base_attention=(32, 16, 8), base_aware=(64,),
        base_schedule='linear', base_batch=48, base_lr=5e-5,
        up_once=1, up_schedule='linear', up_batch=16, up_lr=5e-5,
        patch=112, patches=16, patch_front=0.5,
        sample_steps=100, guidance=1.2,
    ),
    'small': dict(
        BRIEFLY,
        channels=16, resolution=128, base_resolution=32, decoder_width=32, grid=64, steps=256,
        fit_avatars=16, inner=250, outer=6, fit_steps=1500, rays=384,
        lr_planes=3e-2, lr_decoder=2e-3, weight_iwc=3e3,
        vae_widths=(16, 32, 64, 64), vae_steps=3000, vae_batch=8, vae_lr=1e-3,
        token_width=64, pool_width=32,
        base_width=32, base_mult=(1, 2, 3, 4), base_attention=(16, 8, 4), base_aware=(32,),
        head_width=32, base_steps=5500, base_batch=8, base_lr=5e-4,
        up_width=16, up_body=2, up_steps=1100, up_batch=2, up_lr=1e-3, patch=32,
        components=20, base_views=8, final_lr=0.05, ema=0.995, sample_steps=6, guidance=1.0,
    ),
    'tiny': dict(
        BRIEFLY,
        channels=8, resolution=32, base_resolution=8, decoder_width=32, grid=32, steps=64,
        fit_avatars=4, inner=100, outer=3, fit_steps=150, rays=512,
        lr_planes=4e-2, lr_decoder=4e-3,
        portrait=64, vae_widths=(8, 8, 16, 16), vae_steps=60, vae_batch=8, vae_lr=3e-3,
        token_width=32, pool_width=16,
        base_width=32, base_mult=(1, 1, 1), base_attention=(8, 4, 2), base_aware=(8,),
        head_width=16, base_steps=100, base_batch=8, base_lr=2e-3,
        up_width=8, up_mult=(1, 2, 2), up_body=1, up_head_width=8,
        up_steps=60, up_batch=4, up_lr=2e-3, patch=16,
        components=2, base_views=2, final_lr=0.1, ema=0.95,
    ),
}


class Stop(Exception):
    """What cannot be done, in one line that says what, where and what to do.

    The project's functions raise nothing else on bad input; scripts print it and end with exit
    status 1 (see endings.py).
    """


def stop(message):
    """Raises Stop with one line."""
    raise Stop(message)


@functools.cache
def note(message):
    """Tells in one line, and once, how something was understood that may be meant otherwise."""
    print(f'note: {message}', file=sys.stderr)


def parse_setting(field, text):
    """The value that `text` gives to a field of Config; ValueError with what it takes if none."""
    kind = type(field.default)
    largest = LARGEST.get(field.name, LARGEST_OF_OTHERS)
    if get_origin(field.type) is Literal:
        choices = get_args(field.type)
        if text not in map(str, choices):
            raise ValueError(choices)
        return kind(text)

    if kind is tuple:
        try:
            values = tuple(int(item) for item in text.split(','))
        except ValueError:
            raise ValueError('integers with commas between') from None
        least = 0 if field.name in ('base_attention', 'base_aware') else 1  # 0: at no height
        if len(values) > LONGEST or not least <= min(values) <= max(values) <= largest:
            raise ValueError(f'at most {LONGEST} integers from {least} to {largest}')
        return values

    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    least = 0 if kind is float or field.name in MAY_BE_ZERO else 1
    if not least <= value < math.inf:
        raise ValueError(f'a positive {kind.__name__}')
    if value > largest:
        raise ValueError(f'at most {largest}')
    return value


def make_config(preset, overrides=()):
    """Returns the Config of a preset with `name=value` overrides.

    Each override is checked against its field's name and type, and what has to divide is checked at
    the end; what is wrong stops the program with one line.
    """
    values = dict(PRESETS[preset], preset=preset)
    known = {field.name: field for field in fields(Config) if field.name != 'preset'}
    for item in overrides:
        name, _, text = item.partition('=')
        if name not in known:
            stop(f'--set {item}: no such setting; there are {", ".join(known)}')
        try:
            values[name] = parse_setting(known[name], text)
        except ValueError as error:
            stop(f'--set {item}: {name} takes {error}')

    config = Config(**values)
    try:
        check_config(config)
        check_heights(config)
    except ValueError as error:
        stop(error)
    return config


def check_heights(config):
    """ValueError, in one line, where a setting names a plane height that the base network does not
    have: what it asks for would be left out without a word. 0 asks for nothing."""
    r = config.base_resolution
    heights = [r // 2 ** level for level in range(len(config.base_mult))]
    if len(config.base_attention) > 3:
        raise ValueError(f'base_attention names {len(config.base_attention)} heights, for y1 to y3')
    for name in ('base_attention', 'base_aware'):
        for height in getattr(config, name):
            if height and height not in heights:
                raise ValueError(
                    f'{name} names planes of height {height}; with base_resolution {r} and '
                    f'{len(heights)} levels (base_mult) there are {", ".join(map(str, heights))}; '
                    '0 is none'
                )


def check_config(config):
    """ValueError, in one line, where a Config has a value that is out of its range or of another
    type, or where what has to divide does not."""
    if not str(config.preset).isidentifier():
        raise ValueError('preset is no name')
    for field in fields(Config)[1:]:
        value = getattr(config, field.name)
        kind = type(field.default)
        is_whole = type(value) is int and kind is float
        if type(value) is not kind and not is_whole:
            raise ValueError(f'{field.name} is no {kind.__name__}')
        text = ','.join(map(str, value)) if kind is tuple else str(value)
        try:
            parse_setting(field, text)
        except ValueError as error:
            raise ValueError(f'{field.name} is {text[:40]}, it takes {error}') from None

    if config.channels % 4 or config.resolution % 4:
        raise ValueError(
            f'channels {config.channels} and resolution {config.resolution} must divide by 4'
        )
    if config.resolution % config.base_resolution:
        raise ValueError(
            f'resolution {config.resolution} must divide by '
            f'base_resolution {config.base_resolution}'
        )
    if config.portrait % 64:  # y3, an eighth of it, is cut into 8 x 8 patches
        raise ValueError(f'portrait {config.portrait} must divide by 64')
    if config.refiner_patch % config.refiner_scale:
        raise ValueError(
            f'refiner_patch {config.refiner_patch} must divide by '
            f'refiner_scale {config.refiner_scale}'
        )
    if config.base_aligned and not config.roll_out:
        raise ValueError('base_aligned lays the portrait onto a plane, which roll_out=0 has not')
    if config.grid % 8:
        raise ValueError(f'grid {config.grid} must divide by 8')
    if config.decoder_width % 4:  # the viewer reads it in fours
        raise ValueError(f'decoder_width {config.decoder_width} must divide by 4')


def departures(config):
    """The settings by which a config does what no paper does, as `name=value`."""
    changed = [n for n in NOT_IN_THE_PAPERS if getattr(config, n) != getattr(Config, n)]
    return [f'{name}={getattr(config, name)}' for name in changed]


# 2 Cameras and rays -------------------------------------------------------------------------------
# A camera is a 4x4 camera-to-world matrix and intrinsics (fx, fy, cx, cy) in pixels.
PORTRAIT_FOV = 34.0  # degrees


def orbit_pose(azimuth, elevation, distance=4.0, target=(0.0, 0.0, 0.0)):
    """Camera-to-world (4, 4) of a camera at `distance` from `target`, which it looks at.

    Angles are in degrees: azimuth 0 is the front (-Y), 90 is +X, elevation 90 is above.
    """
    azimuth = math.radians(azimuth)
    elevation = math.radians(elevation)
    right = torch.tensor([math.cos(azimuth), math.sin(azimuth), 0.0])
    back = torch.tensor([
        math.sin(azimuth) * math.cos(elevation),
        -math.cos(azimuth) * math.cos(elevation),
        math.sin(elevation),
    ])
    up = torch.linalg.cross(back, right)
    position = distance * back + torch.tensor(target)
    pose = torch.stack([right, up, back, position], dim=1)  # (3, 4)
    return torch.cat([pose, torch.eye(4)[3:]])


def intrinsics_of(fov, size):
    """Intrinsics (4,) of a square image of `size` pixels with a field of view of `fov` degrees."""
    focal = 0.5 * size / math.tan(math.radians(fov) / 2)
    return torch.tensor([focal, focal, size / 2, size / 2])


def portrait_camera(size, device='cpu'):
    """Pose (4, 4) and intrinsics (4,) of the camera that takes portraits of `size` pixels."""
    return orbit_pose(0, 2).to(device), intrinsics_of(PORTRAIT_FOV, size).to(device)


def pixel_rays(c2w, intrinsics, x, y):
    """Rays through pixels: rays_o and rays_d (N, 3), the latter of unit length.

    c2w is (N, 4, 4) or (4, 4), intrinsics are (N, 4) or (4,), column x and row y are (N,).
    """
    fx, fy, cx, cy = intrinsics.unbind(-1)
    minus_one = -torch.ones_like(x, dtype=torch.float32)
    local = torch.stack([(x + 0.5 - cx) / fx, -(y + 0.5 - cy) / fy, minus_one], dim=-1)
    turned = (c2w[..., :3, :3] * local[..., None, :]).sum(-1)  # not @, which a GPU rounds to TF32
    rays_d = F.normalize(turned, dim=-1)
    return c2w[..., :3, 3].expand_as(rays_d), rays_d


def view_rays(c2w, intrinsics, height, width):
    """All rays of one image in row-major order: rays_o and rays_d (height * width, 3)."""
    rows = torch.arange(height, device=c2w.device)
    columns = torch.arange(width, device=c2w.device)
    y, x = torch.meshgrid(rows, columns, indexing='ij')
    return pixel_rays(c2w, intrinsics, x.reshape(-1), y.reshape(-1))


def intersect_box(rays_o, rays_d, min_near=0.2):
    """Where rays (N, 3) enter and leave [-1, 1]^3: near and far (N,), near at least `min_near`.

    A ray that misses the box has near >= far.
    """
    rays_d = torch.where(rays_d.abs() < 1e-9, torch.full_like(rays_d, 1e-9), rays_d)
    t0 = (-1 - rays_o) / rays_d
    t1 = (1 - rays_o) / rays_d
    near = torch.minimum(t0, t1).amax(-1).clamp(min=min_near)
    far = torch.maximum(t0, t1).amin(-1)
    return near, far


# 3 Triplane ---------------------------------------------------------------------------------------
# A point is projected onto three axis-aligned planes, each of which is sampled bilinearly, and the
# features found there are reduced to one vector. Rodin sums them; we take their mean, which keeps
# the scale of the decoder's input.
AXES = ((0, 1), (0, 2), (1, 2))  # world axes of (width, height) of the planes xy, xz, yz
PLANE_DIVISOR = 3  # features are their sum over the planes divided by this; 1 makes it the sum,
# and needs a decoder that was trained so


def sample_planes(planes, points):
    """Features (N, C) of points (N, 3) on planes (3, C, R, R).

    Sampling is bilinear; -1 is texel 0 and +1 is texel R - 1. Outside of [-1, 1] a plane gives
    zero. Gradients reach the planes, not the points.
    """
    # Few channels are sampled faster by grid_sample, many by a look-up of table rows: with 16
    # channels on 128 x 128 texels it is 2 to 3 times as fast, and more with a gradient.
    if planes.shape[1] <= 8:
        return sample_planes_plainly(planes, points)
    return sample_planes_by_rows(planes, points)


def sample_planes_plainly(planes, points):
    """The meaning of sample_planes: one grid_sample for each plane, then the mean."""
    x = torch.where(points.abs() > 1, 9.0, points.detach()).T  # 9 is far outside, so it gives zero
    uv = torch.stack([torch.stack([x[u], x[v]], dim=-1) for u, v in AXES])  # (3, N, 2)
    features = F.grid_sample(planes, uv[:, None], align_corners=True)  # (3, C, 1, N)
    return features[:, :, 0].sum(0).T / PLANE_DIVISOR


def sample_planes_by_rows(planes, points):
    """The same, faster: texels are rows of a table (M, C), and a point sums 12 of them."""
    _, C, R, _ = planes.shape
    table = planes.permute(0, 2, 3, 1).reshape(len(AXES) * R * R, C)  # no copy if channels-last
    return RowSum.apply(table, *rows_of(points, R))


def rows_of(points, R):
    """The rows of a table of texels (3, R, R) that points (N, 3) lie between, int32 (N, 12), and
    what each of them weighs (N, 12)."""
    points = points.detach().T.contiguous()  # (3, N): arithmetic on whole rows
    inside = (points.abs() <= 1).to(points)

    # Along each world axis: the texels below and above, and their weights
    texels = (points.clamp(-1, 1) + 1) * (0.5 * (R - 1))
    below = texels.floor().clamp_(max=R - 2)
    weight_above = (texels - below) * inside
    shares = torch.stack([inside - weight_above, weight_above])  # (2, 3, N)
    below = below.int()
    texels = torch.stack([below, below + 1])

    # On each plane: four corners, each with the product of its weights along both axes
    index = []
    weight = []
    for plane, (u, v) in enumerate(AXES):
        row = (texels[:, v] + plane * R) * R  # (2, N)
        index.append(row[:, None] + texels[:, u])  # (2, 2, N)
        weight.append(shares[:, None, v] * shares[:, u])
    index = torch.stack(index).view(12, -1).T.contiguous()  # (N, 12)
    weight = torch.stack(weight).view(12, -1).T / PLANE_DIVISOR
    return index, weight.contiguous()


class RowSum(torch.autograd.Function):
    """Weighted sums of table rows: table (M, C), index and weight (N, 12) -> (N, C).

    It is differentiable in the table alone.
    """
    @staticmethod
    def forward(ctx, table, index, weight):
        ctx.save_for_backward(index, weight)
        ctx.texels = table.shape[0]
        return F.embedding_bag(index, table, per_sample_weights=weight, mode='sum')

    @staticmethod
    def backward(ctx, grad):
        index, weight = ctx.saved_tensors

        # Few points: one scatter-add for each of the 12 rows
        if len(grad) < 8192:
            table = grad.new_zeros(ctx.texels, grad.shape[1])
            index = index.T.contiguous().long()  # which index_add_ takes in half the time
            for i, w in zip(index, weight.T.contiguous(), strict=True):
                table.index_add_(0, i, grad * w[:, None])
            return table, None, None

        # Many points: pairs (point, row) sorted by row, so that each row sums its own, a "bag"
        flat = index.view(-1)
        order = flat.argsort()
        point = order // index.shape[1]  # index is (N, 12)
        weight = weight.view(-1)[order]
        ones = torch.ones_like(flat)
        pairs_of_row = ones.new_zeros(ctx.texels).index_add_(0, flat, ones)  # bincount would wait
        first_pair = pairs_of_row.cumsum(0) - pairs_of_row
        table = F.embedding_bag(point, grad, first_pair, mode='sum', per_sample_weights=weight)
        return table, None, None


def roll_out(planes):
    """Planes (B, 3, C, R, R) -> (B, C, R, 3R): side by side, for a 2D network (Rodin, 3.2)."""
    return torch.cat(planes.unbind(1), dim=-1)


def roll_in(x):
    """Inverse of roll_out: (B, C, R, 3R) -> (B, 3, C, R, R)."""
    return torch.stack(x.chunk(len(AXES), dim=-1), dim=1)


def resize_planes(planes, size):
    """Planes (..., R, R) -> (..., size, size), with the same content at the same point.

    It is a triangle filter between lattices whose ends coincide: linear upwards, antialiased
    downwards.
    """
    R = planes.shape[-1]
    if size == R:
        return planes
    ratio = (R - 1) / max(size - 1, 1)
    target = torch.arange(size, device=planes.device)[:, None] * ratio  # (size, 1), in texels
    distance = target - torch.arange(R, device=planes.device)  # (size, R)
    weight = (1 - distance.abs() / max(ratio, 1.0)).clamp(min=0)
    weight = (weight / weight.sum(1, keepdim=True)).to(planes.dtype)
    return weight @ planes @ weight.T


def total_variation(planes):
    """Sum over planes (3, C, R, R) of the mean squared difference of neighbours on both axes."""
    return len(AXES) * (SquaredSteps.apply(planes, -2) + SquaredSteps.apply(planes, -1))


class SquaredSteps(torch.autograd.Function):
    """The mean squared difference of neighbours along a dimension: F.mse_loss(x[1:], x[:-1]).

    With gradient that takes half of its time: autograd pads a gradient of each of the two parts.
    """
    @staticmethod
    def forward(ctx, x, dim):
        n = x.shape[dim] - 1
        step = x.narrow(dim, 1, n) - x.narrow(dim, 0, n)
        ctx.save_for_backward(step)
        ctx.dim = dim
        return step.square().mean()

    @staticmethod
    def backward(ctx, grad):
        step, = ctx.saved_tensors
        n = step.shape[ctx.dim]
        of_step = step * (2 / step.numel() * grad)
        of_x = F.pad(of_step, (0, 0, 1, 0) if ctx.dim == -2 else (1, 0))
        of_x.narrow(ctx.dim, 0, n).sub_(of_step)
        return of_x, None


# 4 Decoder ----------------------------------------------------------------------------------------
# All avatars share this small MLP. Features are frequency-encoded (Rodin, section 3.1); density
# comes from the last quarter of the channels, colour from the others, from what the density net
# found, and from the direction of view. At the paper's width it has 72,321 parameters.
def trunc_exp(x):
    """exp(x) in fp32, whose gradient sees x clamped to [-15, 15] (instant-ngp)."""
    x = x.float()
    fixed = x.detach()
    return fixed.exp() + fixed.clamp(-15, 15).exp() * (x - fixed)


def softplus(x):
    """log(1 + exp(x)). Without a gradient on a CPU exp and log take half of softplus's time."""
    if x.requires_grad or not x.is_cpu or x.dtype != torch.float32:
        return F.softplus(x)
    return torch.maximum(x, x.clamp(max=20).exp_().add_(1).log_())  # above 20 it is x in fp32


def frequency_encoding(v):
    """(N, D) -> (N, 5 D): [v, sin v, cos v, sin 2v, cos 2v], without a factor of pi."""
    sine = v.sin()
    cosine = v.cos()
    # double angles, so that one sine and one cosine suffice
    return torch.cat([v, sine, cosine, 2 * sine * cosine, 1 - 2 * sine * sine], dim=-1)


class Decoder(nn.Module):
    """Features (N, C) and unit view directions (N, 3) -> density (N,) and colour (N, 3).

    Density sigma is positive, per unit of the box; colour is in 0..1. The buffer `start`
    (3, C, R/4, R/4) is the mean of the planes that the decoder was trained with: fits of other
    avatars may begin there.
    """
    def __init__(self, config):
        super().__init__()
        width = config.decoder_width
        self.density_channels = config.channels // 4
        encoded_density = 5 * self.density_channels
        encoded_colour = 5 * (config.channels - self.density_channels)
        encoded_direction = 5 * 3

        r = config.resolution // 4
        self.register_buffer('start', torch.zeros(len(AXES), config.channels, r, r))
        self.sigma_net = nn.Sequential(
            nn.Linear(encoded_density, width),
            nn.Softplus(),
            nn.Linear(width, 1 + width),
        )
        of_colour = [nn.Linear(encoded_colour + width + encoded_direction, width, bias=False)]
        for _ in range(config.decoder_layers - 4):
            of_colour += [nn.ReLU(), nn.Linear(width, width, bias=False)]
        of_colour += [nn.ReLU(), nn.Linear(width, 3, bias=False)]
        self.color_net = nn.Sequential(*of_colour)

    def forward(self, features, dirs=None):
        """Without directions colour is not asked for: (sigma, None)."""
        colour_features = features[:, :-self.density_channels]
        density_features = features[:, -self.density_channels:]
        first, _, last = self.sigma_net
        hidden = softplus(first(frequency_encoding(density_features)))  # (N, width)
        if dirs is None:  # one row of the last layer is enough
            return trunc_exp(F.linear(hidden, last.weight[:1], last.bias[:1])[:, 0]), None

        hidden = last(hidden)  # (N, 1 + width)
        sigma = trunc_exp(hidden[:, 0])
        colour_features = frequency_encoding(colour_features)
        x = torch.cat([colour_features, hidden[:, 1:], frequency_encoding(dirs)], dim=-1)
        return sigma, torch.sigmoid(self.color_net(x))


ENCODINGS = 5  # of a value v, by frequency_encoding: v, sin v, cos v, sin 2v, cos 2v


def encoded_rows(v):
    """Values v (D, N) -> rows (5 D, N): v, sin v, cos v, sin v cos v, sin^2 v. A layer reads them
    as it reads frequency_encoding, with other weights: those of of_encoded."""
    D, N = v.shape
    rows = v.new_empty(ENCODINGS * D, N)
    values, sine, cosine, both, square = rows.split(D)
    values.copy_(v)
    torch.sin(values, out=sine)
    torch.cos(values, out=cosine)
    torch.mul(sine, cosine, out=both)
    torch.mul(sine, sine, out=square)
    return rows


def encoded_rows_gradient(grad, rows):
    """The gradient of values (D, N), of that of encoded_rows (5 D, N), which is written over."""
    _, sine, cosine, both, square = rows.chunk(ENCODINGS)
    of_v, of_sine, of_cosine, of_both, of_square = grad.chunk(ENCODINGS)
    of_v.addcmul_(of_sine, cosine).addcmul_(of_cosine, sine, value=-1)
    of_v.add_(of_both).addcmul_(of_both, square, value=-2)
    return of_v.addcmul_(of_square, both, value=2)


def of_encoded(weight):
    """The weight (n, 5 D) and bias (n,) with which a layer reads encoded_rows, of the weight with
    which it reads frequency_encoding: sin 2v = 2 sin v cos v, cos 2v = 1 - 2 sin^2 v."""
    v, sine, cosine, sine2, cosine2 = weight.chunk(ENCODINGS, dim=1)
    weight = torch.cat([v, sine, cosine, 2 * sine2, -2 * cosine2], dim=1)
    return weight, cosine2.sum(1)


class Folded:
    """A Decoder that does not learn, faster: the same numbers but for rounding, with gradients for
    the features alone.

    With gradient 4,000 samples of `small` take 4.8 ms in place of 8.8. Sines and cosines are
    written where a matrix product reads them, layers between which nothing stands are one, and the
    backward pass is written by hand, in two dozen large operations.
    """
    @torch.no_grad()
    def __init__(self, decoder):
        self.decoder = decoder
        self.density_channels = decoder.density_channels
        first, _, last = decoder.sigma_net
        self.density, bias = of_encoded(first.weight)
        self.density_bias = first.bias + bias
        self.sigma = last.weight[0]
        self.sigma_bias = last.bias[0]

        # Nothing stands between the last layer of the density net and the colour net's first
        colour_first, *others = decoder.color_net[0::2]  # ReLU is between them
        width = len(first.weight)
        of_direction = ENCODINGS * 3
        of_features = colour_first.weight.shape[1] - width - of_direction
        parts = [of_features, width, of_direction]
        of_features, of_geometry, of_direction = colour_first.weight.split(parts, dim=1)
        self.colour, bias = of_encoded(of_features)
        self.direction, bias_too = of_encoded(of_direction)
        self.geometry = of_geometry @ last.weight[1:]
        self.colour_bias = of_geometry @ last.bias[1:] + bias + bias_too
        self.others = [layer.weight for layer in others]

    def __call__(self, features, dirs=None):
        """As Decoder: features (N, C) and directions (N, 3) -> density (N,), colour (N, 3)."""
        if torch.is_autocast_enabled(features.device.type):
            return self.decoder(features, dirs)
        if dirs is None:
            return FoldedDensity.apply(features[:, -self.density_channels:], self), None
        return FoldedColour.apply(features, dirs, self)

    def find_density(self, features):
        """Density features (N, D) -> what they are encoded as (5 D, N), hidden (N, W), sigma (N,).
        """
        rows = encoded_rows(features.T)
        hidden = softplus(torch.addmm(self.density_bias, rows.T, self.density.T))
        return rows, hidden, (hidden @ self.sigma).add_(self.sigma_bias).exp_()

    def density_gradient(self, of_hidden, of_sigma, rows, hidden, sigma):
        """The gradient of density features (D, N), of that of `hidden` (N, W), or None, and that
        of sigma (N,)."""
        of_sigma = of_sigma * sigma.clamp(math.exp(-15), math.exp(15))  # see trunc_exp
        if of_hidden is None:
            of_hidden = of_sigma[:, None] * self.sigma
        else:
            of_hidden = of_hidden.addr_(of_sigma, self.sigma)
        of_hidden *= hidden.neg().expm1_().neg_()  # softplus' slope
        return encoded_rows_gradient(self.density.T @ of_hidden.T, rows)


class FoldedDensity(torch.autograd.Function):
    """Density features (N, D) -> density (N,), by a Folded."""
    @staticmethod
    def forward(ctx, features, folded):
        found = folded.find_density(features)
        ctx.folded = folded
        ctx.save_for_backward(*found)
        return found[-1]

    @staticmethod
    def backward(ctx, of_sigma):
        return ctx.folded.density_gradient(None, of_sigma, *ctx.saved_tensors).T, None


class FoldedColour(torch.autograd.Function):
    """Features (N, C) and directions (N, 3) -> density (N,) and colour (N, 3), by a Folded."""
    @staticmethod
    def forward(ctx, features, dirs, folded):
        D = folded.density_channels
        found = folded.find_density(features[:, -D:])
        rows = encoded_rows(features[:, :-D].T)
        x = torch.addmm(folded.colour_bias, rows.T, folded.colour.T)
        x.addmm_(found[1], folded.geometry.T)
        x.addmm_(encoded_rows(dirs.T).T, folded.direction.T)
        layers = [x.relu_()]
        for weight in folded.others[:-1]:
            layers.append((layers[-1] @ weight.T).relu_())
        rgb = (layers[-1] @ folded.others[-1].T).sigmoid_()
        ctx.folded = folded
        ctx.save_for_backward(*found, rows, rgb, *layers)
        return found[-1], rgb

    @staticmethod
    def backward(ctx, of_sigma, of_rgb):
        folded = ctx.folded
        *found, rows, rgb = ctx.saved_tensors[:5]
        layers = ctx.saved_tensors[5:]
        of_layer = of_rgb * rgb * (1 - rgb)
        for weight, layer in zip(folded.others[::-1], layers[::-1], strict=True):
            of_layer = torch.ops.aten.threshold_backward(of_layer @ weight, layer, 0)  # ReLU's
        of_hidden = of_layer @ folded.geometry
        D = folded.density_channels
        of_features = rgb.new_empty(len(rgb), len(rows) // ENCODINGS + D)
        of_features[:, :-D] = encoded_rows_gradient(folded.colour.T @ of_layer.T, rows).T
        of_features[:, -D:] = folded.density_gradient(of_hidden, of_sigma, *found).T
        return of_features, None, None


def quick(decoder):
    """A Decoder as a field should ask it: a Folded, where it does not learn and numbers are fp32.
    """
    if not isinstance(decoder, Decoder) or decoder.start.dtype != torch.float32:
        return decoder
    learns = any(p.requires_grad for p in decoder.parameters())
    return decoder if learns else Folded(decoder)


class PlaneField:
    """The radiance field of one avatar: planes (3, C, R, R) read by a decoder.

    Like any field it is called with points (N, 3) and unit directions (N, 3), or None, and
    returns density (N,) and colour (N, 3), or None.
    """
    def __init__(self, planes, decoder):
        self.planes = planes
        self.decoder = decoder
        self.decode = quick(decoder)
        self.density_planes = planes[:, -decoder.density_channels:]  # a view: few look-ups are
        # faster than a copy, which took most of the time of 1,024 rays at 512 x 512 x 32

    def __call__(self, points, dirs=None):
        if dirs is None:  # density alone reads a quarter of the channels
            return self.decode(sample_planes(self.density_planes, points))
        return self.decode(sample_planes(self.planes, points), dirs)

    def on_lattice(self, axis):
        """Density (n, n, n) where x, y and z are values of `axis` (n,), in [-1, 1].

        Each plane is sampled at n x n points only, and they are summed into n x n x n: 3 times as
        fast as asking for the density of each point.
        """
        R = self.planes.shape[-1]
        texels = (axis + 1) * (0.5 * (R - 1))
        below = texels.floor().clamp(max=R - 2)
        weight_above = texels - below
        below = below.long()
        planes = self.density_planes
        rows = planes[:, :, below].lerp(planes[:, :, below + 1], weight_above[:, None])
        sampled = rows[..., below].lerp(rows[..., below + 1], weight_above)  # (3, D, n, n)
        xy, xz, yz = sampled.permute(0, 3, 2, 1) / PLANE_DIVISOR  # axes of the world, then channels

        density = []
        for of_y, of_z in zip(xy, xz):  # slices along x
            features = of_y[:, None] + of_z + yz  # (n, n, D)
            density.append(self.decode(features.flatten(0, 1), dirs=None)[0])
        return torch.stack(density).view(len(axis), len(axis), len(axis))


# 5 Volume rendering -------------------------------------------------------------------------------
# Rays are marched with a constant step, on a lattice masked by an occupancy grid. That visits the
# samples that instant-ngp's skipping marcher visits. They are packed: one flat list, in which
# ray_index says whose a sample is. A field is any function field(points (S, 3), dirs (S, 3) or
# None) -> (sigma (S,), rgb (S, 3) or None): planes with their decoder, or a ball in a test.
T_MIN = 1e-4  # a sample counts if at least so much light arrives at it,
W_MIN = 3e-5  # and if its weight is at least this
EMPTY = 2e-3  # density of a fog that nobody sees
BLOCK = 8  # lattice points that are tested against the grid in one go


def step_length(steps):
    """The distance of neighbouring samples: the box's diagonal over the number of steps."""
    return 2 * math.sqrt(3) / steps


def widened(cells, margin):
    """Cells (G, G, G) bool that are at most `margin` cells from one of these, on every axis."""
    for axis in range(3):
        wide = cells.clone()
        for shift in range(1, min(margin, cells.shape[axis] - 1) + 1):
            rest = cells.shape[axis] - shift
            wide.narrow(axis, 0, rest).logical_or_(cells.narrow(axis, shift, rest))
            wide.narrow(axis, shift, rest).logical_or_(cells.narrow(axis, 0, rest))
        cells = wide
    return cells


class OccupancyGrid:
    """A decaying running maximum of the density in cells (x, y, z) (supplement A; instant-ngp).

    It is never shared between ranks or avatars. hull is a bool (G, G, G): cells in it start
    occupied, all others stay empty for ever and have the value -1. The threshold is the paper's
    10 at 1024 steps, and at others the density of the same opacity a step.
    """
    def __init__(self, G, steps, device='cpu', hull=None):
        self.G = G
        self.steps = steps
        self.density_threshold = 10 * steps / 1024
        self.outside = None  # of a hull, bool (G, G, G)
        if hull is None:
            self.values = torch.zeros(G, G, G, device=device)
        else:
            self.outside = ~hull.to(device)
            self.values = torch.where(self.outside, -1.0, self.density_threshold)
        self.refresh()

    def refresh(self):
        """Makes a mask of the values, and widens it by half a block for march's first test."""
        # the mean, as in instant-ngp, for fields that are still thin everywhere
        threshold = min(self.values.clamp(min=0).mean().item(), self.density_threshold)
        if threshold == self.density_threshold:
            threshold *= 0.999  # so that the cells of a hull, which start at it, are occupied
        self.occupied = self.values > threshold

        half_block = BLOCK / 2 * step_length(self.steps)  # in box units
        margin = math.ceil(half_block * self.G / 2 + 1e-6)  # in cells
        self.near_occupied = widened(self.occupied, margin)

    def cell(self, points):
        """Flat index (N,) of the cells of points (N, 3) in the box."""
        x, y, z = ((points + 1) * (self.G / 2)).long().clamp(0, self.G - 1).unbind(-1)
        return (x * self.G + y) * self.G + z

    @torch.no_grad()
    def update(self, field, generator=None, cells=None):
        """value <- max(0.95 value, sigma at a random point) of flat `cells`.

        Without `cells` these are all that may be occupied.
        """
        G = self.G
        values = self.values.view(-1)
        if cells is None:
            cells = (values >= 0).nonzero()[:, 0]
        for part in cells.split(2 ** 18):
            corner = torch.stack([part // (G * G), part // G % G, part % G], dim=-1)
            jitter = torch.rand(len(part), 3, generator=generator).to(values.device) - 0.5
            points = (corner + 0.5 + jitter) * (2 / G) - 1
            sigma = field(points)[0].float()
            values[part] = torch.maximum(0.95 * values[part], sigma)
        self.refresh()

    def some_cells(self, generator):
        """A quarter of the cells at random, and as many of the occupied ones (instant-ngp)."""
        possible = (self.values >= 0).view(-1).nonzero()[:, 0]
        occupied = self.occupied.view(-1).nonzero()[:, 0]
        quarter = max(len(possible) // 4, 1)
        picked = []
        for cells in (possible, occupied):
            if len(cells):
                index = torch.randint(len(cells), (quarter,), generator=generator)
                picked.append(cells[index.to(cells.device)])
        return torch.cat(picked).unique()


@torch.no_grad()
def grid_for(field, config, device='cpu', threshold=EMPTY):
    """Occupancy grid of a field that no camera has seen, such as generated planes.

    A cell's value is the largest density at its corners and its centre. It is occupied where that
    is above `threshold`; at EMPTY nothing visible is skipped. Cells of more than two texels are
    looked at in as many parts. grid_by_updates, which the papers have, takes ten times as long.
    """
    parts = math.ceil(config.resolution / (2 * config.grid))  # of a cell, along each axis
    n = config.grid * parts
    corner = torch.linspace(-1, 1, n + 1, device=device)
    centre = (corner[1:] + corner[:-1]) / 2
    largest = density_on(field, corner)
    for axis in range(3):
        largest = torch.maximum(largest.narrow(axis, 0, n), largest.narrow(axis, 1, n))
    largest = torch.maximum(largest, density_on(field, centre))

    grid = OccupancyGrid(config.grid, config.steps, device)
    grid.density_threshold = threshold
    grid.values = F.max_pool3d(largest[None], parts)[0] if parts > 1 else largest
    grid.refresh()
    return grid


def density_on(field, axis):
    """Density (n, n, n) of a field where x, y and z are values of `axis` (n,).

    A field may know a faster way than to be asked for every point: `on_lattice`.
    """
    if hasattr(field, 'on_lattice'):
        return field.on_lattice(axis)
    y, z = torch.meshgrid(axis, axis, indexing='ij')
    slices = [torch.stack([x.expand_as(y), y, z], dim=-1).view(-1, 3) for x in axis]
    density = [field(points)[0].float() for points in slices]
    return torch.stack(density).view(len(axis), *y.shape)


def grid_by_updates(field, config, device='cpu', updates=24, seed=0, threshold=EMPTY):
    """The same by updates at random points, as instant-ngp has it. (Supplement A: 16 and 10.)

    Values start from zero; after four full updates only those empty cells are looked at again that
    lie beside occupied ones.
    """
    generator = torch.Generator().manual_seed(seed)
    grid = OccupancyGrid(config.grid, config.steps, device)
    grid.density_threshold = threshold
    for i in range(updates):
        cells = None
        if i >= 4:
            wide = F.max_pool3d(grid.occupied[None].float(), 3, 1, 1)[0]
            cells = (wide > grid.occupied).view(-1).nonzero()[:, 0]
        grid.update(field, generator, cells)
    return grid


def transmittance(tau, ray_index, rays):
    """The share of the light that reaches each sample, T_i = exp(-sum of tau_j before i).

    Optical depths tau and ray_index are (S,), in order along each of so many rays.
    """
    return torch.exp(-sum_before(tau.clamp(max=64), ray_index, rays)).float()


def sum_before(x, ray_index, rays):
    """For each sample the sum of x (S,) over those before it on its ray, in float64.

    It is one flat sum over all rays, less what that is at the ray's first sample; fp32 would lose
    the later rays' digits.
    """
    if not len(x):
        return x.double()
    before = x.double().cumsum(0) - x
    first = torch.searchsorted(ray_index, torch.arange(rays, device=x.device))
    first = first.clamp(max=len(x) - 1)  # of each ray; one without samples is never asked for
    return before - before[first][ray_index]


class Lattice(NamedTuple):
    """The points that rays may be sampled at: rays_o + (start + k delta) rays_d, k < count."""
    rays_o: torch.Tensor  # (N, 3)
    rays_d: torch.Tensor  # (N, 3)
    start: torch.Tensor  # (N,)
    count: torch.Tensor  # (N,), 0 where the ray misses the box
    delta: float


class Samples(NamedTuple):
    """Packed samples, in order along each ray."""
    ray_index: torch.Tensor  # (S,), ascending
    t: torch.Tensor  # (S,), distance from the camera
    points: torch.Tensor  # (S, 3)


def lattice_of(rays_o, rays_d, steps, offset=None):
    """The Lattice of rays (N, 3) with `steps` points along the box's diagonal.

    An offset (N,) in 0..1 shifts that of each ray by a share of the step (in training).
    """
    delta = step_length(steps)
    near, far = intersect_box(rays_o, rays_d)
    start = near if offset is None else near + delta * offset
    count = ((far - start) / delta).ceil().clamp(min=0)
    return Lattice(rays_o, rays_d, start, count, delta)


def occupied_blocks(lattice, grid=None):
    """Which blocks of 8 lattice points may hold samples: their rays (K,) and first points (K,).

    A block is tested once, at its middle, against the grid widened by half a block. All blocks that
    a ray may have are tested: how many it has, a GPU's host would have to wait for.
    """
    most = math.ceil(2 * math.sqrt(3) / lattice.delta) + 1  # lattice points on the box's diagonal
    first = torch.arange(0, most, BLOCK, device=lattice.start.device)
    keep = first < lattice.count[:, None]  # (N, blocks)
    if grid is not None:
        middle = lattice.start[:, None] + (first + (BLOCK - 1) / 2) * lattice.delta
        points = lattice.rays_o[:, None] + middle[..., None] * lattice.rays_d[:, None]
        keep = keep & grid.near_occupied.view(-1)[grid.cell(points)]
    ray, block = keep.nonzero(as_tuple=True)
    return ray, first[block]


def samples_in(lattice, ray, first, grid=None):
    """Samples of blocks, rays (K,) and first points (K,): those in the box and occupied cells."""
    ray = ray[:, None]  # (K, 1)
    k = first[:, None] + torch.arange(BLOCK, device=ray.device)  # (K, 8)
    t = lattice.start[ray] + k * lattice.delta
    points = (lattice.rays_o[ray] + t[..., None] * lattice.rays_d[ray]).clamp(-1, 1)  # (K, 8, 3)
    keep = k < lattice.count[ray]
    if grid is not None:
        keep = keep & grid.occupied.view(-1)[grid.cell(points)]
    kept = keep.view(-1).nonzero()[:, 0]  # once: a GPU is waited for at each mask
    ray = ray[:, 0][kept // BLOCK]
    return Samples(ray, t.view(-1)[kept], points.view(-1, 3)[kept])


def lit_samples(lattice, ray, first, field, grid=None):
    """Those samples of blocks (K,), (K,) that light reaches, found front to back.

    Of each ray the first 2 blocks are looked at, then those up to the 4th, 8th, 16th ... until
    its light is spent. Blocks that had their turn are taken off the list. The samples of a ray are
    in order, but those of other rays lie between them.
    """
    rays = len(lattice.start)
    first_block = torch.searchsorted(ray, torch.arange(rays, device=ray.device))  # of each ray
    rank = torch.arange(len(ray), device=ray.device) - first_block[ray]  # of a block on its ray
    depth_behind = torch.zeros_like(lattice.start)  # optical depth of all that was looked at
    parts = []
    limit = 2
    while True:
        turn = rank < limit
        here = turn.nonzero()[:, 0]
        samples = samples_in(lattice, ray.take(here), first.take(here), grid)

        # What light arrives, T, and an upper bound of the weight: alpha = 1 - exp(-tau) <= tau
        tau = field(samples.points)[0] * lattice.delta
        T = transmittance(tau, samples.ray_index, rays)
        T = T * torch.exp(-depth_behind[samples.ray_index])
        lit = ((T >= T_MIN) & (T * tau >= W_MIN)).nonzero()[:, 0]
        parts.append(Samples(*(x.index_select(0, lit) for x in samples)))

        # Go on with the blocks behind, of rays that have light left
        depth_behind.index_add_(0, samples.ray_index, tau)
        spent = depth_behind[ray] > -math.log(T_MIN)
        left = (~(turn | spent)).nonzero()[:, 0]
        ray, first, rank = (x.take(left) for x in (ray, first, rank))
        limit *= 2
        if not len(ray):
            return Samples(*(torch.cat(x) for x in zip(*parts, strict=True)))


@torch.no_grad()
def march(rays_o, rays_d, steps, grid=None, offset=None, field=None):
    """Samples of rays (N, 3): the lattice points in the box and in occupied cells.

    steps: lattice points along the box's diagonal, 2 sqrt(3) / steps apart.
    offset: (N,) in 0..1 shifts the lattice of each ray (training).
    field: where given, only what its light reaches; without, everything.
    """
    lattice = lattice_of(rays_o, rays_d, steps, offset)
    ray, first = occupied_blocks(lattice, grid)
    if field is None:
        return samples_in(lattice, ray, first, grid)
    samples = lit_samples(lattice, ray, first, field, grid)
    order = samples.ray_index.sort(stable=True)[1]
    return Samples(*(x[order] for x in samples))


class Rendered(NamedTuple):
    """What composite and render return: of rays, and of the samples that made them."""
    rgb: torch.Tensor  # (N, 3)
    opacity: torch.Tensor  # (N,), sum of the weights
    depth: torch.Tensor  # (N,), sum of w t
    weights: torch.Tensor  # (S,), w = T alpha
    t: torch.Tensor  # (S,)
    ray_index: torch.Tensor  # (S,)


def composite(sigma, rgb, t, ray_index, rays, delta, background=1.0):
    """Packed samples (S,), (S, 3), (S,), (S,) of so many rays, `delta` apart -> Rendered.

    alpha = 1 - exp(-sigma delta), w = T alpha; a pixel is sum w rgb + (1 - sum w) background.
    """
    def sum_by_ray(x):
        return x.new_zeros(rays, *x.shape[1:]).index_add(0, ray_index, x)

    tau = sigma * delta
    weights = transmittance(tau, ray_index, rays) * -torch.expm1(-tau)
    opacity = sum_by_ray(weights)
    pixels = sum_by_ray(weights[:, None] * rgb.float()) + (1 - opacity[:, None]) * background
    return Rendered(pixels, opacity, sum_by_ray(weights * t), weights, t, ray_index)


def render(field, rays_o, rays_d, steps, grid=None, offset=None, background=1.0, cull=True):
    """Rays (N, 3) through a field -> Rendered.

    With `cull`, samples that no light reaches get neither colour nor gradients; see march.
    """
    ray_index, t, points = march(rays_o, rays_d, steps, grid, offset, field if cull else None)
    sigma, rgb = field(points, rays_d[ray_index])
    return composite(sigma, rgb, t, ray_index, len(rays_o), step_length(steps), background)


class Picture(NamedTuple):
    rgb: torch.Tensor  # (H, W, 3) in 0..1
    opacity: torch.Tensor  # (H, W)


@torch.no_grad()
def render_view(field, c2w, intrinsics, height, width, steps, grid=None):
    """A Picture of a field from a camera (4, 4), (4,), rendered in chunks of rays."""
    rays_o, rays_d = view_rays(c2w, intrinsics, height, width)
    samples = 2 ** 20 if c2w.is_cpu else 2 ** 22  # at most, a chunk
    chunk = max(samples // steps, 1)
    rgb = []
    opacity = []
    for o, d in zip(rays_o.split(chunk), rays_d.split(chunk), strict=True):
        part = render(field, o, d, steps, grid)
        rgb.append(part.rgb)
        opacity.append(part.opacity)
    rgb = torch.cat(rgb).view(height, width, 3).clamp(0, 1)
    return Picture(rgb, torch.cat(opacity).view(height, width))


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in 0..1."""
    return -10 * math.log10(max(F.mse_loss(a, b).item(), 1e-10))


# 6 Fitting ----------------------------------------------------------------------------------------
# Images become planes (section 3.1). In the first stage (Algorithm 1) `replay` visits avatars again
# and again; each visit, `fit_avatar`, trains the avatar's planes and the decoder that all share.
# Identity-aware weight consolidation (IWC, Eq. 3) pulls the decoder to what the avatar's last visit
# left, as far as its Fisher information says that the avatar needs it. In the second stage the
# decoder is frozen and fit_avatar fits planes alone.
class Views(NamedTuple):
    """Posed images of one avatar, in the coordinates of its box."""
    images: torch.Tensor  # (V, H, W, 4) uint8, straight alpha
    c2w: torch.Tensor  # (V, 4, 4)
    intrinsics: torch.Tensor  # (V, 4)
    has_alpha: bool  # some pixel is transparent
    unknown: torch.Tensor | None = None  # (V, H, W) bool: masked pixels, whose colours are nobody's

    def known_pixels(self, view, *pictures):
        """What pictures (H, W, 3) show where a view is known, (n, 3) each; all of them if it is
        known everywhere."""
        if self.unknown is None:
            return pictures
        known = ~self.unknown[view]
        return [picture[known] for picture in pictures]

    def outlines(self):
        """Images (V, H, W, 4) in which what is unknown counts as solid: it may be."""
        if self.unknown is None:
            return self.images
        images = self.images.clone()
        images[..., 3][self.unknown] = 255
        return images


# Pixels of at most this alpha, of 255, are empty: mattes leave a little everywhere. Silhouettes,
# hulls and boxes are all of pixels above it.
FAINT = 12


def on_white(images):
    """uint8 RGBA (..., 4) -> float RGB (..., 3) in 0..1, composited on white."""
    images = images.float() / 255
    return images[..., :3] * images[..., 3:] + 1 - images[..., 3:]


def grown(mask, radius):
    """A mask (..., H, W) that is true within a square of `radius` pixels around what is true.

    A window that is twice as wide is two windows side by side, so a pass over the mask doubles it:
    with a radius of 9 on 1024 x 1024 pixels that is 30 times as fast as max_pool2d.
    """
    for dim in (-2, -1):
        reach = min(radius, mask.shape[dim] - 1)
        padding = (reach, reach) if dim == -1 else (0, 0, reach, reach)
        mask = F.pad(mask, padding)
        width = 1  # of the window that each pixel has seen
        while width < 2 * reach + 1:
            step = min(width, 2 * reach + 1 - width)
            length = mask.shape[dim] - step
            mask = mask.narrow(dim, 0, length) | mask.narrow(dim, step, length)
            width += step
    return mask


def near_silhouette(image, radius):
    """Pixels (H, W) of an image (H, W, 4) at most `radius` from one that is not transparent."""
    return grown(image[..., 3] > FAINT, radius)


def near_edge(image, radius):
    """Pixels (H, W) of an image (H, W, 4) at most `radius` from one that is transparent, and from
    one that is solid."""
    alpha = image[..., 3]
    return grown(alpha > FAINT, radius) & grown(alpha < 255 - FAINT, radius)


@torch.no_grad()
def visual_hull(views, G, seen_by=0.0):
    """Cells (G, G, G) of the box that no image shows to be empty.

    A cell is empty where the disc that it covers in some image is transparent, or where less than
    the share `seen_by` of the views see it.
    """
    axis = (torch.arange(G) + 0.5) * (2 / G) - 1
    cells = torch.stack(torch.meshgrid(axis, axis, axis, indexing='ij')).view(3, -1)  # (3, G^3)
    alive = torch.arange(G ** 3)
    seen = torch.zeros(G ** 3)  # by how many views
    height, width = views.images.shape[1:3]
    outlines = views.outlines()
    for i in spread(len(outlines)):  # views that differ take most cells away at once
        # Project the cells that are left into the image
        c2w = views.c2w[i]
        fx, fy, cx, cy = views.intrinsics[i].tolist()
        x, y, z = c2w[:3, :3].T @ (cells - c2w[:3, 3:])  # camera coordinates, looking down -z
        depth = (-z).clamp(min=1e-3)
        x = fx * x / depth + cx
        y = cy - fy * y / depth
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (z < 0)
        seen += inside

        # A cell's disc, where cells are large, in pixels
        mean_depth = float(depth.mean().nan_to_num())
        least_depth = max(mean_depth - 1, mean_depth / 2, 0.1)
        radius = min(int(fx * math.sqrt(3) / G / least_depth) + 1, 64)

        row = y.int().clamp(0, height - 1)
        column = x.int().clamp(0, width - 1)
        solid = near_silhouette(outlines[i], radius).view(-1)[row * width + column]
        keep = (~inside | solid).nonzero()[:, 0]
        if len(keep) < len(alive):
            alive = alive[keep]
            cells = cells[:, keep]
            seen = seen[keep]

    hull = torch.zeros(G ** 3, dtype=torch.bool)
    hull[alive[seen / len(outlines) >= seen_by - 1e-4]] = True
    return hull.view(G, G, G)


def spread(n):
    """0 ... n - 1 in an order in which neighbours lie far apart: every so many, again and again."""
    stride = max(int(n ** 0.5), 1)
    return [i for first in range(stride) for i in range(first, n, stride)]


class Rays:
    """Random training rays over all views of an avatar.

    With a `margin`, rays are of pixels at most so far from the silhouette: those further out miss
    the visual hull and teach nothing. Of these, a share `edges` is of pixels within 2 of the
    silhouette's edge, where most of a fit's error is. Without, they are of all pixels.
    """
    def __init__(self, views, device, margin=None, edges=0.5):
        self.height, self.width = views.images.shape[1:3]
        self.c2w = views.c2w.to(device)
        self.intrinsics = views.intrinsics.to(device)
        self.near = None  # (n,) int32, flat indices of the pixels that rays are of
        self.edge = None  # (m,) int32, those of them, by their place in `near`, at the edge
        self.edges = 0.0
        near = []
        edge = []
        outlines = None if margin is None else views.outlines()
        for i, image in enumerate(views.images):
            if margin is not None:
                near.append(near_silhouette(outlines[i], margin))
                edge.append(near_edge(image, 2))
            elif views.unknown is not None:
                near.append(torch.ones(image.shape[:2], dtype=torch.bool))
            if near and views.unknown is not None:
                near[-1] = near[-1] & ~views.unknown[i]

        colours = views.images.view(-1, 4)
        if near:
            edge = [part[mask] for part, mask in zip(edge, near)]  # places in `near`
            near = indices(near)
            self.near = near.to(device)
            colours = colours[near]  # the others are never asked for
        self.pixels = colours.to(device)  # (n, 4) uint8
        if margin is None:
            return
        self.edge = indices(edge).to(device)
        if not len(self.near):
            stop('all views of an avatar are fully transparent')
        self.edges = edges if len(self.edge) else 0.0

    def to(self, device):
        """The same on a device."""
        content = dict(vars(self))
        for name, x in content.items():
            if torch.is_tensor(x):
                content[name] = x.to(device)
        return self.of(content)

    @classmethod
    def of(cls, content):
        """Rays of their vars(), which a file may have kept."""
        rays = cls.__new__(cls)
        vars(rays).update(content)
        return rays

    def draw(self, n, generator):
        """rays_o and rays_d (n, 3), and the colours on white (n, 3) that they should have."""
        at_edge = int(self.edges * n)
        picks = []
        for subset, count in ((None, n - at_edge), (self.edge, at_edge)):
            if count:
                total = len(self.pixels if subset is None else subset)
                pick = torch.randint(total, (count,), generator=generator).to(self.pixels.device)
                picks.append(pick if subset is None else subset[pick].long())
        pick = torch.cat(picks)
        flat = pick if self.near is None else self.near[pick].long()

        view = flat // (self.height * self.width)
        y = flat // self.width % self.height
        x = flat % self.width
        rays_o, rays_d = pixel_rays(self.c2w[view], self.intrinsics[view], x, y)
        return rays_o, rays_d, on_white(self.pixels[pick])


def indices(masks):
    """Flat indices, int32, of where masks, a list of tensors, are true, one after the other."""
    found = []
    before = 0
    for mask in masks:
        found.append((mask.view(-1).nonzero()[:, 0] + before).int())
        before += mask.numel()
    return torch.cat(found)


class Prepared(NamedTuple):
    """What a fit needs of an avatar's Views. With hundreds of large ones it takes many seconds to
    make, so that stage 1 keeps it between visits."""
    rays: Rays
    hull: torch.Tensor | None  # (G, G, G) bool, where the occupancy grid begins with one


def prepare(views, config, device, decoder_learns):
    """Views as Prepared for a fit. A decoder in the making got worse by rays at the edge, so it has
    none."""
    hull = None
    if config.hull_start and views.has_alpha:
        hull = visual_hull(views, config.grid)
    if not config.silhouette_rays:
        return Prepared(Rays(views, device), hull)
    # in pixels, how large a cell of the grid is at most: the hull goes beyond the silhouette
    distance = float(views.c2w[:, :3, 3].norm(dim=-1).min().clamp(min=0.5))
    focal = float(views.intrinsics[:, 0].max())
    cell = 2 * math.sqrt(3) / config.grid * focal / distance
    edges = 0.0 if decoder_learns else 0.5
    return Prepared(Rays(views, device, margin=6 + int(cell), edges=edges), hull)


@torch.no_grad()
def new_planes(decoder, config, generator):
    """Planes (3, C, r, r) where the first visit to an avatar starts: 0.1 N(0, 1).

    With fog_start that is around the smallest density feature which the decoder takes for a light
    fog (sigma 1 to 5): a trained decoder sees thin air or a wall around zero, and there is no
    gradient in either. r is R/4 where planes grow, else R.
    """
    _, C, r, _ = decoder.start.shape
    if not config.coarse_to_fine:
        r = config.resolution

    centre = torch.zeros(C)
    if config.fog_start:
        candidates = torch.zeros(2 ** 14, C)
        D = decoder.density_channels
        directions = 2 * torch.rand(2 ** 14, D, generator=generator) - 1
        candidates[:, -D:] = directions * torch.linspace(0, 1, 2 ** 14)[:, None]
        sigma = decoder(candidates.to(decoder.start.device))[0].cpu()
        off_fog = ((sigma + 1e-9).log() - 0.8).abs().sub(0.8).clamp(min=0)
        centre = candidates[(candidates.norm(dim=1) + 10 * off_fog).argmin()]
        centre = centre * (PLANE_DIVISOR / len(AXES))  # on each plane
    noise = 0.1 * torch.randn(len(AXES), r, r, C, generator=generator)
    return (centre + noise).permute(0, 3, 1, 2)


def consolidation(decoder, memory):
    """1/2 sum of fisher (w - anchor)^2: Eq. 3 without lambda.

    memory is {'fisher', 'anchor'}, each {parameter name: tensor}.
    """
    fisher = memory['fisher']
    anchor = memory['anchor']
    return 0.5 * sum(
        (fisher[name] * (w - anchor[name]).square()).sum() for name, w in decoder.named_parameters()
    )


def fisher_information(decoder, losses):
    """Mean over scalar data losses of their squared gradients, {parameter name: tensor}.

    Algorithm 1 has a single batch of rays, which is noisy. Losses whose gradients are not finite
    are left out.
    """
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    batches = [torch.autograd.grad(loss, parameters) for loss in losses]
    batches = [grads for grads in batches if all(g.isfinite().all() for g in grads)]
    fisher = {}
    for i, (name, parameter) in enumerate(zip(names, parameters)):
        squares = sum((grads[i].square() for grads in batches), torch.zeros_like(parameter))
        fisher[name] = squares / max(len(batches), 1)
    return fisher


class Finite:
    """finite(tensors) tells whether a step may be taken: whether loss and gradients are finite.

    It stops the program after `most` steps in a row that may not. A fused optimizer can leave out a
    step by itself: `step` tells it on the device, and looks at how it went every 16 steps, as the
    host would have to wait each time.
    """
    def __init__(self, what, most=5):
        self.what = what
        self.most = most
        self.skipped = 0
        self.row = 0
        self.later = []  # what was found at steps that nobody has looked at

    def __call__(self, *tensors):
        bad = bool(not_finite(tensors))
        self.count(bad)
        return not bad

    def count(self, bad):
        self.row = self.row + 1 if bad else 0
        self.skipped += bad
        if self.row >= self.most:
            stop(f'{self.what}: loss or gradient not finite {self.row} times in a row; '
                 'lower the learning rate (what is saved is finite)')

    def step(self, optimizer, *tensors):
        """A step of an optimizer, where these are finite."""
        if not optimizer.defaults.get('fused'):
            if self(*tensors):
                optimizer.step()
            return
        optimizer.found_inf = not_finite(tensors)
        optimizer.step()
        self.later.append(optimizer.found_inf)
        if len(self.later) == 16:
            self.look()

    def look(self):
        """Counts the steps that nobody has looked at."""
        later = self.later
        self.later = []
        if later:
            for bad in torch.stack(later).tolist():
                self.count(bool(bad))


def not_finite(tensors):
    """1.0 where some value of some of the tensors is infinite or NaN, else 0.0; a tensor ()."""
    tensors = [x.detach() for x in tensors]
    if tensors[0].is_cpu:  # whose largest norm takes ten times as long as a sum
        found = [x.sum() for x in tensors]
    else:
        found = torch._foreach_norm(tensors, math.inf)  # writes no masks
    return 1 - torch.stack(found).isfinite().all().float()


def by_steps(steps):
    """The pace of a fit of so many steps: the share that is done, before each."""
    for step in range(steps):
        yield step / steps


def by_seconds(seconds):
    """The pace of a fit that takes about so many seconds."""
    began = time.monotonic()
    done = 0.0
    while done < 1:
        yield done
        done = (time.monotonic() - began) / seconds


def size_of_planes(progress, config):
    """Texels a side at a share of a fit: R/4, from 10 % on R/2, from 30 % on R."""
    if not config.coarse_to_fine or progress >= 0.3:
        return config.resolution
    return config.resolution // (4 if progress < 0.1 else 2)


def planes_of(table):
    """Planes (3, C, R, R) of a table (3, R, R, C), in which a fit stores them: channels-last."""
    return table.permute(0, 3, 1, 2)


def distortion(weights, t, ray_index, rays, steps):
    """Mean over rays of how spread out the weights along a ray are (mip-NeRF 360, Eq. 15).

    Weights, distances t and ray_index are (S,), packed as in Samples. A ray's is the sum over all
    pairs of w_i w_j |s_i - s_j|, plus 1/3 of the sum of w_i^2 delta: the same within a sample. Here
    s = t / (2 sqrt 3) and delta = 1 / steps, shares of the box's diagonal.
    """
    # Samples are in order, so what lies before each is one running sum, and no pairs are formed:
    # sum over i of 2 w_i (s_i sum_{j<i} w_j - sum_{j<i} w_j s_j)
    s = t / (2 * math.sqrt(3))
    weight_before = sum_before(weights, ray_index, rays)
    moment_before = sum_before(weights * s, ray_index, rays)
    between = 2 * (weights * (s * weight_before - moment_before)).sum()
    within = weights.square().sum() / (3 * steps)
    return ((between + within) / rays).float()


def density_losses(field, points, generator):
    """How much density there is at points (N, 3), and by how much it varies: `sparse`, `smooth`.

    sparse is the mean of sigma, an L1 norm; smooth the mean of |sigma(p) - sigma(p')|, where p' is
    p plus 0.004 N(0, 1) (EG3D). Both are scalars, not yet weighted.
    """
    noise = torch.randn(points.shape, generator=generator, device=generator.device).to(points)
    beside = (points + 0.004 * noise).clamp(-1, 1)
    sigma, sigma_beside = field(torch.cat([points, beside]))[0].chunk(2)
    return {'sparse': sigma.mean(), 'smooth': (sigma - sigma_beside).abs().mean()}


def ray_losses(planes, decoder, rays, grid, config, generator):
    """Weighted terms of the loss that a batch of random rays gives; `rgb` is the data loss."""
    device = grid.values.device
    rays_o, rays_d, target = rays.draw(config.rays, generator)
    offset = torch.rand(len(rays_o), generator=generator).to(device)
    field = PlaneField(planes, decoder)
    cull = bool(config.cull)
    rendered = render(field, rays_o, rays_d, config.steps, grid, offset, cull=cull)
    terms = {'rgb': F.mse_loss(rendered.rgb, target)}
    if config.weight_distortion:
        spread = distortion(
            rendered.weights, rendered.t, rendered.ray_index, len(rays_o), config.steps
        )
        terms['distortion'] = config.weight_distortion * spread
    return terms


def regularisers(planes, decoder, grid, config, generator, decoder_learns):
    """What planes (3, C, R, R) should be besides: smooth, small, empty outside of the hull, and of
    little and smooth density.

    Returns a dict of weighted terms. They cost as much as the rays do, so that a fit may have them
    every so many steps, as many times as strong.
    """
    every = config.regulariser_every
    terms = {
        'tv': every * config.weight_tv * total_variation(planes),
        'l2': every * config.weight_l2 * len(AXES) * planes.square().mean(),
    }
    # generated planes are rendered without a hull, so what is empty has to stay empty
    if config.weight_empty and grid.outside is not None:
        device = planes.device
        cell = torch.randint(config.grid, (4096, 3), generator=generator).to(device)
        jitter = torch.rand(4096, 3, generator=generator).to(device)
        sigma = PlaneField(planes, decoder)((cell + jitter) * (2 / config.grid) - 1)[0]
        if decoder_learns:  # a push on log density would harden a decoder in the making
            excess = 0.2 * torch.log1p(sigma)
        else:
            excess = torch.log(sigma.clamp(min=EMPTY) / EMPTY)
        push = (excess * grid.outside[cell.unbind(1)]).mean()
        terms['empty'] = every * config.weight_empty * push
    if config.weight_sparse or config.weight_smooth:
        points = 2 * torch.rand(1000, 3, generator=generator).to(planes.device) - 1
        found = density_losses(PlaneField(planes, decoder), points, generator)
        for name, term in found.items():
            weight = getattr(config, f'weight_{name}')
            if weight:
                terms[name] = every * weight * term
    return terms


class Joint(NamedTuple):
    """What a visit needs besides when it trains the decoder, too."""
    optimizer: torch.optim.Optimizer  # of the decoder
    memory: dict | None  # what the avatar's last visit left, see consolidation
    average: Callable[[], None]  # averages the decoder's gradients over the ranks
    visit: int = 0  # which visit this is,
    visits: int = 1  # of how many, to all avatars: the learning rate falls over all of them


class Visit(NamedTuple):
    """What fit_avatar returns."""
    planes: torch.Tensor  # (3, C, R, R) in [-1, 1]
    grid: OccupancyGrid
    memory: dict | None  # for the avatar's next visit; None under a frozen decoder


def step_decoder(decoder, joint, done, config, finite):
    """A step of the decoder by the gradients of all ranks, at a share of a visit."""
    share_of_training = (joint.visit + done) / joint.visits
    lr = config.lr_decoder * config.decoder_final_lr ** share_of_training
    joint.optimizer.param_groups[0]['lr'] = lr
    joint.average()
    # the same on all ranks, so all of them step, or none
    finite.step(joint.optimizer, *(p.grad for p in decoder.parameters() if p.grad is not None))
    joint.optimizer.zero_grad()


def fit_avatar(
    views,  # Views to fit, or what `prepare` made of them
    start,  # planes (3, C, r, r) of any size that the fit begins with
    decoder,
    config,
    pace,  # by_steps(n) or by_seconds(s): the share that is done, before each step
    *,
    span=(0.0, 1.0),  # the part of the avatar's whole fit: size and learning rate follow
    joint=None,  # a Joint where the decoder learns, too
    seed=0,
    report=None,  # called with the share done and the terms of the loss, now and then
):
    """One visit to an avatar (the inner loop of Algorithm 1) -> Visit."""
    device = next(decoder.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    if isinstance(views, Views):
        views = prepare(views, config, device, decoder_learns=joint is not None)
    rays = views.rays.to(device)
    grid = OccupancyGrid(config.grid, config.steps, device, views.hull)
    finite = Finite('fit')
    finite_decoder = Finite('decoder')
    table = None

    for step, done in enumerate(pace):
        progress = span[0] + (span[1] - span[0]) * done

        # At the first step, and where the planes double: a new table, and an optimizer for it
        size = size_of_planes(progress, config)
        if table is None or table.shape[1] != size:
            source = start if table is None else planes_of(table.detach())
            source = resize_planes(source.to(device).float(), size)
            table = source.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
            table.requires_grad_()  # a copy: `start` may have this layout, and stays as it is
            optimizer = torch.optim.Adam([table], betas=(0.9, 0.99), fused=True)
        planes = planes_of(table)
        optimizer.param_groups[0]['lr'] = config.lr_planes * config.planes_final_lr ** progress

        if step % 16 == 0:
            cells = None if step < 256 else grid.some_cells(generator)
            grid.update(PlaneField(planes.detach(), decoder), generator, cells)

        # Robust planes (Rodin): some steps see them at a random lower resolution. It is drawn at
        # every step, so that what else is random stays the same without.
        rescaled = torch.rand((), generator=generator) < config.rescale
        lower = int(torch.randint(size // 4, size, (), generator=generator))
        seen = resize_planes(planes, lower) if rescaled else planes

        # Line 5 of Algorithm 1
        terms = ray_losses(seen, decoder, rays, grid, config, generator)
        if step % config.regulariser_every == 0:
            terms |= regularisers(planes, decoder, grid, config, generator, joint is not None)
        if joint and joint.memory and config.weight_iwc:
            terms['iwc'] = config.weight_iwc * consolidation(decoder, joint.memory)
        loss = sum(terms.values())

        # Line 6: the planes, which stay in [-1, 1]
        optimizer.zero_grad()
        loss.backward()
        finite.step(optimizer, loss, table.grad)
        table.data.clamp_(-1, 1)

        # Line 7: the decoder
        if joint:
            step_decoder(decoder, joint, done, config, finite_decoder)

        if report and step % 50 == 0:
            report(done, {name: term.item() for name, term in terms.items()})

    finite.look()
    finite_decoder.look()
    planes = planes_of(table.detach())
    if not joint:
        return Visit(planes, grid, None)

    # Line 9: what the decoder was at the end of this visit, and what of it matters here
    losses = (
        ray_losses(planes, decoder, rays, grid, config, generator)['rgb']
        for _ in range(config.fisher_batches)
    )
    anchor = {name: w.detach().clone() for name, w in decoder.named_parameters()}
    return Visit(planes, grid, {'fisher': fisher_information(decoder, losses), 'anchor': anchor})


class Task(NamedTuple):
    """An avatar, as replay finds it."""
    views: Views | Prepared
    planes: torch.Tensor  # (3, C, r, r): its last visit's, or new ones
    memory: dict | None  # its last visit's; None at the first


def replay(tasks, decoder, config, *, optimizer, begin=0, seconds=None, seed=0):
    """Algorithm 1, the first stage of fitting: task replay with weight consolidation.

    Visits avatars again and again, config.inner steps each, until each has had config.outer visits;
    on a single rank also for about so many `seconds` each (several ranks would take unlike numbers
    of steps). It is a generator: after each visit it yields its number and the Visit, and goes on
    from visit `begin`. `tasks` keeps avatars between their visits:

        tasks.rounds             visits until each avatar has had one (on this rank)
        tasks.load(n)            the Task of visit n; None where this rank has nothing to do
        tasks.keep(n, visit)     keeps what the visit left, for the avatar's next one
        tasks.average(active)    averages the decoder's gradients over the ranks that are active
        tasks.report(n, done, terms)
    """
    visits = config.outer * tasks.rounds
    for n in range(begin, visits):
        outer = n // tasks.rounds
        task = tasks.load(n)
        if task is None and seconds:
            stop('replay: seconds are for a single rank, each of whose visits has a task; with '
                 'several, give config.inner steps')
        memory = task.memory if task else None
        average = functools.partial(tasks.average, active=task is not None)
        joint = Joint(optimizer, memory, average, n, visits)
        if task is None:
            keep_pace(decoder, joint, config)
            yield n, None
            continue

        visit = fit_avatar(
            task.views,
            task.planes,
            decoder,
            config,
            by_seconds(seconds) if seconds else by_steps(config.inner),
            span=(outer / config.outer, (outer + 1) / config.outer),
            joint=joint,
            seed=seed + n,
            report=functools.partial(tasks.report, n),
        )
        tasks.keep(n, visit)
        yield n, visit


def keep_pace(decoder, joint, config):
    """A rank without an avatar takes the other ranks' steps of the decoder."""
    finite = Finite('decoder')
    for done in by_steps(config.inner):
        step_decoder(decoder, joint, done, config, finite)
    finite.look()


# 7 Portrait features ------------------------------------------------------------------------------
# A frozen VAE looks at the portrait once (section 3.2, Eq. 7), since the timestep plays no part in
# it. Its latent becomes a vector that joins the time embedding, its three finest maps become tokens
# that the networks attend to. Another encoder can take its place: see portrait_encoder.
conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


class Norm(nn.GroupNorm):
    """GroupNorm that gives autocast's type, where there is autocast, which would make fp32 of it.

    The activations that training keeps would be as large as without. Means and variances are summed
    in fp32 all the same.
    """
    def forward(self, x):
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            weights = (self.weight.to(dtype), self.bias.to(dtype))
            return F.group_norm(x.to(dtype), self.num_groups, *weights, self.eps)


def norm(channels, eps=1e-5):
    """GroupNorm in 32 groups, as in the published models.

    32 channels and fewer get 8 groups: a group of one channel would forget its mean.
    """
    groups = 32 if channels > 32 else 8
    return Norm(math.gcd(channels, groups), channels, eps)


def zero(module):
    """Zeroes a module's parameters: a residual branch that ends in it starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def doubled(channels, times=1, **mode):
    """Doubles height and width, once or several times, then convolves. mode: of nn.Upsample."""
    resize = nn.Upsample(scale_factor=2 ** times, **mode)
    return nn.Sequential(OrderedDict(resize=resize, conv=conv(channels, channels)))


def halved(channels):
    """Halves height and width; pads right and bottom only, as published VAE weights expect."""
    stride = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=stride))


class ResnetBlock(nn.Module):
    """Residual block of the VAE (emb 0), and of the upsample network.

    In the latter the time embedding is added, and `second` makes the second convolution.
    """
    def __init__(self, c_in, c_out, emb=0, second=conv):
        super().__init__()
        self.norm1 = norm(c_in, 1e-6)
        self.conv1 = conv(c_in, c_out)
        self.emb = nn.Linear(emb, c_out) if emb else None
        self.norm2 = norm(c_out, 1e-6)
        self.conv2 = second(c_out, c_out)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.emb is not None:
            h = h + self.emb(F.silu(emb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class VAEAttention(nn.Module):
    """Self-attention with a single head over all pixels."""
    def __init__(self, channels):
        super().__init__()
        self.group_norm = norm(channels, 1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # its name is to_out.0

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, pixels, channels)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h)[:, 0].transpose(1, 2).reshape(x.shape)


class VAEBlock(nn.Module):
    """Residual blocks at one resolution, then a halving, a doubling or neither.

    The block in the middle has attention after its first residual block.
    """
    def __init__(self, c_in, c_out, layers, down=False, up=False, middle=False):
        super().__init__()
        widths = [c_in] + [c_out] * layers
        self.resnets = nn.ModuleList(
            ResnetBlock(a, b) for a, b in itertools.pairwise(widths)
        )
        self.attentions = nn.ModuleList([VAEAttention(c_out)] if middle else [])
        self.downsamplers = nn.ModuleList([halved(c_out)] if down else [])
        self.upsamplers = nn.ModuleList([doubled(c_out)] if up else [])

    def forward(self, x):
        x = self.resnets[0](x)
        for layer in (*self.attentions, *self.resnets[1:], *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class VAE(nn.Module):
    """Image autoencoder with the names and shapes of diffusers' AutoencoderKL.

    At `paper` it is SDXL's, with 83,653,863 parameters. Images are (B, 3, P, P) in [-1, 1], P a
    multiple of 8; latents are (B, 4, P/8, P/8), not yet times vae_scale.
    """
    def __init__(self, config):
        super().__init__()
        widths = config.vae_widths
        latent = config.vae_latent
        if len(widths) != 4:
            raise ValueError(f'the VAE has four levels, vae_widths has {len(widths)}')
        self.encoder = self.make_encoder(widths, config.vae_layers, 2 * latent)
        self.decoder = self.make_decoder(widths[::-1], config.vae_layers + 1, latent)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    @staticmethod
    def make_encoder(widths, layers, latent):
        """Images to `latent` channels; widths of the levels from fine to coarse."""
        top = widths[0]
        bottom = widths[-1]
        return nn.Sequential(OrderedDict(
            conv_in=conv(3, top),
            down_blocks=nn.Sequential(*(
                VAEBlock(c_in, c_out, layers, down=level < 3)
                for level, (c_in, c_out) in enumerate(zip((top, *widths), widths))
            )),
            mid_block=VAEBlock(bottom, bottom, 2, middle=True),
            conv_norm_out=norm(bottom, 1e-6),
            silu=nn.SiLU(),
            conv_out=conv(bottom, latent),
        ))

    @staticmethod
    def make_decoder(widths, layers, latent):
        """`latent` channels to images; widths of the levels from coarse to fine."""
        bottom = widths[0]
        top = widths[-1]
        return nn.Sequential(OrderedDict(
            conv_in=conv(latent, bottom),
            mid_block=VAEBlock(bottom, bottom, 2, middle=True),
            up_blocks=nn.Sequential(*(
                VAEBlock(c_in, c_out, layers, up=level < 3)
                for level, (c_in, c_out) in enumerate(zip((bottom, *widths), widths))
            )),
            conv_norm_out=norm(top, 1e-6),
            silu=nn.SiLU(),
            conv_out=conv(top, 3),
        ))

    def features(self, images):
        """The maps y1, y2, y3 at P/2, P/4, P/8, with vae_widths[:3] channels.

        They also are the features of a perceptual loss.
        """
        x = self.encoder.conv_in(images)
        maps = []
        for block in self.encoder.down_blocks[:3]:
            x = block(x)
            maps.append(x)
        return maps

    def encode(self, images):
        """Images to posterior mean and log variance (B, 4, P/8, P/8), and `features`."""
        maps = self.features(images)
        x = self.encoder.down_blocks[3](maps[-1])
        x = self.encoder[2:](x)  # from mid_block on
        mean, logvar = self.quant_conv(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20), maps

    def decode(self, latent):
        """Latents to images (B, 3, P, P), not clamped."""
        return self.decoder(self.post_quant_conv(latent))

    def forward(self, images, noise):
        """Training: images, and noise (B, 4, P/8, P/8) that draws a sample of the posterior.

        Returns the reconstruction from it, and the posterior's mean and log variance.
        """
        mean, logvar, _ = self.encode(images)
        return self.decode(mean + (logvar / 2).exp() * noise), mean, logvar


# What a network and the encoder that it was trained with must have in common
ENCODER_SETTINGS = ('portrait', 'vae_widths', 'vae_latent', 'vae_scale')


def portrait_encoder(config):
    """The network that looks at portraits, whose weights are in <runs>/vae.pt.

    Another one needs two methods: encode(images) -> latent, anything, [y1, y2, y3], and
    features(images) -> [y1, y2, y3], for images (B, 3, H, W) in [-1, 1]; and feature_shapes has to
    tell what it returns. Where the base network takes a vector of portraits, too, `vector` is a
    function(images) -> (B, latent_width). What chooses it belongs into ENCODER_SETTINGS. If it is
    not trained here, `train.py --stage vae --set vae_steps=0` writes it as it is, or with the
    weights of --vae.
    """
    return VAE(config)


def feature_shapes(config):
    """(channels, pixels a side) of the latent, and a list of them for y1, y2, y3.

    All layers that take these in ask here. Maps are cut into 8 x 8 patches, the latent into 2 x 2.
    """
    P = config.portrait
    y1, y2, y3 = config.vae_widths[:3]
    return (config.vae_latent, P // 8), [(y1, P // 2), (y2, P // 4), (y3, P // 8)]


class Portrait(NamedTuple):
    """What a network is conditioned on; the upsample network needs `lr`, too."""
    latent: torch.Tensor  # the posterior's mean times vae_scale, (B, 4, P/8, P/8) of the VAE
    maps: list  # y1, y2, y3; see feature_shapes
    lr: torch.Tensor | None = None  # low-resolution planes (B, 3, C, r, r), which are never dropped
    vector: torch.Tensor | None = None  # (B, latent_width), of the portrait or of anything else


@torch.no_grad()
def encode_portrait(vae, images, config):
    """Images (B, 3, P, P) in [-1, 1] to a Portrait.

    It takes the posterior's mean, not a sample, so that it is the same every time. config is the
    network's that will see it.
    """
    mean, _, maps = vae.encode(images)
    vector_of = getattr(vae, 'vector', None)
    vector = vector_of(images) if vector_of else None
    return Portrait(mean * config.vae_scale, maps, vector=vector)


def nobody(config, count=1, vector=None):
    """The Portrait of nobody, `count` times: the null condition, or one of a vector (count,
    latent_width) alone."""
    (channels, pixels), maps = feature_shapes(config)
    latent = torch.zeros(count, channels, pixels, pixels)
    maps = [torch.zeros(count, c, p, p) for c, p in maps]
    if vector is not None:
        latent = latent.to(vector.device)
        maps = [x.to(vector.device) for x in maps]
    return Portrait(latent, maps, vector=vector)


def drop(portrait, keep=(False,), keep_vector=(False,)):
    """Zeroes latent and maps where keep (B,) is false, and the vector, if there is one, where
    keep_vector (B,) is; by default all: the null condition.

    Its tokens are all alike, the bias of a GroupNorm.
    """
    def masked(x, keep):
        return x * torch.as_tensor(keep).to(x).view(-1, *[1] * (x.ndim - 1))

    maps = [masked(x, keep) for x in portrait.maps]
    vector = portrait.vector
    if vector is not None:
        vector = masked(vector, keep_vector)
    return portrait._replace(latent=masked(portrait.latent, keep), maps=maps, vector=vector)


@dataclass
class Condition:
    """A Portrait after a network's own layers: all that does not depend on t."""
    pooled: torch.Tensor  # (B, E)
    keys_values: dict  # of each layer that attends to the portrait: (B, heads, L, head), twice
    lr: torch.Tensor | None = None  # enlarged and rolled out, (B, C, R, 3R)


def join(a, b):
    """Two Conditions as one batch, for guidance; works on all that they are made of."""
    if a is None:
        return None
    if torch.is_tensor(a):
        return torch.cat([a, b])
    if isinstance(a, dict):
        return {key: join(a[key], b[key]) for key in a}
    if isinstance(a, (list, tuple)):
        return [join(x, y) for x, y in zip(a, b)]
    return replace(a, **{f.name: join(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)})


class PortraitTokens(nn.Module):
    """Some of the maps y1, y2, y3 as tokens (supplement A).

    used: numbers 0, 1, 2 of the maps. Each is cut into 8 x 8 patches: {number: (B, 64, W)}.
    """
    def __init__(self, config, used):
        super().__init__()
        self.used = used
        self.positions = Positions() if config.positions else None
        _, maps = feature_shapes(config)
        self.patches = nn.ModuleList()
        for i in used:
            channels, pixels = maps[i]
            if pixels % 8:
                raise ValueError(f'a map of {pixels} x {pixels} pixels has no 8 x 8 patches')
            side = pixels // 8
            cut = nn.Conv2d(channels, config.token_width, side, stride=side, bias=False)
            self.patches.append(nn.Sequential(norm(channels), cut))

    def forward(self, maps):
        tokens = {}
        for i, patch in zip(self.used, self.patches):
            tokens[i] = patch(maps[i]).flatten(2).transpose(1, 2)  # (B, 64, W)
            if self.positions:
                tokens[i] = tokens[i] + self.positions(8, 8, tokens[i])
        return tokens


class PooledEmbedding(nn.Module):
    """The latent as one vector (B, E): its four patches, pooled by attention with 8 heads.

    The query is the mean of the patches plus a learned vector (supplement A).
    """
    def __init__(self, config, emb):
        super().__init__()
        width = config.pool_width
        if width % 8:
            raise ValueError(f'pool_width {width} is no multiple of 8 heads')
        (channels, pixels), _ = feature_shapes(config)
        side = pixels // 2
        self.patch = nn.Conv2d(channels, width, side, stride=side, bias=False)
        self.norm = nn.LayerNorm(width)
        self.norm_out = nn.LayerNorm(emb)
        self.query = nn.Parameter(torch.randn(width).div_(width ** 0.5))
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, emb)

    def forward(self, latent):
        tokens = self.norm(self.patch(latent).flatten(2).transpose(1, 2))  # (B, 4, width)
        query = tokens.mean(1, keepdim=True) + self.query  # (B, 1, width)
        tokens = torch.cat([query, tokens], 1)  # (B, 5, width)

        def heads(x):  # (B, n, width) -> (B, 8, n, width / 8)
            return x.unflatten(2, (8, -1)).transpose(1, 2)

        q, k, v = heads(self.q(query)), heads(self.k(tokens)), heads(self.v(tokens))
        pooled = F.scaled_dot_product_attention(q, k, v).flatten(1)  # (B, width)
        return self.norm_out(self.proj(pooled))  # (B, E)


# 8 3D-aware U-Nets --------------------------------------------------------------------------------
# Two U-Nets see the planes side by side (supplement A lists their layers). 3D-aware convolution
# (Rodin, section 3.2) shows each texel of a plane what lies above it on the two others. Both are
# called as net(x, t, condition): planes (B, 3, C, R, R), t (B,) in [0, 1000], and a Portrait or,
# faster when it is used again and again, the Condition that net.condition makes of it.
def timestep_embedding(t, width):
    """Cosines, then sines, of t (B,) at width / 2 frequencies from 1 to almost 1/10000."""
    order = torch.arange(width // 2, device=t.device)
    frequencies = torch.exp(-math.log(10000) / (width // 2) * order)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, width)


def position_encoding(rows, columns, width):
    """Where the cells of an image are: (rows * columns, width).

    The first half is the timestep_embedding of the row, the second of the column, each from 0 to
    100.
    """
    row = torch.linspace(0, 100, rows)
    column = torch.linspace(0, 100, columns)
    row, column = torch.meshgrid(row, column, indexing='ij')
    halves = [timestep_embedding(x.reshape(-1), width // 2) for x in (row, column)]
    return torch.cat(halves, dim=1)


class Positions:
    """position_encoding of images that have (rows, columns), made once for each size: on a GPU
    that is 20 kernels, or a copy."""
    def __init__(self):
        self.made = {}

    def __call__(self, rows, columns, like):
        """Returns it in width, type and device of cells (B, rows * columns, width)."""
        key = (rows, columns, like.shape[2], like.dtype, like.device)
        if key not in self.made:
            self.made[key] = position_encoding(rows, columns, like.shape[2]).to(like)
        return self.made[key]


class AwareConv(nn.Module):
    """3D-aware convolution, (B, c_in, H, 3H) to (B, c_out, H, 3H), H at least 2; starts at zero.

    Each plane has a 3 x 3 convolution of its own, which sees all three planes as 3 c_in channels:
    itself as it is, and the others averaged over the axis that it lacks. Plane xy, for instance,
    sees xz averaged over z: a line along x, which it repeats along y.
    """
    def __init__(self, c_in, c_out):
        super().__init__()
        self.convs = nn.ModuleList(zero(conv(3 * c_in, c_out)) for _ in AXES)

    def plain(self, x):
        """The meaning of `forward`."""
        planes = x.chunk(len(AXES), dim=3)
        out = []
        for p, convolution in enumerate(self.convs):
            seen = []
            for q, other in enumerate(planes):
                if q != p:
                    averaged, constant = self.dimensions(p, q)
                    lines = other.mean(averaged)  # (B, c_in, H)
                    other = lines.unsqueeze(constant).expand_as(other)
                seen.append(other)
            out.append(convolution(torch.cat(seen, dim=1)))
        return torch.cat(out, dim=3)

    def forward(self, x):
        return torch.cat([self.convolve(p, x) for p in range(len(AXES))], dim=3)

    def convolve(self, p, x):
        """One plane's convolution, faster: what is constant along an axis costs a 1D convolution.

        The zero-padded convolution of such a map has but three distinct lines: first, last, and all
        between.
        """
        own = self.convs[p]
        planes = x.chunk(len(AXES), dim=3)  # 3 x (B, c_in, H, H)
        weights = own.weight.chunk(len(AXES), dim=1)  # 3 x (c_out, c_in, 3, 3)
        out = F.conv2d(planes[p], weights[p], own.bias, padding=1)  # (B, c_out, H, H)
        for q in range(len(AXES)):
            if q == p:
                continue
            averaged, constant = self.dimensions(p, q)
            lines = planes[q].mean(averaged)  # (B, c_in, H)

            # The kernel, too, has lines along `constant`. As those of the map are all alike, those
            # of the kernel that meet it add up: the first line has none before it, the last none
            # after it.
            before, at, after = weights[q].unbind(constant)  # 3 x (c_out, c_in, 3)
            kernels = torch.cat([at + after, before + at + after, before + at])
            made = F.conv1d(lines, kernels, padding=1)  # (B, 3 c_out, H): first, between, last
            first, between, last = made.unsqueeze(constant).chunk(3, dim=1)
            between = between.expand_as(out).narrow(constant, 1, out.shape[2] - 2)
            out = out + torch.cat([first, between, last], constant)
        return out

    @staticmethod
    def dimensions(p, q):
        """How plane p sees plane q: the dimension of q that is averaged away, and the dimension of
        p along which the result is constant (2 is height, 3 is width)."""
        shared, = set(AXES[p]) & set(AXES[q])
        # planes are stored as (height, width), AXES are (width, height)
        averaged = 2 + AXES[q].index(shared)
        constant = 2 + AXES[p].index(shared)
        return averaged, constant


class ResBlock(nn.Module):
    """Residual block of the base network; the time embedding scales and shifts.

    `resample` is applied to both branches, before the first convolution.
    """
    def __init__(self, c_in, c_out, emb, aware=False, resample=None):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = conv(c_in, c_out)
        self.emb = nn.Linear(emb, 2 * c_out)
        self.norm2 = norm(c_out)
        self.conv2 = AwareConv(c_out, c_out) if aware else zero(conv(c_out, c_out))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.resample = resample or nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(self.resample(x)) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Texels (B, c, H, 3H) attend to the tokens of portrait map number `map`, if any.

    With `joint` they attend to one another as well, in the same softmax.
    """
    def __init__(self, channels, head, token_width, joint, map, positions=0):
        super().__init__()
        if channels % head:
            raise ValueError(f'{channels} channels are no multiple of head width {head}')
        self.heads = channels // head
        self.map = map
        self.positions = Positions() if positions else None
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels if joint else channels)
        self.proj = zero(nn.Linear(channels, channels))
        self.norm_tokens = nn.Identity() if joint else norm(token_width)
        self.kv = None if map is None else nn.Linear(token_width, 2 * channels)

    def split(self, x, parts):
        """(B, n, parts c), channels by head, then part -> parts x (B, heads, n, c / heads)."""
        x = x.unflatten(2, (self.heads, parts, -1))
        return [part.transpose(1, 2) for part in x.unbind(3)]

    def keys_values(self, tokens):
        """Tokens (B, L, W) -> keys and values (B, heads, L, head)."""
        tokens = self.norm_tokens(tokens.transpose(1, 2)).transpose(1, 2)
        return self.split(self.kv(tokens), 2)

    def forward(self, x, keys_values=()):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, 3HH, c)
        if self.positions:
            h = h + self.positions(*x.shape[2:], h)
        parts = self.qkv.out_features // self.qkv.in_features
        q, *own = self.split(self.qkv(h), parts)  # (B, heads, 3HH, head)

        # Tokens first, then the texels' own keys and values: (B, heads, L + 3HH, head)
        sources = [source for source in (keys_values, own) if source]
        k = torch.cat([source[0] for source in sources], dim=2)
        v = torch.cat([source[1] for source in sources], dim=2)

        h = F.scaled_dot_product_attention(q, k, v)
        h = self.proj(h.transpose(1, 2).flatten(2))  # (B, 3HH, c)
        return x + h.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """What both networks share: embeddings, and a U of layers.

    width: of the first level; maps: {plane height: number of the portrait map seen there}. With
    `checkpoint` set, training computes activations again in the backward pass.

    A subclass says which layers stand where (layers_at, resample), and what happens around the U
    (on_planes). Its constructor calls add_condition, then add_body, then makes its own layers.
    """
    def __init__(self, config, width, maps):
        super().__init__()
        self.config = config
        self.width = width
        self.emb = 4 * width  # E
        self.maps = maps
        self.once = False  # whether one layer goes up from the lowest level to the first
        self.checkpoint = False

    def add_condition(self):
        """Layers for the time and the portrait."""
        used = sorted({*self.maps.values()} - {None})
        self.time = nn.Sequential(
            nn.Linear(self.width, self.emb),
            nn.SiLU(),
            nn.Linear(self.emb, self.emb),
        )
        self.tokens = PortraitTokens(self.config, used)
        self.pooled = PooledEmbedding(self.config, self.emb)

    def add_body(self, c, mult, blocks, body, height):
        """The U, over features of c channels on planes of `height` texels a side.

        mult: width of each level, times self.width; blocks: a level; body: times in the middle.
        """
        halvings = len(mult) - 1
        if height % 2 ** halvings:
            raise ValueError(f'planes of {height} cannot be halved {halvings} times')
        widths = [m * self.width for m in mult]
        ways_up = list(reversed(range(len(widths))))  # the levels that the way up comes by
        if self.once:
            ways_up = sorted({halvings, 0}, reverse=True)
        skips = [c]  # channels of what the way up will see
        self.skips = [True]  # of the input and each entry of the encoder: whether it will
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        self.middle = nn.ModuleList()

        # Down: each entry of the encoder gives one skip connection
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.encoder.append(nn.ModuleList(self.layers_at(height, c, width)))
                c = width
                skips.append(c)
                self.skips.append(level in ways_up)
            if level < halvings:
                self.encoder.append(nn.ModuleList([self.resample(c, up=False)]))
                skips.append(c)
                self.skips.append(level + 1 in ways_up)
                height //= 2
        skips = list(itertools.compress(skips, self.skips))

        # The middle: residual, attention, residual
        for _ in range(body):
            self.middle.extend(self.layers_at(height, c, c, middle=True))
            self.middle.append(self.layers_at(height, c, c)[0])

        # Up again: each entry of the decoder takes one skip connection in
        for level, next_level in itertools.zip_longest(ways_up, ways_up[1:], fillvalue=0):
            for _ in range(blocks + 1):
                layers = self.layers_at(height, c + skips.pop(), widths[level])
                self.decoder.append(nn.ModuleList(layers))
                c = widths[level]
            if level > next_level:
                times = level - next_level
                self.decoder[-1].append(self.resample(c, up=True, times=times))
                height *= 2 ** times

    def condition(self, portrait):
        """A Portrait as this network's Condition: all that is the same at every t."""
        tokens = self.tokens(portrait.maps)
        keys_values = {
            layer: layer.keys_values(tokens[layer.map])
            for layer in self.modules()
            if isinstance(layer, Attention) and layer.kv
        }
        return Condition(self.pooled(portrait.latent), keys_values)

    def run(self, layers, x, emb, condition):
        """x through layers, each of which is given what it takes besides."""
        for layer in layers:
            inputs = [x]
            if isinstance(layer, (ResBlock, ResnetBlock)):
                inputs.append(emb)
            elif isinstance(layer, Attention):
                inputs.append(condition.keys_values.get(layer, ()))
            if self.checkpoint and self.training:
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return x

    def body(self, h, emb, condition):
        """Down, through the middle, and up again with skip connections."""
        skips = [h]
        for layers in self.encoder:
            h = self.run(layers, h, emb, condition)
            skips.append(h)
        skips = list(itertools.compress(skips, self.skips))
        h = self.run(self.middle, h, emb, condition)
        for layers in self.decoder:
            h = self.run(layers, torch.cat([h, skips.pop()], dim=1), emb, condition)
        return h

    def forward(self, x, t, condition):
        if isinstance(condition, Portrait):
            condition = self.condition(condition)
        emb = self.time(timestep_embedding(t, self.width)) + condition.pooled  # (B, E)
        return roll_in(self.on_planes(roll_out(x), emb, condition))  # (B, 3, C or 2C, R, R)


class BaseUNet(UNet):
    """Base network: planes (B, 3, C, r, r) to their noise and a variance, (B, 3, 2C, r, r).

    At `paper` it has 366,823,360 parameters (supplement A lists the layers). `added` names layers
    that start at zero, so that weights from before they were there remain good (train.py --init).
    """
    added = ('vector.',)

    def __init__(self, config):
        attends_to = {'multi': (0, 1, 2), 'single': (2, 2, 2), 'none': (None, None, None)}
        maps = dict(zip(config.base_attention, attends_to[config.tokens]))
        maps.pop(0, None)  # which says: at no height
        super().__init__(config, config.base_width, maps)
        channels = config.channels if config.roll_out else len(AXES) * config.channels
        c = config.base_width * config.base_mult[0]

        self.add_condition()
        self.add_body(c, config.base_mult, config.base_blocks, 1, config.base_resolution)
        self.conv_in = conv(channels, c)
        self.norm_out = norm(c)
        self.conv_out = zero(conv(c, 2 * channels))

    def add_condition(self):
        super().add_condition()
        self.vector = None
        if self.config.latent_width:
            self.vector = zero(nn.Linear(self.config.latent_width, self.emb, bias=False))

    def condition(self, portrait):
        """The vector, where the network takes one, is added to what all blocks see: AdaGN (Rodin,
        section 3.2)."""
        condition = super().condition(portrait)
        if self.vector is not None and portrait.vector is not None:
            condition.pooled = condition.pooled + self.vector(portrait.vector)
        return condition

    def layers_at(self, height, c_in, c_out, middle=False):
        config = self.config
        aware = bool(config.roll_out) and height in config.base_aware
        layers = [ResBlock(c_in, c_out, self.emb, aware)]
        if middle or height in self.maps:
            # where there is no map, texels attend to one another alone
            seen = self.maps.get(height)
            layers.append(Attention(
                c_out, config.head_width, config.token_width, True, seen, config.positions
            ))
        return layers

    def resample(self, c, up, times=1):
        resize = nn.Upsample(scale_factor=2 ** times) if up else nn.AvgPool2d(2)
        return ResBlock(c, c, self.emb, resample=resize)

    def first_features(self, x, condition):
        """(B, C, r, 3r) to (B, c, r, 3r), without roll_out (B, 3C, r, r) to (B, c, r, r);
        shortcuts.py adds to them."""
        return self.conv_in(x)

    def on_planes(self, x, emb, condition):
        """(B, C, r, 3r) to (B, 2C, r, 3r)."""
        if not self.config.roll_out:
            x = torch.cat(x.chunk(len(AXES), dim=3), dim=1)  # (B, 3C, r, r)
        h = self.body(self.first_features(x, condition), emb, condition)
        out = self.conv_out(F.silu(self.norm_out(h)))
        if not self.config.roll_out:
            out = torch.cat(out.chunk(len(AXES), dim=1), dim=3)
        return out


class UpsampleUNet(UNet):
    """Upsample network: noisy planes and a Portrait with `lr` to x_start, both (B, 3, C, R, R).

    At `paper` it has 337,301,920 parameters (supplement A lists the layers); the released code,
    which attends to the latent's 4 patches in place of y1's 64 tokens, has 320,557,728.
    """
    def __init__(self, config):
        lowest = config.resolution // 2 ** (len(config.up_mult) - 1)
        super().__init__(config, config.up_width, {} if config.tokens == 'none' else {lowest: 0})
        width = config.up_width
        C = config.channels
        top = width + C  # first features and low-resolution planes
        last = width * config.up_mult[0] + top

        self.once = bool(config.up_once)
        self.add_condition()
        self.add_body(top, config.up_mult, config.up_blocks, config.up_body, config.resolution)
        self.conv_in = conv(C, width)
        self.head = nn.ModuleList([self.block(width, width)])
        self.tail = nn.ModuleList([self.block(last, width), self.block(width, C)])
        self.out = ResnetBlock(2 * C, C, second=self.second_conv)
        if config.identity_start:
            self.start_as_identity()

    def second_conv(self, c_in, c_out):
        """The second convolution of a block, 3D-aware or not; both start at zero."""
        if self.config.up_aware:
            return AwareConv(c_in, c_out)
        return zero(conv(c_in, c_out))

    def block(self, c_in, c_out):
        return ResnetBlock(c_in, c_out, self.emb, second=self.second_conv)

    @torch.no_grad()
    def start_as_identity(self):
        """Makes the network return the enlarged low-resolution planes at first."""
        shortcut = self.out.conv_shortcut  # from (h, lr) to planes
        C = shortcut.out_channels
        nn.init.zeros_(shortcut.bias)
        nn.init.zeros_(shortcut.weight)
        shortcut.weight[:, C:, 0, 0].diagonal().fill_(1)  # of lr, whose channels are the last

    def layers_at(self, height, c_in, c_out, middle=False):
        config = self.config
        layers = [self.block(c_in, c_out)]
        if middle and self.maps:
            layers.append(Attention(
                c_out, config.up_head_width, config.token_width, False, 0, config.positions
            ))
        return layers

    def resample(self, c, up, times=1):
        return doubled(c, times, mode='bilinear', align_corners=True) if up else halved(c)

    def condition(self, portrait):
        """A Portrait with `lr` as Condition: its planes are enlarged (bicubic) here, once."""
        lr = portrait.lr.flatten(1, 2)
        size = self.config.resolution
        lr = F.interpolate(lr, size=size, mode='bicubic', align_corners=True)
        lr = lr.unflatten(1, portrait.lr.shape[1:3])  # (B, 3, C, R, R)
        return replace(super().condition(portrait), lr=roll_out(lr))

    def first_features(self, x, condition):
        """(B, C, R, 3R) to (B, width, R, 3R); shortcuts.py adds to them."""
        return self.conv_in(x)

    def on_planes(self, x, emb, condition):
        """(B, C, R, 3R) to (B, C, R, 3R). The enlarged planes come in at three places."""
        lr = condition.lr
        h = self.run(self.head, self.first_features(x, condition), emb, condition)
        top = torch.cat([h, lr], dim=1)  # (B, width + C, R, 3R)
        h = self.body(top, emb, condition)  # (B, width, R, 3R)
        h = self.run(self.tail, torch.cat([h, top], dim=1), emb, condition)  # (B, C, R, 3R)
        return self.run([self.out], torch.cat([h, lr], dim=1), None, condition)


# 9 Diffusion --------------------------------------------------------------------------------------
# Schedules, losses and sampler (section 3.2, Eqs. 4 and 5). Planes are redundant, and noise hides
# less of them than of an image: both schedules of the paper destroy them faster than the linear
# one. A model is any function model(x, t, condition).
def noise_schedule(name, timesteps):
    """betas (T,), float64, at most 0.999; entry i belongs to the time t = (i + 1) / T.

    `cosine` (start 0.2, end 1, tau 3) and `sigmoid` (start 0, end 3, tau 0.1) are Chen's, `linear`
    is DDPM's.
    """
    if name == 'linear':
        betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * 1000 / timesteps
        return betas.clamp(max=0.999)

    # alpha_bar at t = 0, 1/T ... 1, up to scale and offset: it is brought to go from 1 to 0
    t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    if name == 'cosine':
        tau = 3
        curve = torch.cos((0.2 + 0.8 * t) * math.pi / 2) ** (2 * tau)
    elif name == 'sigmoid':
        curve = torch.sigmoid(-30 * t)  # 3 t / tau
    alpha_bar = (curve - curve[-1]) / (curve[0] - curve[-1])
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def discretised_log_likelihood(x, mean, log_std):
    """Log of the mass that a Gaussian puts on the bin of width 2/255 around x in [-1, 1].

    The outer bins are open (Improved DDPM).
    """
    upper = (x - mean + 1 / 255) * torch.exp(-log_std)
    lower = (x - mean - 1 / 255) * torch.exp(-log_std)
    mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    inside = mass.clamp(min=1e-12).log()
    below_the_last = torch.where(x < -0.999, torch.special.log_ndtr(upper), inside)
    return torch.where(x > 0.999, torch.special.log_ndtr(-lower), below_the_last)


class Step(NamedTuple):
    """A step of sampling, from one noise level to the next lower one, `prev`."""
    x: torch.Tensor  # (B, 3, C, R, R)
    x_start: torch.Tensor  # what the model takes x for, in [-1, 1]
    variance: torch.Tensor | None  # as the model predicts it
    alpha_bar: float  # of x
    alpha_bar_prev: float  # of what is wanted


class Diffusion:
    """A discrete diffusion process over planes (B, 3, C, R, R): schedule, loss and sampler.

    The model predicts `noise` or `x_start`; with learned_variance it returns twice the channels.
    t (B,) are integers 0 ... T - 1, and the model is always given t * 1000 / T. Coefficients are
    computed in float64.
    """
    def __init__(self, schedule, timesteps, predict='noise', learned_variance=False):
        self.timesteps = timesteps
        self.predict = predict
        self.learned_variance = learned_variance
        self.betas = noise_schedule(schedule, timesteps)
        self.alpha_bar = torch.cumprod(1 - self.betas, 0)
        self.alpha_bar_prev = F.pad(self.alpha_bar[:-1], (1, 0), value=1.0)

        # beta~ is zero at t = 0; its logarithm there is that at t = 1
        variance = self.betas * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        self.posterior_logvar = torch.cat([variance[1:2], variance[1:]]).log()
        of_start = self.alpha_bar_prev.sqrt() * self.betas / (1 - self.alpha_bar)
        of_t = (1 - self.betas).sqrt() * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        self.tables = {
            'alpha_bar': self.alpha_bar,
            'sqrt(alpha_bar)': self.alpha_bar.sqrt(),
            'sqrt(1 - alpha_bar)': (1 - self.alpha_bar).sqrt(),
            'posterior of x_start': of_start,
            'posterior of x_t': of_t,
            'posterior log variance': self.posterior_logvar,
            'log beta': self.betas.log(),
        }
        self.sent = {}  # the tables on a device: a GPU's host would wait for each of them

    def entries(self, name, t):
        """Entries t (B,) of one of the tables in float32, shaped to multiply planes."""
        if t.device not in self.sent:
            self.sent[t.device] = {k: x.float().to(t.device) for k, x in self.tables.items()}
        return self.sent[t.device][name][t].view(-1, 1, 1, 1, 1)

    def q_sample(self, x_start, t, noise):
        """x_t = sqrt(alpha_bar) x_start + sqrt(1 - alpha_bar) noise (DDPM, Eq. 4)."""
        of_start = self.entries('sqrt(alpha_bar)', t)
        of_noise = self.entries('sqrt(1 - alpha_bar)', t)
        return of_start * x_start + of_noise * noise

    def posterior(self, x_start, x_t, t):
        """Mean and log variance of q(x_{t-1} | x_t, x_start) (DDPM, Eqs. 6 and 7)."""
        of_start = self.entries('posterior of x_start', t)
        of_t = self.entries('posterior of x_t', t)
        return of_start * x_start + of_t * x_t, self.entries('posterior log variance', t)

    def x_start_of(self, prediction, x_t, alpha_bar):
        """x_start by what the model predicts; alpha_bar is a number, or entries for each sample."""
        if self.predict == 'x_start':
            return prediction
        return (x_t - (1 - alpha_bar) ** 0.5 * prediction) / alpha_bar ** 0.5

    def limited(self, x_start):
        """x_start within the range of the data."""
        return x_start.clamp(-1, 1)

    def loss(self, model, x_start, t, noise, condition=None):
        """Terms, a dict of scalars whose sum is the loss, and the predicted x_start, not clamped.

        mse: of what is predicted (Eqs. 4 and 5). vlb, with a learned variance: see variance_loss.
        """
        x_t = self.q_sample(x_start, t, noise)
        out = model(x_t, t * (1000 / self.timesteps), condition).float()
        variance = None
        if self.learned_variance:
            out, variance = out.chunk(2, dim=2)
        target = noise if self.predict == 'noise' else x_start
        terms = {'mse': F.mse_loss(out, target)}
        predicted = self.x_start_of(out, x_t, self.entries('alpha_bar', t))
        if self.learned_variance:
            terms['vlb'] = self.variance_loss(x_start, x_t, t, predicted.detach(), variance)
        return terms, predicted

    def variance_loss(self, x_start, x_t, t, predicted, variance):
        """The variational bound in bits a value, times T / 1000 (Improved DDPM, section 3.1).

        The predicted x_start comes detached, so that this trains the variance alone: -1 is beta~,
        1 is beta, and between them the logarithm is interpolated.
        """
        true_mean, low_logvar = self.posterior(x_start, x_t, t)
        mean, _ = self.posterior(predicted, x_t, t)
        high_logvar = self.entries('log beta', t)
        logvar = low_logvar + (variance + 1) / 2 * (high_logvar - low_logvar)

        kl = logvar - low_logvar + torch.exp(low_logvar - logvar)
        kl = (kl + (true_mean - mean) ** 2 * torch.exp(-logvar) - 1) / 2
        is_first = (t == 0).view(-1, 1, 1, 1, 1)
        kl = torch.where(is_first, -discretised_log_likelihood(x_start, mean, logvar / 2), kl)
        return kl.mean() / math.log(2) * self.timesteps / 1000

    @torch.no_grad()
    def sample(
        self,
        model,
        draw,  # draw() returns unit noise (B, 3, C, R, R)
        condition=None,
        null=None,  # the null condition, for guidance
        guidance=1.0,  # s in null + s (conditional - null); 1 never runs the null condition
        steps=10,  # even steps of the chain, which begin at T - 1
        eta=1.0,  # 1 is ancestral sampling, below 1 is DDIM
        correct=None,  # takes each x_start and returns what shall take its place
        watch=None,  # called with each x_start
        progress=iter,  # wraps the iterable of steps: tqdm, for instance
    ):
        """Planes (B, 3, C, R, R) in [-1, 1]; ValueError unless steps are 1 ... T."""
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f'{steps} sampling steps of a process of {self.timesteps} timesteps')
        # 99, 199, ..., 999 for 10 of 1000
        times = [round((i + 1) * self.timesteps / steps) - 1 for i in range(steps)]
        x = draw()
        if guidance != 1:
            condition = join(condition, null)

        for i in progress(range(steps - 1, -1, -1)):
            alpha_bar = self.alpha_bar[times[i]].item()
            t = times[i] * 1000 / self.timesteps
            prediction, variance = self.guided(model, x, t, condition, guidance)
            x_start = self.limited(self.x_start_of(prediction, x, alpha_bar))
            if correct:
                x_start = correct(x_start)
            if watch:
                watch(x_start)
            if i > 0:  # the last step goes to alpha_bar = 1, where x is x_start
                alpha_bar_prev = self.alpha_bar[times[i - 1]].item()
                step = Step(x, x_start, variance, alpha_bar, alpha_bar_prev)
                x = self.previous(step, eta, draw)
        return x_start

    def guided(self, model, x, t, condition, guidance):
        """The model's prediction at a time t, guided, and its variance, which is not."""
        B = len(x)
        if guidance != 1:
            x = torch.cat([x, x])
        t = torch.full((len(x),), t, device=x.device)
        out = model(x, t, condition).float()
        conditional = out[:B]
        prediction = conditional
        if guidance != 1:
            free = out[B:]
            prediction = free + guidance * (conditional - free)
        if not self.learned_variance:
            return prediction, None
        return prediction.chunk(2, dim=2)[0], conditional.chunk(2, dim=2)[1]

    def previous(self, step, eta, draw):
        """x one step nearer to the data: ancestral, or DDIM (Eqs. 12 and 16).

        The learned variance is used with eta 1 alone.
        """
        x, x_start, variance, alpha_bar, alpha_bar_prev = step
        beta = 1 - alpha_bar / alpha_bar_prev
        beta_tilde = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
        noise = (x - alpha_bar ** 0.5 * x_start) / (1 - alpha_bar) ** 0.5  # by the clamped x_start
        std = eta * beta_tilde ** 0.5
        towards_noise = max(1 - alpha_bar_prev - std ** 2, 0) ** 0.5
        x = alpha_bar_prev ** 0.5 * x_start + towards_noise * noise
        if self.learned_variance and eta == 1:
            share = (variance + 1) / 2
            std = torch.exp((share * math.log(beta) + (1 - share) * math.log(beta_tilde)) / 2)
        return x + std * draw()


# 10 Generation ------------------------------------------------------------------------------------
# The cascade: a portrait is encoded, the base network makes low-resolution planes of noise, and the
# upsample network planes of these and more noise.
FAR_SEED = 2 ** 24  # between the seeds of several samples of an avatar; of seeds, 32 bits count


class Avatars(NamedTuple):
    planes: torch.Tensor  # (B, 3, C, R, R) in [-1, 1]
    low: torch.Tensor  # the low-resolution planes that they were made of, (B, 3, C, r, r)


def diffusion_of(stage, config):
    """The Diffusion of stage 'base' (with a learned variance) or 'upsample' (x_start, without)."""
    if stage == 'base':
        return Diffusion(
            config.base_schedule, config.base_timesteps, config.base_predict, learned_variance=True
        )
    return Diffusion(config.up_schedule, config.up_timesteps, 'x_start')


@torch.no_grad()
def sample_stage(
    stage,  # 'base' or 'upsample'
    network,
    portrait,  # a Portrait of B
    low=None,  # upsample: low-resolution planes (B, 3, C, r, r)
    guidance=1.0,
    steps=None,  # the network's own number
    seed=0,
    mix=None,
    **how,  # what else Diffusion.sample takes
):
    """Planes (B, 3, C, R, R) in [-1, 1].

    Noise i is that of seed + i or, with mix (B, n), a mixture of that of n seeds.
    """
    config = network.config
    portrait = portrait._replace(lr=low)
    device = portrait.latent.device
    size = config.base_resolution if stage == 'base' else config.resolution
    count = len(portrait.latent) if mix is None else mix.shape[1]
    seeds = [2 * (seed + i) + (stage == 'base') for i in range(count)]
    generators = [torch.Generator().manual_seed(s) for s in seeds]

    def draw():
        shape = (len(AXES), config.channels, size, size)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        if mix is not None:
            noise = torch.tensordot(mix, noise, 1)
        return noise.to(device)

    condition = network.condition(portrait)
    null = network.condition(drop(portrait)) if guidance != 1 else None
    steps = steps or config.sample_steps
    diffusion = diffusion_of(stage, config)
    return diffusion.sample(network, draw, condition, null, guidance, steps, **how)


def generate(
    models,
    portrait,
    guidance=None,
    steps=None,
    seed=0,
    mix=None,
    correct=None,
    samples=1,
    quick=False,
    **how,
):
    """The whole cascade -> Avatars.

    models: {'vae', 'base', 'upsample'}. portrait: images (B, 3, P, P) in [-1, 1], a Portrait (such
    as `nobody` makes of a vector), or a number of avatars of nobody. guidance: of the base model,
    by default its own. steps: of each model, by default its own. seed, mix: see sample_stage.
    correct: of Diffusion.sample, for the base model. samples: of how many of its samples the
    low-resolution planes are the mean, which is nearer to the truth than each of them. quick:
    without the upsample model, so that the planes are the low-resolution ones, enlarged. how: eta,
    watch, progress of Diffusion.sample.
    """
    base = models['base']
    config = base.config
    device = next(base.parameters()).device
    unseen = isinstance(portrait, int)
    if unseen:
        portrait = torch.zeros(portrait, 3, config.portrait, config.portrait)
    if torch.is_tensor(portrait):
        portrait = encode_portrait(models['vae'], portrait.to(device), config)

    if guidance is None:
        guidance = config.guidance
    if unseen or config.condition_drop == 1:  # or training never showed a portrait
        portrait = drop(portrait, keep_vector=True)
        if portrait.vector is None:
            guidance = 1.0
    how = dict(steps=steps, seed=seed, mix=mix, **how)
    of_base = dict(how)
    if not steps and of_vector(portrait):
        of_base['steps'] = config.vector_steps
    found = []
    for k in range(samples):
        of_base['seed'] = seed + k * FAR_SEED
        low = sample_stage('base', base, portrait, guidance=guidance, correct=correct, **of_base)
        found.append(low)
    low = torch.stack(found).mean(0)
    if quick:
        return Avatars(resize_planes(low, models['upsample'].config.resolution), low)
    if not steps:
        how['steps'] = models['upsample'].config.up_sample_steps
    planes = sample_stage('upsample', models['upsample'], portrait, low, **how)
    return Avatars(softened(planes, low, models['upsample'].config), low)


def of_vector(portrait):
    """Whether a Portrait has a vector alone: training dropped, or `nobody` lacks, the rest."""
    return portrait.vector is not None and not portrait.latent.any()


def softened(planes, low, config):
    """Planes (B, 3, C, R, R) whose density is but a share up_density of the way from that of the
    low-resolution ones: outlines that the base network is unsure of are soft, and stay so."""
    if config.up_density == 1:
        return planes
    density = slice(-(config.channels // 4), None)
    soft = resize_planes(low[:, :, density].double(), planes.shape[-1])  # exempt from autocast
    soft = soft.to(planes)
    planes[:, :, density] = soft.lerp(planes[:, :, density], config.up_density)
    return planes
