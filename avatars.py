"""Stage 0: draw synthetic avatars, as posed images in the data format that the other stages read.

    python avatars.py                             8 avatars, 64 x 64, 24 + 4 views, into data/
    python avatars.py --preset small              32 avatars, 256 x 256, 30 + 6 views
    python avatars.py --preset paper --seed 1     64 avatars, 512 x 512, 300 + 6 views, other people

Factors (`draw_factors`) become solid parts (`build`), which rays meet in closed form (`trace`); `inside` is the same geometry,
for tests. Colour depends on the point alone, never on the view. World: Z up, the face looks along -Y, the avatar's left is +X,
all within [-1, 1]^3. Letters: N rays or points, K planes, V views.
"""
import argparse
import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

PRESETS = {"tiny": (8, 64, 24, 4), "small": (32, 256, 30, 6), "paper": (64, 512, 300, 6)}   # count, size, views, held-out
FOV, DISTANCE = math.radians(34), 4.0
SKIN = ["f3d0b8", "e6b592", "cf9468", "a86d45", "7b4a2e", "4a2c1d"]   # a ramp, skin tone 0 to 1
HAIR = {"black": "17130f", "chestnut": "38241a", "brown": "5f3d26", "auburn": "7a3420", "ginger": "b4581f", "blond": "c99b53",
        "platinum": "e3d5b0", "grey": "8f8d8a", "white": "dcdad6", "blue": "2f5fa8", "pink": "c9608f"}
EYES = {"brown": "5a3517", "dark": "2a1a10", "blue": "3c7fb8", "green": "4d8a4a", "hazel": "8a6a2c", "grey": "7a8790"}
DYES = {"red": "b8322f", "navy": "233a66", "teal": "1f7f80", "mustard": "d29a2a", "white": "ece8df", "charcoal": "35363a",
        "green": "3f7a46", "purple": "6a4590", "pink": "d98aa0", "sky": "6fa8d0", "orange": "d0672b", "brown": "6b4a35"}
MOODS = {   # mouth corners up, opening, half-width; brows up, frowning; upper lid
    "neutral": (0.01, 0, 0.12, 0, 0, 0.45), "smile": (0.055, 0, 0.15, 0.01, -3, 0.4), "grin": (0.05, 0.035, 0.16, 0.02, -4, 0.35),
    "surprise": (-0.02, 0.06, 0.075, 0.06, -6, 0.75), "sad": (-0.05, 0, 0.12, 0.015, -16, 0.2),
    "angry": (-0.035, 0.012, 0.12, -0.025, 16, 0.25), "asleep": (0.02, 0, 0.11, 0, -4, -0.75)}
CHOICES = {   # a repeated choice is likelier
    "hair_style": "bald short parted fringe bob long bun ponytail pigtails afro curls spikes mohawk", "earrings": "no no yes",
    "hair_colour": " ".join(HAIR), "eye_colour": " ".join(EYES), "beard": "none none none none stubble moustache goatee full",
    "glasses": "none none none round square sunglasses", "pattern": "plain stripes bars checks dots zigzag",
    "neckline": "crew v scoop turtleneck hood", "freckles": "no no no yes", "expression": " ".join(MOODS)}
SPREADS = {   # sizes are 1 plus or minus these
    "head_width": 0.08, "head_height": 0.06, "jaw_width": 0.14, "chin": 0.3, "nose_size": 0.25, "nose_length": 0.3,
    "eye_size": 0.13, "eye_spacing": 0.1, "ear_size": 0.25, "lip_size": 0.35, "brow_size": 0.4, "neck_width": 0.15,
    "shoulder_width": 0.09, "pattern_scale": 0.3}


class Solid(NamedTuple):
    """|to_unit (x - centre)| <= 1 where normal . x <= offset, minus holes. Those that blend share smooth normals."""
    to_unit: torch.Tensor                # (3, 3), the axes over their radii
    centre: torch.Tensor                 # (3,)
    planes: torch.Tensor                 # (K, 4), normal and offset
    holes: tuple = ()                    # of solids without holes
    paint: object = None                 # function, points (N, 3) -> linear albedo (N, 3)
    blend: str = ""


def solid(centre, radii, turn=(0, 0, 0), keep=(), **rest):
    """An ellipsoid turned about x, y, then z (degrees), where n . x <= offset for each (*n, offset) in keep."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    axes = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]]) @ [[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]]
    axes = axes @ [[1, 0, 0], [0, ca, -sa], [0, sa, ca]]
    planes = torch.tensor(keep, dtype=torch.float32).view(-1, 4)
    return Solid(torch.tensor(axes.T / np.array(radii)[:, None]).float(), torch.tensor(centre).float(),
                 planes / planes[:, :3].norm(dim=-1, keepdim=True), **rest)


def interval(body, rays_o, rays_d):
    """Depths near (N,), far (N,) between which rays (N, 3), (N, 3) are inside a solid without its holes; near > far: missed."""
    u, v = (rays_o - body.centre) @ body.to_unit.T, rays_d @ body.to_unit.T
    a, b, c = (v * v).sum(-1), (u * v).sum(-1), (u * u).sum(-1) - 1
    root = (b * b - a * c).sqrt()                                                  # nan where the ray misses
    near, far = ((-b - root) / a).nan_to_num(math.inf), ((-b + root) / a).nan_to_num(-math.inf)
    for plane in body.planes:
        slope = rays_d @ plane[:3]
        t = (plane[3] - rays_o @ plane[:3]) / torch.where(slope.abs() < 1e-9, 1e-9, slope)
        near, far = torch.where(slope < 0, near.maximum(t), near), torch.where(slope < 0, far, far.minimum(t))
    return near, far


def level(body, x):
    """About the signed distance (N,) of points x (N, 3) to a solid's surface, negative inside, and its gradient (N, 3)."""
    u = (x - body.centre) @ body.to_unit.T
    length = u.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    gradient = u / length @ body.to_unit
    steep = gradient.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    value, normal = ((length - 1) / steep)[:, 0], gradient / steep
    others = [(x @ plane[:3] - plane[3], plane[:3]) for plane in body.planes]
    for height, direction in others + [(-height, -direction) for height, direction in (level(hole, x) for hole in body.holes)]:
        value, normal = value.maximum(height), torch.where((height > value)[:, None], direction, normal)
    return value, normal


def inside(parts, points):
    """Whether points (N, 3) are inside any part: bool (N,)."""
    return torch.stack([level(part, points)[0] < 0 for part in parts]).any(0)


def shade(parts, part, x):
    """Display colours (N, 3) in [0, 1] of points x (N, 3) on the surface of one of the parts."""
    normal = level(part, x)[1]
    if part.blend:
        near = [level(other._replace(planes=()), x) for other in parts if other.blend == part.blend]
        normal = sum((-value.abs() / 0.02).exp()[:, None] * gradient for value, gradient in near)
        normal = normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    light = 0.34 + 0.12 * normal[:, 2:]                                            # sky and ground, then three lamps
    for direction, strength in (((-0.5, -0.75, 0.5), 0.54), ((0.89, -0.4, 0.2), 0.22), ((0.2, 0.9, 0.4), 0.36)):
        light = light + strength * ((normal @ torch.tensor(direction) + 0.2) / 1.2).clamp(min=0)[:, None]
    to_head = torch.tensor([0, -0.03, 0.15]) - x                                   # the head's soft shadow on what is below
    distance = to_head.norm(dim=-1, keepdim=True)
    shadow = ((normal * to_head).sum(-1, keepdim=True) / distance + 0.25).clamp(0, 1) * (0.42 / distance).clamp(max=1) ** 2
    return (part.paint(x) * light * (1 - 0.75 * shadow)).clamp(0, 1) ** (1 / 2.2)


def trace(parts, rays_o, rays_d):
    """Rays (N, 3), (N, 3) of unit length, from outside -> colour (N, 3) in [0, 1], depth (N,), inf where missed, hit (N,)."""
    depth, owner = torch.full(rays_o.shape[:1], math.inf), torch.full(rays_o.shape[:1], -1)
    oo, od = (rays_o * rays_o).sum(-1), (rays_o * rays_d).sum(-1)
    for k, part in enumerate(parts):
        reach, along = (1 / part.to_unit.norm(dim=1)).max() + 1e-3, rays_d @ part.centre - od
        rays = (oo - 2 * rays_o @ part.centre + part.centre @ part.centre - along ** 2 < reach ** 2).nonzero()[:, 0]
        start, direction = along[rays], rays_d[rays]
        origin = rays_o[rays] + start[:, None] * direction                         # nearby: float32 loses thin parts from afar
        t, far = interval(part, origin, direction)
        spans = [interval(hole, origin, direction) for hole in part.holes]
        for near, end in spans * len(spans):                                       # leaving one hole may be entering another
            t = torch.where((t >= near) & (t < end), end, t)
        closer = (t < far) & (t + start < depth[rays])
        depth[rays[closer]], owner[rays[closer]] = (t + start)[closer], k
    colour = torch.zeros_like(rays_d)
    for k in owner.unique().tolist():
        if k >= 0:
            rays = (owner == k).nonzero()[:, 0]
            colour[rays] = shade(parts, parts[k], rays_o[rays] + depth[rays, None] * rays_d[rays])
    return colour, depth, owner >= 0


def draw_factors(rng):
    """One person, as plain numbers and strings, from a random.Random."""
    factors = {name: rng.choice(values.split()) for name, values in CHOICES.items()}
    factors |= {name: round(1 + rng.uniform(-spread, spread), 3) for name, spread in SPREADS.items()}
    factors |= zip(("clothes_colour", "pattern_colour"), rng.sample(list(DYES), 2))
    return factors | {"skin_tone": round(rng.random(), 3), "hair_seed": rng.randrange(1000)}


def rgb(code):
    return torch.tensor([int(code[i:i + 2], 16) / 255 for i in (0, 2, 4)]) ** 2.2


def build(factors):
    """The solid parts of a person. Painters see world points x (N, 3)."""
    f, parts = argparse.Namespace(**factors), []
    rng, style, tone = random.Random(f.hair_seed), f.hair_style, f.skin_tone * (len(SKIN) - 1.001)
    skin = torch.lerp(rgb(SKIN[int(tone)]), rgb(SKIN[int(tone) + 1]), tone % 1)
    hair, iris, cloth, accent = (rgb(palette[name]) for palette, name in (
        (HAIR, f.hair_colour), (EYES, f.eye_colour), (DYES, f.clothes_colour), (DYES, f.pattern_colour)))
    lips, dark, white = skin * torch.tensor([0.78, 0.42, 0.42]), rgb("2a2523"), rgb("eeede9")
    curve, gape, mouth, lift, frown, lid = MOODS[f.expression]
    w, h, jaw, e, n = 0.42 * f.head_width, f.head_height, 0.31 * f.jaw_width, 0.088 * f.eye_size, f.nose_size
    eye_x, mouth_z, nose_z, top, low = 0.165 * f.eye_spacing, -0.115 * h, 0.06 - 0.03 * f.nose_length, 0.49 * h, 0.58 * h
    def add(when, paint, centre, radii, turn=(0, 0, 0), keep=(), pair=False, **rest):
        """One part, or with pair the avatar's left one and its mirror image."""
        for s in ((1, -1) if pair else (1,)) if when else ():
            parts.append(solid((s * centre[0], *centre[1:]), radii, (turn[0], s * turn[1], s * turn[2]),
                               [(s * plane[0], *plane[1:]) for plane in keep], paint=paint, **rest))
    def over(mask, colour, base):
        return torch.where(mask[:, None], colour, base)
    def strands(x, colour=hair):
        turn, z, p = torch.atan2(x[:, 0], x[:, 1] - 0.05), x[:, 2], f.hair_seed
        grain = 0.2 * (31 * turn + 3 * (7 * z + p).sin()).sin() + 0.13 * (73 * turn + 5 * (5 * z + 2 * p).sin()).sin()
        curly = 0.35 * (x * 47 + 2 * (x.roll(1, 1) * 31 + p).sin()).sin().prod(-1) * (style in ("afro", "curls"))
        return colour * (1 + grain + curly + 0.12 * (9 * z + 4 * turn).sin())[:, None]
    def complexion(x):
        X, Y, Z = x[:, 0].abs(), x[:, 1], x[:, 2]
        blush = (-((X - 0.25) ** 2 + (Z - 0.02) ** 2) / 0.007).exp() * (Y < 0)
        blush = blush + (-(X ** 2 + (Z - 0.03) ** 2) / 0.004).exp() * (Y < -0.46)
        spots = ((X * 83).sin() * (Z * 91 + 3 * (X * 29).sin()).sin() > 0.8) & ((Z - 0.05).abs() < 0.08) & (f.freckles == "yes")
        colour = over(spots & (Y < -0.25), skin * 0.6, skin * (1 - 0.3 * blush[:, None] * torch.tensor([0, 1, 0.9])))
        if f.beard == "stubble":
            shadow = ((-0.02 - 0.35 * (X - 0.1).clamp(min=0) - Z) / 0.06).clamp(0, 1) * ((0.05 + 0.2 * Z - Y) / 0.1).clamp(0, 1)
            colour = torch.lerp(colour, hair * 0.6 + skin * 0.2, 0.55 * (shadow * ((Z + 0.4) / 0.06).clamp(0, 1))[:, None])
        s = (X / mouth).clamp(max=1) ** 2
        front, middle, taper = (Y < -0.2) & (s < 1), mouth_z + curve * (s - 0.4), (1 - s) ** 0.5
        upper, lower, full = middle + gape * taper, middle - gape * taper, 0.034 * f.lip_size * taper
        bow = 0.65 + 0.35 * (X / 0.03).clamp(max=1)
        colour = over(front & (upper + full * bow > Z) & (lower - full * 1.15 < Z), lips, colour)
        colour = over(front & (upper + 0.004 > Z) & (lower - 0.004 < Z), dark * 0.6 + lips * 0.08, colour)
        teeth = front & (upper - 0.002 > Z) & (middle - gape * taper * 0.55 < Z) & (f.expression in ("grin", "angry"))
        return over((Y < -0.4) & ((X - 0.028) ** 2 + (Z - nose_z + 0.037) ** 2 < 0.0002), skin * 0.3, over(teeth, white, colour))
    def gaze(x):
        X, Z = x[:, 0] - x[:, 0].sign() * (eye_x - 0.008), x[:, 2] - 0.18
        r = (X ** 2 + Z ** 2).sqrt() / f.eye_size
        rays = (0.9 + 12 * r) * (1 + 0.2 * (torch.atan2(X, Z) * 14).sin())
        colour = over(r < 0.040, iris * rays[:, None], over(r < 0.046, iris * 0.4, white))
        return over((X + 0.018) ** 2 + (Z - 0.02) ** 2 < 0.00013, torch.ones(3), over(r < 0.02, dark * 0.5, colour))
    def metal(x):
        return (dark * 0.6).expand_as(x)
    def gold(x):
        return rgb("e8c060").expand_as(x)
    def lash(x):
        return over((x[:, 2] < lid * e + 0.193) & (x[:, 1] < -0.4), dark * 0.7, complexion(x) * 0.9)
    def knit(x):
        turn, Z = torch.atan2(x[:, 0], 0.9 - x[:, 1]) * 38 * f.pattern_scale, x[:, 2] * 42 * f.pattern_scale
        cell = torch.stack([turn, Z], -1) / 5 - (torch.stack([turn, Z], -1) / 5).round()
        mask = {"plain": Z > 99, "stripes": Z.sin() > 0.3, "bars": turn.sin() > 0.3, "checks": (Z.sin() > 0) ^ (turn.sin() > 0),
                "dots": (cell ** 2).sum(-1) < 0.06, "zigzag": (Z + 4 * (turn * 0.7).sin().asin()).sin() > 0.3}[f.pattern]
        return over(mask, accent, cloth) * (1 + 0.05 * (x * 130).sin().prod(-1))[:, None]
    def torso(x):
        deep, wide = {"v": (0.24, 0.16), "scoop": (0.2, 0.27), "turtleneck": (0.02, 0.02)}.get(f.neckline, (0.08, 0.2))
        X, Z, power = x[:, 0].abs() / wide, (-0.5 - x[:, 2]) / deep, 1 if f.neckline == "v" else 2
        drop = X ** power + Z.abs() ** power * Z.sign() + (x[:, 1] > 0.1) * 9
        return over(drop < 1, skin, over(drop < 1.2, cloth * 0.7, knit(x)))
    # Head and eyes
    ear = {"turn": (0, 14, 18), "pair": True}
    eye = {"centre": (eye_x, -0.37, 0.18), "turn": (0, 0, 20), "pair": True}
    hollow = tuple(solid((s * (w + 0.055), 0.03, 0.14), (0.03, 0.04 * f.ear_size, 0.065 * f.ear_size),
                          (0, s * 14, s * 18)) for s in (1, -1))
    add(True, complexion, (0, 0.02, 0.22), (w, 0.47, top), keep=[(0, 0, -1, -0.22)], blend="skin")
    add(True, complexion, (0, 0.02, 0.22), (w, 0.47, low), keep=[(0, 0, 1, 0.22)], blend="skin")
    for shape in (((0, -0.08, mouth_z - 0.02), (jaw, 0.325, 0.25 * h)),            # jaw, chin, neck, tip and bridge of the nose
                  ((0, -0.29, 0.29 - low), (0.11 * f.chin, 0.09, 0.07)), ((0, 0.06, -0.42), (0.17 * f.neck_width, 0.17, 0.55)),
                  ((0, -0.485, nose_z), (0.056 * n, 0.06 * f.nose_length, 0.05)),
                  ((0, -0.455, nose_z + 0.07), (0.042 * n, 0.05, 0.13), (-14, 0, 0))):
        add(True, complexion, *shape, blend="skin")
    add(True, complexion, (0.05 * n, -0.455, nose_z - 0.008), (0.036 * n, 0.042, 0.034), pair=True, blend="skin")
    add(True, complexion, (w + 0.015, 0.06, 0.14), (0.04, 0.078 * f.ear_size, 0.115 * f.ear_size), holes=hollow, **ear)
    add(f.earrings == "yes", gold, (w + 0.03, 0.04, 0.14 - 0.13 * f.ear_size), (0.024,) * 3, pair=True)
    add(True, gaze, radii=(e, 0.07, e), **eye)
    add(True, lash, radii=(e * 1.1, 0.08, e * 1.1), keep=[(0, 0, -1, -0.18 - lid * e)], **eye)
    add(True, complexion, radii=(e * 1.07, 0.076, e * 1.07), keep=[(0, 0, 1, 0.18 - 0.6 * e)], **eye)
    add(True, strands, (eye_x * 1.05, abs(lift) * 0.02 - 0.41, 0.315 + lift), (0.095, 0.026, 0.017 * f.brow_size),
        (0, 4 - frown, 16), pair=True)
    # Hair: a cap with an opening for the face, and what the style adds
    brow = {"fringe": -0.03, "bob": -0.01}.get(style, 0.08)
    face = (solid(({"parted": 0.1}.get(style, 0), -0.56, brow), (w * 0.95, 0.47, 0.42 * h)),)
    edge = {"fringe": (0, -0.2, -1, 0.02), "bob": (0, 0, -1, 0.6), "long": (0, 0, -1, 0.6)}.get(style, (0, -0.6, -1, -0.2))
    add(style not in ("bald", "mohawk", "afro"), strands, (0, 0.05, 0.24), (w + 0.05, 0.5, top + 0.045), keep=[edge], holes=face)
    add(style == "bob", strands, (0, 0.1, 0.08), (w + 0.12, 0.47, 0.6), keep=[(0, 0, -1, 0.3), (0, -1, 0.25, 0.16)], holes=face)
    add(style == "long", strands, (0, 0.17, -0.1), (w + 0.07, 0.42, 0.75), keep=[(0, 0, -1, 0.8), (0, -1, 0, 0.02)])
    add(style == "long", strands, (w - 0.01, -0.06, -0.1), (0.09, 0.15, 0.5), (0, 4, 0), pair=True)
    add(style == "bun", strands, (0, 0.22, 0.78), (0.17, 0.17, 0.15))
    add(style == "ponytail", strands, (0, 0.62, 0.12), (0.13, 0.14, 0.42), (12, 0, 0))
    add(style == "pigtails", strands, (w + 0.2, 0.14, 0), (0.13, 0.13, 0.34), (0, -14, 0), pair=True)
    add(style == "mohawk", strands, (0, 0.1, 0.36), (0.07, 0.54, 0.53), holes=face)
    under = solid((0, -0.62, 0.05), (w, 0.56, 0.46)), solid((0, -0.2, -0.3), (0.6, 0.6, 0.3))
    add(style == "afro", strands, (0, 0.1, 0.33), (w + 0.2, 0.58, 0.58), holes=under)
    curls = {"curls": (44, 0, (0.115,) * 3), "spikes": (40, 0.01, (0.075, 0.075, 0.17)), "afro": (30, 0.04, (0.15,) * 3)}
    count, out, size = curls.get(style, (0, 0, 0))
    for k in range(count):                                                         # a spiral down from the crown
        turn, tilt = 2.4 * k + rng.uniform(-0.2, 0.2), 1.1 * math.acos(max(0.9875 - k / 40, -0.4))
        x, y, z = math.sin(tilt) * math.cos(turn), math.sin(tilt) * math.sin(turn), math.cos(tilt)
        add(y > -0.15 or z > 0.45, strands, (x * (w + 0.04 + out), 0.06 + y * (0.49 + out / 4), 0.26 + z * (top + 0.02 + out)),
            size, (0, math.degrees(tilt), math.degrees(turn)))
    # Beard and glasses
    add(f.beard == "full", strands, (0, -0.06, -0.12), (jaw + 0.095, 0.4, 0.36 * h),
        keep=[(0, 1, -0.3, 0.12), (0, -0.55, 1, 0.14)], holes=(solid((0, -0.45, mouth_z), (mouth + 0.02, 0.2, 0.075 + gape)),))
    add(f.beard == "goatee", strands, (0, -0.32, 0.25 - low), (0.105, 0.1, 0.1))
    add(f.beard in ("moustache", "full", "goatee"), strands, (0.065, -0.41, mouth_z + 0.062 + gape), (0.085, 0.04, 0.024),
        (0, 14, 14), pair=True)
    rims, square, worn = [], f.glasses != "round", f.glasses != "none"
    for s, r, thick in ((1, 0.13, 0.011), (1, 0.111, 0.05), (-1, 0.111, 0.05)):    # the outline, then both lens holes
        box = [(1, 0, 0, s * eye_x + r), (-1, 0, 0, r - s * eye_x), (0, 0, 1, 0.17 + r * 0.8), (0, 0, -1, r * 0.8 - 0.17)]
        rims.append(((s * eye_x, -0.49, 0.17), (r * (1 + 0.3 * square), 0.09, r * (1 + 0.2 * square)), (0, 0, 0),
                     [*box * square, (0, 1, 0, thick - 0.49), (0, -1, 0, thick + 0.49)]))
    add(worn, metal, *rims[0], pair=True, holes=tuple(solid(*rim) for rim in rims[1:]) * (f.glasses != "sunglasses"))
    add(worn, metal, ((eye_x + w + 0.15) / 2, -0.205, 0.2), (0.013, 0.3, 0.018),
        (0, 0, -math.degrees(math.atan2(w - eye_x - 0.09, 0.57))), pair=True)
    add(worn, metal, (0, -0.5, 0.19), (eye_x - 0.08, 0.014, 0.014))
    # Clothes
    bust = {"keep": [(0, 0, -1, 0.97)], "blend": "cloth"}
    add(True, torso, (0, 0.06, -1.0), (0.72 * f.shoulder_width, 0.34, 0.52), **bust)
    add(True, torso, (0.5 * f.shoulder_width, 0.06, -0.93), (0.31, 0.27, 0.3), pair=True, **bust)
    add(f.neckline == "turtleneck", knit, (0, 0.06, -0.5), (0.2 * f.neck_width, 0.2, 0.35),
        keep=[(0, 0, 1, -0.4), (0, 0, -1, 0.7)])
    add(f.neckline == "hood", knit, (0, 0.16, -0.5), (0.36, 0.3, 0.13), holes=(solid((0, 0, -0.38), (0.24, 0.28, 0.2)),))
    return parts


def look_from(azimuth, elevation, distance=DISTANCE):
    """Camera-to-world (4, 4) of a camera that looks at the origin. Degrees; azimuth 0 sees the face, 90 the avatar's left."""
    a, e = math.radians(azimuth), math.radians(elevation)
    right = torch.tensor([math.cos(a), math.sin(a), 0, 0])
    up = torch.tensor([-math.sin(a) * math.sin(e), math.cos(a) * math.sin(e), math.cos(e), 0])
    back = torch.tensor([math.sin(a) * math.cos(e), -math.cos(a) * math.cos(e), math.sin(e), 0])
    return torch.stack([right, up, back, distance * back + torch.tensor([0, 0, 0, 1])], -1)


def render_views(parts, c2w, size, fov=FOV):
    """Poses (V, 4, 4) -> straight-alpha RGBA (V, size, size, 4) in [0, 1], the mean of 2 x 2 rays a pixel."""
    ticks = ((torch.arange(2 * size) + 0.5) / size - 1) * math.tan(fov / 2)
    y, x = torch.meshgrid(-ticks, ticks, indexing="ij")
    directions = torch.nn.functional.normalize(torch.stack([x, y, -torch.ones_like(x)], -1).view(-1, 3), dim=-1)
    rays_d = (directions @ c2w[:, :3, :3].mT).view(-1, 3)
    colour, _, hit = trace(parts, c2w[:, :3, 3].repeat_interleave(len(directions), 0), rays_d)
    mean = torch.cat([colour, hit[:, None].float()], -1).view(-1, size, 2, size, 2, 4).mean((2, 4))
    return torch.cat([mean[..., :3] / mean[..., 3:].clamp(min=0.25), mean[..., 3:]], -1)


def write_avatar(folder, seed, index, size, views, held_out):
    """Avatar `index` of a seed: a folder with transforms_train.json, transforms_test.json and their pictures."""
    rng = random.Random(f"{seed} {index}")
    factors = draw_factors(rng)
    parts, focal = build(factors), 0.5 * size / math.tan(FOV / 2)
    camera = {"camera_angle_x": FOV, "w": size, "h": size, "fl_x": focal, "fl_y": focal, "cx": size / 2, "cy": size / 2,
              "aabb": [[-1] * 3, [1] * 3], "factors": factors}
    low, high = math.sin(math.radians(-20)), math.sin(math.radians(45))
    for split, count in (("train", views), ("test", held_out)):
        (folder / split).mkdir(parents=True)
        start = rng.uniform(0, 360)                                                # a golden-angle spiral, even over the band
        heights = [math.asin(low + (high - low) * (k + rng.random()) / count) for k in range(count)]
        poses = [look_from(start + 137.508 * k, math.degrees(height)) for k, height in enumerate(heights)]
        if split == "train":
            poses[0] = look_from(0, 2)                                             # the portrait
        names = [f"{split}/r_{k:03d}.png" for k in range(count)]
        batch = max(1, 2 ** 15 // size ** 2)
        for i in range(0, count, batch):
            for name, image in zip(names[i:], render_views(parts, torch.stack(poses[i:i + batch]), size)):
                Image.fromarray((image * 255).round().byte().numpy()).save(folder / name)
        frames = [{"file_path": name, "transform_matrix": pose.tolist()} for name, pose in zip(names, poses)]
        (folder / f"transforms_{split}.json").write_text(json.dumps({**camera, "frames": frames}, indent=1))


def stop(message):
    print(f"avatars.py: {message}", file=sys.stderr)
    raise SystemExit(2)


@torch.no_grad()
def main(args):
    torch.set_num_threads(1)                                                       # small tensors: more threads are slower
    given = args.count, args.size, args.views, args.held_out
    count, size, views, held_out = (default if value is None else value for value, default in zip(given, PRESETS[args.preset]))
    for name, value, least in (("count", count, 1), ("size", size, 8), ("views", views, 1), ("held-out", held_out, 0)):
        if value < least:
            stop(f"--{name} must be at least {least}, not {value}")
    try:
        Path(args.data).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--data {args.data} cannot be a folder: {error.strerror}")
    for index in tqdm(range(count), unit="avatar"):
        folder, draft = (Path(args.data) / f"{prefix}avatar_{index:04d}" for prefix in ("", ".tmp-"))
        if not folder.exists():
            shutil.rmtree(draft, ignore_errors=True)
            write_avatar(draft, args.seed, index, size, views, held_out)
            draft.rename(folder)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sets the next four")
    for name, text in {"count": "avatars", "size": "pixels a side", "views": "training views", "held-out": "test views"}.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="data", help="where the avatars go; those that are there are kept")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
