"""Rodin's auto-encoder baseline: planes of the front view alone, in one pass."""
import pytest
import torch

import autoencoder
import rodinhd as rh
import running

ALONE = ('autoencoder=1', 'tokens=none', 'components=0')


@pytest.fixture
def network():
    """One whose output is not zero yet."""
    torch.manual_seed(0)
    made = running.build('base', rh.make_config('tiny', ALONE))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return made


def portraits(config, count):
    (channels, pixels), maps = rh.feature_shapes(config)
    latent = torch.randn(count, channels, pixels, pixels)
    return rh.Portrait(latent, [torch.randn(count, c, p, p) for c, p in maps])


def test_it_looks_at_the_front_view_alone(network):
    """Neither noise nor time changes what it makes, and the portrait does; the maps do not."""
    assert isinstance(network, autoencoder.AutoEncoder)
    config = network.config
    seen = portraits(config, 2)
    x = torch.randn(2, 3, 8, 8, 8)
    t = torch.tensor([10.0, 900.0])
    made = network(x, t, seen)
    assert made.shape == (2, 3, 16, 8, 8)
    assert torch.allclose(network(torch.randn_like(x), t.flip(0), seen), made, atol=1e-5)
    assert not torch.allclose(made[0], made[1], atol=1e-3)
    other_maps = seen._replace(maps=[torch.randn_like(y) for y in seen.maps])
    assert torch.allclose(network(x, t, other_maps), made, atol=1e-5)


def test_any_number_of_steps_samples_the_same(network):
    seen = portraits(network.config, 1)
    one, five = (rh.sample_stage('base', network, seen, steps=n, seed=n) for n in (1, 5))
    assert torch.allclose(one, five, atol=1e-5)
    assert one.abs().max() > 0


def test_encoder_and_network_learn_together(network):
    """Every parameter has a gradient of the loss that the base stage has."""
    diffusion = rh.diffusion_of('base', network.config)
    x_start = torch.rand(2, 3, 8, 8, 8)
    terms, _ = diffusion.loss(
        network, x_start, torch.tensor([3, 500]), torch.randn_like(x_start),
        portraits(network.config, 2),
    )
    sum(terms.values()).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]
    assert network.pooled.z.weight.grad.abs().max() > 0


@pytest.mark.parametrize('settings', [('base_predict=noise', 'tokens=none'), ('tokens=multi',)])
def test_what_makes_no_sense_with_it_ends_in_one_line(settings):
    config = rh.make_config('tiny', ['autoencoder=1', *settings])
    with pytest.raises(rh.Stop, match='autoencoder=1 needs base_predict=x_start and tokens='):
        running.build('base', config)
