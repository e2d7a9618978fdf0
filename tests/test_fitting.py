"""Decoder, consolidation and fitting: known counts, worked-out gradients, and an avatar with known geometry."""
import math
import random

import pytest
import torch

import avatars
import fit
import rodinhd as rh


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_decoder_has_the_papers_parameters():
    """sigma net: 40 * 128 + 128 + 128 * 129 + 129 = 21,889; colour net without biases: 263 * 128 + 128 * 128 + 128 * 3 = 50,432."""
    decoder = rh.Decoder(rh.Config())
    assert (count(decoder.sigma_net), count(decoder.color_net), count(decoder)) == (21_889, 50_432, 72_321)


def test_frequency_encoding():
    """24 -> 120, 8 -> 40, 3 -> 15 values in the order [v, sin v, cos v, sin 2v, cos 2v], without pi."""
    for width in (24, 8, 3):
        v = torch.randn(4, width, dtype=torch.float64, requires_grad=True)
        expected = torch.cat([v, v.sin(), v.cos(), (2 * v).sin(), (2 * v).cos()], -1)
        assert rh.frequency_encoding(v).shape == (4, 5 * width)
        assert torch.allclose(rh.frequency_encoding(v), expected, atol=1e-12)
        assert torch.autograd.gradcheck(rh.frequency_encoding, v)


def test_trunc_exp_keeps_its_gradient_finite():
    x = torch.tensor([0.0, 20.0], requires_grad=True)
    y = rh.trunc_exp(x)
    y.sum().backward()
    assert torch.allclose(y, x.exp()) and torch.allclose(x.grad, torch.tensor([0.0, 15.0]).exp())


def test_density_alone_equals_density_with_colour(tiny):
    decoder, features = rh.Decoder(tiny), torch.randn(50, 8)
    sigma, rgb = decoder(features, torch.nn.functional.normalize(torch.randn(50, 3), dim=-1))
    assert torch.allclose(decoder(features)[0], sigma, rtol=1e-5) and rgb.min() > 0 and rgb.max() < 1
    changed = features.clone()
    changed[:, :6] += 1                                                 # the first 3/4 of the channels feed colour alone
    assert torch.equal(decoder(changed)[0], decoder(features)[0])


def test_consolidation_is_half_the_weighted_square():
    """Weights (1, 2), anchor (0, 0), Fisher (3, 5): 1/2 (3 * 1 + 5 * 4) = 11.5; gradient Fisher * (w - anchor) = (3, 10)."""
    net = torch.nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[1.0, 2.0]])
    memory = {'fisher': {'weight': torch.tensor([[3.0, 5.0]])}, 'anchor': {'weight': torch.zeros(1, 2)}}
    penalty = rh.consolidation(net, memory)
    penalty.backward()
    assert penalty.item() == 11.5 and torch.equal(net.weight.grad, torch.tensor([[3.0, 10.0]]))


def test_fisher_is_the_hessian_of_a_quadratic():
    """For loss 1/2 (w x - y)^2 with y ~ N(w x, 1), E[gradient^2] = E[x^2] E[noise^2] = E[x^2]: the Hessian."""
    net = torch.nn.Linear(2, 1, bias=False)
    x = torch.randn(4000, 2) * torch.tensor([1.0, 3.0])
    noise = torch.randn(4000, 1)
    target = (net(x) + noise).detach()
    losses = (0.5 * (net(x[i:i + 1]) - target[i:i + 1]).square().sum() for i in range(4000))
    fisher = rh.fisher_information(net, losses)['weight'][0]
    assert torch.allclose(fisher, torch.tensor([1.0, 9.0]), rtol=0.1)


def test_fisher_leaves_out_gradients_that_are_not_finite():
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    fisher = rh.fisher_information(net, (net.weight.sum() * s for s in (2.0, float('inf'), 4.0)))
    assert fisher['weight'].item() == (4 + 16) / 2


def load(data, tiny):
    folder = rh.list_avatars(data)[0]
    box = rh.read_box(folder)
    return rh.load_views(folder, 'train', box), rh.load_views(folder, 'test', box)


def test_visual_hull_holds_the_solid_and_not_the_corners(data, tiny):
    views, _ = load(data, tiny)
    hull = rh.visual_hull(views, 32)
    parts = avatars.build(rh.read_transforms(rh.list_avatars(data)[0] / 'transforms_train.json')['factors'])
    axis = (torch.arange(32) + 0.5) / 16 - 1
    cells = torch.stack(torch.meshgrid(axis, axis, axis, indexing='ij'), -1).view(-1, 3)
    solid = avatars.inside(parts, cells).view(32, 32, 32)
    assert solid.any() and hull[solid].all()
    assert not hull[[0, 0, -1, -1], [0, -1, 0, -1], [-1, -1, -1, -1]].any() and hull.float().mean() < 0.5


def test_half_of_the_rays_are_at_the_edge_of_the_silhouette():
    """A disc of radius 10 in the middle of 64 x 64: half of the rays within 2 pixels of its edge, all within the margin of 6."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing='ij')
    away = ((x - 31.5) ** 2 + (y - 31.5) ** 2).sqrt()
    images = torch.full((1, 64, 64, 4), 255, dtype=torch.uint8)
    images[0, ..., 0], images[0, ..., 3] = 40, (away < 10) * 255
    pose, k = rh.orbit_pose(0, 0), rh.intrinsics_of(34.0, 64)
    rays = rh.Rays(rh.Views(images, pose[None], k[None], True), 'cpu', margin=6)
    rays_o, rays_d, colours = rays.draw(1000, torch.Generator().manual_seed(0))
    local = rays_d @ pose[:3, :3]                                       # camera coordinates, back to pixels from the middle
    radius = (local[:, :2] / -local[:, 2:] * k[0]).norm(dim=1)
    assert torch.equal(rays_o, pose[:3, 3].expand(1000, 3)) and radius.max() < 10 + 6 * math.sqrt(2) + 0.1
    assert torch.allclose(colours, torch.where(radius[:, None] < 10, torch.tensor([40 / 255, 1, 1]), torch.ones(3)))
    edge = (radius - 10).abs() < 3                                      # 2 pixels, along a diagonal 2.8
    assert 0.5 <= edge.float().mean() < 0.75 and edge[500:].all()


def test_fitting_shows_the_avatar(data, tiny):
    """150 steps on 64 x 64 views: held-out views above 17 dB, far above an empty picture; planes within [-1, 1], low planes too."""
    views, held_out = load(data, tiny)
    decoder, generator = rh.Decoder(tiny), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=tiny.lr_decoder)
    before = [p.clone() for p in decoder.parameters()]
    planes, grid, memory = rh.fit_avatar(views, fit.new_planes(decoder, generator), decoder, tiny, steps=150,
                                         decoder_optimizer=optimizer)
    scores = fit.held_out_psnr(rh.PlaneField(planes, decoder), held_out, tiny, grid)
    empty = [rh.psnr(torch.ones_like(rh.on_white(held_out.images[i])), rh.on_white(held_out.images[i])) for i in range(len(scores))]
    assert planes.shape == (3, 8, 32, 32) and planes.abs().max() <= 1
    assert min(scores) > 17 and sum(scores) / len(scores) > sum(empty) / len(empty) + 6
    assert any(not torch.equal(a, b) for a, b in zip(before, decoder.parameters()))
    assert all((f >= 0).all() and f.isfinite().all() for f in memory['fisher'].values())

    frozen = [p.clone() for p in decoder.requires_grad_(False).parameters()]            # second stage: the decoder stays
    again, _, nothing = rh.fit_avatar(views, planes, decoder, tiny, steps=5, span=(0.9, 1.0))
    assert nothing is None and all(torch.equal(a, b) for a, b in zip(frozen, decoder.parameters()))
    assert not torch.equal(again, planes)


def test_the_same_seed_gives_the_same_planes(data, tiny):
    views, _ = load(data, tiny)
    decoder = rh.Decoder(tiny).requires_grad_(False)
    start = fit.new_planes(decoder, torch.Generator().manual_seed(1))
    a, b = (rh.fit_avatar(views, start, decoder, tiny, steps=10, seed=3)[0] for _ in range(2))
    assert torch.equal(a, b)


def test_synthetic_avatars_have_the_geometry_that_they_show():
    """Just before a hit is outside, just behind it inside; all of it in the cube; the face looks along -Y."""
    parts = avatars.build(avatars.draw_factors(random.Random(5)))
    rays_o, rays_d = rh.view_rays(rh.orbit_pose(0, 2), rh.intrinsics_of(34.0, 48), 48, 48)
    rgb, depth, hit = avatars.trace(parts, rays_o, rays_d)
    points = rays_o[hit] + depth[hit, None] * rays_d[hit]
    assert hit.float().mean() > 0.1 and points.abs().max() < 1
    assert avatars.inside(parts, points + 1e-3 * rays_d[hit]).float().mean() > 0.98
    assert avatars.inside(parts, points - 1e-3 * rays_d[hit]).float().mean() < 0.02
    assert rgb.min() >= 0 and rgb.max() <= 1 and points[:, 1].mean() < 0


def test_iwc_pulls_the_decoder_back(data, tiny):
    """With an enormous weight the decoder cannot leave its anchor; without it, it does."""
    views, _ = load(data, tiny)
    moved = []
    for weight in (0.0, 1e6):
        torch.manual_seed(0)
        config = rh.make_config('tiny', [f'weight_iwc={weight}'])
        decoder = rh.Decoder(config)
        optimizer = torch.optim.SGD(decoder.parameters(), lr=1e-6)
        memory = {'fisher': {n: torch.ones_like(p) for n, p in decoder.named_parameters()},
                  'anchor': {n: p.detach() + 0.5 for n, p in decoder.named_parameters()}}
        start = next(decoder.parameters()).detach().clone()
        rh.fit_avatar(views, fit.new_planes(decoder, torch.Generator().manual_seed(0)), decoder, config, steps=3,
                      decoder_optimizer=optimizer, memory=memory)
        moved.append((next(decoder.parameters()) - start).mean().item())
    assert abs(moved[0]) < 1e-4 and moved[1] == pytest.approx(0.5, abs=0.05)
