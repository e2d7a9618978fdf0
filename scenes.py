"""Avatars on disk: reads posed image sets and portraits, and checks them.

An avatar is a folder in the format of NeRF-synthetic (Blender) or instant-ngp: a transforms*.json
with one frame an image, and RGB or RGBA images beside it. Poses are camera-to-world matrices with
Blender/OpenGL axes, in a world of the files' own; `read_box` finds the cube that holds the avatar,
and `load_views` maps it to [-1, 1]^3 with Z up and the face along -Y.

Everything that comes from a file is checked, here and in the modules that this one is made of, so
that the rest of the program can trust it: transforms.py reads the JSON, lenses.py the cameras,
images.py the pixels. What cannot be used ends the program in one line that names the file and says
what to do.
"""
import contextlib
import functools
import math
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import rodinhd as rh
from images import MAX_PIXELS, SUFFIXES, open_image, open_posed, reduced, resized, same_shape
from lenses import read_intrinsics, read_lens, read_size, undistort
from transforms import (
    TRAIN,
    WHOLE,
    Files,
    check_cameras,
    count_frames,  # noqa: F401  # for others, who know this module alone
    frames_of,
    nearest_to_axes,
    one_frame,
    read_frames,
    read_matrix,
    read_transforms,  # noqa: F401
    usable_frames,
)

IMAGE_SUFFIXES = SUFFIXES
OTHER_SUFFIXES = ('.heic', '.heif')  # of portraits; opening them says what is missing


# Portraits ----------------------------------------------------------------------------------------
def read_portrait(path, size):
    """Reads an image file as a square portrait of `size` pixels a side.

    Returns rgb (3, size, size) in [-1, 1], not premultiplied, and alpha (1, size, size) in 0..1.
    """
    return portrait_in_floats(portrait_pixels(path, open_image(path), size))


def portrait_in_floats(pixels):
    """uint8 RGBA (..., 4, P, P) -> rgb (..., 3, P, P) in [-1, 1] and alpha (..., 1, P, P)."""
    rgba = pixels.float() / 255
    return rgba[..., :3, :, :] * 2 - 1, rgba[..., 3:, :, :]


def portrait_pixels(path, image, size):
    """Makes of an RGBA PIL image a square portrait, uint8 RGBA (4, size, size)."""
    if min(image.size) < 16:
        rh.stop(
            f'{path}: {image.width} x {image.height} pixels are too few for a portrait; '
            'give at least 16 x 16'
        )
    # The square must stay below the limit, too.
    longest = max(image.size)
    if longest ** 2 > MAX_PIXELS:
        scale = max(size, 2048) / longest
        image = resized(image, [max(1, round(side * scale)) for side in image.size])
    square = Image.fromarray(squared(np.asarray(image)))

    square = resized(square, (size, size))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def squared(pixels):
    """Repeats the border pixels of an image (H, W, 4) until it is square.

    A tall image grows on both sides. A wide one grows at the top, since a bust touches the bottom.
    """
    height, width = pixels.shape[:2]
    side = max(height, width)
    top = side - height
    left = (side - width) // 2
    right = side - width - left
    return np.pad(pixels, ((top, 0), (left, right), (0, 0)), mode='edge')


def portrait_on_white(rgb, alpha):
    """Composites the pair of `read_portrait`, or a batch of it, on white; in [-1, 1]."""
    return rgb * alpha + 1 - alpha


# Views --------------------------------------------------------------------------------------------
def load_views(folder, split, box, downscale=1, most=None, pick=None):
    """Loads the posed images of a split as rh.Views; None where the split is empty.

    The box (centre, half side) of `read_box` becomes [-1, 1]^3, turned by `world_turn`. Images are
    shrunk by the integer `downscale`. `most` and `pick` select frames: see `some_frames`.
    """
    meta, frames = read_frames(folder, split)
    where = f'{folder}: {split} set'
    views = [read_view(meta, f, downscale, where) for f in some_frames(frames, most, pick)]
    if not views:
        return None

    views = of_one_size(views, where)
    images = torch.from_numpy(np.stack([view.image for view in views]))
    matrices = torch.from_numpy(np.stack([view.c2w for view in views]))
    intrinsics = torch.tensor([view.intrinsics for view in views])
    unknown = None
    faint = images[..., 3] <= rh.FAINT
    if any(view.unknown is not None for view in views):
        unknown = torch.from_numpy(np.stack([known_or_not(view) for view in views]))
        faint &= ~unknown

    c2w = into_box(matrices, box, world_turn(folder))
    views = rh.Views(images, c2w, intrinsics, bool(faint.any()), unknown)
    if split == 'train' and pick is None:
        check_surroundings(views, folder)
        if most is None:
            check_silhouettes(views, frames, folder)
    return views


def load_view(folder, box, pick, factor):
    """Loads one training view, of the frame number `pick` modulo their count, as rh.Views.

    factor(height) is the integer by which an image of this height is shrunk. It costs as much with
    hundreds of frames as with one: the others are not looked at.
    """
    meta, frame = one_frame(folder, 'train', pick)
    view = read_view(meta, frame, factor, f'{folder}: train set')
    unknown = None if view.unknown is None else torch.from_numpy(view.unknown)[None]
    image = torch.from_numpy(np.array(view.image))[None]
    faint = image[..., 3] <= rh.FAINT
    if unknown is not None:
        faint &= ~unknown
    c2w = into_box(torch.from_numpy(view.c2w)[None], box, world_turn(folder))
    return rh.Views(image, c2w, torch.tensor([view.intrinsics]), bool(faint.any()), unknown)


def some_frames(frames, most, pick):
    """Selects the frame number `pick`, or `most` evenly spread frames, or all of them."""
    if pick is not None and frames:
        frames = [frames[pick % len(frames)]]
    if most and len(frames) > most:
        frames = [frames[i * len(frames) // most] for i in range(most)]
    return frames


class View(NamedTuple):
    """Holds one frame as its files give it, checked."""
    image: np.ndarray  # (H, W, 4) uint8, straight alpha
    unknown: np.ndarray | None  # (H, W) bool: masked pixels
    c2w: np.ndarray  # (4, 4) float64, in the files' world
    intrinsics: list  # fx, fy, cx, cy in pixels of `image`


def known_or_not(view):
    """View.unknown as an array, where there are no masks, too."""
    if view.unknown is None:
        return np.zeros(view.image.shape[:2], bool)
    return view.unknown


def read_view(meta, frame, downscale, where):
    """Reads the image and the camera of a frame, shrunk by the integer `downscale`, or by what it
    is as a function of the image's height."""
    image = open_posed(frame['path'], read_size(meta, frame, where))
    intrinsics = read_intrinsics(meta, frame, *image.size, where)
    lens = read_lens(meta, frame, where)
    image, unknown = with_masks(image, frame)
    if lens:
        pixels, unknown = undistort(np.asarray(image), unknown, lens, intrinsics, where)
        image = Image.fromarray(pixels)
    if callable(downscale):
        downscale = downscale(image.height)
    if downscale > 1:
        image = reduced(image, downscale)
        if unknown is not None:
            unknown = np.asarray(Image.fromarray(255 * unknown.astype(np.uint8)).reduce(downscale))
            unknown = unknown > 0
    in_pixels = [value / downscale for value in intrinsics]
    return View(np.asarray(image), unknown, frame['transform_matrix'], in_pixels)


def with_masks(image, frame):
    """Applies the files beside an image, and returns it and its unknown pixels (H, W) or None.

    These are what mask_path leaves black, as nerfstudio has it, and what instant-ngp's
    dynamic_mask_*.png leaves white. Its *.alpha.* holds an alpha channel.
    """
    if frame['alpha']:
        level = np.asarray(beside(frame['alpha'], image)) / 255
        linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
        image.putalpha(Image.fromarray((255 * linear).round().astype(np.uint8)))

    shares = []  # of each pixel that is known, 0..255
    if frame['mask']:
        share = np.asarray(beside(frame['mask'], image))
        if share.any() and np.isin(share, (0, share.max())).all():  # of two levels: labels
            share = np.where(share > 0, 255, 0).astype(np.uint8)
        shares.append(share)
    if frame['moving']:
        shares.append(255 - np.asarray(beside(frame['moving'], image)))
    if not shares:
        return image, None

    share = np.minimum.reduce(shares)
    pixels = np.array(image)
    pixels[..., 3] = np.minimum(pixels[..., 3], share)
    return Image.fromarray(pixels), share < 255 - rh.FAINT


def beside(path, image):
    """Opens a mask that belongs to an image, in grey and of its size."""
    mask = open_posed(path, image.size)
    if not same_shape(mask.size, image.size):
        rh.stop(
            f'{path}: this mask has {mask.width} x {mask.height} pixels, '
            f'its image {image.width} x {image.height}'
        )
    if mask.getchannel('A').getextrema()[0] < 255:  # drawn by its alpha, or on transparent ground
        mask = Image.alpha_composite(Image.new('RGBA', mask.size, 'black'), mask)
    mask = mask.convert('L')
    return mask if mask.size == image.size else mask.resize(image.size, Image.NEAREST)


def of_one_size(views, where):
    """Scales views to the size that most of them have, the larger of several such.

    Those of other proportions are padded with unknown pixels.
    """
    sizes = [view.image.shape[1::-1] for view in views]
    if len(set(sizes)) == 1:
        return views
    width, height = max(set(sizes), key=lambda size: (sizes.count(size), size[0] * size[1]))
    others = len(sizes) - sizes.count((width, height))
    rh.note(
        f'{where}: {others} of {len(views)} images have another size than {width} x {height} and '
        'are scaled to it, with their intrinsics'
    )
    return [onto_canvas(view, width, height) for view in views]


def onto_canvas(view, width, height):
    """Scales a View to fit into an image of a size, in the proportions that it has."""
    h, w = view.image.shape[:2]
    if (w, h) == (width, height):
        return view
    size = (width, height)
    if not same_shape((w, h), size):
        scale = min(width / w, height / h)
        size = (max(1, round(w * scale)), max(1, round(h * scale)))

    image = Image.new('RGBA', (width, height))
    image.paste(resized(Image.fromarray(view.image), size))
    unknown = np.ones((height, width), bool)
    unknown[:size[1], :size[0]] = False
    if view.unknown is not None:
        mask = Image.fromarray(255 * view.unknown.astype(np.uint8)).resize(size, Image.BILINEAR)
        unknown[:size[1], :size[0]] = np.asarray(mask) > 0

    x, y = size[0] / w, size[1] / h
    intrinsics = [value * by for value, by in zip(view.intrinsics, (x, y, x, y), strict=True)]
    return View(np.asarray(image), unknown if unknown.any() else None, view.c2w, intrinsics)


def into_box(matrices, box, turn=None):
    """Maps cameras (V, 4, 4) of the files' world to the one in which the box is [-1, 1]^3.

    Axes get unit length, since some files put a scale into their matrices. The world is turned by
    the rotation `turn` (3, 3), if any. Doubles hold places far from the origin, as of maps, until
    the box is taken off.
    """
    centre, half = box
    c2w = matrices.float()
    c2w[:, :3, :3] = F.normalize(c2w[:, :3, :3], dim=1)
    c2w[:, :3, 3] = ((matrices[:, :3, 3].double() - centre.double()) / half).float()
    c2w[:, 3] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    if turn is not None:
        c2w[:, :3] = (torch.from_numpy(turn) @ c2w[:, :3].double()).float()
    return c2w


def check_surroundings(views, folder):
    """Tells that an avatar has no silhouette, unless its images have a white ground. Stops where
    masks hide all."""
    if views.unknown is not None and views.unknown.all():
        rh.stop(
            f'{folder}: mask_path (or dynamic_mask_*.png) hides each pixel of all views; shown is '
            'what is white in an 8-bit mask'
        )
    if views.has_alpha:
        return
    height, width = views.images.shape[1:3]
    border = torch.ones(height, width, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    known = border.expand(len(views.images), height, width)
    if views.unknown is not None:
        known = known & ~views.unknown
    white = (views.images[known][:, :3] >= 250).all(1)
    if not len(white):
        rh.note(
            f'{folder}: masks hide all that surrounds the avatar, and what they hide is unknown, '
            'not empty, so there is no silhouette; where it is empty, give RGBA images'
        )
    elif white.float().mean() < 0.9:
        rh.note(
            f'{folder}: no image has transparent pixels, so there is no silhouette, and what '
            'surrounds the avatar is fitted into its box, badly; cut it out (RGBA images)'
        )


def check_silhouettes(views, frames, folder):
    """Stops where the silhouettes of all views have no point of the box in common."""
    if not views.has_alpha or len(views.images) < 3:
        return
    outlines = views.outlines()
    for image, frame in zip(outlines, frames, strict=True):
        if not (image[..., 3] > rh.FAINT).any():
            rh.stop(f'{frame["path"]}: this view is fully transparent; take its frame away')

    # Shrunk by the maximum of blocks, silhouettes only grow.
    factor = max(1, max(outlines.shape[1:3]) // 96)
    alpha = F.max_pool2d(outlines[..., 3].float(), factor, ceil_mode=True)
    small = alpha[..., None].expand(*alpha.shape, 4).byte()
    hull = rh.visual_hull(rh.Views(small, views.c2w, views.intrinsics / factor, True), 24, 0.25)
    if not hull.any():
        rh.stop(
            f'{folder}: the silhouettes of the views have no point in common in the box; are the '
            'camera poses right (camera-to-world, x right, y up, looking along -z), and aabb?'
        )


# Which way is up, and which in front --------------------------------------------------------------
def world_turn(folder):
    """Returns the rotation (3, 3) of the files' world that puts Z up and the face along -Y; None
    where they are so."""
    return cached_turn(str(folder), *state_of(folder))


def up_turn(folder):
    """Returns the rotation (3, 3) of the files' world that puts Z up; None where it is up."""
    return cached_up(str(folder), *state_of(folder))


def front_turns(folder):
    """Returns how many quarter turns about Z, to the left, the world needs in which Z is up, for
    the face to look along -Y."""
    return cached_front(str(folder), *state_of(folder)).turns


def state_of(folder):
    """Time and size of the transforms file of the training views."""
    status = os.stat(frames_of(folder, 'train')[0])
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(2 ** 17)
def cached_turn(folder, *state):
    """See world_turn."""
    up = cached_up(folder, *state)
    turns = cached_front(folder, *state).turns
    if not turns:
        return up
    c, s = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[turns]
    about_z = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    return about_z if up is None else about_z @ up


@functools.lru_cache(2 ** 17)
def cached_up(folder, *_):
    """See up_turn."""
    path, _, numbered = frames_of(folder, 'train')
    matrices = []
    for i, frame in numbered:
        if frame.get('transform_matrix') is not None:
            matrices.append(read_matrix(frame, f'{path}: transform_matrix of frame {i}'))
    up = up_axis(np.stack(matrices)) if matrices else None
    if up is None or up[2] > math.cos(math.radians(15)):
        return None

    # Cameras are rarely level to the degree: an axis of the world is meant where one is near.
    nearest = int(np.abs(up).argmax())
    name = 'a slanting line'
    if abs(up[nearest]) > math.cos(math.radians(15)):
        up = np.eye(3)[nearest] * np.sign(up[nearest])
        name = f'{"+" if up[nearest] > 0 else "-"}{"XYZ"[nearest]}'
    rh.note(f'{folder}: up is along {name} by its cameras; the world is turned to have Z up')
    return turn_to_z(up)


def up_axis(matrices):
    """Finds the direction (3,) that is up for cameras (V, 4, 4); None where they do not tell.

    The x axes of cameras that are held level are all normal to it.
    """
    lengths = np.linalg.norm(matrices[:, :3, :3], axis=1)[:, None]
    axes = matrices[:, :3, :3] / np.maximum(lengths, 1e-9)
    mean = axes[..., 1].mean(0)
    spread, directions = np.linalg.eigh(axes[..., 0].T @ axes[..., 0] / len(axes))
    up = directions[:, 0]
    clear = spread[0] < 0.1 * spread[1] and abs(up @ mean) > 0.2
    if clear:
        return up * np.sign(up @ mean)
    length = np.linalg.norm(mean)
    return mean / length if length > 0.5 else None


def turn_to_z(up):
    """The smallest rotation (3, 3) that takes the unit vector `up` to Z."""
    if up[2] < -1 + 1e-9:
        return np.diag([1.0, -1.0, -1.0])
    x, y, z = up
    cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0]])
    return np.eye(3) + cross + cross @ cross / (1 + z)


# The box ------------------------------------------------------------------------------------------
def read_box(folder):
    """Finds the cube that holds the avatar: (centre (3,), half side) in its files' world.

    The transforms file may name it by `aabb`, or as instant-ngp does by `scale` and `offset`.
    Otherwise the images tell it: see `measure_box`. Cameras must look at it.
    """
    meta, frames = read_frames(folder, 'train')
    path = frames_of(folder, 'train')[0]
    if meta.get('aabb') is None and meta.get('scale') is None:
        matrices = np.stack([frame['transform_matrix'] for frame in frames])
        centre = nearest_to_axes(torch.from_numpy(matrices))
        half = float((torch.from_numpy(matrices[:, :3, 3]) - centre).norm(dim=-1).median())
        if not 0 < half < 1e12 or not centre.isfinite().all():
            rh.stop(f'{path}: the cameras look at no common point; are the matrices right?')
        check_cameras(path, frames, (centre, half / 2))
        return measure_box(folder, (centre, half))

    with contextlib.suppress(TypeError, ValueError, ArithmeticError, RuntimeError):
        centre, half = box_of_scale(meta) if meta.get('aabb') is None else box_of_aabb(meta)
        if centre.shape == (3,) and centre.abs().max() < 1e12 and 1e-12 < half < 1e12:
            check_cameras(path, frames, (centre, half))
            turn = world_turn(folder)
            if turn is not None and meta.get('aabb') is not None:
                centre, half = box_of_aabb(meta, turn)
            return in_singles(centre), half
    rh.stop(
        f'{folder}: aabb (or scale and offset) of the transforms file must be '
        'finite numbers that span a box'
    )


def in_singles(centre):
    """A centre in float32 where that holds it; far from the origin it does not."""
    single = centre.float()
    return single if torch.equal(single.double(), centre) else centre


def box_of_aabb(meta, turn=None):
    """Returns the cube around `aabb`: [[x, y, z], [x, y, z]], lowest and highest corner.

    Where the world is turned, it is the cube of the turned world.
    """
    lowest, highest = torch.tensor(meta['aabb'], dtype=torch.float64)
    extent = highest - lowest
    if not (extent >= 0).all():
        raise ValueError
    if turn is not None:
        extent = torch.from_numpy(np.abs(turn)) @ extent
    return (lowest + highest) / 2, float(extent.max() / 2)


def box_of_scale(meta):
    """Returns instant-ngp's cube: scale * x + offset is in the unit cube, times aabb_scale."""
    scale = float(meta['scale'])
    offset = meta.get('offset')
    offset = torch.tensor([0.5] * 3 if offset is None else offset, dtype=torch.float64)
    times = meta.get('aabb_scale')
    half = 0.5 * float(1 if times is None else times) / scale
    return (0.5 - offset) / scale, half


def measure_box(folder, guess):
    """Finds the cube of `read_box` from the silhouettes.

    The first guess is the cube around the point nearest to all optical axes, as wide as the cameras
    are far. The visual hull in it tells the extent, to which 4 % are added. Without alpha there is
    no hull; then 0.6 of the guess stay, which lie inside the cameras.
    """
    G = 64  # cells a side
    centre, half = guess
    turn = world_turn(folder)
    back = torch.eye(3) if turn is None else torch.from_numpy(turn).T

    # The second pass measures in the box of the first one, where cells are finer.
    for _ in range(2):
        views = load_views(folder, 'train', (centre, half), most=24)
        if not views.has_alpha:
            return in_singles(centre), 0.6 * half
        cells = rh.visual_hull(views, G, seen_by=0.5).nonzero().float()  # (cells, 3)
        if not len(cells):
            rh.stop(
                f'{folder}: the silhouettes of the views have no point in common; '
                'are the camera poses right (camera-to-world, x right, y up, looking along -z)?'
            )
        lowest = cells.amin(0) / (G // 2) - 1  # in [-1, 1]^3
        highest = (cells.amax(0) + 1) / (G // 2) - 1
        widest = float((highest - lowest).max())
        middle = (lowest + highest) / 2
        centre = centre + half * (back.double() @ middle.double())
        half = half * min(1.0, 1.04 * widest / 2)
    return in_singles(centre), half


# Folders ------------------------------------------------------------------------------------------
def portrait_of(folder, size):
    """Reads the portrait of an avatar as read_portrait does.

    A training view is seen as its camera is said to see it, and upright by its pose.
    """
    return portrait_in_floats(pixels_of_portrait(folder, size))


def pixels_of_portrait(folder, size):
    """The portrait of an avatar as it is read, uint8 RGBA (4, size, size)."""
    path = own_portrait(folder)
    if path is not None:
        return portrait_pixels(path, open_image(path), size)
    meta, frames = read_frames(folder, 'train')
    path = front_path(folder)
    frame = next(frame for frame in frames if frame['path'] == path)
    return pixels_of_frame(folder, meta, frame, size)


def pixels_of_frame(folder, meta, frame, size):
    """A training frame of an avatar as a portrait, uint8 RGBA (4, size, size)."""
    image = read_view(meta, frame, 1, f'{folder}: train set').image
    turned = np.rot90(image, quarter_turns(frame, up_turn(folder)))
    turned = Image.fromarray(np.ascontiguousarray(turned))
    return portrait_pixels(frame['path'], turned, size)


def quarter_turns(frame, turn):
    """How often the image of a frame has to be turned by 90 degrees, to the left, to be upright."""
    axes = frame['transform_matrix'][:3, :3]
    up = (axes if turn is None else turn @ axes)[2]  # along x, y and z of the camera
    if np.hypot(up[0], up[1]) < 0.3 * np.linalg.norm(up):
        return 0  # it looks straight down
    return round(math.atan2(up[0], up[1]) / (math.pi / 2))


def portrait_path(folder):
    """Finds the portrait of an avatar: portrait.* where there is one, else a frontal view."""
    return own_portrait(folder) or front_path(folder)


def own_portrait(folder):
    """Finds portrait.* of an avatar, or None."""
    suffixes = (*IMAGE_SUFFIXES, *OTHER_SUFFIXES)
    for suffix in suffixes:
        path = Path(folder) / f'portrait{suffix}'
        if path.is_file():
            return path
    return None


def front_path(folder):
    """Finds the training view that shows most of the face.

    That is the one whose camera stands most in front, level, its z axis along -Y; unless there is
    no face in it and one in another view.
    """
    return cached_front(str(folder), *state_of(folder)).path


class Front(NamedTuple):
    """Which view shows the face, and how the world has to be turned for it."""
    path: Path  # of the view's image
    turns: int  # see front_turns


@functools.lru_cache(2 ** 17)
def cached_front(folder, *state):
    """See front_path and front_turns."""
    path, meta, numbered = frames_of(folder, 'train')
    up = cached_up(folder, *state)

    # The usual view is looked for without a look at the files of the others.
    towards = {}
    for i, frame in numbered:
        if frame.get('transform_matrix') is not None:
            matrix = read_matrix(frame, f'{path}: transform_matrix of frame {i}')
            towards[i] = direction_of(matrix, up)
    files = Files(path)
    order = sorted(towards, key=lambda i: towards[i][1])
    frames = dict(numbered)
    first = next((i for i in order if has_image(frames[i], files)), None)
    if first is None:
        read_frames(folder, 'train')  # stops, and says why
    usual = usable_frames(path, [(first, frames[first])], files)[0]
    if 'factors' in meta:  # drawn by avatars.py: no detector knows its faces, and -Y is the front
        return Front(usual['path'], 0)

    named = frame_of_portrait(folder, path, numbered, files)
    if named is not None:
        return front_of(folder, named, usual, up, 'portrait.* is')
    if face_votes_of(folder, meta, usual, up) is None:
        why = 'without OpenCV (pip install opencv-python-headless) no face is looked for'
        found = None
    else:
        why = 'no face is found in its views'
        found = frame_with_face(folder, meta, usual, up)
    if found is None:
        rh.note(
            f'{Path(folder).parent}: {why}; the front is taken to be along -Y: '
            f'{usual["path"].name} and its like'
        )
        return Front(usual['path'], 0)
    return front_of(folder, found, usual, up, 'the face is in')


def has_image(frame, files):
    """Whether the image that a frame names is there."""
    name = frame.get('file_path')
    return bool(name) and files.find(name, 'file_path') is not None


def direction_of(matrix, up):
    """Returns where a camera (4, 4) stands, as a unit vector (3,) in the world with Z up."""
    axis = matrix[:3, 2] / max(np.linalg.norm(matrix[:3, 2]), 1e-9)
    return axis if up is None else up @ axis


def front_of(folder, frame, usual, up, what):
    """Makes a Front of the frame that shows the face; says so where it is not the usual one."""
    x, y, _ = direction_of(frame['transform_matrix'], up)
    turns = 0
    if math.hypot(x, y) > 0.3:  # else it looks down
        turns = -round(math.atan2(x, -y) / (math.pi / 2)) % 4
    if turns:
        rh.note(
            f'{folder}: {what} {frame["path"].name}; the world is turned by '
            f'{(0, 90, 180, -90)[turns]} degrees about Z, for the face to look along -Y'
        )
    elif frame['path'] != usual['path']:
        rh.note(f'{folder}: {what} {frame["path"].name}, which is nearly along -Y')
    return Front(frame['path'], turns)


def frame_of_portrait(folder, path, numbered, files):
    """Finds the training frame whose image portrait.* is, byte by byte, or None."""
    portrait = own_portrait(folder)
    if portrait is None:
        return None
    size = portrait.stat().st_size
    for i, frame in numbered:
        if frame.get('transform_matrix') is None or not has_image(frame, files):
            continue
        image = files.find(frame['file_path'], 'file_path')
        if image.stat().st_size == size and image.read_bytes() == portrait.read_bytes():
            return usable_frames(path, [(i, frame)], files)[0]
    return None


def face_votes_of(folder, meta, frame, up):
    """How many boxes around a face the view of a frame has: see face_votes."""
    image = read_view(meta, frame, 1, f'{folder}: train set').image
    turned = np.rot90(image, quarter_turns(frame, up))
    return face_votes(Image.fromarray(np.ascontiguousarray(turned)))


def frame_with_face(folder, meta, usual, up):
    """Looks for a face in the usual view, then in others; the frame with one, or None."""
    if face_votes_of(folder, meta, usual, up) >= 15:
        return usual  # the 176 training avatars of VALID have 19 and more, their backs 9 at most
    others = some_frames(read_frames(folder, 'train')[1], 24, None)
    found = [face_votes_of(folder, meta, frame, up) for frame in others]
    best = int(np.argmax(found))
    return others[best] if found[best] >= 30 else None


def face_votes(image):
    """How many boxes OpenCV's cascades find around one face in an RGBA image; None without them."""
    cascades = cascades_of(threading.get_ident())
    if cascades is None:
        return None
    white = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('L')
    scale = 128 / max(white.size)
    size = [max(1, round(side * scale)) for side in white.size]
    grey = np.asarray(white.resize(size, Image.LANCZOS)) / 255
    grey = (255 * grey ** 0.5).astype(np.uint8)  # brighter: dark skin has little contrast
    votes = 0
    for cascade in cascades:
        _, counts = cascade.detectMultiScale2(grey, 1.08, 1, minSize=(20, 20))
        votes += int(max(np.ravel(counts), default=0))
    return votes


@functools.lru_cache(16)
def cascades_of(thread):
    """OpenCV's detectors of faces, for one thread alone, as they are not safe; None without it."""
    try:
        import cv2
        return [
            cv2.CascadeClassifier(f'{cv2.data.haarcascades}haarcascade_frontalface_{name}.xml')
            for name in ('default', 'alt2')
        ]
    except (ImportError, AttributeError):
        return None


def list_avatars(data):
    """Lists the folders of avatars in `data`, sorted; `data` itself where it holds one avatar."""
    data = Path(data).absolute()
    if (data / WHOLE).is_file() or (data / TRAIN).is_file():
        return [data]

    paths = [path for path in data.glob('*/transforms*.json') if path.name in (WHOLE, TRAIN)]
    folders = {path.parent for path in paths}
    found = sorted(folder for folder in folders if not folder.name.startswith('.'))
    if not found:
        rh.stop(
            f'{data}: holds no avatars; draw some with `python avatars.py`, '
            'or give a folder of such scenes with --data'
        )
    return found
