"""Decoder, consolidation, fitting and replay: known counts, worked-out gradients, and an avatar
with known geometry."""
import copy
import itertools
import math
import random
import time

import pytest
import torch
import torch.nn.functional as F

import avatars
import fit
import rodinhd as rh
import scenes


def load(data, number=0):
    """Training and held-out views of an avatar."""
    folder = scenes.list_avatars(data)[number]
    box = scenes.read_box(folder)
    train = scenes.load_views(folder, 'train', box)
    return train, scenes.load_views(folder, 'test', box)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def alone():
    """Joint.average of a single rank."""


def copied(decoder):
    """The parameters of a decoder as they are now."""
    return [p.detach().clone() for p in decoder.parameters()]


def same(a, b):
    """Whether two lists of tensors hold the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# The decoder --------------------------------------------------------------------------------------
def count(module):
    return sum(p.numel() for p in module.parameters())


def test_decoder_has_the_papers_parameters():
    """sigma net: 40 * 128 + 128 + 128 * 129 + 129 = 21,889; colour net, without biases:
    263 * 128 + 128 * 128 + 128 * 3 = 50,432."""
    decoder = rh.Decoder(rh.Config())
    assert count(decoder.sigma_net) == 21_889
    assert count(decoder.color_net) == 50_432
    assert count(decoder) == 72_321


@pytest.mark.parametrize('width', [24, 8, 3])
def test_frequency_encoding(width):
    """24 -> 120, 8 -> 40, 3 -> 15 values: [v, sin v, cos v, sin 2v, cos 2v], without pi."""
    v = torch.randn(4, width, dtype=torch.float64, requires_grad=True)
    encoded = rh.frequency_encoding(v)
    expected = torch.cat([v, v.sin(), v.cos(), (2 * v).sin(), (2 * v).cos()], dim=-1)
    assert encoded.shape == (4, 5 * width)
    assert torch.allclose(encoded, expected, atol=1e-12)
    assert torch.autograd.gradcheck(rh.frequency_encoding, v)


@pytest.mark.parametrize('layers', [4, 5])
@pytest.mark.parametrize('count', [0, 50])
def test_a_folded_decoder_is_the_decoder(layers, count):
    """Density, colour and the gradients of features, with colour and without."""
    config = rh.make_config('tiny', [f'decoder_layers={layers}'])
    decoder = rh.Decoder(config)
    assert rh.quick(decoder) is decoder  # it learns
    decoder.requires_grad_(False)
    folded = rh.quick(decoder)
    assert isinstance(folded, rh.Folded)

    features = torch.randn(count, config.channels, requires_grad=True)
    directions = torch.nn.functional.normalize(torch.randn(count, 3), dim=1)
    of_density = torch.randn(count)
    of_colour = torch.randn(count, 3)
    found = []
    for net in (decoder, folded):
        sigma, rgb = net(features, directions)
        loss = (sigma * of_density).sum() + (rgb * of_colour).sum()
        alone, nothing = net(features)
        assert nothing is None
        gradients = [torch.autograd.grad(x.sum(), features)[0] for x in (loss, alone)]
        found.append([sigma, rgb, alone, *gradients])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(folded(features, directions)[1], decoder(features, directions)[1])


def test_trunc_exp_keeps_its_gradient_finite():
    x = torch.tensor([0.0, 20.0], requires_grad=True)
    y = rh.trunc_exp(x)
    y.sum().backward()
    assert torch.allclose(y, x.exp())
    assert torch.allclose(x.grad, torch.tensor([0.0, 15.0]).exp())


def test_density_alone_equals_density_with_colour(tiny):
    decoder = rh.Decoder(tiny)
    features = torch.randn(50, 8)
    dirs = torch.nn.functional.normalize(torch.randn(50, 3), dim=-1)
    sigma, rgb = decoder(features, dirs)
    assert torch.allclose(decoder(features)[0], sigma, rtol=1e-5)
    assert rgb.min() > 0
    assert rgb.max() < 1

    changed = features.clone()
    changed[:, :6] += 1  # the first 3/4 of the channels feed colour alone
    assert torch.equal(decoder(changed)[0], decoder(features)[0])


# Consolidation ------------------------------------------------------------------------------------
def test_consolidation_is_half_the_weighted_square():
    """Weights (1, 2), anchor (0, 0), Fisher (3, 5): 1/2 (3 * 1 + 5 * 4) = 11.5.

    The gradient is Fisher * (w - anchor) = (3, 10).
    """
    net = torch.nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[1.0, 2.0]])
    memory = {
        'fisher': {'weight': torch.tensor([[3.0, 5.0]])},
        'anchor': {'weight': torch.zeros(1, 2)},
    }
    penalty = rh.consolidation(net, memory)
    penalty.backward()
    assert penalty.item() == 11.5
    assert torch.equal(net.weight.grad, torch.tensor([[3.0, 10.0]]))


def test_fisher_is_the_hessian_of_a_quadratic():
    """For loss 1/2 (w x - y)^2 with y ~ N(w x, 1), E[gradient^2] = E[x^2] E[noise^2] = E[x^2]:
    the Hessian."""
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
    losses = (net.weight.sum() * scale for scale in (2.0, float('inf'), 4.0))
    fisher = rh.fisher_information(net, losses)
    assert fisher['weight'].item() == (4 + 16) / 2


# What a fit begins with ---------------------------------------------------------------------------
def test_visual_hull_holds_the_solid_and_not_the_corners(data):
    views, _ = load(data)
    hull = rh.visual_hull(views, 32)
    path = scenes.list_avatars(data)[0] / 'transforms_train.json'
    parts = avatars.build(scenes.read_transforms(path)['factors'])
    axis = (torch.arange(32) + 0.5) / 16 - 1
    cells = torch.stack(torch.meshgrid(axis, axis, axis, indexing='ij'), dim=-1).view(-1, 3)
    solid = avatars.inside(parts, cells).view(32, 32, 32)
    assert solid.any()
    assert hull[solid].all()
    assert not hull[[0, 0, -1, -1], [0, -1, 0, -1], [-1, -1, -1, -1]].any()
    assert hull.float().mean() < 0.5


@pytest.mark.parametrize('radius', [0, 1, 2, 5, 40])
def test_a_mask_grows_as_a_maximum_of_its_neighbours(radius):
    mask = torch.rand(24, 31) < 0.02
    window = (2 * radius + 1, 2 * radius + 1)
    expected = F.max_pool2d(F.pad(mask.float()[None], [radius] * 4), window, 1)[0] > 0
    assert torch.equal(rh.grown(mask, radius), expected)


def test_half_of_the_rays_are_at_the_edge_of_the_silhouette():
    """A disc of radius 10 in the middle of 64 x 64: half of the rays are within 2 pixels of its
    edge, all within the margin of 6."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing='ij')
    disc = ((x - 31.5) ** 2 + (y - 31.5) ** 2).sqrt() < 10
    images = torch.full((1, 64, 64, 4), 255, dtype=torch.uint8)
    images[0, ..., 0] = 40
    images[0, ..., 3] = disc * 255
    pose = rh.orbit_pose(0, 0)
    intrinsics = rh.intrinsics_of(34.0, 64)
    rays = rh.Rays(rh.Views(images, pose[None], intrinsics[None], True), 'cpu', margin=6)
    rays_o, rays_d, colours = rays.draw(1000, generator())

    # Back to pixels from the middle, by way of camera coordinates
    local = rays_d @ pose[:3, :3]
    radius = (local[:, :2] / -local[:, 2:] * intrinsics[0]).norm(dim=1)
    assert torch.equal(rays_o, pose[:3, 3].expand(1000, 3))
    assert radius.max() < 10 + 6 * math.sqrt(2) + 0.1

    red = torch.tensor([40 / 255, 1, 1])
    assert torch.allclose(colours, torch.where(radius[:, None] < 10, red, torch.ones(3)))
    edge = (radius - 10).abs() < 3  # 2 pixels, along a diagonal 2.8
    assert 0.5 <= edge.float().mean() < 0.75
    assert edge[500:].all()


def test_rays_without_a_margin_are_of_all_pixels_alike():
    """Two opaque views of 8 x 8 pixels, each of which has a colour that tells which one it is."""
    number = torch.arange(128, dtype=torch.uint8).view(2, 8, 8)
    images = torch.full((2, 8, 8, 4), 255, dtype=torch.uint8)
    images[..., 0] = number
    poses = torch.stack([rh.orbit_pose(0, 0), rh.orbit_pose(90, 0)])
    intrinsics = rh.intrinsics_of(34.0, 8).expand(2, 4)
    rays = rh.Rays(rh.Views(images, poses, intrinsics, False), 'cpu')
    rays_o, rays_d, colours = rays.draw(25_600, generator())

    pixel = (colours[:, 0] * 255).round().long()
    times = torch.bincount(pixel, minlength=128)
    assert len(times) == 128
    assert ((times - 200) ** 2 / 200).sum() < 200  # chi squared of 127 degrees, p < 1e-4 above
    expected = [rh.view_rays(pose, intrinsics[0], 8, 8) for pose in poses]
    assert torch.equal(rays_o, torch.cat([o for o, _ in expected])[pixel])
    assert torch.allclose(rays_d, torch.cat([d for _, d in expected])[pixel], atol=1e-6)


def test_new_planes_are_small_noise_around_a_light_fog(tiny):
    decoder = rh.Decoder(tiny)
    planes = rh.new_planes(decoder, tiny, generator())
    centre = planes.mean((0, 2, 3))
    assert planes.shape == (3, 8, 8, 8)
    assert (planes - centre[:, None, None]).std().item() == pytest.approx(0.1, rel=0.1)
    assert 0.8 < decoder(centre[None])[0].item() < 6  # 1 to 5, but for the noise
    assert centre[:6].abs().max() < 0.03  # colour begins around zero

    config = rh.make_config('tiny', ['fog_start=0', 'coarse_to_fine=0'])
    planes = rh.new_planes(decoder, config, generator())
    assert planes.shape == (3, 8, 32, 32)
    assert planes.mean((0, 2, 3)).abs().max() < 0.01


def test_planes_double_at_10_and_at_30_percent(tiny):
    shares = (0.0, 0.09, 0.1, 0.29, 0.3, 1.0)
    assert [rh.size_of_planes(share, tiny) for share in shares] == [8, 8, 16, 16, 32, 32]
    config = rh.make_config('tiny', ['coarse_to_fine=0'])
    assert {rh.size_of_planes(share, config) for share in shares} == {32}


def test_the_pace_of_a_fit():
    assert list(rh.by_steps(4)) == [0, 0.25, 0.5, 0.75]
    began = time.monotonic()
    shares = list(rh.by_seconds(0.02))
    assert time.monotonic() - began >= 0.02
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[-1] < 1


# Fitting ------------------------------------------------------------------------------------------
def held_out_scores(visit, decoder, views, config):
    """PSNR of held-out views, and of empty pictures in their place."""
    field = rh.PlaneField(visit.planes, decoder)
    scores = fit.held_out_psnr(field, views, config, visit.grid)
    truths = [rh.on_white(image) for image in views.images]
    return scores, [rh.psnr(torch.ones_like(truth), truth) for truth in truths]


def mean(values):
    return sum(values) / len(values)


def test_fitting_shows_the_avatar(data, tiny):
    """150 steps on 64 x 64 views: held-out views are above 17 dB, far above an empty picture.

    Planes stay within [-1, 1].
    """
    views, held_out = load(data)
    decoder = rh.Decoder(tiny)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=tiny.lr_decoder)
    before = copied(decoder)
    visit = rh.fit_avatar(
        views,
        rh.new_planes(decoder, tiny, generator()),
        decoder,
        tiny,
        rh.by_steps(150),
        joint=rh.Joint(optimizer, None, alone),
    )
    scores, empty = held_out_scores(visit, decoder, held_out, tiny)
    assert visit.planes.shape == (3, 8, 32, 32)
    assert visit.planes.abs().max() <= 1
    assert min(scores) > 17
    assert mean(scores) > mean(empty) + 6
    assert not same(before, copied(decoder))
    for fisher in visit.memory['fisher'].values():
        assert (fisher >= 0).all()
        assert fisher.isfinite().all()

    # The second stage: the decoder stays
    decoder.requires_grad_(False)
    frozen = copied(decoder)
    pace = rh.by_steps(5)
    again = rh.fit_avatar(views, visit.planes, decoder, tiny, pace, span=(0.9, 1.0))
    assert again.memory is None
    assert same(frozen, copied(decoder))
    assert not torch.equal(again.planes, visit.planes)


def test_the_same_seed_gives_the_same_planes(data, tiny):
    views, _ = load(data)
    decoder = rh.Decoder(tiny).requires_grad_(False)
    start = rh.new_planes(decoder, tiny, generator(1))
    a, b = (
        rh.fit_avatar(views, start, decoder, tiny, rh.by_steps(10), seed=3).planes
        for _ in range(2)
    )
    assert torch.equal(a, b)
    assert torch.equal(start, rh.new_planes(decoder, tiny, generator(1)))


def as_in_the_paper():
    """The tiny Config without anything that RodinHD does not have."""
    names = [*rh.NOT_IN_THE_PAPERS, 'rescale']
    off = [f'{name}={getattr(rh.Config, name)}' for name in names]
    return rh.make_config('tiny', off)


def test_fitting_as_in_the_paper_shows_the_avatar_too(data, monkeypatch):
    """Rays are of all pixels, without a hull; planes begin at their full size; learning rates are
    constant; the Fisher information is of a single batch."""
    config = as_in_the_paper()
    assert rh.departures(config) == []
    views, held_out = load(data)
    drawn = []
    batches = []
    regularised = []
    rates = []

    def watched_draw(rays, n, draws, original=rh.Rays.draw):
        drawn.append(rays)
        return original(rays, n, draws)

    def watched_loss(*args, original=rh.ray_losses):
        batches.append(args[0].shape)
        return original(*args)

    def watched_variation(planes, original=rh.total_variation):
        regularised.append(planes.shape)
        return original(planes)

    class Adam(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]['lr'])
            super().step()

    monkeypatch.setattr(rh.Rays, 'draw', watched_draw)
    monkeypatch.setattr(rh, 'ray_losses', watched_loss)
    monkeypatch.setattr(rh, 'total_variation', watched_variation)
    monkeypatch.setattr(rh, 'visual_hull', None)  # cannot be called
    monkeypatch.setattr(torch.optim, 'Adam', Adam)

    steps = 100
    decoder = rh.Decoder(config)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=config.lr_decoder)
    visit = rh.fit_avatar(
        views,
        rh.new_planes(decoder, config, generator()),
        decoder,
        config,
        rh.by_steps(steps),
        joint=rh.Joint(optimizer, None, alone),
    )
    assert all(rays.near is None for rays in drawn)
    assert (visit.grid.values >= 0).all()
    assert rates == [config.lr_planes, config.lr_decoder] * steps  # of planes and decoder in turn
    assert batches == [(3, 8, 32, 32)] * (steps + 1)
    assert regularised == [(3, 8, 32, 32)] * steps
    assert set(visit.memory) == {'fisher', 'anchor'}

    scores, empty = held_out_scores(visit, decoder, held_out, config)
    assert visit.planes.abs().max() <= 1
    assert min(scores) > 17
    assert mean(scores) > mean(empty) + 6


def test_synthetic_avatars_have_the_geometry_that_they_show():
    """Just before a hit is outside, just behind it inside; all is in the cube; the face looks along
    -Y."""
    parts = avatars.build(avatars.draw_factors(random.Random(5)))
    rays_o, rays_d = rh.view_rays(rh.orbit_pose(0, 2), rh.intrinsics_of(34.0, 48), 48, 48)
    rgb, depth, hit = avatars.trace(parts, rays_o, rays_d)
    points = rays_o[hit] + depth[hit, None] * rays_d[hit]
    little = 1e-3 * rays_d[hit]
    assert hit.float().mean() > 0.1
    assert points.abs().max() < 1
    assert avatars.inside(parts, points + little).float().mean() > 0.98
    assert avatars.inside(parts, points - little).float().mean() < 0.02
    assert rgb.min() >= 0
    assert rgb.max() <= 1
    assert points[:, 1].mean() < 0


def test_iwc_pulls_the_decoder_back(data):
    """With an enormous weight the decoder cannot leave its anchor; without it, it does."""
    views, _ = load(data)
    moved = []
    for weight in (0.0, 1e6):
        torch.manual_seed(0)
        overrides = [f'weight_iwc={weight}', 'lr_decoder=1e-6', 'decoder_final_lr=1']
        config = rh.make_config('tiny', overrides)
        decoder = rh.Decoder(config)
        optimizer = torch.optim.SGD(decoder.parameters(), lr=config.lr_decoder)
        memory = {
            'fisher': {n: torch.ones_like(p) for n, p in decoder.named_parameters()},
            'anchor': {n: p.detach() + 0.5 for n, p in decoder.named_parameters()},
        }
        before = copied(decoder)[0]
        rh.fit_avatar(
            views,
            rh.new_planes(decoder, config, generator()),
            decoder,
            config,
            rh.by_steps(3),
            joint=rh.Joint(optimizer, memory, alone),
        )
        moved.append((copied(decoder)[0] - before).mean().item())
    assert abs(moved[0]) < 1e-4
    assert moved[1] == pytest.approx(0.5, abs=0.05)


# Replay (Algorithm 1) -----------------------------------------------------------------------------
class Tasks:
    """Avatars in memory, as rodinhd.replay asks for them."""
    def __init__(self, views, planes):
        self.views = views
        self.rounds = len(views)
        self.planes = planes  # of each avatar: its last visit's, or new ones
        self.memory = [None] * len(views)
        self.loaded = []  # numbers of visits
        self.kept = {}  # number of a visit: Visit
        self.active = []  # of each step of the decoder
        self.terms = {}  # number of a visit: those of its first loss

    def load(self, n):
        self.loaded.append(n)
        place = n % self.rounds
        if self.views[place] is None:
            return None
        return rh.Task(self.views[place], self.planes[place], self.memory[place])

    def keep(self, n, visit):
        self.kept[n] = visit
        self.planes[n % self.rounds] = visit.planes
        self.memory[n % self.rounds] = visit.memory

    def average(self, active):
        self.active.append(active)

    def report(self, n, done, terms):
        self.terms.setdefault(n, terms)


@pytest.fixture(scope='module')
def brief():
    """A Config of two visits to each avatar, with few small steps."""
    sizes = ['inner=4', 'outer=2', 'rays=64', 'grid=16', 'steps=32', 'fisher_batches=2']
    return rh.make_config('tiny', sizes)


class Run:
    """A decoder in the making, its optimizer, and two avatars."""
    def __init__(self, config, views):
        torch.manual_seed(0)
        self.config = config
        self.decoder = rh.Decoder(config)
        self.optimizer = torch.optim.Adam(self.decoder.parameters(), lr=config.lr_decoder)
        planes = [rh.new_planes(self.decoder, config, generator(i)) for i in range(len(views))]
        self.tasks = Tasks(views, planes)

    def replay(self, begin=0, **how):
        return rh.replay(
            self.tasks, self.decoder, self.config, optimizer=self.optimizer, begin=begin, **how
        )


@pytest.fixture(scope='module')
def two_views(data):
    """Training views of both avatars."""
    return [load(data, number)[0] for number in (0, 1)]


def test_replay_visits_avatars_in_turn_and_goes_on_from_what_they_left(
    brief, two_views, monkeypatch
):
    run = Run(brief, two_views)
    new = list(run.tasks.planes)
    calls = []

    def watched(views, start, *args, original=rh.fit_avatar, **how):
        calls.append((views, start, how))
        return original(views, start, *args, **how)

    monkeypatch.setattr(rh, 'fit_avatar', watched)
    visits = []
    decoders = []
    for n, visit in run.replay(seed=5):
        visits.append((n, visit))
        decoders.append(copied(run.decoder))

    # Visits are in order, and kept before they are yielded
    kept = run.tasks.kept
    assert run.tasks.loaded == [0, 1, 2, 3]
    assert [n for n, _ in visits] == [0, 1, 2, 3]
    assert all(visit is kept[n] for n, visit in visits)
    assert run.tasks.active == [True] * 4 * brief.inner

    # The second visit to an avatar starts from what the first one left
    starts = [start for _, start, _ in calls]
    assert [views for views, _, _ in calls] == two_views * 2
    assert starts[0] is new[0]
    assert starts[1] is new[1]
    assert starts[2] is kept[0].planes
    assert starts[3] is kept[1].planes
    for n, (_, _, how) in enumerate(calls):
        joint = how['joint']
        assert how['span'] == ((0, 0.5) if n < 2 else (0.5, 1))
        assert how['seed'] == 5 + n
        assert joint.optimizer is run.optimizer
        assert joint.memory is (None if n < 2 else kept[n - 2].memory)
        assert (joint.visit, joint.visits) == (n, 4)
        assert ('iwc' in run.tasks.terms[n]) == (n >= 2)

    # The memory of a visit is of the decoder at its end, and of all of its parameters
    names = [name for name, _ in run.decoder.named_parameters()]
    for n, visit in visits:
        assert visit.planes.shape == (3, 8, 32, 32)
        assert list(visit.memory['anchor']) == names
        assert list(visit.memory['fisher']) == names
        assert same(visit.memory['anchor'].values(), decoders[n])
        fisher = torch.cat([x.flatten() for x in visit.memory['fisher'].values()])
        assert (fisher >= 0).all()
        assert fisher.max() > 0
    for before, after in itertools.pairwise(decoders):
        assert not same(before, after)


@pytest.mark.parametrize('begin', [1, 2, 3])
def test_replay_goes_on_to_the_same_bits(brief, two_views, begin):
    whole = Run(brief, two_views)
    for _ in whole.replay():
        pass

    first = Run(brief, two_views)
    for n, _ in first.replay():
        if n + 1 == begin:
            break
    second = Run(brief, two_views)
    second.decoder.load_state_dict(first.decoder.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.tasks.planes = first.tasks.planes
    second.tasks.memory = first.tasks.memory
    for _ in second.replay(begin=begin):
        pass

    assert second.tasks.loaded == list(range(begin, 4))
    assert same(copied(second.decoder), copied(whole.decoder))
    assert same(second.tasks.planes, whole.tasks.planes)
    for ours, theirs in zip(second.tasks.memory, whole.tasks.memory, strict=True):
        assert same(ours['anchor'].values(), theirs['anchor'].values())
        assert same(ours['fisher'].values(), theirs['fisher'].values())


def test_replay_for_seconds(brief, two_views):
    """Visits that take about so long have as many steps as there is time for, but at least one."""
    run = Run(brief, two_views)
    visits = [n for n, _ in run.replay(seconds=1e-6)]
    assert visits == [0, 1, 2, 3]
    assert len(run.tasks.active) == 4


def test_replay_for_seconds_is_of_one_rank(brief, two_views):
    run = Run(brief, [two_views[0], None])
    with pytest.raises(rh.Stop, match='seconds are for a single rank'):
        list(run.replay(seconds=1e-6))


def test_a_rank_without_a_task_keeps_pace(brief, two_views):
    """A rank that has one avatar of two takes the other rank's steps in its second visits.

    What the other rank's gradients would be is recorded in a run that has both avatars.
    """
    busy = Run(brief, two_views)
    gradients = []

    def record(active):
        gradients.append([p.grad.clone() for p in busy.decoder.parameters()])

    busy.tasks.average = record
    decoders = []
    rates = []
    for _ in busy.replay():
        decoders.append(copied(busy.decoder))
        rates.append(busy.optimizer.param_groups[0]['lr'])

    idle = Run(brief, [two_views[0], None])
    to_come = iter(gradients)

    def receive(active):
        idle.tasks.active.append(active)
        for p, gradient in zip(idle.decoder.parameters(), next(to_come), strict=True):
            p.grad = gradient.clone()

    idle.tasks.average = receive
    for n, visit in idle.replay():
        assert (visit is None) == (n in (1, 3))
        assert same(copied(idle.decoder), decoders[n])
        assert idle.optimizer.param_groups[0]['lr'] == rates[n]
    assert idle.tasks.active == ([True] * brief.inner + [False] * brief.inner) * 2
    assert list(idle.tasks.kept) == [0, 2]
    assert next(to_come, None) is None
