"""Meshes: where the density says, in the colours of the decoder, and readable by others without repair."""
import functools
import json

import numpy as np
import pytest
import torch

import export
import figures
import rodinhd as rh

trimesh = pytest.importorskip('trimesh')
pytest.importorskip('skimage')


class Ball:
    """Two balls, the larger of radius 0.5 around (0.2, 0, 0.1); colour is the direction in which one looks."""
    def __call__(self, points, dirs=None):
        large = 0.5 - (points - torch.tensor([0.2, 0.0, 0.1])).norm(dim=1)
        small = 0.1 - (points - torch.tensor([-0.7, 0.0, 0.0])).norm(dim=1)
        return torch.exp(100 * torch.maximum(large, small)) * 10, None if dirs is None else (dirs + 1) / 2


@pytest.fixture(scope='module')
def ball():
    field = Ball()
    return export.mesh_of(field, rh.grid_for(field, rh.make_config('tiny')), N=64)


def test_the_largest_component_in_its_place(ball):
    assert ball.is_watertight and ball.is_winding_consistent
    assert ball.volume == pytest.approx(4 / 3 * np.pi * 0.125, rel=0.02)
    assert np.allclose(ball.centroid, [0.2, 0, 0.1], atol=0.01) and len(ball.split()) == 1


def test_colours_are_seen_along_the_normal(ball):
    towards = -(np.asarray(ball.vertices) - [0.2, 0, 0.1]) / 0.5
    assert np.abs(ball.visual.vertex_colors[:, :3] / 255 - (towards + 1) / 2).max() < 0.05


@pytest.mark.parametrize('suffix', ['.glb', '.ply', '.obj'])
def test_files_are_read_without_repair(ball, tmp_path, suffix):
    export.write_mesh(tmp_path / f'a{suffix}', ball)
    read = trimesh.load(tmp_path / f'a{suffix}', force='mesh')
    assert read.is_watertight and len(read.faces) == len(ball.faces)
    centre = [0.2, 0.1, 0] if suffix == '.glb' else [0.2, 0, 0.1]       # glTF has Y up
    assert np.allclose(read.centroid, centre, atol=0.01)
    assert np.abs(read.visual.vertex_colors.astype(int)[:, :3].mean(0) - ball.visual.vertex_colors.astype(int)[:, :3].mean(0)).max() < 3


def test_fewer_triangles():
    pytest.importorskip('fast_simplification')
    field = Ball()
    mesh = export.mesh_of(field, rh.grid_for(field, rh.make_config('tiny')), N=64, triangles=1000)
    assert 800 <= len(mesh.faces) <= 1000 and mesh.volume == pytest.approx(4 / 3 * np.pi * 0.125, rel=0.05)


def test_thin_air_has_no_mesh():
    def air(points, dirs=None):
        return torch.full((len(points),), 1e-4), dirs
    with pytest.raises(SystemExit, match='nothing in this avatar is denser than 10'):
        export.mesh_of(air, rh.grid_for(air, rh.make_config('tiny')), N=32)


def test_the_figure_measures_meshes_against_volumes(tiny, tmp_path, monkeypatch):
    for name in ('fast_simplification', 'embreex'):
        pytest.importorskip(name)
    monkeypatch.setattr(export, 'mesh_of', functools.partial(export.mesh_of, N=48))
    decoder, planes = rh.Decoder(tiny), torch.zeros(3, 8, 32, 32)
    with torch.no_grad():                                               # a box: dense where x, y and z are all below 0.5 in size
        planes[:, -1, 8:24, 8:24] = 1.0
        for p in decoder.parameters():
            p.zero_()
        decoder.sigma_net[0].weight[0, decoder.density_channels - 1] = 10.0
        decoder.sigma_net[2].weight[0, 0], decoder.sigma_net[2].bias[0] = 1.5, -10.0
    rh.write_model(tmp_path / 'fits/decoder.pt', 'decoder', tiny, decoder.state_dict(), 0)
    rh.write_checkpoint(tmp_path / 'fits/a.pt', 'planes', {'planes': planes.half()})
    figures.main(figures.parse(['meshes', '--fits', str(tmp_path / 'fits'), '--size', '32', '--out', str(tmp_path)]))
    scores = json.loads((tmp_path / 'meshes.json').read_text())['a']
    assert scores['overlap'] > 0.9 and scores['PSNR'] > 20 and scores['triangles'] <= 20000
