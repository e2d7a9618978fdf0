"""render_blender.py: cameras and framing, and where there is Blender a character from its file to
posed images."""
import importlib.util
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import render_blender
import rodinhd as rh
import scenes

BLENDER = importlib.util.find_spec('bpy') is not None


@pytest.mark.parametrize('azimuth', [0, 75, 200])
def test_cameras_are_those_of_the_project(azimuth):
    pose = torch.tensor(render_blender.camera_pose(azimuth, 20))
    assert torch.allclose(pose, rh.orbit_pose(azimuth, 20), atol=1e-6)
    assert rh.PORTRAIT_FOV == render_blender.FOV


def test_views_are_all_around_and_differ():
    train = render_blender.spread(29, 0)
    test = render_blender.spread(6, 77)
    assert {int(azimuth // 90) for azimuth, _ in train} == {0, 1, 2, 3}
    elevations = [elevation for _, elevation in train]
    assert -20 < min(elevations) < -10
    assert 40 < max(elevations) < 45
    apart = [math.dist(a, b) for a in train for b in test]
    assert min(apart) > 1


def test_the_neck_is_the_narrowest_place():
    head = [4, 5, 6, 6, 6, 5]
    neck = [3, 2.5, 3]
    bust = [8, 12, 13, 13, 12, 12, 12]
    assert render_blender.neck_of(head + neck + bust) == 7
    arms_and_hips = [20, 24, 30, 8, 8, 7, 6]
    assert render_blender.neck_of(head + neck + bust + arms_and_hips) == 7


def test_hair_may_hide_the_neck():
    """A whole body of 100 slices with the arms away from it, and hair down to the shoulders."""
    hair = [9, 12, 14, 15, 15, 15, 16, 16, 16, 16, 17, 17, 18, 19]
    body = [29, 32, 35, 38, 40] + 26 * [60] + 55 * [33]
    assert render_blender.neck_of(hair + body) == 10
    slopes = [10 + k for k in range(50)] + 50 * [30]  # no neck at all: by what is usual
    assert render_blender.neck_of(slopes) == 13
    assert render_blender.neck_of(slopes[:50]) == 17


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    args = render_blender.parse(['--models', str(tmp_path)])
    monkeypatch.setattr(render_blender, 'bpy', None)
    with pytest.raises(SystemExit, match='pip install bpy'):
        render_blender.main(args)
    monkeypatch.setattr(render_blender, 'bpy', 'Blender')
    with pytest.raises(SystemExit, match=r'there is no \.glb'):
        render_blender.main(args)


CUT = """
import sys
from pathlib import Path
import render_blender
import bmesh
render_blender.quietly(lambda: render_blender.load(Path(sys.argv[1]), 'Y'))
render_blender.place(render_blender.corners())
graph = render_blender.bpy.context.evaluated_depsgraph_get()
for shown in render_blender.shown_meshes():
    render_blender.keep_inside(shown, graph, 0.9)
mesh = bmesh.new()
mesh.from_mesh(render_blender.shown_meshes()[0].data)
print(max(abs(x) for point in mesh.verts for x in point.co))
print(sum(edge.is_boundary for edge in mesh.edges))
"""


@pytest.mark.skipif(not BLENDER, reason='needs Blender (pip install bpy)')
def test_what_is_cut_off_is_closed(tmp_path):
    trimesh = pytest.importorskip('trimesh')
    tube = trimesh.creation.cylinder(0.2, 3.0)
    rod = trimesh.creation.cylinder(0.1, 4.0, transform=trimesh.transformations.rotation_matrix(
        math.pi / 2, [1, 0, 0], [0, 0, 0]))
    trimesh.util.concatenate([tube, rod]).export(tmp_path / 'cross.glb')
    command = [sys.executable, '-c', CUT, str(tmp_path / 'cross.glb')]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    farthest, ends = done.stdout.split()[-2:]
    assert float(farthest) == pytest.approx(0.9, abs=1e-4), done.stderr
    assert int(ends) == 0


@pytest.mark.skipif(not BLENDER, reason='needs Blender (pip install bpy)')
def test_a_character_becomes_posed_images(tmp_path, capsys):
    trimesh = pytest.importorskip('trimesh')
    head = trimesh.creation.icosphere(3, 0.12)
    head.apply_translation([0, 1.7, 0])  # in a .glb Y is up, and a face looks along Z
    nose = trimesh.creation.box([0.03, 0.03, 0.08])
    nose.apply_translation([0, 1.7, 0.12])
    nose.visual.vertex_colors = [255, 0, 0, 255]
    neck = trimesh.creation.box([0.08, 0.14, 0.08])
    neck.apply_translation([0, 1.55, 0])
    body = trimesh.creation.box([0.5, 1.5, 0.25])
    body.apply_translation([0, 0.75, 0])
    models = tmp_path / 'models'
    models.mkdir()
    trimesh.util.concatenate([head, nose, neck, body]).export(models / 'a b.glb')
    (models / 'broken.fbx').write_bytes(b'no')

    options = ['--models', models, '--data', tmp_path / 'data', '--views', 4, '--test', 2]
    options += ['--size', 48, '--samples', 4]
    command = [sys.executable, str(ROOT / 'render_blender.py'), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'broken.fbx: left out' in done.stderr
    assert '1 of 2 characters' in done.stdout

    folder = tmp_path / 'data' / 'a b'
    box = scenes.read_box(folder)
    views = scenes.load_views(folder, 'train', box)
    assert len(views.images) == 4
    _, alpha = scenes.read_portrait(folder / 'portrait.png', 48)
    rows = np.flatnonzero(alpha[0].amax(1) > 0.5)
    assert rows.min() == pytest.approx(5, abs=3)  # the top of the head, as in our portraits
    assert rows.max() == pytest.approx(43, abs=3)  # where the body is cut off
    assert len(scenes.load_views(folder, 'test', box).images) == 2

    (models / 'broken.fbx').unlink()
    render_blender.main(render_blender.parse([*map(str, options)]))
    assert 'a b.glb: is there' in capsys.readouterr().err
