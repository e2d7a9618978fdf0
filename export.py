"""Pictures, films and the viewer: what `sample.py` writes for image viewers and browsers.

The chapters: 1 what tells that a picture is synthetic; 2 pictures and films; 3 the viewer, one HTML
file that draws an avatar in a browser.
(Meshes and splats are made in meshes.py and splats.py.)
"""
import base64
import html
import io
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

import rodinhd as rh
import running

# 1 The tag ----------------------------------------------------------------------------------------
# Both papers want what is published to be marked: a word in the corner, for people, and for
# programs metadata, in the words that the press has agreed on (IPTC's digital source type).
TAG = 'synthetic'
SAYS = 'Synthetic: an avatar that a diffusion model has made (RodinHD)'
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType='
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    '</rdf:RDF></x:xmpmeta>'
)
LEAST_TAGGED = 64  # pixels a side: smaller pictures have no room for a word


def tagged(picture):
    """A picture (H, W, 3) uint8 with TAG in its lower right corner, a twentieth of its height."""
    height, width, _ = picture.shape
    if min(height, width) < LEAST_TAGGED:
        return picture
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(height / 20, 9))
    corner = {'xy': (width - height / 40, height - height / 40), 'anchor': 'rs', 'font': font}
    draw.text(text=TAG, fill=(110, 110, 110), stroke_width=1, stroke_fill='white', **corner)
    return np.asarray(image)


def metadata(suffix):
    """What save_image takes to write into a file of .png, .webp or .gif that it is synthetic."""
    if suffix == '.png':
        info = PngImagePlugin.PngInfo()
        info.add_text('Description', SAYS)
        info.add_itxt('XML:com.adobe.xmp', XMP)
        return {'pnginfo': info}
    return {'xmp': XMP.encode()} if suffix == '.webp' else {'comment': SAYS}


# 2 Pictures and films -----------------------------------------------------------------------------
RATE = 12  # frames of a film a second


def numbered(name, k):
    """The file name of the k-th of several of a kind; the first has no number."""
    path = Path(name)
    return f'{path.stem}{k or ""}{path.suffix}'


def save_image(path, image, tag=False, **how):
    """Writes a PIL image, whole or not at all; with `tag` its metadata say that it is synthetic."""
    if tag:
        how.update(metadata(path.suffix))
    with running.atomic(path) as temporary:
        image.save(temporary, **how)


def save_loop(path, images, **how):
    """Writes PIL images as an animation that repeats for ever."""
    first, *others = images
    how.update(save_all=True, append_images=others, loop=0)
    how.update(duration=1000 // RATE)  # of an image, milliseconds
    save_image(path, first, **how)


def save_film(path, frames, tag=False):
    """Writes frames, (H, W, 3) uint8 arrays, as .mp4, with `tag` with metadata that say that they
    are synthetic; returns whether imageio-ffmpeg, which does that, is installed."""
    try:
        import imageio_ffmpeg
    except ImportError:
        return False

    height, width, _ = frames[0].shape
    with running.atomic(path) as temporary:
        film = imageio_ffmpeg.write_frames(
            str(temporary),
            (width, height),
            fps=RATE,
            quality=8,
            macro_block_size=2,
            ffmpeg_log_level='error',
            output_params=['-metadata', f'comment={SAYS}'] if tag else None,
        )
        film.send(None)  # it begins
        for frame in frames:
            film.send(np.ascontiguousarray(frame))
        film.close()  # which does not say how ffmpeg ended: on a full disk, with a part
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(temporary))
        if written != len(frames):
            raise OSError(f'{written} of {len(frames)} frames')
    return True


def save_animation(folder, frames, tag=False):
    """Writes frames, a list of (H, W, 3) uint8 arrays, as turntable.webp, turntable.gif and, with
    imageio-ffmpeg, turntable.mp4; returns these names. tag: of their metadata."""
    images = [Image.fromarray(frame) for frame in frames]
    save_loop(folder / 'turntable.webp', images, quality=85, tag=tag)
    palette = [image.quantize(128, dither=Image.Dither.NONE) for image in images]
    save_loop(folder / 'turntable.gif', palette, tag=tag)

    names = ['turntable.webp', 'turntable.gif']
    if save_film(folder / 'turntable.mp4', frames, tag):
        names.append('turntable.mp4')
    return names


# 3 The viewer -------------------------------------------------------------------------------------
# viewer.html draws an avatar in a fragment shader. The planes are layers of a texture array, and
# the decoder is an array of vec4: so channels are padded with zeros to groups of four. The shader
# reads the decoder's rows one after the other, in the order in which pack_decoder puts them. They
# are uniforms where these are enough, and else lines of a texture.
VIEWER = Path(__file__).parent / 'viewer.html'
VIEWER_RESOLUTION = 128  # of the planes, at most: larger files load slowly
WIDE = 256  # vec4s in a line of the texture that holds the decoder
ENCODINGS = 5  # of a value by rh.frequency_encoding: v, sin v, cos v, sin 2v, cos 2v


def in_fours(x, groups):
    """Pads the last axis with zeros to `groups` groups of four."""
    return F.pad(x, (0, 4 * groups - x.shape[-1]))


def encoded_columns(weight, groups):
    """Reorders the columns of a layer that reads a frequency encoding, (n, 5 C): by channel group
    first, as the shader computes it, -> (n, groups * 5 * 4)."""
    by_encoding = weight.view(len(weight), ENCODINGS, -1)  # (n, 5, C)
    padded = in_fours(by_encoding, groups).view(len(weight), ENCODINGS, groups, 4)
    return padded.transpose(1, 2).reshape(len(weight), -1)


def pack_decoder(decoder):
    """Packs the decoder's weights as the shader reads them -> (vec4s, 4), and the constants that
    the shader is compiled with: COLOUR, DENSITY and HIDDEN are numbers of groups of four."""
    s1, _, s2 = decoder.sigma_net
    width = s1.out_features
    c1, *between, c3 = [layer.weight for layer in decoder.color_net[::2]]
    # The shader has three layers of colour; where there are two, the one between changes nothing
    c2, = between or [torch.eye(width, device=c1.device)]
    features = c1.shape[1] - width - 3 * ENCODINGS  # encoded colour features
    colour = -(-features // ENCODINGS // 4)
    density = -(-decoder.density_channels // 4)
    hidden = -(-width // 4)

    # The first colour layer reads the colour features, the geometry feature and the direction.
    of_features, of_geometry, of_direction = c1.split(
        [features, width, 3 * ENCODINGS], dim=1
    )
    first = [
        encoded_columns(of_features, colour),
        in_fours(of_geometry, hidden),
        encoded_columns(of_direction, 1),
    ]
    extra = 4 * hidden - width  # outputs that are zero, where the width does not divide by four

    def padded(rows):
        return F.pad(rows, (0, 0, 0, extra))

    rows = [
        padded(encoded_columns(s1.weight, density)),
        in_fours(s1.bias, hidden),
        in_fours(s2.weight[:1], hidden),  # the density
        in_fours(s2.bias[:1], 1),
        padded(in_fours(s2.weight[1:], hidden)),  # the geometry feature
        in_fours(s2.bias[1:], hidden),
        padded(torch.cat(first, dim=1)),
        padded(in_fours(c2, hidden)),
        in_fours(c3, hidden),
    ]
    weights = torch.cat([row.reshape(-1, 4) for row in rows]).detach().cpu().float()
    constants = {
        'COLOUR': colour,
        'DENSITY': density,
        'HIDDEN': hidden,
        'MOST': max(colour, density),
        'WIDE': WIDE,
    }
    return weights, constants


def pack_planes(planes, decoder, constants):
    """Packs planes (3, C, R, R) as layers of a texture array, (3 * groups, R, R, 4) in fp16: of
    each plane the groups of colour channels, then those of density channels."""
    D = decoder.density_channels
    last = planes.permute(0, 2, 3, 1)  # (3, R, R, C)
    colour = in_fours(last[..., :-D], constants['COLOUR'])
    density = in_fours(last[..., -D:], constants['DENSITY'])
    grouped = torch.cat([colour, density], dim=-1).unflatten(-1, (-1, 4))
    layers = grouped.permute(0, 3, 1, 2, 4)  # (3, groups, R, R, 4)
    return layers.flatten(0, 1).half().contiguous()


def pack_bits(cells):
    """Packs cells, a bool tensor, into bytes: eight cells each, the first in the highest bit."""
    bits = cells.cpu().flatten().to(torch.uint8)
    bits = F.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    return (bits << shifts).sum(1).to(torch.uint8)


def base64_of(tensor):
    """The bytes of a tensor as base64 text."""
    data = tensor.cpu().contiguous().numpy().tobytes()
    return base64.b64encode(data).decode()


def url_of(image):
    """A PIL image as a data URL, in WebP."""
    with io.BytesIO() as file:
        image.save(file, 'WEBP', quality=80)
        data = base64.b64encode(file.getvalue()).decode()
    return f'data:image/webp;base64,{data}'


def write_viewer(
    path, planes, decoder, grid, frames, portrait=None, title='', tag='', mesh=None
):
    """Writes one avatar as an HTML file that opens offline.

    planes (3, C, R, R) larger than 128 x 128 are drawn at 128; grid says what to draw. frames are
    PIL images of a turntable, for browsers without WebGL2 and until it has begun; portrait is a
    PIL image that is shown in a corner, and title the page's. tag is a word in another corner, and
    mesh the path of a file that the page lets people download.
    """
    weights, constants = pack_decoder(decoder)
    weights = F.pad(weights, (0, 0, 0, -len(weights) % WIDE))  # whole lines of a texture
    constants['PLANE_DIVISOR'] = rh.PLANE_DIVISOR
    R = min(planes.shape[-1], VIEWER_RESOLUTION)
    small = rh.resize_planes(planes.cpu().float(), R).clamp(-1, 1)
    layers = pack_planes(small, decoder, constants)
    data = {
        'planes': base64_of(layers),
        'layers': len(layers),
        'resolution': R,
        'weights': base64_of(weights),
        'shader': constants,
        'occupied': base64_of(pack_bits(grid.occupied)),
        'grid': grid.G,
        'steps': grid.steps,
        'fov': rh.PORTRAIT_FOV,
        'frames': [url_of(frame) for frame in frames],
        'portrait': url_of(portrait) if portrait else None,
        'title': title,
        'tag': tag,
        'mesh': mesh and base64.b64encode(Path(mesh).read_bytes()).decode(),
        'meshName': mesh and Path(mesh).name,
    }
    text = json.dumps(data).replace('<', '\\u003c')  # a title cannot end the script
    page = VIEWER.read_text(encoding='utf-8')
    page = page.replace('const DATA = null;', f'const DATA = {text};')
    with running.atomic(path) as temporary:
        temporary.write_text(page, encoding='utf-8')


def embedded(path):
    """A viewer as an element of another page, in HTML."""
    page = html.escape(path.read_text(encoding='utf-8'))
    style = 'width:100%;height:460px;border:0'
    return f'<iframe title="An avatar to turn" style="{style}" srcdoc="{page}"></iframe>'
