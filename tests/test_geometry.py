"""Cameras, planes and look-ups against numbers worked out by hand and against grid_sample."""
import pytest
import torch

import rodinhd as rh
from references import grid_sample_planes


# Cameras ------------------------------------------------------------------------------------------
def test_a_known_point_lands_on_its_pixel():
    """The camera is at (0, -4, 0) and looks along +Y; fx = fy = 100, the centre is (32, 32).

    The point (0.1, 0, 0.22) has depth 4, so u = 32 + 100 * 0.1 / 4 = 34.5 and
    v = 32 - 100 * 0.22 / 4 = 26.5: the centre of column 34, row 26.
    """
    pose = rh.orbit_pose(0, 0, 4)
    intrinsics = torch.tensor([100.0, 100, 32, 32])
    rays_o, rays_d = rh.pixel_rays(pose, intrinsics, torch.tensor([34]), torch.tensor([26]))
    point = torch.tensor([0.1, 0, 0.22])
    t = (point - rays_o[0]) @ rays_d[0]
    assert torch.allclose(rays_o[0] + t * rays_d[0], point, atol=1e-5)


@pytest.mark.parametrize(('azimuth', 'elevation', 'position'), [
    (0, 0, (0, -2, 0)),
    (90, 0, (2, 0, 0)),
    (0, 90, (0, 0, 2)),
    (180, 0, (0, 2, 0)),
])
def test_orbit_conventions(azimuth, elevation, position):
    """Azimuth 0 is the front (-Y), 90 is +X, elevation 90 is +Z; rotations are proper; -z of the
    camera points to the origin."""
    pose = rh.orbit_pose(azimuth, elevation, 2)
    rotation = pose[:3, :3]
    assert torch.allclose(pose[:3, 3], torch.tensor(position, dtype=torch.float32), atol=1e-6)
    assert torch.allclose(rotation @ rotation.T, torch.eye(3), atol=1e-6)
    assert torch.linalg.det(rotation).item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(-pose[:3, 2] * 2, -pose[:3, 3], atol=1e-5)


def test_from_the_front_right_is_x():
    assert torch.allclose(rh.orbit_pose(0, 0)[:3, 0], torch.tensor([1.0, 0, 0]))


def test_the_portrait_camera_looks_from_the_front_and_2_degrees_above():
    pose, intrinsics = rh.portrait_camera(64)
    assert torch.equal(pose, rh.orbit_pose(0, 2))
    assert torch.equal(intrinsics, rh.intrinsics_of(34.0, 64))


def test_view_rays_are_row_major():
    pose = rh.orbit_pose(20, 10)
    intrinsics = rh.intrinsics_of(34.0, 8)
    _, rays_d = rh.view_rays(pose, intrinsics, 8, 8)
    _, one = rh.pixel_rays(pose, intrinsics, torch.tensor([5]), torch.tensor([2]))
    assert torch.allclose(rays_d[2 * 8 + 5], one[0])


def test_box_intersection():
    """A ray through the middle, one that looks away, one that passes by, one from inside."""
    rays_o = torch.tensor([[0.0, -4, 0], [0, -4, 0], [5, -4, 0], [0, 0, 0]])
    rays_d = torch.tensor([[0.0, 1, 0], [0, -1, 0], [0, 1, 0], [1, 0, 0]])
    near, far = rh.intersect_box(rays_o, rays_d)
    assert (near[0], far[0]) == (3, 5)
    assert near[1] > far[1]
    assert near[2] > far[2]
    assert near[3] == pytest.approx(0.2)  # min_near
    assert far[3] == 1


# Look-ups -----------------------------------------------------------------------------------------
LOOK_UPS = [rh.sample_planes_plainly, rh.sample_planes_by_rows]


@pytest.mark.parametrize('C', [2, 12])
def test_planes_are_xy_xz_yz_with_width_first(C):
    """One plane at a time holds its width coordinate in channel 0, its height's in channel 1.

    The pairs (width, height) of the point (.1, .2, .3) are (.1, .2), (.1, .3), (.2, .3); the mean
    over three planes gives a third.
    """
    ramp = torch.linspace(-1, 1, 16)
    point = torch.tensor([[0.1, 0.2, 0.3]])
    for k, expected in enumerate([(0.1, 0.2), (0.1, 0.3), (0.2, 0.3)]):
        planes = torch.zeros(3, C, 16, 16)
        planes[k, 0] = ramp.expand(16, 16)
        planes[k, 1] = ramp[:, None].expand(16, 16)
        found = 3 * rh.sample_planes(planes, point)[0, :2]
        assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


def naive_lookup(planes, points):
    """sample_planes for one point after the other: the four texels around its projection."""
    R = planes.shape[-1]
    features = []
    for px, py, pz in points.tolist():
        total = torch.zeros(planes.shape[1], dtype=planes.dtype)
        for k, (u, v) in enumerate(((px, py), (px, pz), (py, pz))):
            x = (u + 1) / 2 * (R - 1)
            y = (v + 1) / 2 * (R - 1)
            i = min(int(x), R - 2)
            j = min(int(y), R - 2)
            for di in (0, 1):
                for dj in (0, 1):
                    weight = abs(1 - di - (x - i)) * abs(1 - dj - (y - j))
                    total = total + planes[k, :, j + dj, i + di] * weight
        features.append(total / 3)
    return torch.stack(features)


def gradient_of(features, planes, weight):
    """Gradient of a weighted sum of features by the planes."""
    gradient, = torch.autograd.grad((features * weight).sum(), planes)
    return gradient


@pytest.mark.parametrize(('C', 'N'), [
    (5, 200),  # by grid_sample
    (12, 200),  # by rows, whose gradient is scatter-added
    (12, 9000),  # by rows, whose gradient is sorted
])
def test_lookup_equals_grid_sample_and_its_gradient(C, N):
    planes = torch.randn(3, C, 9, 9, dtype=torch.float64, requires_grad=True)
    points = torch.rand(N, 3, dtype=torch.float64) * 2 - 1
    points[:2] = torch.tensor([[1.0, 1, 1], [-1, -1, -1]])  # the corners themselves
    ours = rh.sample_planes(planes, points)
    expected = grid_sample_planes(planes, points)
    assert torch.allclose(ours, expected, atol=1e-12)
    assert torch.allclose(ours[:50], naive_lookup(planes, points[:50]), atol=1e-12)

    weight = torch.randn_like(ours)
    a = gradient_of(ours, planes, weight)
    b = gradient_of(expected, planes, weight)
    assert torch.allclose(a, b, atol=1e-12)
    few = torch.randn(3, C, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: rh.sample_planes(p, points[:6]), few)


@pytest.mark.parametrize('C', [4, 16])
@pytest.mark.parametrize('N', [300, 9000])  # the gradient by rows is scatter-added, or sorted
def test_the_plain_lookup_and_the_one_by_rows_are_the_same(C, N):
    """In the box, on its border, beside it and far from it: values, and gradients of planes."""
    planes = torch.randn(3, C, 9, 9, dtype=torch.float64, requires_grad=True)
    points = torch.rand(N, 3, dtype=torch.float64) * 3 - 1.5
    points[:100] /= 1.5  # all inside
    points[100:130, 0] = 1
    points[110:140, 1] = -1
    points[120:150, 2] = 1
    points[150:160, 0] = 1 + 1e-9
    points[160:170, 2] = -1000

    plainly, by_rows = (look_up(planes, points) for look_up in LOOK_UPS)
    assert plainly.shape == (N, C)
    assert torch.allclose(plainly, by_rows, atol=1e-12)
    weight = torch.randn_like(plainly)
    a = gradient_of(plainly, planes, weight)
    b = gradient_of(by_rows, planes, weight)
    assert torch.allclose(a, b, atol=1e-12)

    # a point that no plane sees has no features
    outside = (points.abs() > 1).sum(1) > 1
    assert outside.any()
    assert not plainly[outside].any()
    assert not by_rows[outside].any()


@pytest.mark.parametrize('C', [4, 16])
def test_sample_planes_is_the_plain_lookup(C):
    """Whichever way is taken for a number of channels."""
    planes = torch.randn(3, C, 9, 9, dtype=torch.float64)
    points = torch.rand(300, 3, dtype=torch.float64) * 3 - 1.5
    expected = rh.sample_planes_plainly(planes, points)
    assert torch.allclose(rh.sample_planes(planes, points), expected, atol=1e-12)


@pytest.mark.parametrize('look_up', LOOK_UPS)
def test_a_divisor_of_1_gives_the_sum(look_up, monkeypatch):
    """Planes of ones, twos and threes: 6 in sum, 2 in the mean."""
    planes = torch.tensor([1.0, 2, 3])[:, None, None, None].expand(3, 12, 5, 5)
    points = torch.rand(20, 3) * 2 - 1
    assert torch.allclose(look_up(planes, points), torch.tensor(2.0))
    monkeypatch.setattr(rh, 'PLANE_DIVISOR', 1)
    assert torch.allclose(look_up(planes, points), torch.tensor(6.0))


@pytest.mark.parametrize('C', [1, 12])
@pytest.mark.parametrize('z', [1.01, 1.5])
def test_a_plane_gives_nothing_to_points_outside_its_square(C, z):
    """Only xy sees these points."""
    features = rh.sample_planes(torch.ones(3, C, 4, 4), torch.tensor([[0, 0, z]]))
    assert torch.allclose(features, torch.tensor(1 / 3))


# Planes -------------------------------------------------------------------------------------------
def test_roll_out_and_back():
    planes = torch.randn(2, 3, 4, 8, 8)
    rolled = rh.roll_out(planes)
    assert rolled.shape == (2, 4, 8, 24)
    assert torch.equal(rolled[..., 8:16], planes[:, 1])
    assert torch.equal(rh.roll_in(rolled), planes)


def test_resizing_keeps_places():
    """A linear function of the coordinate is the same at any size, but for the ends when averaging
    down."""
    plane = torch.linspace(-1, 1, 32).expand(3, 1, 32, 32)
    up = rh.resize_planes(plane, 64)
    down = rh.resize_planes(plane, 8)
    assert torch.allclose(up[0, 0, 0], torch.linspace(-1, 1, 64), atol=1e-5)
    assert torch.allclose(down[0, 0, 3, 1:-1], torch.linspace(-1, 1, 8)[1:-1], atol=1e-2)
    assert torch.allclose(rh.resize_planes(torch.ones(1, 7, 7), 3), torch.ones(1, 3, 3))


def test_total_variation():
    """4 differences of 1; each mean has 3 * 1 * 6 = 18 terms; three planes: 3 * (2/18 + 2/18)."""
    planes = torch.zeros(3, 1, 3, 3)
    planes[0, 0, 1, 1] = 1.0
    assert rh.total_variation(planes).item() == pytest.approx(3 * 4 / 18)
    planes = torch.randn(3, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rh.total_variation, planes)
