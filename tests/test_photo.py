"""Photographs: faces are framed as the training portraits are, the background goes, and what cannot
be done is said in one line."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import faces
import photo
import rodinhd as rh
import scenes

PUPILS = np.array([[203.4, 100.8], [246.8, 103.1]])  # of the astronaut, in pixels
EYE_COLUMNS = (111.5, 143.9)  # where the portraits have them in the square
EYE_ROW = 80.6


@pytest.fixture(autouse=True)
def one_thread():
    pytest.importorskip('cv2').setNumThreads(1)


@pytest.fixture(scope='module')
def astronaut():
    """NASA's portrait of Eileen Collins, in the public domain, 512 x 512."""
    if not faces.can_find():
        pytest.skip(f'nothing here finds faces: {faces.INSTALL}')
    return Image.fromarray(pytest.importorskip('skimage.data').astronaut())


def refused(path, image, **how):
    """The line in which align refuses an image."""
    image.save(path)
    with pytest.raises(rh.Stop) as stopped:
        photo.align(path, 64, **how)
    line = str(stopped.value)
    assert line.startswith(f'{path}: ')
    assert '\n' not in line
    return line


def in_square(crop, roll, point):
    """Where a point of the photograph lies in the square: by solving for the corners' basis."""
    a, b, _, d = photo.corners_of(crop, roll)
    basis = np.stack([b - a, d - a], axis=1)
    return np.linalg.solve(basis, np.array(point) - a) * photo.SIDE


def assert_framed(rgb, alpha):
    """Person in the middle, in her colours; nothing in the corners or below the bust."""
    assert rgb.shape == (3, 128, 128)
    assert alpha.shape == (1, 128, 128)
    assert rgb.abs().max() <= 1
    assert 0 <= alpha.min() <= alpha.max() <= 1

    # Lanczos rings, so that what is solid is not quite 1
    face = alpha[0, 25:65, 52:76]
    chest = alpha[0, 95:110, 40:88]
    assert face.min() > 0.95
    assert chest.min() > 0.95
    for empty in (alpha[0, :50, :12], alpha[0, :50, -12:], alpha[0, 115:]):
        assert empty.max() < 0.02
    assert 0.25 < alpha.mean() < 0.5

    skin = ((rgb + 1) / 2)[:, 42:48, 58:70]
    r, g, b = skin.flatten(1).mean(1)
    assert 0.6 < r < 1
    assert r > g > b
    assert r - b > 0.1


# Faces and framing --------------------------------------------------------------------------------
def test_a_photograph_is_framed_as_the_portraits(astronaut, tmp_path):
    astronaut.save(tmp_path / 'a.png')
    sheet_path = tmp_path / 'new' / 'align.png'
    assert_framed(*photo.align(tmp_path / 'a.png', 128, sheet=sheet_path)[:2])
    with Image.open(sheet_path) as sheet:
        assert sheet.height == photo.SIDE
        assert sheet.width > 3 * photo.SIDE
    assert len(list(sheet_path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ('lean', 'scale'),
    [(0, 0.5), (-20, 0.7), (12, 2)],
    ids=['small', 'leans', 'large and leans'],
)
def test_eyes_are_where_the_portraits_have_them(astronaut, lean, scale):
    """Within 6 pixels of the square, and level within 4 degrees."""
    image = astronaut.rotate(lean, resample=Image.BICUBIC, fillcolor=(180, 175, 170))
    image = image.resize([round(n * scale) for n in image.size], Image.LANCZOS)
    (face,), aside = faces.find_faces(image.convert('RGBA'))
    assert not aside

    c = np.cos(np.radians(lean))
    s = np.sin(np.radians(lean))
    turned = (PUPILS - 256) @ np.array([[c, -s], [s, c]]) + 256
    crop = photo.crop_of(face)
    left, right = (in_square(crop, face.roll, eye * scale) for eye in turned)
    assert np.abs(left - [EYE_COLUMNS[0], EYE_ROW]).max() < 6
    assert np.abs(right - [EYE_COLUMNS[1], EYE_ROW]).max() < 6
    across, down = right - left
    assert abs(np.degrees(np.arctan2(down, across))) < 4


def square_array(image, crop, roll):
    return np.asarray(photo.square_of(image, crop, roll)).astype(int)


def test_a_square_is_the_crop():
    """Of a known picture, with x and y as its colours: beyond the edge it is transparent, and a
    turn goes about the face."""
    y, x = np.mgrid[:200, :200].astype(np.uint8)
    image = Image.fromarray(np.dstack([x, y, 0 * x, 0 * x + 255]))

    square = square_array(image, (50, 20, 128), 0.0)
    assert np.abs(square[64, 128, :2] - [50 + 64, 20 + 32]).max() <= 1
    assert square[..., 3].min() == 255

    square = square_array(image, (-64, 0, 128), 0.0)
    assert square[:, :124, 3].max() == 0
    assert square[:, 132:, 3].min() == 255

    face = [40 + 50, 40 + 100 * 89 / 256]
    for roll in (0.0, 30.0, -90.0):
        square = square_array(image, (40, 40, 100), roll)
        assert np.abs(square[89, 128, :2] - face).max() < 2

    # Counterclockwise: right is what was below
    right = square_array(image, (40, 40, 100), 90.0)[89, 200, :2]
    assert np.abs(right - [90, 40 + (89 + 72) * 100 / 256]).max() < 2


def test_of_several_faces_one_is_to_be_chosen(astronaut, tmp_path):
    both = Image.new('RGB', (660, 330))
    for left in (0, 330):
        both.paste(astronaut.crop((60, 0, 390, 330)), (left, 0))
    line = refused(tmp_path / 'two.png', both)
    assert '2 faces' in line

    choices = line.replace(';', '').split('--crop ')[1:]
    crops = [[int(n) for n in choice.split()[:3]] for choice in choices]
    assert len(crops) == 2
    assert abs(crops[1][0] - crops[0][0] - 330) < 8
    for crop in crops:
        assert_framed(*photo.align(tmp_path / 'two.png', 128, crop)[:2])


@pytest.mark.parametrize(('width', 'count'), [(100, 1), (180, 2)])
def test_a_small_face_beside_a_large_one_is_nobody(astronaut, width, count):
    head = astronaut.crop((100, 0, 350, 250))
    both = Image.new('RGB', (450, 250), 'gray')
    both.paste(head, (0, 0))
    both.paste(head.resize((width, width), Image.LANCZOS), (260, 40))
    found, _ = faces.find_faces(both.convert('RGBA'))
    assert len(found) == count
    assert found[0].x < 250


# What is refused ----------------------------------------------------------------------------------
def test_no_face_is_said(astronaut, tmp_path):
    cup = Image.fromarray(pytest.importorskip('skimage.data').coffee()).reduce(2)
    line = refused(tmp_path / 'cup.png', cup)
    assert 'no face' in line
    assert '--crop X Y SIZE' in line
    assert '300 x 200' in line

    gray = Image.new('RGB', (64, 64), 'gray')
    assert 'no face' in refused(tmp_path / 'gray.png', gray)
    for size in ((1, 1), (5000, 3)):
        assert 'no face' in refused(tmp_path / 'thin.png', Image.new('RGB', size))


def test_a_face_from_the_side_is_said(astronaut, tmp_path):
    side = Image.fromarray(pytest.importorskip('skimage.data').camera()).reduce(2)
    line = refused(tmp_path / 'side.png', side)
    assert 'from the side' in line
    assert '--crop X Y SIZE' in line


@pytest.mark.parametrize('module', [None, SimpleNamespace(__version__='5.0.0')])
def test_without_its_packages_it_says_what_to_install(monkeypatch, tmp_path, module):
    """OpenCV may be missing, or be a version without the cascades, and MTCNN be missing, too."""
    monkeypatch.setitem(sys.modules, 'cv2', module)
    monkeypatch.setattr(faces, 'network', lambda: None)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / 'a.png')
    with pytest.raises(rh.Stop) as stopped:
        photo.align(tmp_path / 'a.png', 64)
    line = str(stopped.value)
    assert faces.INSTALL in line
    assert '\n' not in line

    # What cannot be recognised is taken as it is
    rgb, alpha, known = photo.read(tmp_path / 'a.png', 64)
    assert torch.equal(rgb, scenes.read_portrait(tmp_path / 'a.png', 64)[0])
    assert known.min() == alpha.min() == 1


def test_no_photograph_at_all(tmp_path):
    with pytest.raises(rh.Stop, match='there is no such image'):
        photo.align(tmp_path / 'a.png', 64)


# What needs no option -----------------------------------------------------------------------------
def test_a_photograph_is_recognised(astronaut, tmp_path, capsys):
    astronaut.save(tmp_path / 'a.png')
    aligned = photo.align(tmp_path / 'a.png', 128)
    capsys.readouterr()
    read = photo.read(tmp_path / 'a.png', 128)
    assert all(torch.equal(x, y) for x, y in zip(read, aligned))
    line, = capsys.readouterr().err.splitlines()
    assert '--no-align' in line

    rgb, alpha, _ = photo.read(tmp_path / 'a.png', 128, align_it=False)
    assert alpha.min() == 1
    assert torch.equal(rgb, scenes.read_portrait(tmp_path / 'a.png', 128)[0])


def test_a_photograph_of_no_face_is_refused_with_the_way_out(astronaut, tmp_path):
    cup = Image.fromarray(pytest.importorskip('skimage.data').coffee()).reduce(2)
    cup.save(tmp_path / 'cup.png')
    with pytest.raises(rh.Stop) as stopped:
        photo.read(tmp_path / 'cup.png', 64)
    line = str(stopped.value)
    assert '--no-align' in line
    assert '--crop X Y SIZE' in line
    assert '\n' not in line


@pytest.mark.parametrize('ground', [None, 'white', (200, 205, 210)])
@pytest.mark.parametrize('name', ['portrait', 'smile'])
def test_a_portrait_stays_as_it_is(tmp_path, name, ground):
    path = ROOT / 'examples' / f'{name}.png'
    if ground:
        with Image.open(path) as image:
            on_ground = Image.new('RGBA', image.size, ground)
            on_ground.alpha_composite(image.convert('RGBA'))
        path = tmp_path / 'a.png'
        on_ground.convert('RGB').save(path)
    sheet = tmp_path / 'align.png'
    rgb, alpha, known = photo.read(path, 96, sheet=sheet)
    expected = scenes.read_portrait(path, 96)
    assert torch.equal(rgb, expected[0])
    assert torch.equal(alpha, expected[1])
    assert known.min() == 1
    assert not sheet.exists()


def test_a_small_portrait_on_white_is_framed(astronaut, tmp_path):
    """A third as large and in a corner: it comes back at its place."""
    with Image.open(ROOT / 'examples' / 'smile.png') as image:
        figure = image.convert('RGBA').resize((200, 200), Image.LANCZOS)
    page = Image.new('RGBA', (600, 600), 'white')
    page.alpha_composite(figure, (360, 380))
    page.convert('RGB').save(tmp_path / 'a.png')
    found, _ = faces.find_faces(page)
    x, y, size = photo.crop_of(found[0])
    assert abs(x - 360) < 12
    assert abs(y - 380) < 12
    assert 0.85 < size / 200 < 1.15
    assert photo.read(tmp_path / 'a.png', 96).alpha[0, :8].max() < 0.02


def test_a_picture_on_its_side_is_turned(astronaut, tmp_path):
    """The nozzle of the rocket was taken for a face, once the picture was turned."""
    for quarters in (1, 2, 3) if faces.network() else (1,):  # the cascades are slow
        turned = astronaut.reduce(2).rotate(90 * quarters, expand=True)
        (face,), _ = faces.find_faces(turned.convert('RGBA'))
        expected = turned_point(PUPILS.mean(0), quarters, 512) / 2
        assert np.abs(face.centre - expected).max() < 15
        off = (face.roll + 90 * quarters + 180) % 360 - 180
        assert abs(off) < 8


def turned_point(point, quarters, side):
    """Where a point goes that PIL turns by quarters counterclockwise with a square picture."""
    x, y = point
    for _ in range(quarters):
        x, y = y, side - x
    return np.array([x, y])


def test_a_head_that_is_cut_is_refused(astronaut, tmp_path):
    half = astronaut.crop((215, 0, 512, 512))
    half.save(tmp_path / 'half.png')
    with pytest.raises(rh.Stop) as stopped:
        photo.read(tmp_path / 'half.png', 64)
    assert '\n' not in str(stopped.value)
    assert '--crop' in str(stopped.value)


def test_half_a_face_is_cut_at_its_side():
    """The network takes what is there for a whole face that looks aside: only the rows tell."""
    _, x = photo.pixel_centres()
    everywhere = np.ones((256, 256))
    right_half = (x > 110).astype(float)
    assert photo.rows_cut(right_half, right_half) > photo.SIDE_CUT
    assert photo.rows_cut(right_half, right_half * (x > 140)) == 0  # the head begins further in
    assert photo.rows_cut(everywhere.T, everywhere) == 0
    with pytest.raises(rh.Stop, match='a side of the head is'):
        photo.refuse_cut_head('a.png', x > 93, x > 93, 'go on')


def test_a_face_is_not_taken_upside_down():
    """In the second of its rotations this picture has the face upside down, and MTCNN is sure of
    it."""
    if faces.network() is None:
        pytest.skip('by MTCNN')
    cbook = pytest.importorskip('matplotlib.cbook')
    with Image.open(cbook.get_sample_data('grace_hopper.jpg')) as image:
        turned = image.rotate(90, expand=True)
    (face,), _ = faces.find_faces(turned.convert('RGBA'))
    assert face.roll == pytest.approx(-90, abs=10)


# From the side ------------------------------------------------------------------------------------
def test_a_view_is_aligned_as_the_portrait_is(astronaut, tmp_path, capsys):
    if faces.network() is None:
        pytest.skip('by MTCNN')
    path = tmp_path / 'a.png'
    astronaut.reduce(2).save(path)
    portrait = photo.read(path, 64)
    seen = photo.read_view(path, 64, 0, sheet=tmp_path / 'align-view.png')
    assert all(torch.equal(x, y) for x, y in zip(seen, portrait))
    assert (tmp_path / 'align-view.png').exists()
    as_it_is = photo.read_view(path, 64, 0, align_it=False)
    assert torch.equal(as_it_is.rgb, scenes.read_portrait(path, 64)[0])
    capsys.readouterr()

    with pytest.raises(rh.Stop, match='no faces were found'):
        photo.read_view(path, 64, 150)


def test_faces_from_the_side_are_corrected(monkeypatch):
    """A profile's eyes are in front of the head's middle, and closer together."""
    found = faces.Face(100.0, 80.0, 78.0, 5.0, yaw=-60)  # looks to the left
    monkeypatch.setattr(faces, 'by_network_in', lambda picture: [found])
    face, = faces.faces_from(Image.new('RGBA', (256, 256)), 82)
    assert face.roll == 0
    assert face.width == pytest.approx(78 / 0.80)
    assert face.x == pytest.approx(100 + 13.6 / 0.80)
    assert face.y == pytest.approx(80)


def test_a_cut_out_view_stays_as_it_is():
    path = ROOT / 'examples' / 'smile.png'
    seen = photo.read_view(path, 64, 170)
    assert torch.equal(seen.rgb, scenes.read_portrait(path, 64)[0])


def test_without_mtcnn_a_photographed_view_is_taken_as_it_is_and_a_line_says_so(
    astronaut, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(faces, 'network', lambda: None)
    path = tmp_path / 'b.png'
    astronaut.reduce(4).save(path)
    photo.read_view(path, 64, 40)
    photo.read_view(ROOT / 'examples' / 'smile.png', 64, 40)
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith(f'note: {path}: taken as it is') and faces.INSTALL in said


# Crops by hand ------------------------------------------------------------------------------------
def test_a_crop_by_hand_looks_for_no_face(astronaut, tmp_path, monkeypatch):
    monkeypatch.setattr(faces, 'find_faces', None)
    path = tmp_path / 'a.png'
    sheet = tmp_path / 'align.png'
    astronaut.save(path)
    assert_framed(*photo.align(path, 128, [60, -8, 326], sheet=sheet)[:2])
    assert sheet.is_file()
    for crop in ([600, 0, 100], [0, -200, 150], [0, 0, 3], [0, 0, 10 ** 6]):
        x, y, size = crop
        assert f'--crop {x} {y} {size}' in refused(path, astronaut, crop=crop)


def test_a_crop_off_the_edge_is_empty_there(astronaut, tmp_path):
    tight = astronaut.crop((120, 0, 330, 220))  # hair and face, no shoulders
    tight.save(tmp_path / 'tight.png')
    _, alpha, known = photo.align(tmp_path / 'tight.png', 128)
    assert alpha[0, 30:60, 54:74].min() > 0.95
    assert alpha[0, 92:].max() < 0.02
    assert known[0, 30:60, 40:90].min() == 1
    assert known[0, 95:].max() == 0


# The person ---------------------------------------------------------------------------------------
def test_a_person_cut_out_before_keeps_the_alpha(astronaut, tmp_path):
    y, x = np.mgrid[:512, :512]
    disc = np.uint8(255) * (np.hypot(x - 224, y - 120) < 110)
    Image.fromarray(np.dstack([np.asarray(astronaut), disc])).save(tmp_path / 'a.png')
    _, alpha, _ = photo.align(tmp_path / 'a.png', 128, [60, -8, 326])

    v, u = (np.mgrid[:128, :128] + 0.5) * 326 / 128
    expected = np.hypot(u + 60 - 224.5, v - 8 - 120.5) < 110
    assert ((alpha[0].numpy() > 0.5) != expected).mean() < 0.01


def test_the_matte_is_that_of_the_silhouette(astronaut):
    """A drawn bust of several colours on a wall of two: GrabCut gets more than 95 % of it; holes
    are filled, islands dropped."""
    y, x = np.mgrid[:256, :256] + 0.5
    across = np.abs(x - 128)
    head = photo.ellipse(x, y, 128, 82, 42, 58)
    body = (y > 150 + (across / 14) ** 2) & (across < 95)
    neck = (across < 22) & (y > 100)
    person = head | body | neck
    hair = head & (y < 55)
    hole = photo.ellipse(x, y, 64, 200, 9, 9)

    rgb = np.where(y[..., None] < 120, [90, 120, 170], [120, 150, 120]).astype(float)
    rgb[person] = [215, 160, 130]
    rgb[body] = [130, 40, 45]
    rgb[hair] = [50, 35, 25]
    rgb[hole] = [90, 120, 170]
    noise = np.random.default_rng(0).normal(0, 6, rgb.shape)
    rgb = (rgb + noise).clip(0, 255).astype(np.uint8)

    cv2 = photo.import_opencv()
    found = photo.matte_by_grabcut(cv2, rgb, np.ones((256, 256), bool)) > 0.5
    assert (found & person).sum() / (found | person).sum() > 0.95
    assert found[200, 64]
