"""The three regularisers that Rodin names, against naive forms, with gradients; and what a fit
makes of their weights."""
import pytest
import torch

import fit
import rodinhd as rh
import scenes


def packed(counts):
    """Random samples of rays with so many each, in order along them: weights, t, ray_index."""
    generator = torch.Generator().manual_seed(3)
    ray_index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    t = torch.cat([torch.rand(n, generator=generator).sort()[0] * 2 + 3 for n in counts])
    weights = torch.rand(len(t), generator=generator) / 10
    return weights.requires_grad_(), t, ray_index


def naive_distortion(weights, t, ray_index, rays, steps):
    """Over all pairs of samples of each ray, as mip-NeRF 360 writes it (Eq. 15)."""
    s = t.double() / 12 ** 0.5
    total = 0
    for ray in range(rays):
        w = weights.double()[ray_index == ray]
        apart = (s[ray_index == ray][:, None] - s[ray_index == ray]).abs()
        total = total + (w[:, None] * w * apart).sum() + (w * w).sum() / 3 / steps
    return total / rays


@pytest.mark.parametrize('counts', [[5, 0, 1, 40, 0], [0, 3], [200] * 30, [0, 0]])
def test_distortion_is_the_sum_over_all_pairs(counts):
    """To 1e-5 of its size, and so is its gradient; rays without samples count as rays."""
    weights, t, ray_index = packed(counts)
    fast = rh.distortion(weights, t, ray_index, len(counts), 64)
    naive = naive_distortion(weights, t, ray_index, len(counts), 64)
    assert fast.item() == pytest.approx(naive.item(), rel=1e-5)
    fast_gradient, = torch.autograd.grad(fast, weights)
    naive_gradient, = torch.autograd.grad(naive, weights)
    assert torch.allclose(fast_gradient, naive_gradient, rtol=1e-5, atol=1e-7)


def test_distortion_of_two_samples():
    """Weights 0.5 and 0.25, a tenth of the diagonal apart, 10 steps along it:
    2 * 0.5 * 0.25 * 0.1 + (0.25 + 0.0625) / 30 = 0.025 + 0.0104167."""
    weights = torch.tensor([0.5, 0.25])
    t = torch.tensor([3.0, 3.0 + 0.1 * 12 ** 0.5])
    found = rh.distortion(weights, t, torch.tensor([0, 0]), 1, 10)
    assert found.item() == pytest.approx(0.025 + 0.3125 / 30, rel=1e-5)


def test_density_losses_are_means_over_points_one_by_one(tiny):
    """The naive form asks for the density of one point after another, with the same noise."""
    decoder = rh.Decoder(tiny)
    planes = (0.3 * torch.randn(3, 8, 32, 32)).requires_grad_()
    field = rh.PlaneField(planes, decoder)
    points = 2 * torch.rand(60, 3) - 1
    points[0] = 1.0  # a corner, whose neighbour is brought back into the box
    found = rh.density_losses(field, points, torch.Generator().manual_seed(5))

    noise = torch.randn(60, 3, generator=torch.Generator().manual_seed(5))
    sparse = smooth = 0
    for p, shift in zip(points, noise):
        here = field(p[None])[0]
        there = field((p + 0.004 * shift).clamp(-1, 1)[None])[0]
        sparse = sparse + here.abs().sum() / 60
        smooth = smooth + (here - there).abs().sum() / 60
    for name, naive in (('sparse', sparse), ('smooth', smooth)):
        assert found[name].item() == pytest.approx(naive.item(), rel=1e-5)
        gradient, = torch.autograd.grad(found[name], planes, retain_graph=True)
        naive_gradient, = torch.autograd.grad(naive, planes, retain_graph=True)
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, naive_gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('preset', ['paper', 'small', 'tiny'])
def test_presets_of_rodinhd_have_none_of_them(preset):
    config = rh.make_config(preset)
    assert (config.weight_sparse, config.weight_smooth, config.weight_distortion) == (0, 0, 0)


def terms_of(folder, config):
    """Fits an avatar in four steps -> planes, and the terms of the loss at the first step."""
    views = scenes.load_views(folder, 'train', scenes.read_box(folder))
    decoder = rh.Decoder(config).requires_grad_(False)
    start = rh.new_planes(decoder, config, torch.Generator().manual_seed(0))
    reports = []
    visit = rh.fit_avatar(
        views, start, decoder, config, rh.by_steps(4), report=lambda *x: reports.append(x)
    )
    return visit.planes, reports[0][1]


def test_each_weight_adds_its_term_and_changes_the_planes(data):
    folder = scenes.list_avatars(data)[0]
    weights = {'weight_sparse': 'sparse', 'weight_smooth': 'smooth'}
    weights['weight_distortion'] = 'distortion'
    torch.manual_seed(0)
    plain, terms = terms_of(folder, rh.make_config('tiny', ['coarse_to_fine=0']))
    assert not terms.keys() & set(weights.values())
    for name, term in weights.items():
        torch.manual_seed(0)
        config = rh.make_config('tiny', ['coarse_to_fine=0', f'{name}=0.1'])
        planes, terms = terms_of(folder, config)
        assert terms[term] > 0
        assert not torch.equal(planes, plain)
        assert name in fit.SETTINGS
