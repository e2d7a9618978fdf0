"""Meshes of avatars, for Blender, games, web pages and printers: what `sample.py --mesh` writes.

The chapters: 1 the surface, where the density crosses a level; 2 its colours, of vertices or in a
texture; 3 the files. What is made a mesh is a field with the occupancy grid that says where it is
dense (see rh.grid_for).
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage, spatial

import gltf
import rodinhd as rh
import running

# 1 The surface ------------------------------------------------------------------------------------
# Marching cubes finds where the density crosses a level. Both sides of it are smoothed alike, and
# so is the surface afterwards: light then shows a face, and not foil.
LEVEL = 5.0  # the density of the surface, at which silhouettes are those of the volume
CLIP = 2.0  # of the log density, above and below the level
SMOOTH = 1.5  # standard deviation of what smooths it, in cells
ROUNDS = 10  # of smoothing the surface
DENSITIES = 2**18  # points that the decoder is asked for in one go
PACKAGES = 'pip install scikit-image trimesh fast-simplification xatlas'


def stop_without(error):
    """Ends in one line that says what to install."""
    rh.stop(f'a mesh needs the {error.name} package: {PACKAGES}')


@torch.no_grad()
def density_lattice(field, grid, N):
    """Returns the density at the N^3 points of a lattice over the box, (N, N, N), on the CPU; it
    is zero where the occupancy grid is empty."""
    axis = torch.linspace(-1, 1, N, device=grid.values.device)
    lattice = torch.meshgrid(axis, axis, axis, indexing='ij')
    points = torch.stack(lattice, dim=-1).view(-1, 3)
    near = grid.near_occupied.view(-1)

    sigma = torch.zeros(N**3)
    for part in torch.arange(N**3).split(DENSITIES):
        inside = near[grid.cell(points[part])].cpu()
        if inside.any():
            some = part[inside]
            sigma[some] = field(points[some])[0].float().cpu()
    return sigma.view(N, N, N)


def signed_density(sigma, level):
    """Returns the log of a density (N, N, N) over `level`, clipped to CLIP and smoothed, of its
    largest component above `level` and in a frame of air, (N + 2, N + 2, N + 2)."""
    labels, count = ndimage.label(sigma.numpy() > level)
    if not count:
        rh.stop(f'a mesh: nothing in this avatar is denser than {level:g}')
    largest = np.bincount(labels.ravel())[1:].argmax() + 1
    solid = ndimage.binary_dilation(labels == largest, iterations=2)

    log = torch.log(sigma / level).clamp(-CLIP, CLIP).numpy()
    framed = np.pad(np.where(solid, log, -CLIP), 1, constant_values=-CLIP)
    smooth = ndimage.gaussian_filter(framed, SMOOTH)
    # What was smoothed out of the box would leave a hole in the surface.
    return np.pad(smooth[1:-1, 1:-1, 1:-1], 1, constant_values=-CLIP)


def simplified(mesh, triangles):
    """Returns a mesh with at most about `triangles` triangles, and with the normals of the one
    before at the nearest of its vertices."""
    if len(mesh.faces) <= triangles:
        return mesh
    try:
        simple = mesh.simplify_quadric_decimation(face_count=triangles)
    except ImportError as error:
        stop_without(error)

    simple.remove_unreferenced_vertices()
    _, nearest = spatial.cKDTree(mesh.vertices).query(simple.vertices)
    simple.vertex_normals = normals_of(mesh)[nearest]
    return simple


def surface_of(field, grid, N=192, level=LEVEL, triangles=None):
    """Makes a trimesh.Trimesh of a field, without colours, in the unit cube [-1, 1]^3, Z up, face
    along -Y: the surface where the density on a lattice of N^3 points crosses `level`, of its
    largest component, with at most about `triangles` triangles."""
    try:
        import trimesh
        from skimage.measure import marching_cubes
    except ImportError as error:
        stop_without(error)

    volume = signed_density(density_lattice(field, grid, N), level)
    vertices, faces, _, _ = marching_cubes(volume, 0.0)
    vertices = (vertices - 1) * (2 / (N - 1)) - 1  # from indices into the volume
    mesh = trimesh.Trimesh(vertices, faces[:, ::-1], process=True)
    parts = mesh.split(only_watertight=False)
    mesh = max(parts, key=lambda part: len(part.faces))
    trimesh.smoothing.filter_taubin(mesh, iterations=ROUNDS)
    if triangles:
        mesh = simplified(mesh, triangles)
    return mesh


def normals_of(mesh):
    """Returns the unit normals (V, 3) of a mesh's vertices; where triangles cancel out, up."""
    normals = np.array(mesh.vertex_normals)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.where(length > 1e-6, normals / np.maximum(length, 1e-6), [0.0, 0.0, 1.0])


# 2 Colours ----------------------------------------------------------------------------------------
# The field colours the surface: each point as it is seen along the normal. Where the density rises
# slowly, as in hair, this is not the colour of any one point. A mesh of few triangles carries the
# colours in a texture, which has more texels than the mesh has vertices.
TEXTURE = 1024  # texels a side
TRIANGLES = 10_000  # of a mesh with a texture
COLOURS = 2**16  # points that the decoder is asked for in one go
ABOVE, BELOW = 0.02, 0.05  # the surface: where the rays that colour it begin and end,
LAYERS = 8  # points on each of them, from that on
LEAST_LIGHT = 0.05  # with which one is asked for


@torch.no_grad()
def colours_at(field, points, normals, device):
    """Returns the colours (N, 3) uint8 of points (N, 3) of a surface: what somebody sees of the
    field who looks at them along the normals (N, 3)."""
    points = torch.tensor(points, dtype=torch.float32, device=device)
    normals = torch.tensor(normals, dtype=torch.float32, device=device)
    parts = zip(points.split(COLOURS), normals.split(COLOURS))
    colours = torch.cat([seen_along(field, some, normal) for some, normal in parts])
    return (colours.clamp(0, 1) * 255).round().byte().cpu().numpy()


def seen_along(field, points, normals):
    """Colours (n, 3) of rays against the normals (n, 3) of points (n, 3), from a little above
    these to a little below: of the light that is lost on the way, whose share is not."""
    colours = torch.zeros_like(points)
    light = torch.ones(len(points), device=points.device)
    for height in torch.linspace(ABOVE, -BELOW, LAYERS).tolist():
        lit = (light > LEAST_LIGHT).nonzero()[:, 0]
        normal = normals[lit]
        places = (points[lit] + height * normal).clamp(-1, 1)
        density, colour = field(places, -normal)
        left = torch.exp(-density * (ABOVE + BELOW) / (LAYERS - 1))
        lost = light[lit] * (1 - left)
        colours[lit] += lost[:, None] * colour
        light[lit] *= left
    return colours / (1 - light).clamp(min=1e-6)[:, None]


def unwrapped(mesh):
    """Returns a mesh with a place in the texture for each vertex, and these (V, 2) in 0..1: it is
    cut into charts, so that vertices at the cuts are there twice; normals are kept."""
    try:
        import trimesh
        import xatlas
    except ImportError as error:
        stop_without(error)

    normals = normals_of(mesh)
    kept, faces, uv = xatlas.parametrize(
        mesh.vertices.astype(np.float32),
        mesh.faces.astype(np.uint32),
        normals.astype(np.float32),
    )
    cut = trimesh.Trimesh(
        mesh.vertices[kept],
        faces.astype(np.int64),
        vertex_normals=normals[kept],
        process=False,
    )
    return cut, uv


def texels_of(uv, faces, size):
    """Finds the triangles that texels lie in: uv (V, 2) in 0..1, faces (F, 3) -> rows, columns
    (K,), the triangles (K,) and barycentric weights (K, 3) of K texels."""
    corners = uv[faces] * size - 0.5  # (F, 3, 2), in texels, whose centres are whole numbers
    first = np.ceil(corners.min(1)).astype(int)
    count = np.maximum(np.floor(corners.max(1)).astype(int) - first + 1, 0)

    # All texels of each triangle's box, one after the other.
    boxes = count.prod(1)
    triangle = np.repeat(np.arange(len(faces)), boxes)
    index = np.arange(len(triangle)) - np.repeat(boxes.cumsum() - boxes, boxes)
    row, column = np.divmod(index, count[triangle, 0])
    texel = first[triangle] + np.stack([column, row], axis=1)  # (K, 2)

    # Barycentric weights, by the areas of the three triangles that a texel makes with the edges.
    def area(a, b):
        return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]

    towards = corners[triangle] - texel[:, None]  # (K, 3, 2)
    a, b, c = towards[:, 0], towards[:, 1], towards[:, 2]
    areas = np.stack([area(b, c), area(c, a), area(a, b)], axis=1)
    whole = areas.sum(1, keepdims=True)
    weights = areas / np.where(np.abs(whole) > 1e-9, whole, np.inf)
    inside = (weights >= -1e-6).all(1) & (np.abs(whole[:, 0]) > 1e-9)
    inside &= ((texel >= 0) & (texel < size)).all(1)
    texel, triangle, weights = texel[inside], triangle[inside], weights[inside]
    return texel[:, 1], texel[:, 0], triangle, weights


def bake(mesh, uv, field, size, device):
    """Returns the texture, a PIL image of `size` texels a side, of a mesh that was unwrapped. What
    lies between the charts has the colour of the nearest texel in one."""
    rows, columns, triangle, weights = texels_of(uv, mesh.faces, size)

    def between(values):
        return (values[mesh.faces[triangle]] * weights[..., None]).sum(1)

    normals = between(mesh.vertex_normals)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
    texture = np.zeros((size, size, 3), np.uint8)
    empty = np.ones((size, size), bool)
    texture[rows, columns] = colours_at(field, between(mesh.vertices), normals, device)
    empty[rows, columns] = False
    nearest = ndimage.distance_transform_edt(empty, return_distances=False, return_indices=True)
    return Image.fromarray(texture[tuple(nearest)][::-1])  # v of a texture goes up


def mesh_of(field, grid, N=192, level=LEVEL, triangles=None, texture=0):
    """Makes a trimesh.Trimesh of a field, as surface_of does, in the colours of the field: of its
    vertices, or with `texture` texels a side in a texture."""
    device = grid.values.device
    mesh = surface_of(field, grid, N, level, triangles)
    if not texture:
        points = np.asarray(mesh.vertices)
        mesh.visual.vertex_colors = colours_at(field, points, normals_of(mesh), device)
        return mesh

    import trimesh
    mesh, uv = unwrapped(mesh)
    image = bake(mesh, uv, field, texture, device)
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=image, metallicFactor=0.0, roughnessFactor=1.0
    )
    mesh.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    return mesh


# 3 Files ------------------------------------------------------------------------------------------
FORMATS = ('.glb', '.obj', '.ply', '.stl')
TEXTURED = ('.glb', '.obj')
Y_UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # (x, y, z) -> (x, z, -y), as glTF wants it
HEIGHT = 100.0  # of a print, millimetres


def texture_of(mesh):
    """Returns a mesh's places in its texture (V, 2) and the texture, or two times None."""
    if mesh.visual.kind != 'texture':
        return None, None
    return np.asarray(mesh.visual.uv), mesh.visual.material.baseColorTexture


def colours_of(mesh):
    """Returns the colours (V, 3) uint8 of a mesh's vertices."""
    return np.asarray(mesh.visual.vertex_colors)[:, :3]


def write_glb(path, mesh):
    """Writes a mesh as glTF, with normals and a material that shows the colours as they are."""
    attributes = {
        'POSITION': np.asarray(mesh.vertices) @ Y_UP.T,
        'NORMAL': normals_of(mesh) @ Y_UP.T,
    }
    uv, texture = texture_of(mesh)
    if texture is None:
        attributes['COLOR_0'] = gltf.linear(colours_of(mesh) / 255)
    else:
        attributes['TEXCOORD_0'] = np.stack([uv[:, 0], 1 - uv[:, 1]], axis=1)  # v goes down
    gltf.write(path, gltf.of_mesh(attributes, np.asarray(mesh.faces), texture))


def write_text(path, text):
    with running.atomic(path) as temporary:
        temporary.write_text(text)


def rows_of(letter, *arrays):
    """Lines of an .obj file, one of each row of the arrays."""
    table = np.concatenate(arrays, axis=1)
    return [f'{letter} {" ".join(f"{x:.6g}" for x in row)}' for row in table]


def write_obj(path, mesh):
    """Writes a mesh as Wavefront .obj, and with a texture the .mtl and the .png beside it; returns
    the paths of these."""
    uv, texture = texture_of(mesh)
    vertices = np.asarray(mesh.vertices)
    lines = ['# Z up, the face looks along -Y']
    beside = []
    if texture is None:
        lines += rows_of('v', vertices, colours_of(mesh) / 255)
        corner = '{0}//{0}'
    else:
        beside = [path.with_suffix('.mtl'), path.with_name(f'{path.stem}-texture.png')]
        lines += [f'mtllib {beside[0].name}', 'usemtl avatar', *rows_of('v', vertices)]
        lines += rows_of('vt', uv)
        corner = '{0}/{0}/{0}'
        material = f'newmtl avatar\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {beside[1].name}\n'
        write_text(beside[0], material)
        with running.atomic(beside[1]) as temporary:
            texture.save(temporary)

    lines += rows_of('vn', normals_of(mesh))
    for face in np.asarray(mesh.faces) + 1:
        lines.append('f ' + ' '.join(corner.format(index) for index in face))
    write_text(path, '\n'.join(lines) + '\n')
    return beside


def write_print(path, mesh, height):
    """Writes a mesh as .stl for a printer: `height` millimetres high, it stands on z = 0."""
    low, high = mesh.bounds
    mesh = mesh.copy()
    mesh.apply_translation([0, 0, -low[2]])
    mesh.apply_scale(height / (high[2] - low[2]))
    with running.atomic(path) as temporary:
        mesh.export(temporary, file_type='stl')


def write_mesh(path, mesh, height=HEIGHT):
    """Writes a mesh as .glb (Y up, as glTF wants it), .obj or .ply (Z up), in units of the unit
    cube, or as .stl of so many millimetres in height; returns the paths of what was written."""
    path = Path(path)
    suffix = path.suffix.lower()
    beside = []
    if suffix == '.glb':
        write_glb(path, mesh)
    elif suffix == '.obj':
        beside = write_obj(path, mesh)
    elif suffix == '.stl':
        write_print(path, mesh, height)
    else:
        with running.atomic(path) as temporary:
            mesh.export(temporary, file_type='ply', vertex_normal=True)
    return [path, *beside]
