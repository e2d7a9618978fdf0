"""Opens image files: eight formats, of any mode, range and colour space, become 8-bit sRGB."""
import contextlib
import functools
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

import rodinhd as rh

FORMATS = ('PNG', 'JPEG', 'MPO', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF')
SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.avif', '.tif', '.tiff', '.bmp', '.gif')
MAX_PIXELS = 64 * 2 ** 20  # larger images are not decoded
MAX_SHRUNK = 256 * 2 ** 20  # nor larger JPEG files, which the decoder shrinks

# PIL would only warn of a large image: `opened` refuses it before it is decoded. Its limits for
# text in PNG files refuse files that are fine.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2 ** 20
PngImagePlugin.MAX_TEXT_MEMORY = 256 * 2 ** 20
warnings.filterwarnings('ignore', module='PIL')  # what it thinks of damaged tags

SRGB_PRIMARIES = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x, y of red, green, blue
ADOBE_PRIMARIES = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
D65 = (0.3127, 0.3290)
ADOBE_GAMMA = 256 / 563
BRADFORD = np.array([
    [0.8951, 0.2664, -0.1614],
    [-0.7502, 1.7135, 0.0367],
    [0.0389, -0.0685, 1.0296],
])


# Files --------------------------------------------------------------------------------------------
def open_image(path):
    """Decodes an image file of any kind to an upright RGBA PIL image of 8-bit sRGB.

    A JPEG file of more than MAX_PIXELS is shrunk by its decoder, by the factor info['shrunk'].
    Stops with one line where the file is missing, damaged, not an image, or too large.
    """
    return decoded(path, upright, shrinks=True)


def open_posed(path, size=None):
    """Decodes the image of a camera: its pixels are as they are stored, since poses belong to them.

    Only where its EXIF orientation turns it to the proportions of `size`, the (width, height) that
    the cameras are said to have, and what is stored has others, it is turned.
    """
    def turn(image):
        if size is None or same_shape(image.size, size):
            return image
        turned = upright(image)
        return turned if same_shape(turned.size, size) else image

    return decoded(path, turn, shrinks=False)


def decoded(path, turn, shrinks):
    """Reads an image file, turned by the function `turn`, as RGBA; see open_image."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            rh.stop(f'{path}: not a readable image (it is no regular file)')
        with opened(path) as image:
            shrunk = fit_limit(path, image) if shrinks else 1
            if image.width * image.height > MAX_PIXELS:
                rh.stop(
                    f'{path}: {image.width} x {image.height} pixels are too many; '
                    'scale the image down to at most 8192 x 8192'
                )
            result = to_srgb(path, image, turn(image))
    except rh.Stop:
        raise
    except FileNotFoundError:
        rh.stop(f'{path}: there is no such image')
    except Exception as error:  # PIL raises many types on damaged files
        lines = str(error).splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        rh.stop(f'{path}: not a readable image ({reason})')
    result.info = {'shrunk': shrunk}
    return result


def opened(path):
    """Opens an image file of one of FORMATS, or of HEIC where pillow_heif is installed."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    with open(path, 'rb') as file:
        head = file.read(12)
    if head[4:8] == b'ftyp' and head[8:11] in (b'hei', b'hev', b'mif', b'msf'):
        try:
            import pillow_heif
        except ImportError:
            if head[8:11] != b'mif':  # which AVIF files may begin with, too
                rh.stop(f'{path}: HEIC images need a package: pip install pillow-heif')
        else:
            pillow_heif.register_heif_opener()
            formats.append('HEIF')
    return Image.open(path, formats=formats)


def fit_limit(path, image):
    """Has the decoder of a JPEG file shrink it to at most MAX_PIXELS; returns the factor."""
    pixels = image.width * image.height
    if image.format not in ('JPEG', 'MPO') or not MAX_PIXELS < pixels <= MAX_SHRUNK:
        return 1
    width, height = image.size
    factor = 2 if pixels <= 4 * MAX_PIXELS else 4
    image.draft(image.mode, (width // factor, height // factor))
    return round(width / image.width)


def upright(image):
    """Turns a PIL image as its EXIF orientation says."""
    return ImageOps.exif_transpose(image)


def same_shape(size, other):
    """Whether two (width, height) have the same proportions, up to rounding to whole pixels."""
    width, height = size
    x, y = width / other[0], height / other[1]
    return abs(x - y) <= max(0.01 * max(x, y), 1 / other[0], 1 / other[1])


def reduced(image, factor):
    """Shrinks an RGBA PIL image by an integer factor; each pixel is the mean of a block."""
    # Premultiplied meanwhile, so that the colours of transparent pixels do not bleed.
    return image.convert('RGBa').reduce(factor).convert('RGBA')


def resized(image, size):
    """Scales an RGBA PIL image to a size (width, height); premultiplied meanwhile, too."""
    return image.convert('RGBa').resize(size, Image.LANCZOS).convert('RGBA')


# Modes and ranges ---------------------------------------------------------------------------------
def to_srgb(path, source, image):
    """Converts a PIL image of any mode, turned from the `source` in a file, to RGBA of sRGB."""
    if image.mode == 'F' or (image.mode == 'I' and source.format != 'PNG'):
        rh.stop(
            f'{path}: mode {image.mode} (32 bits a pixel) has no known range; '
            'save the image with 8 or 16 bits a channel'
        )
    info = source.info
    if image.mode == 'I' or image.mode.startswith('I;16'):
        image = eight_bits(image, getattr(source, 'tag_v2', {}), info.get('transparency'))

    if info.get('icc_profile'):
        return by_profile(path, image, info['icc_profile'])
    rgba = image.convert('RGBA')
    tags = color_tags(source)
    if tags:
        return by_primaries(rgba, *tags)
    return rgba


def eight_bits(image, tags, clear):
    """Converts 16-bit (or 12-bit) grey to 8 bits: tags are a TIFF file's, `clear` is the value that
    is transparent, if any."""
    bits = tags.get(258, (16,))
    most = 4095 if 12 in np.atleast_1d(bits) else 65535
    values = np.asarray(image).astype(np.int64)
    if tags.get(262) == 0:  # white is zero
        values = most - values
    grey = (255 * values.clip(0, most) + most // 2) // most
    result = Image.fromarray(grey.astype(np.uint8))

    if isinstance(clear, int):
        alpha = np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)
        result.putalpha(Image.fromarray(alpha))
    return result


# Colour spaces ------------------------------------------------------------------------------------
@functools.lru_cache(16)
def transform_of(profile, mode):
    """Returns an ImageCms transform of a profile (bytes) to sRGB; None where it changes nothing.

    Images have the mode 'RGB', 'L' or 'CMYK'; what fits neither raises an error.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(
        source,
        ImageCms.createProfile('sRGB'),
        mode,
        'RGB',
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode != 'RGB':
        return transform

    # Most profiles are of sRGB itself: images of these stay as they are, to the bit.
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    after = np.asarray(ImageCms.applyTransform(Image.fromarray(lattice), transform))
    changed = np.abs(after.astype(int) - lattice).max() > 2
    return transform if changed else None


def by_profile(path, image, profile):
    """Converts a PIL image to sRGB by its ICC profile (bytes); RGBA."""
    rgba = image.convert('RGBA')
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        space = source.xcolor_space.strip()
        mode = {'RGB': 'RGB', 'GRAY': 'L', 'CMYK': 'CMYK'}[space]
        is_grey = image.mode in ('1', 'L', 'LA', 'La')
        if (mode == 'CMYK') != (image.mode == 'CMYK') or (mode == 'L' and not is_grey):
            rh.stop(f'{path}: its ICC profile is of {space}, its pixels are {image.mode}; '
                    'save the image as sRGB')
        transform = transform_of(profile, mode)
        if transform is None:
            return rgba
        pixels = image if mode == 'CMYK' else rgba.convert(mode)
        result = ImageCms.applyTransform(pixels, transform)
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        rh.stop(f'{path}: its ICC profile (colour space) cannot be used; save the image as sRGB')
    result.putalpha(rgba.getchannel('A'))
    return result


def color_tags(image):
    """Reads a colour space that is told without a profile: (gamma, primaries, white) or None.

    PNG files may have a gamma and chromaticities, photographs the mark of Adobe RGB in their EXIF.
    """
    info = image.info
    if 'srgb' in info:
        return None
    if 'exif' in info:
        space = index = None
        with contextlib.suppress(Exception):  # whatever damaged EXIF data raise
            space = image.getexif().get_ifd(0x8769).get(0xA001)
        with contextlib.suppress(Exception):  # some versions of PIL raise where there is none, too
            index = image.getexif().get_ifd(0xA005).get(1)
        if space == 2 or str(index).startswith('R03'):
            return ADOBE_GAMMA, ADOBE_PRIMARIES, D65

    gamma = float(info.get('gamma') or 1 / 2.2)
    colours = [float(value) for value in info.get('chromaticity') or (*D65, *SRGB_PRIMARIES)]
    white, primaries = tuple(colours[:2]), tuple(colours[2:])
    usual_gamma = abs(1 / gamma - 2.2) < 0.1
    usual_colours = np.abs(np.subtract(colours, (*D65, *SRGB_PRIMARIES))).max() < 0.01
    if usual_gamma and usual_colours:
        return None
    if min(colours) < 0 or min(colours[1::2]) <= 0 or not 0.1 < gamma < 10:
        raise ValueError('its gamma or its chromaticities are out of range')
    return None if usual_gamma else gamma, primaries, white


def to_xyz(primaries, white):
    """Returns the matrix (3, 3) from linear RGB to XYZ under D65, by Bradford's adaptation."""
    def xyz(x, y):
        return np.array([x / y, 1, (1 - x - y) / y])

    columns = np.stack([xyz(*primaries[i:i + 2]) for i in (0, 2, 4)], axis=1)
    matrix = columns * np.linalg.solve(columns, xyz(*white))
    ratio = (BRADFORD @ xyz(*D65)) / (BRADFORD @ xyz(*white))
    return np.linalg.inv(BRADFORD) @ (ratio[:, None] * BRADFORD) @ matrix


def by_primaries(image, gamma, primaries, white):
    """Converts an RGBA image of a gamma (None: the curve of sRGB) and of primaries to sRGB."""
    level = np.arange(256) / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    if gamma is not None:
        linear = level ** (1 / gamma)
    matrix = np.linalg.inv(to_xyz(SRGB_PRIMARIES, D65)) @ to_xyz(primaries, white)

    pixels = np.array(image)
    for row in pixels:  # one at a time: doubles of a whole photograph take gigabytes
        mixed = (linear[row[:, :3]] @ matrix.T).clip(0, 1)
        curved = 1.055 * mixed ** (1 / 2.4) - 0.055
        encoded = np.where(mixed <= 0.0031308, 12.92 * mixed, curved)
        row[:, :3] = (255 * encoded).round()
    return Image.fromarray(pixels)
