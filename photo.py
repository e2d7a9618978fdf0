"""Photographs: an ordinary one becomes a portrait framed as the training portraits are.

    find_faces -> crop_of -> square_of -> cut_out        `align` does it all; `read` where needed,
                                                         `read_view` for one from the side

The face is found (faces.py) and levelled, the crop shows head and shoulders, and the background
goes.

The chapters: 1 the square, 2 the person in the square, 3 what was done, 4 all of it, 5 is it a
portrait already?, 6 from the side.
Places in the square are in pixels of one of SIDE x SIDE. What the square should show is measured
on the frontal portraits of the 176 training avatars, which are of 32 identities (mean +- standard
deviation): the eyes are at (111.5, 80.5) and (143.9, 80.6) +- 1, the chin is near 129, the top of
the hair at 21.7 +- 4.4; the shoulders go from column 33 +- 2 to 222 +- 2, and the bust ends at row
226 +- 2.
"""
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

import faces
import likeness
import rodinhd as rh
import running
import scenes
from faces import CENTRE, SIDE, WIDTH, on_white, resized

NOT_A_PORTRAIT = 24  # pixels of the square by which a face is off where it should be
MIS_SCALED = 1.3  # how many times too wide or too narrow it is
MIS_TURNED = 14  # degrees
HEAD_CUT = 0.12  # the share of a head that may be beyond the edge of the photograph
SIDE_CUT = 75  # rows of a head, of 116, that may end at the left or right edge of the photograph
SIDEWARDS = 85  # degrees of azimuth up to which faces are found


def import_opencv():
    """Returns the module cv2; ends in one line where it is not installed."""
    cv2 = faces.opencv()
    if cv2 is None:
        rh.stop(f'photographs need the cv2 package: {faces.INSTALL}')
    return cv2


# 1 The square -------------------------------------------------------------------------------------
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


def known_of(image, crop, roll):
    """Which pixels of the square (SIDE, SIDE) a photograph shows, 0..1: none beyond its edge."""
    opaque = Image.new('RGBA', image.size, 'white')
    return np.asarray(square_of(opaque, crop, roll).getchannel('A')) / 255


# 2 The person in the square -----------------------------------------------------------------------
# A small network for video calls (MediaPipe's selfie segmentation, of its package's versions below
# 0.10.30) tells people from what is behind them; OpenCV runs it, within 20 ms. Without it: where
# head and shoulders are is known by how the square is framed, and GrabCut (Rother et al. 2004)
# finds their outline between a silhouette that everybody fills and one that nobody exceeds.
SEGMENTER = 'modules/selfie_segmentation/selfie_segmentation.tflite'


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


def matte_by_grabcut(cv2, rgb, inside):
    """Finds whose pixels are the person's: rgb (SIDE, SIDE, 3) uint8, inside (SIDE, SIDE) bool,
    where there is a photograph -> alpha (SIDE, SIDE) in 0..1."""
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
    person = piece_of_face(cv2, opened | sure, inside)
    return cv2.GaussianBlur(person.astype(float), (5, 5), 0.7)


def segmenter_file():
    """The network's file in the package mediapipe, which is not imported, or None."""
    spec = importlib.util.find_spec('mediapipe')
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / SEGMENTER
        if path.is_file():
            return path
    return None


def continued(rgb, inside):
    """Gives pixels of rgb (SIDE, SIDE, 3) beyond the photograph's edge the colours of its nearest
    ones."""
    if not inside.any():
        return rgb
    rows, columns = ndimage.distance_transform_edt(
        ~inside, return_distances=False, return_indices=True
    )
    return np.ascontiguousarray(rgb[rows, columns])


def matte_by_network(cv2, rgb, inside):
    """Does what matte_by_grabcut does with a network, or returns None where its package is not
    installed, or where it sees nobody."""
    path = segmenter_file()
    if path is None or not hasattr(cv2.dnn, 'readNetFromTFLite'):
        return None
    network = cv2.dnn.readNetFromTFLite(str(path))
    network.setInput(cv2.dnn.blobFromImage(continued(rgb, inside), 1 / 255, (SIDE, SIDE)))
    likely = network.forward().reshape(SIDE, SIDE)

    sure, _, wide = silhouettes(cv2, inside)
    if sure.any() and (likely[sure] > 0.5).mean() < 0.7:
        return None
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))
    seen = ((likely > 0.5) & wide).astype(np.uint8)
    seen = cv2.morphologyEx(seen, cv2.MORPH_OPEN, disc)
    person = piece_of_face(cv2, seen | sure, inside)
    square = np.ones((5, 5), np.uint8)
    near = cv2.dilate(person.astype(np.uint8), square).astype(bool) & inside
    within = cv2.erode(person.astype(np.uint8), square).astype(bool)
    alpha = np.where(near, np.clip((likely - 0.3) / 0.4, 0, 1), 0)
    return np.where(within, 1, alpha)


def matte(rgb, inside):
    """Finds whose pixels are the person's: rgb (SIDE, SIDE, 3) uint8, inside (SIDE, SIDE) bool,
    where there is a photograph -> alpha (SIDE, SIDE) in 0..1."""
    cv2 = import_opencv()
    alpha = matte_by_network(cv2, rgb, inside)
    if alpha is None:
        alpha = matte_by_grabcut(cv2, rgb, inside)
    return alpha


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
        alpha = matte(rgb, alpha > 0.5)
        rgb = clean_rim(cv2, rgb, alpha, alpha > 0.5)
    result = np.dstack([rgb, 255 * alpha * bust_alpha()])
    return Image.fromarray(result.round().clip(0, 255).astype(np.uint8))


# 3 What was done ----------------------------------------------------------------------------------
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


# 4 All of it --------------------------------------------------------------------------------------
class Aligned(NamedTuple):
    """A portrait, as scenes.read_portrait gives it, and what a photograph shows of it."""

    rgb: torch.Tensor  # (3, P, P) in [-1, 1], not premultiplied
    alpha: torch.Tensor  # (1, P, P) in 0..1
    known: torch.Tensor  # (1, P, P) in 0..1; 0 beyond the photograph's edge


def only_face(path, image, found, where):
    """Returns the one Face of what find_faces has found in an image; ends in one line where there
    is none, or several. where: what that line says of the square that may be given instead."""
    several, aside = found
    if len(several) == 1 and aside:
        rh.note(
            f'{path}: the face that looks to the camera was taken, and not one from the side; '
            f'for another give a square, --crop X Y SIZE'
        )
    if not several:
        what = 'no face was found'
        if aside:
            what = (
                'only a face from the side was found, '
                'and the model wants one from the front'
            )
        rh.stop(f'{path}: {what}; to go on anyway give a square, --crop X Y SIZE {where}')
    if len(several) > 1:
        if np.median([abs(face.roll) for face in several]) > 45:
            rh.stop(
                f'{path}: {len(several)} faces were found in a picture that lies on its side; '
                'turn it upright, then choose one'
            )
        choices = []
        shrunk = image.info.get('shrunk', 1)
        for face in several:
            crop = ' '.join(str(shrunk * value) for value in crop_of(face))
            choices.append(f'at ({face.x * shrunk:.0f}, {face.y * shrunk:.0f}) --crop {crop}')
        listed = '; '.join(choices)
        rh.stop(f'{path}: {len(several)} faces were found, choose one: {listed}')
    return several[0]


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


def tell(path, face, known):
    """Says in a line what may make the portrait worse: a turned head, or an edge that cuts it."""
    if face is not None and abs(face.yaw) > 15:
        rh.note(
            f'{path}: the face looks {abs(face.yaw):.0f} degrees aside; '
            'one from the front gives a better likeness'
        )
    beyond = 1 - known.mean()
    if beyond > 0.02:
        rh.note(
            f'{path}: {100 * beyond:.0f} % of the crop is beyond the edge of the picture, '
            'and taken for unknown'
        )


def usual_head():
    """Where a head is in the square, (SIDE, SIDE) bool."""
    y, x = pixel_centres()
    return ellipse(x, y, 128, 80, 42, 58)


def cut_from_head(known):
    """How much of a head in its place in the square is not `known` (SIDE, SIDE), 0..1."""
    return 1 - known[usual_head()].mean()


def rows_cut(known, alpha):
    """In how many rows of the square a person's head, of alpha (SIDE, SIDE) in 0..1, ends where the
    photograph ends at the left or right.

    Of half a face that a photograph shows the network believes that it looks aside, and that all
    of it is there.
    """
    reach = 12  # pixels; a mask is faint near an edge
    shown = np.pad(known > 0.5, ((0, 0), (reach, reach)))
    inner = ndimage.binary_erosion(shown, np.ones((1, 2 * reach + 1)))[:, reach:-reach]
    ends = (alpha > 0.5) & ~inner & (known > 0.5) & usual_head()
    return ends.any(1).sum()


def refuse_cut_head(path, known, alpha, otherwise):
    """Ends in one line, which says what to do otherwise, where too much of a head is beyond the
    edge of the photograph; known, alpha (SIDE, SIDE) in 0..1."""
    cut = cut_from_head(known)
    if cut > HEAD_CUT:
        what = f'{100 * cut:.0f} % of the head is'
    elif rows_cut(known, alpha) > SIDE_CUT:
        what = 'a side of the head is'
    else:
        return
    rh.stop(
        f'{path}: {what} beyond the edge of the picture; give one that shows all of it, '
        f'or {otherwise}'
    )


def align(path, size, crop=None, sheet=None):
    """Makes a portrait of a photograph of one person -> Aligned, of `size` pixels a side.

    crop: (x, y, size) in pixels of the upright photograph, which may reach beyond its edge;
    without one the face is looked for. sheet: an image file to write, which shows what was done.
    Ends in one line where no face, several or only profiles are found.
    """
    image = scenes.open_image(path)
    found = None if crop is not None else faces.find_faces(image)
    return aligned(path, image, size, crop, found, sheet)


def aligned(path, image, size, crop, found, sheet):
    """Does `align` for an RGBA image in which find_faces has `found` what it returns."""
    import_opencv()
    shrunk = image.info.get('shrunk', 1)
    where = (
        f'in pixels of the {shrunk * image.width} x {shrunk * image.height}, '
        'the face in its middle a third of the way down and a third as wide'
    )
    face = None
    if crop is None:
        face = only_face(path, image, found, where)
    else:
        crop = [value / shrunk for value in crop] if shrunk > 1 else crop
        check_crop(path, image, crop, where)
    otherwise = ''
    if face is not None:
        x, y, side = (shrunk * value for value in crop_of(face))
        otherwise = f'go on with --crop {x} {y} {side}'
    return portrait_in(path, image, face, crop, size, sheet, otherwise)


def portrait_in(path, image, face, crop, size, sheet, otherwise):
    """Makes a portrait of what an RGBA image has around a Face or, where that is None, in a crop
    -> Aligned. otherwise: see refuse_cut_head; the rest is as in `align`."""
    roll = 0.0
    if face is not None:
        crop = crop_of(face)
        if abs(face.roll) > 4:
            roll = face.roll

    known = known_of(image, crop, roll)
    square = square_of(image, crop, roll)
    transparent = np.asarray(image.getchannel('A')) < 128
    own = transparent.mean() > 0.1  # it has been cut out before
    result = cut_out(square, own)
    if face is not None:
        alpha = np.asarray(result.getchannel('A')) / 255
        refuse_cut_head(path, known, alpha, otherwise)
    tell(path, face, known)
    if sheet is not None:
        save_sheet(sheet, image, crop, roll, face, square, result)

    small = np.asarray(result.resize((size, size), Image.LANCZOS)).copy()
    rgba = torch.from_numpy(small).permute(2, 0, 1).float() / 255
    shown = Image.fromarray((255 * known).astype(np.uint8)).resize((size, size), Image.BOX)
    return Aligned(
        rgba[:3] * 2 - 1, rgba[3:], torch.from_numpy(np.array(shown))[None].float() / 255
    )


# 5 Is it a portrait already? ----------------------------------------------------------------------
def on_plain_ground(portrait):
    """Whether a portrait, rgb (3, P, P) in [-1, 1] and alpha (1, P, P), shows somebody who is cut
    out, or before one colour."""
    rgb, alpha = portrait
    if (alpha < 0.5).float().mean() > 0.1:
        return True
    white = scenes.portrait_on_white(rgb, alpha)
    return likeness.flat_ground((white + 1) / 2) is not None


def framed(face, image):
    """Whether a Face is about where a portrait has it, once the image is made square: by
    scenes.squared, at the top or at both sides."""
    side = max(image.size)
    unit = side / SIDE
    x = (face.x + (side - image.width) / 2) / unit
    y = (face.y + side - image.height) / unit
    off = np.hypot(x - CENTRE[0], y - CENTRE[1])
    wider = face.width / unit / WIDTH
    scaled = max(wider, 1 / wider)
    return off < NOT_A_PORTRAIT and scaled < MIS_SCALED and abs(face.roll) < MIS_TURNED


def read(path, size, align_it=None, crop=None, sheet=None):
    """Reads an image file as a portrait of `size` pixels a side -> Aligned.

    align_it: whether to `align` it; None: where it is a photograph, and no portrait. A portrait is
    one person, framed as the training portraits, cut out or before a plain ground; it is read as
    scenes.read_portrait reads it. crop, sheet: see `align`.
    """
    if align_it or crop:
        return align(path, size, crop, sheet)
    image = scenes.open_image(path)
    portrait = scenes.portrait_in_floats(scenes.portrait_pixels(path, image, size))
    as_it_is = Aligned(*portrait, torch.ones_like(portrait[1]))
    if align_it is False:
        return as_it_is

    plain = on_plain_ground(portrait)
    if not faces.can_find():
        if not plain:
            rh.note(
                f'{path}: taken as a portrait as it is; to find the face in a photograph: '
                f'{faces.INSTALL}'
            )
        return as_it_is

    found = faces.find_faces(image)
    if plain and not found[0]:  # drawings have faces that nobody finds
        rh.note(f'{path}: no face was found in it; taken as a portrait as it is')
        return as_it_is
    if plain and len(found[0]) == 1 and framed(found[0][0], image):
        return as_it_is
    if not found[0]:
        what = 'a face from the side' if found[1] else 'no face'
        rh.stop(
            f'{path}: no portrait on a plain ground, and {what} was found in it; '
            'give a square, --crop X Y SIZE, or take it as it is, --no-align'
        )
    result = aligned(path, image, size, None, found, sheet)
    rh.note(f'{path}: taken for a photograph, and aligned (--no-align takes it as it is)')
    return result


# 6 From the side ----------------------------------------------------------------------------------
def read_view(path, size, azimuth, align_it=None, sheet=None):
    """Reads a further photograph, whose camera is at an azimuth, in degrees, around the head, as
    `read` reads a portrait -> Aligned. Nobody is found from behind: there a person must be cut out,
    or before a plain ground, and framed as the portrait is."""
    image = scenes.open_image(path)
    portrait = scenes.portrait_in_floats(scenes.portrait_pixels(path, image, size))
    as_it_is = Aligned(*portrait, torch.ones_like(portrait[1]))
    if align_it is False:
        return as_it_is
    if faces.network() is None:
        if align_it or not on_plain_ground(portrait):
            rh.note(
                f'{path}: taken as it is; to find a face from the side: {faces.INSTALL}'
            )
        return as_it_is

    found = faces.faces_from(image, azimuth) if abs(azimuth) < SIDEWARDS else []
    in_place = not found or (len(found) == 1 and framed(found[0], image))
    if in_place and on_plain_ground(portrait) and not align_it:
        return as_it_is

    otherwise = 'frame it as the portrait is, the head a third as wide, and say --no-align'
    if len(found) != 1:
        rh.stop(
            f'{path}: {len(found) or "no"} faces were found in it; cut out the one person, '
            f'or {otherwise}'
        )
    face, = found
    if face.yaw * azimuth > 0 and min(abs(face.yaw), abs(azimuth)) > 20:
        rh.note(
            f'{path}: {azimuth:g} degrees were given, but the face looks to the '
            f'{"right" if face.yaw > 0 else "left"}: should it be {-azimuth:g}?'
        )
    rh.note(f'{path}: taken for a photograph, and aligned (--no-align takes it as it is)')
    face = face._replace(yaw=0)  # which was said, and is nothing to warn of
    return portrait_in(path, image, face, None, size, sheet, otherwise)
