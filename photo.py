"""Photographs: an ordinary one becomes a portrait framed as the training portraits are.

    find_faces -> crop_of -> square_of -> cut_out        `align` does it all

The face is found and levelled, the crop shows head and shoulders, and the background goes.

The chapters: 1 faces, 2 the square, 3 the person in the square, 4 what was done, 5 all of it.
Places in the square are in pixels of one of SIDE x SIDE. What the square should show is measured
on the frontal portraits of the 176 training avatars, which are of 32 identities (mean +- standard
deviation): the box that find_faces gives is centred at (128.3 +- 0.4, 89.4 +- 1.3) and 82.8 +- 5.1
wide; the eyes are at (111.5, 80.5) and (143.9, 80.6) +- 1, the chin is near 129, the top of the
hair at 21.7 +- 4.4; the shoulders go from column 33 +- 2 to 222 +- 2, and the bust ends at row
226 +- 2.
"""
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

import rodinhd as rh
import running
import scenes

SIDE = 256  # of the square
CENTRE = (128, 89)  # of the face's box in it
WIDTH = 78  # of that box. Photographed eyes are 0.40 to 0.44 boxes apart, the portraits' 0.39


def import_opencv():
    """Returns the module cv2; ends in one line where it is not installed or has no cascades."""
    try:
        import cv2
    except ImportError:
        rh.stop('photographs need the cv2 package: pip install "opencv-python-headless<5"')
    has_cascades = hasattr(getattr(cv2, 'data', None), 'haarcascades')
    if not hasattr(cv2, 'CascadeClassifier') or not has_cascades:
        rh.stop(
            f'cv2 {cv2.__version__} comes without the face cascades: '
            'pip install "opencv-python-headless<5"'
        )
    return cv2


def on_white(image):
    """Composites an RGBA image on white -> RGB."""
    white = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(white, image).convert('RGB')


def resized(image, scale):
    """A PIL image `scale` times as large, of at least one pixel a side."""
    size = [max(1, round(n * scale)) for n in image.size]
    return image.resize(size, Image.LANCZOS)


# 1 Faces ------------------------------------------------------------------------------------------
# OpenCV's cascades each give many overlapping boxes around a face, and few around what is none.
# So boxes are grouped, and a group is a face by the number of its boxes: of its votes.
FRONTAL = ('frontalface_default', 'frontalface_alt', 'frontalface_alt2')
PROFILE = ('profileface',)
VOTES = 58  # overlapping boxes of three cascades, twice looked for, that make a face
LEANS = (0, 28, -28)  # degrees; the cascades miss what leans by more than 20
ANGLES = np.arange(-32, 33, 8)  # in which a face is looked at again, degrees


class Face(NamedTuple):
    """A face in an image, in pixels."""

    x: float  # the middle of its box
    y: float
    width: float  # of its box, which is square
    roll: float  # degrees counterclockwise that level it

    @property
    def centre(self):
        return np.array([self.x, self.y])


class Group(NamedTuple):
    """Overlapping boxes."""

    box: np.ndarray  # their mean: x, y, width, height
    votes: int


def load_cascades(cv2, names):
    """OpenCV's cascades of these names."""
    folder = cv2.data.haarcascades
    return [cv2.CascadeClassifier(f'{folder}haarcascade_{name}.xml') for name in names]


def overlaps(box, other):
    """Whether more than 0.35 of what two boxes cover together is common to them."""
    start = np.maximum(box[:2], other[:2])
    end = np.minimum(box[:2] + box[2:], other[:2] + other[2:])
    common = np.clip(end - start, 0, None).prod()
    return common > 0.35 * (box[2:].prod() + other[2:].prod() - common)


def groups(boxes, votes):
    """Groups boxes (N, 4), as x, y, width, height, of so many votes each: every box joins the
    first group whose strongest box it overlaps. Returns [Group], most votes first."""

    def strongest_first(items):
        return sorted(items, key=lambda item: -item[1])

    found = []  # lists of (box, votes)
    for box, vote in strongest_first(zip(boxes, votes)):
        for group in found:
            if overlaps(group[0][0], box):
                group.append((box, vote))
                break
        else:
            found.append([(box, vote)])

    merged = []
    for group in found:
        boxes, votes = zip(*group)
        mean = np.average(boxes, axis=0, weights=votes)
        merged.append(Group(mean, sum(votes)))
    return strongest_first(merged)


def detect(cascades, gray, smallest, neighbours, step=1.08):
    """Returns `groups` of what the cascades find together in a gray image."""
    boxes, votes = [], []
    for cascade in cascades:
        these, counts = cascade.detectMultiScale2(
            gray, step, neighbours, minSize=(smallest, smallest)
        )
        boxes += [np.asarray(box, float) for box in these]
        votes += [int(count) for count in np.ravel(counts)]
    return groups(boxes, votes)


def look_again(cv2, frontal, gray, box):
    """Looks at a box again in each of ANGLES -> Face, votes at the best angle.

    Detections thin out as a face leans, so their mean angle, weighted by the squares of the
    votes, is its roll.
    """
    size = 200  # of the picture that is looked at, where the box is 90 wide
    scale = 90 / box[2]
    centre = box[:2] + box[2:] / 2

    rows = []  # votes, x, y, width, angle
    for angle in ANGLES:
        there = cv2.getRotationMatrix2D(tuple(centre), float(angle), scale)
        there[:, 2] += size / 2 - centre
        small = cv2.warpAffine(
            gray,
            there,
            (size, size),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        found = detect(frontal, small, 54, 1, 1.05)
        if not found:
            continue

        (left, top, width, height), votes = found[0]
        middle = np.array([left + width / 2, top + height / 2])
        if np.abs(middle - size / 2).max() < 25:
            x, y = cv2.invertAffineTransform(there) @ [*middle, 1]
            rows.append((votes, x, y, width / scale, angle))

    if not rows:
        rows = [(0, *centre, box[2], 0)]
    rows = np.array(rows, dtype=float)
    weights = rows[:, 0] ** 2 + 1e-9
    face = np.average(rows[:, 1:], axis=0, weights=weights)
    return Face(*face), rows[:, 0].max()


def same(face, other):
    """Whether a face lies on another one."""
    apart = np.abs(face.centre - other.centre).max()
    return apart < 0.5 * max(face.width, other.width)


def on_chest(face, other):
    """Whether a face lies below another one, where the cascades take collars for faces."""
    right, down = (face.centre - other.centre) / other.width
    return abs(right) < 0.8 and 0 < down < 2.2


def faces_that_lean(cv2, frontal, gray, lean, most):
    """Returns [(Face, votes)] of at most `most` faces in a gray image that lean by about `lean`
    degrees, the first found first."""
    height, width = gray.shape
    there = cv2.getRotationMatrix2D((width / 2, height / 2), lean, 1)
    leaning = gray
    if lean:
        leaning = cv2.warpAffine(
            gray, there, (width, height), borderMode=cv2.BORDER_REPLICATE
        )
    needed = 1.5 * VOTES if lean else VOTES

    faces = []
    for box, first in detect(frontal, leaning, 24, 3)[:most]:
        size = box[2:]
        if size[0] < 45 and first < 15:  # small and faint: a pattern as a rule
            continue
        middle = cv2.invertAffineTransform(there) @ [*(box[:2] + size / 2), 1]
        upright = np.array([*(middle - size / 2), *size])
        face, votes = look_again(cv2, frontal, gray, upright)

        found_before = any(same(face, other) for other, _ in faces)
        collar = any(votes < 0.7 * v and on_chest(face, other) for other, v in faces)
        if first + votes >= needed and not collar and not found_before:
            faces.append((face, votes))
    return faces


def gray_of(image, scale):
    """An RGBA image on white as a gray one (H, W) uint8, `scale` times as large, and brighter:
    dark skin under dark hair has little contrast."""
    gray = np.asarray(resized(on_white(image).convert('L'), scale))
    return (255 * (gray / 255) ** 0.5).astype(np.uint8)


def find_faces(image, most=8):
    """Finds faces in an RGBA image -> [Face], left to right, and whether there is a face from the
    side instead. Faces at most half as wide as the largest are left out."""
    cv2 = import_opencv()
    frontal = load_cascades(cv2, FRONTAL)
    profile = load_cascades(cv2, PROFILE)
    scale = min(720 / max(image.size), 2)
    gray = gray_of(image, scale)

    found = []
    for lean in LEANS:
        found = faces_that_lean(cv2, frontal, gray, lean, most)
        if found:
            break

    if not found:
        mirrored = gray[:, ::-1].copy()  # the cascade knows one side alone
        sides = detect(profile, gray, 40, 6) + detect(profile, mirrored, 40, 6)
        return [], any(group.votes > 6 for group in sides)

    most_votes = max(votes for _, votes in found)
    faces = [face for face, votes in found if votes > 0.3 * most_votes]
    widest = max(face.width for face in faces)
    faces = [face for face in faces if face.width > 0.5 * widest]
    faces.sort(key=lambda face: face.x)
    in_image = []
    for x, y, width, roll in faces:
        in_image.append(Face(x / scale, y / scale, width / scale, roll))
    return in_image, False


# 2 The square -------------------------------------------------------------------------------------
# A crop is x, y (its top left corner, which may be negative) and size, in pixels of the image.
def crop_of(face):
    """Returns the crop around a Face that frames it as the training portraits, in whole pixels."""
    size = face.width * SIDE / WIDTH
    x = face.x - size * CENTRE[0] / SIDE
    y = face.y - size * CENTRE[1] / SIDE
    return [round(float(value)) for value in (x, y, size)]


def corners_of(crop, roll):
    """Returns the four corners of a crop that is turned by `roll` degrees about its face, (4, 2),
    in pixels, clockwise from the top left."""
    x, y, size = crop
    centre = np.array(CENTRE) * size / SIDE
    c, s = np.cos(np.radians(roll)), np.sin(np.radians(roll))
    corners = np.array([[0, 0], [size, 0], [size, size], [0, size]])
    return (corners - centre) @ [[c, s], [-s, c]] + centre + [x, y]


def square_of(image, crop, roll):
    """Returns the crop of an RGBA image, turned by `roll`, as a SIDE x SIDE one; it is transparent
    beyond the image's edge."""
    # The crop is at most twice as large as transform() draws it, so that no pixel is skipped.
    small = resized(image, min(1, 2 * SIDE / crop[2]))
    scale = [small.width / image.width, small.height / image.height]
    top_left, top_right, _, bottom_left = corners_of(crop, roll) * scale

    double = 2 * SIDE
    ax, ay = (top_right - top_left) / double
    bx, by = (bottom_left - top_left) / double
    affine = (ax, bx, top_left[0], ay, by, top_left[1])
    square = small.transform((double, double), Image.AFFINE, affine, Image.BICUBIC)
    return square.resize((SIDE, SIDE), Image.LANCZOS)


# 3 The person in the square -----------------------------------------------------------------------
# Where head and shoulders are is known by how the square is framed. GrabCut (Rother et al. 2004)
# finds their outline between a silhouette that everybody fills and one that nobody exceeds.
class Silhouettes(NamedTuple):
    """Masks (SIDE, SIDE) bool of where a person may be."""

    sure: np.ndarray  # skull, neck and chest
    narrow: np.ndarray
    wide: np.ndarray  # outside of it is no person


def ellipse(x, y, cx, cy, rx, ry):
    """Whether points x, y lie in an ellipse of centre cx, cy and radii rx, ry."""
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1


def pixel_centres():
    """y and x of the square's pixels, (SIDE, SIDE) each."""
    return np.mgrid[:SIDE, :SIDE] + 0.5


def silhouettes(cv2, inside):
    """Silhouettes of a person in the square; inside (SIDE, SIDE) bool: where there is a
    photograph."""
    y, x = pixel_centres()
    across = np.abs(x - CENTRE[0])

    head = ellipse(x, y, 128, 86, 36, 54)
    shoulders = (y > 158 + 26 * (across / 80) ** 2.5) & (across < 84)
    neck = (across < 20) & (y > 110)
    narrow = head | shoulders | neck

    head = ellipse(x, y, 128, 90, 84, 88)
    shoulders = (y > 128 + 26 * (across / 110) ** 2) & (across < 124)
    off_edge = cv2.erode(inside.astype(np.uint8), np.ones((1, 9), np.uint8))
    wide = head | shoulders
    wide &= off_edge.astype(bool) | (y > 150)  # no head at the photograph's sides

    skull = ellipse(x, y, 128, 84, 30, 48)
    throat = (across < 14) & (y > 110)
    chest = (across < 45) & (y > 185)
    sure = (skull | throat | chest) & inside
    return Silhouettes(sure, narrow, wide)


def piece_of_face(cv2, person, inside):
    """Of the pixels `person` the piece that the face is in, with its holes filled."""
    pieces = cv2.connectedComponents(person, connectivity=4)[1]
    piece = pieces == pieces[round(CENTRE[1]), round(CENTRE[0])]
    framed = np.pad(piece & inside, 1)
    grounds = cv2.connectedComponents((~framed).astype(np.uint8), connectivity=4)[1]
    hole = grounds != grounds[0, 0]
    return (framed | hole)[1:-1, 1:-1] & inside


def matte(rgb, inside):
    """Finds whose pixels are the person's: rgb (SIDE, SIDE, 3) uint8, inside (SIDE, SIDE) bool,
    where there is a photograph -> (SIDE, SIDE) bool."""
    cv2 = import_opencv()
    sure, narrow, wide = silhouettes(cv2, inside)

    # Between narrow and wide a pixel begins as person in about the inner 60 %.
    to_narrow = cv2.distanceTransform((~narrow).astype(np.uint8), cv2.DIST_L2, 5)
    to_wide = cv2.distanceTransform(wide.astype(np.uint8), cv2.DIST_L2, 5)
    inner = to_wide > 0.4 * (to_wide + to_narrow)
    mask = np.where(inner, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    mask[sure] = cv2.GC_FGD
    mask[~wide | ~inside] = cv2.GC_BGD

    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(rgb, mask, None, *models, 3, cv2.GC_INIT_WITH_MASK)
    person = (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)

    # Threads go, then islands and holes.
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    opened = cv2.morphologyEx(person.astype(np.uint8), cv2.MORPH_OPEN, disc)
    return piece_of_face(cv2, opened | sure, inside)


def clean_rim(cv2, rgb, alpha, person):
    """Gives pixels at a person's rim, where they are mixed with the background, the colours of the
    person near by; rgb (SIDE, SIDE, 3), alpha in 0..1 and person (SIDE, SIDE)."""
    square = np.ones((5, 5), np.uint8)
    inner = cv2.erode(person.astype(np.uint8), square).astype(np.float32)
    total = cv2.GaussianBlur(rgb * inner[..., None], (0, 0), 2)
    weight = cv2.GaussianBlur(inner, (0, 0), 2)
    rim = (alpha < 0.98) & (weight > 1e-3)
    return np.where(rim[..., None], total / (weight[..., None] + 1e-6), rgb)


def bust_alpha():
    """Alpha (SIDE, SIDE) in 0..1 that cuts off where the bust of a training portrait ends."""
    y, x = pixel_centres()
    right = np.clip(np.abs(x - 128) - 74, 0, None)
    down = np.clip(y - 202, 0, None)
    return np.clip(24.5 - np.hypot(right, down), 0, 1)


def cut_out(square, own):
    """Returns a SIDE x SIDE RGBA crop without its background, cut off where the bust of a training
    portrait ends. own: whether it keeps the alpha that it has."""
    cv2 = import_opencv()
    rgba = np.asarray(square)
    rgb = np.ascontiguousarray(rgba[..., :3])
    alpha = rgba[..., 3] / 255
    if not own:
        person = matte(rgb, alpha > 0.5)
        alpha = cv2.GaussianBlur(person.astype(float), (5, 5), 0.7)
        rgb = clean_rim(cv2, rgb, alpha, person)
    result = np.dstack([rgb, 255 * alpha * bust_alpha()])
    return Image.fromarray(result.round().clip(0, 255).astype(np.uint8))


# 4 What was done ----------------------------------------------------------------------------------
# A sheet of pictures by which one sees whether face, crop and mask are right.
def outline(picture, corners, colour):
    """Draws a closed line through four corners (4, 2) on a picture."""
    points = [tuple(corner) for corner in corners[[0, 1, 2, 3, 0]]]
    ImageDraw.Draw(picture).line(points, fill=colour, width=2)


def marked(image, crop, roll, face):
    """Returns the photograph, and beyond its edge as far as the crop goes, about SIDE pixels high
    and at most three times as wide, with the Face (green; None: none) and the crop (red)."""
    frame = corners_of(crop, roll)
    first = np.minimum(frame.min(0), 0)
    last = np.maximum(frame.max(0), image.size)
    width, height = last - first
    scale = SIDE / max(height, width / 3)

    box = [round(float(value)) for value in (*(first * scale), *(last * scale))]
    picture = on_white(resized(image, scale).crop(box))
    outline(picture, (frame - first) * scale, 'red')
    if face is not None:
        square = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
        corners = face.centre + face.width * square
        outline(picture, (corners - first) * scale, 'lime')
    return picture


def save_sheet(path, image, crop, roll, face, square, result):
    """Writes four pictures side by side: the photograph with its Face and crop (see `marked`), the
    crop, the mask, and the result on white."""
    pictures = [
        marked(image, crop, roll, face),
        on_white(square),
        result.getchannel('A').convert('RGB'),
        on_white(result),
    ]
    gap = 4
    width = sum(picture.width + gap for picture in pictures) - gap
    sheet = Image.new('RGB', (width, SIDE), 'gray')
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    with running.atomic(path) as temporary:
        sheet.save(temporary)


# 5 All of it --------------------------------------------------------------------------------------
def only_face(path, image, where):
    """Returns the one Face in an image; ends in one line where there is none, or several.
    where: what that line says of the square that may be given instead."""
    faces, aside = find_faces(image)
    if not faces:
        what = 'no face was found'
        if aside:
            what = (
                'only a face from the side was found, '
                'and the model wants one from the front'
            )
        rh.stop(f'{path}: {what}; to go on anyway give a square, --crop X Y SIZE {where}')
    if len(faces) > 1:
        choices = []
        shrunk = image.info.get('shrunk', 1)
        for face in faces:
            crop = ' '.join(str(shrunk * value) for value in crop_of(face))
            choices.append(f'at ({face.x * shrunk:.0f}, {face.y * shrunk:.0f}) --crop {crop}')
        listed = '; '.join(choices)
        rh.stop(f'{path}: {len(faces)} faces were found, choose one: {listed}')
    return faces[0]


def check_crop(path, image, crop, where):
    """Ends in one line unless a crop is of a fair size and meets the photograph."""
    x, y, size = crop
    fair = 16 <= size <= 4 * max(image.size)
    meets = -size < x < image.width and -size < y < image.height
    if not fair or not meets:
        rh.stop(
            f'{path}: --crop {x} {y} {size}: '
            f'give a square that meets the photograph, {where}'
        )


def align(path, size, crop=None, sheet=None):
    """Makes a portrait of a photograph of one person -> rgb (3, size, size) in [-1, 1] and alpha
    (1, size, size) in 0..1, as scenes.read_portrait gives them.

    crop: (x, y, size) in pixels of the upright photograph, which may reach beyond its edge;
    without one the face is looked for. sheet: an image file to write, which shows what was done.
    Ends in one line where no face, several or only profiles are found.
    """
    image = scenes.open_image(path)
    shrunk = image.info.get('shrunk', 1)
    where = (
        f'in pixels of the {shrunk * image.width} x {shrunk * image.height}, '
        'the face in its middle a third of the way down and a third as wide'
    )
    face = None
    roll = 0.0
    if crop is None:
        face = only_face(path, image, where)
        crop = crop_of(face)
        if abs(face.roll) > 4:
            roll = face.roll
    else:
        crop = [value / shrunk for value in crop] if shrunk > 1 else crop
    check_crop(path, image, crop, where)

    square = square_of(image, crop, roll)
    transparent = np.asarray(image.getchannel('A')) < 128
    own = transparent.mean() > 0.1  # it has been cut out before
    result = cut_out(square, own)
    if sheet is not None:
        save_sheet(sheet, image, crop, roll, face, square, result)

    small = np.asarray(result.resize((size, size), Image.LANCZOS)).copy()
    rgba = torch.from_numpy(small).permute(2, 0, 1).float() / 255
    return rgba[:3] * 2 - 1, rgba[3:]
