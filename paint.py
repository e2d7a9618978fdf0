"""Colours that words name are painted onto an avatar, where the networks do not know them.

The vectors of rodin.py say who somebody is, and of colours what training has shown together: it has
shown no short blonde hair. So what words say of the colours of hair and clothes is done to the
avatar itself. It is drawn from all around; pixels that are hair or clothes, by their place and
their colour, are moved to the colour that was named, light and dark as they were; and the planes
are changed until the points that make these pixels have the colours so moved.

    planes -> Seen from all around -> Palette of the front -> shifts -> planes

Colours (.., 3) are in 0..1, angles are in degrees. Letters as in rodinhd.py.
"""
from typing import NamedTuple

import torch

import captions
import frozen
import likeness
import rodinhd as rh

# Named colours ------------------------------------------------------------------------------------
# What is painted for a name, such that captions.hair_name and captions.colour_name find it again.
HAIR = {
    'black': (0.09, 0.08, 0.08), 'brown': (0.36, 0.23, 0.14), 'blonde': (0.88, 0.71, 0.36),
    'red': (0.62, 0.24, 0.10), 'grey': (0.56, 0.56, 0.57), 'white': (0.88, 0.88, 0.88),
    'blue': (0.20, 0.30, 0.75), 'green': (0.20, 0.55, 0.25), 'purple': (0.45, 0.20, 0.60),
    'pink': (0.90, 0.50, 0.65),
}
CLOTHES = {
    'black': (0.08, 0.08, 0.09), 'white': (0.92, 0.92, 0.92), 'grey': (0.50, 0.50, 0.50),
    'brown': (0.38, 0.25, 0.15), 'red': (0.72, 0.10, 0.10), 'orange': (0.90, 0.48, 0.10),
    'yellow': (0.88, 0.80, 0.22), 'green': (0.15, 0.50, 0.20), 'turquoise': (0.10, 0.65, 0.65),
    'blue': (0.15, 0.30, 0.75), 'purple': (0.45, 0.20, 0.60), 'pink': (0.93, 0.50, 0.65),
}
SHADES = {'dark': (0.0, 0.4), 'light': (1.0, 0.55)}  # mixed with black or white, by this share


def colour_of(facts, factor, skin=None):
    """The colour (3,) that facts name of a factor, 'hair' or 'clothes'; None where they do not.
    What is left of hair on who is to be bald gets the colour of `skin`."""
    if factor == 'hair' and facts.get('length') == 'bald':
        return skin
    table = {'hair': HAIR, 'clothes': CLOTHES}[factor]
    if facts.get(factor) not in table:
        return None
    colour = torch.tensor(table[facts[factor]])
    if factor == 'clothes' and facts.get('shade') in SHADES:
        ground, share = SHADES[facts['shade']]
        colour = torch.lerp(colour, torch.tensor(ground), share)
    return colour


PAINTED = {'hair', 'clothes', 'shade'}  # factors of which painting is enough


def before_painting(facts):
    """Facts whose hair is black: training has seen it with every length, and it is easily told
    from skin and clothes, whatever colour it gets afterwards."""
    return facts | {'hair': 'black'} if 'hair' in facts else facts


# Views --------------------------------------------------------------------------------------------
SIDE = 96  # pixels a side
ANGLES = [likeness.FRONT, (65, 20), (130, 5), (180, 30), (-130, 5), (-65, 20)]


class Seen(NamedTuple):
    """An avatar from one side: of its N pixels, and of the S samples that make them."""
    colour: torch.Tensor  # (N, 3), without the white behind
    opacity: torch.Tensor  # (N,)
    place: torch.Tensor  # (N, 3), the mean point
    points: torch.Tensor  # (S, 3)
    dirs: torch.Tensor  # (S, 3), from where they are looked at
    weights: torch.Tensor  # (S,), of each in its pixel
    pixel: torch.Tensor  # (S,), its number


@torch.no_grad()
def look(field, angles, steps):
    """Looks at a Frozen from (azimuth, elevation), with so many samples a ray -> Seen."""
    device = field.planes.device
    intrinsics = rh.intrinsics_of(rh.PORTRAIT_FOV, SIDE).to(device)
    rays_o, rays_d = rh.view_rays(rh.orbit_pose(*angles).to(device), intrinsics, SIDE, SIDE)
    seen = rh.render(field, rays_o, rays_d, steps, field.grid)
    opacity = seen.opacity[:, None]
    solid = opacity.clamp(min=0.02)
    colour = ((seen.rgb - 1 + opacity) / solid).clamp(0, 1)
    place = rays_o + seen.depth[:, None] / solid * rays_d
    dirs = rays_d[seen.ray_index]
    points = (rays_o[seen.ray_index] + seen.t[:, None] * dirs).clamp(-1, 1)
    return Seen(colour, seen.opacity, place, points, dirs, seen.weights, seen.ray_index)


def as_picture(seen):
    """A Seen as captions.py takes portraits: (P, P, 4) in numpy."""
    rgba = torch.cat([seen.colour, seen.opacity[:, None]], dim=1)
    return rgba.view(SIDE, SIDE, 4).double().cpu().numpy()


# Hair and clothes ---------------------------------------------------------------------------------
class Palette(NamedTuple):
    """The colours of an avatar, each (3,), and whether its hair falls below the neck."""
    hair: torch.Tensor
    skin: torch.Tensor
    clothes: torch.Tensor
    falls: bool


def palette_of(front):
    """The Palette of a front view, a Seen; None where it shows no head and shoulders."""
    picture = as_picture(front)
    length = captions.seen_length(picture)
    hair = captions.hair_colour(picture, length)
    skin = captions.skin_colour(picture)
    clothes = captions.clothes_colour(picture)
    if hair is None or skin is None or clothes is None:
        return None
    found = (torch.tensor(x, dtype=torch.float32) for x in (hair, skin, clothes))
    return Palette(*found, length in ('long', 'big'))


def ramp(x, width):
    """0 below, 1 above zero, over +- width."""
    return (x / (2 * width) + 0.5).clamp(0, 1)


def rather(colours, this, that):
    """How much nearer colours (N, 3) are to one colour (3,) than to another, in 0..1."""
    apart = (this - that).norm().clamp(min=0.05)
    nearer = (colours - that).norm(dim=1) - (colours - this).norm(dim=1)
    return (1.2 * nearer / apart + 0.5).clamp(0, 1)


# Where portraits are framed as those of weights/ (docs/data.md)
NECK = 0.05  # how high it is
FALLS = 0.5  # how far below it long hair falls
FACE = (0.0, 0.35)  # x and z of the middle of brows, eyes and mouth, which are not hair,
FACE_SIZE = (0.23, 0.28)  # and half of their width and height


def face_of(seen):
    """How much each pixel of a Seen is the face, (N,) in 0..1."""
    x, y, z = seen.place.unbind(1)
    oval = ((x - FACE[0]) / FACE_SIZE[0]) ** 2 + ((z - FACE[1]) / FACE_SIZE[1]) ** 2
    return ramp(1 - oval, 0.2) * ramp(-y, 0.1)


def hair_and_clothes(seen, palette):
    """How much each pixel of a Seen is hair, and is clothes, (N,) in 0..1."""
    z = seen.place[:, 2]
    below = ramp(NECK - z, 0.04)
    hair = rather(seen.colour, palette.hair, palette.skin) * (1 - face_of(seen))
    if palette.falls:
        on_clothes = rather(seen.colour, palette.hair, palette.clothes)
        on_clothes = on_clothes * ramp(z - NECK + FALLS, 0.1)
        hair = hair * torch.lerp(torch.ones_like(below), on_clothes, below)
    else:
        hair = hair * (1 - below)
    clothes = rather(seen.colour, palette.clothes, palette.skin) * below * (1 - hair)
    return hair, clothes


def parts_of(seen, palette, facts):
    """The parts of a Seen whose colour facts name: {factor: how much each pixel is of it, (N,)}."""
    shares = dict(zip(('hair', 'clothes'), hair_and_clothes(seen, palette)))
    named = {factor: colour_of(facts, factor, palette.skin) for factor in shares}
    return {factor: x for factor, x in shares.items() if named[factor] is not None}


# Planes -------------------------------------------------------------------------------------------
STEPS = 120  # of which the first half looks at features
POINTS = 4096  # a step, half of them where colours change
FACES = 4  # times as often as others, points of faces are among the rest, which shall stay
RATE = 3e-2  # of learning; it falls to a tenth
GUESSES = 4096  # features that are tried


class Part(NamedTuple):
    """Of S samples, how much each is of what gets another colour, and what it gets."""
    share: torch.Tensor  # (S,)
    colour: torch.Tensor  # (3,), that is added
    features: torch.Tensor  # (C,), that are added


def features_for(colour, usual, dirs, decoder, generator):
    """Features (C,) that a decoder sees as a colour (3,) from dirs (N, 3), of the density that the
    `usual` features (C,) have: the best of many guesses around these."""
    density = len(usual) // 4
    spread = torch.rand(GUESSES, 1, generator=generator)
    guesses = torch.randn(GUESSES, len(usual) - density, generator=generator) * spread
    guesses = (usual[:-density] + guesses.to(usual)).clamp(-1, 1)
    guesses = torch.cat([guesses, usual[-density:].expand(GUESSES, density)], dim=1)
    wrong = 0
    for direction in dirs:
        rgb = decoder(guesses, direction.expand(GUESSES, 3))[1]
        wrong = wrong + (rgb - colour).square().sum(1)
    return guesses[wrong.argmin()]


@torch.no_grad()
def part_of(share, colour, shown, views, features, weights, decoder, generator):
    """The Part that `share` (S,) is, whose colour is now `shown` (3,) and shall be another one."""
    colour, shown = colour.to(share), shown.to(share)
    counts = weights * share
    usual = (features * counts[:, None]).sum(0) / counts.sum().clamp(min=1e-6)
    dirs = torch.stack([view.dirs.mean(0) for view in views])
    other = features_for(colour, usual, dirs, decoder, generator)
    return Part(share, colour - shown, other - usual)


class Wanted(NamedTuple):
    """The S samples that make an avatar's views, and what they shall have."""
    points: torch.Tensor  # (S, 3)
    dirs: torch.Tensor  # (S, 3), from where they are looked at
    features: torch.Tensor  # (S, C)
    colours: torch.Tensor  # (S, 3)
    chance: torch.Tensor  # (S,), of being looked at in a step


def wanted_of(planes, decoder, facts, generator):
    """What planes (3, C, R, R) shall have where facts name a colour -> Wanted; None where they
    show no head and shoulders."""
    field = frozen.freeze(planes, decoder)
    views = [look(field, angles, decoder.config.steps // 2) for angles in ANGLES]
    palette = palette_of(views[0])
    if palette is None:
        return None

    points, dirs, weights = (torch.cat([getattr(v, x) for v in views])
                             for x in ('points', 'dirs', 'weights'))
    with torch.no_grad():
        features = rh.sample_planes(planes, points)
        colours = decoder(features, dirs)[1]
    shares = [parts_of(view, palette, facts) for view in views]
    change = torch.zeros_like(weights)
    for factor in shares[0]:
        share = torch.cat([x[factor][view.pixel] for x, view in zip(shares, views)])
        named, shown = colour_of(facts, factor, palette.skin), getattr(palette, factor)
        part = part_of(share, named, shown, views, features, weights, decoder, generator)
        features = features + share[:, None] * part.features
        colours = colours + share[:, None] * part.colour
        change = change + share * part.colour.norm()

    # Half of the points are where colours change; of the others, faces are looked at more often
    face = torch.cat([face_of(view)[view.pixel] for view in views])
    chance = torch.stack([weights * (1 + FACES * face), weights * change])
    chance = (chance / chance.sum(1, keepdim=True).clamp(min=1e-6)).mean(0)
    return Wanted(points, dirs, features, colours.clamp(0, 1), chance.cpu())


def recoloured(planes, decoder, facts, seed=0):
    """Planes (3, C, R, R) whose hair and clothes have the colours that facts name.

    From black to white a decoder has no straight way: descending on colours ends in blue. So the
    first half of the steps descends on features, of which others are known that give the colour.
    """
    if not facts.keys() & PAINTED and facts.get('length') != 'bald':
        return planes
    generator = torch.Generator().manual_seed(seed)
    wanted = wanted_of(planes, decoder, facts, generator)
    if wanted is None:
        return planes

    density = planes.shape[1] // 4
    corrections = likeness.new_corrections(planes[:, :-density], front_alone=False)
    adam = likeness.Adam(corrections)

    def changed():
        of_colour = likeness.corrected(planes[:, :-density], corrections)
        return torch.cat([of_colour, planes[:, -density:]], dim=1)

    for step in range(STEPS):
        pick = torch.multinomial(wanted.chance, POINTS, replacement=True, generator=generator)
        found = rh.sample_planes(changed(), wanted.points[pick])
        if step < STEPS // 2:
            loss = (found - wanted.features[pick]).square().mean()
        else:
            colours = decoder(found, wanted.dirs[pick])[1]
            loss = (colours - wanted.colours[pick]).square().mean()
        adam.step(torch.autograd.grad(loss, corrections), RATE * 0.1 ** (step / STEPS))
    return changed().detach()


def recoloured_all(planes, models, facts):
    """recoloured for planes (B, 3, C, R, R), by the decoder of models."""
    return torch.stack([recoloured(one, models['decoder'], facts) for one in planes])
