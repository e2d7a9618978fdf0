"""Preset `rodin`: its sizes, and what of it RodinHD does not have: a decoder of four layers, one
layer that goes up, patches of the face, heights that are there."""
import itertools
import json

import pytest
import torch

import batches
import export
import fit
import rodinhd as rh
import running
import scenes
import train

# rodin, made small: an eighth of its planes, with as many levels at the same ratios
SHRUNKEN = (
    'channels=8', 'resolution=32', 'base_resolution=8', 'decoder_width=8', 'grid=8', 'steps=16',
    'fit_avatars=2', 'inner=3', 'fit_steps=3', 'rays=64', 'portrait=64', 'vae_widths=8,8,16,16',
    'vae_layers=1', 'vae_steps=3', 'vae_batch=2', 'token_width=16', 'pool_width=16',
    'base_width=8', 'base_blocks=1', 'base_attention=4,2,1', 'base_aware=8', 'head_width=8',
    'base_steps=3', 'base_batch=2', 'up_width=8', 'up_blocks=1', 'up_head_width=8', 'up_steps=3',
    'up_batch=2', 'patch=14', 'patches=1', 'patch_grid_updates=2', 'perceptual=vae',
    'sample_steps=1', 'latent_width=8', 'clip_width=8', 'clip_steps=3', 'clip_batch=4',
    'prior_layers=2', 'prior_width=16', 'prior_steps=3', 'text_steps=3', 'refiner_width=8',
    'refiner_blocks=1', 'refiner_patch=16', 'refiner_steps=3', 'refiner_batch=2',
)
STAGES = ('vae', 'clip', 'base', 'upsample', 'prior', 'text', 'refiner')


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def on_meta(kind, config):
    with torch.device('meta'):
        return kind(config)


# Sizes --------------------------------------------------------------------------------------------
def test_rodin_has_the_papers_numbers():
    """Appendix B of Rodin."""
    config = rh.make_config('rodin')
    assert (config.channels, config.resolution, config.base_resolution) == (32, 256, 64)
    assert (config.base_width, config.base_schedule, config.up_schedule) == (192, *['linear'] * 2)
    assert (config.base_timesteps, config.up_timesteps, config.sample_steps) == (1000, 100, 100)
    assert (config.base_batch, config.up_batch) == (48, 16)
    assert (config.base_lr, config.up_lr, config.ema) == (5e-5, 5e-5, 0.9999)
    assert (config.decoder_layers, config.fit_avatars, config.outer) == (4, 1000, 1)
    assert (config.rescale, config.patch, config.condition_drop) == (1.0, 112, 1.0)
    assert (config.latent_width, config.latent_drop, config.prior_timesteps) == (512, 0.2, 1000)
    assert (config.prior_layers, config.prior_width, config.prior_lr) == (20, 2048, 4e-5)
    assert config.base_attention == (32, 16, 8)
    assert config.base_aware == (64,)
    assert rh.departures(config) == []


def test_rodin_has_the_stated_parameters():
    """docs/details.md states these counts."""
    config = rh.make_config('rodin')
    decoder = on_meta(rh.Decoder, config)
    linear = [x for x in decoder.modules() if isinstance(x, torch.nn.Linear)]
    assert len(linear) == 4
    assert parameters(decoder) == 72_321 - 128 * 128
    base = on_meta(rh.BaseUNet, config)
    upsample = on_meta(rh.UpsampleUNet, config)
    assert parameters(base) == 313_998_656 + 512 * 768  # and what takes the vector
    assert parameters(upsample) == 296_516_768

    x = torch.empty(1, 3, 32, 64, 64, device='meta')
    portrait = rh.Portrait(
        torch.empty(1, 4, 32, 32, device='meta'),
        [torch.empty(1, c, p, p, device='meta') for c, p in rh.feature_shapes(config)[1]],
    )
    t = torch.zeros(1, device='meta')
    assert base(x, t, portrait).shape == (1, 3, 64, 64, 64)  # noise and variance
    x_t = torch.empty(1, 3, 32, 256, 256, device='meta')
    assert upsample(x_t, t, portrait._replace(lr=x)).shape == x_t.shape


def test_rodin_attends_and_convolves_where_the_paper_says():
    """Full attention at 8, 16 and 32; 3D-aware convolution above, at 64."""
    base = on_meta(rh.BaseUNet, rh.make_config('rodin'))
    heights = {'Attention': set(), 'AwareConv': set()}

    def note_height(layer, inputs, output):
        heights[type(layer).__name__].add(inputs[0].shape[2])

    for layer in base.modules():
        if isinstance(layer, (rh.Attention, rh.AwareConv)):
            layer.register_forward_hook(note_height)
    config = base.config
    portrait = rh.Portrait(
        torch.empty(1, 4, 32, 32, device='meta'),
        [torch.empty(1, c, p, p, device='meta') for c, p in rh.feature_shapes(config)[1]],
    )
    base(torch.empty(1, 3, 32, 64, 64, device='meta'), torch.zeros(1, device='meta'), portrait)
    assert heights == {'Attention': {8, 16, 32}, 'AwareConv': {64}}


# Training -----------------------------------------------------------------------------------------
def test_every_stage_of_rodin_trains(tmp_path, monkeypatch, data):
    """At a shrunken copy of it, three steps each; then an avatar of nobody is sampled."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').symlink_to(data)
    how = ['--preset', 'rodin', '--set', *SHRUNKEN]
    fit.main(fit.parse(['--decoder', *how]))
    fit.main(fit.parse(how))
    log = json.loads((tmp_path / 'fits/decoder.jsonl').read_text().splitlines()[-1])
    assert {'rgb', 'sparse', 'smooth', 'distortion'} <= log.keys()
    assert 'iwc' not in log
    for stage in STAGES:
        train.main(train.parse(['--stage', stage, *how]))
        assert running.load_model(stage, 'runs', 'cpu').config.preset == 'rodin'
        last = json.loads((tmp_path / f'runs/{stage}.jsonl').read_text().splitlines()[-1])
        assert last['step'] == 2

    models = running.load_models()
    assert models['decoder'].config.decoder_layers == 4
    planes = rh.generate(models, 1).planes
    assert planes.shape == (1, 3, 8, 32, 32)
    assert planes.isfinite().all()


# Heights ------------------------------------------------------------------------------------------
@pytest.mark.parametrize('preset', rh.PRESETS)
@pytest.mark.parametrize('name', ['base_attention', 'base_aware'])
def test_a_height_that_does_not_occur_is_refused(preset, name):
    with pytest.raises(rh.Stop) as error:
        rh.make_config(preset, [f'{name}=24'])
    message = str(error.value)
    assert f'{name} names planes of height 24' in message
    assert '\n' not in message
    assert getattr(rh.make_config(preset, [f'{name}=0']), name) == (0,)


def test_aware_convolution_does_not_vanish_with_other_planes():
    """The base planes are made smaller, and the setting still names the old height."""
    with pytest.raises(rh.Stop, match=r'base_aware names planes of height 32; .* 16, 8, 4, 2;'):
        rh.make_config('small', ['base_resolution=16', 'base_attention=8,4,2'])


# The decoder of four layers -----------------------------------------------------------------------
def test_a_decoder_of_four_layers_is_one_of_five_with_the_identity_between():
    """ReLU of what ReLU left changes nothing; so the viewer, which has three layers of colour, is
    given the identity."""
    four = rh.Decoder(rh.make_config('tiny', ['decoder_layers=4']))
    five = rh.Decoder(rh.make_config('tiny'))
    five.sigma_net.load_state_dict(four.sigma_net.state_dict())
    five.color_net[0].weight.data = four.color_net[0].weight.data
    five.color_net[2].weight.data = torch.eye(32)
    five.color_net[4].weight.data = four.color_net[2].weight.data
    features = torch.randn(50, 8)
    dirs = torch.nn.functional.normalize(torch.randn(50, 3), dim=1)
    for a, b in zip(four(features, dirs), five(features, dirs)):
        assert torch.allclose(a, b, atol=1e-6)
    for a, b in zip(export.pack_decoder(four), export.pack_decoder(five)):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


# One layer that goes up ---------------------------------------------------------------------------
def test_one_layer_goes_up_from_the_lowest_level():
    """Of planes of 32: down over 16 to 8, and up to 32 by one layer; without, by two."""
    for once, factors in ((1, [4]), (0, [2, 2])):
        network = rh.UpsampleUNet(rh.make_config('tiny', [f'up_once={once}']))
        resizing = [x for x in network.decoder.modules() if isinstance(x, torch.nn.Upsample)]
        assert [x.scale_factor for x in resizing] == factors


def test_a_network_that_goes_up_at_once_learns():
    """Every parameter of it has a gradient, and it begins as the identity where asked."""
    config = rh.make_config('tiny', ['up_once=1', 'up_mult=1,2,2'])
    network = rh.UpsampleUNet(config)
    maps = [torch.randn(2, c, p, p) for c, p in rh.feature_shapes(config)[1]]
    portrait = rh.Portrait(torch.randn(2, 4, 8, 8), maps, lr=torch.rand(2, 3, 8, 8, 8))
    x = torch.randn(2, 3, 8, 32, 32)
    t = torch.tensor([3.0, 700.0])
    lr = rh.roll_in(network.condition(portrait).lr)
    assert torch.allclose(network(x, t, portrait), lr, atol=1e-5)

    for p in network.parameters():  # what starts at zero hides what is before it
        torch.nn.init.normal_(p, std=0.1)
    network(x, t, portrait).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert not without
    assert torch.isfinite(network(x, t, portrait)).all()


def test_one_level_has_nothing_to_go_up():
    network = rh.UpsampleUNet(rh.make_config('tiny', ['up_once=1', 'up_mult=1']))
    assert not [x for x in network.modules() if isinstance(x, torch.nn.Upsample)]


# Patches of the face ------------------------------------------------------------------------------
def patches_of(data, monkeypatch, front, count):
    """Patches of 16 pixels of avatar_0000, whose views are drawn in turn, at their full size."""
    folder = scenes.list_avatars(data)[0]
    box = scenes.read_box(folder)
    picks = itertools.count()

    def next_view(folder, path, p):
        return scenes.load_views(folder, 'train', box, pick=next(picks))

    monkeypatch.setattr(batches, 'random_view', next_view)
    return [batches.random_patch(folder, None, 16, front) for _ in range(count)]


@pytest.mark.parametrize('front', [0.0, 1.0])
def test_patches_are_of_the_face_as_often_as_asked(data, monkeypatch, front):
    """Of a patch of the face the rays meet it, and come from in front."""
    face = torch.tensor(batches.FACE)
    near = 0
    for patch in patches_of(data, monkeypatch, front, 12):
        assert patch['rgb'].shape == (3, 16, 16)
        to_face = face - patch['rays_o']
        along = (to_face * patch['rays_d']).sum(-1, keepdim=True)
        distance = (to_face - along * patch['rays_d']).norm(dim=-1)
        near += bool(distance.min() < 0.1) and bool(patch['rays_o'][0, 0, 1] < face[1])
    assert near == 12 if front else near < 10
