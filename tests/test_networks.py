"""VAE, 3D-aware convolution and U-Nets: parameter counts, plain forms, published weight files."""
import pytest
import torch
import torch.nn.functional as F

import rodinhd as rh
import running
import shortcuts
from references import naive_aware_conv

BASE_PARAMETERS = 366_823_360
UPSAMPLE_PARAMETERS = 337_301_920
RELEASED_UPSAMPLE_PARAMETERS = 320_557_728  # its tokens are Linear(64, 512) on the latent's patches
VAE_PARAMETERS = 83_653_863

TIMES = torch.tensor([10.0, 900.0])
PLAIN = ['components=0', 'aligned=0', 'base_aligned=0']  # no shortcuts
BUILDS = [shortcuts.base_network, shortcuts.upsample_network]


def count(module):
    return sum(p.numel() for p in module.parameters())


def count_layers(network, kind):
    return sum(isinstance(layer, kind) for layer in network.modules())


def portrait_of(config, n=2):
    """A random Portrait of n, with low-resolution planes."""
    P = config.portrait
    r = config.base_resolution
    widths = config.vae_widths[:3]
    maps = [torch.randn(n, width, P >> i, P >> i) for i, width in enumerate(widths, start=1)]
    low = torch.randn(n, 3, config.channels, r, r)
    return rh.Portrait(torch.randn(n, 4, P // 8, P // 8), maps, low)


def part_of(portrait, rows):
    """Some rows of a Portrait."""
    maps = [y[rows] for y in portrait.maps]
    return rh.Portrait(portrait.latent[rows], maps, portrait.lr[rows])


def planes_for(network, n=2):
    """Random planes of the size that a network takes."""
    config = network.config
    is_base = isinstance(network, rh.BaseUNet)
    size = config.base_resolution if is_base else config.resolution
    return torch.randn(n, 3, config.channels, size, size)


def shaken(network, std=0.15):
    """The network with random weights: layers that start at zero, too, shall take part in what a
    test compares."""
    for p in network.parameters():
        torch.nn.init.normal_(p, std=std)
    return network


# The papers' sizes --------------------------------------------------------------------------------
@pytest.mark.parametrize('package', [rh, shortcuts])
def test_paper_networks_have_the_papers_parameters(package):
    """`paper` has no shortcut: what is picked for it are the networks of rodinhd.py themselves."""
    build_base = rh.BaseUNet
    build_upsample = rh.UpsampleUNet
    if package is shortcuts:
        build_base, build_upsample = BUILDS
    with torch.device('meta'):
        base = build_base(rh.Config())
        upsample = build_upsample(rh.Config())

    assert type(base) is rh.BaseUNet
    assert type(upsample) is rh.UpsampleUNet
    assert count_layers(base, shortcuts.Prior) == count_layers(upsample, shortcuts.Prior) == 0

    assert count(base) == BASE_PARAMETERS
    assert count(upsample) == UPSAMPLE_PARAMETERS
    y1 = count(upsample.tokens)
    assert count(upsample) - y1 + (64 * 512 + 512) == RELEASED_UPSAMPLE_PARAMETERS


# The VAE ------------------------------------------------------------------------------------------
def resnet(prefix, c_in, c_out):
    names = {
        f'{prefix}.norm1': (c_in,),
        f'{prefix}.conv1': (c_out, c_in, 3, 3),
        f'{prefix}.norm2': (c_out,),
        f'{prefix}.conv2': (c_out, c_out, 3, 3),
    }
    if c_in != c_out:
        names[f'{prefix}.conv_shortcut'] = (c_out, c_in, 1, 1)
    return names


def published_half(side, widths, layers, c_first, c_last):
    """Shapes of the encoder's or the decoder's weights; widths from its first block to its last."""
    down = side == 'encoder'
    blocks = 'down_blocks' if down else 'up_blocks'
    samplers = 'downsamplers' if down else 'upsamplers'
    c = widths[0]
    weights = {f'{side}.conv_in': (c, c_first, 3, 3)}
    for i, width in enumerate(widths):
        block = f'{side}.{blocks}.{i}'
        for j in range(layers):
            weights |= resnet(f'{block}.resnets.{j}', c, width)
            c = width
        if i < 3:
            weights[f'{block}.{samplers}.0.conv'] = (c, c, 3, 3)

    bottom = widths[-1] if down else widths[0]
    for j in range(2):
        weights |= resnet(f'{side}.mid_block.resnets.{j}', bottom, bottom)
    attention = f'{side}.mid_block.attentions.0'
    weights[f'{attention}.group_norm'] = (bottom,)
    for name in ('to_q', 'to_k', 'to_v', 'to_out.0'):
        weights[f'{attention}.{name}'] = (bottom, bottom)

    weights[f'{side}.conv_norm_out'] = (c,)
    weights[f'{side}.conv_out'] = (c_last, c, 3, 3)
    return weights


def published_vae(widths=(128, 256, 512, 512), layers=2, latent=4):
    """Names and shapes of AutoencoderKL's tensors, as its published files have them, written out
    independently of our class."""
    weights = {
        **published_half('encoder', widths, layers, 3, 2 * latent),
        **published_half('decoder', widths[::-1], layers + 1, latent, 3),
        'quant_conv': (2 * latent, 2 * latent, 1, 1),
        'post_quant_conv': (latent, latent, 1, 1),
    }
    shapes = {f'{name}.weight': shape for name, shape in weights.items()}
    shapes |= {f'{name}.bias': shape[:1] for name, shape in weights.items()}
    return shapes


def random_weights(shapes):
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def as_until_2023(state):
    """Weights by the names that files had until 2023, with 1 x 1 convolutions in attention."""
    names = {
        'attentions.0.to_q.': 'attentions.0.query.',
        'attentions.0.to_k.': 'attentions.0.key.',
        'attentions.0.to_v.': 'attentions.0.value.',
        'attentions.0.to_out.0.': 'attentions.0.proj_attn.',
    }
    old = {}
    for name, x in state.items():
        for new, before in names.items():
            if new in name:
                name = name.replace(new, before)
                if x.ndim == 2:
                    x = x[..., None, None]
        old[name] = x
    return old


def test_vae_has_the_published_names_and_shapes():
    with torch.device('meta'):
        vae = rh.VAE(rh.Config())
    assert {n: tuple(p.shape) for n, p in vae.state_dict().items()} == published_vae()
    assert len(published_vae()) == 248
    assert count(vae) == VAE_PARAMETERS


@pytest.mark.parametrize('suffix', ['safetensors', 'bin'])
def test_vae_loads_published_files(tmp_path, tiny, suffix):
    state = random_weights(published_vae(tiny.vae_widths, tiny.vae_layers))
    path = tmp_path / f'vae.{suffix}'
    if suffix == 'safetensors':
        pytest.importorskip('safetensors.torch').save_file(state, path)
    else:
        torch.save(as_until_2023(state), path)
    vae = running.load_vae(path, tiny)
    assert all(torch.equal(p, state[n]) for n, p in vae.state_dict().items())


def test_vae_that_does_not_fit_is_refused_in_one_line(tmp_path, tiny):
    torch.save(random_weights(published_vae((8, 8, 8, 8), 1)), tmp_path / 'vae.bin')
    reason = r'not weights of this VAE .RuntimeError: .*Missing key'
    with pytest.raises(rh.Stop, match=reason) as stopped:
        running.load_vae(tmp_path / 'vae.bin', tiny)
    assert '\n' not in str(stopped.value)


def test_sdxl_vae_file_round_trip(tmp_path):
    """A file in the published format and size (SDXL, fp16): no missing, no unexpected key."""
    save_file = pytest.importorskip('safetensors.torch').save_file
    shapes = published_vae()
    state = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    save_file(state, tmp_path / 'vae.safetensors')
    vae = running.load_vae(tmp_path / 'vae.safetensors', rh.Config())
    assert count(vae) == VAE_PARAMETERS


def test_vae_maps(tiny):
    vae = rh.VAE(tiny)
    mean, logvar, maps = vae.encode(torch.randn(2, 3, 64, 64))
    assert mean.shape == logvar.shape == (2, 4, 8, 8)
    assert [tuple(y.shape[1:]) for y in maps] == [(8, 32, 32), (8, 16, 16), (16, 8, 8)]
    assert vae.decode(mean).shape == (2, 3, 64, 64)

    # What the layers that take these in are told
    latent, shapes = rh.feature_shapes(tiny)
    assert latent == (4, 8)
    assert shapes == [(8, 32), (8, 16), (16, 8)]


# 3D-aware convolution -----------------------------------------------------------------------------
@pytest.mark.parametrize('H', [2, 3, 8])
@pytest.mark.parametrize('form', ['plain', 'naive'])
def test_aware_convolution_equals_its_plain_forms(H, form):
    """Values and gradients are those of `plain`, and of a form that tests write out by plane."""
    conv = rh.AwareConv(4, 5)
    assert conv(torch.randn(1, 4, H, 3 * H)).abs().max() == 0
    shaken(conv, std=1.0)
    x = torch.randn(2, 4, H, 3 * H, requires_grad=True)
    ours = conv(x)
    theirs = conv.plain(x) if form == 'plain' else naive_aware_conv(x, conv)
    assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max().item())

    weight = torch.randn_like(ours)
    leaves = [x, *conv.parameters()]
    a = torch.autograd.grad((ours * weight).sum(), leaves)
    b = torch.autograd.grad((theirs * weight).sum(), leaves)
    for our_gradient, their_gradient in zip(a, b, strict=True):
        atol = 1e-5 * their_gradient.abs().max().item()
        assert torch.allclose(our_gradient, their_gradient, atol=atol)


@pytest.mark.parametrize('axis', range(3))
def test_aware_convolution_lines_up_world_axes(axis):
    """A field that depends on one world axis looks the same in every plane that has this axis: seen
    through the auxiliary channels of a centre-tap convolution, plane p shows what plane q holds,
    along the axis that they share."""
    ramp = torch.linspace(-1, 1, 6)
    planes = torch.zeros(1, 3, 1, 6, 6)
    for k, (u, v) in enumerate(rh.AXES):
        if axis == u:
            planes[0, k, 0] = ramp.expand(6, 6)
        if axis == v:
            planes[0, k, 0] = ramp[:, None].expand(6, 6)

    conv = rh.AwareConv(1, 1)
    pairs = [(p, q) for p in range(3) for q in range(3) if p != q]
    for p, q in pairs:
        if axis not in rh.AXES[p] or axis not in rh.AXES[q]:
            continue
        for own in conv.convs:
            own.weight.data.zero_()
        conv.convs[p].weight.data[0, q, 1, 1] = 1.0
        out = rh.roll_in(conv(rh.roll_out(planes)))
        assert torch.allclose(out[:, p], planes[:, p], atol=1e-6)


# The networks -------------------------------------------------------------------------------------
@pytest.mark.parametrize('build', BUILDS)
def test_networks_use_their_condition_cache_it_and_compile(tiny, build):
    network = shaken(build(tiny))
    portrait = portrait_of(tiny)
    x = planes_for(network)
    out = network(x, TIMES, portrait)
    outputs = 2 if build is shortcuts.base_network else 1  # x_start, and with it a variance
    assert out.shape == (2, 3, outputs * tiny.channels, *x.shape[3:])
    assert torch.allclose(out, network(x, TIMES, network.condition(portrait)), atol=1e-5)

    # Any batch size
    alone = network(x[1:], TIMES[1:], part_of(portrait, slice(1, None)))
    assert torch.allclose(out[1:], alone, atol=1e-3)

    # The portrait, and each of its maps, makes a difference
    assert not torch.allclose(out, network(x, TIMES, rh.drop(portrait)), atol=1e-4)
    for i in range(len(network.maps)):
        maps = list(portrait.maps)
        maps[i] = torch.randn_like(maps[i])
        other = network(x, TIMES, portrait._replace(maps=maps))
        assert not torch.allclose(out, other, atol=1e-5)

    # One graph without a break; no compiler. Two levels have layers of all kinds
    levels = ['base_mult=1,1', 'base_attention=8,4', 'up_mult=1,2']
    network = shaken(build(rh.make_config('tiny', levels)))
    out = network(x, TIMES, portrait)
    network.compile(backend='eager', fullgraph=True)
    assert torch.allclose(out, network(x, TIMES, portrait), atol=1e-5)


@pytest.mark.parametrize('build', BUILDS)
@pytest.mark.parametrize('settings', [[], ['components=0'], PLAIN])
def test_two_conditions_are_joined_with_all_that_they_hold(tiny, build, settings):
    """A network sees in one batch what it sees in two, whatever its shortcuts add."""
    config = rh.make_config('tiny', settings)
    network = shaken(build(config))
    both = portrait_of(config)
    conditions = [network.condition(part_of(both, slice(i, i + 1))) for i in (0, 1)]
    joined = rh.join(*conditions)
    assert type(joined) is type(conditions[0])
    for name, value in vars(conditions[0]).items():
        assert (value is None) == (getattr(joined, name) is None)

    x = planes_for(network)
    parts = [
        network(x[i:i + 1], TIMES[i:i + 1], condition) for i, condition in enumerate(conditions)
    ]
    assert torch.allclose(network(x, TIMES, joined), torch.cat(parts), atol=1e-3)


def test_dropping_zeroes_latent_and_maps_together(tiny):
    dropped = rh.drop(portrait_of(tiny), torch.tensor([True, False]))
    for x in (dropped.latent, *dropped.maps):
        assert x[0].abs().sum() > 0
        assert x[1].abs().sum() == 0
    assert dropped.lr[1].abs().sum() > 0


@pytest.mark.parametrize('build', [rh.UpsampleUNet, shortcuts.upsample_network])
def test_upsampler_starts_as_the_enlarged_planes(tiny, build):
    """It does with identity_start, and not without."""
    portrait = portrait_of(tiny)
    x = torch.randn(2, 3, 8, 32, 32)
    lr = F.interpolate(portrait.lr.flatten(1, 2), size=32, mode='bicubic', align_corners=True)
    assert torch.allclose(build(tiny)(x, TIMES, portrait).flatten(1, 2), lr, atol=1e-6)

    network = build(rh.make_config('tiny', ['identity_start=0']))
    assert not torch.allclose(network(x, TIMES, portrait).flatten(1, 2), lr, atol=1e-2)


def test_recomputing_activations_changes_nothing(tiny):
    network = shaken(shortcuts.upsample_network(tiny))
    portrait = portrait_of(tiny)
    x = torch.randn(2, 3, 8, 32, 32)
    gradients = []
    for recompute in (False, True):
        network.checkpoint = recompute
        network.zero_grad()
        network(x, TIMES, portrait).square().mean().backward()
        learning = [p for p in network.parameters() if p.requires_grad]
        gradients.append([p.grad.clone() for p in learning])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_a_sampled_portrait_is_projected_to_keys_and_values_once(tiny, monkeypatch):
    network = shaken(shortcuts.base_network(tiny))
    calls = []
    project = rh.Attention.keys_values

    def recorded(self, tokens):
        calls.append(self)
        return project(self, tokens)

    monkeypatch.setattr(rh.Attention, 'keys_values', recorded)
    rh.sample_stage('base', network, portrait_of(tiny), steps=5)
    attentions = [layer for layer in network.modules() if isinstance(layer, rh.Attention)]
    cross = [layer for layer in attentions if layer.kv]
    assert len(calls) == len(set(calls)) == len(cross) > 2


@pytest.mark.parametrize(('drop', 'same'), [(1.0, True), (0.2, False)])
def test_a_network_that_was_never_shown_a_portrait_sees_none(tiny, drop, same):
    """Trained with condition_drop=1, its layers for portraits are as they began."""
    config = rh.make_config('tiny', [f'condition_drop={drop}', 'sample_steps=1'])
    models = {}
    for kind, (build, _) in running.MODELS.items():
        models[kind] = shaken(build(config))
        models[kind].config = config
    images = torch.rand(2, 1, 3, tiny.portrait, tiny.portrait)
    a, b = (rh.generate(models, image).planes for image in images)
    assert torch.equal(a, b) == same


@pytest.mark.parametrize(
    'setting',
    ['roll_out=1', 'roll_out=0', 'base_aware=0', 'up_aware=0', 'tokens=single', 'tokens=none'],
)
def test_what_ablations_switch_off_is_not_there(tiny, setting):
    """No layer of it is left, networks take and give planes as before, and the upsample network
    starts from the enlarged planes."""
    config = rh.make_config('tiny', [*PLAIN, setting])
    base, upsample = (build(config) for build in BUILDS)
    assert type(base) is rh.BaseUNet
    assert type(upsample) is rh.UpsampleUNet

    portrait = portrait_of(tiny, 1)
    t = torch.tensor([500.0])
    assert base(planes_for(base, 1), t, portrait).shape == (1, 3, 16, 8, 8)
    enlarged = rh.roll_in(upsample.condition(portrait).lr)
    assert torch.allclose(upsample(planes_for(upsample, 1), t, portrait), enlarged, atol=1e-5)

    plain_base = setting in ('roll_out=0', 'base_aware=0')
    assert (count_layers(base, rh.AwareConv) == 0) == plain_base
    assert (count_layers(upsample, rh.AwareConv) == 0) == (setting == 'up_aware=0')

    attentions = [layer for layer in base.modules() if isinstance(layer, rh.Attention)]
    seen = {layer.map for layer in attentions} - {None}
    assert seen == {'tokens=single': {2}, 'tokens=none': set()}.get(setting, {0, 1, 2})
    assert attentions
    assert (count_layers(upsample, rh.Attention) == 0) == (setting == 'tokens=none')


# The shortcuts ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ('settings', 'base', 'upsample'),
    [
        ([], shortcuts.BaseUNet, shortcuts.UpsampleUNet),
        (['components=0'], shortcuts.BaseUNet, shortcuts.UpsampleUNet),
        (['components=0', 'base_aligned=0'], rh.BaseUNet, shortcuts.UpsampleUNet),
        (['aligned=0', 'base_aligned=0'], shortcuts.BaseUNet, shortcuts.UpsampleUNet),
        (['base_predict=noise', 'base_aligned=0'], rh.BaseUNet, shortcuts.UpsampleUNet),
        (PLAIN, rh.BaseUNet, rh.UpsampleUNet),
    ],
)
def test_networks_have_the_shortcuts_that_are_asked_for(settings, base, upsample):
    config = rh.make_config('tiny', settings)
    assert type(shortcuts.base_network(config)) is base
    assert type(shortcuts.upsample_network(config)) is upsample


def test_the_prior_learns_planes_of_few_components(tiny):
    """Planes that are a mean and two patterns come back from their weights; a third component stays
    empty."""
    mean = torch.randn(3, 8, 8, 8) * 0.2
    patterns = torch.randn(2, 3, 8, 8, 8) * 0.1
    shares = torch.randn(6, 2).tolist()
    planes = [mean + a * patterns[0] + b * patterns[1] for a, b in shares]
    prior = shortcuts.Prior(tiny, 8, 3)
    prior.learn(planes)

    basis = prior.components.flatten(1)[:2]
    lacking = (torch.stack(planes) - prior.mean).flatten(1)
    weights = torch.linalg.lstsq(basis.T, lacking.T).solution
    assert (basis.T @ weights - lacking.T).abs().max() < 1e-5
    assert prior.components[2].abs().max() < 1e-5
    assert (weights.square().mean(1) - 1).abs().max() < 1e-4  # of unit deviation

    # A network that gives the weights of planes 4 gives planes 4
    last = prior.weights[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data.copy_(F.pad(weights[:, 4], (0, 1)))
    assert (prior(torch.randn(2, 4, 8, 8)) - planes[4]).abs().max() < 1e-5

    # Fewer avatars than components
    prior.learn(planes[:1])
    assert torch.equal(prior.mean[0], planes[0])
    assert prior.components.abs().max() < 1e-5


def test_networks_start_from_their_prior(tiny):
    """Before any training x_start is the prior; its planes are not trained, its weights are."""
    base = shortcuts.base_network(tiny)
    base.prior.mean.data.normal_()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    portrait = rh.encode_portrait(rh.VAE(tiny), images, tiny)
    out = base(torch.randn(2, 3, 8, 8, 8), torch.tensor([3.0, 900.0]), portrait)
    assert out.shape == (2, 3, 16, 8, 8)
    assert torch.equal(out[:, :, :8], base.prior(portrait.latent))
    assert not out[:, :, 8:].any()
    fixed = [name for name, p in base.named_parameters() if not p.requires_grad]
    assert fixed == ['prior.mean', 'prior.components']


def test_front_features_lie_where_the_portrait_shows_them(tiny):
    """Features that tell their own place in the image are found at the texels of the points that
    project there."""
    P = tiny.portrait
    R = 32
    pixel = (torch.arange(P // 2) + 0.5) * 2  # of y1, in pixels of the portrait
    row, column = torch.meshgrid(pixel, pixel, indexing='ij')
    y1 = torch.stack([column, row] + [column] * 6)[None]
    portrait = rh.Portrait(torch.zeros(1, 4, P // 8, P // 8), [y1])
    features = shortcuts.front_features(portrait, R)[0, 4:6]

    texel = torch.linspace(-1, 1, R)
    z, x = torch.meshgrid(texel, texel, indexing='ij')  # rows of the xz plane are z
    points = torch.stack([x, torch.full_like(x, -0.4), z], dim=-1).view(-1, 3)
    pose = rh.orbit_pose(0, 0)
    fx, fy, cx, cy = rh.intrinsics_of(34.0, P)
    local = (points - pose[:3, 3]) @ pose[:3, :3]
    across = cx - fx * local[:, 0] / local[:, 2]
    down = cy + fy * local[:, 1] / local[:, 2]
    pixels = torch.stack([across, down]).view(2, R, R)
    difference = (features - pixels)[:, 2:-2, 2:-2]
    assert difference.abs().max() < 1.5  # half a texel of y1 is a pixel
