"""An ordinary photograph -> a portrait framed as the training portraits are: face found and levelled, head and shoulders, no background.

find_faces -> crop_of -> square_of -> cut_out (matte); `align` does it all. Places in the square are in pixels of one of SIDE x SIDE.

The frontal portraits of the 176 training avatars (32 identities; mean +- standard deviation): the box that find_faces gives is centred
at (128.3 +- 0.4, 89.4 +- 1.3) and 82.8 +- 5.1 wide, eyes at (111.5, 80.5) and (143.9, 80.6) +- 1, chin near 129, top of the hair at
21.7 +- 4.4, shoulders from column 33 +- 2 to 222 +- 2; the bust ends at row 226 +- 2.
"""
import numpy as np
import torch
from PIL import Image, ImageDraw

import rodinhd as rh

SIDE, CENTRE = 256, (128, 89)                           # the square; the middle of the face's box in it
WIDTH = 78                                              # of the box. Photographed eyes are 0.40 to 0.44 boxes apart, the portraits' 0.39
ANGLES = np.arange(-32, 33, 8)                          # in which faces are looked for, degrees
VOTES = 58                                              # overlapping detections of three cascades, twice looked for, that make a face

def load_opencv():
    """(cv2, frontal cascades, profile cascade); one line where they are not installed."""
    try:
        import cv2
    except ImportError:
        rh.stop('photographs need the cv2 package: pip install "opencv-python-headless<5"')
    if not hasattr(cv2, 'CascadeClassifier') or not hasattr(getattr(cv2, 'data', None), 'haarcascades'):
        rh.stop(f'cv2 {cv2.__version__} comes without the face cascades: pip install "opencv-python-headless<5"')
    *frontal, profile = (cv2.CascadeClassifier(f'{cv2.data.haarcascades}haarcascade_{name}.xml')
                         for name in ('frontalface_default', 'frontalface_alt', 'frontalface_alt2', 'profileface'))
    return cv2, frontal, profile

def on_white(image):
    """An RGBA image composited on white, RGB."""
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')

def groups(boxes, votes):
    """Boxes (N, 4) as x, y, width, height that overlap by more than a third -> [(mean box, sum of votes)], most votes first."""
    found = []
    for box, vote in sorted(zip(boxes, votes), key=lambda pair: -pair[1]):
        for group in found:
            corner = np.maximum(group[0][0][:2], box[:2])
            common = np.clip(np.minimum(group[0][0][:2] + group[0][0][2:], box[:2] + box[2:]) - corner, 0, None).prod()
            if common > 0.35 * (group[0][0][2:].prod() + box[2:].prod() - common):
                group.append((box, vote))
                break
        else:
            found.append([(box, vote)])
    return sorted(((np.average([b for b, _ in g], axis=0, weights=[v for _, v in g]), sum(v for _, v in g)) for g in found),
                  key=lambda pair: -pair[1])

def detect(cascades, gray, smallest, neighbours, step=1.08):
    """`groups` of what the cascades find together in a gray image; a vote is one detection."""
    found = [cascade.detectMultiScale2(gray, step, neighbours, minSize=(smallest, smallest)) for cascade in cascades]
    boxes = [np.asarray(box, float) for boxes, _ in found for box in boxes]
    return groups(boxes, [int(v) for _, votes in found for v in np.ravel(votes)])

def turn(cv2, frontal, gray, box):
    """Looks at a box again in each of ANGLES -> (centre x, y, width, roll), votes at the best angle. Detections thin out as a face leans,
    so their mean angle is its roll: the degrees counterclockwise that level it."""
    centre, scale, S = box[:2] + box[2:] / 2, 90 / box[2], 200
    rows = []
    for angle in ANGLES:
        there = cv2.getRotationMatrix2D(tuple(centre), float(angle), scale)
        there[:, 2] += S / 2 - centre
        small = cv2.warpAffine(gray, there, (S, S), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        for found, votes in detect(frontal, small, 54, 1, 1.05)[:1]:
            middle = found[:2] + found[2:] / 2
            if np.abs(middle - S / 2).max() < 25:
                rows.append((votes, *(cv2.invertAffineTransform(there) @ [*middle, 1]), found[2] / scale, angle))
    rows = np.array(rows or [(0, *centre, box[2], 0)], dtype=float)
    face = np.average(rows[:, 1:], axis=0, weights=rows[:, 0] ** 2 + 1e-9)
    return face, rows[:, 0].max()

def same(face, other):
    """Whether a face lies on another one."""
    return np.abs(face[:2] - other[:2]).max() < 0.5 * max(face[2], other[2])

def on_chest(face, other):
    """Whether a face lies below another one, where the cascades take collars for faces."""
    right, down = (face[:2] - other[:2]) / other[2]
    return abs(right) < 0.8 and 0 < down < 2.2

def find_faces(image, most=8):
    """An RGBA image -> [(centre x, y, width, roll)] in pixels and degrees, left to right, and whether there is a profile instead.
    Faces at most half as wide as the largest are left out."""
    cv2, frontal, profile = load_opencv()
    scale = min(720 / max(image.size), 2)
    gray = np.asarray(on_white(image).convert('L').resize([max(1, round(n * scale)) for n in image.size], Image.LANCZOS))
    gray = (255 * (gray / 255) ** 0.5).astype(np.uint8)                                 # dark skin under dark hair has little contrast
    faces = []
    for lean in (0, 28, -28):                           # the cascades miss what leans by more than 20 degrees
        there = cv2.getRotationMatrix2D((gray.shape[1] / 2, gray.shape[0] / 2), lean, 1)
        leaning = cv2.warpAffine(gray, there, gray.shape[::-1], borderMode=cv2.BORDER_REPLICATE) if lean else gray
        for box, first in detect(frontal, leaning, 24, 3)[:most]:
            if box[2] < 45 and first < 15:              # what is small and faint is a pattern as a rule
                continue
            middle = cv2.invertAffineTransform(there) @ [*(box[:2] + box[2:] / 2), 1]
            face, votes = turn(cv2, frontal, gray, np.array([*(middle - box[2:] / 2), *box[2:]]))
            collar = any(votes < 0.7 * v and on_chest(face, other) for other, v in faces)
            if first + votes >= (1.5 if lean else 1) * VOTES and not collar and not any(same(face, other) for other, _ in faces):
                faces.append((face, votes))
        if faces:
            break
    best = max((votes for _, votes in faces), default=0)
    faces = [face for face, votes in faces if votes > 0.3 * best]
    faces = [face for face in faces if face[2] > 0.5 * max(f[2] for f in faces)]
    aside = not faces and any(votes > 6 for side in (gray, gray[:, ::-1].copy()) for _, votes in detect([profile], side, 40, 6))
    return [np.append(face[:3] / scale, face[3]) for face in sorted(faces, key=lambda f: f[0])], aside

def crop_of(face):
    """A face -> the square around it, x, y (top left, may be negative) and size, whole pixels, that frames it as the training portraits."""
    size = face[2] * SIDE / WIDTH
    return [round(float(v)) for v in (face[0] - size * CENTRE[0] / SIDE, face[1] - size * CENTRE[1] / SIDE, size)]

def corners_of(crop, roll):
    """The four corners of a crop that is turned by `roll` degrees about its face, (4, 2), pixels."""
    x, y, size = crop
    centre, (c, s) = np.array(CENTRE) * size / SIDE, (np.cos(np.radians(roll)), np.sin(np.radians(roll)))
    return (np.array([[0, 0], [size, 0], [size, size], [0, size]]) - centre) @ [[c, s], [-s, c]] + centre + [x, y]

def square_of(image, crop, roll):
    """The crop of an RGBA image, turned by `roll`, as a SIDE x SIDE one; transparent beyond the image's edge."""
    scale = min(1, 2 * SIDE / crop[2])                  # to twice the size wanted at most, so that transform() skips no pixel
    small = image.resize([max(1, round(n * scale)) for n in image.size], Image.LANCZOS)
    a, b, _, d = corners_of(crop, roll) * [small.width / image.width, small.height / image.height]
    (ax, ay), (bx, by) = (b - a) / (2 * SIDE), (d - a) / (2 * SIDE)
    double = small.transform((2 * SIDE, 2 * SIDE), Image.AFFINE, (ax, bx, a[0], ay, by, a[1]), Image.BICUBIC)
    return double.resize((SIDE, SIDE), Image.LANCZOS)

def ellipse(x, y, cx, cy, rx, ry):
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1

def matte(rgb, inside):
    """Whose pixels are the person's: rgb (SIDE, SIDE, 3) uint8, inside (SIDE, SIDE) bool, where there is a photograph -> bool.

    GrabCut (Rother et al. 2004), started from two silhouettes: what is outside the wide one is no person, skull, neck and chest are, and
    between the narrow and the wide one a pixel begins as person in about the inner 60 %."""
    cv2 = load_opencv()[0]
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    across = np.abs(x - CENTRE[0])
    narrow = ellipse(x, y, 128, 86, 36, 54) | ((y > 158 + 26 * (across / 80) ** 2.5) & (across < 84)) | ((across < 20) & (y > 110))
    wide = ellipse(x, y, 128, 90, 84, 88) | ((y > 128 + 26 * (across / 110) ** 2) & (across < 124))
    wide &= cv2.erode(inside.astype(np.uint8), np.ones((1, 9), np.uint8)).astype(bool) | (y > 150)      # no head at the photograph's sides
    sure = (ellipse(x, y, 128, 84, 30, 48) | ((across < 14) & (y > 110)) | ((across < 45) & (y > 185))) & inside
    to_narrow, to_wide = (cv2.distanceTransform(m.astype(np.uint8), cv2.DIST_L2, 5) for m in (~narrow, wide))
    mask = np.where(to_wide > 0.4 * (to_wide + to_narrow), cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    mask[sure], mask[~wide | ~inside] = cv2.GC_FGD, cv2.GC_BGD
    cv2.setRNGSeed(0)
    cv2.grabCut(rgb, mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)
    person = ((mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)).astype(np.uint8)
    person = cv2.morphologyEx(person, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))) | sure
    labels = cv2.connectedComponents(person, connectivity=4)[1]
    person = np.pad((labels == labels[round(CENTRE[1]), round(CENTRE[0])]) & inside, 1)
    ground = cv2.connectedComponents((~person).astype(np.uint8), connectivity=4)[1]
    return (person | (ground != ground[0, 0]))[1:-1, 1:-1] & inside                 # holes filled

def cut_out(square, own):
    """SIDE x SIDE RGBA crop -> the same without background, cut off where the bust of a training portrait ends. own: keep its own alpha."""
    cv2 = load_opencv()[0]
    rgba = np.asarray(square)
    rgb, alpha = np.ascontiguousarray(rgba[..., :3]), rgba[..., 3] / 255
    if not own:
        person = matte(rgb, alpha > 0.5)
        alpha = cv2.GaussianBlur(person.astype(float), (5, 5), 0.7)
        inner = cv2.erode(person.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(np.float32)
        near = cv2.GaussianBlur(rgb * inner[..., None], (0, 0), 2) / (cv2.GaussianBlur(inner, (0, 0), 2)[..., None] + 1e-6)
        rim = (alpha < 0.98) & (cv2.GaussianBlur(inner, (0, 0), 2) > 1e-3)             # mixed with background: the person's colours near by
        rgb = np.where(rim[..., None], near, rgb)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    bust = np.clip(24.5 - np.hypot(np.clip(np.abs(x - 128) - 74, 0, None), np.clip(y - 202, 0, None)), 0, 1)
    return Image.fromarray(np.dstack([rgb, 255 * alpha * bust]).round().clip(0, 255).astype(np.uint8))

def save_sheet(path, image, crop, roll, face, square, result):
    """Four pictures side by side: photograph with face (green) and crop (red), the crop, the mask, the result on white."""
    frame = corners_of(crop, roll)
    low, high = np.minimum(frame.min(0), 0), np.maximum(frame.max(0), image.size)       # photograph and crop
    scale = SIDE / max((high - low)[1], (high - low)[0] / 3)
    small = image.resize([max(1, round(n * scale)) for n in image.size], Image.LANCZOS)
    photo = on_white(small.crop([round(float(v)) for v in (*(low * scale), *(high * scale))]))
    boxes = [(frame, 'red')]
    if face is not None:
        boxes.append((face[:2] + face[2] * np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]), 'lime'))
    for corners, colour in boxes:
        ImageDraw.Draw(photo).line([tuple(p) for p in ((corners - low) * scale)[[0, 1, 2, 3, 0]]], fill=colour, width=2)
    pictures = [photo, on_white(square), result.getchannel('A').convert('RGB'), on_white(result)]
    sheet, left = Image.new('RGB', (sum(p.width + 4 for p in pictures) - 4, SIDE), 'gray'), 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + 4
    with rh.atomic(path) as temporary:
        sheet.save(temporary)

def align(path, size, crop=None, sheet=None):
    """A photograph of one person -> rgb (3, size, size) in [-1, 1], alpha (1, size, size) in 0..1, as rh.read_portrait gives them.

    crop: (x, y, size) in pixels of the upright photograph, which may reach beyond its edge; without one the face is looked for.
    sheet: an image file to write, showing what was done. Ends in one line where no face, several or only profiles are found."""
    image = rh.open_image(path)
    face, roll = None, 0.0
    where = f'in pixels of the {image.width} x {image.height}, the face in its middle a third of the way down and a third as wide'
    if crop is None:
        faces, aside = find_faces(image)
        if not faces:
            what = 'only a face from the side was found, and the model wants one from the front' if aside else 'no face was found'
            rh.stop(f'{path}: {what}; to go on anyway give a square, --crop X Y SIZE {where}')
        if len(faces) > 1:
            listed = '; '.join(f'at ({f[0]:.0f}, {f[1]:.0f}) --crop {" ".join(map(str, crop_of(f)))}' for f in faces)
            rh.stop(f'{path}: {len(faces)} faces were found, choose one: {listed}')
        face, crop = faces[0], crop_of(faces[0])
        roll = face[3] if abs(face[3]) > 4 else 0.0
    x, y, side = crop
    if not (16 <= side <= 4 * max(image.size) and -side < x < image.width and -side < y < image.height):
        rh.stop(f'{path}: --crop {x} {y} {side}: give a square that meets the photograph, {where}')
    square = square_of(image, crop, roll)
    own = (np.asarray(image.getchannel('A')) < 128).mean() > 0.1                        # it has been cut out before
    result = cut_out(square, own)
    if sheet is not None:
        save_sheet(sheet, image, crop, roll, face, square, result)
    rgba = torch.from_numpy(np.asarray(result.resize((size, size), Image.LANCZOS)).copy()).permute(2, 0, 1).float() / 255
    return rgba[:3] * 2 - 1, rgba[3:]
