"""Files: every format that the README names is read, everything else ends in one clear line."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import rodinhd as rh
import running
import scenes

UNIT_BOX = (torch.zeros(3), 1.0)


def scene(folder, rewrite=None, size=16, suffix='.png', named='transforms.json', frames=9):
    """Writes a small scene: an opaque red disc on transparent ground, with cameras around it.

    `rewrite` changes the dict of its JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    image = np.zeros((size, size, 4), np.uint8)
    image[x ** 2 + y ** 2 < (size / 5) ** 2] = (255, 0, 0, 255)
    if suffix == '.jpg':
        image = image[..., :3]

    meta = {'camera_angle_x': 0.6, 'frames': []}
    for i in range(frames):
        Image.fromarray(image).save(folder / f'r_{i}{suffix}')
        pose = rh.orbit_pose(40 * i, 10, 4.0).tolist()
        meta['frames'].append({'file_path': f'./r_{i}', 'transform_matrix': pose})
    if rewrite:
        rewrite(meta)
    (folder / named).write_text(json.dumps(meta))
    return folder


# Posed image sets ---------------------------------------------------------------------------------
def test_nerf_synthetic_without_extension_and_without_box(tmp_path):
    """The disc has a radius of 64 / 5 pixels.

    At distance 4 and a field of view of 0.6 rad (fx = 103.4) that is 0.495 world units. Silhouettes
    are widened by up to 3 pixels of 0.039 units, a cell has 0.02, the margin is 4 %: at most
    1.04 * 0.632 = 0.66.
    """
    folder = scene(tmp_path / 'a', size=64)
    centre, half = scenes.read_box(folder)
    assert np.allclose(centre, 0, atol=0.1)
    assert 0.49 < half < 0.66

    # a lone transforms.json holds out every eighth frame
    train = scenes.load_views(folder, 'train', (centre, half))
    test = scenes.load_views(folder, 'test', (centre, half))
    assert len(train.images) == 8
    assert len(test.images) == 1
    assert train.has_alpha
    assert train.images.shape[1:] == (64, 64, 4)

    distance = train.c2w[:, :3, 3].norm(dim=-1) * half
    assert torch.allclose(distance, torch.tensor(4.0), atol=0.2)
    assert train.intrinsics[0, 0].item() == pytest.approx(32 / np.tan(0.3), rel=1e-5)


def test_instant_ngp_intrinsics_scale_and_offset(tmp_path):
    """0.25 x + offset is in the unit cube, which aabb_scale doubles: x is in +- 4."""
    def rewrite(meta):
        del meta['camera_angle_x']
        meta.update(fl_x=30.0, fl_y=28.0, cx=7.0, cy=9.0, w=16, h=16)
        meta.update(scale=0.25, offset=[0.5, 0.5, 0.25], aabb_scale=2)

    folder = scene(tmp_path / 'a', rewrite)
    centre, half = scenes.read_box(folder)
    assert centre.tolist() == [0, 0, 1]
    assert half == 4
    views = scenes.load_views(folder, 'train', (centre, half), downscale=2)
    assert views.intrinsics[0].tolist() == [15, 14, 3.5, 4.5]


def test_aabb_extensions_and_named_splits(tmp_path):
    def rewrite(meta):
        meta['aabb'] = [[-2, -2, -1], [2, 2, 1]]
        for frame in meta['frames']:
            frame['file_path'] += '.webp'

    folder = scene(tmp_path / 'a', rewrite, suffix='.webp', named='transforms_train.json')
    box = scenes.read_box(folder)
    assert box[0].tolist() == [0, 0, 0]
    assert box[1] == 2
    assert len(scenes.load_views(folder, 'train', box).images) == 9
    assert scenes.load_views(folder, 'test', box) is None


def test_images_without_alpha(tmp_path):
    folder = scene(tmp_path / 'a', suffix='.jpg')
    centre, half = scenes.read_box(folder)
    assert 1 < half < 4
    assert not scenes.load_views(folder, 'train', (centre, half)).has_alpha


def test_downscaling_does_not_bleed_transparent_pixels(tmp_path):
    folder = scene(tmp_path / 'a')
    image = scenes.load_views(folder, 'train', UNIT_BOX, downscale=4).images[0]
    half_covered = (image[..., 3] > 60) & (image[..., 3] < 250)
    assert half_covered.any()
    assert (image[half_covered][:, 0] > 250).all()


def test_portrait_is_named_or_most_frontal(tmp_path):
    folder = scene(tmp_path / 'a')
    assert scenes.portrait_path(folder).name == 'r_0.png'
    shutil.copy(folder / 'r_3.png', folder / 'portrait.png')
    assert scenes.portrait_path(folder).name == 'portrait.png'


def test_avatars_of_a_folder_or_one_alone(tmp_path):
    scene(tmp_path / 'b')
    scene(tmp_path / 'a')
    scene(tmp_path / '.tmp-c')
    assert [path.name for path in scenes.list_avatars(tmp_path)] == ['a', 'b']
    assert scenes.list_avatars(tmp_path / 'a') == [tmp_path / 'a']
    with pytest.raises(rh.Stop, match='no avatars'):
        scenes.list_avatars(tmp_path / 'a' / 'nothing')


def broken(**changes):
    """A `rewrite` that changes one frame."""
    def rewrite(meta):
        meta['frames'][2].update(changes)
    return rewrite


def without(name):
    """A `rewrite` that takes a value away."""
    def rewrite(meta):
        del meta[name]
    return rewrite


def having(**values):
    """A `rewrite` that sets values."""
    def rewrite(meta):
        meta.update(values)
    return rewrite


@pytest.mark.parametrize(('rewrite', 'message'), [
    (without('frames'), 'no frames'),
    (having(frames=[]), 'no frames'),
    (having(frames=[3]), 'no file_path'),
    (broken(file_path='../../etc/passwd'), 'leaves the folder'),
    (broken(transform_matrix=[[1, 2], [3, 4]]), 'not a finite 4 x 4'),
    (broken(transform_matrix=[[float('nan')] * 4] * 4), 'not a finite 4 x 4'),
    (broken(transform_matrix='x'), 'not a finite 4 x 4'),
    (without('camera_angle_x'), 'neither camera_angle_x nor fl_x'),
    (having(camera_angle_x='wide'), 'camera_angle_x must be a finite number'),
    (having(fl_x=-3), 'must be positive'),
    (having(w=400, h=300), 'says 400 x 300'),
    (having(aabb=[1, 2, 3]), 'span a box'),
    (having(aabb=[[1, 1, 1], [1, 1, 1]]), 'span a box'),
    (having(scale='big'), 'span a box'),
])
def test_bad_transforms_end_in_one_line(tmp_path, rewrite, message):
    folder = scene(tmp_path / 'a', rewrite)
    with pytest.raises(rh.Stop, match=message) as error:
        scenes.load_views(folder, 'train', scenes.read_box(folder))
    assert '\n' not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize('text', ['', '{', '[1, 2]', '"x"', '[' * 100_000, '\xff\xfe'])
def test_bad_json_ends_in_one_line(tmp_path, text):
    (tmp_path / 'transforms.json').write_text(text, encoding='latin-1')
    with pytest.raises(rh.Stop, match=r'not readable as JSON|no frames'):
        scenes.read_box(tmp_path)


# Portraits ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(('name', 'mode', 'size', 'colour'), [
    ('grey.png', 'L', (40, 30), 9),
    ('palette.gif', 'P', (33, 33), 0),
    ('tall_with_alpha.webp', 'RGBA', (20, 90), 0),
    ('16_bit.png', 'I;16', (64, 64), 0),
    ('wide_cmyk.jpg', 'CMYK', (70, 40), 0),
])
def test_portraits_of_every_kind(tmp_path, name, mode, size, colour):
    Image.new(mode, size, colour).save(tmp_path / name)
    rgb, alpha = scenes.read_portrait(tmp_path / name, 32)
    assert rgb.shape == (3, 32, 32)
    assert alpha.shape == (1, 32, 32)
    assert rgb.abs().max() <= 1


def test_portraits_are_turned_as_exif_says(tmp_path):
    """Orientation 6 means: turn by 90 degrees clockwise. The upper half becomes the right one."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / 'turned.png', exif=exif)
    upright, _ = scenes.read_portrait(tmp_path / 'turned.png', 32)
    assert upright[0, 16, 28] > 0.9
    assert upright[0, 16, 3] < -0.9


def test_transparent_portraits_go_on_white(tmp_path):
    Image.new('RGBA', (32, 32), (0, 0, 0, 0)).save(tmp_path / 'a.png')
    rgb, alpha = scenes.read_portrait(tmp_path / 'a.png', 16)
    assert torch.equal(scenes.portrait_on_white(rgb, alpha), torch.ones(3, 16, 16))


def test_bad_portraits_end_in_one_line(tmp_path):
    Image.new('RGB', (64, 64)).save(tmp_path / 'whole.png')
    whole = (tmp_path / 'whole.png').read_bytes()
    (tmp_path / 'cut.png').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'text.png').write_text('hello')
    (tmp_path / 'empty.png').write_bytes(b'')
    Image.new('1', (1, 1)).save(tmp_path / 'dot.png')
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'huge.png')
    (tmp_path / 'folder.png').mkdir()

    for name, message in {
        'none': 'no such image',
        'cut': 'not a readable',
        'text': 'not a readable',
        'empty': 'not a readable',
        'dot': 'too few',
        'huge': 'too many',
        'folder': 'not a readable',
    }.items():
        with pytest.raises(rh.Stop, match=message) as error:
            scenes.read_portrait(tmp_path / f'{name}.png', 32)
        assert '\n' not in str(error.value)


# Checkpoints --------------------------------------------------------------------------------------
def test_checkpoints_that_are_not_ours(tmp_path, tiny):
    running.write_model(tmp_path / 'vae.pt', 'vae', tiny, rh.VAE(tiny).state_dict(), 7)
    assert running.load_model('vae', tmp_path, 'cpu').config == tiny

    whole = (tmp_path / 'vae.pt').read_bytes()
    (tmp_path / 'base.pt').write_bytes(whole)
    with pytest.raises(rh.Stop, match="kind 'vae', expected 'base'"):
        running.load_model('base', tmp_path, 'cpu')

    (tmp_path / 'base.pt').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(rh.Stop, match='damaged'):
        running.load_model('base', tmp_path, 'cpu')

    with pytest.raises(rh.Stop, match=r'make it with python train.py --stage upsample'):
        running.load_model('upsample', tmp_path, 'cpu')

    of_another_program = {'kind': 'upsample', 'config': {'width': 3}, 'model': {}}
    torch.save(of_another_program, tmp_path / 'upsample.pt')
    with pytest.raises(rh.Stop, match='does not fit'):
        running.load_model('upsample', tmp_path, 'cpu')


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)

    torch.save({'kind': 'planes', 'x': Evil()}, tmp_path / 'evil.pt')
    with pytest.raises(rh.Stop, match='not a readable checkpoint'):
        running.read_checkpoint(tmp_path / 'evil.pt', 'planes')
    assert not (tmp_path / 'owned').exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    running.write_checkpoint(tmp_path / 'a.pt', 'planes', {'x': 1})
    cannot_be_pickled = {'x': lambda: 0}
    with pytest.raises((rh.Stop, AttributeError, TypeError)):
        running.write_checkpoint(tmp_path / 'a.pt', 'planes', cannot_be_pickled)
    assert running.read_checkpoint(tmp_path / 'a.pt', 'planes')['x'] == 1

    (tmp_path / 'file').write_text('')
    with pytest.raises(rh.Stop, match='cannot be written'):
        running.write_checkpoint(tmp_path / 'file' / 'b.pt', 'planes', {})
