"""Avatars on disk: reads posed image sets and portraits, and checks them.

An avatar is a folder in the format of NeRF-synthetic (Blender) or instant-ngp: a transforms*.json
with one frame an image, and RGB or RGBA images beside it. Poses are camera-to-world matrices with
Blender/OpenGL axes, in a world of the files' own; `read_box` finds the cube that holds the avatar,
and `load_views` maps it to [-1, 1]^3.

Everything that comes from a file is checked here, so that the rest of the program can trust it.
What cannot be used ends the program in one line that names the file and says what to do.
"""
import contextlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import rodinhd as rh

MAX_PIXELS = 64 * 2 ** 20               # larger images are not decoded
MAX_JSON = 64 * 2 ** 20                 # longer files, in bytes, are not parsed
IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')
WHOLE = 'transforms.json'
TRAIN = 'transforms_train.json'


# Images -------------------------------------------------------------------------------------------
def open_image(path):
    """Decodes an image file of any kind to an upright RGBA PIL image.

    Stops with one line where the file is missing, damaged, not an image, or too large.
    """
    # PIL would only warn of a large image. The check below refuses it before it is decoded.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                rh.stop(
                    f'{path}: {image.width} x {image.height} pixels are too many; '
                    'scale the image down to at most 8192 x 8192'
                )
            return upright_rgba(image)
    except FileNotFoundError:
        rh.stop(f'{path}: there is no such image')
    except Exception as error:          # PIL raises many types on damaged files
        lines = str(error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        rh.stop(f'{path}: not a readable image ({reason})')


def upright_rgba(image):
    """Turns a PIL image as its EXIF orientation says and converts it to 8-bit RGBA."""
    return ImageOps.exif_transpose(image).convert('RGBA')


def reduced(image, factor):
    """Shrinks an RGBA PIL image by an integer factor; each pixel is the mean of a block."""
    # Premultiplied meanwhile, so that the colours of transparent pixels do not bleed.
    return image.convert('RGBa').reduce(factor).convert('RGBA')


# Portraits ----------------------------------------------------------------------------------------
def read_portrait(path, size):
    """Reads an image file as a square portrait of `size` pixels a side.

    Returns rgb (3, size, size) in [-1, 1], not premultiplied, and alpha (1, size, size) in 0..1.
    """
    image = open_image(path)
    if min(image.size) < 16:
        rh.stop(
            f'{path}: {image.width} x {image.height} pixels are too few for a portrait; '
            'give at least 16 x 16'
        )
    square = Image.fromarray(squared(np.asarray(image)))

    # Premultiplied meanwhile, as in `reduced`.
    square = square.convert('RGBa').resize((size, size), Image.LANCZOS).convert('RGBA')
    rgba = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
    return rgba[:3] * 2 - 1, rgba[3:]


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


# Transforms files ---------------------------------------------------------------------------------
def read_transforms(path):
    """Reads a transforms*.json and returns its dict.

    Each of meta['frames'] then has `transform_matrix`, a finite float32 array (4, 4), and `path`,
    an image file in the JSON's folder.
    """
    meta = read_json(path)
    frames = meta.get('frames') if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not frames:
        rh.stop(
            f'{path}: has no frames; expected a list of '
            '{"file_path", "transform_matrix"} under "frames"'
        )
    for i, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get('file_path'), str):
            rh.stop(f'{path}: frame {i} has no file_path')
        frame['transform_matrix'] = read_matrix(frame, f'{path}: transform_matrix of frame {i}')
        frame['path'] = find_image(Path(path), frame['file_path'])
    return meta


def read_json(path):
    """Parses the JSON file of an avatar; stops where that is not possible."""
    try:
        too_long = Path(path).stat().st_size > MAX_JSON
        # An empty text is no JSON either, so a file that is too long ends in the same line.
        text = '' if too_long else Path(path).read_text(encoding='utf-8')
        return json.loads(text)
    except FileNotFoundError:
        rh.stop(
            f'{path}: there is no such file; an avatar is a folder with '
            'transforms.json or transforms_train.json'
        )
    except (OSError, ValueError, RecursionError) as error:
        rh.stop(f'{path}: not readable as JSON ({str(error)[:80]})')


def read_matrix(frame, where):
    """Reads the camera-to-world matrix of a frame as a float32 array (4, 4)."""
    matrix = np.zeros(0)
    with contextlib.suppress(TypeError, ValueError, ArithmeticError):
        matrix = np.array(frame.get('transform_matrix'), dtype=np.float32)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        rh.stop(f'{where} is not a finite 4 x 4 matrix')
    return matrix


def find_image(json_path, name):
    """Finds the image that a file_path means.

    It is relative to the JSON's folder, never outside of it, with or without its extension.
    """
    folder = json_path.parent.resolve()
    path = (folder / name.replace('\\', '/')).resolve()
    if not path.is_relative_to(folder):
        rh.stop(f'{json_path}: file_path {name!r} leaves the folder of the avatar')
    for suffix in ('', *IMAGE_SUFFIXES):
        image = path.with_name(path.name + suffix)
        if image.is_file():
            return image
    rh.stop(f'{json_path}: image {name!r} is missing')


def read_frames(folder, split):
    """Returns the dict of a transforms file and its frames of `split`, 'train' or 'test'.

    A lone transforms.json gives every eighth frame, from the fifth on, to the test. A folder with
    named splits may lack the test; it then has no frames.
    """
    named = Path(folder) / f'transforms_{split}.json'
    if named.is_file():
        meta = read_transforms(named)
        return meta, meta['frames']
    if named.with_name(TRAIN).is_file():
        return {'frames': []}, []

    meta = read_transforms(named.with_name(WHOLE))
    held_out = split == 'test'
    return meta, [f for i, f in enumerate(meta['frames']) if (i % 8 == 4) == held_out]


# Intrinsics ---------------------------------------------------------------------------------------
def read_intrinsics(meta, frame, width, height, where):
    """Reads (fx, fy, cx, cy) in pixels of an image that has width x height pixels.

    Values of the frame come before those of the file. The size that is written there, if any, must
    be the image's own. `where` begins the messages.
    """
    values = {**meta, **frame}
    try:
        w, h = read_size(values, width, height)
        fx, fy = read_focal_lengths(values, w, h)
        cx, cy = read_principal_point(values, w, h)
    except KeyError:
        rh.stop(f'{where}: gives neither camera_angle_x nor fl_x')
    except (TypeError, ValueError, ArithmeticError):
        rh.stop(f'{where}: camera_angle_x, fl_x, fl_y, cx, cy, w and h must be numbers')

    if not all(map(math.isfinite, (fx, fy, cx, cy))) or fx <= 0 or fy <= 0:
        rh.stop(f'{where}: the focal length must be positive and finite, not {fx}, {fy}')
    if (w, h) != (width, height):
        name = frame['path'].name
        rh.stop(f'{where}: says {w:g} x {h:g} pixels, but {name} has {width} x {height}')
    return fx, fy, cx, cy


def read_size(values, width, height):
    """Reads the size that the intrinsics are meant for; by default it is the image's."""
    return float(values.get('w', width)), float(values.get('h', height))


def read_focal_lengths(values, w, h):
    """Reads fx and fy; pixels are square where nothing is said of y. KeyError without an x."""
    fx = read_focal_length(values, 'x', w)
    if 'fl_y' in values or 'camera_angle_y' in values:
        return fx, read_focal_length(values, 'y', h)
    return fx, fx


def read_focal_length(values, axis, side):
    """Reads a focal length in pixels, or works it out from the field of view in radians."""
    if f'fl_{axis}' in values:
        return float(values[f'fl_{axis}'])
    angle = float(values[f'camera_angle_{axis}'])
    return side / 2 / math.tan(angle / 2)


def read_principal_point(values, w, h):
    """Reads cx and cy; by default they are the centre of the image."""
    return float(values.get('cx', w / 2)), float(values.get('cy', h / 2))


# Views --------------------------------------------------------------------------------------------
def load_views(folder, split, box, downscale=1, most=None, pick=None):
    """Loads the posed images of a split as rh.Views; None where the split is empty.

    The box (centre, half side) of `read_box` becomes [-1, 1]^3. Images are shrunk by the integer
    `downscale`. `most` and `pick` select frames: see `some_frames`.
    """
    meta, frames = read_frames(folder, split)
    where = f'{folder}: {split} set'
    views = []
    for frame in some_frames(frames, most, pick):
        view = read_view(meta, frame, downscale, where)
        height, width = view.image.shape[:2]
        if views and view.image.shape != views[0].image.shape:
            rh.stop(f'{frame["path"]}: {width} x {height}; other views have another size')
        views.append(view)
    if not views:
        return None

    images = torch.from_numpy(np.stack([view.image for view in views]))
    matrices = torch.from_numpy(np.stack([view.c2w for view in views]))
    intrinsics = torch.tensor([view.intrinsics for view in views])
    has_alpha = bool((images[..., 3] < 255).any())
    return rh.Views(images, into_box(matrices, box), intrinsics, has_alpha)


def some_frames(frames, most, pick):
    """Selects the frame number `pick`, or `most` evenly spread frames, or all of them."""
    if pick is not None:
        frames = [frames[pick % len(frames)]]
    if most and len(frames) > most:
        frames = [frames[i * len(frames) // most] for i in range(most)]
    return frames


class View(NamedTuple):
    """Holds one frame as its files give it, checked."""
    image: np.ndarray                   # (H, W, 4) uint8, straight alpha
    c2w: np.ndarray                     # (4, 4) float32, in the files' world
    intrinsics: list                    # fx, fy, cx, cy in pixels of `image`


def read_view(meta, frame, downscale, where):
    """Reads the image and the camera of a frame, shrunk by `downscale`."""
    image = open_image(frame['path'])
    intrinsics = read_intrinsics(meta, frame, *image.size, where)
    if downscale > 1:
        image = reduced(image, downscale)
    in_pixels = [value / downscale for value in intrinsics]
    return View(np.asarray(image), frame['transform_matrix'], in_pixels)


def into_box(matrices, box):
    """Maps cameras (V, 4, 4) of the files' world to the one in which the box is [-1, 1]^3.

    Axes get unit length, since some files put a scale into their matrices.
    """
    centre, half = box
    c2w = matrices.clone()
    c2w[:, :3, :3] = F.normalize(matrices[:, :3, :3], dim=1)
    c2w[:, :3, 3] = (matrices[:, :3, 3] - centre) / half
    return c2w


# The box ------------------------------------------------------------------------------------------
def read_box(folder):
    """Finds the cube that holds the avatar: (centre (3,), half side) in its files' world.

    The transforms file may name it by `aabb`, or as instant-ngp does by `scale` and `offset`.
    Otherwise the images tell it: see `measure_box`.
    """
    meta, frames = read_frames(folder, 'train')
    if 'aabb' not in meta and 'scale' not in meta:
        matrices = np.stack([frame['transform_matrix'] for frame in frames])
        return measure_box(folder, torch.from_numpy(matrices))

    with contextlib.suppress(TypeError, ValueError, ArithmeticError, RuntimeError):
        centre, half = box_of_aabb(meta) if 'aabb' in meta else box_of_scale(meta)
        if centre.shape == (3,) and centre.isfinite().all() and 0 < half < math.inf:
            return centre, half
    rh.stop(
        f'{folder}: aabb (or scale and offset) of the transforms file must be '
        'finite numbers that span a box'
    )


def box_of_aabb(meta):
    """Returns the cube around `aabb`: [[x, y, z], [x, y, z]], lowest and highest corner."""
    lowest, highest = torch.tensor(meta['aabb'], dtype=torch.float32)
    return (lowest + highest) / 2, float((highest - lowest).max() / 2)


def box_of_scale(meta):
    """Returns instant-ngp's cube: scale * x + offset is in the unit cube, times aabb_scale."""
    scale = float(meta['scale'])
    offset = torch.tensor(meta.get('offset', [0.5] * 3), dtype=torch.float32)
    return (0.5 - offset) / scale, 0.5 * float(meta.get('aabb_scale', 1)) / scale


def measure_box(folder, c2w):
    """Finds the cube of `read_box` from the cameras (V, 4, 4) and the silhouettes.

    The first guess is the cube around the point nearest to all optical axes, as wide as the cameras
    are far. The visual hull in it tells the extent, to which 4 % are added. Without alpha there is
    no hull; then 0.6 of the guess stay, which lie inside the cameras.
    """
    G = 64                              # cells a side
    centre = nearest_to_axes(c2w)
    half = float((c2w[:, :3, 3] - centre).norm(dim=-1).median())

    # The second pass measures in the box of the first one, where cells are finer.
    for _ in range(2):
        views = load_views(folder, 'train', (centre, half), most=24)
        if not views.has_alpha:
            return centre, 0.6 * half
        cells = rh.visual_hull(views, G, seen_by=0.5).nonzero().float()     # (cells, 3)
        if not len(cells):
            rh.stop(
                f'{folder}: the silhouettes of the views have no point in common; '
                'are the camera poses right?'
            )
        lowest = cells.amin(0) / (G // 2) - 1                               # in [-1, 1]^3
        highest = (cells.amax(0) + 1) / (G // 2) - 1
        widest = float((highest - lowest).max())
        centre = centre + half * (lowest + highest) / 2
        half = half * min(1.0, 1.04 * widest / 2)
    return centre, half


def nearest_to_axes(c2w):
    """Finds the point (3,) that is nearest to the optical axes of cameras (V, 4, 4)."""
    axis = F.normalize(c2w[:, :3, 2], dim=-1)
    position = c2w[:, :3, 3]

    # In the least squares: with P, which projects onto the plane that is normal to an axis, the
    # point x solves sum(P) x = sum(P position).
    project = torch.eye(3) - axis[:, :, None] * axis[:, None]
    projected = project @ position[..., None]
    return torch.linalg.lstsq(project.sum(0), projected.sum(0)).solution[:, 0]


# Folders ------------------------------------------------------------------------------------------
def portrait_path(folder):
    """Finds the portrait of an avatar: portrait.* where there is one, else a frontal view.

    That is the training view whose camera stands most in front: level, its z axis along -Y.
    """
    for suffix in IMAGE_SUFFIXES:
        path = Path(folder) / f'portrait{suffix}'
        if path.is_file():
            return path

    def frontal(frame):
        return -frame['transform_matrix'][1, 2]

    _, frames = read_frames(folder, 'train')
    return max(frames, key=frontal)['path']


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
