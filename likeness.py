"""Likeness: a sampled avatar is fitted to its portrait, which neither paper does.

What a model gets wrong that is small, or knows few people, the portrait still shows. `straighten`
looks for the person of a first sample in the portrait, which may be shifted, scaled, or on any
ground. It puts the person on white and moves it to where training portraits have it; sampling
starts from that. `fit_to_portrait` descends on the planes until their front view is that image,
coarse corrections first: what a portrait shows of clothes, skin, hair and outline then holds from
all sides.

    portrait -> straighten -> Seen -> rh.generate -> fit_to_portrait -> planes        `avatars_of`

Further photographs, of which is known from about where they were taken, are found on the avatar so
far (`find_views`); then it is sampled anew towards all of them, and fitted to all of them.

The chapters: 1 the ground behind a person, 2 the place of a person, 3 straightening, 4 fitting,
5 sampling towards the portrait, 6 further photographs.
Images are in [-1, 1] in portraits and in Seen, and in 0..1 wherever else they appear.
"""
import functools
import importlib.util
import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

import frozen
import rodinhd as rh

FRONT = (0, 2)  # azimuth and elevation of the camera of portraits, degrees: see rh.portrait_camera


class Seen(NamedTuple):
    """Portraits as training had them; of a single one, the same without B."""

    images: torch.Tensor  # (B, 3, P, P) in [-1, 1], on white
    alpha: torch.Tensor  # (B, 1, P, P) in 0..1, whose pixels are the person's
    known: torch.Tensor  # (B, 1, P, P) in 0..1, what is to be believed of both


class View(NamedTuple):
    """A further photograph of a person."""

    seen: Seen  # of a single one
    angles: tuple = FRONT  # azimuth and elevation of the camera, degrees


class Cutout(NamedTuple):
    """A person without the ground."""

    image: torch.Tensor  # (3, P, P) in 0..1, on white
    alpha: torch.Tensor  # (1, P, P) in 0..1


class Front(NamedTuple):
    """An avatar as a portrait would show it."""

    view: torch.Tensor  # (3, P, P) in 0..1, on white
    opacity: torch.Tensor  # (1, P, P)


# 1 The ground behind a person ---------------------------------------------------------------------
# A ground of one colour is known by the image's border, and what differs from it is the person.
# On any other ground GrabCut separates them, started from where a sampled avatar is.
def flat_ground(image):
    """Returns the colour (3,) that most of the left, right and upper border of an image
    (3, P, P) in 0..1 has, or None where there is none."""
    m = max(image.shape[1] // 32, 1)  # the border's width
    sides = (image[:, :m], image[:, :, :m], image[:, :, -m:])
    border = torch.cat([side.flatten(1) for side in sides], dim=1)

    colour = border.median(dim=1)[0]
    alike = (border - colour[:, None]).abs().amax(0) < 0.03
    if alike.float().mean() > 0.8:
        return colour
    return None


def is_white(ground):
    """Whether a ground, a colour (3,) or None, is white."""
    return ground is not None and bool(ground.min() > 0.99)


def person_before(image, ground):
    """Finds the person in an image (3, P, P) in 0..1: its pixels (P, P), save those of the
    ground's colour (3,) that are joined to the left, right or upper border."""
    person = (image - ground.view(3, 1, 1)).abs().amax(0) > 0.04

    # Holes are filled within a frame of ground, but for the lower side: a bust goes on below.
    framed = F.pad(person, (1, 1, 1, 0))
    framed = F.pad(framed, (0, 0, 0, 1), value=True).cpu().numpy()
    filled = ndimage.binary_fill_holes(framed)[1:-1, 1:-1]
    return torch.from_numpy(filled).to(image.device)


def person_near(image, opacity, usual, reach=21):
    """Finds the person in an image (3, P, P) in 0..1 on any ground with GrabCut (Rother et al.
    2004), which starts from an avatar's opacity (P, P): the person's outline is taken to be no
    further from the avatar's than reach / 512 of the width. Returns pixels (P, P), or None where
    OpenCV is not installed.

    Only what is also opaque in `usual` (P, P), the opacity of a usual avatar, counts as certain:
    a ground may look like hair.
    """
    if not importlib.util.find_spec('cv2'):
        return None
    import cv2

    # What is deep inside the avatar is the person, what is far outside is not.
    diameter = reach * len(opacity) // 256 | 1  # odd
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter))
    certain = ((opacity > 0.9) & (usual > 0.9)).byte().cpu().numpy()
    possible = (opacity > 0.1).byte().cpu().numpy()
    likely = opacity.cpu().numpy() > 0.5
    mask = np.where(likely, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    mask[cv2.erode(certain, disc) > 0] = cv2.GC_FGD
    mask[cv2.dilate(possible, disc) == 0] = cv2.GC_BGD

    # GC_FGD and GC_PR_FGD are odd, the others even. GrabCut needs some of both.
    person = (mask & 1) > 0
    if not person.any() or person.all():
        return opacity > 0.5

    cv2.setRNGSeed(0)
    pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(pixels, mask, None, *models, 5, cv2.GC_INIT_WITH_MASK)
    person = (mask & 1) > 0
    if not person.any():
        return opacity > 0.5
    return torch.from_numpy(person).to(image.device)


def without_specks(person):
    """Drops from the pixels (P, P) of a person the pieces of less than a fiftieth of the image,
    which are the ground's."""
    labels, _ = ndimage.label(person.cpu().numpy(), np.ones((3, 3)))
    large = np.bincount(labels.ravel()) >= labels.size / 50
    return person & torch.from_numpy(large[labels]).to(person.device)


def onto_white(image, person, ground=None):
    """Puts the pixels `person` (P, P) of an image (3, P, P) in 0..1 on white -> Cutout.

    Pixels at the rim are mixed with the ground: they take the colour of those further in. Their
    alpha is the share of that colour which explains them best before the ground (3,) or, where
    that is None, the share of person around them. On a white ground the person's pixels stay as
    they are.
    """
    person = person.float()[None, None]
    near = F.max_pool2d(person, 3, 1, 1)[0]  # (1, P, P), the person and its rim
    wide = F.pad(person, (2, 2, 2, 2), mode='replicate')
    inner = -F.max_pool2d(-wide, 5, 1)  # (1, 1, P, P), the person without its rim

    # The person's own colour: at the rim, the mean of the inner pixels near by.
    total = F.avg_pool2d(image * inner, 9, 1, 4)
    weight = F.avg_pool2d(inner, 9, 1, 4)
    mean = total / weight.clamp(min=1e-6)
    own = torch.where((weight > 0) & (inner == 0), mean, image)[0]

    if ground is None:
        wide = F.pad(person, (1, 1, 1, 1), mode='replicate')
        share = F.avg_pool2d(wide, 3, 1)[0]
    else:
        # Least squares for image = share * own + (1 - share) * colour.
        colour = ground.view(3, 1, 1)
        contrast = own - colour
        share = ((image - colour) * contrast).sum(0)
        share = share / contrast.square().sum(0).clamp(min=1e-3)
        share = share.clamp(0, 1) * near
    alpha = torch.where(inner[0] > 0, 1.0, share)

    if is_white(ground):
        white = torch.where(near > 0, image, 1.0)
    else:
        white = (alpha * own + 1 - alpha).clamp(0, 1)
    return Cutout(white, alpha)


# 2 The place of a person --------------------------------------------------------------------------
# A place is a scale and shifts x, y in image widths: what batches.place does to a portrait. The
# search costs many places at once, coarsely at first and then finer around the best.
SCALES = (0.88, 1.12)  # where `register` looks
SHIFTS = (-0.06, 0.06)
CONTRAST = 0.3  # weight of the contrast at the avatar's edge, on any ground
FULL_CONTRAST = 0.05  # a squared error that counts as contrast in full
COLOURS = 2.0  # weight of colours beside outlines, on white
LEAST_GAIN = 1.2  # a move must make the cost this many times smaller


def move(images, scale, x, y, padding='border'):
    """Returns images (B, C, P, P) as they were before batches.place shrank them by scale (B,)
    and shifted them by x, y (B,), in image widths."""
    to_x = torch.stack([1 / scale, 0 * x, -2 * x / scale], dim=1)
    to_y = torch.stack([0 * y, 1 / scale, -2 * y / scale], dim=1)
    theta = torch.stack([to_x, to_y], dim=1)  # (B, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def cost_on_white(view, opacity, moved, moved_alpha):
    """Costs (N,) of N moved images (N, 3, S, S) with their alphas (N, 1, S, S), beside a view
    (1, 3, S, S), on black, of opacity (1, 1, S, S): outlines, and colours where both are."""
    both = opacity * moved_alpha
    colours = (both * (view + 1 - opacity - moved).square()).mean(1).sum((1, 2))
    colours = colours / both.sum((1, 2, 3)).clamp(min=1)
    outlines = (moved_alpha - opacity).abs().mean((1, 2, 3))
    return outlines + COLOURS * colours


def cost_on_any_ground(view, opacity, moved):
    """Costs (N,) as cost_on_white gives them where no outline is known: colours inside the
    avatar, and contrast just beyond its edge, lest it shrink."""
    inside = (view - opacity * moved).square().mean(1).sum((1, 2))
    inside = inside / opacity.sum().clamp(min=1)

    # In a ring around the avatar the image should differ from the avatar's colour near by.
    near = F.avg_pool2d(opacity, 5, stride=1, padding=2)
    beyond = F.avg_pool2d(view, 5, stride=1, padding=2) / near.clamp(min=1e-6)
    ring = (near > 0) & (opacity < 0.1)
    contrast = (beyond - moved).square().mean(1).clamp(max=FULL_CONTRAST) * ring[:, 0]
    contrast = contrast.sum((1, 2)) / ring.sum().clamp(min=1)
    return inside + CONTRAST * (FULL_CONTRAST - contrast)


def cost_of(places, size, view, opacity, image, alpha):
    """Costs (N,) of places (3, N), measured on images of `size` pixels a side; the others are as
    in `register`."""

    def small(x):
        return F.interpolate(x[None], size=size, mode='area')

    def moved(x):
        return move(small(x).expand(places.shape[1], -1, -1, -1), *places)

    black = small(view - (1 - opacity))
    if alpha is None:
        return cost_on_any_ground(black, small(opacity), moved(image))
    return cost_on_white(black, small(opacity), moved(image), moved(alpha))


def register(view, opacity, image, alpha=None, size=64, least_gain=LEAST_GAIN):
    """Finds what `move` needs to bring an image to an avatar's view: scale, x and y, (3, 1).

    view, image (3, P, P), opacity (1, P, P) and alpha are in 0..1. The image is on white where
    its alpha (1, P, P) is given, and on any ground where it is None. The search goes over images
    of size / 2 pixels a side, then of `size` and of twice that. Returns None where the image as it
    is costs less than `least_gain` times as much as the best, and where no avatar is to be seen.
    """
    if opacity.max() < 0.5:
        return None
    shown = (view, opacity, image, alpha)

    def axis(first, last, count):
        return torch.linspace(first, last, count, device=image.device)

    def best(side, *axes):
        lattice = torch.meshgrid(*axes, indexing='ij')
        places = torch.stack([values.flatten() for values in lattice])  # (3, N)
        costs = cost_of(places, side, *shown)
        return places[:, costs.argmin()], costs.min()

    shifts = axis(*SHIFTS, 13)
    place, least = best(size // 2, axis(*SCALES, 13), shifts, shifts)
    for factor, span, count in ((1, 0.03, 9), (2, 0.005, 7)):  # finer, around the best
        around = axis(-span, span, count)
        scale, x, y = place
        place, least = best(
            factor * size, scale + around, x + around / 2, y + around / 2
        )

    still = torch.tensor([[1.0], [0.0], [0.0]], device=image.device)
    if cost_of(still, 2 * size, *shown) < least_gain * least:
        return None
    return place[:, None]


# 3 Straightening ----------------------------------------------------------------------------------
# A first sample says about where the person is and how it looks: enough to separate it from the
# ground and to find its place. A second sample, of the portrait found so, makes both more exact.
SURE_GAIN = 1.7  # LEAST_GAIN where the portrait may well be in its place already
REACHES = (21, 11)  # of person_near, one after the other


@torch.autocast('cpu', enabled=False)
@torch.autocast('cuda', enabled=False)
def front_view(planes, decoder, P):
    """Renders an avatar's planes (3, C, R, R) as a portrait of P pixels a side -> Front."""
    return view_from(frozen.freeze(planes.float(), decoder), FRONT, P)


def view_from(field, angles, P):
    """Renders a Frozen as a portrait from azimuth and elevation, in degrees -> Front."""
    device = field.planes.device
    _, intrinsics = rh.portrait_camera(P, device)
    pose = rh.orbit_pose(*angles).to(device)
    picture = frozen.render_view(field, pose, intrinsics, P, P)
    return Front(picture.rgb.permute(2, 0, 1), picture.opacity[None])


class Found(NamedTuple):
    """A person that was found in a portrait."""

    cutout: Cutout
    believed: torch.Tensor  # (1, P, P) in 0..1, what is to be believed of the cutout
    place: torch.Tensor | None  # (3, 1), for `move`; None: it is in its place


def find_in_photograph(front, usual, photograph):
    """Finds the person of a Front in a photograph (3, P, P) in 0..1 on any ground -> Found;
    usual() gives the opacity (1, P, P) of a usual avatar; None: it is as this one's."""
    believed = torch.ones_like(front.opacity)
    place = register(*front, photograph)

    for reach in REACHES:  # the second time it is known better where the person is
        certain = usual() if usual else front.opacity
        avatars = torch.cat([front.opacity, certain])  # (2, P, P)
        if place is not None:  # moved to where the photograph has the person
            scale, *shift = place
            back = (-distance / scale for distance in shift)
            avatars = move(avatars[None], 1 / scale, *back, padding='zeros')[0]

        person = person_near(photograph, *avatars, reach)
        if person is None:  # without OpenCV: the avatar's outline has to do
            alpha = avatars[:1]
            white = torch.lerp(torch.ones_like(photograph), photograph, alpha)
            return Found(Cutout(white, alpha), alpha, place)
        cutout = onto_white(photograph, without_specks(person))
        place = register(*front, *cutout)
    return Found(cutout, believed, place)


def find_person(front, usual, image, alpha):
    """Finds the person of a Front in a portrait (3, P, P) in 0..1 -> Found. The portrait is on
    white where its alpha (1, P, P) is below 1, else on a flat ground or on any."""
    ground = flat_ground(image)
    has_alpha = bool(alpha.min() < 0.5)
    if not has_alpha and ground is None:
        return find_in_photograph(front, usual, image)

    if has_alpha:
        cutout = Cutout(image, alpha)
    else:
        cutout = onto_white(image, without_specks(person_before(image, ground)), ground)
    least_gain = SURE_GAIN if has_alpha or is_white(ground) else LEAST_GAIN
    place = register(*front, *cutout, least_gain=least_gain)
    return Found(cutout, torch.ones_like(alpha), place)


def gone_on(image, known):
    """An image (3, P, P) that goes on, where `known` (1, P, P) is not 1, as it is in the nearest
    pixel where it is: so training cuts portraits off (batches.cut_off)."""
    beyond = (known[0] <= 0.99).cpu().numpy()
    if beyond.all() or not beyond.any():
        return image
    _, nearest = ndimage.distance_transform_edt(beyond, return_indices=True)
    rows, columns = torch.from_numpy(nearest).to(image.device)
    return image[:, rows.long(), columns.long()]


@torch.autocast('cpu', enabled=False)
@torch.autocast('cuda', enabled=False)
def straighten_one(view, opacity, usual, image, alpha, known=None):
    """Does `straighten` for one portrait (3, P, P) in [-1, 1] of alpha and known (1, P, P) -> Seen,
    by the `front_view` of a sample; usual: see find_in_photograph."""
    found = find_person(Front(view, opacity), usual, (image + 1) / 2, alpha)
    white, person = found.cutout
    believed = found.believed
    if known is None:
        known = torch.ones_like(alpha)
    if person.max() < 0.5:  # nobody is there
        believed = torch.zeros_like(person)

    # Beyond the portrait's edge nothing is known: there the picture goes on as it was at the edge.
    if found.place is not None:
        white = move(white[None], *found.place)[0]
        layers = torch.stack([person, believed, known])
        person, believed, known = (
            move(layer[None], *found.place, padding='zeros')[0] for layer in layers
        )
    white = gone_on(white, known)
    return Seen(white * 2 - 1, person, believed * (known > 0.99))


SAME = 1e-3  # mean difference of images in [-1, 1] that show the same


def straighten(models, images, alpha=None, known=None, **how):
    """Shows portraits as training had them: on white, each person in its place -> Seen.

    images (B, 3, P, P) are in [-1, 1], on white where they have alpha (B, 1, P, P) below 1; known
    (B, 1, P, P) in 0..1 is 0 where they show nothing (photo.Aligned). The persons are found with
    the avatars of a first sample, of the base model alone, and then with those of a second one, of
    what was found first. how: see rh.generate.
    """
    decoder = models['decoder']
    prior = getattr(models['base'], 'prior', None)
    device = next(decoder.parameters()).device
    P = images.shape[-1]
    if alpha is None:
        alpha = torch.ones(len(images), 1, P, P)
    if known is None:
        known = torch.ones(len(images), 1, P, P)
    images = images.to(device)
    alpha = alpha.to(device)
    known = known.to(device)

    @functools.cache
    def usual():  # a network without a prior (see shortcuts.py) knows no mean avatar
        if prior is None:
            return torch.ones(1, P, P, device=device)
        mean = rh.resize_planes(prior.mean[0], decoder.config.resolution)
        return front_view(mean, decoder, P).opacity

    shown = torch.stack([gone_on(*one) for one in zip(images, known)])
    for _ in range(2):
        avatars = rh.generate(models, shown, quick=True, **how)
        parts = []
        for planes, *portrait in zip(avatars.planes, images, alpha, known):
            front = front_view(planes, decoder, P)
            parts.append(straighten_one(*front, usual, *portrait))
        seen = Seen(*map(torch.stack, zip(*parts)))

        if (seen.images - shown).abs().mean() < SAME:  # they are as they were
            break
        shown = seen.images
    return seen


# 4 Fitting ----------------------------------------------------------------------------------------
# The planes are corrected by gradient descent on the error of their front view. The corrections
# are planes of several resolutions, so that the coarse ones, which reach what no pixel shows,
# are found as fast as the fine ones.
LEVELS = (16, 8, 4, 2, 1)  # corrections are planes of R/16 ... R texels a side
COARSE = 16  # texels a side: what is finer is corrected on the plane that the front shows
XZ = rh.AXES.index((0, 2))
RAYS = 768  # a step,
WHERE_WRONG = 0.5  # a share of which is drawn where the sample differs from the portrait
COARSE_STEPS = 0.6  # the first steps, whose rays have half as many samples
LEARNING_RATE = 1e-2  # it falls to a tenth
POINTS = 4096  # of every other step, that must stay empty
WEIGHT_EMPTY = 0.1  # of the log density there,
SOLID = 5.0  # at a distance from cells of this density
AWAY = 1.5  # of so many cells; it grows with the distance
POINTS_SAMPLED = 8192  # points of the sample, of which those that no photograph shows are held
DARK = 0.1  # no photograph shows what this share of the light does not reach
HELD = 2048  # points that stay as they are, of every other step
WEIGHT_COLOUR = 0.5  # of the colours there,
WEIGHT_DENSITY = 1e-2  # and of the log density
GRID_EVERY = 20  # steps
EMPTY_EVERY = 2


def new_corrections(planes, levels=LEVELS, front_alone=True):
    """Zeros (3, C, r, r) for each level of planes (3, C, R, R), to be optimised.

    With front_alone those of more than COARSE texels a side are (1, C, r, r), of the xz plane:
    texels of the others would leave rows and columns of streaks, which show from aside; even where
    two or three photographs are given, which leave much unseen (0.7 dB worse with two).
    """
    C, R = planes.shape[1:3]
    corrections = []
    for level in levels:
        r = max(R // level, 2)
        count = 1 if front_alone and r > COARSE else len(planes)
        correction = torch.zeros(count, C, r, r, device=planes.device, requires_grad=True)
        corrections.append(correction)
    return corrections


def summed(corrections):
    """The sum of corrections (n, C, r, r) at the size of the last, from coarse to fine."""
    total = corrections[0]
    for correction in corrections[1:]:
        total = rh.resize_planes(total, correction.shape[-1]) + correction
    return total


def corrected(planes, corrections):
    """Planes (3, C, R, R) with the corrections of all levels added, in [-1, 1]."""
    total = planes
    for count in (len(planes), 1):  # those of all planes, those of xz alone
        of_these = [correction for correction in corrections if len(correction) == count]
        if not of_these:
            continue
        enlarged = rh.resize_planes(summed(of_these), planes.shape[-1])
        if count == 1:
            beside = (XZ, len(planes) - 1 - XZ)  # the planes before and after it
            enlarged = F.pad(enlarged, (0, 0, 0, 0, 0, 0, *beside))
        total = total + enlarged
    return total.clamp(-1, 1)


def log_density(sigma):
    """The logarithm of densities, of which those below rh.EMPTY count as that."""
    return torch.log(sigma.clamp(min=rh.EMPTY))


class Emptiness(NamedTuple):
    """Where a sample is empty, or nearly so, by the cells of its grid."""

    density: torch.Tensor  # (G, G, G), the sample's own, and no more shall be there
    weight: torch.Tensor  # (G, G, G), how much that counts


def emptiness_of(grid):
    """The Emptiness of a sample's occupancy grid.

    Where the portrait shows more than the sample has, larger hair for instance, what is added shall
    lie around the sample, as deep as that is. A texel of the xz plane alone would put it at all
    depths, as a block. So the weight grows with the distance from what is solid.
    """
    cells = ndimage.distance_transform_edt((grid.values < SOLID).cpu().numpy())
    weight = torch.from_numpy((cells - 1).clip(0) / AWAY).to(grid.values)
    return Emptiness(grid.values.clamp(min=rh.EMPTY), weight)


def fog_in(field, empty, generator):
    """The weighted mean, over random points, of the log density above that of an Emptiness."""
    G, device = len(empty.weight), empty.weight.device
    cell = torch.randint(G, (POINTS, 3), generator=generator).to(device)
    within = torch.rand(POINTS, 3, generator=generator).to(device)
    points = (cell + within) * (2 / G) - 1
    density, weight = (x[cell.unbind(1)] for x in empty)
    excess = (log_density(field(points)[0]) - log_density(density)).clamp(min=0)
    return (excess * weight).mean()


class Hidden(NamedTuple):
    """Points of a sample that no photograph shows, and what is there."""

    points: torch.Tensor  # (N, 3)
    dirs: torch.Tensor  # (N, 3), from which they are looked at
    density: torch.Tensor  # (N,), its logarithm
    rgb: torch.Tensor  # (N, 3)


def light_at(points, view, field, grid):
    """How well a View shows points (N, 3) of a field: the share (N,) of the light that comes from
    them to the camera, 0 where they lie outside of what is known of the photograph."""
    device = points.device
    known = view.seen.known
    P = known.shape[-1]
    _, (fx, fy, cx, cy) = rh.portrait_camera(P, device)
    pose = rh.orbit_pose(*view.angles).to(device)
    camera = pose[:3, 3]
    rays = points - camera
    distance = rays.norm(dim=1)
    rays = rays / distance[:, None]

    # What lies between a point and the camera, but for the step before the point
    delta = rh.step_length(grid.steps)
    samples = rh.march(camera.expand_as(rays), rays, grid.steps, grid)
    between = samples.t < distance[samples.ray_index] - delta
    tau = torch.zeros_like(distance)
    tau.index_add_(0, samples.ray_index, field(samples.points)[0] * delta * between)

    x, y, z = (rays @ pose[:3, :3]).unbind(1)  # the camera looks along its -z
    place = torch.stack([cx - fx * x / z, cy + fy * y / z], dim=1) * (2 / P) - 1
    in_picture = F.grid_sample(known[None], place[None, None], align_corners=False)[0, 0, 0]
    return torch.exp(-tau) * in_picture


@torch.no_grad()
def hidden_points(field, grid, views, generator):
    """The Hidden of a sampled field, at random points of its occupied cells."""
    device = grid.values.device
    cells = (grid.values > rh.EMPTY).nonzero()
    if not len(cells):
        return None
    pick = torch.randint(len(cells), (POINTS_SAMPLED,), generator=generator).to(device)
    within = torch.rand(POINTS_SAMPLED, 3, generator=generator).to(device)
    points = (cells[pick] + within) * (2 / len(grid.values)) - 1

    light = torch.stack([light_at(points, view, field, grid) for view in views])
    points = points[light.amax(0) < DARK]
    dirs = torch.randn(len(points), 3, generator=generator).to(device)
    dirs = F.normalize(dirs, dim=1)
    sigma, rgb = field(points, dirs)
    return Hidden(points, dirs, log_density(sigma), rgb) if len(points) else None


def changes_in(field, hidden, generator):
    """How far a field is from what a sample had at the points of a Hidden."""
    pick = torch.randint(len(hidden.points), (HELD,), generator=generator)
    points, dirs, density, rgb = (x[pick.to(x.device)] for x in hidden)
    sigma, colour = field(points, dirs)
    of_colours = F.mse_loss(colour, rgb)
    of_density = F.mse_loss(log_density(sigma), density)
    return WEIGHT_COLOUR * of_colours + WEIGHT_DENSITY * of_density


def pixels_of(image):
    """An image (c, P, P) as rows of pixels (P^2, c)."""
    return image.permute(1, 2, 0).flatten(0, 1)


class Target(NamedTuple):
    """Pixels of photographs, as rays and what they have to show."""

    rays_o: torch.Tensor  # (N, 3)
    rays_d: torch.Tensor  # (N, 3)
    rgb: torch.Tensor  # (N, 3) in 0..1, on white
    alpha: torch.Tensor  # (N, 1)
    known: torch.Tensor  # (N, 1)


def target_of(view):
    """The pixels of a View."""
    seen = view.seen
    P = seen.images.shape[-1]
    device = seen.images.device
    _, intrinsics = rh.portrait_camera(P, device)
    rays = rh.view_rays(rh.orbit_pose(*view.angles).to(device), intrinsics, P, P)
    return Target(*rays, pixels_of((seen.images + 1) / 2), *map(pixels_of, seen[1:]))


def chances(field, view):
    """How likely a ray goes through each pixel of a View, (P^2,) of mean 1: a share WHERE_WRONG
    of the rays is drawn in proportion to the error of a Frozen's picture."""
    images, _, _ = view.seen
    P = images.shape[-1]
    rgb = view_from(field, view.angles, max(P // 2, 1)).view
    error = F.interpolate(rgb[None], size=P, mode='bilinear') - (images + 1) / 2
    error = F.avg_pool2d(error.square().mean(1), 5, 1, 2, count_include_pad=False)
    error = error.sqrt().flatten()
    return WHERE_WRONG * error / error.mean().clamp(min=1e-6) + 1 - WHERE_WRONG


class Adam:
    """The steps of torch.optim.Adam, which imports a compiler when it is first used: that takes 1.2
    CPU-seconds."""
    def __init__(self, tensors, betas=(0.9, 0.99), eps=1e-8):
        self.tensors = tensors
        self.betas = betas
        self.eps = eps
        self.means = [torch.zeros_like(x) for x in tensors]
        self.squares = [torch.zeros_like(x) for x in tensors]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients, rate):
        self.steps += 1
        a, b = self.betas
        unbiased = (1 - b ** self.steps) ** 0.5
        for x, mean, square, gradient in zip(self.tensors, self.means, self.squares, gradients):
            mean.lerp_(gradient, 1 - a)
            square.mul_(b).addcmul_(gradient, gradient, value=1 - b)
            size = (square.sqrt() / unbiased).add_(self.eps)
            x.addcdiv_(mean, size, value=-rate / (1 - a ** self.steps))


@torch.autocast('cpu', enabled=False)
@torch.autocast('cuda', enabled=False)
def first_look(planes, decoder, views):
    """The occupancy grid of planes (3, C, R, R), and the `chances` of all pixels of Views."""
    field = frozen.freeze(planes, decoder)
    return field.grid, torch.cat([chances(field, view) for view in views])


def fit_one(planes, seen, decoder, steps, seed=0, report=None, views=()):
    """Does `fit_to_portrait` for one avatar's planes (3, C, R, R), the Seen of one portrait and
    further photographs, Views."""
    config, device = decoder.config, planes.device
    generator = torch.Generator().manual_seed(seed)
    all_views = [View(seen), *views]

    # The photographs as rays with their colours; steps go over the pixels of which something is
    # known, and more often over those that are wrong as yet.
    targets = [target_of(view) for view in all_views]
    rays_o, rays_d, target, alpha, known = map(torch.cat, zip(*targets))
    shown = (known[:, 0] > 0).nonzero()[:, 0]
    if not len(shown):
        steps = 0
    grid, chance = first_look(planes, decoder, all_views)
    chance = chance[shown].cpu()

    # What is empty in the sample stays so: there shall be no fog where there was none. And what no
    # photograph shows stays as it was sampled: the network knows it better than corrections that
    # reach it by chance.
    empty = emptiness_of(grid)
    hidden = hidden_points(rh.PlaneField(planes, decoder), grid, all_views, generator)

    corrections = new_corrections(planes)
    adam = Adam(corrections)
    for step in range(steps):
        field = rh.PlaneField(corrected(planes, corrections), decoder)
        if step and step % GRID_EVERY == 0:
            grid = rh.grid_for(field, config, device)
        samples = config.steps // 2 if step < COARSE_STEPS * steps else config.steps
        if grid.steps != samples:
            grid.steps = samples
            grid.refresh()

        # On random grounds: on white, what should be empty may turn white.
        drawn = torch.multinomial(chance, RAYS, replacement=True, generator=generator)
        pick = shown[drawn.to(device)]
        shift = torch.rand(RAYS, generator=generator).to(device)
        ground = torch.rand(RAYS, 3, generator=generator).to(device)
        rgb = rh.render(field, rays_o[pick], rays_d[pick], samples, grid, shift, ground).rgb
        error = rgb - target[pick] + (1 - alpha[pick]) * (1 - ground)
        loss = (known[pick] * error.square()).mean()

        total = loss
        if step % EMPTY_EVERY == 0:
            total = loss + EMPTY_EVERY * WEIGHT_EMPTY * fog_in(field, empty, generator)
        elif hidden is not None:
            total = loss + EMPTY_EVERY * changes_in(field, hidden, generator)
        adam.step(torch.autograd.grad(total, corrections), LEARNING_RATE * 0.1 ** (step / steps))
        if report:
            report(loss.item())
    return corrected(planes, corrections).detach()


def fit_to_portrait(planes, seen, decoder, steps, seed=0, report=None):
    """Corrects planes (B, 3, C, R, R), in `steps` steps an avatar, until their front views are
    the portraits `seen`, a Seen. report: a function that is called with the loss of each step."""
    fitted = []
    for one, *portrait in zip(planes, *seen):
        fitted.append(fit_one(one, Seen(*portrait), decoder, steps, seed, report))
    return torch.stack(fitted)


# 5 Sampling towards the portrait ------------------------------------------------------------------
# Fitting mends what the portrait shows, and the rest stays as it was sampled. So the portrait takes
# part in sampling, too: what the base network takes the avatar for is corrected in each step, and
# the network, in the steps that follow, makes the rest to match (after DAPS, Zhang et al. 2025, and
# the guided sampling of SSDNeRF, Chen et al. 2023).
TOWARDS_SIDE = 64  # pixels a side that the portrait has there
TOWARDS_RAYS = 1024  # a step of descent, of
TOWARDS_SAMPLES = 64  # lattice points along the diagonal of the box
TOWARDS_STEPS = 8  # of descent in each step of sampling
TOWARDS_RATE = 5e-3
SAMPLES = 2  # of which the mean is taken: what both agree upon is mostly true
MOST_STEPS = 2 ** 17  # of sampling: more than rodinhd.LARGEST allows
TOWARDS_LEVELS = (8, 4, 2, 1)  # corrections are planes of r/8 ... r texels a side


def in_small(seen):
    """The Seen of one portrait in TOWARDS_SIDE pixels a side."""
    return Seen(*(F.interpolate(x[None], size=TOWARDS_SIDE, mode='area')[0] for x in seen))


def towards(seen, decoder, seed=0, share=None, views=()):
    """What brings low-resolution planes (B, 3, C, r, r) nearer to the portraits `seen`, a Seen: a
    function of planes, `correct` of rh.Diffusion.sample. The draws of portrait i follow from
    seed + i and the step of sampling.

    With share (B,) the planes are so far from the first of two portraits to the second. views:
    further photographs of each of the portraits, Views.
    """
    targets = []
    for portrait in zip(*seen):
        shown = [View(Seen(*portrait)), *views]
        parts = [target_of(view._replace(seen=in_small(view.seen))) for view in shown]
        target = Target(*map(torch.cat, zip(*parts)))
        near, far = rh.intersect_box(target.rays_o, target.rays_d)
        used = (far > near) & (target.known[:, 0] > 0)
        targets.append(Target(*(x[used] for x in target)))
    steps = itertools.count()

    def correct(planes):
        step = next(steps)

        def moved(one, i):
            generator = torch.Generator().manual_seed((seed + i) * MOST_STEPS + step)
            return nearer(one, targets[i], decoder, generator)

        if share is None:
            return torch.stack([moved(one, i) for i, one in enumerate(planes)])
        pairs = zip(planes, share.tolist())
        return torch.stack([torch.lerp(moved(one, 0), moved(one, 1), s) for one, s in pairs])

    return correct


@torch.enable_grad()
@torch.autocast('cpu', enabled=False)
@torch.autocast('cuda', enabled=False)
def nearer(planes, target, decoder, generator):
    """Low-resolution planes (3, C, r, r) after a few steps of descent on a Target's pixels."""
    device = planes.device
    if not len(target.rgb):
        return planes
    corrections = new_corrections(planes, TOWARDS_LEVELS)
    adam = Adam(corrections)
    for _ in range(TOWARDS_STEPS):
        pick = torch.randint(len(target.rgb), (TOWARDS_RAYS,), generator=generator).to(device)
        offset = torch.rand(TOWARDS_RAYS, generator=generator).to(device)
        ground = torch.rand(TOWARDS_RAYS, 3, generator=generator).to(device)
        rays_o, rays_d, rgb, alpha, known = (x[pick] for x in target)

        field = rh.PlaneField(corrected(planes, corrections), decoder)
        found = rh.render(field, rays_o, rays_d, TOWARDS_SAMPLES, None, offset, ground).rgb
        error = found - rgb + (1 - alpha) * (1 - ground)
        loss = (known * error.square()).mean()
        adam.step(torch.autograd.grad(loss, corrections), TOWARDS_RATE)
    return corrected(planes, corrections).detach()


# 6 Further photographs ----------------------------------------------------------------------------
# Of a further photograph somebody has said from about where it was taken. The avatar, which is
# fitted to the portrait already, tells the rest: where the person is in it, and the exact angles.
# What it guessed of the sides is then wrong, and fitting mends that where pixels show it alone. So
# it is sampled once more, towards all photographs, before it is fitted to them.
TURNS = (-10, -5, 0, 5, 10)  # degrees around the azimuth that was given
HEIGHTS = (-10, -5, 0, 5, 10)  # elevations, degrees
FINER = (2, 1)  # degrees
LIKELY_TURN = 15  # degrees: the avatar's sides are guessed, and so somebody's word counts, too
POSE_SIDE = 64  # pixels a side of the pictures that are compared
MORE_STEPS = 1.0  # steps for each further photograph, in steps of the first fit


class Photograph(NamedTuple):
    """A further photograph as it was given."""

    image: torch.Tensor  # (3, P, P) in [-1, 1], on white where it has alpha
    alpha: torch.Tensor  # (1, P, P)
    azimuth: float  # of the camera, degrees: 0 is the front, 90 the person's left side
    known: torch.Tensor | None = None  # (1, P, P) in 0..1; None: all of it


def refined_angles(field, cutout, azimuth):
    """Finds the azimuth, near one that is known, and the elevation from which a Frozen looks most
    like a Cutout: in steps of five degrees, then of two and of one."""
    image, alpha = (
        F.interpolate(x[None], size=POSE_SIDE, mode='area') for x in (cutout.image, cutout.alpha)
    )

    def cost(angles):
        view, opacity = view_from(field, angles, POSE_SIDE)
        black = view - (1 - opacity)
        cost = float(cost_on_white(black[None], opacity[None], image, alpha))
        return cost * (1 + ((angles[0] - azimuth) / LIKELY_TURN) ** 2)

    def best(turns, heights):
        return min(itertools.product(turns, heights), key=cost)

    around, height = best([azimuth + turn for turn in TURNS], HEIGHTS)
    for step in FINER:
        near = (-step, 0, step)
        around, height = best([around + x for x in near], [height + x for x in near])
    return around, height


@torch.no_grad()
@torch.autocast('cpu', enabled=False)
@torch.autocast('cuda', enabled=False)
def find_views(planes, decoder, photographs):
    """Finds the person of an avatar's planes (3, C, R, R) in further Photographs -> [View]."""
    field = frozen.freeze(planes.float(), decoder)
    views = []
    for image, alpha, azimuth, known in photographs:
        image, alpha = image.to(planes.device), alpha.to(planes.device)
        if known is not None:
            known = known.to(planes.device)
        angles = (azimuth, 0)
        for _ in range(2):  # the place tells the angles, and these a better place
            front = view_from(field, angles, image.shape[-1])
            seen = straighten_one(*front, None, image, alpha, known)
            cutout = Cutout((seen.images + 1) / 2, seen.alpha)
            angles = refined_angles(field, cutout, azimuth)
        views.append(View(seen, angles))
    return views


def sample_towards(models, seen, views, **how):
    """Samples planes (3, C, R, R) towards a portrait, the Seen of a single one, and Views."""
    one = Seen(*(x[None] for x in seen))
    correct = towards(one, models['decoder'], how.get('seed', 0), views=views)
    how = {'samples': SAMPLES, **how}
    return rh.generate(models, one.images, correct=correct, **how).planes[0]


def fit_to_photographs(models, planes, seen, photographs, refine_steps, report=None, **how):
    """Makes planes (3, C, R, R) of one avatar what a portrait, the Seen of a single one, and
    further Photographs show: fits them to the portrait in `refine_steps`, samples them anew, and
    fits these to all in MORE_STEPS times as many for each further one. Returns the planes, and the
    Views that were found. how: see rh.generate."""
    decoder = models['decoder']
    seed = how.get('seed', 0)
    fitted = fit_one(planes, seen, decoder, refine_steps, seed, report)
    views = find_views(fitted, decoder, photographs)
    sampled = sample_towards(models, seen, views, **how)
    more = steps_for(refine_steps, photographs)
    return fit_one(sampled, seen, decoder, more, seed, report, views), views


def steps_for(steps, photographs):
    """Steps in which an avatar is fitted to a portrait and further photographs together."""
    return round(MORE_STEPS * steps * len(photographs))


def avatars_of(
    models,
    images,
    refine_steps=None,
    alpha=None,
    known=None,
    photographs=(),
    report=None,
    **how,
):
    """Makes planes (B, 3, C, R, R) of portraits: straightened, sampled and fitted in
    `refine_steps` steps (default: the models' likeness_steps), or for 0 steps only sampled.

    images (B, 3, P, P) are in [-1, 1], on white where they have alpha (B, 1, P, P) below 1; known:
    see straighten. photographs: further ones of the person of one portrait. report: of each step of
    fitting, see fit_to_portrait. how: see rh.generate.
    """
    if photographs and len(images) != 1:
        raise ValueError(f'further photographs are of one portrait, not of {len(images)}')
    if refine_steps is None:
        refine_steps = models['base'].config.likeness_steps
    if not refine_steps:
        return rh.generate(models, images, **how).planes

    seen = straighten(models, images, alpha, known, **how)
    seed = how.get('seed', 0)
    correct = towards(seen, models['decoder'], seed)
    planes = rh.generate(models, seen.images, correct=correct, samples=SAMPLES, **how).planes
    if photographs:
        one = Seen(*(x[0] for x in seen))
        fitted, _ = fit_to_photographs(
            models, planes[0], one, photographs, refine_steps, report, **how
        )
        return fitted[None]
    return fit_to_portrait(planes, seen, models['decoder'], refine_steps, seed, report)
