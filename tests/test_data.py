"""Files: every format that the README names is read, everything else ends in one clear line."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import rodinhd as rh


def scene(folder, rewrite=None, size=16, suffix='.png', named='transforms.json', frames=9):
    """A small scene: opaque red disc on transparent ground, cameras around; `rewrite` changes the JSON's dict."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    image = np.zeros((size, size, 4), np.uint8)
    image[x ** 2 + y ** 2 < (size / 5) ** 2] = (255, 0, 0, 255)
    meta = {'camera_angle_x': 0.6, 'frames': []}
    for i in range(frames):
        Image.fromarray(image if suffix != '.jpg' else image[..., :3]).save(folder / f'r_{i}{suffix}')
        meta['frames'].append({'file_path': f'./r_{i}', 'transform_matrix': rh.orbit_pose(40 * i, 10, 4.0).tolist()})
    if rewrite:
        rewrite(meta)
    (folder / named).write_text(json.dumps(meta))
    return folder


def test_nerf_synthetic_without_extension_and_without_box(tmp_path):
    """The disc has a radius of 64 / 5 pixels: at distance 4 and a field of view of 0.6 rad (fx = 103.4), 0.495 world units;
    silhouettes are widened by up to 3 pixels of 0.039 units, a cell has 0.02, the margin is 4 %: at most 1.04 * 0.632 = 0.66."""
    folder = scene(tmp_path / 'a', size=64)
    centre, half = rh.read_box(folder)
    assert np.allclose(centre, 0, atol=0.1) and 0.49 < half < 0.66
    train, test = rh.load_views(folder, 'train', (centre, half)), rh.load_views(folder, 'test', (centre, half))
    assert len(train.images) == 8 and len(test.images) == 1             # a lone transforms.json holds out every eighth frame
    assert train.has_alpha and train.images.shape[1:] == (64, 64, 4)
    assert torch.allclose(train.c2w[:, :3, 3].norm(dim=-1) * half, torch.tensor(4.0), atol=0.2)
    assert train.intrinsics[0, 0].item() == pytest.approx(32 / np.tan(0.3), rel=1e-5)


def test_instant_ngp_intrinsics_scale_and_offset(tmp_path):
    def rewrite(meta):
        del meta['camera_angle_x']
        meta.update(fl_x=30.0, fl_y=28.0, cx=7.0, cy=9.0, w=16, h=16, scale=0.25, offset=[0.5, 0.5, 0.25], aabb_scale=2)
    folder = scene(tmp_path / 'a', rewrite)
    centre, half = rh.read_box(folder)                                  # 0.25 x + offset in the unit cube, doubled: x in +- 4
    assert centre.tolist() == [0, 0, 1] and half == 4
    assert rh.load_views(folder, 'train', (centre, half), downscale=2).intrinsics[0].tolist() == [15, 14, 3.5, 4.5]


def test_aabb_extensions_and_named_splits(tmp_path):
    def rewrite(meta):
        meta['aabb'] = [[-2, -2, -1], [2, 2, 1]]
        for f in meta['frames']:
            f['file_path'] += '.webp'
    folder = scene(tmp_path / 'a', rewrite, suffix='.webp', named='transforms_train.json')
    box = rh.read_box(folder)
    assert box[0].tolist() == [0, 0, 0] and box[1] == 2
    assert len(rh.load_views(folder, 'train', box).images) == 9 and rh.load_views(folder, 'test', box) is None


def test_images_without_alpha(tmp_path):
    folder = scene(tmp_path / 'a', suffix='.jpg')
    centre, half = rh.read_box(folder)
    assert not rh.load_views(folder, 'train', (centre, half)).has_alpha and 1 < half < 4


def test_downscaling_does_not_bleed_transparent_pixels(tmp_path):
    folder = scene(tmp_path / 'a')
    views = rh.load_views(folder, 'train', (torch.zeros(3), 1.0), downscale=4)
    half_covered = (views.images[0, ..., 3] > 60) & (views.images[0, ..., 3] < 250)
    assert half_covered.any() and (views.images[0][half_covered][:, 0] > 250).all()


def test_portrait_is_named_or_most_frontal(tmp_path):
    folder = scene(tmp_path / 'a')
    assert rh.portrait_path(folder).name == 'r_0.png'
    shutil.copy(folder / 'r_3.png', folder / 'portrait.png')
    assert rh.portrait_path(folder).name == 'portrait.png'


def test_avatars_of_a_folder_or_one_alone(tmp_path):
    scene(tmp_path / 'b')
    scene(tmp_path / 'a')
    scene(tmp_path / '.tmp-c')
    assert [p.name for p in rh.list_avatars(tmp_path)] == ['a', 'b']
    assert rh.list_avatars(tmp_path / 'a') == [tmp_path / 'a']
    with pytest.raises(SystemExit, match='no avatars'):
        rh.list_avatars(tmp_path / 'a' / 'nothing')


def broken(**changes):
    def rewrite(meta):
        meta['frames'][2].update(changes)
    return rewrite


@pytest.mark.parametrize(('rewrite', 'message'), [
    (lambda m: m.pop('frames'), 'no frames'),
    (lambda m: m.update(frames=[]), 'no frames'),
    (lambda m: m.update(frames=[3]), 'no file_path'),
    (broken(file_path='r_77'), 'missing'),
    (broken(file_path='../../etc/passwd'), 'leaves the folder'),
    (broken(transform_matrix=[[1, 2], [3, 4]]), 'not a finite 4 x 4'),
    (broken(transform_matrix=[[float('nan')] * 4] * 4), 'not a finite 4 x 4'),
    (broken(transform_matrix='x'), 'not a finite 4 x 4'),
    (lambda m: m.pop('camera_angle_x'), 'neither camera_angle_x nor fl_x'),
    (lambda m: m.update(camera_angle_x='wide'), 'must be numbers'),
    (lambda m: m.update(fl_x=-3), 'positive and finite'),
    (lambda m: m.update(w=400, h=400), 'says 400 x 400'),
    (lambda m: m.update(aabb=[1, 2, 3]), 'span a box'),
    (lambda m: m.update(aabb=[[1, 1, 1], [1, 1, 1]]), 'span a box'),
    (lambda m: m.update(scale='big'), 'span a box'),
])
def test_bad_transforms_end_in_one_line(tmp_path, rewrite, message):
    folder = scene(tmp_path / 'a', rewrite)
    with pytest.raises(SystemExit, match=message) as error:
        rh.load_views(folder, 'train', rh.read_box(folder))
    assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize('text', ['', '{', '[1, 2]', '"x"', '[' * 100_000, '\xff\xfe'])
def test_bad_json_ends_in_one_line(tmp_path, text):
    (tmp_path / 'transforms.json').write_text(text, encoding='latin-1')
    with pytest.raises(SystemExit, match=r'not readable as JSON|no frames'):
        rh.read_box(tmp_path)


def test_views_of_different_sizes(tmp_path):
    folder = scene(tmp_path / 'a')
    Image.new('RGBA', (20, 16)).save(folder / 'r_5.png')
    with pytest.raises(SystemExit, match='other views have another size'):
        rh.load_views(folder, 'train', (torch.zeros(3), 1.0))


def test_portraits_of_every_kind(tmp_path):
    """Grey, palette, alpha, 16 bit, tall, wide; EXIF orientation 6 means: turn by 90 degrees clockwise."""
    for name, image in {'g.png': Image.new('L', (40, 30), 9), 'p.gif': Image.new('P', (33, 33)), 'a.webp': Image.new('RGBA', (20, 90)),
                        'i.png': Image.new('I;16', (64, 64)), 'c.jpg': Image.new('CMYK', (70, 40))}.items():
        image.save(tmp_path / name)
        rgb, alpha = rh.read_portrait(tmp_path / name, 32)
        assert rgb.shape == (3, 32, 32) and alpha.shape == (1, 32, 32) and rgb.abs().max() <= 1
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255                                                   # stored upper half white; upright: the right half
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / 'e.png', exif=exif)
    upright = rh.read_portrait(tmp_path / 'e.png', 32)[0]
    assert upright[0, 16, 28] > 0.9 and upright[0, 16, 3] < -0.9


def test_transparent_portraits_go_on_white(tmp_path):
    Image.new('RGBA', (32, 32), (0, 0, 0, 0)).save(tmp_path / 'a.png')
    assert torch.equal(rh.portrait_on_white(*rh.read_portrait(tmp_path / 'a.png', 16)), torch.ones(3, 16, 16))


def test_bad_portraits_end_in_one_line(tmp_path):
    Image.new('RGB', (64, 64)).save(tmp_path / 'whole.png')
    whole = (tmp_path / 'whole.png').read_bytes()
    (tmp_path / 'cut.png').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'text.png').write_text('hello')
    (tmp_path / 'empty.png').write_bytes(b'')
    Image.new('1', (1, 1)).save(tmp_path / 'dot.png')
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'huge.png')
    for name, message in {'none': 'no such image', 'cut': 'not a readable', 'text': 'not a readable', 'empty': 'not a readable',
                          'dot': 'too few', 'huge': 'too many'}.items():
        with pytest.raises(SystemExit, match=message) as error:
            rh.read_portrait(tmp_path / f'{name}.png', 32)
        assert '\n' not in str(error.value)
    with pytest.raises(SystemExit, match='not a readable'):
        rh.read_portrait(tmp_path, 32)                                  # a folder


def test_checkpoints_that_are_not_ours(tmp_path, tiny):
    rh.write_model(tmp_path / 'vae.pt', 'vae', tiny, rh.VAE(tiny).state_dict(), 7)
    assert rh.load_model('vae', tmp_path, 'cpu').config == tiny
    whole = (tmp_path / 'vae.pt').read_bytes()
    (tmp_path / 'base.pt').write_bytes(whole)
    with pytest.raises(SystemExit, match="kind 'vae', expected 'base'"):
        rh.load_model('base', tmp_path, 'cpu')
    (tmp_path / 'base.pt').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(SystemExit, match='damaged'):
        rh.load_model('base', tmp_path, 'cpu')
    with pytest.raises(SystemExit, match=r'make it with python train.py --stage upsample'):
        rh.load_model('upsample', tmp_path, 'cpu')
    torch.save({'kind': 'upsample', 'config': {'width': 3}, 'model': {}}, tmp_path / 'upsample.pt')
    with pytest.raises(SystemExit, match='does not fit'):
        rh.load_model('upsample', tmp_path, 'cpu')


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)
    torch.save({'kind': 'planes', 'x': Evil()}, tmp_path / 'evil.pt')
    with pytest.raises(SystemExit, match='not a readable checkpoint'):
        rh.read_checkpoint(tmp_path / 'evil.pt', 'planes')
    assert not (tmp_path / 'owned').exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    rh.write_checkpoint(tmp_path / 'a.pt', 'planes', {'x': 1})
    with pytest.raises((SystemExit, AttributeError, TypeError)):
        rh.write_checkpoint(tmp_path / 'a.pt', 'planes', {'x': lambda: 0})      # cannot be pickled
    assert rh.read_checkpoint(tmp_path / 'a.pt', 'planes')['x'] == 1
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit, match='cannot be written'):
        rh.write_checkpoint(tmp_path / 'file' / 'b.pt', 'planes', {})


def test_settings_are_checked_by_name_and_type():
    config = rh.make_config('small', ['rays=99', 'lr_planes=1e-3', 'base_mult=1,2'])
    assert (config.rays, config.lr_planes, config.base_mult) == (99, 1e-3, (1, 2))
    for bad, message in {'rais=9': 'no such setting', 'rays=many': 'takes a positive int',
                         'inner=0': 'takes a positive int', 'lr_planes=nan': 'positive float', 'base_mult=a': 'takes integers',
                         'resolution=130': 'must divide'}.items():
        with pytest.raises(SystemExit, match=message):
            rh.make_config('small', [bad])
