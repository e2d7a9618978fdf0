"""Transforms files: reads the transforms*.json of an avatar, its frames, and what they name.

A frame is a dict as it stands in the file, checked: its matrix is a rotation and a translation, its
image and its masks are files in the avatar's folder. Frames belong to the split 'train' or 'test'.
"""
import contextlib
import functools
import json
import math
import os
import unicodedata
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
import torch.nn.functional as F

import images
import rodinhd as rh

MAX_JSON = 64 * 2 ** 20  # longer files, in bytes, are not parsed
WHOLE = 'transforms.json'
TRAIN = 'transforms_train.json'
SPLITS = ('train', 'val', 'test')
FARTHEST = 1e4  # that a camera may be from the box, in half sides of it


# Transforms files ---------------------------------------------------------------------------------
def read_transforms(path):
    """Reads a transforms*.json and returns its dict.

    Each of meta['frames'] then has `transform_matrix`, a finite float64 array (4, 4), its `number`
    in the file, `path`, an image file in the JSON's folder, and `mask`, `moving` and `alpha`, files
    that say more of its pixels (see with_masks) or None. Frames that have no image or no matrix are
    left out.
    """
    meta = read_meta(path)
    return {**meta, 'frames': usable_frames(path, enumerate(meta['frames']))}


def read_meta(path):
    """Reads a transforms*.json without a look at its frames, which are dicts then."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        return cached_meta(str(path), status.st_mtime_ns, status.st_size)
    return cached_meta(str(path), 0, 0)


@functools.lru_cache(64)
def cached_meta(path, *_):
    """Parses a transforms*.json, once while neither its time nor its size changes."""
    meta = read_json(path)
    frames = meta.get('frames') if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not frames:
        rh.stop(
            f'{path}: has no frames; expected a list of '
            '{"file_path", "transform_matrix"} under "frames"'
        )
    for i, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get('file_path', ''), str | None):
            rh.stop(f'{path}: frame {i} has no file_path')
    return meta


def read_json(path):
    """Parses the JSON file of an avatar; stops where that is not possible."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError('it is no regular file')
        too_long = Path(path).stat().st_size > MAX_JSON
        # An empty text is no JSON either, so a file that is too long ends in the same line.
        return json.loads(b'' if too_long else Path(path).read_bytes())
    except FileNotFoundError:
        rh.stop(
            f'{path}: there is no such file; an avatar is a folder with '
            'transforms.json or transforms_train.json'
        )
    except (OSError, ValueError, RecursionError) as error:
        rh.stop(f'{path}: not readable as JSON ({ascii(str(error))[1:80]})')


def usable_frames(path, numbered, files=None):
    """Checks frames, given as pairs of number and dict, and returns those that can be used.

    files: the Files of that path, if they are there already.
    """
    files = files or Files(path)
    mask_of_all = read_meta(path).get('mask_path')
    frames = []
    matrices = []
    missing = []
    for i, frame in numbered:
        name = frame.get('file_path')
        image = files.find(name, 'file_path') if name else None
        if image is None or frame.get('transform_matrix') is None:
            missing.append(i)
            continue

        matrices.append(read_matrix(frame, f'{path}: transform_matrix of frame {i}'))
        named = frame.get('mask_path')
        if named is None:
            named = mask_of_all
        mask = None if named is None else files.find(named, 'mask_path')
        if named is not None and mask is None:
            rh.stop(f'{path}: mask_path {named!a} of frame {i} is missing')
        frames.append({
            **frame,
            'transform_matrix': matrices[-1],
            'number': i,
            'path': image,
            'mask': mask,
            'moving': files.beside(image, f'dynamic_mask_{image.stem}.png'),
            'alpha': files.beside(image, f'{image.stem}.alpha{image.suffix}'),
        })
    if missing:
        first = frames_named(path, missing[0])
        if not frames:
            rh.stop(f'{path}: no frame has both an image and a matrix; image {first} is missing')
        rh.note(
            f'{path}: {len(missing)} of {len(missing) + len(frames)} frames are left out, they '
            f'have no image or no transform_matrix; the first is {first}'
        )
    if frames:
        check_rotations(path, np.stack(matrices), frames)
    return frames


def frames_named(path, i):
    """How a message calls frame i."""
    return ascii(read_meta(path)['frames'][i].get('file_path') or f'of frame {i}')


# Matrices -----------------------------------------------------------------------------------------
def read_matrix(frame, where):
    """Reads the camera-to-world matrix of a frame as a float64 array (4, 4).

    It may be flat, and may lack its last row.
    """
    matrix = np.zeros(0)
    with contextlib.suppress(TypeError, ValueError, ArithmeticError):
        given = np.array(frame.get('transform_matrix'), dtype=object)
        if not any(isinstance(value, bool) for value in given.flat):
            matrix = given.astype(np.float64)
    if matrix.size in (12, 16) and matrix.shape in ((12,), (16,), (3, 4), (4, 4)):
        matrix = matrix.reshape(-1, 4)
        matrix = np.concatenate([matrix, np.eye(4)[len(matrix):]])
    if matrix.shape != (4, 4) or not (np.abs(matrix) < 1e15).all():
        rh.stop(f'{where} is not a finite 4 x 4 matrix')
    return matrix


def check_rotations(path, matrices, frames):
    """Stops unless matrices (V, 4, 4) are rotations, up to one scale each, and translations."""
    def refuse(bad, what):
        if bad.any():
            number = frames[int(bad.argmax())]['number']
            rh.stop(f'{path}: transform_matrix of frame {number} {what}')

    axes = matrices[:, :3, :3]
    lengths = np.linalg.norm(axes, axis=1)  # (V, 3)
    refuse(lengths.min(1) < 1e-9, 'is no rotation: an axis has no length')
    last = matrices[:, 3] - np.array([0, 0, 0, 1])
    looks_transposed = (np.abs(matrices[:, :3, 3]) < 1e-6).all(1) & (np.abs(last) > 1e-6).any(1)
    refuse(looks_transposed, 'has its translation in the last row; it is transposed')
    refuse((np.abs(last) > 1e-6).any(1), 'has a last row other than 0 0 0 1')

    unit = axes / lengths[:, None]
    off = np.abs(unit.transpose(0, 2, 1) @ unit - np.eye(3)).max((1, 2))
    uneven = lengths.max(1) > 1.02 * lengths.min(1)
    refuse((off > 0.02) | uneven, 'is no rotation: its axes are not normal to one another, '
                                  'or of different lengths')
    refuse(
        np.linalg.det(unit) < 0,
        'mirrors (its determinant is negative), as left-handed worlds do; negate an axis of the '
        'world and the same one of the cameras',
    )


def nearest_to_axes(c2w):
    """Finds the point (3,) that is nearest to the optical axes of cameras (V, 4, 4)."""
    axis = F.normalize(c2w[:, :3, 2], dim=-1)
    middle = c2w[:, :3, 3].mean(0)
    position = c2w[:, :3, 3] - middle

    # In the least squares: with P, which projects onto the plane that is normal to an axis, the
    # point x solves sum(P) x = sum(P position).
    project = torch.eye(3, dtype=c2w.dtype) - axis[:, :, None] * axis[:, None]
    projected = project @ position[..., None]
    return middle + torch.linalg.lstsq(project.sum(0), projected.sum(0)).solution[:, 0]


def looking_at(matrices):
    """How well cameras (V, 4, 4) look at one point: the share of them that have it in front."""
    c2w = torch.from_numpy(matrices)
    offset = nearest_to_axes(c2w) - c2w[:, :3, 3]
    axis = F.normalize(c2w[:, :3, 2], dim=-1)
    along = -(offset * axis).sum(-1)  # cameras look along -z
    aside = (offset + along[:, None] * axis).norm(dim=-1)
    return float(((along > 0) & (aside < 0.5 * along)).float().mean())


def likely_convention(matrices):
    """A guess at what cameras (V, 4, 4) of another convention are, with the way out."""
    flip = np.diag([1.0, -1, -1, 1])
    inverse = np.linalg.inv(matrices)
    guesses = {
        'OpenCV axes (x right, y down, z forward): negate the second and the third column':
            matrices @ flip,
        'world-to-camera matrices: invert them': inverse,
        'world-to-camera matrices with OpenCV axes: invert them, then negate the second and the '
        'third column': inverse @ flip,
    }
    for guess, candidate in guesses.items():
        if looking_at(candidate) > 0.9:
            return f'they look like {guess}'
    return 'expected are camera-to-world matrices with x right, y up, looking along -z'


def check_cameras(path, frames, box):
    """Stops unless most cameras have the box in front of them, and none is absurdly far."""
    centre, half = box
    matrices = np.stack([frame['transform_matrix'] for frame in frames])
    offset = centre.double().numpy() - matrices[:, :3, 3]
    distance = np.linalg.norm(offset, axis=-1)
    if distance.max() > FARTHEST * half:
        number = frames[int(distance.argmax())]['number']
        rh.stop(
            f'{path}: the camera of frame {number} is {distance.max() / half:.3g} half sides of '
            'the box away; are aabb (or scale) and the matrices in the same units?'
        )
    axis = matrices[:, :3, 2] / np.linalg.norm(matrices[:, :3, 2], axis=-1, keepdims=True)
    ahead = -(offset * axis).sum(-1)
    behind = (ahead < 0) & (distance > math.sqrt(3) * half)
    if behind.mean() > 0.5:
        rh.stop(
            f'{path}: the box lies behind {behind.sum()} of {len(frames)} cameras; check aabb and '
            f'the matrices: {likely_convention(matrices)}'
        )


# Files that a transforms file names ---------------------------------------------------------------
def plain_name(name):
    """A file name as it is compared where it is not found as it is written."""
    return unicodedata.normalize('NFC', unquote(name)).casefold()


class Files:
    """The files in the folder of a transforms file; each folder is listed once."""
    def __init__(self, json_path):
        self.json_path = Path(json_path)
        self.root = Path(os.path.abspath(self.json_path.parent))
        self.listed = {}

    def list(self, folder):
        """Names in a folder: {name: name} as they are, {plain name: name} as they compare."""
        if folder not in self.listed:
            names = []
            with contextlib.suppress(OSError):
                names = sorted(os.listdir(folder))
            compared = {plain_name(name): name for name in reversed(names)}
            self.listed[folder] = ({name: name for name in names}, compared)
        return self.listed[folder]

    def beside(self, image, name):
        """A file of this name in the folder of an image, or None."""
        exact, _ = self.list(image.parent)
        return image.parent / name if name in exact else None

    def find(self, name, field):
        """Finds the file that a field means; None where there is none.

        It is relative to the JSON's folder and never outside of it (but a link in the folder is the
        user's own), with or without its extension, and may be url-encoded, or written in another
        case or Unicode form.
        """
        shown = ascii(name)[:120]
        if not isinstance(name, str):
            rh.stop(f'{self.json_path}: {field} {shown} is no name of a file')
        if '\0' in name or any('\ud800' <= character <= '\udfff' for character in name):
            rh.stop(f'{self.json_path}: {field} {shown} holds characters that no file name has')

        path = os.path.normpath(os.path.join(self.root, name.replace('\\', '/')))
        if path != str(self.root) and not Path(path).is_relative_to(self.root):
            rh.stop(
                f'{self.json_path}: {field} {shown} leaves the folder of the avatar; move the '
                'file there, or a link to it'
            )
        *folders, last = Path(path).relative_to(self.root).parts or ('',)
        place = self.root
        for part in folders:
            exact, compared = self.list(place)
            place = place / (exact.get(part) or compared.get(plain_name(part), part))

        exact, compared = self.list(place)
        for names, wanted in ((exact, last), (compared, plain_name(last))):
            for suffix in ('', *images.SUFFIXES):
                found = names.get(wanted + suffix)
                if found is not None and (place / found).is_file():
                    return place / found
        return None


# Splits -------------------------------------------------------------------------------------------
def read_frames(folder, split):
    """Returns the dict of a transforms file and its usable frames of `split`, 'train' or 'test'.

    Named files come first; a folder with named splits may lack the test, and takes the validation
    then, or has no frames. In one file train_filenames and the like tell the frames of a split,
    with validation in place of the test where that is missing; without them, every eighth frame,
    from the fifth on, is of the test.
    """
    path, meta, numbered = frames_of(folder, split)
    if path is None:
        return {'frames': []}, []
    return meta, usable_frames(path, numbered)


def one_frame(folder, split, pick):
    """Returns the dict of a transforms file and the usable frame that is number `pick` of a split,
    modulo their count, or where that cannot be used the next one that can."""
    path, meta, numbered = frames_of(folder, split)
    files = Files(path)
    for i in range(len(numbered)):
        number, frame = numbered[(pick + i) % len(numbered)]
        name = frame.get('file_path')
        has_matrix = frame.get('transform_matrix') is not None
        if name and has_matrix and files.find(name, 'file_path') is not None:
            return meta, usable_frames(path, [(number, frame)], files)[0]
    return meta, usable_frames(path, numbered)[0]  # stops, and says why


def count_frames(folder, split):
    """How many frames a split has, without a look at their images."""
    return len(frames_of(folder, split)[2])


def frames_of(folder, split):
    """Finds the transforms file of a split: its path, its dict, and [(number, frame)]."""
    folder = Path(folder)
    named = [folder / f'transforms_{split}.json']
    if split == 'test':
        named.append(folder / 'transforms_val.json')
    for path in named:
        if path.is_file():
            meta = read_meta(path)
            return path, meta, list(enumerate(meta['frames']))
    if (folder / TRAIN).is_file():
        return None, {'frames': []}, []

    path = folder / WHOLE
    meta = read_meta(path)
    numbered = list(enumerate(meta['frames']))
    if any(meta.get(f'{name}_filenames') is not None for name in SPLITS):
        return path, meta, listed_frames(path, meta, numbered, split)
    held_out = split == 'test'
    return path, meta, [(i, frame) for i, frame in numbered if (i % 8 == 4) == held_out]


def listed_frames(path, meta, numbered, split):
    """Selects the frames that train_filenames, val_filenames or test_filenames list."""
    lists = {}
    for name in SPLITS:
        names = meta.get(f'{name}_filenames') or []
        if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
            rh.stop(f'{path}: {name}_filenames must be a list of names')
        lists[name] = {without_suffix(item) for item in names}

    known = {without_suffix(frame.get('file_path') or '') for _, frame in numbered}
    for name, names in lists.items():
        for unknown in sorted(names - known)[:1]:
            rh.stop(f'{path}: {name}_filenames lists {unknown!a}, which no frame has')
    held_out = lists['test'] or lists['val']
    if lists['train'] & held_out:
        both = sorted(lists['train'] & held_out)[0]
        rh.stop(f'{path}: {both!a} is listed for training and for the test; take one away')

    wanted = held_out if split == 'test' else lists['train']
    if not lists['train'] and split == 'train':
        wanted = known - lists['val'] - lists['test']
        rh.note(f'{path}: lists no training frames; all but those of val and test are taken')
    if not wanted and split == 'train':
        rh.stop(f'{path}: val_filenames and test_filenames leave no frame to train on')
    return [(i, f) for i, f in numbered if without_suffix(f.get('file_path') or '') in wanted]


def without_suffix(name):
    """The name of an image as lists and frames both write it."""
    name = os.path.normpath(name.replace('\\', '/'))
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in images.SUFFIXES else name
