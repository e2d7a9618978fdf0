"""Fitting a sampled avatar to its portrait: where the person is, what is known of the portrait, and what the descent changes."""
import pytest
import torch
import torch.nn.functional as F

import batches
import refine
import rodinhd as rh


class Ball:
    """A solid ball with a bright side and a dark eye, off the middle: a field."""
    def __call__(self, points, dirs=None):
        centre = torch.tensor([0.1, 0.0, 0.15])
        sigma = 200.0 * ((points - centre).norm(dim=1) < 0.6)
        eye = ((points[:, ::2] - torch.tensor([0.3, 0.35])).norm(dim=1, keepdim=True) < 0.15).float()
        return sigma, None if dirs is None else torch.lerp(0.5 + 0.4 * torch.sin(3 * points + 1), torch.zeros_like(points), eye)


@pytest.fixture(scope='module')
def ball():
    """Its front view (3, 96, 96) and opacity (1, 96, 96)."""
    view, opacity = rh.render_view(Ball(), *refine.front_camera(96, 'cpu'), 96, 96, 96)
    return view.permute(2, 0, 1), opacity[None]


@pytest.mark.parametrize('ground', ['none', 'pattern'])
@pytest.mark.parametrize('scale, x, y', [(1.0, 0.0, 0.0), (1.0, 0.05, -0.02), (0.92, 0.03, -0.04), (1.08, -0.05, 0.01)])
def test_register_finds_what_place_did(ball, ground, scale, x, y):
    view, opacity = ball
    rgb = (view - (1 - opacity)) / opacity.clamp(min=1e-6)              # as portraits are stored: not premultiplied
    rgba = batches.place(rgb[None] * 2 - 1, opacity[None], torch.tensor([scale]), torch.tensor([[x, y]]))[0]
    behind = torch.ones_like(view) if ground == 'none' else F.interpolate(torch.rand(1, 3, 6, 6), size=96, mode='bicubic')[0]
    image = rgba[:3] + (1 - rgba[3:]) * behind
    where = refine.register(view, opacity, image, rgba[3:] if ground == 'none' else None)
    s, dx, dy = (1.0, 0.0, 0.0) if where is None else map(float, where)
    assert abs(s - scale) < 0.015 and abs(dx - x) < 0.008 and abs(dy - y) < 0.008
    moved = refine.move(image[None], *(torch.tensor([v]) for v in (s, dx, dy)))[0]
    assert ((moved - view) * opacity).square().mean() < 1e-3


def test_outlines_count_where_colours_mislead(ball):
    """The avatar is wrongly coloured, as a first sample may be: its outline still says where the person is."""
    view, opacity = ball
    rgba = batches.place(view[None] * 2 - 1, opacity[None], torch.tensor([1.06]), torch.tensor([[-0.03, 0.02]]))[0]
    where = refine.register(opacity * view.flip(0) + 1 - opacity, opacity, rgba[:3] + 1 - rgba[3:], rgba[3:])
    assert (where[:, 0] - torch.tensor([1.06, -0.03, 0.02])).abs().max() < 0.015


def test_a_border_of_one_colour_is_a_flat_ground():
    colour = torch.tensor([0.2, 0.7, 0.4])
    image = colour[:, None, None].repeat(1, 96, 96)
    image[:, 30:, 20:80] = torch.rand(3, 66, 60)
    assert (refine.flat_ground(image) - colour).abs().max() < 0.01
    assert refine.flat_ground(F.interpolate(torch.rand(1, 3, 6, 6), size=96, mode='bicubic')[0]) is None


def test_specks_are_of_the_ground():
    person, stars = torch.zeros(64, 64, dtype=torch.bool), torch.zeros(64, 64, dtype=torch.bool)
    person[20:, 16:48], person[5:17, 24:40] = True, True                # a head may be apart from the bust, by a white collar
    stars[::9, 2], stars[40:46, 55:61] = True, True
    assert torch.equal(refine.without_specks(person | stars), person)
    image = torch.where(person | stars, 0.2, 1.0).expand(3, 64, 64)
    assert torch.equal(refine.onto_white(image, person, torch.ones(3))[0], torch.where(person, 0.2, 1.0).expand(3, 64, 64))


def test_a_flat_ground_turns_white(ball):
    view, opacity = ball
    colour = torch.tensor([0.9, 0.3, 0.5])
    image = view - (1 - opacity) * (1 - colour.view(3, 1, 1))
    person = refine.person_before(image, colour)
    assert ((opacity[0] > 0.99) <= person).all() and not person[opacity[0] == 0].any()             # nothing lost, nothing added
    white, alpha = refine.onto_white(image, person, colour)
    assert rh.psnr(white, view) > 30 > rh.psnr(image, view) and (alpha - opacity).abs().mean() < 0.01


def test_a_bust_goes_on_below():
    """A white shirt on white, in an outline that is open below, is the person's; a gap that is open to the side is not."""
    image = torch.ones(3, 32, 32)
    image[:, 8:, 8], image[:, 8:, 24], image[:, 8, 8:25] = 0, 0, 0
    person = refine.person_before(image, torch.ones(3))
    assert person[8:, 8:25].all() and person.sum() == 24 * 17


def test_a_photographs_ground_is_separated(ball):
    cv2 = pytest.importorskip('cv2')
    view, opacity = ball
    cv2.setNumThreads(1)
    ground = F.interpolate(torch.rand(1, 3, 6, 6) * 0.3, size=96, mode='bicubic')[0].clamp(0, 1)
    image = view - (1 - opacity) + (1 - opacity) * ground
    shifted = opacity[0].roll(4, 1)                                     # the first sample is not quite where the person is
    person, truth = refine.person_near(image, shifted, shifted), opacity[0] > 0.5
    def overlap(a):
        return (a & truth).sum() / (a | truth).sum()
    assert overlap(person) > 0.95 > overlap(shifted > 0.5)


@pytest.fixture(scope='module')
def models():
    torch.manual_seed(0)
    config = rh.make_config('tiny')
    models = {kind: build(config) for kind, (build, _) in rh.MODELS.items()}
    for model in models.values():
        model.config = config           # as load_model gives them
    return models


def test_a_clean_portrait_is_left_as_it_is(models, data):
    image = rh.portrait_on_white(*rh.read_portrait(data / 'avatar_0000/train/r_000.png', 64))
    other = image * 0.5 + 0.5 * torch.rand(3, 64, 64)        # no flat ground
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, 'person_near', lambda *_: None)           # as without OpenCV
        patch.setattr(refine, 'register', lambda *_, **__: None)       # untrained models sample no avatar
        seen = refine.straighten(models, torch.stack([image, other]))
    assert (seen.images[0] - image).abs().max() < 1e-5 and (seen.known[0] == 1).all()
    assert seen.images.shape == (2, 3, 64, 64) and seen.images.abs().max() <= 1
    known = seen.known[1]                                               # as far as the sample covers it, else white
    assert known.min() < known.max() and torch.allclose(seen.images[1], known * other + 1 - known, atol=1e-5)


@pytest.fixture(scope='module')
def shipped():
    """The decoder of the weights that ship, two avatars of it (the mean, and one that is two standard deviations away), and view(planes):
    their portrait (3, 64, 64) and opacity (1, 64, 64)."""
    models = rh.load_models('none', 'none')
    assert all(m.config.sample_steps == rh.make_config('small').sample_steps for m in (models['base'], models['upsample']))
    decoder, prior, camera = models['decoder'], models['base'].prior, refine.front_camera(64, 'cpu')
    planes = [rh.resize_planes(x.detach(), 128) for x in (prior.mean[0], prior.mean[0] + 2 * prior.components[0])]
    def view(x):
        field = rh.PlaneField(x, decoder)
        rgb, opacity = rh.render_view(field, *camera, 64, 64, 256, rh.grid_for(field, decoder.config))
        return rgb.permute(2, 0, 1), opacity[None]
    return decoder, *planes, view


@pytest.mark.parametrize('how', ['white', 'alpha', 'photograph'])
def test_a_portrait_that_is_shifted_is_moved_back(shipped, how):
    decoder, planes, _, view = shipped
    rgb, opacity = view(planes)
    straight = (rgb - (1 - opacity)) / opacity.clamp(min=1e-3)
    rgba = batches.place(straight[None] * 2 - 1, opacity[None], torch.ones(1), torch.tensor([[0.05, 0.0]]))[0]
    behind = torch.ones(3, 64, 64)
    if how == 'photograph':
        pytest.importorskip('cv2').setNumThreads(1)
        behind = F.interpolate(torch.rand(1, 3, 6, 6), size=64, mode='bicubic')[0].clamp(0, 1) * torch.tensor([0.2, 0.3, 1.0]).view(3, 1, 1)
    image, alpha, known = refine.straighten_one(
        *refine.front_view(planes, decoder, 64), opacity, (rgba[:3] + (1 - rgba[3:]) * behind) * 2 - 1,
        rgba[3:] if how == 'alpha' else torch.ones(1, 64, 64))
    assert known.mean() > 0.9 and (known * ((image + 1) / 2 - rgb)).square().mean() < (8e-3 if how == 'photograph' else 1e-3)
    assert (known * (alpha - opacity)).abs().mean() < (0.01 if how == 'alpha' else 0.03)


def test_where_nobody_is_nothing_is_known(ball):
    view, opacity = ball
    image, alpha, known = refine.straighten_one(view, opacity, opacity, torch.full_like(view, 0.3), torch.ones_like(opacity))
    assert (image == 1).all() and known.max() == alpha.max() == 0
    assert refine.register(view, 0 * opacity, view, opacity) is None


def test_refine_makes_the_front_view_the_portrait(shipped):
    decoder, planes, other, view = shipped
    portrait, opacity = view(other)
    seen = refine.Seen(portrait[None] * 2 - 1, opacity[None], torch.ones(1, 1, 64, 64))
    ours = refine.refine(planes[None], seen, decoder, 8)
    assert ours.shape == (1, 3, 16, 128, 128) and ours.abs().max() <= 1
    assert rh.psnr(view(ours[0])[0], portrait) > rh.psnr(view(planes)[0], portrait) + 3
    assert torch.equal(ours, refine.refine(planes[None], seen, decoder, 8))
    unknown = seen._replace(known=torch.zeros(1, 1, 64, 64))
    assert torch.equal(refine.refine(planes[None], unknown, decoder, 20)[0], planes)
