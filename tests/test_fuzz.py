"""Files from strangers: mutated avatars, portraits and checkpoints give finite content or one line, never a traceback, and soon.

FUZZ=3000 python -m pytest tests/test_fuzz.py    tries that many of each kind
"""
import json
import os
import random
import shutil
import time

import pytest
import torch

import rodinhd as rh

hypothesis = pytest.importorskip('hypothesis')
st = hypothesis.strategies
COUNT = int(os.environ.get('FUZZ', 60))
many = hypothesis.settings(max_examples=COUNT, deadline=None, database=None, derandomize='FUZZ' not in os.environ,
                           suppress_health_check=list(hypothesis.HealthCheck))
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=9)


def mutated(data, seed):
    """Bytes with a few bits flipped, pieces cut out, repeated, moved or overwritten."""
    rng, data = random.Random(seed), bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 16, 200))
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:at + size]
        elif kind == 2:
            data[at:at] = data[at:at + size] * rng.randint(1, 3)
        elif kind == 3:
            data[at:at + size] = bytes(rng.choice((0, 255, 127, rng.randrange(256))) for _ in range(size))
        else:
            del data[rng.randrange(len(data) + 1):]
    return bytes(data)


def is_refused_or(result):
    """Runs result(): its tensors must be finite, or it must end in one line; within 10 seconds."""
    began = time.monotonic()
    try:
        for tensor in result():
            assert tensor.isfinite().all()
    except SystemExit as error:
        message = str(error)
        assert message.startswith('error: ') and '\n' not in message, message
    assert time.monotonic() - began < 10


def avatar_tensors(folder):
    def result():
        centre, half = rh.read_box(folder)
        views = rh.load_views(folder, 'train', (centre, half), most=3)
        yield from (centre, torch.tensor(half), views.c2w, views.intrinsics, views.images)
        rgb, alpha = rh.read_portrait(rh.portrait_path(folder), 64)
        yield from (rgb, alpha)
    return result


@pytest.fixture(scope='module')
def avatar(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('fuzz') / 'avatar'
    shutil.copytree(data / 'avatar_0000', folder)
    return folder


@many
@hypothesis.given(seed=st.integers(0, 2 ** 32))
def test_mutated_bytes_of_a_transforms_file(avatar, data, seed):
    original = (data / 'avatar_0000/transforms_train.json').read_bytes()
    (avatar / 'transforms_train.json').write_bytes(mutated(original, seed))
    is_refused_or(avatar_tensors(avatar))


@many
@hypothesis.given(data_=st.data())
def test_other_values_in_a_transforms_file(avatar, data, data_):
    meta = json.loads((data / 'avatar_0000/transforms_train.json').read_text())
    meta['frames'] = meta['frames'][:4]
    for _ in range(data_.draw(st.integers(1, 3))):
        place = meta
        while True:
            key = data_.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], (dict, list)) or not place[key] or data_.draw(st.booleans()):
                break
            place = place[key]
        place[key] = data_.draw(VALUES)
    others = st.sampled_from(['fl_x', 'w', 'cx', 'scale', 'offset', 'aabb_scale', 'camera_angle_y'])
    meta |= data_.draw(st.dictionaries(others, VALUES, max_size=2))
    (avatar / 'transforms_train.json').write_text(json.dumps(meta))
    is_refused_or(avatar_tensors(avatar))


@many
@hypothesis.given(seed=st.integers(0, 2 ** 32), suffix=st.sampled_from(['png', 'jpg', 'webp', 'gif', 'bmp', 'tiff']))
def test_mutated_portraits(data, tmp_path_factory, seed, suffix):
    folder = tmp_path_factory.getbasetemp()
    path, good = folder / f'portrait.{suffix}', folder / f'good.{suffix}'
    if not good.exists():
        image = rh.open_image(rh.portrait_path(data / 'avatar_0000'))
        image.convert('RGB' if suffix in ('jpg', 'bmp') else 'RGBA').save(good)
    path.write_bytes(mutated(good.read_bytes(), seed))
    is_refused_or(lambda: rh.read_portrait(path, 64))


@many
@hypothesis.given(seed=st.integers(0, 2 ** 32))
def test_mutated_checkpoints(tiny, tmp_path_factory, seed):
    folder = tmp_path_factory.getbasetemp()
    if not (folder / 'good.pt').exists():
        rh.write_model(folder / 'good.pt', 'decoder', tiny, rh.Decoder(tiny).state_dict(), 0)
    (folder / 'decoder.pt').write_bytes(mutated((folder / 'good.pt').read_bytes(), seed))

    def result():
        yield from rh.load_model('decoder', folder, 'cpu').state_dict().values()
    is_refused_or(result)
