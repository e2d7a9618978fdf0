"""Photographs: faces are framed as the training portraits are, the background goes, and what cannot be done is said in one line."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import photo


@pytest.fixture(scope='module')
def astronaut():
    """NASA's portrait of Eileen Collins, in the public domain: the pupils are at (203.4, 100.8) and (246.8, 103.1)."""
    cv2 = pytest.importorskip('cv2')
    if not hasattr(cv2, 'CascadeClassifier'):
        pytest.skip('this OpenCV has no face cascades: pip install "opencv-python-headless<5"')
    return Image.fromarray(pytest.importorskip('skimage.data').astronaut())


def refused(path, image, **how):
    """The line in which align refuses an image."""
    image.save(path)
    with pytest.raises(SystemExit) as error:
        photo.align(path, 64, **how)
    assert str(error.value).startswith(f'error: {path}: ') and '\n' not in str(error.value)
    return str(error.value)


def in_square(crop, roll, point):
    """Where a point of the photograph lies in the square: by solving for the corners' basis."""
    a, b, _, d = photo.corners_of(crop, roll)
    return np.linalg.solve(np.stack([b - a, d - a], axis=1), np.array(point) - a) * photo.SIDE


def assert_framed(rgb, alpha):
    """Person in the middle, in her colours; nothing in the corners or below the bust."""
    assert rgb.shape == (3, 128, 128) and alpha.shape == (1, 128, 128) and rgb.abs().max() <= 1 and 0 <= alpha.min() <= alpha.max() <= 1
    assert alpha[0, 25:65, 52:76].min() > 0.95 and alpha[0, 95:110, 40:88].min() > 0.95       # face, chest; Lanczos rings
    assert max(alpha[0, :50, :12].max(), alpha[0, :50, -12:].max(), alpha[0, 115:].max()) < 0.02
    assert 0.25 < alpha.mean() < 0.5
    r, g, b = ((rgb + 1) / 2)[:, 42:48, 58:70].flatten(1).mean(1)
    assert 0.6 < r < 1 and r > g > b and r - b > 0.1                                          # skin


def test_a_photograph_is_framed_as_the_portraits(astronaut, tmp_path):
    astronaut.save(tmp_path / 'a.png')
    assert_framed(*photo.align(tmp_path / 'a.png', 128, sheet=tmp_path / 'new' / 'align.png'))
    with Image.open(tmp_path / 'new' / 'align.png') as sheet:
        assert sheet.height == photo.SIDE and sheet.width > 3 * photo.SIDE
    assert len(list((tmp_path / 'new').iterdir())) == 1


def test_eyes_are_where_the_portraits_have_them(astronaut):
    """Also where the photograph leans, is large, or small: rows 80.6 +- 6, columns 111.5 and 143.9 +- 6, level within 4 degrees."""
    grounds = {'small': (0, 0.5), 'leans': (-20, 0.7), 'large, leans': (12, 2)}
    for name, (lean, scale) in grounds.items():
        image = astronaut.rotate(lean, resample=Image.BICUBIC, fillcolor=(180, 175, 170))
        image = image.resize([round(n * scale) for n in image.size], Image.LANCZOS).convert('RGBA')
        (face,), aside = photo.find_faces(image)
        c, s = np.cos(np.radians(lean)), np.sin(np.radians(lean))
        eyes = (np.array([[203.4, 100.8], [246.8, 103.1]]) - 256) @ np.array([[c, -s], [s, c]]) + 256
        left, right = (in_square(photo.crop_of(face), face[3], eye * scale) for eye in eyes)
        assert not aside and np.abs(left - [111.5, 80.6]).max() < 6 and np.abs(right - [143.9, 80.6]).max() < 6, (name, left, right)
        assert abs(np.degrees(np.arctan2(*(right - left)[::-1]))) < 4, name


def test_a_square_is_the_crop():
    """Known picture: x and y as colours; beyond the edge it is transparent, and a turn goes about the face."""
    y, x = np.mgrid[:200, :200].astype(np.uint8)
    image = Image.fromarray(np.dstack([x, y, 0 * x, 0 * x + 255]))
    square = np.asarray(photo.square_of(image, (50, 20, 128), 0.0)).astype(int)
    assert np.abs(square[64, 128, :2] - [50 + 64, 20 + 32]).max() <= 1 and square[..., 3].min() == 255
    square = np.asarray(photo.square_of(image, (-64, 0, 128), 0.0)).astype(int)
    assert square[:, :124, 3].max() == 0 and square[:, 132:, 3].min() == 255
    for roll in (0.0, 30.0, -90.0):
        square = np.asarray(photo.square_of(image, (40, 40, 100), roll)).astype(int)
        assert np.abs(square[89, 128, :2] - [40 + 50, 40 + 100 * 89 / 256]).max() < 2
    right = np.asarray(photo.square_of(image, (40, 40, 100), 90.0)).astype(int)[89, 200]      # counterclockwise: right is what was below
    assert np.abs(right[:2] - [90, 40 + (89 + 72) * 100 / 256]).max() < 2


def test_of_several_faces_one_is_to_be_chosen(astronaut, tmp_path):
    both = Image.new('RGB', (660, 330))
    for left in (0, 330):
        both.paste(astronaut.crop((60, 0, 390, 330)), (left, 0))
    line = refused(tmp_path / 'two.png', both)
    crops = [[int(n) for n in part.split()[:3]] for part in line.replace(';', '').split('--crop ')[1:]]
    assert '2 faces' in line and len(crops) == 2 and abs(crops[1][0] - crops[0][0] - 330) < 8
    for crop in crops:
        assert_framed(*photo.align(tmp_path / 'two.png', 128, crop))


def test_a_small_face_beside_a_large_one_is_nobody(astronaut):
    head = astronaut.crop((100, 0, 350, 250))
    for width, count in ((100, 1), (180, 2)):
        both = Image.new('RGB', (450, 250), 'gray')
        both.paste(head, (0, 0))
        both.paste(head.resize((width, width), Image.LANCZOS), (260, 40))
        faces, _ = photo.find_faces(both.convert('RGBA'))
        assert len(faces) == count and faces[0][0] < 250


def test_no_face_is_said(astronaut, tmp_path):
    line = refused(tmp_path / 'cup.png', Image.fromarray(pytest.importorskip('skimage.data').coffee()).reduce(2))
    assert 'no face' in line and '--crop X Y SIZE' in line and '300 x 200' in line
    assert 'no face' in refused(tmp_path / 'gray.png', Image.new('RGB', (64, 64), 'gray'))
    for size in ((1, 1), (5000, 3)):
        assert 'no face' in refused(tmp_path / 'thin.png', Image.new('RGB', size))


def test_a_face_from_the_side_is_said(astronaut, tmp_path):
    line = refused(tmp_path / 'side.png', Image.fromarray(pytest.importorskip('skimage.data').camera()).reduce(2))
    assert 'from the side' in line and '--crop X Y SIZE' in line


def test_a_crop_by_hand_looks_for_no_face(astronaut, tmp_path, monkeypatch):
    monkeypatch.setattr(photo, 'find_faces', None)
    astronaut.save(tmp_path / 'a.png')
    assert_framed(*photo.align(tmp_path / 'a.png', 128, [60, -8, 326], sheet=tmp_path / 'align.png'))
    assert (tmp_path / 'align.png').is_file()
    for crop in ([600, 0, 100], [0, -200, 150], [0, 0, 3], [0, 0, 10 ** 6]):
        assert f'--crop {crop[0]} {crop[1]} {crop[2]}' in refused(tmp_path / 'a.png', astronaut, crop=crop)


def test_a_crop_off_the_edge_is_empty_there(astronaut, tmp_path):
    astronaut.crop((120, 0, 330, 220)).save(tmp_path / 'tight.png')                           # hair, face, no shoulders
    _, alpha = photo.align(tmp_path / 'tight.png', 128)
    assert alpha[0, 30:60, 54:74].min() > 0.95 and alpha[0, 92:].max() < 0.02


def test_a_person_cut_out_before_keeps_the_alpha(astronaut, tmp_path):
    y, x = np.mgrid[:512, :512]
    disc = np.uint8(255) * (np.hypot(x - 224, y - 120) < 110)
    Image.fromarray(np.dstack([np.asarray(astronaut), disc])).save(tmp_path / 'a.png')
    _, alpha = photo.align(tmp_path / 'a.png', 128, [60, -8, 326])
    v, u = np.mgrid[:128, :128] + 0.5
    expected = np.hypot(u * 326 / 128 + 60 - 224.5, v * 326 / 128 - 8 - 120.5) < 110
    assert ((alpha[0].numpy() > 0.5) != expected).mean() < 0.01


def test_the_matte_is_that_of_the_silhouette(astronaut):
    """A drawn bust of several colours on a wall of two: GrabCut gets more than 95 % of it; holes are filled, islands dropped."""
    y, x = np.mgrid[:256, :256] + 0.5
    head, body = photo.ellipse(x, y, 128, 82, 42, 58), (y > 150 + (np.abs(x - 128) / 14) ** 2) & (np.abs(x - 128) < 95)
    person = head | body | ((np.abs(x - 128) < 22) & (y > 100))
    rgb = np.where(y[..., None] < 120, [90, 120, 170], [120, 150, 120]).astype(float)
    rgb[person], rgb[body], rgb[head & (y < 55)] = [215, 160, 130], [130, 40, 45], [50, 35, 25]
    rgb[photo.ellipse(x, y, 64, 200, 9, 9)] = [90, 120, 170]
    rgb = (rgb + np.random.default_rng(0).normal(0, 6, rgb.shape)).clip(0, 255).astype(np.uint8)
    found = photo.matte(rgb, np.ones((256, 256), bool))
    assert (found & person).sum() / (found | person).sum() > 0.95 and found[200, 64]


@pytest.mark.parametrize('module', [None, SimpleNamespace(__version__='5.0.0')])
def test_without_its_package_it_says_what_to_install(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, 'cv2', module)
    Image.new('RGB', (64, 64)).save(tmp_path / 'a.png')
    with pytest.raises(SystemExit) as error:
        photo.align(tmp_path / 'a.png', 64)
    line = str(error.value)
    assert 'pip install "opencv-python-headless<5"' in line and '\n' not in line and ('5.0.0' in line) == (module is not None)


def test_no_photograph_at_all(tmp_path):
    with pytest.raises(SystemExit, match='there is no such image'):
        photo.align(tmp_path / 'a.png', 64)
