"""Cameras of transforms files: reads intrinsics and lenses, and takes out the distortion of these.

A value of a frame comes before the file's, whatever the names of the two are, and what belongs
together (x and y, all coefficients of a lens) is taken from one of them.
"""
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import images
import rodinhd as rh

# Fields that change what the others mean, and that nothing here understands
REFUSED = {
    'from_na': 'other axes',
    'from_mitsuba': 'other axes',
    'rolling_shutter': 'a camera that moves during the exposure',
    'latlong': 'panoramas',
    'equirectangular': 'panoramas',
    'ftheta_p0': 'F-theta lenses',
    'white_transparent': 'transparency by colour',
    'black_transparent': 'transparency by colour',
    'mask_color': 'masks by colour',
    'fix_premult': 'premultiplied images',
}
PINHOLES = ('PINHOLE', 'SIMPLE_PINHOLE', 'PERSPECTIVE')
PERSPECTIVES = ('OPENCV', 'FULL_OPENCV', 'SIMPLE_RADIAL', 'RADIAL')
FISHEYES = ('OPENCV_FISHEYE', 'SIMPLE_RADIAL_FISHEYE', 'RADIAL_FISHEYE')
COEFFICIENTS = ('k1', 'k2', 'k3', 'k4', 'k5', 'k6', 'p1', 'p2')
PRISMS = ('s1', 's2', 's3', 's4', 'k7', 'k8')  # of lenses that nothing here understands

LEAST_FOCAL, MOST_FOCAL = 0.05, 1000  # in widths of the image
FARTHEST_CENTRE = 10  # of the principal point from the image's middle, in widths
REFINED = 2 ** 20  # larger images are resampled once, without the refinement


# Intrinsics ---------------------------------------------------------------------------------------
def given(source, *names):
    """The values of a dict that it really gives: null is as good as absent."""
    return {name: source[name] for name in names if source.get(name) is not None}


def number(source, name, where):
    """Reads a finite number of a dict; stops where it is none."""
    value = source[name]
    try:
        if isinstance(value, bool):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        rh.stop(f'{where}: {name} must be a finite number, not {str(value)[:40]!r}')
    return result


def first_with(sources, *names):
    """The first of several dicts that gives one of these names; {} where none does."""
    return next((source for source in sources if given(source, *names)), {})


def read_size(meta, frame, where):
    """Reads the size (w, h) that the frame's image is said to have; None where nothing is said."""
    return said_size(first_with((frame, meta), 'w', 'h'), where)


def said_size(source, where):
    """Reads w and h of a dict; None unless it gives both."""
    if len(given(source, 'w', 'h')) < 2:
        return None
    size = number(source, 'w', where), number(source, 'h', where)
    if min(size) < 1:
        rh.stop(f'{where}: w and h must be positive, not {size[0]:g} x {size[1]:g}')
    return size


def read_intrinsics(meta, frame, width, height, where):
    """Reads (fx, fy, cx, cy) in pixels of an image that has width x height pixels.

    Lengths in pixels belong to the w and h that stand beside them, else to those of the frame or
    the file, else to the image; an image of another scale has them scaled. `where` begins the
    messages.
    """
    sources = (frame, meta)
    common = read_size(meta, frame, where) or (width, height)
    x_names = ('fl_x', 'camera_angle_x', 'x_fov')
    y_names = ('fl_y', 'camera_angle_y', 'y_fov')

    source = first_with(sources, *x_names, *y_names)
    if not source:
        rh.stop(f'{where}: gives neither camera_angle_x nor fl_x')
    scale_x, scale_y = scales(said_size(source, where) or common, width, height, frame, where)
    w, h = width / scale_x, height / scale_y
    fx = read_focal_length(source, 'x', w, where)
    fy = read_focal_length(source, 'y', h, where)
    # Pixels are square where nothing is said of one of the two.
    if fx is None:
        fx = fy
    if fy is None:
        fy = fx
    fx, fy = fx * scale_x, fy * scale_y
    for focal, name in ((fx, 'x'), (fy, 'y')):
        if not LEAST_FOCAL * width <= focal <= MOST_FOCAL * width:
            rh.stop(
                f'{where}: the focal length fl_{name} (or the angle) must be positive and give a '
                f'field of view that can be seen with, not {focal:.4g} pixels of {width}'
            )

    cx, cy = width / 2, height / 2
    source = first_with(sources, 'cx', 'cy')
    if source:
        scale_x, scale_y = scales(said_size(source, where) or common, width, height, frame, where)
        if given(source, 'cx'):
            cx = number(source, 'cx', where) * scale_x
        if given(source, 'cy'):
            cy = number(source, 'cy', where) * scale_y
    if 0 < cx < 1 and 0 < cy < 1 and min(width, height) >= 16:
        rh.stop(f'{where}: cx, cy = {cx:.4g}, {cy:.4g} look like shares of the image; give pixels')
    if max(abs(cx - width / 2), abs(cy - height / 2)) > FARTHEST_CENTRE * max(width, height):
        rh.stop(f'{where}: cx, cy = {cx:.4g}, {cy:.4g} lie far outside of the image')
    return fx, fy, cx, cy


def scales(size, width, height, frame, where):
    """By how much an image is wider and higher than the size that its camera is said to have."""
    w, h = size
    if (w, h) == (width, height):
        return 1.0, 1.0
    name = frame['path'].name
    if not images.same_shape((width, height), size):
        rh.stop(f'{where}: says {w:g} x {h:g} pixels, but {name} has {width} x {height}')
    rh.note(
        f'{where}: images have {width} x {height} pixels, w and h say {w:g} x {h:g}; '
        'intrinsics are scaled'
    )
    return width / w, height / h


def read_focal_length(source, axis, side, where):
    """Reads a focal length in pixels of an image `side` wide; None where nothing is said of it.

    `fl` is in pixels, `camera_angle` in radians and `fov` in degrees, as instant-ngp has them. They
    must agree where there are several.
    """
    found = {}
    if given(source, f'fl_{axis}'):
        found[f'fl_{axis}'] = number(source, f'fl_{axis}', where)
    for name, unit in ((f'camera_angle_{axis}', 1.0), (f'{axis}_fov', math.pi / 180)):
        if given(source, name):
            angle = number(source, name, where) * unit
            if not 0 < angle < math.pi:
                rh.stop(
                    f'{where}: {name} = {source[name]} is no angle of view; '
                    f'camera_angle_{axis} is in radians, {axis}_fov in degrees'
                )
            found[name] = side / 2 / math.tan(angle / 2)

    lengths = list(found.values())
    if lengths and min(lengths) > 0 and max(lengths) > 1.01 * min(lengths):
        told = ' and '.join(f'{name} ({length:.1f} pixels)' for name, length in found.items())
        rh.stop(f'{where}: {told} contradict each other; take one of them away')
    return lengths[0] if lengths else None


# Lenses -------------------------------------------------------------------------------------------
class Lens(NamedTuple):
    """How a lens departs from a pinhole, by OpenCV's models."""
    fisheye: bool
    k: tuple  # k1 to k6; of a fisheye k1 to k4 and zeros
    p: tuple  # p1, p2


def read_lens(meta, frame, where):
    """Reads the Lens of a frame; None for a pinhole. Stops at what is not supported."""
    sources = (frame, meta)
    for source in sources:
        for name, what in REFUSED.items():
            if source.get(name):
                rh.stop(
                    f'{where}: {name} = {str(source[name])[:40]} ({what}) is not supported; '
                    'convert the images to those of plain pinhole cameras'
                )
    source = first_with(sources, 'camera_model')
    model = str(source.get('camera_model') or '').upper()
    if not model:
        is_fisheye = first_with(sources, 'is_fisheye').get('is_fisheye', False)
        if is_fisheye not in (False, True):  # 0 and 1 are the same
            rh.stop(f'{where}: is_fisheye must be true or false, not {str(is_fisheye)[:40]!r}')
        model = 'OPENCV_FISHEYE' if is_fisheye else 'OPENCV'
    if model not in (*PINHOLES, *PERSPECTIVES, *FISHEYES):
        rh.stop(
            f'{where}: camera_model = {model[:40]} is not supported; undistort the images '
            '(colmap image_undistorter), or give OPENCV or OPENCV_FISHEYE'
        )

    fisheye = model in FISHEYES
    values = read_coefficients(sources, fisheye, where)
    if model in PINHOLES and any(values.values()):
        rh.stop(f'{where}: camera_model = {model} has no distortion, but coefficients are given; '
                'give OPENCV, or take them away')
    k = tuple(values[f'k{i}'] for i in range(1, 7))
    p = (values['p1'], values['p2'])
    if fisheye and any((*k[4:], *p)):
        rh.stop(f'{where}: k5, k6, p1 and p2 do not belong to camera_model = {model}')
    return Lens(fisheye, k, p) if fisheye or any((*k, *p)) else None


def read_coefficients(sources, fisheye, where):
    """Reads k1 to k6, p1 and p2 as a dict, 0 where they are not given."""
    source = first_with(sources, *COEFFICIENTS, *PRISMS, 'distortion_params')
    for name in given(source, *PRISMS):
        if number(source, name, where):
            rh.stop(f'{where}: the coefficient {name} is not supported; undistort the images')
    if given(source, 'distortion_params'):
        return read_distortion_params(source, fisheye, where)
    values = dict.fromkeys(COEFFICIENTS, 0.0)
    for name in given(source, *COEFFICIENTS):
        values[name] = number(source, name, where)
    return values


def read_distortion_params(source, fisheye, where):
    """Reads nerfstudio's list: k1, k2, k3, k4, p1, p2, where k4 is a fisheye's alone."""
    params = source['distortion_params']
    if not isinstance(params, list) or len(params) != 6:
        rh.stop(f'{where}: distortion_params must be a list of 6 numbers: k1 to k4, p1, p2')
    listed = dict(zip(('k1', 'k2', 'k3', 'k4', 'p1', 'p2'), params, strict=True))
    values = {name: number(listed, name, where) for name in listed}
    if values['k4'] and not fisheye:
        rh.stop(f'{where}: the k4 of distortion_params is a fisheye\'s alone; undistort the images')
    return {'k5': 0.0, 'k6': 0.0, **values}


def distort(lens, x, y):
    """Maps points x, y at depth 1 of a pinhole camera to where the lens draws them."""
    k1, k2, k3, k4, k5, k6 = lens.k
    p1, p2 = lens.p
    r2 = x * x + y * y
    radial = radius_of(lens, np.sqrt(r2)) / np.sqrt(np.maximum(r2, 1e-18))
    radial = np.where(r2 < 1e-18, 1.0, radial)
    dx = 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    dy = p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    return x * radial + dx, y * radial + dy


def radius_of(lens, r):
    """The distance from the middle that the lens draws at, for distances r of a pinhole."""
    k1, k2, k3, k4, k5, k6 = lens.k
    if lens.fisheye:
        angle = np.arctan(r)
        a2 = angle * angle
        return angle * (1 + a2 * (k1 + a2 * (k2 + a2 * (k3 + a2 * k4))))
    r2 = r * r
    above = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    below = 1 + r2 * (k4 + r2 * (k5 + r2 * k6))
    return r * above / below


def growing(lens, most):
    """Distances r from 0 to `most`, as far as the lens draws larger ones further out.

    Beyond, a polynomial folds back, and what it says is of no lens.
    """
    with np.errstate(all='ignore'):
        r = np.linspace(0, most, 4096)
        drawn = radius_of(lens, r)
        grows = np.diff(drawn) > 0
        fold = len(grows) if grows.all() else int(grows.argmin())
    return r[:fold + 1], drawn[:fold + 1]


class Maps(NamedTuple):
    """Where pixels of the pinhole's image are in the lens's image, and the other way round."""
    there: torch.Tensor  # (1, H, W, 2), as F.grid_sample wants it
    back: torch.Tensor  # the same of the inverse
    unknown: np.ndarray  # (H, W) bool: pixels of the pinhole that the lens's image lacks
    known_back: torch.Tensor  # (1, 1, H, W): pixels of the lens that are in the pinhole's image


@functools.lru_cache(4)
def maps_of(lens, intrinsics, width, height):
    """Works out the Maps of a lens; the pinhole has the same intrinsics and size."""
    fx, fy, cx, cy = intrinsics
    v, u = np.mgrid[:height, :width] + 0.5
    x, y = (u - cx) / fx, (v - cy) / fy

    with np.errstate(all='ignore'):
        xd, yd = distort(lens, x, y)
        there = xd * fx + cx, yd * fy + cy
        most = 2 * float(np.hypot(x, y).max())
        r, drawn = growing(lens, most)
        unknown = ~inside(*there, width, height) | (np.hypot(x, y) > r[-1])

        # The inverse: in turn the tangential part, and the radial one by a table
        xu, yu = x, y
        for _ in range(12):
            xd, yd = distort(lens._replace(k=(0.0,) * 6, fisheye=False), xu, yu)
            xr, yr = x - (xd - xu), y - (yd - yu)
            far = np.hypot(xr, yr)
            factor = np.interp(far, drawn, r, right=np.inf) / np.maximum(far, 1e-9)
            xu, yu = xr * factor, yr * factor
            xu, yu = (np.nan_to_num(z, nan=1e6, posinf=1e6, neginf=-1e6) for z in (xu, yu))
        back = xu * fx + cx, yu * fy + cy

    known_back = torch.from_numpy(inside(*back, width, height))[None, None].float()
    grids = [grid_of(*there, width, height), grid_of(*back, width, height)]
    return Maps(*grids, unknown, known_back)


def inside(u, v, width, height):
    """Whether places u, v in pixels lie in an image."""
    return (u >= 0) & (u <= width) & (v >= 0) & (v <= height)


def grid_of(u, v, width, height):
    """Turns places u, v (H, W) in pixels into a grid of F.grid_sample."""
    grid = np.stack([2 * u / width - 1, 2 * v / height - 1], axis=-1)
    grid = np.nan_to_num(grid, nan=-9, posinf=9, neginf=-9).clip(-9, 9)
    return torch.from_numpy(grid)[None].float()


def undistort(image, unknown, lens, intrinsics, where):
    """Makes of a lens's image the one that a pinhole of the same intrinsics has.

    Takes image (H, W, 4) uint8 with straight alpha and unknown (H, W) bool or None, and returns
    both; what the lens did not see is unknown, and transparent.
    """
    height, width = image.shape[:2]
    maps = maps_of(lens, tuple(intrinsics), width, height)
    if maps.unknown.mean() > 0.8:
        rh.stop(f'{where}: the lens (k1, k2, ... = {lens.k}) sees too little of the image')

    rgba = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]
    rgba[:, :3] *= rgba[:, 3:]
    result = F.grid_sample(rgba, maps.there, 'bicubic', 'border', align_corners=False)
    if width * height <= REFINED:
        result = refined(result, rgba, maps)

    result = result.clamp(0, 1)
    result[:, :3] /= result[:, 3:].clamp(min=1e-3)
    pixels = (255 * result[0].clamp(0, 1)).round().byte().permute(1, 2, 0).numpy().copy()

    lost = maps.unknown
    if unknown is not None:
        mask = torch.from_numpy(unknown)[None, None].float()
        lost = lost | (F.grid_sample(mask, maps.there, align_corners=False)[0, 0].numpy() > 0.01)
    pixels[lost] = 0
    return pixels, lost


def refined(result, rgba, maps, rounds=12):
    """Sharpens what one interpolation has blurred: drawn through the lens again, it must give the
    lens's image (iterative back-projection). Without, edges are 8 dB worse.
    """
    for _ in range(rounds):
        drawn = F.grid_sample(result, maps.back, 'bilinear', 'border', align_corners=False)
        error = (rgba - drawn) * maps.known_back
        result = result + F.grid_sample(error, maps.there, align_corners=False)
        result = result.clamp(0, 1)
    return result
