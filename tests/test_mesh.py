"""Meshes and splats: where the density says, in the colours of the decoder, and the same in the
programs that people open them in."""
import functools
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import gltf
import importers
import meshes
import pictures
import rodinhd as rh
import running
import splats
from papers import figures

trimesh = pytest.importorskip('trimesh')
pytest.importorskip('skimage')

CENTRE = (0.2, 0.0, 0.1)  # of the larger ball
VOLUME = 4 / 3 * np.pi * 0.5 ** 3


class Balls:
    """Two balls, the larger of radius 0.5: a field whose colour is the direction of view."""
    def __call__(self, points, dirs=None):
        large = 0.5 - (points - torch.tensor(CENTRE)).norm(dim=1)
        small = 0.1 - (points - torch.tensor([-0.7, 0.0, 0.0])).norm(dim=1)
        density = torch.exp(100 * torch.maximum(large, small)) * 10
        if dirs is None:
            return density, None
        return density, (dirs + 1) / 2


@pytest.fixture(scope='module')
def grid():
    return rh.grid_for(Balls(), rh.make_config('tiny'))


@pytest.fixture(scope='module')
def ball(grid):
    return meshes.mesh_of(Balls(), grid, N=64)


def colours_of(mesh):
    """Colours (V, 3) of a mesh's vertices, 0 to 255."""
    return np.asarray(mesh.visual.vertex_colors)[:, :3].astype(int)


def display(light):
    """Linear values as they look."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def head_of(path):
    """The JSON of a .glb."""
    data = path.read_bytes()
    length, = struct.unpack('<I', data[12:16])
    return json.loads(data[20:20 + length])


def attribute(path, name):
    """A vertex attribute of a .glb, as it is stored."""
    head = head_of(path)
    accessor = head['accessors'][head['meshes'][0]['primitives'][0]['attributes'][name]]
    view = head['bufferViews'][accessor['bufferView']]
    start = len(path.read_bytes()) - head['buffers'][0]['byteLength'] + view['byteOffset']
    data = path.read_bytes()[start:start + view['byteLength']]
    kind = {5126: '<f4', 5123: '<u2'}[accessor['componentType']]
    return np.frombuffer(data, kind).reshape(accessor['count'], -1)


def test_the_largest_component_in_its_place(ball):
    assert ball.is_watertight
    assert ball.is_winding_consistent
    assert ball.volume == pytest.approx(VOLUME, rel=0.02)
    assert np.allclose(ball.centroid, CENTRE, atol=0.01)
    assert len(ball.split()) == 1


def test_colours_are_seen_along_the_normal(ball):
    towards = -(np.asarray(ball.vertices) - CENTRE) / 0.5
    assert np.abs(colours_of(ball) / 255 - (towards + 1) / 2).max() < 0.05


@pytest.mark.parametrize('suffix', ['.glb', '.GLB', '.ply', '.obj'])
def test_files_are_read_without_repair(ball, tmp_path, suffix):
    path = tmp_path / f'a{suffix}'
    assert meshes.write_mesh(path, ball) == [path]
    read = trimesh.load(path, force='mesh')
    assert read.is_watertight
    assert len(read.faces) == len(ball.faces)
    x, y, z = CENTRE
    centre = (x, z, -y) if suffix.lower() == '.glb' else CENTRE  # glTF has Y up
    assert np.allclose(read.centroid, centre, atol=0.01)
    if suffix.lower() == '.glb':
        light = attribute(path, 'COLOR_0')[:, :3] / 65535
        shown = 255 * display(light)
    else:
        shown = colours_of(read)
    assert np.abs(shown.mean(0) - colours_of(ball).mean(0)).max() < 3


def test_fewer_triangles(grid):
    pytest.importorskip('fast_simplification')
    mesh = meshes.mesh_of(Balls(), grid, N=64, triangles=1000)
    assert 800 <= len(mesh.faces) <= 1000
    assert mesh.volume == pytest.approx(VOLUME, rel=0.05)


@pytest.fixture(scope='module')
def textured(grid):
    pytest.importorskip('xatlas')
    pytest.importorskip('fast_simplification')
    return meshes.mesh_of(Balls(), grid, N=64, triangles=1000, texture=256)


def test_a_texture_has_the_colours_of_the_field(textured):
    """At the middle of each triangle, as it is seen along the normal."""
    uv, image = meshes.texture_of(textured)
    assert uv.min() >= 0
    assert uv.max() <= 1
    places = uv[textured.faces].mean(1) * 256
    texels = np.asarray(image)[255 - places[:, 1].astype(int), places[:, 0].astype(int)]
    towards = -(textured.triangles_center - CENTRE) / 0.5
    assert np.abs(texels / 255 - (towards + 1) / 2).mean() < 0.02


@pytest.mark.parametrize('name', ['ball', 'textured'])
def test_a_glb_is_smooth_and_no_metal(name, tmp_path, request):
    """Every vertex is used and has a normal of unit length, which looks outwards."""
    mesh = request.getfixturevalue(name)
    path = tmp_path / 'a.glb'
    meshes.write_mesh(path, mesh)
    material, = head_of(path)['materials']
    assert material['pbrMetallicRoughness']['metallicFactor'] == 0
    assert material['extensions'] == {'KHR_materials_unlit': {}}

    normals = attribute(path, 'NORMAL')
    assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-3)
    x, y, z = CENTRE
    outwards = (attribute(path, 'POSITION') - (x, z, -y)) / 0.5
    assert ((normals * outwards).sum(1) > 0.9).all()
    assert len(np.unique(mesh.faces)) == len(normals)
    reason = importers.missing('gltf-validator')
    if not reason:
        found = importers.validated(path)
        assert found['numErrors'] == found['numWarnings'] == 0


def test_colours_of_vertices_are_linear_and_fine():
    colours = np.linspace(0, 1, 256)[:, None].repeat(3, 1)
    light = gltf.linear(colours)
    assert light.dtype == np.uint16
    assert np.allclose(display(light[:, :3] / 65535), colours, atol=1e-3)
    assert (light[:, 3] == 65535).all()


def test_an_obj_names_its_material_and_texture(textured, tmp_path):
    names = [path.name for path in meshes.write_mesh(tmp_path / 'a b.obj', textured)]
    assert names == ['a b.obj', 'a b.mtl', 'a b-texture.png']
    read = trimesh.load(tmp_path / 'a b.obj', force='mesh')
    assert read.visual.material.image.size == (256, 256)
    assert read.visual.uv.shape == (len(read.vertices), 2)


def test_a_print_is_closed_and_has_its_height(ball, tmp_path):
    meshes.write_mesh(tmp_path / 'a.stl', ball, height=80)
    read = trimesh.load(tmp_path / 'a.stl')
    assert read.is_watertight
    assert read.bounds[:, 2] == pytest.approx([0, 80], abs=1e-3)


def test_thin_air_has_no_mesh():
    def air(points, dirs=None):
        return torch.full((len(points),), 1e-4), dirs

    grid = rh.grid_for(air, rh.make_config('tiny'))
    with pytest.raises(rh.Stop, match='nothing in this avatar is denser than 5'):
        meshes.mesh_of(air, grid, N=32)


# In other programs --------------------------------------------------------------------------------
SIDES = (0, 90)
SIZE = 128


class Head:
    """A ball with a nose, in colours that tell its sides apart."""
    def __call__(self, points, dirs=None):
        ball = 0.6 - points.norm(dim=1)
        nose = 0.15 - (points - torch.tensor([0.0, -0.6, 0.0])).norm(dim=1)
        density = torch.exp(100 * torch.maximum(ball, nose)).clamp(max=500) * 5
        return density, None if dirs is None else (points * 0.7 + 0.5).clamp(0, 1)


@pytest.fixture(scope='module')
def head():
    field = Head()
    return pictures.Avatar(field, rh.grid_for(field, rh.make_config('tiny', ['steps=128'])))


@pytest.fixture(scope='module')
def views(head):
    """Pictures of the volume."""
    seen = []
    intrinsics = rh.intrinsics_of(rh.PORTRAIT_FOV, SIZE)
    for side in SIDES:
        pose = rh.orbit_pose(side, importers.ELEVATION)
        seen.append(rh.render_view(head.field, pose, intrinsics, SIZE, SIZE, 256, head.grid))
    return seen


@pytest.fixture(scope='module')
def asset(head, tmp_path_factory):
    pytest.importorskip('xatlas')
    path = tmp_path_factory.mktemp('asset') / 'head.glb'
    meshes.write_mesh(path, meshes.mesh_of(*head, N=64, triangles=2000, texture=256))
    return path


@pytest.fixture(scope='module')
def browser():
    if importers.missing():
        pytest.skip(importers.missing())
    from playwright import sync_api
    with sync_api.sync_playwright() as playwright:
        how = {'executable_path': importers.CHROMIUM, 'args': importers.WITHOUT_A_GPU}
        browser = playwright.chromium.launch(**how)
        yield browser
        browser.close()


@pytest.mark.parametrize('program', ['three', '@google/model-viewer'])
def test_a_mesh_in_a_browser(program, asset, views, browser):
    if importers.missing(program):
        pytest.skip(importers.missing(program))
    script = program.rpartition('/')[2]
    seen, complaints = importers.in_browser(browser, script, asset, SIZE, SIDES)
    assert not complaints
    psnr, overlap = importers.compared(seen, views)
    assert psnr > 26
    assert overlap > 0.97


def test_a_mesh_in_blender(asset, views, tmp_path):
    if not importers.blender_command('x'):
        pytest.skip('needs Blender (pip install bpy)')
    seen = importers.in_blender(asset, tmp_path, SIZE, SIDES)
    psnr, overlap = importers.compared(seen, views)
    assert psnr > 26
    assert overlap > 0.97


# Splats -------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def cloud(head):
    return splats.splats_of(*head, cells=48, views=4)


def test_splats_lie_on_the_surface(cloud):
    assert len(cloud.points) > 500
    assert (np.linalg.norm(cloud.points, axis=1) > 0.5).all()
    truth = (cloud.points * 0.7 + 0.5).clip(0, 1)
    assert np.abs(cloud.colours - truth).max() < 0.05
    front = cloud.points[:, 1].argmin()
    assert cloud.points[front, 1] == pytest.approx(-0.75, abs=0.05)


def test_splats_are_written_as_others_read_them(cloud, tmp_path):
    """The layout of 3D Gaussian Splatting: logarithms of scales, opacity before the sigmoid."""
    splats.write_splats(tmp_path / 'a.ply', cloud)
    head, _, body = (tmp_path / 'a.ply').read_bytes().partition(b'end_header\n')
    assert head.decode().count('property float') == len(splats.FIELDS)
    table = np.frombuffer(body, '<f4').reshape(-1, len(splats.FIELDS))
    column = dict(zip(splats.FIELDS, table.T))
    assert np.allclose(np.exp(column['scale_1']), cloud.scale)
    assert np.allclose(1 / (1 + np.exp(-column['opacity'])), cloud.opacity, atol=1e-5)
    assert np.allclose(0.5 + splats.SH_0 * column['f_dc_2'], cloud.colours[:, 2], atol=1e-5)

    splats.write_splats(tmp_path / 'a.GLB', cloud)
    head = head_of(tmp_path / 'a.GLB')
    primitive, = head['meshes'][0]['primitives']
    assert primitive['mode'] == 0
    assert primitive['extensions']['KHR_gaussian_splatting']['kernel'] == 'ellipse'
    counts = {head['accessors'][index]['count'] for index in primitive['attributes'].values()}
    assert counts == {len(cloud.points)}


# The figure ---------------------------------------------------------------------------------------
def decoder_of_a_box(config):
    """A decoder that is dense where the last channel of the planes' mean is high."""
    decoder = rh.Decoder(config).requires_grad_(False)
    for p in decoder.parameters():
        p.zero_()
    first, _, last = decoder.sigma_net
    first.weight[0, decoder.density_channels - 1] = 10.0
    last.weight[0, 0] = 1.5
    last.bias[0] = -10.0
    return decoder


def test_the_figure_draws_a_texture_the_right_way_round():
    pytest.importorskip('embreex')
    quad = trimesh.Trimesh(
        [[-1, 0, -1], [1, 0, -1], [1, 0, 1], [-1, 0, 1]], [[0, 1, 2], [0, 2, 3]], process=False
    )
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
    texture = Image.fromarray(colours).resize((16, 16), Image.Resampling.NEAREST)
    quad.visual = trimesh.visual.TextureVisuals(
        uv=quad.vertices[:, [0, 2]] / 2 + 0.5,
        material=trimesh.visual.material.PBRMaterial(baseColorTexture=texture),
    )
    camera = rh.orbit_pose(0, 0), rh.intrinsics_of(rh.PORTRAIT_FOV, 32)
    image, solid = figures.draw_mesh(quad, camera, 32)
    assert solid.view(32, 32)[8:24, 8:24].all()
    assert torch.equal(image[8::16, 8::16], torch.from_numpy(colours) / 255)


def test_the_figure_measures_meshes_against_volumes(tiny, tmp_path, monkeypatch):
    for name in ('fast_simplification', 'embreex', 'xatlas'):
        pytest.importorskip(name)
    monkeypatch.setattr(figures, 'mesh_of', functools.partial(meshes.mesh_of, N=48))

    # A box: dense where x, y and z are all below 0.5 in size
    planes = torch.zeros(3, 8, 32, 32)
    planes[:, -1, 8:24, 8:24] = 1.0
    weights = decoder_of_a_box(tiny).state_dict()
    running.write_model(tmp_path / 'fits/decoder.pt', 'decoder', tiny, weights, 0)
    decoder = running.load_model('decoder', tmp_path / 'fits', 'cpu').fingerprint
    running.write_checkpoint(tmp_path / 'fits/a.pt', 'planes', {
        'planes': planes.half(),
        'low': rh.resize_planes(planes, 8).half(),
        'centre': torch.zeros(3),
        'half': 1.0,
        'made_with': {'decoder': decoder},
    })

    options = ['--fits', tmp_path / 'fits', '--size', 32, '--out', tmp_path]
    figures.main(figures.parse(['meshes', *map(str, options)]))
    numbers = json.loads((tmp_path / 'meshes.json').read_text())
    assert str(tmp_path) not in numbers['command']
    scores = numbers['avatars']['a']
    assert scores['overlap'] > 0.9
    assert scores['PSNR'] > 20
    assert scores['triangles'] <= 10000
