"""Avatars for elsewhere: pictures and films, the viewer (one HTML file that draws the avatar in a browser), meshes for Blender and games.

The shader of viewer.html holds the decoder as an array of vec4; `pack_decoder` says in which order.
"""
import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import rodinhd as rh


def save_image(path, image, **how):
    """Writes a PIL image, whole or not at all."""
    with rh.atomic(path) as temporary:
        image.save(temporary, **how)

def save_animation(folder, frames):
    """frames: list of (H, W, 3) uint8 arrays -> turntable.webp, .gif and, with imageio-ffmpeg, .mp4, 12 frames a second; their names."""
    images = [Image.fromarray(f) for f in frames]
    save_image(folder / 'turntable.webp', images[0], save_all=True, append_images=images[1:], duration=83, loop=0, quality=85)
    palette = [i.quantize(128, dither=Image.Dither.NONE) for i in images]
    save_image(folder / 'turntable.gif', palette[0], save_all=True, append_images=palette[1:], duration=83, loop=0)
    try:
        import imageio_ffmpeg
    except ImportError:
        return ['turntable.webp', 'turntable.gif']
    with rh.atomic(folder / 'turntable.mp4') as temporary:
        film = imageio_ffmpeg.write_frames(str(temporary), images[0].size, fps=12, quality=8, macro_block_size=2, ffmpeg_log_level='error')
        film.send(None)
        for frame in frames:
            film.send(np.ascontiguousarray(frame))
        film.close()
    return ['turntable.webp', 'turntable.gif', 'turntable.mp4']

def pack_decoder(decoder):
    """The decoder's weights as the shader reads them, (vec4s, 4), and the sizes that it is compiled with. Channels are padded with zeros to
    groups of four."""
    D, width = decoder.density_channels, decoder.sigma_net[0].out_features
    C = decoder.color_net[0].in_features - width - 15
    colour, density, hidden = -(-C // 5 // 4), -(-D // 4), -(-width // 4)
    def units(weight):                      # (n, width) -> (n * hidden, 4)
        return torch.nn.functional.pad(weight, (0, 4 * hidden - weight.shape[1])).reshape(-1, 4)
    def encoded(weight, groups):            # (n, 5 C): [v, sin v, cos v, sin 2v, cos 2v] -> (n, groups, 5, 4)
        n, channels = len(weight), weight.shape[1] // 5
        padded = torch.nn.functional.pad(weight.view(n, 5, channels), (0, 4 * groups - channels))
        return padded.view(n, 5, groups, 4).transpose(1, 2).reshape(n, -1)
    (s1, _, s2), (c1, _, c2, _, c3) = decoder.sigma_net, decoder.color_net
    directions = torch.nn.functional.pad(c1.weight[:, C + width:].view(-1, 5, 3), (0, 1)).flatten(1)
    first = torch.cat([encoded(c1.weight[:, :C], colour), units(c1.weight[:, C:C + width]).view(len(c1.weight), -1), directions], dim=1)
    rows = [encoded(s1.weight, density).reshape(-1, 4), units(s1.bias[None]), units(s2.weight[:1]),
            torch.nn.functional.pad(s2.bias[:1], (0, 3))[None], units(s2.weight[1:]), units(s2.bias[None, 1:]),
            first.reshape(-1, 4), units(c2.weight), units(c3.weight)]
    weights = torch.cat(rows).detach().cpu().float()
    return weights, {'COLOUR': colour, 'DENSITY': density, 'HIDDEN': hidden, 'MOST': max(colour, density), 'WEIGHTS': len(weights)}

def pack_planes(planes, decoder, sizes):
    """Planes (3, C, R, R) as layers of a texture array, (3 groups, R, R, 4) in fp16: of each plane the colour, then the density groups."""
    D = decoder.density_channels
    parts = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, 4 * groups - part.shape[1]))
             for part, groups in ((planes[:, :-D], sizes['COLOUR']), (planes[:, -D:], sizes['DENSITY']))]
    packed = torch.cat(parts, dim=1).unflatten(1, (-1, 4)).permute(0, 1, 3, 4, 2)                   # (3, groups, R, R, 4)
    return packed.flatten(0, 1).half().contiguous()

def base64_of(data):
    """Bytes, a tensor or a PIL image (as WebP, with its MIME type) as base64 text."""
    if isinstance(data, torch.Tensor):
        data = data.cpu().contiguous().numpy().tobytes()
    if isinstance(data, bytes):
        return base64.b64encode(data).decode()
    with io.BytesIO() as file:
        data.save(file, 'WEBP', quality=80)
        return 'data:image/webp;base64,' + base64.b64encode(file.getvalue()).decode()

def write_viewer(path, planes, decoder, grid, frames, portrait=None):
    """One avatar as an HTML file that opens offline. planes (3, C, R, R), larger than 128 x 128 drawn at 128; grid: what to draw;
    frames: PIL images of a turntable, for browsers without WebGL2 and until it has begun; portrait: a PIL image."""
    assert decoder.sigma_net[0].out_features % 4 == 0, 'the viewer needs a decoder width that divides by four'
    R = min(planes.shape[-1], 128)
    weights, sizes = pack_decoder(decoder)
    bits = grid.occupied.cpu().flatten().to(torch.uint8)
    packed = (bits.view(-1, 8) << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1).to(torch.uint8)
    layers = pack_planes(rh.resize_planes(planes.cpu().float(), R).clamp(-1, 1), decoder, sizes)
    data = {'planes': base64_of(layers), 'layers': len(layers), 'resolution': R, 'weights': base64_of(weights), 'shader': sizes,
            'occupied': base64_of(packed), 'grid': grid.G, 'steps': grid.steps, 'fov': 34.0,
            'frames': [base64_of(frame) for frame in frames], 'portrait': base64_of(portrait) if portrait else None}
    page = (Path(__file__).parent / 'viewer.html').read_text(encoding='utf-8')
    with rh.atomic(path) as temporary:
        temporary.write_text(page.replace('const DATA = null;', f'const DATA = {json.dumps(data)};'), encoding='utf-8')

@torch.no_grad()
def density_lattice(field, grid, N):
    """Density at the N^3 points of a lattice over the box, (N, N, N), and zero where the occupancy grid is empty."""
    axis, sigma = torch.linspace(-1, 1, N, device=grid.values.device), torch.zeros(N ** 3)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing='ij'), dim=-1).view(-1, 3)
    near = grid.near_occupied.view(-1)
    for part in torch.arange(N ** 3).split(2 ** 18):
        inside = near[grid.cell(points[part])].cpu()
        if inside.any():
            sigma[part[inside]] = field(points[part[inside]])[0].float().cpu()
    return sigma.view(N, N, N)

@torch.no_grad()
def mesh_of(field, grid, N=192, level=10.0, triangles=None):
    """A field as a trimesh.Trimesh in the unit cube [-1, 1]^3, Z up, face along -Y: marching cubes of the density at `level`, its largest
    component, coloured as seen along the normal; at most about `triangles` triangles."""
    try:
        import trimesh
        from scipy import ndimage
        from skimage.measure import marching_cubes
    except ImportError as error:
        rh.stop(f'a mesh needs the {error.name} package: pip install scikit-image trimesh fast-simplification')
    sigma = density_lattice(field, grid, N)
    labels, count = ndimage.label(sigma.numpy() > level)
    if not count:
        rh.stop(f'a mesh: nothing in this avatar is denser than {level:g}')
    largest = np.bincount(labels.ravel())[1:].argmax() + 1
    solid = ndimage.binary_dilation(labels == largest, iterations=2)
    log = np.where(solid, np.log(sigma.clamp(min=1e-3)), np.log(1e-3))  # log density is nearly linear across the surface
    vertices, faces, _, _ = marching_cubes(np.pad(log, 1, constant_values=np.log(1e-3)), np.log(level))
    mesh = trimesh.Trimesh((vertices - 1) * (2 / (N - 1)) - 1, faces[:, ::-1], process=True)
    mesh = max(mesh.split(only_watertight=False), key=lambda part: len(part.faces))
    if triangles and len(mesh.faces) > triangles:
        try:
            mesh = mesh.simplify_quadric_decimation(face_count=triangles)
        except ImportError as error:
            rh.stop(f'fewer triangles need the {error.name} package: pip install fast-simplification')
    device = grid.values.device
    points = torch.tensor(np.asarray(mesh.vertices), dtype=torch.float32, device=device).clamp(-1, 1)
    normals = torch.tensor(np.asarray(mesh.vertex_normals), dtype=torch.float32, device=device)
    colours = torch.cat([field(p, -n)[1] for p, n in zip((points - 0.01 * normals).clamp(-1, 1).split(2 ** 16), normals.split(2 ** 16))])
    mesh.visual.vertex_colors = (colours.clamp(0, 1) * 255).round().byte().cpu().numpy()
    return mesh

def write_mesh(path, mesh):
    """A mesh as .glb (Y up, as glTF wants it), .ply or .obj (Z up); units are those of the unit cube."""
    path, mesh = Path(path), mesh.copy()
    if path.suffix == '.glb':
        mesh.apply_transform([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    with rh.atomic(path) as temporary:
        mesh.export(temporary)
