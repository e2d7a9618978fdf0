"""Meshes: where the density says, in the colours of the decoder, and readable by others without
repair."""
import functools
import json

import numpy as np
import pytest
import torch

import export
import rodinhd as rh
import running
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
    return export.mesh_of(Balls(), grid, N=64)


def colours_of(mesh):
    """Colours (V, 3) of a mesh's vertices, 0 to 255."""
    return np.asarray(mesh.visual.vertex_colors)[:, :3].astype(int)


def test_the_largest_component_in_its_place(ball):
    assert ball.is_watertight
    assert ball.is_winding_consistent
    assert ball.volume == pytest.approx(VOLUME, rel=0.02)
    assert np.allclose(ball.centroid, CENTRE, atol=0.01)
    assert len(ball.split()) == 1


def test_colours_are_seen_along_the_normal(ball):
    towards = -(np.asarray(ball.vertices) - CENTRE) / 0.5
    assert np.abs(colours_of(ball) / 255 - (towards + 1) / 2).max() < 0.05


@pytest.mark.parametrize('suffix', ['.glb', '.ply', '.obj'])
def test_files_are_read_without_repair(ball, tmp_path, suffix):
    path = tmp_path / f'a{suffix}'
    export.write_mesh(path, ball)
    read = trimesh.load(path, force='mesh')
    assert read.is_watertight
    assert len(read.faces) == len(ball.faces)
    x, y, z = CENTRE
    centre = (x, z, -y) if suffix == '.glb' else CENTRE  # glTF has Y up
    assert np.allclose(read.centroid, centre, atol=0.01)
    difference = colours_of(read).mean(0) - colours_of(ball).mean(0)
    assert np.abs(difference).max() < 3


def test_fewer_triangles(grid):
    pytest.importorskip('fast_simplification')
    mesh = export.mesh_of(Balls(), grid, N=64, triangles=1000)
    assert 800 <= len(mesh.faces) <= 1000
    assert mesh.volume == pytest.approx(VOLUME, rel=0.05)


def test_thin_air_has_no_mesh():
    def air(points, dirs=None):
        return torch.full((len(points),), 1e-4), dirs

    grid = rh.grid_for(air, rh.make_config('tiny'))
    with pytest.raises(SystemExit, match='nothing in this avatar is denser than 10'):
        export.mesh_of(air, grid, N=32)


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


def test_the_figure_measures_meshes_against_volumes(tiny, tmp_path, monkeypatch):
    for name in ('fast_simplification', 'embreex'):
        pytest.importorskip(name)
    monkeypatch.setattr(export, 'mesh_of', functools.partial(export.mesh_of, N=48))

    # A box: dense where x, y and z are all below 0.5 in size
    planes = torch.zeros(3, 8, 32, 32)
    planes[:, -1, 8:24, 8:24] = 1.0
    weights = decoder_of_a_box(tiny).state_dict()
    running.write_model(tmp_path / 'fits/decoder.pt', 'decoder', tiny, weights, 0)
    running.write_checkpoint(tmp_path / 'fits/a.pt', 'planes', {'planes': planes.half()})

    options = ['--fits', tmp_path / 'fits', '--size', 32, '--out', tmp_path]
    figures.main(figures.parse(['meshes', *map(str, options)]))
    scores = json.loads((tmp_path / 'meshes.json').read_text())['a']
    assert scores['overlap'] > 0.9
    assert scores['PSNR'] > 20
    assert scores['triangles'] <= 20000
