"""Cameras, planes and look-ups against numbers worked out by hand and against grid_sample."""
import pytest
import torch

import rodinhd as rh
from references import grid_sample_planes


def test_a_known_point_lands_on_its_pixel():
    """Camera at (0, -4, 0) looking along +Y, fx = fy = 100, centre (32, 32). The point (0.1, 0, 0.22) has depth 4, so
    u = 32 + 100 * 0.1 / 4 = 34.5 and v = 32 - 100 * 0.22 / 4 = 26.5: the centre of column 34, row 26."""
    pose, k = rh.orbit_pose(0, 0, 4), torch.tensor([100.0, 100, 32, 32])
    rays_o, rays_d = rh.pixel_rays(pose, k, torch.tensor([34]), torch.tensor([26]))
    point = torch.tensor([0.1, 0, 0.22])
    t = (point - rays_o[0]) @ rays_d[0]
    assert torch.allclose(rays_o[0] + t * rays_d[0], point, atol=1e-5)


def test_orbit_conventions():
    """Azimuth 0 is the front (-Y), 90 is +X, elevation 90 is +Z; rotations are proper; -z of the camera points to the origin."""
    for (azimuth, elevation), position in {(0, 0): (0, -2, 0), (90, 0): (2, 0, 0), (0, 90): (0, 0, 2), (180, 0): (0, 2, 0)}.items():
        pose = rh.orbit_pose(azimuth, elevation, 2)
        assert torch.allclose(pose[:3, 3], torch.tensor(position, dtype=torch.float32), atol=1e-6)
        assert torch.allclose(pose[:3, :3] @ pose[:3, :3].T, torch.eye(3), atol=1e-6)
        assert torch.linalg.det(pose[:3, :3]).item() == pytest.approx(1, abs=1e-5)
        assert torch.allclose(-pose[:3, 2] * 2, -pose[:3, 3], atol=1e-5)
    assert torch.allclose(rh.orbit_pose(0, 0)[:3, 0], torch.tensor([1.0, 0, 0]))        # from the front, right is +X


def test_view_rays_are_row_major():
    pose, k = rh.orbit_pose(20, 10), rh.intrinsics_of(34.0, 8)
    _, rays_d = rh.view_rays(pose, k, 8, 8)
    _, one = rh.pixel_rays(pose, k, torch.tensor([5]), torch.tensor([2]))
    assert torch.allclose(rays_d[2 * 8 + 5], one[0])


def test_box_intersection():
    o = torch.tensor([[0.0, -4, 0], [0, -4, 0], [5, -4, 0], [0, 0, 0]])
    d = torch.tensor([[0.0, 1, 0], [0, -1, 0], [0, 1, 0], [1, 0, 0]])
    near, far = rh.intersect_box(o, d)
    assert (near[0], far[0]) == (3, 5)
    assert near[1] > far[1] and near[2] > far[2]                                        # behind, beside
    assert near[3] == pytest.approx(0.2) and far[3] == 1                                # from inside: min_near


@pytest.mark.parametrize('C', [2, 12])
def test_planes_are_xy_xz_yz_with_width_first(C):
    """One plane at a time holds its width coordinate in channel 0 and its height coordinate in channel 1: the pairs (width, height)
    of the point (.1, .2, .3) are (.1, .2), (.1, .3), (.2, .3); the mean over three planes gives a third."""
    ramp = torch.linspace(-1, 1, 16)
    point = torch.tensor([[0.1, 0.2, 0.3]])
    for k, expected in enumerate([(0.1, 0.2), (0.1, 0.3), (0.2, 0.3)]):
        planes = torch.zeros(3, C, 16, 16)
        planes[k, 0], planes[k, 1] = ramp.expand(16, 16), ramp[:, None].expand(16, 16)
        assert torch.allclose(3 * rh.sample_planes(planes, point)[0, :2], torch.tensor(expected), atol=1e-6)


def naive_lookup(planes, points):
    """sample_planes for one point after the other: the four texels around its projection, by name."""
    R, out = planes.shape[-1], []
    for p in points.tolist():
        total = torch.zeros(planes.shape[1], dtype=planes.dtype)
        for k, (u, v) in enumerate(((p[0], p[1]), (p[0], p[2]), (p[1], p[2]))):
            x, y = ((c + 1) / 2 * (R - 1) for c in (u, v))
            i, j = min(int(x), R - 2), min(int(y), R - 2)
            for di in (0, 1):
                for dj in (0, 1):
                    total = total + planes[k, :, j + dj, i + di] * abs(1 - di - (x - i)) * abs(1 - dj - (y - j))
        out.append(total / 3)
    return torch.stack(out)


@pytest.mark.parametrize(('C', 'N'), [(5, 200), (12, 200), (12, 9000)])         # grid_sample; scatter-adds; sort
def test_lookup_equals_grid_sample_and_its_gradient(C, N):
    planes = torch.randn(3, C, 9, 9, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(N, 3, dtype=torch.float64) * 2 - 1)
    points[:2] = torch.tensor([[1.0, 1, 1], [-1, -1, -1]])                              # the corners themselves
    ours, expected = rh.sample_planes(planes, points), grid_sample_planes(planes, points)
    assert torch.allclose(ours, expected, atol=1e-12) and torch.allclose(ours[:50], naive_lookup(planes, points[:50]), atol=1e-12)
    weight = torch.randn_like(ours)
    a, = torch.autograd.grad((ours * weight).sum(), planes)
    b, = torch.autograd.grad((expected * weight).sum(), planes)
    assert torch.allclose(a, b, atol=1e-12)
    assert torch.autograd.gradcheck(lambda p: rh.sample_planes(p, points[:6]), planes)


@pytest.mark.parametrize('C', [1, 12])
def test_a_plane_gives_nothing_to_points_outside_its_square(C):
    planes = torch.ones(3, C, 4, 4)
    assert torch.allclose(rh.sample_planes(planes, torch.tensor([[0, 0, 1.5]])), torch.tensor(1 / 3))  # only xy sees it
    assert torch.allclose(rh.sample_planes(planes, torch.tensor([[0, 0, 1.01]])), torch.tensor(1 / 3))


def test_roll_out_and_back():
    planes = torch.randn(2, 3, 4, 8, 8)
    rolled = rh.roll_out(planes)
    assert rolled.shape == (2, 4, 8, 24)
    assert torch.equal(rolled[..., 8:16], planes[:, 1])
    assert torch.equal(rh.roll_in(rolled), planes)


def test_resizing_keeps_places():
    """A linear function of the coordinate is the same function at any size (ends excepted when averaging down)."""
    plane = torch.linspace(-1, 1, 32).expand(3, 1, 32, 32)
    up, down = rh.resize_planes(plane, 64), rh.resize_planes(plane, 8)
    assert torch.allclose(up[0, 0, 0], torch.linspace(-1, 1, 64), atol=1e-5)
    assert torch.allclose(down[0, 0, 3, 1:-1], torch.linspace(-1, 1, 8)[1:-1], atol=1e-2)
    assert torch.allclose(rh.resize_planes(torch.ones(1, 7, 7), 3), torch.ones(1, 3, 3))


def test_total_variation():
    planes = torch.zeros(3, 1, 3, 3)
    planes[0, 0, 1, 1] = 1.0            # 4 differences of 1; each mean has 3 * 1 * 6 = 18 terms; three planes: 3 * (2/18 + 2/18)
    assert rh.total_variation(planes).item() == pytest.approx(3 * 4 / 18)
    assert torch.autograd.gradcheck(rh.total_variation, torch.randn(3, 2, 5, 5, dtype=torch.float64, requires_grad=True))
