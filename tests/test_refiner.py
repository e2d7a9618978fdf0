"""Rodin's refiner: what it begins as, and that its pairs show the same by two sizes of pixels."""
import pytest
import torch
import torch.nn.functional as F

import refiner
import rodinhd as rh
import running

BALL = 0.6  # its radius


def ball(points, dirs=None):
    """A solid ball around (0.2, 0, 0.1), coloured by place: an rh field."""
    inside = (points - torch.tensor([0.2, 0.0, 0.1])).norm(dim=1) < BALL
    colour = None if dirs is None else points * 0.4 + 0.5
    return 50.0 * inside, colour


def view_of_ball(height, width, unknown=False):
    """The ball as a training view shows it, an rh.Views of one view."""
    pose, intrinsics = rh.orbit_pose(30, 10), rh.intrinsics_of(34.0, 64)
    shown = rh.render_view(ball, pose, intrinsics, height, width, 256)
    rgba = torch.cat([shown.rgb, torch.ones(height, width, 1)], dim=2)
    images = (rgba * 255).round().byte()[None]
    masked = torch.zeros(1, height, width, dtype=torch.bool)
    masked[:, :, : width // 2] = True
    return rh.Views(images, pose[None], intrinsics[None], False, masked if unknown else None)


@pytest.mark.parametrize('scale', [2, 4])
def test_a_refiner_begins_as_bicubic_enlargement(scale):
    network = refiner.Refiner(rh.make_config('tiny', [f'refiner_scale={scale}']))
    picture = torch.rand(6, 9, 3)
    refined = network.refine(picture)
    assert refined.shape == (scale * 6, scale * 9, 3)
    plain = F.interpolate(picture.permute(2, 0, 1)[None], scale_factor=scale, mode='bicubic')
    assert torch.allclose(refined, plain[0].clamp(0, 1).permute(1, 2, 0), atol=1e-5)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    assert not torch.allclose(network.refine(picture), refined, atol=1e-2)


@pytest.mark.parametrize('scale', [2, 4])
def test_both_of_a_pair_show_the_same_place(scale):
    """The render by large pixels is the truth, averaged over these, but for the ball's edge."""
    config = rh.make_config('tiny', [
        f'refiner_scale={scale}', 'refiner_patch=32', 'steps=256', 'grid=32',
    ])
    grid = rh.grid_for(ball, config)
    for seed in range(4):
        torch.manual_seed(seed)
        pair = refiner.random_pair(ball, grid, view_of_ball(64, 64), config)
        assert pair['truth'].shape == (3, 32, 32)
        assert pair['rendered'].shape == (3, 32 // scale, 32 // scale)
        assert pair['known'].all()
        averaged = F.avg_pool2d(pair['truth'][None], scale)[0]
        off = (averaged - pair['rendered']).abs().mean()
        assert off < 0.1
        assert (averaged - pair['rendered'].roll(1, 2)).abs().mean() > 1.5 * off


def test_masked_pixels_and_what_lies_beyond_a_small_view_are_not_known():
    config = rh.make_config('tiny', ['refiner_patch=64', 'steps=64', 'grid=32'])
    grid = rh.grid_for(ball, config)
    pair = refiner.random_pair(ball, grid, view_of_ball(41, 50, unknown=True), config)
    assert pair['truth'].shape == (3, 64, 64)
    assert pair['rendered'].shape == (3, 32, 32)
    expected = torch.zeros(1, 64, 64, dtype=torch.bool)
    expected[:, :40, 25:50] = True  # 41 rows are 20 rows of large pixels
    assert torch.equal(pair['known'], expected)
    assert (pair['truth'][:, 40:] == 1).all()


def test_what_does_not_go_ends_in_one_line(tmp_path, monkeypatch):
    network = refiner.Refiner(rh.make_config('tiny'))
    assert refiner.side_of(64, network) == 32
    with pytest.raises(rh.Stop, match='a size of 65 pixels does not divide by that'):
        refiner.side_of(65, network)
    monkeypatch.setattr(running, '__file__', str(tmp_path / 'running.py'))
    with pytest.raises(rh.Stop, match=r'no refiner.pt in .* --stage refiner'):
        running.load_refiner(tmp_path, 'cpu')
    with pytest.raises(rh.Stop, match='refiner_patch 63 must divide by refiner_scale 2'):
        rh.make_config('tiny', ['refiner_patch=63'])
