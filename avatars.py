"""Stage 0: draw synthetic avatars, as posed images in the data format that the other stages read.

    python avatars.py                             32 avatars, 256 x 256, 30 + 6 views, into data/ (minutes)
    python avatars.py --preset tiny               8 avatars, 64 x 64, 24 + 4 views (seconds); also paper

Factors (`draw_factors`) become solid parts (`build`), which rays meet in closed form (`trace`); `inside` is the same geometry,
for tests. World: Z up, the face looks along -Y, the avatar's left is +X, within [-1, 1]^3. N rays or points, K planes, V views.
"""
import argparse
import json
import math
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

import rodinhd as rh

PRESETS = {'tiny': (8, 64, 24, 4), 'small': (32, 256, 30, 6), 'paper': (64, 512, 300, 6)}   # count, size, views, held-out
FOV = 34                                                                           # degrees
DYES = 'b8322f 233a66 1f7f80 d29a2a ece8df 35363a 3f7a46 6a4590 d98aa0 6fa8d0 d0672b 6b4a35'
MOODS = {'neutral': (0.01, 0, 0.12, 0, 0, 0.45), 'smile': (0.055, 0, 0.15, 0.01, -3, 0.4), 'open': (0, 0.05, 0.09, 0.05, -6, 0.7),
         'sad': (-0.05, 0, 0.12, 0.015, -16, 0.2),      # mouth: corners up, opening, half-width; brows: up, frowning; upper lid
         'asleep': (0.02, 0, 0.11, 0, -4, -0.75)}
CHOICES = {   # a repeated choice is likelier
    'hair_style': 'bald short parted fringe long bun ponytail', 'expression': 'neutral neutral smile smile open sad asleep',
    'glasses': 'no no round dark', 'beard': 'no no no moustache goatee full', 'neckline': 'crew v scoop',
    'pattern': 'plain stripes bars checks dots', 'pattern_colour': DYES, 'clothes_colour': DYES,
    'skin_colour': 'f3d0b8 e6b592 cf9468 a86d45 7b4a2e 4a2c1d', 'eye_colour': '5a3517 2a1a10 3c7fb8 4d8a4a 8a6a2c 7a8790',
    'hair_colour': '17130f 38241a 5f3d26 7a3420 b4581f c99b53 e3d5b0 8f8d8a dcdad6 2f5fa8 c9608f'}
SPREADS = {   # sizes are 1 plus or minus these
    'head_width': 0.08, 'head_height': 0.06, 'jaw_width': 0.14, 'nose_size': 0.25, 'nose_length': 0.3, 'eye_size': 0.13,
    'eye_spacing': 0.1, 'lip_size': 0.35, 'shoulder_width': 0.09, 'pattern_scale': 0.3, 'skin_shade': 0.12, 'hair_phase': 0.5}


class Solid(NamedTuple):
    """|to_unit (x - centre)| <= 1 where normal . x <= offset, minus the hole."""
    to_unit: torch.Tensor           # (3, 3), the axes over their radii
    centre: torch.Tensor            # (3,)
    planes: torch.Tensor            # (K, 4), normal and offset
    hole: object = None             # a solid without a hole
    paint: object = None            # function, points (N, 3) -> linear albedo (N, 3)
    blend: str = ''                 # parts of one name share their paint and look as one smooth surface


def solid(centre, radii, turn=(0, 0, 0), keep=(), side=1, **rest):
    """Ellipsoid turned by a rotation vector (degrees), where n . x <= offset for each (*n, offset) in keep; side -1 mirrors x."""
    centre, radii, turn, keep, mirror = (torch.tensor(v).float() for v in (centre, radii, turn, keep, (side, 1, 1, 1)))
    axes = torch.linalg.matrix_exp(torch.linalg.cross(torch.eye(3), turn.deg2rad().expand(3, 3)))
    return Solid(axes.T / radii[:, None] * mirror[:3], centre * mirror[:3], keep.view(-1, 4) * mirror, **rest)


def interval(body, rays_o, rays_d):
    """Depths near (N,), far (N,) between which rays (N, 3), (N, 3) are in a solid, its hole filled; nan or near > far: missed."""
    u, v = (rays_o - body.centre) @ body.to_unit.T, rays_d @ body.to_unit.T
    a, b, c = ((p * q).sum(-1, keepdim=True) for p, q in ((v, v), (u, v), (u, u)))
    root, slope = (b * b - a * (c - 1)).sqrt(), rays_d @ body.planes[:, :3].T
    t = (body.planes[:, 3] - rays_o @ body.planes[:, :3].T) / slope
    near = torch.cat([(-b - root) / a, torch.where(slope < 0, t, -math.inf)], -1)
    return near.amax(-1), torch.cat([(-b + root) / a, torch.where(slope < 0, math.inf, t)], -1).amin(-1)


def level(body, x):
    """About the signed distance (N,) of points x (N, 3) to a solid's surface, negative inside."""
    u = (x - body.centre) @ body.to_unit.T
    length = u.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    round_part = (length - 1) / (u / length @ body.to_unit).norm(dim=-1, keepdim=True).clamp(min=1e-6)
    value = torch.cat([round_part, x @ body.planes[:, :3].T - body.planes[:, 3]], -1).amax(-1)
    return value.maximum(-level(body.hole, x)) if body.hole else value


def inside(parts, points):
    """Whether points (N, 3) are inside any of the parts (list of Solid): bool (N,)."""
    return torch.stack([level(part, points) < 0 for part in parts]).any(0)


def shade(parts, part, x):
    """Display colours (N, 3) in [0, 1] of points x (N, 3) on the surface of one of the parts."""
    group = [other for other in parts if other.blend == part.blend != ''] or [part]
    with torch.enable_grad():                                                      # the normal: the gradient of a smooth union
        point = x.detach().requires_grad_()
        union = -0.02 * torch.stack([-level(other, point) / 0.02 for other in group]).logsumexp(0)
        normal = torch.nn.functional.normalize(torch.autograd.grad(union.sum(), point)[0], dim=-1)
    lamps = torch.tensor([[-0.5, -0.75, 0.5], [0.89, -0.4, 0.2], [0.2, 0.9, 0.4]])    # and light from sky and ground
    light = ((normal @ lamps.T + 0.2) / 1.2).clamp(min=0) @ torch.tensor([[0.54], [0.22], [0.36]]) + 0.34 + 0.12 * normal[:, 2:]
    return (part.paint(x) * light).clamp(0, 1) ** (1 / 2.2)


def trace(parts, rays_o, rays_d):
    """Rays (N, 3), (N, 3) of unit length, from outside -> colour (N, 3) in [0, 1], depth (N,), inf where missed, hit (N,)."""
    depth, owner = torch.full(rays_o.shape[:1], math.inf), torch.full(rays_o.shape[:1], -1)
    oo, od = (rays_o * rays_o).sum(-1), (rays_o * rays_d).sum(-1)
    for k, part in enumerate(parts):
        reach, along = (1 / part.to_unit.norm(dim=1)).max() + 1e-3, rays_d @ part.centre - od
        rays = (oo - 2 * rays_o @ part.centre + part.centre @ part.centre - along ** 2 < reach ** 2).nonzero()[:, 0]
        origin = rays_o[rays] + along[rays, None] * rays_d[rays]                   # nearby: float32 loses thin parts from afar
        t, far = interval(part, origin, rays_d[rays])
        if part.hole:
            near, end = interval(part.hole, origin, rays_d[rays])
            t = torch.where((t >= near) & (t < end), end, t)
        first = next(i for i in range(k + 1) if i == k or parts[i].blend == part.blend != '')   # one shade for all that blend
        closer = (t < far) & (t + along[rays] < depth[rays])
        depth[rays[closer]], owner[rays[closer]] = (t + along[rays])[closer], first
    colour = torch.zeros_like(rays_d)
    for k in owner[owner >= 0].unique().tolist():
        rays = (owner == k).nonzero()[:, 0]
        colour[rays] = shade(parts, parts[k], rays_o[rays] + depth[rays, None] * rays_d[rays])
    return colour, depth, owner >= 0


def draw_factors(rng):
    """One person, as a dict of plain numbers and strings, from a random.Random."""
    choices = {name: rng.choice(values.split()) for name, values in CHOICES.items()}
    return choices | {name: round(1 + rng.uniform(-spread, spread), 3) for name, spread in SPREADS.items()}


def build(factors):
    """The parts (list of Solid) of the person that factors describe. Painters map world points x (N, 3) to albedo (N, 3)."""
    f, parts, still = argparse.Namespace(**factors), [], (0, 0, 0)
    codes = f.skin_colour, f.hair_colour, f.eye_colour, f.clothes_colour, f.pattern_colour, '2a2523'
    skin, hair, iris, cloth, accent, dark = torch.tensor([list(bytes.fromhex(code)) for code in codes]).div(255) ** 2.2
    skin, (curve, gape, mouth, lift, frown, lid) = skin * f.skin_shade, MOODS[f.expression]
    w, h, jaw, e, n = 0.42 * f.head_width, f.head_height, 0.31 * f.jaw_width, 0.088 * f.eye_size, f.nose_size
    eye_x, mouth_z, nose_z, chin_z = 0.165 * f.eye_spacing, -0.115 * h, 0.06 - 0.03 * f.nose_length, 0.29 - 0.58 * h
    def add(paint, centre, radii, turn=still, keep=(), hole=None, blend=''):
        for side in (1, -1) if centre[0] else (1,):                                # a part on the left has a mirror image
            parts.append(solid(centre, radii, turn, keep, side, hole=hole and solid(*hole, side=side), paint=paint, blend=blend))
    def strands(x):
        turn, Z, p = torch.atan2(x[:, :1], x[:, 1:2] - 0.05), x[:, 2:], 99 * f.hair_phase
        fine = 0.2 * (31 * turn + 3 * (7 * Z + p).sin()).sin() + 0.13 * (73 * turn + 5 * (5 * Z + 2 * p).sin()).sin()
        return hair * (1 + fine + 0.12 * (9 * Z + 4 * turn).sin())
    def complexion(x):
        X, Y, Z = x[:, :1].abs(), x[:, 1:2], x[:, 2:]
        s = (X / mouth).clamp(max=1) ** 2                                          # 0 amid the mouth, 1 at its corners
        lip = (Z - mouth_z - curve * (s - 0.4)).abs() - gape * (1 - s) ** 0.5 + (Y > -0.2)
        colour = torch.where(lip < 0.034 * f.lip_size * (1 - s) ** 0.5, skin * torch.tensor([0.78, 0.42, 0.42]), skin)
        colour = torch.where((lip < 0.004) & (s < 1), dark * 0.6, colour)
        return torch.where((Y < -0.4) & ((X - 0.028) ** 2 + (Z - nose_z + 0.037) ** 2 < 0.0002), skin * 0.3, colour)   # nostrils
    def eyelid(x):
        return torch.where((x[:, 2:] < lid * e + 0.193) & (x[:, 1:2] < -0.4), dark * 0.7, skin * 0.9)
    def gaze(x):
        X, Z = x[:, :1].abs() - eye_x + 0.008, x[:, 2:] - 0.18
        r, spokes = (X ** 2 + Z ** 2).sqrt() / f.eye_size, 1 + 0.2 * (torch.atan2(X, Z) * 14).sin()
        colour = torch.where(r < 0.040, iris * (0.9 + 12 * r) * spokes, torch.where(r < 0.046, iris * 0.4, 0.85))
        return torch.where((X + 0.018) ** 2 + (Z - 0.02) ** 2 < 0.00013, 1.0, torch.where(r < 0.02, dark * 0.5, colour))
    def clothes(x):
        X, Y, Z = x.split(1, -1)
        around, up = (torch.atan2(X, 0.9 - Y) * 38 * f.pattern_scale).sin(), (Z * 42 * f.pattern_scale).sin()
        mask = {'plain': up > 2, 'stripes': up > 0.3, 'bars': around > 0.3, 'checks': up * around < 0, 'dots': up + around > 1.2}
        deep, wide, power = {'crew': (0.08, 0.2, 2), 'v': (0.24, 0.2, 1), 'scoop': (0.2, 0.27, 2)}[f.neckline]
        drop = (X.abs() / wide) ** power - (0.5 + Z) / deep + (Y > 0.1) * 9        # 1 along the neckline
        return torch.where(drop < 1, skin, torch.where(drop < 1.2, cloth * 0.7, torch.where(mask[f.pattern], accent, cloth)))
    for shape in (((0, 0.02, 0.22 - 0.045 * h), (w, 0.47, 0.535 * h)), ((0, -0.08, mouth_z - 0.02), (jaw, 0.325, 0.25 * h)),
                  ((0, 0.06, -0.42), (0.17, 0.17, 0.55)), ((0, -0.455, nose_z + 0.07), (0.042 * n, 0.05, 0.13), (-14, 0, 0)),
                  ((0, -0.29, chin_z), (0.11, 0.09, 0.07)), ((0, -0.485, nose_z), (0.056 * n, 0.06 * f.nose_length, 0.05)),
                  ((w + 0.015, 0.06, 0.14), (0.04, 0.078, 0.115), (0, 14, 18))):
        add(complexion, *shape, blend='skin')                                      # cranium, jaw, neck, nose, chin, tip, ears
    add(gaze, (eye_x, -0.37, 0.18), (e, 0.07, e), (0, 0, 20))
    add(eyelid, (eye_x, -0.37, 0.18), (e * 1.1, 0.08, e * 1.1), (0, 0, 20), (0, 0, -1, -0.18 - lid * e))
    add(strands, (eye_x * 1.05, -0.41, 0.315 + lift), (0.095, 0.026, 0.017), (0, 4 - frown, 16))
    if f.hair_style != 'bald':                                                     # a cap with an opening for the face
        face = (0.1 * (f.hair_style == 'parted'), -0.56, -0.03 if f.hair_style == 'fringe' else 0.08), (w * 0.95, 0.47, 0.42 * h)
        edge = {'fringe': (0, -0.2, -1, 0.02), 'long': (0, 0, -1, 0.6)}.get(f.hair_style, (0, -0.6, -1, -0.2))
        add(strands, (0, 0.05, 0.24), (w + 0.05, 0.5, 0.49 * h + 0.045), still, edge, face)
    moustache = (0.065, -0.41, mouth_z + 0.062 + gape), (0.085, 0.04, 0.024), (0, 14, 14)
    tufts = {'long': [((0, 0.17, -0.1), (w + 0.07, 0.42, 0.75), still, ((0, 0, -1, 0.8), (0, -1, 0, 0.02))),
                      ((w - 0.01, -0.06, -0.1), (0.09, 0.15, 0.5), (0, 4, 0))],
             'bun': [((0, 0.22, 0.78), (0.17, 0.17, 0.15))], 'ponytail': [((0, 0.62, 0.12), (0.13, 0.14, 0.42), (12, 0, 0))],
             'moustache': [moustache], 'goatee': [moustache, ((0, -0.32, chin_z - 0.04), (0.105, 0.1, 0.1))],
             'full': [moustache, ((0, -0.06, -0.12), (jaw + 0.095, 0.4, 0.36 * h), still,
                                  ((0, 1, -0.3, 0.12), (0, -0.55, 1, 0.14)), ((0, -0.45, mouth_z), (mouth, 0.2, 0.08 + gape)))]}
    for shape in tufts.get(f.hair_style, []) + tufts.get(f.beard, []):
        add(strands, *shape)
    if f.glasses != 'no':                                                          # rims, arms, bridge
        rim, lens = ((eye_x, -0.49, 0.17), (0.13, 0.022, 0.13)), ((eye_x, -0.49, 0.17), (0.111, 0.5, 0.111))
        for shape in ((*rim, still, (), lens if f.glasses == 'round' else None), ((0, -0.5, 0.19), (eye_x - 0.08, 0.014, 0.014)),
                      (((eye_x + w + 0.15) / 2, -0.205, 0.2), (0.013, 0.3, 0.018), (0, 0, -16))):
            add(lambda x: dark.expand_as(x) * 0.6, *shape)
    add(clothes, (0, 0.06, -1), (0.72 * f.shoulder_width, 0.34, 0.52), still, (0, 0, -1, 0.97), blend='cloth')
    add(clothes, (0.5 * f.shoulder_width, 0.06, -0.93), (0.31, 0.27, 0.3), still, (0, 0, -1, 0.97), blend='cloth')
    return parts


def render_views(parts, c2w, size, fov=FOV):
    """Poses (V, 4, 4), fov in degrees -> straight-alpha RGBA (V, size, size, 4) in [0, 1], the mean of 2 x 2 rays a pixel."""
    rays = [rh.view_rays(pose, rh.intrinsics_of(fov, 2 * size), 2 * size, 2 * size) for pose in c2w]
    colour, _, hit = trace(parts, *map(torch.cat, zip(*rays)))
    mean = torch.cat([colour, hit[:, None].float()], -1).view(-1, size, 2, size, 2, 4).mean((2, 4))
    return torch.cat([mean[..., :3] / mean[..., 3:].clamp(min=0.25), mean[..., 3:]], -1)


def write_avatar(folder, seed, index, size, views, held_out):
    """Avatar `index` of a seed: a folder with transforms_train.json, transforms_test.json (if held_out) and their pictures."""
    rng = random.Random(f'{seed} {index}')
    meta = {'camera_angle_x': math.radians(FOV), 'w': size, 'h': size, 'aabb': [[-1] * 3, [1] * 3], 'factors': draw_factors(rng)}
    parts, low, high = build(meta['factors']), math.sin(math.radians(-20)), math.sin(math.radians(45))
    for split, count in [('train', views), ('test', held_out)][:1 + (held_out > 0)]:
        (folder / split).mkdir(parents=True)
        start, frames = rng.uniform(0, 360), []
        for k in range(count):                                                     # the portrait, then a golden-angle spiral
            height = math.degrees(math.asin(low + (high - low) * (k + rng.random()) / count))
            pose = rh.orbit_pose(0, 2) if split == 'train' and k == 0 else rh.orbit_pose(start + 137.508 * k, height)
            frames.append({'file_path': f'{split}/r_{k:03d}.png', 'transform_matrix': pose.tolist()})
            image = render_views(parts, pose[None], size)[0] * 255
            Image.fromarray(image.round().byte().numpy()).save(folder / frames[k]['file_path'])
        (folder / f'transforms_{split}.json').write_text(json.dumps({**meta, 'frames': frames}, indent=1))


def main(args):
    """Draws the avatars that args, from `parse`, asks for; those that are there are kept."""
    if args.data.exists() and not args.data.is_dir():
        rh.stop(f'--data {args.data} is not a folder')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                       # small tensors: more threads are slower
    for index in tqdm(range(args.count), unit='avatar'):
        folder, draft = (args.data / f'{prefix}avatar_{index:04d}' for prefix in ('', '.tmp-'))
        if not folder.exists():
            shutil.rmtree(draft, ignore_errors=True)
            write_avatar(draft, args.seed, index, args.size, args.views, args.held_out)
            draft.rename(folder)
    torch.set_num_threads(threads)


def parse(argv=None):
    """Arguments, with what the preset sets."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = rh.stop
    p.add_argument('--preset', choices=PRESETS, default='small', help='sets the next four')
    for name, text in {'count': 'avatars', 'size': 'pixels a side', 'views': 'training views', 'held-out': 'test views'}.items():
        p.add_argument(f'--{name}', type=int, default=argparse.SUPPRESS, help=text)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--data', type=Path, default=Path('data'), help='where the avatars go; those that are there are kept')
    args = p.parse_args(argv)
    for name, value, least in zip(('count', 'size', 'views', 'held_out'), PRESETS[args.preset], (1, 8, 1, 0)):
        if vars(args).setdefault(name, value) < least:
            rh.stop(f'--{name.replace("_", "-")} must be at least {least}, not {getattr(args, name)}')
    return args


if __name__ == '__main__':
    main(parse())
