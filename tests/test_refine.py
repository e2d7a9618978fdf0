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


@pytest.mark.parametrize('ground', ['flat', 'pattern'])
@pytest.mark.parametrize('scale, x, y', [(1.0, 0.0, 0.0), (0.92, 0.03, -0.04), (1.08, -0.05, 0.01)])
def test_register_finds_what_place_did(ball, ground, scale, x, y):
    view, opacity = ball
    rgb = (view - (1 - opacity)) / opacity.clamp(min=1e-6)              # as portraits are stored: not premultiplied
    rgba = batches.place(rgb[None] * 2 - 1, opacity[None], torch.tensor([scale]), torch.tensor([[x, y]]))[0]
    colour = torch.tensor([0.2, 0.7, 0.4])
    behind = colour.view(3, 1, 1).expand_as(view) if ground == 'flat' else F.interpolate(torch.rand(1, 3, 6, 6), size=96, mode='bicubic')[0]
    image = rgba[:3] + (1 - rgba[3:]) * behind
    found = refine.flat_ground(image)
    assert (found is None) == (ground == 'pattern')
    if ground == 'flat':
        assert (found - colour).abs().max() < 0.01
    s, dx, dy = (float(v) for v in refine.register(view, opacity, image, found))
    assert abs(s - scale) < 0.015 and abs(dx - x) < 0.008 and abs(dy - y) < 0.008
    moved = refine.move(image[None], *(torch.tensor([v]) for v in (s, dx, dy)))[0]
    assert ((moved - view) * opacity).square().mean() < 1e-3


def test_a_flat_ground_turns_white(ball):
    view, opacity = ball
    colour = torch.tensor([0.9, 0.3, 0.5])
    image = view - (1 - opacity) * (1 - colour.view(3, 1, 1))
    person = refine.person_before(image, colour)
    assert ((opacity[0] > 0.99) <= person).all() and not person[opacity[0] == 0].any()             # nothing lost, nothing added
    white, alpha = refine.onto_white(image, person, colour)
    assert rh.psnr(white, view) > 30 > rh.psnr(image, view) and (alpha - opacity).abs().mean() < 0.01


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
        patch.setattr(refine, 'register', lambda *_: torch.tensor([[1.0], [0.0], [0.0]]))          # untrained models sample no avatar
        seen = refine.straighten(models, torch.stack([image, other]))
    assert (seen.images[0] - image).abs().max() < 1e-5 and (seen.known[0] == 1).all()
    assert seen.images.shape == (2, 3, 64, 64) and seen.images.abs().max() <= 1
    known = seen.known[1]                                               # as far as the sample covers it, else white
    assert known.min() < known.max() and torch.allclose(seen.images[1], known * other + 1 - known, atol=1e-5)


def test_refine_makes_the_front_view_the_portrait():
    """The mean avatar of the weights that ship, and one that is two standard deviations away from it."""
    models = rh.load_models('none', 'none')
    decoder, prior, camera = models['decoder'], models['base'].prior, refine.front_camera(64, 'cpu')
    planes, other = (rh.resize_planes(x, 128) for x in (prior.mean[0].detach(), (prior.mean[0] + 2 * prior.components[0]).detach()))
    def view(x):
        field = rh.PlaneField(x, decoder)
        return rh.render_view(field, *camera, 64, 64, 256, rh.grid_for(field, decoder.config))[0].permute(2, 0, 1)
    field = rh.PlaneField(other, decoder)
    opacity = rh.render_view(field, *camera, 64, 64, 256, rh.grid_for(field, decoder.config))[1]
    seen = refine.Seen(view(other)[None] * 2 - 1, opacity[None, None], torch.ones(1, 1, 64, 64))
    ours = refine.refine(planes[None], seen, decoder, 8)
    assert ours.shape == (1, 3, 16, 128, 128) and ours.abs().max() <= 1
    assert rh.psnr(view(ours[0]), view(other)) > rh.psnr(view(planes), view(other)) + 3
    assert torch.equal(ours, refine.refine(planes[None], seen, decoder, 8))
    unknown = seen._replace(known=torch.zeros(1, 1, 64, 64))
    assert torch.equal(refine.refine(planes[None], unknown, decoder, 20)[0], planes)
