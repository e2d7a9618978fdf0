"""Finished avatars, drawn fast: the same numbers as the field's own, and as rh.render_view's."""
import pytest
import torch

import frozen
import rodinhd as rh


def planes_of(config):
    """Random planes of few bumps."""
    small = torch.randn(3, config.channels, 6, 6)
    return rh.resize_planes(small, config.resolution).clamp(-1, 1)


@torch.no_grad()
def decoder_of(config):
    """A random decoder of strong colours, whose density is below 1 in half of space and goes from
    1e-4 to hundreds."""
    decoder = rh.Decoder(config).requires_grad_(False)
    decoder.config = config
    decoder.color_net[0].weight *= 4
    features = rh.sample_planes(planes_of(config), torch.rand(1000, 3) * 2 - 1)
    log = decoder(features)[0].log()
    last = decoder.sigma_net[2]
    scale = 4 / log.std()
    last.weight[0] *= scale
    last.bias[0] = (last.bias[0] - log.median()) * scale
    return decoder


@pytest.fixture(params=[[], ['decoder_layers=4', 'channels=16']], ids=['five', 'four'])
def config(request):
    return rh.make_config('tiny', request.param)


@torch.no_grad()
@pytest.mark.parametrize('divisor', [3, 1])
def test_the_decoder_in_parts_is_the_decoder(config, divisor, monkeypatch):
    monkeypatch.setattr(rh, 'PLANE_DIVISOR', divisor)
    planes = planes_of(config)
    decoder = decoder_of(config)
    points = torch.rand(500, 3) * 2 - 1
    points[:3] = torch.tensor([[1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]])
    dirs = torch.nn.functional.normalize(torch.randn(500, 3), dim=-1)
    field = frozen.freeze(planes, decoder)

    sigma, hidden = field.density(points.T.contiguous())
    rgb = field.colour(points.T.contiguous(), hidden, field.of_rays(dirs))
    ours_sigma, ours_rgb = rh.PlaneField(planes, decoder)(points, dirs)
    assert torch.allclose(sigma, ours_sigma, rtol=1e-3, atol=1e-4)
    assert torch.allclose(rgb, ours_rgb, atol=1e-4)
    assert torch.allclose(field(points, dirs)[1], ours_rgb, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize('distance', [4.0, 0.4], ids=['from outside', 'from inside'])
@pytest.mark.parametrize('threshold', [rh.EMPTY, 5.0])
def test_the_picture_is_that_of_the_plain_form(config, distance, threshold):
    field = frozen.freeze(planes_of(config), decoder_of(config), threshold)
    assert 0.1 < field.grid.occupied.float().mean() < 1
    pose = rh.orbit_pose(50, 20, distance)
    intrinsics = rh.intrinsics_of(34, 40)
    plain = rh.render_view(field, pose, intrinsics, 40, 30, config.steps, field.grid)
    ours = frozen.render_view(field, pose, intrinsics, 40, 30)
    assert plain.rgb.std() > 0.02
    assert (ours.rgb - plain.rgb).abs().max() < 2e-3
    assert (ours.opacity - plain.opacity).abs().max() < 2e-3


@torch.no_grad()
def test_rays_in_parts_make_the_same_picture(tiny, monkeypatch):
    field = frozen.freeze(planes_of(tiny), decoder_of(tiny))
    camera = rh.orbit_pose(0, 0), rh.intrinsics_of(34, 24)
    whole = frozen.render_view(field, *camera, 24, 24)
    monkeypatch.setattr(frozen, 'RAYS', 100)
    monkeypatch.setattr(frozen, 'PIECE', 7)
    assert torch.allclose(frozen.render_view(field, *camera, 24, 24).rgb, whole.rgb, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('cell', [(0, 0, 0), (31, 31, 31), (3, 30, 14)])
def test_a_single_cell_is_drawn_at_its_place(tiny, cell):
    """Rays are narrowed to it, and none is lost that passes through it."""
    grid = rh.OccupancyGrid(32, tiny.steps)
    grid.values[cell] = 100.0
    grid.refresh()
    field = frozen.Frozen(planes_of(tiny), decoder_of(tiny), grid)
    camera = rh.orbit_pose(30, 40), rh.intrinsics_of(50, 64)
    plain = rh.render_view(field, *camera, 64, 64, tiny.steps, grid)
    ours = frozen.render_view(field, *camera, 64, 64)
    assert 0 < (plain.opacity > 0).sum() < 64
    assert (ours.opacity - plain.opacity).abs().max() < 1e-4


@torch.no_grad()
def test_nothing_is_drawn_white(tiny):
    field = frozen.Frozen(planes_of(tiny), decoder_of(tiny), rh.OccupancyGrid(32, tiny.steps))
    picture = frozen.render_view(field, rh.orbit_pose(0, 0), rh.intrinsics_of(34, 8), 8, 8)
    assert (picture.rgb == 1).all()
    assert (picture.opacity == 0).all()


@torch.no_grad()
def test_a_density_net_of_large_values_stays_finite(tiny):
    """Its softplus may see more than exp can take."""
    decoder = decoder_of(tiny)
    decoder.sigma_net[0].weight *= 1e4
    decoder.sigma_net[2].weight[0] /= 1e5
    planes = planes_of(tiny)
    points = torch.rand(200, 3) * 2 - 1
    field = frozen.freeze(planes, decoder)
    sigma, _ = field.density(points.T.contiguous())
    assert torch.allclose(sigma, rh.PlaneField(planes, decoder)(points)[0], rtol=1e-2)
