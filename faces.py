"""Faces in photographs: where they are, how they lean, and how far they look aside.

    find_faces -> by_network (MTCNN, of the package facenet-pytorch), else by_cascades (OpenCV < 5)

Both look at the picture in its four rotations, and again at the levelled surroundings of what they
have found: a thing that is no face is rarely taken for one twice. The network knows faces from the
side, too, where it has been said from about where they are seen (`faces_from`).

The chapters: 1 a face, 2 by a network, 3 by cascades, 4 all of it.
Where a face should be is measured on the frontal portraits of the training avatars, in pixels of a
square of SIDE x SIDE (mean +- standard deviation): MTCNN (59 portraits) has the eyes at (112.8,
80.5) and (144.6, 80.8) +- 1 and the corners of the mouth at (115.5, 116.0) and (141.6, 116.2) +-
1.7. The box of the cascades (176 portraits) is centred at (128.3 +- 0.4, 89.4 +- 1.3) and 82.8 +-
5.1 wide.
"""
import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

import rodinhd as rh

SIDE = 256  # of the square
CENTRE = (128, 89)  # of the face's box in it
WIDTH = 78  # of that box. Photographed eyes are 0.40 to 0.44 boxes apart, the portraits' 0.39
EYES_APART = 31.8  # pixels of the square
EYES_TO_MOUTH = 35.4
EYES_TO_CENTRE = 8.35  # from the eyes down to CENTRE
HEAD_RADIUS = 48.6  # from the axis of the head to the eyes, in front of it
ASIDE = 45  # degrees of yaw from which on a face is one from the side
INSTALL = (
    'pip install "opencv-python-headless<5" requests && pip install --no-deps facenet-pytorch'
)


# 1 A face -----------------------------------------------------------------------------------------
class Face(NamedTuple):
    """A face in an image, in pixels."""

    x: float  # the middle of its box
    y: float
    width: float  # of its box, which is square
    roll: float  # degrees counterclockwise that level it
    yaw: float = 0.0  # degrees that it looks to the image's right; the cascades do not know

    @property
    def centre(self):
        return np.array([self.x, self.y])


def on_white(image):
    """Composites an RGBA image on white -> RGB."""
    white = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(white, image).convert('RGB')


def resized(image, scale):
    """A PIL image `scale` times as large, of at least one pixel a side."""
    size = [max(1, round(n * scale)) for n in image.size]
    return image.resize(size, Image.LANCZOS)


def same(face, other):
    """Whether a face lies on another one."""
    apart = np.abs(face.centre - other.centre).max()
    return apart < 0.5 * max(face.width, other.width)


def turned_back(points, quarters, size):
    """Takes points (.., 2) of a picture turned by quarters counterclockwise back to the one of
    `size` (width, height) that was turned."""
    u, v = np.moveaxis(np.asarray(points, float), -1, 0)
    width, height = size
    places = [(u, v), (width - v, u), (width - u, height - v), (v, height - u)]
    return np.stack(places[quarters], axis=-1)


def axes_of(roll):
    """Unit vectors to the right and down of a face of this roll, in the image (y goes down)."""
    c, s = np.cos(np.radians(roll)), np.sin(np.radians(roll))
    return np.array([c, s]), np.array([-s, c])


def square_around(image, face, size):
    """Returns the levelled square around a face in an RGB image, framed as the portraits, with
    `size` pixels a side, and the matrix (2, 3) from it to the image."""
    right, down = axes_of(face.roll)
    step = face.width * SIDE / WIDTH / size  # of the image, for a pixel of the square
    corner = face.centre - step * size / SIDE * (CENTRE[0] * right + CENTRE[1] * down)
    to_image = np.stack([step * right, step * down, corner], axis=1)
    square = image.transform(
        (size, size), Image.AFFINE, to_image.ravel().tolist(), Image.BICUBIC
    )
    return square, to_image


# 2 By a network -----------------------------------------------------------------------------------
# MTCNN (Zhang et al. 2016): three small networks, each of which looks at what the one before it
# leaves; the last also says where eyes, nose and the corners of the mouth are.
LONGEST = 1280  # pixels of the picture that is looked at, so that faces of 2 % are 25 wide
SURE = 0.98  # of 1, how sure the network must be of a face, each time it looks
CANDIDATE = 0.85
LOOKS = (160, 320)  # pixels of the square around a face that is looked at again


class Marks(NamedTuple):
    """What MTCNN says of a face."""

    score: float  # 0..1
    points: np.ndarray  # (5, 2): left eye, right eye, nose, left and right corner of the mouth


@functools.cache
def network():
    """Returns MTCNN, or None where its package is not installed."""
    try:
        from facenet_pytorch import MTCNN
    except ImportError:
        return None
    return MTCNN(keep_all=True, min_face_size=20, device='cpu').eval()


def marks_in(picture):
    """Returns [Marks] of the faces that MTCNN sees in an RGB picture."""
    if min(picture.size) < 20:
        return []
    _, scores, points = network().detect(picture, landmarks=True)
    if points is None:
        return []
    found = []
    for score, five in zip(scores, points):
        if score is not None and score > CANDIDATE:
            found.append(Marks(float(score), np.array(five, dtype=float)))
    return found


def face_of(points):
    """Returns the Face whose eyes, nose and mouth are at these points (5, 2), or None where no
    face has them so."""
    left, right_eye, nose, mouth_left, mouth_right = points
    eyes = (left + right_eye) / 2
    mouth = (mouth_left + mouth_right) / 2
    across = right_eye - left + mouth_right - mouth_left
    apart = np.linalg.norm(right_eye - left)
    down_to_mouth = np.linalg.norm(mouth - eyes)
    if min(apart, down_to_mouth) < 2 or np.linalg.norm(across) < 2:
        return None

    # The tangent of the yaw is 1.75 times how far the nose is off the line from the eyes to the
    # mouth, in distances of the eyes: measured on 90 renders from -80 to 80 degrees, within 5
    # degrees up to 50.
    line = (mouth - eyes) / down_to_mouth
    off = (nose - eyes) @ [line[1], -line[0]]
    yaw = np.degrees(np.arctan(1.75 * off / apart))
    roll = np.degrees(np.arctan2(across[1], across[0]))

    # Heads that look aside have their eyes closer, heads that look down eyes and mouth.
    flat = max(np.cos(np.radians(yaw)), 0.5)
    scale = (apart / (EYES_APART * flat) + down_to_mouth / EYES_TO_MOUTH) / 2
    right, down = axes_of(roll)
    off_axis = HEAD_RADIUS * np.sin(np.radians(yaw))
    x, y = eyes + scale * (EYES_TO_CENTRE * down - (0.7 + off_axis) * right)
    face = Face(x, y, WIDTH * scale, roll, yaw)
    return face if (mouth - eyes) @ down > 0.5 * down_to_mouth else None


class Look(NamedTuple):
    """What a second look at a face shows."""

    score: float  # 0..1, the lower one of two
    face: Face


def seen_again(image, face):
    """Looks again at a Face in an RGB image, at two sizes -> Look, or None where it is no face."""
    looks = []
    for size in LOOKS:
        square, to_image = square_around(image, face, size)
        near = []
        for marks in marks_in(square):
            again = face_of(marks.points @ to_image[:, :2].T + to_image[:, 2])
            if again is not None and marks.score > SURE and same(again, face):
                near.append(Look(marks.score, again))
        if not near:
            return None
        looks.append(max(near))
    return Look(min(look.score for look in looks), looks[-1].face)


def right_way_up(image, face):
    """Looks again at a Face in an RGB image and, where it is one, at the same place upside down, of
    which the network may be surer -> the Face that it is surest of, or None where it is no face."""
    look = seen_again(image, face)
    if look is None:
        return None
    upside_down = seen_again(image, face._replace(roll=face.roll + 180))
    return max(look, upside_down or look).face


def by_network(image):
    """Finds faces in an RGB image -> [Face] in the first of its rotations that shows any."""
    pixels = np.asarray(image)
    for quarters in (0, 1, 3, 2):
        picture = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, quarters)))
        faces = []
        for marks in sorted(marks_in(picture), key=lambda marks: -marks.score):
            face = face_of(turned_back(marks.points, quarters, image.size))
            if face is None or any(same(face, other) for other in faces):
                continue
            face = right_way_up(image, face)
            if face is not None and not any(same(face, other) for other in faces):
                faces.append(face)
        if faces:
            return faces
    return []


# 3 By cascades ------------------------------------------------------------------------------------
# OpenCV's cascades each give many overlapping boxes around a face, and few around what is none.
# So boxes are grouped, and a group is a face by the number of its boxes: of its votes.
FRONTAL = ('frontalface_default', 'frontalface_alt', 'frontalface_alt2')
PROFILE = ('profileface',)
EYES = ('eye', 'eye_tree_eyeglasses')
VOTES = 58  # overlapping boxes of three cascades, twice looked for, that make a face
LEANS = (0, 28, -28)  # degrees; the cascades miss what leans by more than 20
ANGLES = np.arange(-32, 33, 8)  # in which a face is looked at again, degrees
SIZES = (720, 1600)  # pixels of the longer side of the picture that is looked at


def cascades_in(cv2):
    """Whether an OpenCV has the face cascades; version 5 has none."""
    has_files = hasattr(getattr(cv2, 'data', None), 'haarcascades')
    return hasattr(cv2, 'CascadeClassifier') and has_files


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
    """An RGB image as a gray one (H, W) uint8, `scale` times as large, and brighter: dark skin
    under dark hair has little contrast."""
    gray = np.asarray(resized(image.convert('L'), scale))
    return (255 * (gray / 255) ** 0.5).astype(np.uint8)


def eyes_in(cv2, square):
    """Whether a gray levelled square (256, 256) has one eye at each side of the face, where the
    portraits have them."""
    around = cv2.equalizeHist(square[58:108, 84:172])
    around = cv2.resize(around, None, fx=2.5, fy=2.5, interpolation=cv2.INTER_CUBIC)
    middle = around.shape[1] / 2
    left = right = False
    for cascade in load_cascades(cv2, EYES):
        for x, _, width, _ in cascade.detectMultiScale(around, 1.05, 3, minSize=(28, 28)):
            centre = x + width / 2
            left |= centre < middle - 15
            right |= centre > middle + 15
    return left and right


def skin_in(square):
    """How much of the middle of the face of a levelled RGB square has colours of skin, 0..1."""
    y, cb, cr = np.moveaxis(np.asarray(square.convert('YCbCr'))[70:130, 98:158].astype(int), -1, 0)
    skin = (cr > 134) & (cr < 182) & (cb > 75) & (cb < 130) & (y > 35)
    return skin.mean()


def symmetry_of(square):
    """How alike the sides of the face of a gray levelled square are: their correlation."""
    best = 0
    for shift in range(-8, 9, 2):
        face = square[52:136, 92 + shift:164 + shift].astype(float)
        best = max(best, np.corrcoef(face.ravel(), face[:, ::-1].ravel())[0, 1])
    return best


def looks_like_a_face(cv2, image, face):
    """A second opinion on a Face in an RGB image: it has two eyes, or is of skin and symmetric."""
    square, _ = square_around(image, face, SIDE)
    gray = np.asarray(square.convert('L'))
    if gray[52:136, 92:164].std() < 4:
        return False
    alike = symmetry_of(gray)
    if eyes_in(cv2, gray):
        return alike > 0.3
    return skin_in(square) > 0.5 and alike > 0.5


def by_cascades_at(cv2, image, longest, most):
    """Finds faces in an RGB image whose longer side is made `longest` -> [(Face, votes)]."""
    scale = min(longest / max(image.size), 6)
    frontal = load_cascades(cv2, FRONTAL)
    pixels = np.asarray(image)
    turns = [(0, lean) for lean in LEANS] + [(quarters, 0) for quarters in (1, 3, 2)]
    for quarters, lean in turns:
        picture = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, quarters)))
        gray = gray_of(picture, scale)
        faces = []
        for face, votes in faces_that_lean(cv2, frontal, gray, lean, most):
            x, y = turned_back(face.centre / scale, quarters, image.size)
            face = Face(x, y, face.width / scale, face.roll + 90 * quarters)
            if looks_like_a_face(cv2, image, face):
                faces.append((face, votes))
        if faces:
            return faces
    return []


def by_cascades(cv2, image, most=8):
    """Finds faces in an RGB image -> [Face], and whether there is a face from the side instead."""
    found = by_cascades_at(cv2, image, SIZES[0], most)
    widest = max((face.width for face, _ in found), default=0)
    if max(image.size) > SIZES[0] and widest < max(image.size) / 8:
        others = by_cascades_at(cv2, image, SIZES[1], most)
        found += [
            (face, votes)
            for face, votes in others
            if not any(same(face, other) for other, _ in found)
        ]
    if found:
        most_votes = max(votes for _, votes in found)
        return [face for face, votes in found if votes > 0.3 * most_votes], False

    gray = gray_of(image, min(SIZES[0] / max(image.size), 6))
    mirrored = gray[:, ::-1].copy()  # the cascade knows one side alone
    profile = load_cascades(cv2, PROFILE)
    sides = detect(profile, gray, 40, 6) + detect(profile, mirrored, 40, 6)
    return [], any(group.votes > 6 for group in sides)


# 4 All of it --------------------------------------------------------------------------------------
def opencv():
    """Returns the module cv2, or None where it is not installed."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


def can_find():
    """Whether a package is installed that finds faces."""
    return network() is not None or cascades_in(opencv())


def by_network_in(picture):
    """Finds faces in an RGB image, at a size that shows small ones -> [Face]."""
    scale = min(LONGEST / max(picture.size), 6)
    faces = []
    for face in by_network(resized(picture, scale)):
        x, y, width = (value / scale for value in face[:3])
        faces.append(face._replace(x=x, y=y, width=width))
    return faces


def large_ones(faces):
    """The faces that are more than half as wide as the largest, left to right."""
    widest = max((face.width for face in faces), default=0)
    return sorted((face for face in faces if face.width > 0.5 * widest), key=lambda face: face.x)


def find_faces(image):
    """Finds faces in an RGBA image -> [Face], left to right, and whether there is one from the
    side, too. Faces at most half as wide as the largest are left out. Ends in one line where no
    package is installed that finds faces."""
    picture = on_white(image)
    if network() is not None:
        faces = large_ones(by_network_in(picture))
        frontal = [face for face in faces if abs(face.yaw) < ASIDE]
        return frontal, len(frontal) < len(faces)
    if cascades_in(opencv()):
        faces, aside = by_cascades(opencv(), picture)
        return large_ones(faces), aside
    rh.stop(f'no package is installed that finds faces in photographs: {INSTALL}')


# What MTCNN takes for the middle of a face and for its width, from a camera at these azimuths
# (degrees): medians over 726 renders of 44 training avatars from -20 to 20 degrees above.
AZIMUTHS = (0, 37, 52, 67, 82, 97, 112)
SHIFTS = (0, 2.8, 3.5, 9.6, 13.6, 16, 19)  # pixels of the square, to where the person looks
NARROWER = (1, 0.99, 0.94, 0.86, 0.80, 0.79, 0.76)


def faces_from(image, azimuth):
    """Finds the faces of an RGBA image whose camera is at an azimuth, in degrees, around the head
    (0 is the front, 90 the person's left side) -> [Face], left to right, where the head has its
    middle. Needs the network."""
    shift = np.interp(abs(azimuth), AZIMUTHS, SHIFTS)
    narrower = np.interp(abs(azimuth), AZIMUTHS, NARROWER)
    faces = []
    for face in large_ones(by_network_in(on_white(image))):
        if abs(azimuth) > ASIDE:  # eyes and mouth of a profile do not tell how it leans
            face = face._replace(roll=90 * round(face.roll / 90))
        right, _ = axes_of(face.roll)
        width = face.width / narrower
        x, y = face.centre + np.sign(azimuth) * shift * width / WIDTH * right
        faces.append(face._replace(x=x, y=y, width=width))
    return faces
