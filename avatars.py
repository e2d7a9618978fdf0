"""Stage 0: draw synthetic avatars, as posed images in the data format that the other stages read.

    python avatars.py                  32 avatars, 256 x 256, 30 + 6 views, into data/ (minutes)
    python avatars.py --preset tiny    8 avatars, 64 x 64, 24 + 4 views (seconds); also paper

`draw_factors` draws a person as a dict of named factors, `build` turns them into solid parts, and
`trace` meets these with rays in closed form. `inside` is the same geometry, for tests. The world
has Z up, faces look along -Y, the avatar's left is +X, and all of it lies within [-1, 1]^3.
Letters in shapes: N rays or points, K planes, V views.
"""
import argparse
import functools
import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import endings  # noqa: F401  # isort: skip  # before PyTorch, whose import takes seconds
import torch
from PIL import Image

import rodinhd as rh
import running

PRESETS = {
    'tiny': dict(count=8, size=64, views=24, held_out=4),
    'small': dict(count=32, size=256, views=30, held_out=6),
    'paper': dict(count=64, size=512, views=300, held_out=6),
}
FOV = 34  # of the cameras, in degrees
LOWEST, HIGHEST = -20, 45  # elevations of the cameras, in degrees

# Factors ------------------------------------------------------------------------------------------


class Mood(NamedTuple):
    """What an expression does to the face."""
    corners: float  # of the mouth, upwards
    opening: float  # of the mouth, half of its height
    half_width: float  # of the mouth
    brows: float  # how far they are raised
    frown: float  # of the brows, in degrees
    lid: float  # height of the upper lid's rim, in eye radii


MOODS = {
    'neutral': Mood(0.01, 0, 0.12, 0, 0, 0.45),
    'smile': Mood(0.055, 0, 0.15, 0.01, -3, 0.4),
    'open': Mood(0, 0.05, 0.09, 0.05, -6, 0.7),
    'sad': Mood(-0.05, 0, 0.12, 0.015, -16, 0.2),
    'asleep': Mood(0.02, 0, 0.11, 0, -4, -0.75),
}

# Colours are sRGB in hexadecimal.
DYES = 'b8322f 233a66 1f7f80 d29a2a ece8df 35363a 3f7a46 6a4590 d98aa0 6fa8d0 d0672b 6b4a35'
DARK = '2a2523'  # pupils, lashes, the line between the lips, glasses

# One of these words is drawn for each name; a word that is there twice is likelier.
CHOICES = {
    'hair_style': 'bald short parted fringe long bun ponytail',
    'expression': 'neutral neutral smile smile open sad asleep',
    'glasses': 'no no round dark',
    'beard': 'no no no moustache goatee full',
    'neckline': 'crew v scoop',
    'pattern': 'plain stripes bars checks dots',
    'pattern_colour': DYES,
    'clothes_colour': DYES,
    'skin_colour': 'f3d0b8 e6b592 cf9468 a86d45 7b4a2e 4a2c1d',
    'eye_colour': '5a3517 2a1a10 3c7fb8 4d8a4a 8a6a2c 7a8790',
    'hair_colour': '17130f 38241a 5f3d26 7a3420 b4581f c99b53 e3d5b0 8f8d8a dcdad6 2f5fa8 c9608f',
}

# Each of these is drawn from 1 plus or minus its spread.
SPREADS = {
    'head_width': 0.08,
    'head_height': 0.06,
    'jaw_width': 0.14,
    'nose_size': 0.25,
    'nose_length': 0.3,
    'eye_size': 0.13,
    'eye_spacing': 0.1,
    'lip_size': 0.35,
    'shoulder_width': 0.09,
    'pattern_scale': 0.3,
    'skin_shade': 0.12,
    'hair_phase': 0.5,
}


def draw_factors(rng):
    """Draws one person, a dict of plain numbers and strings, from a random.Random."""
    choices = {name: rng.choice(words.split()) for name, words in CHOICES.items()}
    sizes = {name: round(1 + rng.uniform(-s, s), 3) for name, s in SPREADS.items()}
    return choices | sizes


# Solids and rays ----------------------------------------------------------------------------------


class Solid(NamedTuple):
    """The points x where |to_unit (x - centre)| <= 1 and, for each plane, normal . x <= offset,
    minus those of the hole."""
    to_unit: torch.Tensor  # (3, 3), the axes over their radii
    centre: torch.Tensor  # (3,)
    planes: torch.Tensor  # (K, 4), normal and offset
    hole: object = None  # another Solid, without a hole of its own
    paint: object = None  # function: points (N, 3) -> linear albedo (N, 3)
    blend: str = ''  # parts of one name look as one smooth surface


def solid(centre, radii, turn=(0, 0, 0), keep=(), hole=None, side=1, paint=None, blend=''):
    """Makes the ellipsoid of these radii, turned by a rotation vector in degrees, and cuts it
    off where n . x > offset for a (*n, offset) of `keep`. The hole is the centre and the radii
    of another one. Side -1 mirrors all of it in x."""
    mirror = torch.tensor([side, 1.0, 1.0, 1.0])
    turn = torch.tensor(turn).float().deg2rad()
    axes = torch.linalg.matrix_exp(torch.linalg.cross(torch.eye(3), turn.expand(3, 3)))
    return Solid(
        to_unit=axes.T / torch.tensor(radii).float()[:, None] * mirror[:3],
        centre=torch.tensor(centre).float() * mirror[:3],
        planes=torch.tensor(keep).float().view(-1, 4) * mirror,
        hole=None if hole is None else solid(*hole, side=side),
        paint=paint,
        blend=blend,
    )


def both_sides(centre, *shape, **rest):
    """Makes a list of solids: a part on the left has a mirror image, one amid has none."""
    sides = (1, -1) if centre[0] else (1,)
    return [solid(centre, *shape, side=side, **rest) for side in sides]


def interval(body, rays_o, rays_d):
    """Finds the depths near (N,) and far (N,) between which rays (N, 3), (N, 3) are in a solid
    whose hole is filled. Where a ray misses it, they are nan, or near is greater than far."""
    # The unit ball: |u + t v| = 1 is a quadratic equation.
    u = (rays_o - body.centre) @ body.to_unit.T
    v = rays_d @ body.to_unit.T
    a = (v * v).sum(-1, keepdim=True)
    b = (u * v).sum(-1, keepdim=True)
    c = (u * u).sum(-1, keepdim=True)
    root = (b * b - a * (c - 1)).sqrt()

    # The planes: a ray enters through those that face it, and leaves through the others.
    slope = rays_d @ body.planes[:, :3].T
    t = (body.planes[:, 3] - rays_o @ body.planes[:, :3].T) / slope
    enters = torch.where(slope < 0, t, -math.inf)
    leaves = torch.where(slope < 0, math.inf, t)

    near = torch.cat([(-b - root) / a, enters], -1).amax(-1)
    far = torch.cat([(-b + root) / a, leaves], -1).amin(-1)
    return near, far


def level(body, x):
    """Estimates the signed distance (N,) of points x (N, 3) to a solid's surface; it is negative
    inside."""
    u = (x - body.centre) @ body.to_unit.T
    length = u.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    gradient = (u / length @ body.to_unit).norm(dim=-1, keepdim=True).clamp(min=1e-6)
    to_ball = (length - 1) / gradient
    to_planes = x @ body.planes[:, :3].T - body.planes[:, 3]
    distance = torch.cat([to_ball, to_planes], -1).amax(-1)
    if body.hole is None:
        return distance
    return distance.maximum(-level(body.hole, x))


def inside(parts, points):
    """Tells which points (N, 3) are inside any of the parts (a list of Solid): bool (N,)."""
    return torch.stack([level(part, points) < 0 for part in parts]).any(0)


def normals(parts, part, x):
    """Finds the unit normals (N, 3) of points x (N, 3) on a part: the gradient of the smooth
    union of the parts that it blends with."""
    group = [part]
    if part.blend:
        group = [other for other in parts if other.blend == part.blend]
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        depths = torch.stack([-level(other, point) / 0.02 for other in group])
        union = -0.02 * depths.logsumexp(0)
        gradient = torch.autograd.grad(union.sum(), point)[0]
        return torch.nn.functional.normalize(gradient, dim=-1)


def shade(parts, part, x):
    """Gives the display colours (N, 3), in [0, 1], of points x (N, 3) on one of the parts."""
    normal = normals(parts, part, x)
    lamps = torch.tensor([[-0.5, -0.75, 0.5], [0.89, -0.4, 0.2], [0.2, 0.9, 0.4]])
    strength = torch.tensor([[0.54], [0.22], [0.36]])
    light = ((normal @ lamps.T + 0.2) / 1.2).clamp(min=0) @ strength
    light = light + 0.34 + 0.12 * normal[:, 2:]  # from sky and ground
    return (part.paint(x) * light).clamp(0, 1) ** (1 / 2.2)


def first_of_its_surface(parts, k):
    """The number of the first part that looks as one surface with part k, which may be k."""
    blend = parts[k].blend
    if not blend:
        return k
    return next(i for i, part in enumerate(parts) if part.blend == blend)


def trace(parts, rays_o, rays_d):
    """Follows rays (N, 3), (N, 3), of unit length and from outside, to the parts (a list of
    Solid) -> colour (N, 3) in [0, 1], depth (N,), which is inf where all are missed, and whether
    one is hit (N,)."""
    depth = torch.full(rays_o.shape[:1], math.inf)
    owner = torch.full(rays_o.shape[:1], -1)
    origin_squared = (rays_o * rays_o).sum(-1)
    origin_along = (rays_o * rays_d).sum(-1)
    for k, part in enumerate(parts):
        # Only rays that pass the centre within the largest radius can hit the part.
        radius = (1 / part.to_unit.norm(dim=1)).max() + 1e-3
        along = rays_d @ part.centre - origin_along
        squared = origin_squared - 2 * rays_o @ part.centre + part.centre @ part.centre
        rays = (squared - along ** 2 < radius ** 2).nonzero()[:, 0]

        # They start where they are nearest to it: from afar, float32 loses thin parts.
        along = along[rays]
        origin = rays_o[rays] + along[:, None] * rays_d[rays]
        t, far = interval(part, origin, rays_d[rays])
        if part.hole is not None:
            hole_near, hole_far = interval(part.hole, origin, rays_d[rays])
            t = torch.where((t >= hole_near) & (t < hole_far), hole_far, t)

        closer = (t < far) & (t + along < depth[rays])
        depth[rays[closer]] = (t + along)[closer]
        owner[rays[closer]] = first_of_its_surface(parts, k)

    colour = torch.zeros_like(rays_d)
    for k in owner[owner >= 0].unique().tolist():
        rays = (owner == k).nonzero()[:, 0]
        x = rays_o[rays] + depth[rays, None] * rays_d[rays]
        colour[rays] = shade(parts, parts[k], x)
    return colour, depth, owner >= 0


# People -------------------------------------------------------------------------------------------


class Person:
    """Measures and colours of the person that factors describe, the painters of its surfaces,
    and its parts. Painters map points x (N, 3) of the world to linear albedo (N, 3)."""

    def __init__(self, factors):
        f = SimpleNamespace(**factors)
        self.factors = f
        self.mood = MOODS[f.expression]

        # Sizes and places in units of the world.
        self.head_width = 0.42 * f.head_width
        self.head_height = f.head_height
        self.jaw_width = 0.31 * f.jaw_width
        self.eye = 0.088 * f.eye_size  # its radius
        self.eye_x = 0.165 * f.eye_spacing
        self.mouth_z = -0.115 * self.head_height
        self.nose_z = 0.06 - 0.03 * f.nose_length
        self.chin_z = 0.29 - 0.58 * self.head_height

        # Linear albedo (3,).
        codes = [f.skin_colour, f.hair_colour, f.eye_colour]
        codes += [f.clothes_colour, f.pattern_colour, DARK]
        srgb = torch.tensor([list(bytes.fromhex(code)) for code in codes]).div(255)
        albedo = srgb ** 2.2
        skin, self.hair, self.iris, self.cloth, self.accent, self.dark = albedo
        self.skin = skin * f.skin_shade

    def paint_skin(self, x):
        X, Y, Z = x.split(1, dim=-1)
        mouth = self.mood

        # The lips: `s` is 0 amid the mouth and 1 at its corners, `lip` the distance to them.
        s = (X.abs() / mouth.half_width).clamp(max=1) ** 2
        lip = (Z - self.mouth_z - mouth.corners * (s - 0.4)).abs()
        lip = lip - mouth.opening * (1 - s) ** 0.5 + (Y > -0.2)
        red = self.skin * torch.tensor([0.78, 0.42, 0.42])
        thickness = 0.034 * self.factors.lip_size * (1 - s) ** 0.5
        colour = torch.where(lip < thickness, red, self.skin)
        colour = torch.where((lip < 0.004) & (s < 1), self.dark * 0.6, colour)

        # The nostrils.
        hole = (X.abs() - 0.028) ** 2 + (Z - self.nose_z + 0.037) ** 2 < 0.0002
        return torch.where((Y < -0.4) & hole, self.skin * 0.3, colour)

    def paint_hair(self, x):
        X, Y, Z = x.split(1, dim=-1)
        around = torch.atan2(X, Y - 0.05)
        phase = 99 * self.factors.hair_phase
        fine = 0.2 * (31 * around + 3 * (7 * Z + phase).sin()).sin()
        finer = 0.13 * (73 * around + 5 * (5 * Z + 2 * phase).sin()).sin()
        broad = 0.12 * (9 * Z + 4 * around).sin()
        return self.hair * (1 + (fine + finer) + broad)

    def paint_eye(self, x):
        X, _, Z = x.split(1, dim=-1)
        X = X.abs() - self.eye_x + 0.008
        Z = Z - 0.18
        r = (X ** 2 + Z ** 2).sqrt() / self.factors.eye_size
        spokes = 1 + 0.2 * (torch.atan2(X, Z) * 14).sin()
        colour = torch.where(r < 0.046, self.iris * 0.4, 0.85)  # rim, white
        colour = torch.where(r < 0.040, self.iris * (0.9 + 12 * r) * spokes, colour)
        colour = torch.where(r < 0.02, self.dark * 0.5, colour)  # pupil
        glint = (X + 0.018) ** 2 + (Z - 0.02) ** 2 < 0.00013
        return torch.where(glint, 1.0, colour)

    def paint_eyelid(self, x):
        _, Y, Z = x.split(1, dim=-1)
        rim = self.mood.lid * self.eye + 0.193
        lashes = (rim > Z) & (Y < -0.4)
        return torch.where(lashes, self.dark * 0.7, self.skin * 0.9)

    def paint_glasses(self, x):
        return self.dark.expand_as(x) * 0.6

    def paint_clothes(self, x):
        X, Y, Z = x.split(1, dim=-1)
        around = (torch.atan2(X, 0.9 - Y) * 38 * self.factors.pattern_scale).sin()
        up = (Z * 42 * self.factors.pattern_scale).sin()
        patterns = {
            'plain': up > 2,
            'stripes': up > 0.3,
            'bars': around > 0.3,
            'checks': up * around < 0,
            'dots': up + around > 1.2,
        }
        colour = torch.where(patterns[self.factors.pattern], self.accent, self.cloth)

        # `drop` is 1 along the neckline, and less in it.
        neckline = self.factors.neckline
        deep, wide = {'crew': (0.08, 0.2), 'v': (0.24, 0.2), 'scoop': (0.2, 0.27)}[neckline]
        power = 1 if neckline == 'v' else 2
        drop = (X.abs() / wide) ** power - (0.5 + Z) / deep + (Y > 0.1) * 9
        colour = torch.where(drop < 1.2, self.cloth * 0.7, colour)  # the hem
        return torch.where(drop < 1, self.skin, colour)

    def head(self):
        f = self.factors
        width, height = self.head_width, self.head_height
        nose_radii = (0.042 * f.nose_size, 0.05, 0.13)
        tip_radii = (0.056 * f.nose_size, 0.06 * f.nose_length, 0.05)
        flesh = functools.partial(both_sides, paint=self.paint_skin, blend='skin')
        return [
            *flesh((0, 0.02, 0.22 - 0.045 * height), (width, 0.47, 0.535 * height)),  # cranium
            *flesh((0, -0.08, self.mouth_z - 0.02), (self.jaw_width, 0.325, 0.25 * height)),
            *flesh((0, 0.06, -0.42), (0.17, 0.17, 0.55)),  # neck
            *flesh((0, -0.455, self.nose_z + 0.07), nose_radii, (-14, 0, 0)),
            *flesh((0, -0.29, self.chin_z), (0.11, 0.09, 0.07)),
            *flesh((0, -0.485, self.nose_z), tip_radii),
            *flesh((width + 0.015, 0.06, 0.14), (0.04, 0.078, 0.115), (0, 14, 18)),  # ears
        ]

    def eyes(self):
        e = self.eye
        centre = (self.eye_x, -0.37, 0.18)
        lid_radii = (e * 1.1, 0.08, e * 1.1)
        above_its_rim = ((0, 0, -1, -0.18 - self.mood.lid * e),)
        brow = (self.eye_x * 1.05, -0.41, 0.315 + self.mood.brows)
        brow_turn = (0, 4 - self.mood.frown, 16)
        return [
            *both_sides(centre, (e, 0.07, e), (0, 0, 20), paint=self.paint_eye),
            *both_sides(centre, lid_radii, (0, 0, 20), above_its_rim, paint=self.paint_eyelid),
            *both_sides(brow, (0.095, 0.026, 0.017), brow_turn, paint=self.paint_hair),
        ]

    def hair_parts(self):
        style = self.factors.hair_style
        if style == 'bald':
            return []
        width, height = self.head_width, self.head_height
        lock = functools.partial(both_sides, paint=self.paint_hair)

        # A cap over the cranium, cut off behind an edge, with an opening for the face.
        edges = {'fringe': (0, -0.2, -1, 0.02), 'long': (0, 0, -1, 0.6)}
        edge = edges.get(style, (0, -0.6, -1, -0.2))
        parting = 0.1 * (style == 'parted')
        forehead = -0.03 if style == 'fringe' else 0.08
        face = (parting, -0.56, forehead), (width * 0.95, 0.47, 0.42 * height)
        cap_radii = (width + 0.05, 0.5, 0.49 * height + 0.045)
        parts = lock((0, 0.05, 0.24), cap_radii, keep=(edge,), hole=face)

        if style == 'long':
            behind_the_face = ((0, 0, -1, 0.8), (0, -1, 0, 0.02))
            parts += lock((0, 0.17, -0.1), (width + 0.07, 0.42, 0.75), keep=behind_the_face)
            parts += lock((width - 0.01, -0.06, -0.1), (0.09, 0.15, 0.5), (0, 4, 0))
        if style == 'bun':
            parts += lock((0, 0.22, 0.78), (0.17, 0.17, 0.15))
        if style == 'ponytail':
            parts += lock((0, 0.62, 0.12), (0.13, 0.14, 0.42), (12, 0, 0))
        return parts

    def beard(self):
        kind = self.factors.beard
        if kind == 'no':
            return []
        mood = self.mood
        tuft = functools.partial(both_sides, paint=self.paint_hair)
        lip = (0.065, -0.41, self.mouth_z + 0.062 + mood.opening)
        parts = tuft(lip, (0.085, 0.04, 0.024), (0, 14, 14))  # the moustache
        if kind == 'goatee':
            parts += tuft((0, -0.32, self.chin_z - 0.04), (0.105, 0.1, 0.1))
        if kind == 'full':
            radii = (self.jaw_width + 0.095, 0.4, 0.36 * self.head_height)
            below_cheeks = ((0, 1, -0.3, 0.12), (0, -0.55, 1, 0.14))
            mouth = (0, -0.45, self.mouth_z), (mood.half_width, 0.2, 0.08 + mood.opening)
            parts += tuft((0, -0.06, -0.12), radii, keep=below_cheeks, hole=mouth)
        return parts

    def glasses(self):
        kind = self.factors.glasses
        if kind == 'no':
            return []
        eye_x = self.eye_x
        frame = functools.partial(both_sides, paint=self.paint_glasses)
        lens = (eye_x, -0.49, 0.17), (0.111, 0.5, 0.111)
        opening = lens if kind == 'round' else None
        arm = ((eye_x + self.head_width + 0.15) / 2, -0.205, 0.2)
        return [
            *frame((eye_x, -0.49, 0.17), (0.13, 0.022, 0.13), hole=opening),  # rims
            *frame((0, -0.5, 0.19), (eye_x - 0.08, 0.014, 0.014)),  # bridge
            *frame(arm, (0.013, 0.3, 0.018), (0, 0, -16)),
        ]

    def clothes(self):
        width = self.factors.shoulder_width
        above_the_box = ((0, 0, -1, 0.97),)
        cloth = functools.partial(
            both_sides, keep=above_the_box, paint=self.paint_clothes, blend='cloth'
        )
        return [
            *cloth((0, 0.06, -1), (0.72 * width, 0.34, 0.52)),
            *cloth((0.5 * width, 0.06, -0.93), (0.31, 0.27, 0.3)),  # shoulders
        ]


def build(factors):
    """Makes the parts (a list of Solid) of the person that factors describe."""
    person = Person(factors)
    return [
        *person.head(),
        *person.eyes(),
        *person.hair_parts(),
        *person.beard(),
        *person.glasses(),
        *person.clothes(),
    ]


# Avatars on disk ----------------------------------------------------------------------------------


def render_views(parts, c2w, size, fov=FOV):
    """Renders parts from poses (V, 4, 4), with a field of view in degrees -> straight-alpha RGBA
    (V, size, size, 4) in [0, 1], each pixel the mean of 2 x 2 rays."""
    intrinsics = rh.intrinsics_of(fov, 2 * size)
    rays = [rh.view_rays(pose, intrinsics, 2 * size, 2 * size) for pose in c2w]
    rays_o, rays_d = map(torch.cat, zip(*rays))
    colour, _, hit = trace(parts, rays_o, rays_d)
    rgba = torch.cat([colour, hit[:, None].float()], -1)  # premultiplied: misses are zero
    rgba = rgba.view(-1, size, 2, size, 2, 4).mean((2, 4))
    alpha = rgba[..., 3:]
    return torch.cat([rgba[..., :3] / alpha.clamp(min=0.25), alpha], -1)


def camera_poses(count, rng, portrait):
    """Draws `count` camera-to-world poses (4, 4), which rise along a spiral of golden angles from
    the lowest elevation to the highest. With `portrait` the first looks at the face."""
    start = rng.uniform(0, 360)
    lowest = math.sin(math.radians(LOWEST))
    highest = math.sin(math.radians(HIGHEST))
    poses = []
    for k in range(count):
        sine = lowest + (highest - lowest) * (k + rng.random()) / count
        poses.append(rh.orbit_pose(start + 137.508 * k, math.degrees(math.asin(sine))))
    if portrait:
        poses[0] = rh.orbit_pose(0, 2)
    return poses


def write_avatar(folder, seed, index, size, views, held_out):
    """Writes avatar `index` of a seed: a folder with transforms_train.json and its pictures, and,
    where held_out is not 0, transforms_test.json and its own."""
    rng = random.Random(f'{seed} {index}')
    meta = {
        'camera_angle_x': math.radians(FOV),
        'w': size,
        'h': size,
        'aabb': [[-1] * 3, [1] * 3],
        'factors': draw_factors(rng),
    }
    parts = build(meta['factors'])
    for split, count in (('train', views), ('test', held_out)):
        if count == 0:
            continue
        (folder / split).mkdir(parents=True)
        frames = []
        for k, pose in enumerate(camera_poses(count, rng, portrait=split == 'train')):
            name = f'{split}/r_{k:03d}.png'
            image = render_views(parts, pose[None], size)[0] * 255
            Image.fromarray(image.round().byte().numpy()).save(folder / name)
            frames.append({'file_path': name, 'transform_matrix': pose.tolist()})
        content = json.dumps({**meta, 'frames': frames}, indent=1)
        (folder / f'transforms_{split}.json').write_text(content)


def name_of(seed, index):
    """The name of an avatar's folder, another one for each seed."""
    return f'avatar_{index:04d}' if seed == 0 else f'avatar_{seed}_{index:04d}'


def check_folder(folder, args):
    """Stops where an avatar is there already, with other pictures than are asked for."""
    for split, count in (('train', args.views), ('test', args.held_out)):
        try:
            meta = json.loads((folder / f'transforms_{split}.json').read_bytes())
            found = meta['w'], len(meta['frames'])
        except FileNotFoundError:
            found = args.size, 0
        except (ValueError, TypeError, KeyError):
            found = 'unknown', 'unknown'
        if found != (args.size, count):
            size, number = found
            rh.stop(f'{folder}: is there, with {number} pictures of {size} pixels to {split}, '
                    f'not {count} of {args.size}; delete it, or give another folder with --data')


def draw(folder, args, index):
    """Draws an avatar into a folder, which has its name once all of it is on the disk."""
    draft = folder.with_name(f'.tmp-{folder.name}')
    shutil.rmtree(draft, ignore_errors=True)
    write_avatar(draft, args.seed, index, args.size, args.views, args.held_out)
    for path in (*draft.rglob('*'), draft):
        running.synchronise(path)
    draft.rename(folder)
    running.synchronise(folder.parent)


def main(args):
    """Draws the avatars that args, of `parse`, asks for, and keeps those that are there."""
    if args.data.exists() and not args.data.is_dir():
        rh.stop(f'--data {args.data} is not a folder')
    folders = {args.data / name_of(args.seed, index): index for index in range(args.count)}
    left = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small: more threads are slower
    bar = running.Bar(running.claimed(folders, Path, left), total=args.count, desc='avatars')
    for folder in bar:
        if folder.exists():
            check_folder(folder, args)
        else:
            draw(folder, args, folders[folder])
    torch.set_num_threads(threads)
    if left:
        rh.stop(f'{len(left)} of {args.count} avatars: another process still draws them')


def parse(argv=None):
    """Reads the arguments, and fills in what the preset sets."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.error = lambda message: rh.stop(message)
    p.add_argument('--preset', choices=PRESETS, default='small', help='sets the next four')
    p.add_argument('--count', type=int, help='avatars')
    p.add_argument('--size', type=int, help='pixels a side')
    p.add_argument('--views', type=int, help='training views')
    p.add_argument('--held-out', type=int, help='test views')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument(
        '--data',
        type=Path,
        default=Path('data'),
        help='where the avatars go; those that are there are kept',
    )
    args = p.parse_args(argv)

    if not 0 <= args.seed < running.MOST_SEEDS:
        rh.stop(f'--seed {args.seed}: give a number from 0 to {running.MOST_SEEDS - 1}')
    least = {'count': 1, 'size': 8, 'views': 1, 'held_out': 0}
    most = {'count': 10**7, 'size': 4096, 'views': 10**5, 'held_out': 10**5}
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        value = getattr(args, name)
        flag = name.replace('_', '-')
        if not least[name] <= value <= most[name]:
            rh.stop(f'--{flag} must be at least {least[name]}, at most {most[name]}, not {value}')
    return args


if __name__ == '__main__':
    main(parse())
