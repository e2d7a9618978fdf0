"""Marching against a dense lattice, compositing against closed forms, the occupancy grid against its rule."""
import math

import pytest
import torch

import rodinhd as rh


def random_rays(n):
    rays_o = torch.nn.functional.normalize(torch.randn(n, 3), dim=-1) * 4
    return rays_o, torch.nn.functional.normalize(torch.rand(n, 3) * 1.6 - 0.8 - rays_o, dim=-1)


def ball(sigma, radius=0.5, colour=0.3):
    def field(points, dirs=None):
        inside = points.norm(dim=-1) < radius
        return inside * sigma, None if dirs is None else torch.full_like(points, colour)
    return field


def test_marching_visits_exactly_the_occupied_points_of_the_dense_lattice():
    steps, (rays_o, rays_d), offset = 64, random_rays(300), torch.rand(300)
    grid = rh.OccupancyGrid(16, steps)
    grid.values = (torch.rand(16, 16, 16) < 0.1) * 100.0
    grid.refresh()
    ray, t, points = rh.march(rays_o, rays_d, steps, grid, offset)

    delta = 2 * math.sqrt(3) / steps                                    # naively: every k, one point at a time
    near, far = rh.intersect_box(rays_o, rays_d)
    expected = []
    for i in range(300):
        for k in range(steps + 1):
            s = near[i] + delta * offset[i] + k * delta
            if s < far[i]:
                p = (rays_o[i] + s * rays_d[i]).clamp(-1, 1)
                x, y, z = (((p + 1) * 8).long().clamp(0, 15)).tolist()
                if grid.occupied[x, y, z]:
                    expected.append((i, k))
    k = ((t - near[ray] - delta * offset[ray]) / delta).round().long()
    assert expected == list(zip(ray.tolist(), k.tolist()))
    assert torch.allclose(points, (rays_o[ray] + t[:, None] * rays_d[ray]).clamp(-1, 1))


def test_the_step_is_the_papers():
    assert 2 * math.sqrt(3) / rh.Config().steps == pytest.approx(0.00338291, abs=1e-8)


def test_a_ball_is_as_opaque_as_beer_lambert_says():
    """Opacity through a ball of radius 1/2 along a chord at distance b is 1 - exp(-sigma 2 sqrt(1/4 - b^2)), up to one step."""
    steps, sigma = 4096, 1.5
    b = torch.tensor([0.0, 0.2, 0.4])
    rays_o = torch.stack([b, torch.full((3,), -3.0), torch.zeros(3)], dim=1)
    rgb, opacity, _ = rh.render(ball(sigma), rays_o, torch.tensor([0.0, 1, 0]).expand(3, 3), steps)
    expected = 1 - torch.exp(-sigma * 2 * (0.25 - b ** 2).sqrt())
    assert torch.allclose(opacity, expected, atol=sigma * 2 * math.sqrt(3) / steps)
    assert torch.allclose(rgb[:, 0], 0.3 * opacity + 1 - opacity, atol=1e-5)            # composited on white


def test_a_slab_of_n_samples_is_exact():
    """n equal samples of optical depth a absorb 1 - exp(-n a); the depth is the mean of their places weighted by T alpha."""
    n, a = 7, 0.3
    t = torch.arange(n).float()
    sigma, rgb = torch.full((n,), a), torch.full((n, 3), 0.5)
    pixel, opacity, depth = rh.composite(sigma, rgb, t, torch.zeros(n, dtype=torch.long), 1, 1.0, 1.0)
    weights = torch.exp(-a * t) * (1 - math.exp(-a))
    assert opacity.item() == pytest.approx(1 - math.exp(-n * a), abs=1e-6)
    assert depth.item() == pytest.approx((weights * t).sum().item(), abs=1e-5)
    assert pixel[0, 0].item() == pytest.approx(1 - 0.5 * opacity.item(), abs=1e-6)


def test_packed_rays_do_not_see_each_other():
    counts = [3, 0, 5, 1]
    ray = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    sigma, rgb, t = torch.rand(9) * 3, torch.rand(9, 3), torch.rand(9)
    together, opacity, _ = rh.composite(sigma, rgb, t, ray, 4, 0.5)
    for i in range(4):
        m = ray == i
        alone = rh.composite(sigma[m], rgb[m], t[m], torch.zeros(counts[i], dtype=torch.long), 1, 0.5)[0]
        assert torch.allclose(together[i], alone[0], atol=1e-6)
    assert opacity[1] == 0 and torch.equal(together[1], torch.ones(3))


def test_marching_front_to_back_keeps_exactly_what_light_reaches():
    """With a field, march finds what it finds without one, less the samples that are behind T < 1e-4 or weigh less than 3e-5."""
    steps, (rays_o, rays_d), offset = 128, random_rays(300), torch.rand(300)
    field = lambda p, d=None: (200 * torch.sin(9 * p).prod(-1).abs() + 2 * (p[:, 0] > 0), None)
    grid = rh.OccupancyGrid(16, steps)
    grid.values = (torch.rand(16, 16, 16) < 0.4) * 100.0
    grid.refresh()
    ray, t, points = rh.march(rays_o, rays_d, steps, grid, offset)
    tau = field(points)[0] * 2 * math.sqrt(3) / steps
    T = rh.transmittance(tau, ray, 300)
    def samples(keep):
        return {(r, round(s, 4)) for r, s in zip(ray[keep].tolist(), t[keep].tolist(), strict=True)}
    lit = rh.march(rays_o, rays_d, steps, grid, offset, field)
    got = {(r, round(s, 4)) for r, s in zip(lit[0].tolist(), lit[1].tolist(), strict=True)}
    must, may = (samples((1e-4 * r < T) & (T * tau >= 3e-5 * r)) for r in (1.001, 0.999))         # but for rounding
    assert must <= got <= may and 0.2 < len(got) / len(ray) < 0.9 and len(ray) > 8 * 300
    assert (lit[0].diff() >= 0).all() and (lit[1].diff()[lit[0].diff() == 0] > 0).all()            # in order


def test_termination_drops_only_what_cannot_be_seen():
    steps, (rays_o, rays_d) = 256, random_rays(200)
    colour = lambda p, d: (60.0 * (p.norm(dim=-1) < 0.6), None if d is None else (p + 1) / 2)
    seen = []
    def field(points, dirs=None):
        seen.append((len(points), dirs is not None))
        return colour(points, dirs)
    rgb = rh.render(field, rays_o, rays_d, steps)[0]
    ray, t, points = rh.march(rays_o, rays_d, steps)
    full = rh.composite(*colour(points, points), t, ray, 200, 2 * math.sqrt(3) / steps)[0]
    assert (rgb - full).abs().max() < 2e-4
    assert [with_colour for _, with_colour in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1][0] <= sum(n for n, _ in seen[:-1]) < 0.8 * len(t)   # far behind the surface nothing is asked for


def test_render_gradient_reaches_every_visible_sample():
    sigma = torch.tensor(2.0, requires_grad=True)
    field = lambda p, d=None: ((p.norm(dim=-1) < 0.5) * sigma, None if d is None else torch.zeros_like(p))
    _, opacity, _ = rh.render(field, torch.tensor([[0.0, -3, 0]]), torch.tensor([[0.0, 1, 0]]), 512)
    opacity.sum().backward()
    assert sigma.grad.item() == pytest.approx(math.exp(-2.0), abs=0.02)         # d/ds (1 - exp(-s L)), chord L = 1


def test_occupancy_update_rule():
    """value <- max(0.95 value, sigma); cells at -1 stay; occupied where the value exceeds min(mean, threshold)."""
    grid = rh.OccupancyGrid(8, 1024, hull=torch.arange(512).view(8, 8, 8) >= 64)
    assert grid.density_threshold == 10 and grid.occupied.sum() == 448
    field = lambda p, d=None: (torch.where(p[:, 0] > 0, 50.0, 0.0), None)
    grid.update(field)
    assert (grid.values[0] == -1).all()
    assert torch.allclose(grid.values[1:4], torch.tensor(9.5)) and (grid.values[4:] == 50).all()
    assert torch.equal(grid.occupied, grid.values > 10)
    for _ in range(3):
        grid.update(field, cells=grid.some_cells(None))
    assert (grid.values[4:] == 50).all() and grid.occupied[4:].all() and not grid.occupied[:4].any()


def test_partial_update_with_nothing_occupied():
    grid = rh.OccupancyGrid(8, 64)
    grid.update(lambda p, d=None: (torch.zeros(len(p)), None), cells=grid.some_cells(None))
    assert not grid.occupied.any()


def test_grid_of_a_generated_field(tiny):
    grid = rh.grid_for(ball(80.0), tiny)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    r = torch.stack(torch.meshgrid(axis, axis, axis, indexing='ij'), -1).norm(dim=-1)
    assert grid.occupied[r < 0.45].all() and not grid.occupied[r > 0.56].any()


def test_rays_that_miss_are_white():
    rgb, opacity, _ = rh.render(ball(10.0), torch.tensor([[5.0, -3, 0]]), torch.tensor([[0.0, 1, 0]]), 64)
    assert torch.equal(rgb, torch.ones(1, 3)) and opacity[0] == 0


def test_the_grid_of_a_field_hides_nothing(tiny):
    """A soft shell with a thin haze around it: with the grid the picture is that of the dense lattice to 2e-3, and most cells are empty."""
    field = lambda p, d=None: (30 * torch.exp(-(9 * (p.norm(dim=-1) - 0.5)) ** 2), None if d is None else (p + 1) / 2)
    rays_o, rays_d = random_rays(2000)
    with torch.no_grad():
        ray, t, points = rh.march(rays_o, rays_d, tiny.steps)
        dense = rh.composite(*field(points, points), t, ray, 2000, 2 * math.sqrt(3) / tiny.steps)[0]
        exact, coarse = (rh.render(field, rays_o, rays_d, tiny.steps, rh.grid_for(field, tiny, threshold=v))[0]
                         for v in (rh.EMPTY, 10 * tiny.steps / 1024))
    assert (exact - dense).abs().max() < 2e-3 < (coarse - dense).abs().max() < 0.1
    assert rh.grid_for(field, tiny).occupied.float().mean() < 0.4
