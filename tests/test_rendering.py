"""Marching against a dense lattice, compositing against closed forms, the occupancy grid against
its rule."""
import math

import pytest
import torch
import torch.nn.functional as F

import rodinhd as rh
from references import dense_render, ngp_render


def random_rays(n):
    """Rays (n, 3) from a distance of 4 towards points in the middle of the box."""
    rays_o = F.normalize(torch.randn(n, 3), dim=-1) * 4
    targets = torch.rand(n, 3) * 1.6 - 0.8
    return rays_o, F.normalize(targets - rays_o, dim=-1)


def random_grid(G, steps, share):
    """A grid of which a share of the cells is occupied."""
    grid = rh.OccupancyGrid(G, steps)
    grid.values = (torch.rand(G, G, G) < share) * 100.0
    grid.refresh()
    return grid


def field_of(density, colour):
    """A field of density(points) and colour(points)."""
    def field(points, dirs=None):
        return density(points), None if dirs is None else colour(points)
    return field


def ball(sigma, radius=0.5, colour=0.3):
    """A ball of one density and one colour, around the origin."""
    return field_of(
        lambda points: (points.norm(dim=-1) < radius) * sigma,
        lambda points: torch.full_like(points, colour),
    )


def by_place(points):
    """Colours that tell points apart."""
    return (points + 1) / 2


def soft_shell(points):
    """The density of a shell around the origin that ends in a thin haze on both sides."""
    return 30 * torch.exp(-(9 * (points.norm(dim=-1) - 0.5)) ** 2)


def delta_of(steps):
    """Distance of neighbours on the lattice."""
    return 2 * math.sqrt(3) / steps


# Marching -----------------------------------------------------------------------------------------
def test_marching_visits_exactly_the_occupied_points_of_the_dense_lattice():
    steps = 64
    rays_o, rays_d = random_rays(300)
    offset = torch.rand(300)
    grid = random_grid(16, steps, 0.1)
    ray, t, points = rh.march(rays_o, rays_d, steps, grid, offset)

    # Naively: every k, one point at a time
    delta = delta_of(steps)
    near, far = rh.intersect_box(rays_o, rays_d)
    expected = []
    for i in range(300):
        for k in range(steps + 1):
            distance = near[i] + delta * offset[i] + k * delta
            if distance < far[i]:
                point = (rays_o[i] + distance * rays_d[i]).clamp(-1, 1)
                x, y, z = ((point + 1) * 8).long().clamp(0, 15).tolist()
                if grid.occupied[x, y, z]:
                    expected.append((i, k))

    k = ((t - near[ray] - delta * offset[ray]) / delta).round().long()
    assert expected == list(zip(ray.tolist(), k.tolist()))
    assert torch.allclose(points, (rays_o[ray] + t[:, None] * rays_d[ray]).clamp(-1, 1))


def test_the_step_is_the_papers():
    assert delta_of(rh.Config().steps) == pytest.approx(0.00338291, abs=1e-8)


def test_marching_front_to_back_keeps_exactly_what_light_reaches():
    """With a field, march finds what it finds without one, less the samples that are behind
    T < 1e-4 or weigh less than 3e-5."""
    def density(points):
        return 200 * torch.sin(9 * points).prod(-1).abs() + 2 * (points[:, 0] > 0)

    steps = 128
    rays_o, rays_d = random_rays(300)
    offset = torch.rand(300)
    grid = random_grid(16, steps, 0.4)
    ray, t, points = rh.march(rays_o, rays_d, steps, grid, offset)
    tau = density(points) * delta_of(steps)
    T = rh.transmittance(tau, ray, 300)

    def names(ray, t):
        return {(r, round(s, 4)) for r, s in zip(ray.tolist(), t.tolist(), strict=True)}

    def lit_by(factor):  # with both limits times a factor
        arrives = 1e-4 * factor < T
        weighs = T * tau >= 3e-5 * factor
        keep = arrives & weighs
        return names(ray[keep], t[keep])

    field = field_of(density, by_place)
    lit_ray, lit_t, _ = rh.march(rays_o, rays_d, steps, grid, offset, field)
    got = names(lit_ray, lit_t)
    assert lit_by(1.001) <= got <= lit_by(0.999)  # but for rounding
    assert 0.2 < len(got) / len(ray) < 0.9
    assert len(ray) > 8 * 300

    # In order
    same_ray = lit_ray.diff() == 0
    assert (lit_ray.diff() >= 0).all()
    assert (lit_t.diff()[same_ray] > 0).all()


def test_termination_drops_only_what_cannot_be_seen():
    steps = 256
    rays_o, rays_d = random_rays(200)
    solid = field_of(lambda points: 60.0 * (points.norm(dim=-1) < 0.6), by_place)
    calls = []

    def watched(points, dirs=None):
        calls.append((len(points), dirs is not None))
        return solid(points, dirs)

    rgb = rh.render(watched, rays_o, rays_d, steps).rgb
    ray, t, points = rh.march(rays_o, rays_d, steps)
    sigma, colours = solid(points, points)
    full = rh.composite(sigma, colours, t, ray, 200, delta_of(steps)).rgb
    assert (rgb - full).abs().max() < 2e-4

    # Colour is asked for once, and far behind the surface nothing is
    assert [with_colour for _, with_colour in calls] == [False] * (len(calls) - 1) + [True]
    looked_at = sum(n for n, _ in calls[:-1])
    assert calls[-1][0] <= looked_at < 0.8 * len(t)


# Compositing --------------------------------------------------------------------------------------
def test_a_ball_is_as_opaque_as_beer_lambert_says():
    """Opacity through a ball of radius 1/2 along a chord at distance b is
    1 - exp(-sigma 2 sqrt(1/4 - b^2)), up to one step."""
    steps = 4096
    sigma = 1.5
    b = torch.tensor([0.0, 0.2, 0.4])
    rays_o = torch.stack([b, torch.full((3,), -3.0), torch.zeros(3)], dim=1)
    rays_d = torch.tensor([0.0, 1, 0]).expand(3, 3)
    rendered = rh.render(ball(sigma), rays_o, rays_d, steps)
    opacity = rendered.opacity
    expected = 1 - torch.exp(-sigma * 2 * (0.25 - b ** 2).sqrt())
    assert torch.allclose(opacity, expected, atol=sigma * delta_of(steps))
    on_white = 0.3 * opacity + 1 - opacity
    assert torch.allclose(rendered.rgb[:, 0], on_white, atol=1e-5)


def test_a_slab_of_n_samples_is_exact():
    """n equal samples of optical depth a absorb 1 - exp(-n a); the depth is the mean of their
    places weighted by T alpha."""
    n = 7
    a = 0.3
    t = torch.arange(n).float()
    sigma = torch.full((n,), a)
    ray = torch.zeros(n, dtype=torch.long)
    slab = rh.composite(sigma, torch.full((n, 3), 0.5), t, ray, 1, 1.0, 1.0)
    weights = torch.exp(-a * t) * (1 - math.exp(-a))
    assert slab.opacity.item() == pytest.approx(1 - math.exp(-n * a), abs=1e-6)
    assert slab.depth.item() == pytest.approx((weights * t).sum().item(), abs=1e-5)
    assert slab.rgb[0, 0].item() == pytest.approx(1 - 0.5 * slab.opacity.item(), abs=1e-6)
    assert torch.allclose(slab.weights, weights, atol=1e-6)


def test_packed_rays_do_not_see_each_other():
    counts = [3, 0, 5, 1]
    ray = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    sigma = torch.rand(9) * 3
    rgb = torch.rand(9, 3)
    t = torch.rand(9)
    together = rh.composite(sigma, rgb, t, ray, 4, 0.5)
    for i in range(4):
        own = ray == i
        nought = torch.zeros(counts[i], dtype=torch.long)
        alone = rh.composite(sigma[own], rgb[own], t[own], nought, 1, 0.5)
        assert torch.allclose(together.rgb[i], alone.rgb[0], atol=1e-6)
    assert together.opacity[1] == 0
    assert torch.equal(together.rgb[1], torch.ones(3))


@pytest.mark.parametrize('cull', [True, False])
def test_what_is_rendered_comes_with_the_samples_that_made_it(cull):
    """Weights sum to the opacity of their ray, weights times t to its depth, and t and ray_index
    are those of march."""
    field = field_of(soft_shell, by_place)
    rays_o, rays_d = random_rays(200)
    offset = torch.rand(200)
    out = rh.render(field, rays_o, rays_d, 128, offset=offset, cull=cull)
    marched = rh.march(rays_o, rays_d, 128, offset=offset, field=field if cull else None)
    assert torch.equal(out.ray_index, marched.ray_index)
    assert torch.equal(out.t, marched.t)
    assert out.weights.shape == out.t.shape
    assert (out.weights >= 0).all()

    opacity = torch.zeros(200).index_add(0, out.ray_index, out.weights)
    depth = torch.zeros(200).index_add(0, out.ray_index, out.weights * out.t)
    assert torch.allclose(out.opacity, opacity, atol=1e-6)
    assert torch.allclose(out.depth, depth, atol=1e-5)

    # The mean distance is that of the shell, half a unit before the origin or behind it
    seen = out.opacity > 0.5
    mean = out.depth[seen] / out.opacity[seen]
    assert seen.sum() > 100
    assert 3 < mean.min() < mean.max() < 5


def test_without_culling_all_samples_stay_and_the_picture_is_the_same():
    field = field_of(soft_shell, by_place)
    rays_o, rays_d = random_rays(500)
    grid = random_grid(16, 128, 0.7)
    samples = rh.march(rays_o, rays_d, 128, grid)
    whole = rh.render(field, rays_o, rays_d, 128, grid, cull=False)
    culled = rh.render(field, rays_o, rays_d, 128, grid)
    assert torch.equal(whole.ray_index, samples.ray_index)
    assert torch.equal(whole.t, samples.t)
    assert 0 < len(culled.t) < 0.8 * len(whole.t)
    assert (whole.rgb - culled.rgb).abs().max() < 2e-3
    assert (whole.opacity - culled.opacity).abs().max() < 2e-3


def test_render_gradient_reaches_every_visible_sample():
    """d/ds (1 - exp(-s L)) with a chord of L = 1."""
    sigma = torch.tensor(2.0, requires_grad=True)
    rays_o = torch.tensor([[0.0, -3, 0]])
    rays_d = torch.tensor([[0.0, 1, 0]])
    rh.render(ball(sigma), rays_o, rays_d, 512).opacity.sum().backward()
    assert sigma.grad.item() == pytest.approx(math.exp(-2.0), abs=0.02)


def test_rays_that_miss_are_white():
    rays_o = torch.tensor([[5.0, -3, 0]])
    rays_d = torch.tensor([[0.0, 1, 0]])
    missed = rh.render(ball(10.0), rays_o, rays_d, 64)
    assert torch.equal(missed.rgb, torch.ones(1, 3))
    assert missed.opacity[0] == 0


def test_a_view_is_made_of_its_rays():
    """In row-major order, in as many chunks as there are."""
    field = field_of(soft_shell, by_place)
    pose = rh.orbit_pose(30, 20)
    intrinsics = rh.intrinsics_of(34.0, 20)
    picture = rh.render_view(field, pose, intrinsics, 18, 20, 2 ** 13)  # chunks of 128 rays
    rays = rh.view_rays(pose, intrinsics, 18, 20)
    rendered = rh.render(field, *rays, 2 ** 13)
    assert torch.allclose(picture.rgb, rendered.rgb.view(18, 20, 3), atol=1e-5)
    assert torch.allclose(picture.opacity, rendered.opacity.view(18, 20), atol=1e-5)


# The occupancy grid -------------------------------------------------------------------------------
def test_occupancy_update_rule():
    """value <- max(0.95 value, sigma); cells at -1 stay; occupied where the value exceeds
    min(mean, threshold)."""
    grid = rh.OccupancyGrid(8, 1024, hull=torch.arange(512).view(8, 8, 8) >= 64)
    assert grid.density_threshold == 10
    assert grid.occupied.sum() == 448

    half = field_of(lambda points: torch.where(points[:, 0] > 0, 50.0, 0.0), by_place)
    grid.update(half)
    assert (grid.values[0] == -1).all()
    assert torch.allclose(grid.values[1:4], torch.tensor(9.5))
    assert (grid.values[4:] == 50).all()
    assert torch.equal(grid.occupied, grid.values > 10)

    for _ in range(3):
        grid.update(half, cells=grid.some_cells(None))
    assert (grid.values[4:] == 50).all()
    assert grid.occupied[4:].all()
    assert not grid.occupied[:4].any()


def test_partial_update_with_nothing_occupied():
    grid = rh.OccupancyGrid(8, 64)
    nothing = field_of(lambda points: torch.zeros(len(points)), by_place)
    grid.update(nothing, cells=grid.some_cells(None))
    assert not grid.occupied.any()


def test_grid_of_a_generated_field(tiny):
    grid = rh.grid_for(ball(80.0), tiny)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    radius = torch.stack(torch.meshgrid(axis, axis, axis, indexing='ij'), dim=-1).norm(dim=-1)
    assert grid.occupied[radius < 0.45].all()
    assert not grid.occupied[radius > 0.56].any()


@torch.no_grad()
def test_the_grid_of_a_field_hides_nothing(tiny):
    """A soft shell with a thin haze around it: with the grid the picture is that of the dense
    lattice to 2e-3, and most cells are empty."""
    field = field_of(soft_shell, by_place)
    rays_o, rays_d = random_rays(2000)
    ray, t, points = rh.march(rays_o, rays_d, tiny.steps)
    sigma, colours = field(points, points)
    dense = rh.composite(sigma, colours, t, ray, 2000, delta_of(tiny.steps)).rgb

    fine_grid = rh.grid_for(field, tiny)
    exact = rh.render(field, rays_o, rays_d, tiny.steps, fine_grid).rgb
    assert (exact - dense).abs().max() < 2e-3
    assert fine_grid.occupied.float().mean() < 0.4

    coarse_grid = rh.grid_for(field, tiny, threshold=10 * tiny.steps / 1024)
    coarse = rh.render(field, rays_o, rays_d, tiny.steps, coarse_grid).rgb
    assert 2e-3 < (coarse - dense).abs().max() < 0.1


@torch.no_grad()
@pytest.mark.parametrize('settings', [[], ['grid=8']])
def test_the_grid_of_planes_is_that_of_the_same_field_asked_point_by_point(settings):
    """Planes know their density on a lattice; cells of 4 texels are looked at in 8 parts."""
    config = rh.make_config('tiny', settings)
    decoder = rh.Decoder(config)
    planes = rh.PlaneField(torch.randn(3, config.channels, 32, 32), decoder)
    axis = torch.tensor([-1.0, -0.3, 0.0, 0.77, 1.0])
    points = torch.cartesian_prod(axis, axis, axis)
    density = planes(points)[0].view(5, 5, 5)
    assert torch.allclose(rh.density_on(planes, axis), density, rtol=1e-4)

    plain = field_of(lambda points: planes(points)[0], by_place)
    assert torch.allclose(rh.density_on(plain, axis), density)
    assert torch.allclose(
        rh.grid_for(planes, config).values, rh.grid_for(plain, config).values, rtol=1e-4
    )


def test_a_cell_holds_the_largest_density_of_its_corners_and_centre(tiny):
    """Density x + 10 y + 100 z, and 0 where that is negative: the upper corner's."""
    slope = torch.tensor([1.0, 10.0, 100.0])
    grid = rh.grid_for(field_of(lambda points: (points @ slope).clamp(min=0), by_place), tiny)
    upper = torch.linspace(-1, 1, tiny.grid + 1)[1:]
    expected = upper[:, None, None] + 10 * upper[:, None] + 100 * upper
    assert torch.allclose(grid.values, expected.clamp(min=0), atol=1e-4)

    spike = field_of(lambda points: 5 * ((points - 1 / 32).abs() < 1e-3).all(1).float(), by_place)
    assert rh.grid_for(spike, tiny).values[16, 16, 16] == 5  # at its centre alone
    assert rh.grid_for(spike, tiny).values.sum() == 5


def test_the_grid_in_one_pass_is_about_that_of_many_updates(tiny):
    field = field_of(soft_shell, by_place)
    at_once = rh.grid_for(field, tiny).occupied
    by_updates = rh.grid_by_updates(field, tiny).occupied
    assert at_once[by_updates].all()
    assert at_once.sum() < 1.1 * by_updates.sum()


@pytest.mark.parametrize('margin', [1, 2, 9])
def test_cells_are_widened_as_by_a_maximum(margin):
    cells = torch.rand(8, 8, 8) < 0.02
    plain = F.max_pool3d(cells[None].float(), 2 * margin + 1, 1, margin)[0] > 0
    assert torch.equal(rh.widened(cells, margin), plain)


def test_softplus_is_that_of_pytorch():
    x = torch.cat([torch.linspace(-40, 40, 1001), torch.tensor([-1e4, 100.0, 1e4])])
    assert torch.allclose(rh.softplus(x), F.softplus(x), rtol=1e-6, atol=1e-6)
    x.requires_grad_()
    gradient, = torch.autograd.grad(rh.softplus(x).sum(), x)
    assert torch.allclose(gradient, torch.sigmoid(x), atol=1e-6)


@torch.no_grad()
def test_the_reference_of_the_benchmark_is_the_same_picture(tiny):
    """What bench.py compares with: all but what weighs less than 1e-4 has its colour."""
    decoder = rh.Decoder(tiny)
    planes = torch.randn(3, tiny.channels, 32, 32)
    rays = random_rays(100)
    dense = dense_render(planes, decoder, *rays, 40)
    assert (ngp_render(planes, decoder, *rays, 40) - dense).abs().max() < 2e-3
