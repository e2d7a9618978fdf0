"""Odd inputs, as people have them: each reads as its plain form, or ends in one line."""
import json
import os
import shutil
import struct
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import batches
import fit
import images
import lenses
import rodinhd as rh
import scenes
import transforms

SIZE = 64
FOCAL = SIZE / 2 / np.tan(0.3)


def ball(c2w, size=SIZE):
    """A ball of radius 0.6 at (0.1, 0, 0.2), coloured by its normals, as a camera sees it; RGBA.

    Four samples a side of a pixel smooth its edge.
    """
    fine = 4 * size
    intrinsics = torch.tensor([4 * FOCAL, 4 * FOCAL, fine / 2, fine / 2])
    rays_o, rays_d = rh.view_rays(c2w, intrinsics, fine, fine)
    o = rays_o - torch.tensor([0.1, 0.0, 0.2])
    along = (o * rays_d).sum(-1)
    root = along ** 2 - (o.square().sum(-1) - 0.36)
    depth = -along - root.clamp(min=0).sqrt()
    normal = (o + depth[:, None] * rays_d) / 0.6
    alpha = (root > 0).float()[:, None]
    rgba = torch.cat([(0.5 + 0.4 * normal) * alpha, alpha], dim=-1).view(size, 4, size, 4, 4)
    rgba = rgba.mean((1, 3))
    rgba[..., :3] /= rgba[..., 3:].clamp(min=1e-3)
    return (255 * rgba).round().byte().numpy()


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A folder with nine views of a ball, read as it is."""
    folder = tmp_path_factory.mktemp('base') / 'avatar'
    folder.mkdir()
    meta = {'camera_angle_x': 0.6, 'w': SIZE, 'h': SIZE, 'aabb': [[-1] * 3, [1] * 3], 'frames': []}
    for i in range(9):
        pose = rh.orbit_pose(40 * i, 10 + 2 * i, 4.0)
        Image.fromarray(ball(pose)).save(folder / f'r_{i}.png')
        meta['frames'].append({'file_path': f'r_{i}.png', 'transform_matrix': pose.tolist()})
    (folder / 'transforms.json').write_text(json.dumps(meta))
    return folder


class Case:
    """A copy of the ball's folder, to be changed."""
    def __init__(self, base, folder):
        shutil.copytree(base, folder)
        self.base = base
        self.folder = folder
        self.meta = json.loads((folder / 'transforms.json').read_text())
        self.frames = self.meta['frames']

    def paths(self):
        return [self.folder / frame['file_path'] for frame in self.frames]

    def draw(self, change):
        """Writes change(image) for each image."""
        for path in self.paths():
            change(Image.open(path)).save(path)

    def matrices(self, change):
        for frame in self.frames:
            frame['transform_matrix'] = change(np.array(frame['transform_matrix'])).tolist()

    def write(self):
        (self.folder / 'transforms.json').write_text(json.dumps(self.meta))

    def views(self, split='train'):
        self.write()
        return scenes.load_views(self.folder, split, scenes.read_box(self.folder))

    def plain(self):
        return scenes.load_views(self.base, 'train', scenes.read_box(self.base))

    def refusal(self):
        with pytest.raises(rh.Stop) as error:
            self.views()
        assert '\n' not in str(error.value)
        return str(error.value)


@pytest.fixture
def case(base, tmp_path):
    return Case(base, tmp_path / 'avatar')


def decibels(views, plain):
    """PSNR of views on white, where they are known."""
    a = rh.on_white(views.images)
    b = rh.on_white(plain.images)
    if views.unknown is not None:
        a, b = a[~views.unknown], b[~views.unknown]
    return rh.psnr(a, b)


def is_plain(views, plain, least=99):
    assert torch.allclose(views.c2w, plain.c2w, atol=1e-3)
    assert torch.allclose(views.intrinsics, plain.intrinsics, atol=0.1)
    assert decibels(views, plain) > least


# Lenses -------------------------------------------------------------------------------------------
def drawn_through(lens, image):
    """What a lens makes of a pinhole's image, bilinearly; slowly, by bisection of the radius."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2) / FOCAL
    u, v = x.copy(), y.copy()
    for _ in range(200):  # a fixed point of the distortion
        xd, yd = lenses.distort(lens, u, v)
        u, v = u + 0.5 * (x - xd), v + 0.5 * (y - yd)
    grid = torch.from_numpy(np.stack([u, v], -1) * 2 * FOCAL / SIZE)[None].float()
    rgba = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    rgba[:, :3] *= rgba[:, 3:]
    drawn = torch.nn.functional.grid_sample(rgba, grid, align_corners=False)
    drawn[:, :3] /= drawn[:, 3:].clamp(min=1e-3)
    return Image.fromarray((255 * drawn[0].clamp(0, 1)).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(('model', 'values'), [
    ('OPENCV', dict(k1=-0.25, k2=0.1, p1=0.01, p2=-0.008)),
    ('OPENCV', dict(k1=0.2, k2=0.05, k3=0.01, k4=0.3, k5=0.1, k6=0.02)),
    ('SIMPLE_RADIAL', dict(k1=-0.2)),
    (None, dict(k1=0.15, k2=-0.1)),
    ('OPENCV_FISHEYE', dict(k1=-0.05, k2=0.02, k3=0.01, k4=-0.004)),
    ('OPENCV_FISHEYE', {}),
])
def test_lenses_are_taken_out(case, model, values):
    case.meta.update(camera_model=model, **values)
    lens = lenses.read_lens(case.meta, {}, '')
    case.draw(lambda image: drawn_through(lens, image))
    views = case.views()
    is_plain(views, case.plain(), least=42)
    assert views.unknown is not None or 'k2' not in values


def test_a_lens_is_as_in_opencv():
    cv2 = pytest.importorskip('cv2')
    points = np.random.default_rng(0).uniform(-0.8, 0.8, (50, 2))
    p = (0.01, -0.02)
    k = (0.1, -0.05, 0.02, 0.03, 0.01, 0.005)
    ours = np.stack(lenses.distort(lenses.Lens(False, k, p), *points.T), -1)
    solid = np.concatenate([points, np.ones((50, 1))], 1)
    eye = np.eye(3)
    order = np.array([*k[:2], *p, *k[2:]])
    theirs = cv2.projectPoints(solid, np.zeros(3), np.zeros(3), eye, order)[0][:, 0]
    assert np.abs(ours - theirs).max() < 1e-9

    fisheye = lenses.Lens(True, (*k[:4], 0.0, 0.0), (0.0, 0.0))
    ours = np.stack(lenses.distort(fisheye, *points.T), -1)
    theirs = cv2.fisheye.distortPoints(points[:, None], eye, np.array(k[:4]))[:, 0]
    assert np.abs(ours - theirs).max() < 1e-9


def test_what_a_lens_does_not_see_is_unknown_and_not_empty(case):
    case.meta.update(camera_model='OPENCV', k1=0.4)
    views = case.views()
    assert views.unknown[0, 0, 0]
    assert not views.unknown[0, SIZE // 2, SIZE // 2]
    assert not views.images[..., 3][views.unknown].any()
    assert rh.visual_hull(views, 16).sum() >= rh.visual_hull(case.plain(), 16).sum()


@pytest.mark.parametrize(('values', 'message'), [
    (dict(camera_model='EQUIRECTANGULAR'), 'EQUIRECTANGULAR is not supported'),
    (dict(camera_model='THIN_PRISM_FISHEYE'), 'is not supported'),
    (dict(camera_model='PINHOLE', k1=0.1), 'has no distortion'),
    (dict(camera_model='OPENCV_FISHEYE', p1=0.1), 'do not belong'),
    (dict(distortion_params=[0.1, 0, 0, 0.2, 0, 0]), 'k4 of distortion_params'),
    (dict(k1='x'), 'k1 must be a finite number'),
    (dict(k1=-50), 'sees too little'),
    (dict(rolling_shutter=[0, 0, 0.1, 0]), 'rolling_shutter'),
    (dict(from_na=True), 'from_na'),
    (dict(is_fisheye='no'), "is_fisheye must be true or false, not 'no'"),
    (dict(camera_model=['OPENCV']), 'is not supported'),
])
def test_lenses_that_are_refused(case, values, message):
    case.meta.update(values)
    assert message in case.refusal()


# Intrinsics ---------------------------------------------------------------------------------------
def without_angle(meta):
    del meta['camera_angle_x']
    return meta


@pytest.mark.parametrize(('file', 'frame'), [
    (dict(fl_x=150, fl_y=150), dict(camera_angle_x=0.6)),
    (dict(fl_x=150, fl_y=99), dict(fl_x=FOCAL)),
    (dict(fl_y=FOCAL), {}),
    (dict(camera_angle_y=0.6), {}),
    (dict(x_fov=np.degrees(0.6)), {}),
    (dict(fl_x=None, camera_angle_x=0.6), dict(fl_x=None)),
    (dict(fl_x=2 * FOCAL, cx=SIZE, cy=SIZE, w=2 * SIZE, h=2 * SIZE), {}),
    (dict(fl_x=2 * FOCAL, w=2 * SIZE, h=2 * SIZE), dict(cx=SIZE / 2, w=SIZE, h=SIZE)),
])
def test_focal_lengths_of_frame_and_file(case, file, frame):
    without_angle(case.meta).update(file)
    for f in case.frames:
        f.update(frame)
    is_plain(case.views(), case.plain())


@pytest.mark.parametrize(('values', 'message'), [
    (dict(camera_angle_x=34), 'is in radians'),
    (dict(fl_x=2 * FOCAL), 'contradict'),
    (dict(camera_angle_x=None, fl_x=1e9), 'positive'),
    (dict(camera_angle_x=None, fl_x=1e300), 'positive'),
    (dict(camera_angle_x=None, fl_x=1e-9), 'positive'),
    (dict(camera_angle_x=None, fl_x=0), 'positive'),
    (dict(cx=1e300), 'far outside'),
    (dict(cx=float('nan')), 'finite number'),
    (dict(h=2 * SIZE), 'says 64 x 128'),
    (dict(camera_angle_x=None, fl_x=FOCAL / SIZE), 'fl_x (or the angle) must be positive'),
    (dict(cx=0.5, cy=0.5), 'look like shares of the image'),
])
def test_cameras_that_cannot_be(case, values, message):
    case.meta.update(values)
    assert message in case.refusal()


# Masks --------------------------------------------------------------------------------------------
def test_masks_hide_pixels(case):
    """The right half of each image is hidden by something pink; nerfstudio's masks are black."""
    mask = np.full((SIZE, SIZE), 255, np.uint8)
    mask[:, SIZE // 2:] = 0
    Image.fromarray(mask).save(case.folder / 'mask.png')
    for path, frame in zip(case.paths(), case.frames):
        pixels = np.array(Image.open(path))
        pixels[:, SIZE // 2:] = (255, 0, 255, 255)
        Image.fromarray(pixels).save(path)
        frame['mask_path'] = 'mask.png'
    views = case.views()
    assert torch.equal(views.unknown[0], torch.from_numpy(mask == 0))
    is_plain(views, case.plain())

    # No ray is drawn there, no cell is called empty, and no pixel is measured
    for margin in (None, 8):
        colours = rh.Rays(views, 'cpu', margin).draw(4000, torch.Generator().manual_seed(0))[2]
        assert not (colours - torch.tensor([1.0, 0, 1])).abs().sum(1).lt(0.01).any()
    assert (rh.visual_hull(views, 16) | ~rh.visual_hull(case.plain(), 16)).all()

    def shows_the_plain_images(field, c2w, *_):
        i = int((views.c2w - c2w).abs().sum((1, 2)).argmin())
        return rh.Picture(rh.on_white(case.plain().images[i]), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rh, 'render_view', shows_the_plain_images)
        grid = rh.OccupancyGrid(8, 64, 'cpu')
        scores = fit.held_out_psnr(None, views, rh.make_config('tiny'), grid)
    assert min(scores) > 99


def test_masks_of_instant_ngp_are_white(case):
    for i, frame in enumerate(case.frames):
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[:9] = 255
        Image.fromarray(mask).save(case.folder / f'dynamic_mask_r_{i}.png')
        frame['file_path'] = f'r_{i}'
    unknown = case.views().unknown
    assert unknown[:, :9].all()
    assert not unknown[:, 9:].any()


def palette(labels):
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


@pytest.mark.parametrize('make', [
    lambda labels: Image.fromarray(labels > 0),  # 1 bit
    lambda labels: Image.fromarray(255 * labels).convert('P'),
    lambda labels: Image.fromarray(labels.astype(np.uint16) * 65535),
    lambda labels: Image.fromarray(labels.astype(np.uint16) * 255),
    lambda labels: Image.fromarray(255 * labels[::2, ::2]),  # of half the size
    palette,
], ids=['bit', 'palette', '16 bits', 'dark 16 bits', 'half', 'labels'])
def test_masks_of_all_kinds(case, make):
    labels = np.ones((SIZE, SIZE), np.uint8)
    labels[:, :10] = 0
    make(labels).save(case.folder / 'mask.png')
    case.meta['mask_path'] = 'mask.png'  # of all frames
    views = case.views()
    assert torch.equal(views.unknown, torch.from_numpy(labels == 0).expand(8, SIZE, SIZE))
    is_plain(views, case.plain())


def test_masks_that_cannot_be(case):
    Image.new('L', (SIZE, SIZE)).save(case.folder / 'black.png')
    case.meta['mask_path'] = 'black.png'
    assert 'hides each pixel of all views' in case.refusal()
    del case.meta['mask_path']
    case.frames[1]['mask_path'] = 'none.png'
    assert "mask_path 'none.png' of frame 1 is missing" in case.refusal()
    case.frames[1]['mask_path'] = 'mask.png'
    Image.new('L', (SIZE, 2 * SIZE)).save(case.folder / 'mask.png')
    assert 'this mask has 64 x 128' in case.refusal()


def test_faint_pixels_are_empty(case):
    """Mattes leave an alpha of 1/255 and the like: the box does not grow."""
    del case.meta['aabb']
    case.write()
    _, half = scenes.read_box(case.folder)

    def hazy(image):
        image.putalpha(image.getchannel('A').point(lambda a: max(a, rh.FAINT)))
        return image

    case.draw(hazy)
    assert scenes.read_box(case.folder)[1] == pytest.approx(half, abs=1e-6)
    assert case.views().has_alpha


# Splits and frames --------------------------------------------------------------------------------
def test_lists_of_file_names(case):
    case.meta['train_filenames'] = ['r_1.png', './r_2.png']
    case.meta['val_filenames'] = ['r_3.png']
    assert len(case.views().images) == 2
    assert len(case.views('test').images) == 1
    case.meta['test_filenames'] = ['r_4', 'r_5.png']
    assert len(case.views('test').images) == 2
    case.meta['test_filenames'] = ['r_1.png']
    assert 'listed for training and for the test' in case.refusal()
    case.meta['test_filenames'] = ['r_77.png']
    assert 'which no frame has' in case.refusal()


def test_frames_without_image_or_pose_are_counted(case, capsys):
    (case.folder / 'r_2.png').unlink()
    del case.frames[6]['transform_matrix']
    assert len(case.views().images) == 6
    assert "2 of 8 frames are left out" in capsys.readouterr().err
    for path in case.paths():
        path.unlink(missing_ok=True)
    assert 'no frame has both' in case.refusal()


@pytest.mark.parametrize(('name', 'written'), [
    ('r_0.PNG', 'r_0'),
    ('r_0.PNG', 'r_0.png'),
    ('K\u00f6pfe 1.png', unicodedata.normalize('NFD', 'K\u00f6pfe 1.png')),
    ('K\u00f6pfe 1.png', 'K%C3%B6pfe%201.png'),
    ('sub/r_0.png', r'Sub\r_0.png'),
    ('a%20b.png', 'a%20b.png'),
])
def test_names_of_images(case, name, written):
    path = case.folder / name
    path.parent.mkdir(exist_ok=True)
    case.paths()[0].rename(path)
    case.frames[0]['file_path'] = written
    is_plain(case.views(), case.plain())


@pytest.mark.parametrize('name', ['r_0\0.png', 'r_\ud800.png', '../x/r_0.png', '/etc/passwd'])
def test_names_that_are_refused(case, name):
    case.frames[0]['file_path'] = name
    assert 'file_path' in case.refusal()


def test_links_and_byte_order_marks(case, tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    for path in case.paths():
        shutil.move(path, tmp_path / 'elsewhere' / path.name)
        path.symlink_to(tmp_path / 'elsewhere' / path.name)
    is_plain(case.views(), case.plain())
    for encoding in ('utf-8-sig', 'utf-16'):
        text = json.dumps(case.meta)
        (case.folder / 'transforms.json').write_text(text, encoding=encoding)
        is_plain(scenes.load_views(case.folder, 'train', (torch.zeros(3), 1.0)), case.plain())


def test_pipes_do_not_hang(case):
    case.paths()[0].unlink()
    os.mkfifo(case.paths()[0])
    assert len(case.views().images) == 7
    with pytest.raises(rh.Stop, match='no regular file'):
        images.open_image(case.paths()[0])


def test_images_of_several_sizes(case, capsys):
    """Two of them are halved, with their cameras; one is a narrower strip."""
    for i in (1, 2):
        path = case.paths()[i]
        Image.open(path).resize((SIZE // 2, SIZE // 2), Image.BOX).save(path)
        case.frames[i].update(w=SIZE // 2, h=SIZE // 2)
    strip = case.paths()[3]
    Image.open(strip).crop((0, 0, 48, SIZE)).save(strip)
    case.frames[3].update(w=48, h=SIZE, fl_x=FOCAL, cx=SIZE / 2, cy=SIZE / 2)
    views = case.views()
    assert 'have another size' in capsys.readouterr().err
    is_plain(views, case.plain(), least=30)
    assert views.unknown[3, :, 48:].all()
    assert not views.unknown[:3].any()


# Poses --------------------------------------------------------------------------------------------
@pytest.mark.parametrize('change', [
    lambda m: m[:3],
    lambda m: m.ravel(),
    lambda m: m @ np.diag([2.5, 2.5, 2.5, 1]),
])
def test_matrices_in_other_forms(case, change):
    case.matrices(change)
    is_plain(case.views(), case.plain())


@pytest.mark.parametrize(('change', 'message'), [
    (lambda m: m @ np.diag([1, -1, -1, 1]), 'look like OpenCV axes'),
    (np.linalg.inv, 'world-to-camera matrices: invert them'),
    (lambda m: np.diag([1, -1, -1, 1]) @ np.linalg.inv(m), 'with OpenCV axes'),
    (lambda m: 0 * m, 'no length'),
    (lambda m: m.T, 'transposed'),
    (lambda m: m @ np.diag([-1, 1, 1, 1]), 'mirrors'),
    (lambda m: m @ np.diag([2, 1, 1, 1]), 'different lengths'),
    (lambda m: m + np.eye(4)[:, [3, 0, 1, 2]] * 1e300, 'finite'),
    (lambda m: np.vstack([m[:3, :3] @ np.eye(3, 4) + 1e9 * np.eye(3, 4, 3), m[3:]]), 'same units'),
])
def test_poses_that_cannot_be(case, change, message):
    case.matrices(change)
    assert message in case.refusal()


def test_a_matrix_holds_numbers(case):
    case.frames[1]['transform_matrix'][0][3] = True
    assert 'transform_matrix of frame 1 is not a finite 4 x 4 matrix' in case.refusal()


def test_silhouettes_that_do_not_meet(case):
    """The ball is at the right of all images: it cannot be there from behind, too."""
    case.draw(lambda image: Image.fromarray(np.roll(np.array(image), 24, axis=1)))
    assert 'no point in common' in case.refusal()


def test_coordinates_of_maps(case):
    offset = np.array([500123.4, 5412345.6, 250.0])

    def moved(matrix):
        matrix[:3, 3] += offset
        return matrix

    case.matrices(moved)
    case.meta['aabb'] = [(offset - 1).tolist(), (offset + 1).tolist()]
    is_plain(case.views(), case.plain())

    # The same where the box is measured
    boxes = []
    for shift in (offset, -offset):  # there, and back again
        del case.meta['aabb']
        case.write()
        boxes.append(scenes.read_box(case.folder))
        back = np.pad(-shift[:, None], ((0, 1), (3, 0)))
        case.matrices(back.__add__)
        case.meta['aabb'] = None
    assert np.abs(boxes[0][0].numpy() - offset - boxes[1][0].numpy()).max() < 1e-3
    assert boxes[0][1] == pytest.approx(boxes[1][1], abs=1e-4)


def test_worlds_with_y_up(case, capsys):
    turn = np.eye(4)
    turn[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]  # x, y, z -> x, z, -y
    case.matrices(lambda matrix: turn @ matrix)
    is_plain(case.views(), case.plain())
    assert 'up is along +Y' in capsys.readouterr().err
    assert scenes.portrait_path(case.folder).name == 'r_0.png'

    # Slanting: the poses are those of the plain world, turned about Z at most
    c, s = np.cos(0.7), np.sin(0.7)
    turn[:3, :3] = [[1, 0, 0], [0, c, -s], [0, s, c]]
    case.matrices(lambda matrix: turn @ matrix)
    views = case.views()
    assert torch.allclose(views.c2w[:, 2, 0], torch.zeros(8), atol=1e-5)


def looking_along_x(case):
    """Turns the ball's world: what was in front, at -Y, is at +X."""
    turn = np.eye(4)
    turn[:2, :2] = [[0, -1], [1, 0]]
    case.matrices(lambda matrix: turn @ matrix)
    case.write()


def sees_face_in(monkeypatch, path):
    """A detector that finds a face in this image alone."""
    face = np.asarray(Image.open(path).convert('RGBA'))
    monkeypatch.setattr(
        scenes, 'face_votes', lambda image: 50 * np.array_equal(np.asarray(image), face)
    )


def test_worlds_whose_face_looks_along_x_are_turned(case, capsys, monkeypatch):
    looking_along_x(case)
    sees_face_in(monkeypatch, case.folder / 'r_0.png')
    is_plain(case.views(), case.plain())
    assert scenes.portrait_path(case.folder).name == 'r_0.png'
    said = 'the face is in r_0.png; the world is turned by -90 degrees about Z'
    assert said in capsys.readouterr().err

    view = scenes.load_view(case.folder, scenes.read_box(case.folder), 1, lambda height: 1)
    assert torch.equal(view.c2w[0], case.views().c2w[1])


def test_a_face_nearly_in_front_turns_nothing(case, monkeypatch):
    sees_face_in(monkeypatch, case.folder / 'r_1.png')
    is_plain(case.views(), case.plain())
    assert scenes.portrait_path(case.folder).name == 'r_1.png'


def test_a_portrait_that_is_a_view_tells_the_front(case, monkeypatch):
    looking_along_x(case)
    monkeypatch.setattr(scenes, 'face_votes', lambda image: None)
    shutil.copy(case.folder / 'r_0.png', case.folder / 'portrait.png')
    is_plain(case.views(), case.plain())
    assert scenes.portrait_path(case.folder).name == 'portrait.png'


@pytest.mark.parametrize(('votes', 'reason'), [
    (None, 'without OpenCV (pip install opencv-python-headless) no face is looked for'),
    (0, 'no face is found in its views'),
])
def test_a_front_that_nothing_tells_is_said(case, monkeypatch, capsys, votes, reason):
    looking_along_x(case)
    monkeypatch.setattr(scenes, 'face_votes', lambda image: votes)
    turned = case.views().c2w[0, :3, 3]
    x, y, z = case.plain().c2w[0, :3, 3]
    assert torch.allclose(turned, torch.stack([-y, x, z]), atol=1e-4)
    assert f'{reason}; the front is taken to be along -Y' in capsys.readouterr().err


def test_frames_are_not_turned_by_exif_but_by_their_pose(case):
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in case.paths():
        Image.open(path).save(path, exif=exif)
    is_plain(case.views(), case.plain())
    plain = scenes.portrait_of(case.base, 64)
    assert torch.equal(scenes.portrait_of(case.folder, 64)[0], plain[0])

    # A camera that was held upright: what is up, lies to the right in its image
    for path in case.paths():
        Image.open(path).transpose(Image.ROTATE_270).save(path)
    side = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    case.matrices(lambda matrix: matrix @ side)
    case.write()
    assert torch.equal(scenes.portrait_of(case.folder, 64)[0], plain[0])


# Modes and colour spaces --------------------------------------------------------------------------
def gradient():
    y, x = np.mgrid[:32, :32]
    return Image.fromarray(np.stack([8 * x, 8 * y, 255 - 4 * x - 4 * y], -1).astype(np.uint8))


def rgb_of(path):
    return np.asarray(images.open_image(path))[..., :3].astype(int)


def test_sixteen_and_twelve_bits(tmp_path):
    grey = np.asarray(gradient().convert('L'))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'a.png')
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'a.tiff')
    for name in ('a.png', 'a.tiff'):
        assert np.array_equal(rgb_of(tmp_path / name)[..., 0], grey)
    for mode in ('F', 'I'):
        Image.fromarray(grey).convert(mode).save(tmp_path / f'{mode}.tiff')
        with pytest.raises(rh.Stop, match='no known range'):
            images.open_image(tmp_path / f'{mode}.tiff')


def profile(red, green, blue):
    """An ICC profile of these primaries (XYZ, D50) and a gamma of 2.2."""
    def xyz(values):
        return b'XYZ \0\0\0\0' + b''.join(struct.pack('>i', round(v * 65536)) for v in values)

    curve = b'curv\0\0\0\0' + struct.pack('>IH', 1, 563) + b'\0\0'
    tags = {b'wtpt': xyz((0.9642, 1, 0.8249)), b'rXYZ': xyz(red), b'gXYZ': xyz(green),
            b'bXYZ': xyz(blue), b'rTRC': curve, b'gTRC': curve, b'bTRC': curve,
            b'desc': b'desc\0\0\0\0' + struct.pack('>I', 2) + b'x\0' + b'\0' * 78,
            b'cprt': b'text\0\0\0\0none'}
    body = table = b''
    for name, value in tags.items():
        value += b'\0' * (-len(value) % 4)
        table += name + struct.pack('>II', 132 + 12 * len(tags) + len(body), len(value))
        body += value
    data = struct.pack('>I', len(tags)) + table + body
    return (struct.pack('>I4sI4s4s4s', 128 + len(data), b'none', 0x02400000, b'mntr', b'RGB ',
                        b'XYZ ') + b'\0' * 12 + b'acsp' + b'\0' * 28
            + struct.pack('>iii', 63190, 65536, 54061) + b'\0' * 48 + data)


def test_colour_profiles(tmp_path):
    """(0.5, 0, 0) of Adobe RGB (gamma 2.2) is x = 0.64, y = 0.33, Y = 0.2973 * 0.2181; sRGB's red
    has the same chromaticity and 0.2126: its linear value is 1.398 * 0.2181, its level 148."""
    adobe = profile((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
    Image.new('RGB', (20, 20), (128, 0, 0)).save(tmp_path / 'adobe.png', icc_profile=adobe)
    assert np.abs(rgb_of(tmp_path / 'adobe.png')[0, 0] - (148, 0, 0)).max() <= 2

    # The same without a profile: by the mark in the EXIF of photographs
    exif = Image.Exif()
    exif[0x8769] = {0xA001: 2}
    Image.new('RGB', (20, 20), (128, 0, 0)).save(tmp_path / 'tag.png', exif=exif)
    assert np.abs(rgb_of(tmp_path / 'tag.png')[0, 0] - (148, 0, 0)).max() <= 2

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    gradient().save(tmp_path / 'srgb.png', icc_profile=srgb)
    assert np.array_equal(rgb_of(tmp_path / 'srgb.png'), np.asarray(gradient()))

    gradient().save(tmp_path / 'bad.png', icc_profile=b'no profile')
    with pytest.raises(rh.Stop, match='ICC profile'):
        images.open_image(tmp_path / 'bad.png')


def png_with(path, chunk, data):
    """Puts a chunk behind the head of a PNG file."""
    import zlib
    whole = path.read_bytes()
    body = chunk + data
    piece = struct.pack('>I', len(data)) + body + struct.pack('>I', zlib.crc32(body))
    path.write_bytes(whole[:33] + piece + whole[33:])


def test_gamma_of_png_files(tmp_path):
    """A linear 0.2140 is 0.5 in sRGB: level 55 becomes 127 or 128."""
    path = tmp_path / 'a.png'
    Image.new('RGB', (20, 20), (55, 55, 55)).save(path)
    png_with(path, b'gAMA', struct.pack('>I', 100000))
    assert np.abs(rgb_of(path)[0, 0] - 127.5).max() <= 1


# Formats and limits -------------------------------------------------------------------------------
def test_only_eight_formats_are_opened(tmp_path):
    for suffix in images.SUFFIXES:
        gradient().save(tmp_path / f'a{suffix}')
        assert rgb_of(tmp_path / f'a{suffix}').shape == (32, 32, 3)
    (tmp_path / 'a.eps').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')
    gradient().save(tmp_path / 'a.ico')
    gradient().save(tmp_path / 'a.ppm')
    for name in ('a.eps', 'a.ico', 'a.ppm'):
        os.replace(tmp_path / name, tmp_path / 'b.png')
        with pytest.raises(rh.Stop, match='not a readable image'):
            images.open_image(tmp_path / 'b.png')


def test_heic_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'pillow_heif', None)
    (tmp_path / 'a.heic').write_bytes(b'\0\0\0\x18ftypheic' + b'\0' * 40)
    with pytest.raises(rh.Stop, match='pip install pillow-heif'):
        images.open_image(tmp_path / 'a.heic')


def test_long_thin_portraits_and_photographs_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(images, 'MAX_PIXELS', 2 ** 16)
    monkeypatch.setattr(scenes, 'MAX_PIXELS', 2 ** 16)
    Image.new('RGB', (3000, 16), 'red').save(tmp_path / 'long.png')
    rgb, _ = scenes.read_portrait(tmp_path / 'long.png', 32)
    assert torch.allclose(rgb[:, 16, 16], torch.tensor([1.0, -1, -1]))

    gradient().resize((600, 400)).save(tmp_path / 'large.jpg', quality=95)
    image = images.open_image(tmp_path / 'large.jpg')
    assert image.size == (300, 200)
    assert image.info['shrunk'] == 2
    with pytest.raises(rh.Stop, match='too many'):
        images.open_posed(tmp_path / 'large.jpg')


def test_png_files_with_much_text(tmp_path):
    gradient().save(tmp_path / 'a.png')
    import zlib
    png_with(tmp_path / 'a.png', b'zTXt', b'Comment\0\0' + zlib.compress(b'x' * 5_000_000))
    assert np.array_equal(rgb_of(tmp_path / 'a.png'), np.asarray(gradient()))


# What training reads ------------------------------------------------------------------------------
def test_images_are_looked_for_when_they_are_asked_for(case, tiny, monkeypatch):
    case.write()
    monkeypatch.setattr(transforms.Files, 'list', None)  # cannot be called
    items = batches.Images(case.folder, tiny)
    assert len(items) == 8
    monkeypatch.undo()
    expected = scenes.read_portrait(case.folder / 'r_8.png', tiny.portrait)
    assert torch.equal(batches.in_floats(items[7])['portrait'], expected[0])
    assert torch.equal(batches.in_floats(items[-1])['alpha'], expected[1])


def test_surroundings_are_told(case, capsys):
    case.draw(lambda image: Image.alpha_composite(Image.new('RGBA', image.size, 'green'), image))
    assert not case.views().has_alpha
    assert 'no silhouette' in capsys.readouterr().err
