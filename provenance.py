"""What files were made with, and whether that is what lies beside them.

Planes mean nothing under another decoder, a base model nothing beside another VAE. So a file
carries `made_with`, a dict of numbers that tell what it was made with from anything else, and who
reads it compares. Files without, as those of weights/, are taken as they are.
"""
import os
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

import rodinhd as rh
import scenes


def fingerprint(model):
    """A number that tells the weights of models apart."""
    number = 0
    for p in model.parameters():
        number = zlib.crc32(p.detach().float().cpu().contiguous().numpy().tobytes(), number)
    return number


def of_tensor(x):
    """A checksum of a tensor's bytes."""
    return zlib.crc32(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def compare(path, made_with, beside, advice):
    """Stops where a file was made with something else than what lies beside it.

    beside: {name: (where it lies, its fingerprint)}; what the file does not know is not compared.
    """
    if not isinstance(made_with, dict):
        made_with = {}
    for name, (place, number) in beside.items():
        if made_with.get(name) not in (None, number):
            rh.stop(f'{path}: was made with another {name} than {place}; {advice}')


# Avatars ------------------------------------------------------------------------------------------
def files_of(folder):
    """The files that fitting an avatar reads: its cameras, and the images (and masks) of these."""
    folder = Path(folder)
    files = sorted(folder.glob('transforms*.json'))
    for split in ('train', 'test'):
        _, frames = scenes.read_frames(folder, split)
        for frame in frames or ():
            files += [value for value in frame.values() if isinstance(value, Path)]
    return list(dict.fromkeys(files))


def outline_of(folder):
    """Numbers that are cheap to find: `outline` of the cameras and the sizes of all images, and
    `times` of when these were written."""
    folder = Path(folder)
    outline = 0
    times = 0
    for path in files_of(folder):
        status = path.stat()
        text = f'{path.name} {status.st_size}'.encode(errors='surrogateescape')
        outline = zlib.crc32(text, outline)
        if path.suffix == '.json':
            outline = zlib.crc32(path.read_bytes(), outline)
        times = zlib.crc32(str(status.st_mtime_ns).encode(), times)
    return {'outline': outline, 'times': times}


def of_avatar(folder, known=None):
    """The numbers of an avatar's data: its outline, `data` of the bytes of all its files, and the
    quarter turns of its world for the face to be in `front`.

    known: those of before, which hold where no file was written since.
    """
    numbers = outline_of(folder)
    if known and all(known.get(name) == numbers[name] for name in numbers):
        return known
    front = scenes.front_turns(folder)
    return {**numbers, 'data': data_of(folder), 'front': front}


def data_of(folder):
    """A number of the bytes of all files of an avatar."""
    data = 0
    for path in files_of(folder):
        data = zlib.crc32(path.read_bytes(), data)
    return data


def same_avatar(folder, made_with):
    """Whether a file was made with the very images and cameras that a folder holds now."""
    if not isinstance(made_with, dict) or 'data' not in made_with:
        return True
    if made_with.get('front', 0) != scenes.front_turns(folder):
        return False
    return of_avatar(folder, made_with)['data'] == made_with['data']


def check_avatar(path, made_with, folder):
    """Stops where planes are of another avatar than that of a folder, or of its world turned
    otherwise. Images are read where one of them was written since."""
    if not isinstance(made_with, dict) or 'outline' not in made_with:
        return
    numbers = outline_of(folder)
    same = made_with['outline'] == numbers['outline']
    if same and 'data' in made_with and made_with.get('times') != numbers['times']:
        same = made_with['data'] == data_of(folder)
    if not same:
        rh.stop(
            f'{path}: was fitted to other images or cameras than those in {folder}; '
            'delete it and fit it again with python fit.py, or give its own --data'
        )
    front = made_with.get('front', 0)  # of before, worlds were not turned
    if front != scenes.front_turns(folder):
        rh.stop(
            f'{path}: was fitted with the front elsewhere than it is taken to be in {folder} now; '
            'is OpenCV installed as it was (it finds the face), or portrait.* another? Put that '
            'back, or delete it and fit it again with python fit.py'
        )


# Portraits ----------------------------------------------------------------------------------------
def of_portrait(folder, size):
    """The portrait of an avatar for its planes file, which training reads it from: `pixels`, uint8
    RGBA (4, size, size), their checksum `sum`, and the `name` and checksum of their `source`."""
    path = scenes.portrait_path(folder)
    pixels = scenes.pixels_of_portrait(folder, size)
    return {
        'pixels': pixels,
        'sum': of_tensor(pixels),
        'name': Path(os.path.relpath(path, folder)).as_posix(),  # folder may have .. in it
        'source': zlib.crc32(path.read_bytes()),
    }


def kept_portrait(folder, kept, size):
    """The pixels that of_portrait kept, where they are of this size and of the portrait that the
    folder holds now; else None."""
    if not isinstance(kept, dict) or not kept.keys() >= {'pixels', 'sum', 'name', 'source'}:
        return None
    pixels = kept['pixels']
    path = scenes.own_portrait(folder) or Path(folder) / str(kept['name'])
    is_same = path.name == Path(str(kept['name'])).name and path.is_file()
    if not is_same or zlib.crc32(path.read_bytes()) != kept['source']:
        return None
    if not torch.is_tensor(pixels) or pixels.dtype != torch.uint8:
        return None
    fits = tuple(pixels.shape) == (4, size, size) and of_tensor(pixels) == kept['sum']
    return pixels if fits else None


# Files --------------------------------------------------------------------------------------------
END_OF_FILE = 4096  # bytes in which a checkpoint keeps its table of contents


def of_file(path):
    """A number of what a checkpoint holds. It is of the end of the file, where the checksums of its
    parts are, so the file is not read: a hundred thousand of them take three seconds."""
    with open(path, 'rb') as file:
        length = file.seek(0, 2)
        file.seek(max(length - END_OF_FILE, 0))
        return zlib.crc32(file.read())


def of_files(paths):
    """A number of what many checkpoints hold; each rank looks at its share of them."""
    rank = dist.get_rank()
    world = dist.get_world_size()
    total = 0
    for path in paths[rank::world]:
        name = Path(path).name.encode(errors='surrogateescape')
        total += zlib.crc32(name, of_file(path))
    parts = [None] * world
    dist.all_gather_object(parts, total)
    return sum(parts)
