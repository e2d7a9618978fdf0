"""After the model: the avatar is fitted to its portrait. The papers do not do this; it is for models that are small, or know few people.

What the models got wrong, the portrait still shows. `straighten` looks for the person of a first sample in the portrait, which may be
shifted, scaled, or on any ground, puts it on white, and moves it to where training portraits have it; sampling starts from that. `refine`
descends on the planes until their front view is that image, coarse corrections first: what a portrait shows of clothes, skin, hair and
outline then holds from all sides.
"""
import importlib.util
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from tqdm import tqdm

import rodinhd as rh

LEVELS = (16, 8, 4, 2, 1)               # corrections are planes of R/16, R/8 ... R texels a side, added up
SCALES, SHIFTS = (0.88, 1.12), (-0.06, 0.06)            # where `register` looks; shifts in image widths
CONTRAST, COLOURS = 0.3, 2.0            # how much contrast at the avatar's edge counts there on any ground, and colours beside outlines


class Seen(NamedTuple):
    """Portraits as training had them."""
    images: torch.Tensor                # (B, 3, P, P) in [-1, 1], on white
    alpha: torch.Tensor                 # (B, 1, P, P) in 0..1, whose pixels are the person's
    known: torch.Tensor                 # (B, 1, P, P) in 0..1, what is to be believed of both


def front_camera(P, device):
    """Pose and intrinsics of the camera that takes portraits."""
    return rh.orbit_pose(0, 2).to(device), rh.intrinsics_of(34.0, P).to(device)

def flat_ground(image):
    """The colour (3,) of a border that has one, left, right and on top; None for others. image (3, P, P) in 0..1."""
    m = max(image.shape[1] // 32, 1)
    border = torch.cat([part.flatten(1) for part in (image[:, :m], image[:, :, :m], image[:, :, -m:])], dim=1)
    colour = border.median(dim=1)[0]
    return colour if ((border - colour[:, None]).abs().amax(0) < 0.03).float().mean() > 0.8 else None

def is_white(ground):
    return ground is not None and bool(ground.min() > 0.99)

def move(images, scale, x, y, padding='border'):
    """Images (B, C, P, P) as they were before batches.place shrank them by scale (B,) and shifted them by x, y (B,), in image widths."""
    theta = torch.stack([torch.stack([1 / scale, 0 * x, -2 * x / scale], dim=1), torch.stack([0 * y, 1 / scale, -2 * y / scale], dim=1)], 1)
    return F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), padding_mode=padding, align_corners=False)

def register(view, opacity, image, alpha=None, size=64, least_gain=1.2):
    """Scale, x and y, (1,) each, that `move` needs to bring an image (3, P, P) to a view (3, P, P) of opacity (1, P, P): on white with its
    alpha (1, P, P), or for None on any ground. Search on images of size / 2 pixels a side, then of `size` and of twice that; None where
    the image as it is costs less than `least_gain` times as much as the best, or there is no avatar to be seen."""
    if opacity.max() < 0.5:
        return None
    def cost(where, size):              # of each of N places
        v, a, moved = (F.interpolate(x[None], size=size, mode='area') for x in (view - (1 - opacity), opacity, image))
        moved = move(moved.expand(len(where[0]), -1, -1, -1), *where)
        if alpha is not None:           # outlines, and colours where both are
            own = move(F.interpolate(alpha[None], size=size, mode='area').expand(len(moved), -1, -1, -1), *where)
            colours = (a * own * (v + 1 - a - moved).square()).mean(1).sum((1, 2)) / (a * own).sum((1, 2, 3)).clamp(min=1)
            return (own - a).abs().mean((1, 2, 3)) + COLOURS * colours
        near = F.avg_pool2d(a, 5, stride=1, padding=2)
        beyond, ring = F.avg_pool2d(v, 5, stride=1, padding=2) / near.clamp(min=1e-6), (near > 0) & (a < 0.1)
        inside = (v - a * moved).square().mean(1).sum((1, 2)) / a.sum().clamp(min=1)               # of the avatar's, and contrast at its
        contrast = (beyond - moved).square().mean(1).clamp(max=0.05) * ring[:, 0]                  # edge, lest it shrink
        return inside + CONTRAST * (0.05 - contrast.sum((1, 2)) / ring.sum().clamp(min=1))
    def best(size, *axes):
        where = [x.flatten() for x in torch.meshgrid(*axes, indexing='ij')]
        costs = cost(where, size)
        return [x[costs.argmin()] for x in where], costs.min()
    def axis(low, high, n):
        return torch.linspace(low, high, n, device=image.device)
    (scale, x, y), least = best(size // 2, axis(*SCALES, 13), axis(*SHIFTS, 13), axis(*SHIFTS, 13))
    for n, h, m in ((1, 0.03, 9), (2, 0.005, 7)):            # finer, around the best
        (scale, x, y), least = best(n * size, scale + axis(-h, h, m), x + axis(-h, h, m) / 2, y + axis(-h, h, m) / 2)
    still = torch.tensor([[1.0], [0.0], [0.0]], device=image.device)
    return None if cost(still, 2 * size) < least_gain * least else torch.stack([scale, x, y])[:, None]

def person_before(image, ground):
    """Pixels (P, P) of an image (3, P, P) in 0..1 save those of the ground's colour (3,) that are joined to the border."""
    person = (image - ground.view(3, 1, 1)).abs().amax(0) > 0.04
    person = F.pad(F.pad(person, (1, 1, 1, 0)), (0, 0, 0, 1), value=True).cpu().numpy()         # a bust goes on below
    return torch.from_numpy(ndimage.binary_fill_holes(person)[1:-1, 1:-1]).to(image.device)

def without_specks(person):
    """Pixels (P, P) of a person but for pieces of less than a fiftieth of the image: they are of the ground."""
    labels = ndimage.label(person.cpu().numpy(), np.ones((3, 3)))[0]
    return person & torch.from_numpy((np.bincount(labels.ravel()) >= labels.size / 50)[labels]).to(person.device)

def person_near(image, opacity, usual, reach=21):
    """Pixels (P, P) of the person in an image (3, P, P) in 0..1 on any ground: GrabCut, started from an avatar's opacity (P, P), from whose
    outline the person's is not further than reach / 512 of the width. Certain is only what is also opaque in `usual` (P, P): a ground may
    look like hair. None without OpenCV."""
    if not importlib.util.find_spec('cv2'):
        return None
    import cv2
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach * len(opacity) // 256 | 1,) * 2)
    certain, possible = (x.byte().cpu().numpy() for x in ((opacity > 0.9) & (usual > 0.9), opacity > 0.1))
    mask = np.where(opacity.cpu().numpy() > 0.5, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    mask[cv2.erode(certain, disc) > 0] = cv2.GC_FGD
    mask[cv2.dilate(possible, disc) == 0] = cv2.GC_BGD
    if not (mask & 1).any() or (mask & 1).all():    # GC_FGD and GC_PR_FGD are odd; it needs some of both
        return opacity > 0.5
    cv2.setRNGSeed(0)
    pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    cv2.grabCut(pixels, mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_MASK)
    return torch.from_numpy((mask & 1) > 0).to(image.device) if (mask & 1).any() else opacity > 0.5

def onto_white(image, person, ground=None):
    """An image (3, P, P) in 0..1 -> the same on white but for the pixels `person` (P, P), and its alpha (1, P, P). Pixels at the rim take
    the colour of those further in, and as alpha the share of it that explains them best before the ground (3,), or before an unknown one
    the share of person around them. On white the person's pixels stay as they are."""
    person = person.float()[None, None]
    near = F.max_pool2d(person, 3, 1, 1)[0]
    inner = -F.max_pool2d(-F.pad(person, (2, 2, 2, 2), mode='replicate'), 5, 1)
    own, weight = (F.avg_pool2d(x, 9, 1, 4) for x in (image * inner, inner))
    own = torch.where((weight > 0) & (inner == 0), own / weight.clamp(min=1e-6), image)[0]
    if ground is None:
        share = F.avg_pool2d(F.pad(person, (1, 1, 1, 1), mode='replicate'), 3, 1)[0]
    else:
        colour = ground.view(3, 1, 1)
        share = ((image - colour) * (own - colour)).sum(0) / (own - colour).square().sum(0).clamp(min=1e-3)
        share = share.clamp(0, 1) * near
    alpha = torch.where(inner[0] > 0, 1.0, share)
    return torch.where(near > 0, image, 1.0) if is_white(ground) else (alpha * own + 1 - alpha).clamp(0, 1), alpha

@torch.autocast('cpu', enabled=False)
@torch.autocast('cuda', enabled=False)
def front_view(planes, decoder, P):
    """An avatar's planes (3, C, R, R) as a portrait shows it: (3, P, P) in 0..1 on white, and opacity (1, P, P)."""
    field = rh.PlaneField(planes.float(), decoder)
    grid = rh.grid_for(field, decoder.config, planes.device)
    rgb, opacity = rh.render_view(field, *front_camera(P, planes.device), P, P, decoder.config.steps, grid)
    return rgb.permute(2, 0, 1), opacity[None]

@torch.autocast('cpu', enabled=False)
@torch.autocast('cuda', enabled=False)
def straighten_one(view, opacity, usual, image, alpha):
    """`straighten` of one portrait (3, P, P) in [-1, 1] of alpha (1, P, P), by the `front_view` of a sample; usual (1, P, P): the opacity
    of a usual avatar."""
    image, known = (image + 1) / 2, torch.ones_like(alpha)              # beyond the portrait's edge nothing is known
    ground, believed, has_alpha = flat_ground(image), known, alpha.min() < 0.5
    if has_alpha or ground is not None:
        if not has_alpha:
            image, alpha = onto_white(image, without_specks(person_before(image, ground)), ground)
        where = register(view, opacity, image, alpha, least_gain=1.7 if has_alpha or is_white(ground) else 1.2)
    else:
        where, photograph = register(view, opacity, image), image
        for reach in (21, 11):          # once more when it is known better where the person is
            there = torch.cat([opacity, usual])
            if where is not None:
                there = move(there[None], 1 / where[0], *(-where[1:] / where[0]), padding='zeros')[0]
            if (person := person_near(photograph, *there, reach)) is None:
                alpha = believed = there[:1]
                image = torch.lerp(torch.ones_like(image), image, alpha)
                break
            image, alpha = onto_white(photograph, without_specks(person))
            where = register(view, opacity, image, alpha)
    if alpha.max() < 0.5:               # nobody is there
        believed = torch.zeros_like(alpha)
    if where is not None:
        image = move(image[None], *where)[0]
        alpha, believed, known = (move(x[None], *where, padding='zeros')[0] for x in (alpha, believed, known))
    return torch.lerp(torch.ones_like(image), image, known) * 2 - 1, alpha, believed * (known > 0.99)

def straighten(models, images, alpha=None, **how):
    """Portraits (B, 3, P, P) in [-1, 1], on white where they have alpha (B, 1, P, P) below 1 -> Seen, found with the avatars of a first
    sample, then with those of a second one, of what was found (how: see rh.generate)."""
    decoder, prior, P = models['decoder'], models['base'].prior, images.shape[-1]
    device = next(decoder.parameters()).device
    images, alpha = images.to(device), (torch.ones(len(images), 1, P, P) if alpha is None else alpha).to(device)
    usual = torch.ones(1, P, P, device=device)          # `paper` knows no mean avatar
    if prior:
        usual = front_view(rh.resize_planes(prior.mean[0], decoder.config.resolution), decoder, P)[1]
    shown = images
    for _ in range(2):
        planes = rh.generate(models, shown, **how)[0]
        parts = [straighten_one(*front_view(x, decoder, P), usual, *one) for x, *one in zip(planes, images, alpha)]
        seen = Seen(*(torch.stack(x) for x in zip(*parts)))
        if (seen.images - images).abs().mean() < 1e-3:  # they are as they were
            break
        shown = seen.images
    return seen

def refine_one(planes, image, alpha, known, decoder, steps, rays=2048, lr=1e-2, weight_empty=0.1, seed=0, report=lambda loss: None):
    """`refine` of one avatar: planes (3, C, R, R), image (3, P, P) in [-1, 1], alpha and known (1, P, P)."""
    config, device, R, P = decoder.config, planes.device, planes.shape[-1], image.shape[-1]
    target, alpha, known = (x.permute(1, 2, 0).flatten(0, 1) for x in ((image + 1) / 2, alpha, known))         # (P^2, 3), (P^2, 1)
    rays_o, rays_d = rh.view_rays(*front_camera(P, device), P, P)
    shown, generator = (known[:, 0] > 0).nonzero()[:, 0], torch.Generator().manual_seed(seed)
    empty = rh.grid_for(rh.PlaneField(planes, decoder), config, device).values <= rh.EMPTY
    deltas = [torch.zeros(*planes.shape[:2], max(R // n, 2), max(R // n, 2), device=device, requires_grad=True) for n in LEVELS]
    optimizer = torch.optim.Adam(deltas, betas=(0.9, 0.99))
    def corrected():
        return (planes + sum(rh.resize_planes(d, R) for d in deltas)).clamp(-1, 1)
    for step in range(steps if len(shown) else 0):
        field = rh.PlaneField(corrected(), decoder)
        if step % 10 == 0:
            with torch.no_grad():
                grid = rh.grid_for(field, config, device, updates=8)
        pick = shown[torch.randint(len(shown), (rays,), generator=generator).to(device)]
        shift, ground = (torch.rand(n, generator=generator).to(device) for n in (rays, (rays, 3)))
        rgb, _, _ = rh.render(field, rays_o[pick], rays_d[pick], config.steps, grid, shift, ground)
        error = rgb - target[pick] + (1 - alpha[pick]) * (1 - ground)   # on random grounds: on white, what should be empty may turn white
        loss = (known[pick] * error.square()).mean()
        cell = torch.randint(config.grid, (4096, 3), generator=generator).to(device)               # no fog where there was none
        points = (cell + torch.rand(4096, 3, generator=generator).to(device)) * (2 / config.grid) - 1
        fog = torch.log(field(points)[0].clamp(min=rh.EMPTY) / rh.EMPTY) * empty[cell.unbind(1)]
        optimizer.param_groups[0]['lr'] = lr * 0.1 ** (step / steps)
        for d, gradient in zip(deltas, torch.autograd.grad(loss + weight_empty * fog.mean(), deltas)):
            d.grad = gradient
        optimizer.step()
        report(loss.item())
    return corrected().detach()

def refine(planes, seen, decoder, steps, seed=0, progress=False):
    """Planes (B, 3, C, R, R) of the portraits `seen` -> planes whose front views are these images, after `steps` steps."""
    with tqdm(total=len(planes) * steps, desc='fitting to the portrait', disable=not progress) as bar:
        def report(loss):
            bar.set_postfix_str(f'{-10 * math.log10(max(loss, 1e-10)):.1f} dB', refresh=False)
            bar.update()
        return torch.stack([refine_one(x, *one, decoder, steps, seed=seed, report=report)
                            for x, *one in zip(planes, *seen)])

def avatars_of(models, images, refine_steps=40, alpha=None, **how):
    """Portraits (B, 3, P, P) in [-1, 1], on white where they have alpha (B, 1, P, P) below 1 -> planes; straightened, sampled and refined,
    or for 0 steps only sampled. how: see rh.generate."""
    if not refine_steps:
        return rh.generate(models, images, **how)[0]
    seen = straighten(models, images, alpha, **how)
    return refine(rh.generate(models, seen.images, **how)[0], seen, models['decoder'], refine_steps, seed=how.get('seed', 0))
