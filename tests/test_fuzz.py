"""Files from strangers: mutated avatars, portraits and checkpoints give finite content or one line,
never a traceback, and soon.

    FUZZ=3000 python -m pytest tests/test_fuzz.py    tries that many of each kind
"""
import json
import os
import random
import shutil
import time

import pytest
import torch
from PIL import Image

import rodinhd as rh
import running
import scenes

hypothesis = pytest.importorskip('hypothesis')
st = hypothesis.strategies

many = hypothesis.settings(
    max_examples=int(os.environ.get('FUZZ', 60)),
    deadline=None,
    database=None,
    derandomize='FUZZ' not in os.environ,
    suppress_health_check=list(hypothesis.HealthCheck),
)
seeds = st.integers(0, 2 ** 32)


def lists_and_dicts(inner):
    """What a JSON file may hold besides single values."""
    keys = st.text(max_size=5)
    return st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=3)


single_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
VALUES = st.recursive(single_values, lists_and_dicts, max_leaves=9)


def mutated(data, seed):
    """Returns bytes with a few bits flipped, pieces cut out, repeated, moved or overwritten."""
    rng = random.Random(seed)
    data = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        first = rng.randrange(len(data) + 1)
        piece = slice(first, first + rng.choice((1, 2, 4, 16, 200)))
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[first % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[piece]
        elif kind == 2:
            data[first:first] = data[piece] * rng.randint(1, 3)
        elif kind == 3:
            size = piece.stop - piece.start
            data[piece] = bytes(rng.choice((0, 255, 127, rng.randrange(256))) for _ in range(size))
        else:
            del data[rng.randrange(len(data) + 1):]
    return bytes(data)


def is_refused_or_finite(read):
    """Runs read(): its tensors must be finite, or it must end in one line; within 10 seconds of a
    core, and a minute of the clock."""
    began = time.monotonic()
    worked = time.process_time()
    try:
        for tensor in read():
            assert tensor.isfinite().all()
    except rh.Stop as error:
        message = str(error)
        assert '\n' not in message, message
    assert time.process_time() - worked < 10
    assert time.monotonic() - began < 60


def avatar_tensors(folder):
    """Reads all that an avatar's folder says."""
    centre, half = scenes.read_box(folder)
    yield centre
    yield torch.tensor(half)
    views = scenes.load_views(folder, 'train', (centre, half), most=3)
    yield views.c2w
    yield views.intrinsics
    yield views.images
    assert views.images.numel() < 2 ** 28
    if not (views.unknown is not None and views.unknown.all()):
        yield from rh.Rays(views, 'cpu').draw(64, torch.Generator().manual_seed(0))
    yield from scenes.portrait_of(folder, 64)


@pytest.fixture(scope='module')
def avatar(data, tmp_path_factory):
    """A copy of an avatar, whose JSON file each example writes anew."""
    folder = tmp_path_factory.mktemp('fuzz') / 'avatar'
    shutil.copytree(data / 'avatar_0000', folder)
    return folder


@many
@hypothesis.given(seed=seeds)
def test_mutated_bytes_of_a_transforms_file(avatar, data, seed):
    original = (data / 'avatar_0000/transforms_train.json').read_bytes()
    (avatar / 'transforms_train.json').write_bytes(mutated(original, seed))
    is_refused_or_finite(lambda: avatar_tensors(avatar))


def replace_somewhere(meta, draw):
    """Replaces a value that lies somewhere in nested lists and dicts."""
    place = meta
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = draw(st.sampled_from(keys))
        inner = place[key]
        goes_on = isinstance(inner, (dict, list)) and inner
        if not goes_on or draw(st.booleans()):
            place[key] = draw(VALUES)
            return
        place = inner


FIELDS = [
    'fl_x', 'fl_y', 'w', 'h', 'cx', 'cy', 'x_fov', 'camera_angle_x', 'camera_angle_y', 'scale',
    'offset', 'aabb_scale', 'aabb', 'camera_model', 'is_fisheye', 'k1', 'k2', 'k4', 'p1',
    'distortion_params', 'mask_path', 'train_filenames', 'test_filenames', 'file_path',
    'transform_matrix',
]
NUMBERS = st.sampled_from([
    0, -1, 1e-300, 1e-9, 0.01, 0.3, -0.3, 1, 3, 34, 64, 100, 1e4, 1e9, 1e38, 1e300, 10 ** 400, '5',
    True, 'OPENCV', 'OPENCV_FISHEYE', 'train/r_000.png', 'a\0b', '\ud800', [[-1] * 3, [1] * 3],
    [0] * 16, [0.1, 0, 0, 0, 0, 0],
])


@many
@hypothesis.given(drawn=st.data())
def test_other_values_in_a_transforms_file(avatar, data, drawn):
    meta = json.loads((data / 'avatar_0000/transforms_train.json').read_text())
    meta['frames'] = meta['frames'][:4]
    for _ in range(drawn.draw(st.integers(1, 3))):
        replace_somewhere(meta, drawn.draw)
    others = st.sampled_from(FIELDS)
    meta |= drawn.draw(st.dictionaries(others, NUMBERS | VALUES, max_size=2))
    frames = meta.get('frames')
    if isinstance(frames, list) and frames and isinstance(frames[-1], dict):
        frames[-1] |= drawn.draw(st.dictionaries(others, NUMBERS | VALUES, max_size=2))
    (avatar / 'transforms_train.json').write_text(json.dumps(meta))
    is_refused_or_finite(lambda: avatar_tensors(avatar))


@many
@hypothesis.given(
    seed=seeds, suffix=st.sampled_from(['png', 'jpg', 'webp', 'gif', 'bmp', 'tiff'])
)
def test_mutated_portraits(data, tmp_path_factory, seed, suffix):
    folder = tmp_path_factory.getbasetemp()
    good = folder / f'good.{suffix}'
    if not good.exists():
        image = scenes.open_image(scenes.portrait_path(data / 'avatar_0000'))
        image.convert('RGB' if suffix in ('jpg', 'bmp') else 'RGBA').save(good)
    path = folder / f'portrait.{suffix}'
    path.write_bytes(mutated(good.read_bytes(), seed))
    is_refused_or_finite(lambda: scenes.read_portrait(path, 64))


@many
@hypothesis.given(
    mode=st.sampled_from(['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F', 'LAB']),
    suffix=st.sampled_from(['png', 'jpg', 'webp', 'gif', 'bmp', 'tiff', 'avif', 'ico', 'ppm']),
    size=st.tuples(*2 * [st.sampled_from([1, 2, 15, 16, 17, 64, 255, 2000])]),
    seed=seeds,
)
def test_images_of_all_sizes_and_modes(avatar, data, tmp_path_factory, mode, suffix, size, seed):
    """Images as views and as portraits: whole ones half of the time, damaged ones otherwise."""
    rng = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / f'image.{suffix}'
    try:
        Image.new(mode, size, rng.randrange(2)).save(path)
    except (OSError, ValueError, KeyError, TypeError):
        return  # a format has few modes
    if rng.random() < 0.5:
        path.write_bytes(mutated(path.read_bytes(), seed))
    is_refused_or_finite(lambda: scenes.read_portrait(path, 64))

    meta = json.loads((data / 'avatar_0000/transforms_train.json').read_text())
    meta['frames'] = meta['frames'][:3]
    shutil.copy(path, avatar / 'odd.png')
    frame = rng.choice(meta['frames'])
    frame[rng.choice(['file_path', 'mask_path'])] = 'odd.png'
    (avatar / 'transforms_train.json').write_text(json.dumps(meta))
    is_refused_or_finite(lambda: avatar_tensors(avatar))


@many
@hypothesis.given(seed=seeds)
def test_mutated_checkpoints(tiny, tmp_path_factory, seed):
    folder = tmp_path_factory.getbasetemp()
    good = folder / 'good.pt'
    if not good.exists():
        running.write_model(good, 'decoder', tiny, rh.Decoder(tiny).state_dict(), 0)
    (folder / 'decoder.pt').write_bytes(mutated(good.read_bytes(), seed))

    def weights():
        return running.load_model('decoder', folder, 'cpu').state_dict().values()

    is_refused_or_finite(weights)
