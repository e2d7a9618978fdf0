"""Fitting a sampled avatar to its portrait: where the person is, what is known of the portrait, and
what the descent changes."""
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import batches
import likeness
import rodinhd as rh
import running
import scenes

PLACES = [  # scale, and shifts in image widths
    (1.0, 0.0, 0.0),
    (1.0, 0.05, -0.02),
    (0.92, 0.03, -0.04),
    (1.08, -0.05, 0.01),
]


class Ball:
    """A solid ball with a bright side and a dark eye, off the middle: a field."""
    def __call__(self, points, dirs=None):
        centre = torch.tensor([0.1, 0.0, 0.15])
        sigma = 200.0 * ((points - centre).norm(dim=1) < 0.6)
        if dirs is None:
            return sigma, None
        from_eye = points[:, ::2] - torch.tensor([0.3, 0.35])
        eye = (from_eye.norm(dim=1, keepdim=True) < 0.15).float()
        bright = 0.5 + 0.4 * torch.sin(3 * points + 1)
        return sigma, torch.lerp(bright, torch.zeros_like(points), eye)


class Front(NamedTuple):
    """A portrait of an avatar."""
    view: torch.Tensor  # (3, P, P) in 0..1, on white
    opacity: torch.Tensor  # (1, P, P)

    @property
    def straight(self):
        """The colours as portraits are stored: not premultiplied."""
        return (self.view - (1 - self.opacity)) / self.opacity.clamp(min=1e-6)


@pytest.fixture(scope='module')
def ball():
    picture = rh.render_view(Ball(), *rh.portrait_camera(96), 96, 96, 96)
    return Front(picture.rgb.permute(2, 0, 1), picture.opacity[None])


def placed(rgb, opacity, scale, x, y):
    """An image in 0..1 and its opacity, scaled and shifted: premultiplied RGBA (4, P, P)."""
    scale = torch.tensor([scale])
    shift = torch.tensor([[x, y]])
    return batches.place(rgb[None] * 2 - 1, opacity[None], scale, shift)[0]


def pattern(size):
    """A soft random ground (3, size, size)."""
    return F.interpolate(torch.rand(1, 3, 6, 6), size=size, mode='bicubic')[0]


# The place of a person ----------------------------------------------------------------------------
@pytest.mark.parametrize('ground', ['none', 'pattern'])
@pytest.mark.parametrize(('scale', 'x', 'y'), PLACES)
def test_register_finds_what_place_did(ball, ground, scale, x, y):
    rgba = placed(ball.straight, ball.opacity, scale, x, y)
    behind = torch.ones_like(ball.view) if ground == 'none' else pattern(96)
    alpha = rgba[3:] if ground == 'none' else None
    image = rgba[:3] + (1 - rgba[3:]) * behind
    place = likeness.register(*ball, image, alpha)
    if place is None:  # it is in its place
        place = torch.tensor([[1.0], [0.0], [0.0]])

    found_scale, found_x, found_y = place[:, 0].tolist()
    assert abs(found_scale - scale) < 0.015
    assert abs(found_x - x) < 0.008
    assert abs(found_y - y) < 0.008
    moved = likeness.move(image[None], *place)[0]
    assert ((moved - ball.view) * ball.opacity).square().mean() < 1e-3


def test_outlines_count_where_colours_mislead(ball):
    """The avatar is wrongly coloured, as a first sample may be: its outline still says where the
    person is."""
    view, opacity = ball
    rgba = placed(view, opacity, 1.06, -0.03, 0.02)
    wrong = opacity * view.flip(0) + 1 - opacity
    place = likeness.register(wrong, opacity, rgba[:3] + 1 - rgba[3:], rgba[3:])
    assert (place[:, 0] - torch.tensor([1.06, -0.03, 0.02])).abs().max() < 0.015


# The ground ---------------------------------------------------------------------------------------
def test_a_border_of_one_colour_is_a_flat_ground():
    colour = torch.tensor([0.2, 0.7, 0.4])
    image = colour[:, None, None].repeat(1, 96, 96)
    image[:, 30:, 20:80] = torch.rand(3, 66, 60)
    assert (likeness.flat_ground(image) - colour).abs().max() < 0.01
    assert likeness.flat_ground(pattern(96)) is None


def test_specks_are_of_the_ground():
    person = torch.zeros(64, 64, dtype=torch.bool)
    person[20:, 16:48] = True
    person[5:17, 24:40] = True  # a head may be apart from the bust, by a white collar
    stars = torch.zeros(64, 64, dtype=torch.bool)
    stars[::9, 2] = True
    stars[40:46, 55:61] = True
    assert torch.equal(likeness.without_specks(person | stars), person)

    image = torch.where(person | stars, 0.2, 1.0).expand(3, 64, 64)
    clean = torch.where(person, 0.2, 1.0).expand(3, 64, 64)
    assert torch.equal(likeness.onto_white(image, person, torch.ones(3)).image, clean)


def test_a_flat_ground_turns_white(ball):
    view, opacity = ball
    colour = torch.tensor([0.9, 0.3, 0.5])
    image = view - (1 - opacity) * (1 - colour.view(3, 1, 1))
    person = likeness.person_before(image, colour)
    assert ((opacity[0] > 0.99) <= person).all()  # nothing lost
    assert not person[opacity[0] == 0].any()  # nothing added
    white, alpha = likeness.onto_white(image, person, colour)
    assert rh.psnr(white, view) > 30 > rh.psnr(image, view)
    assert (alpha - opacity).abs().mean() < 0.01


def test_a_bust_goes_on_below():
    """A white shirt on white, in an outline that is open below, is the person's; a gap that is open
    to the side is not."""
    image = torch.ones(3, 32, 32)
    image[:, 8:, 8] = 0
    image[:, 8:, 24] = 0
    image[:, 8, 8:25] = 0
    person = likeness.person_before(image, torch.ones(3))
    assert person[8:, 8:25].all()
    assert person.sum() == 24 * 17


def test_a_photographs_ground_is_separated(ball):
    pytest.importorskip('cv2').setNumThreads(1)
    view, opacity = ball
    dark = torch.rand(1, 3, 6, 6) * 0.3
    ground = F.interpolate(dark, size=96, mode='bicubic')[0].clamp(0, 1)
    image = view - (1 - opacity) + (1 - opacity) * ground
    truth = opacity[0] > 0.5

    def overlap(a):
        return (a & truth).sum() / (a | truth).sum()

    shifted = opacity[0].roll(4, 1)  # the first sample is not quite where the person is
    person = likeness.person_near(image, shifted, shifted)
    assert overlap(person) > 0.95 > overlap(shifted > 0.5)


# Straightening ------------------------------------------------------------------------------------
def random_models(config):
    """All four models, as load_model gives them, with the weights that training begins with."""
    torch.manual_seed(0)
    models = {}
    for kind, (build, _) in running.MODELS.items():
        models[kind] = build(config)
        models[kind].config = config
    return models


@pytest.fixture(scope='module')
def portrait(data):
    """The portrait (3, 64, 64) of an avatar, on white, in [-1, 1]."""
    path = data / 'avatar_0000/train/r_000.png'
    return scenes.portrait_on_white(*scenes.read_portrait(path, 64))


@pytest.mark.parametrize('settings', [[], ['components=0', 'aligned=0', 'base_aligned=0']])
def test_a_clean_portrait_is_left_as_it_is(portrait, monkeypatch, settings):
    """Beside one on another ground, of which is known what the sample covers. With and without what
    networks add to the papers'."""
    models = random_models(rh.make_config('tiny', settings))
    other = portrait * 0.5 + 0.5 * torch.rand(3, 64, 64)  # no flat ground
    monkeypatch.setattr(likeness, 'person_near', lambda *_: None)  # as without OpenCV
    monkeypatch.setattr(likeness, 'register', lambda *_, **__: None)  # untrained models: no avatar
    seen = likeness.straighten(models, torch.stack([portrait, other]))
    assert (seen.images[0] - portrait).abs().max() < 1e-5
    assert (seen.known[0] == 1).all()
    assert seen.images.shape == (2, 3, 64, 64)
    assert seen.images.abs().max() <= 1

    known = seen.known[1]
    assert known.min() < known.max()
    assert torch.allclose(seen.images[1], known * other + 1 - known, atol=1e-5)


def test_where_nobody_is_nothing_is_known(ball):
    view, opacity = ball
    nobody = torch.full_like(view, 0.3)
    seen = likeness.straighten_one(view, opacity, None, nobody, torch.ones_like(opacity))
    assert (seen.images == 1).all()
    assert seen.known.max() == seen.alpha.max() == 0
    assert likeness.register(view, 0 * opacity, view, opacity) is None


@pytest.fixture(scope='module')
def shipped():
    """The decoder of the weights that ship, with two of its avatars: the mean, and one that is two
    standard deviations away."""
    models = running.load_models('none', 'none')
    small = rh.make_config('small')
    for stage in ('base', 'upsample'):
        assert models[stage].config.sample_steps == small.sample_steps
    assert models['base'].config.likeness_steps == small.likeness_steps == 60

    prior = models['base'].prior
    mean = prior.mean[0].detach()
    other = mean + 2 * prior.components[0].detach()
    return SimpleNamespace(
        decoder=models['decoder'],
        mean=rh.resize_planes(mean, 128),
        other=rh.resize_planes(other, 128),
    )


def portrait_of(planes, decoder, angles=(0, 2)):
    """The Front of planes, 64 pixels a side, rendered independently of likeness.py."""
    field = rh.PlaneField(planes, decoder)
    grid = rh.grid_for(field, decoder.config)
    camera = rh.orbit_pose(*angles), rh.portrait_camera(64)[1]
    picture = rh.render_view(field, *camera, 64, 64, 256, grid)
    return Front(picture.rgb.permute(2, 0, 1), picture.opacity[None])


@pytest.mark.parametrize('how', ['white', 'alpha', 'photograph'])
def test_a_portrait_that_is_shifted_is_moved_back(shipped, how):
    view, opacity = portrait_of(shipped.mean, shipped.decoder)
    straight = (view - (1 - opacity)) / opacity.clamp(min=1e-3)
    rgba = placed(straight, opacity, 1.0, 0.05, 0.0)
    behind = torch.ones(3, 64, 64)
    if how == 'photograph':
        pytest.importorskip('cv2').setNumThreads(1)
        behind = pattern(64).clamp(0, 1) * torch.tensor([0.2, 0.3, 1.0]).view(3, 1, 1)
    image = rgba[:3] + (1 - rgba[3:]) * behind
    alpha = rgba[3:] if how == 'alpha' else torch.ones(1, 64, 64)

    front = likeness.front_view(shipped.mean, shipped.decoder, 64)
    seen = likeness.straighten_one(*front, lambda: opacity, image * 2 - 1, alpha)
    error = (seen.images + 1) / 2 - view
    assert seen.known.mean() > 0.9
    assert (seen.known * error).square().mean() < (8e-3 if how == 'photograph' else 1e-3)
    outline = seen.known * (seen.alpha - opacity)
    assert outline.abs().mean() < (0.01 if how == 'alpha' else 0.03)


# Fitting ------------------------------------------------------------------------------------------
def test_fitting_makes_the_front_view_the_portrait(shipped):
    view, opacity = portrait_of(shipped.other, shipped.decoder)
    seen = likeness.Seen(view[None] * 2 - 1, opacity[None], torch.ones(1, 1, 64, 64))
    planes = shipped.mean[None]
    losses = []
    ours = likeness.fit_to_portrait(planes, seen, shipped.decoder, 8, report=losses.append)
    assert ours.shape == (1, 3, 16, 128, 128)
    assert ours.abs().max() <= 1
    assert len(losses) == 8
    before = rh.psnr(portrait_of(planes[0], shipped.decoder).view, view)
    after = rh.psnr(portrait_of(ours[0], shipped.decoder).view, view)
    assert after > before + 3

    again = likeness.fit_to_portrait(planes, seen, shipped.decoder, 8)
    assert torch.equal(ours, again)

    unknown = seen._replace(known=torch.zeros(1, 1, 64, 64))
    assert torch.equal(likeness.fit_to_portrait(planes, unknown, shipped.decoder, 20), planes)


def test_corrections_are_added_from_coarse_to_fine():
    """Constants stay what they are at any size; what is fine is of the plane xz alone."""
    planes = torch.full((3, 2, 32, 32), 0.1)
    corrections = likeness.new_corrections(planes, (2, 1))
    assert [tuple(x.shape) for x in corrections] == [(3, 2, 16, 16), (1, 2, 32, 32)]
    with torch.no_grad():
        for value, correction in zip((0.2, 0.9), corrections, strict=True):
            correction.fill_(value)
    total = likeness.corrected(planes, corrections)
    expected = torch.tensor([0.3, 1.0, 0.3]).view(3, 1, 1, 1)  # 0.1 + 0.2 + 0.9 is cut off
    assert torch.allclose(total, expected.expand_as(total))


def test_light_reaches_what_a_photograph_shows(shipped):
    """A camera sees what is before a person, not what is behind, nor what is not known."""
    field = rh.PlaneField(shipped.mean, shipped.decoder)
    grid = rh.grid_for(field, shipped.decoder.config)
    whole = likeness.Seen(*torch.ones(3, 1, 64, 64))
    before, behind = torch.tensor([0.0, -0.9, 0.4]), torch.tensor([0.0, 0.9, 0.4])
    points = torch.stack([before, behind])

    def light(azimuth, seen):
        return likeness.light_at(points, likeness.View(seen, (azimuth, 0)), field, grid)

    assert light(0, whole).tolist() == pytest.approx([1, 0], abs=0.02)
    assert light(180, whole).tolist() == pytest.approx([0, 1], abs=0.02)
    known = whole.known.clone()
    known[:, :32] = 0  # the upper half, where the points are
    assert light(0, whole._replace(known=known))[0] == 0


def test_what_the_portrait_does_not_show_stays_as_it_was_sampled(shipped, monkeypatch):
    view, opacity = portrait_of(shipped.other, shipped.decoder)
    seen = likeness.Seen(view * 2 - 1, opacity, torch.ones(1, 64, 64))
    field = rh.PlaneField(shipped.mean, shipped.decoder)
    grid = rh.grid_for(field, shipped.decoder.config)
    generator = torch.Generator().manual_seed(0)
    hidden = likeness.hidden_points(field, grid, [likeness.View(seen)], generator)
    assert len(hidden.points) > 1000

    def change():
        fitted = likeness.fit_one(shipped.mean, seen, shipped.decoder, 12)
        return likeness.changes_in(rh.PlaneField(fitted, shipped.decoder), hidden, generator)

    held = change()
    monkeypatch.setattr(likeness, 'hidden_points', lambda *_: None)
    assert held < 0.5 * change()


def test_rays_go_where_the_sample_is_wrong(shipped):
    view, opacity = portrait_of(shipped.mean, shipped.decoder)
    wrong = view.clone()
    wrong[:, 16:32, 24:40] = 1 - wrong[:, 16:32, 24:40]
    seen = likeness.Seen(wrong * 2 - 1, opacity, torch.ones(1, 64, 64))
    _, chance = likeness.first_look(shipped.mean, shipped.decoder, [likeness.View(seen)])
    assert abs(chance.mean() - 1) < 1e-4
    chance = chance.view(64, 64)
    assert chance.min() >= 1 - likeness.WHERE_WRONG
    assert chance[16:32, 24:40].mean() > 3 * chance[48:].mean()


def test_a_further_photograph_is_found_and_shows_its_side(shipped):
    """It was taken at 60 degrees and from 5 above; somebody said 55, and nothing of the height."""
    view, opacity = portrait_of(shipped.other, shipped.decoder, (60, 5))
    photograph = likeness.Photograph(view * 2 - 1, opacity, 55)
    found, = likeness.find_views(shipped.other, shipped.decoder, [photograph])
    assert found.angles == (60, 5)
    assert (found.seen.images / 2 + 0.5 - view).abs().mean() < 0.02

    front = portrait_of(shipped.other, shipped.decoder)
    seen = likeness.Seen(front.view * 2 - 1, front.opacity, torch.ones(1, 64, 64))
    psnrs = []
    for views in ([], [found]):
        ours = likeness.fit_one(shipped.mean, seen, shipped.decoder, 8, views=views)
        psnrs.append(rh.psnr(portrait_of(ours, shipped.decoder, (60, 5)).view, view))
    assert psnrs[1] > psnrs[0] + 1


def test_steps_are_those_of_pytorchs_adam():
    ours = torch.randn(30, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    adam = likeness.Adam([ours])
    optimizer = torch.optim.Adam([theirs], betas=(0.9, 0.99))
    for rate in (1e-1, 1e-2, 1e-2):
        optimizer.param_groups[0]['lr'] = rate
        theirs.grad = theirs.detach().sin()
        optimizer.step()
        adam.step([ours.detach().sin()], rate)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_further_photographs_are_of_one_portrait(tiny, portrait):
    photograph = likeness.Photograph(portrait, torch.ones(1, 64, 64), 30)
    with pytest.raises(ValueError, match='of one portrait, not of 2'):
        likeness.avatars_of({}, portrait.expand(2, -1, -1, -1), photographs=[photograph])


def test_avatars_are_fitted_as_long_as_the_model_says(tiny, portrait, monkeypatch):
    """refine_steps, else likeness_steps of the base model's config; 0 for samples as they are."""
    models = random_models(tiny)
    sampled = torch.zeros(1, 3, 8, 32, 32)
    seen = likeness.Seen(portrait[None], *torch.ones(2, 1, 1, 64, 64))
    steps = []

    def fit(planes, seen, decoder, count, seed, report):
        steps.append(count)
        return planes + 1

    monkeypatch.setattr(likeness, 'straighten', lambda *_, **__: seen)
    monkeypatch.setattr(rh, 'generate', lambda *_, **__: rh.Avatars(sampled, sampled))
    monkeypatch.setattr(likeness, 'fit_to_portrait', fit)
    assert torch.equal(likeness.avatars_of(models, portrait[None]), sampled + 1)
    assert torch.equal(likeness.avatars_of(models, portrait[None], 3), sampled + 1)
    assert torch.equal(likeness.avatars_of(models, portrait[None], 0), sampled)
    assert steps == [tiny.likeness_steps, 3] == [60, 3]


def test_sampling_goes_towards_what_the_portrait_shows(tiny):
    """`towards` lowers the error of the front view each time; what is not known moves nothing."""
    torch.manual_seed(0)
    decoder = rh.Decoder(tiny).requires_grad_(False)
    decoder.config = tiny
    planes = 0.3 * torch.randn(1, 3, tiny.channels, 8, 8)
    image = torch.zeros(1, 3, 64, 64) + torch.tensor([0.9, -0.9, -0.9]).view(1, 3, 1, 1)
    seen = likeness.Seen(image, torch.ones(1, 1, 64, 64), torch.ones(1, 1, 64, 64))

    def error(planes):
        front = likeness.front_view(planes[0], decoder, 64)
        return (front.view - (image[0] + 1) / 2).square().mean().item()

    correct = likeness.towards(seen, decoder)
    moved = planes
    errors = [error(moved)]
    for _ in range(5):
        moved = correct(moved)
        assert moved.shape == planes.shape
        errors.append(error(moved))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]

    unknown = seen._replace(known=torch.zeros(1, 1, 64, 64))
    assert torch.equal(likeness.towards(unknown, decoder)(planes), planes)


def test_what_is_beyond_the_edge_is_shown_as_training_shows_it():
    """It goes on as in the nearest pixel that is known: what batches.cut_off does."""
    torch.manual_seed(0)
    image = torch.rand(3, 32, 32)
    known = torch.zeros(1, 32, 32)
    known[:, 2:20, 4:30] = 1
    rows = torch.arange(32).clamp(2, 19)
    columns = torch.arange(32).clamp(4, 29)
    assert torch.equal(likeness.gone_on(image, known), image[:, rows][:, :, columns])
    for everywhere in (0, 1):
        same = torch.full((1, 32, 32), float(everywhere))
        assert torch.equal(likeness.gone_on(image, same), image)


def test_fine_corrections_are_of_the_plane_that_the_front_shows():
    """Of 4 and 16 texels for all three planes, of 32 for xz alone, or for all where asked for."""
    planes = torch.zeros(3, 4, 32, 32)
    counts = [len(x) for x in likeness.new_corrections(planes, (8, 2, 1))]
    assert counts == [3, 3, 1]
    everywhere = likeness.new_corrections(planes, (8, 2, 1), front_alone=False)
    assert [len(x) for x in everywhere] == [3, 3, 3]

    one = torch.full((1, 4, 32, 32), 0.25)
    three = torch.full((3, 4, 4, 4), 0.5)
    total = likeness.corrected(planes, [three, one])
    xz = [rh.AXES[i] == (0, 2) for i in range(3)]
    assert [x.unique().tolist() for x in total] == [[0.75] if is_xz else [0.5] for is_xz in xz]


def test_what_is_added_lies_around_the_sample():
    """Of a sample that is solid in one cell of 9 x 9 x 9 and has a little fog elsewhere, twice the
    fog costs the more the farther it is; the sample itself, and more beside the solid cell, cost
    nothing."""
    grid = rh.OccupancyGrid(9, 16, 'cpu')
    grid.values = torch.full((9, 9, 9), 0.1)
    grid.values[4, 4, 4] = 100
    empty = likeness.emptiness_of(grid)
    weights = empty.weight[4, 4]
    assert torch.allclose(weights, torch.tensor([3, 2, 1, 0, 0, 0, 1, 2, 3]) / likeness.AWAY)

    def fog(times, low, high):
        def field(points):
            there = (points[:, 0] >= low) & (points[:, 0] < high)
            return torch.where(there, 0.1 * times, 0.1), None

        return float(likeness.fog_in(field, empty, torch.Generator().manual_seed(0)))

    assert fog(1, -1, 1) == 0
    assert 0 < fog(2, -1 / 9, 1 / 9) < fog(2, -1, -7 / 9)  # one layer of cells each
