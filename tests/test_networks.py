"""VAE, 3D-aware convolution and U-Nets: the papers' parameter counts, naive forms, published weight files."""
import pytest
import torch
import torch.nn.functional as F

import rodinhd as rh
import shortcuts
from references import naive_aware_conv


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_paper_networks_have_the_papers_parameters():
    with torch.device('meta'):
        base, upsample = rh.BaseUNet(rh.Config()), rh.UpsampleUNet(rh.Config())
    assert count(base) == 366_823_360
    y1 = count(upsample.tokens)                                         # released code: Linear(64, 512) on the latent's patches
    assert count(upsample) == 337_301_920 and count(upsample) - y1 + (64 * 512 + 512) == 320_557_728


def resnet(prefix, c_in, c_out):
    names = {f'{prefix}.norm1': (c_in,), f'{prefix}.conv1': (c_out, c_in, 3, 3), f'{prefix}.norm2': (c_out,),
             f'{prefix}.conv2': (c_out, c_out, 3, 3)}
    return names | ({f'{prefix}.conv_shortcut': (c_out, c_in, 1, 1)} if c_in != c_out else {})


def published_vae(widths=(128, 256, 512, 512), layers=2, latent=4):
    """Names and shapes of AutoencoderKL's tensors, as its published files have them, written out independently of our class."""
    top, bottom, weights = widths[0], widths[-1], {}
    for side, blocks, n in (('encoder', widths, layers), ('decoder', widths[::-1], layers + 1)):
        c = top if side == 'encoder' else bottom
        weights[f'{side}.conv_in'] = (c, 3 if side == 'encoder' else latent, 3, 3)
        for i, width in enumerate(blocks):
            block = f'{side}.{"down" if side == "encoder" else "up"}_blocks.{i}'
            for j in range(n):
                weights |= resnet(f'{block}.resnets.{j}', c, width)
                c = width
            if i < 3:
                weights[f'{block}.{"downsamplers" if side == "encoder" else "upsamplers"}.0.conv'] = (c, c, 3, 3)
        for j in range(2):
            weights |= resnet(f'{side}.mid_block.resnets.{j}', bottom, bottom)
        attention = f'{side}.mid_block.attentions.0'
        weights[f'{attention}.group_norm'] = (bottom,)
        weights |= {f'{attention}.{n}': (bottom, bottom) for n in ('to_q', 'to_k', 'to_v', 'to_out.0')}
        last = bottom if side == 'encoder' else top
        weights[f'{side}.conv_norm_out'] = (last,)
        weights[f'{side}.conv_out'] = (2 * latent if side == 'encoder' else 3, last, 3, 3)
    weights |= {'quant_conv': (2 * latent, 2 * latent, 1, 1), 'post_quant_conv': (latent, latent, 1, 1)}
    return {f'{n}.weight': s for n, s in weights.items()} | {f'{n}.bias': s[:1] for n, s in weights.items()}


def test_vae_has_the_published_names_and_shapes():
    with torch.device('meta'):
        vae = rh.VAE(rh.Config())
    assert {n: tuple(p.shape) for n, p in vae.state_dict().items()} == published_vae()
    assert len(published_vae()) == 248 and count(vae) == 83_653_863


@pytest.mark.parametrize('suffix', ['safetensors', 'bin'])
def test_vae_loads_published_files(tmp_path, tiny, suffix):
    state = {n: torch.randn(s) for n, s in published_vae(tiny.vae_widths, tiny.vae_layers).items()}
    path = tmp_path / f'vae.{suffix}'
    if suffix == 'safetensors':
        pytest.importorskip('safetensors.torch').save_file(state, path)
    else:                               # as files were until 2023: other names, 1 x 1 convolutions
        names = (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out.0', 'proj_attn'))
        old = {}
        for n, x in state.items():
            for new, before in names:
                if f'attentions.0.{new}.' in n:
                    n, x = n.replace(f'.{new}.', f'.{before}.'), x[..., None, None] if x.ndim == 2 else x
            old[n] = x
        torch.save(old, path)
    vae = rh.load_vae(path, tiny)
    assert all(torch.equal(p, state[n]) for n, p in vae.state_dict().items())


def test_vae_that_does_not_fit_is_refused_in_one_line(tmp_path, tiny):
    torch.save({n: torch.randn(s) for n, s in published_vae((8, 8, 8, 8), 1).items()}, tmp_path / 'vae.bin')
    with pytest.raises(SystemExit, match=r'not weights of this VAE .RuntimeError: .*Missing key'):
        rh.load_vae(tmp_path / 'vae.bin', tiny)


def test_sdxl_vae_file_round_trip(tmp_path):
    """A random file in the published format and size (SDXL, fp16): no missing, no unexpected key."""
    save_file = pytest.importorskip('safetensors.torch').save_file
    save_file({n: torch.zeros(s, dtype=torch.float16) for n, s in published_vae().items()}, tmp_path / 'vae.safetensors')
    vae = rh.load_vae(tmp_path / 'vae.safetensors', rh.Config())
    assert count(vae) == 83_653_863


def test_vae_maps(tiny):
    vae = rh.VAE(tiny)
    mean, logvar, maps = vae.encode(torch.randn(2, 3, 64, 64))
    assert mean.shape == logvar.shape == (2, 4, 8, 8)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 32, 32), (8, 16, 16), (16, 8, 8)]
    assert vae.decode(mean).shape == (2, 3, 64, 64)


@pytest.mark.parametrize('H', [2, 3, 8])
def test_aware_convolution_equals_the_naive_form(H):
    conv = rh.AwareConv(4, 5)
    for p in conv.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 4, H, 3 * H, requires_grad=True)
    ours, naive = conv(x), naive_aware_conv(x, conv)
    assert torch.allclose(ours, naive, atol=1e-5 * naive.abs().max().item())
    weight = torch.randn_like(ours)
    a = torch.autograd.grad((ours * weight).sum(), [x, *conv.parameters()])
    b = torch.autograd.grad((naive * weight).sum(), [x, *conv.parameters()])
    assert all(torch.allclose(i, j, atol=1e-5 * j.abs().max().item()) for i, j in zip(a, b))


@pytest.mark.parametrize('axis', range(3))
def test_aware_convolution_lines_up_world_axes(axis):
    """A field that depends on one world axis looks the same in every plane that has this axis: seen through the auxiliary channels of a
    centre-tap convolution, plane p shows what plane q holds, along the axis that they share."""
    ramp = torch.linspace(-1, 1, 6)
    planes = torch.zeros(1, 3, 1, 6, 6)
    for k, (u, v) in enumerate(rh.AXES):
        if axis in (u, v):
            planes[0, k, 0] = ramp.expand(6, 6) if axis == u else ramp[:, None].expand(6, 6)
    conv = rh.AwareConv(1, 1)
    for p in range(3):
        for q in range(3):
            if p != q and axis in rh.AXES[p] and axis in rh.AXES[q]:
                for c in conv.convs:
                    c.weight.data.zero_()
                conv.convs[p].weight.data[0, q, 1, 1] = 1.0
                out = rh.roll_in(conv(rh.roll_out(planes)))
                assert torch.allclose(out[:, p], planes[:, p], atol=1e-6)


def portrait_of(config, n=2):
    P = config.portrait
    maps = [torch.randn(n, w, P >> i, P >> i) for i, w in zip((1, 2, 3), config.vae_widths)]
    return rh.Portrait(torch.randn(n, 4, P // 8, P // 8), maps, torch.randn(n, 3, config.channels, *[config.base_resolution] * 2))


def shaken(net):
    """Zero-initialised layers, too, take part in what a test compares."""
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return net


@pytest.mark.parametrize('build', [rh.BaseUNet, rh.UpsampleUNet])
def test_networks_use_their_condition_cache_it_and_compile(tiny, build):
    net, portrait, t = shaken(build(tiny)), portrait_of(tiny), torch.tensor([10.0, 900.0])
    size = tiny.base_resolution if build is rh.BaseUNet else tiny.resolution
    x = torch.randn(2, 3, tiny.channels, size, size)
    out = net(x, t, portrait)
    assert out.shape == (2, 3, tiny.channels * (2 if build is rh.BaseUNet else 1), size, size)
    assert torch.allclose(out, net(x, t, net.condition(portrait)), atol=1e-5)
    assert torch.allclose(out[1:], net(x[1:], t[1:], rh.Portrait(portrait.latent[1:], [m[1:] for m in portrait.maps], portrait.lr[1:])),
                          atol=1e-3)                                    # any batch size
    assert not torch.allclose(out, net(x, t, rh.drop(portrait)), atol=1e-4)
    for i, m in enumerate(portrait.maps[:len(net.maps)]):
        other = [torch.randn_like(m) if j == i else n for j, n in enumerate(portrait.maps)]
        assert not torch.allclose(out, net(x, t, portrait._replace(maps=other)), atol=1e-5)
    net.compile(backend='eager', fullgraph=True)                        # one graph without a break; needs no compiler
    assert torch.allclose(out, net(x, t, portrait), atol=1e-5)


def test_dropping_zeroes_latent_and_maps_together(tiny):
    dropped = rh.drop(portrait_of(tiny), torch.tensor([True, False]))
    for x in (dropped.latent, *dropped.maps):
        assert x[0].abs().sum() > 0 and x[1].abs().sum() == 0
    assert dropped.lr[1].abs().sum() > 0


def test_upsampler_starts_as_the_enlarged_planes(tiny):
    portrait = portrait_of(tiny)
    out = rh.UpsampleUNet(tiny)(torch.randn(2, 3, 8, 32, 32), torch.tensor([10.0, 900.0]), portrait)
    lr = F.interpolate(portrait.lr.flatten(1, 2), size=32, mode='bicubic', align_corners=True)
    assert torch.allclose(out.flatten(1, 2), lr, atol=1e-6)


def test_recomputing_activations_changes_nothing(tiny):
    net, portrait, t = shaken(rh.UpsampleUNet(tiny)), portrait_of(tiny), torch.tensor([10.0, 900.0])
    x, grads = torch.randn(2, 3, 8, 32, 32), []
    for net.checkpoint in (False, True):
        net.zero_grad()
        net(x, t, portrait).square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_a_sampled_portrait_is_projected_to_keys_and_values_once(tiny, monkeypatch):
    net, portrait, calls = shaken(rh.BaseUNet(tiny)), portrait_of(tiny), []
    project = rh.Attention.keys_values
    monkeypatch.setattr(rh.Attention, 'keys_values', lambda self, tokens: calls.append(self) or project(self, tokens))
    rh.sample_stage('base', net, portrait, steps=5)
    cross = [layer for layer in net.modules() if isinstance(layer, rh.Attention) and layer.kv]
    assert len(calls) == len(set(calls)) == len(cross) > 2


def test_a_network_that_was_never_shown_a_portrait_sees_none(tiny):
    """Trained with condition_drop=1, its layers for portraits are as they began."""
    for drop, same in ((1.0, True), (0.2, False)):
        config = rh.make_config('tiny', [f'condition_drop={drop}', 'sample_steps=1'])
        models = {kind: build(config) for kind, (build, _) in rh.MODELS.items()}
        for model in models.values():
            model.config = config
            shaken(model)
        a, b = (rh.generate(models, x)[0] for x in torch.rand(2, 1, 3, tiny.portrait, tiny.portrait))
        assert torch.equal(a, b) == same


def test_what_ablations_switch_off_is_not_there(tiny):
    """No layer of it is left, networks take and give planes as before, and the upsample network starts from the enlarged planes."""
    def count(net, kind):
        return sum(isinstance(layer, kind) for layer in net.modules())
    portrait, t = portrait_of(tiny, 1), torch.tensor([500.0])
    nets = {s: [build(rh.make_config('tiny', ['components=0', 'aligned=0', s])) for build in (rh.BaseUNet, rh.UpsampleUNet)]
            for s in ('roll_out=1', 'roll_out=0', 'base_aware=0', 'up_aware=0', 'tokens=single', 'tokens=none')}
    for name, (base, up) in nets.items():
        assert base(torch.randn(1, 3, 8, 8, 8), t, portrait).shape == (1, 3, 16, 8, 8)
        assert torch.allclose(up(torch.randn(1, 3, 8, 32, 32), t, portrait), rh.roll_in(up.condition(portrait).lr), atol=1e-5)
        assert (count(base, rh.AwareConv) == 0) == (name in ('roll_out=0', 'base_aware=0'))
        assert (count(up, rh.AwareConv) == 0) == (name == 'up_aware=0')
        seen = {layer.map for layer in base.modules() if isinstance(layer, rh.Attention)} - {None}
        assert seen == {'tokens=single': {2}, 'tokens=none': set()}.get(name, {0, 1, 2})
        assert (count(up, rh.Attention) == 0) == (name == 'tokens=none') and count(base, rh.Attention) > 0


def test_the_prior_learns_planes_of_few_components(tiny):
    """Planes that are a mean and two patterns come back from their weights; a third component stays empty."""
    mean, patterns = torch.randn(3, 8, 8, 8) * 0.2, torch.randn(2, 3, 8, 8, 8) * 0.1
    planes = [mean + a * patterns[0] + b * patterns[1] for a, b in torch.randn(6, 2).tolist()]
    prior = shortcuts.Prior(tiny, 8, 3)
    prior.learn(planes)
    basis, lacking = prior.components.flatten(1)[:2], torch.stack(planes) - prior.mean
    weights = torch.linalg.lstsq(basis.T, lacking.flatten(1).T).solution
    assert (basis.T @ weights - lacking.flatten(1).T).abs().max() < 1e-5 and prior.components[2].abs().max() < 1e-5
    assert (weights.square().mean(1) - 1).abs().max() < 1e-4            # of unit deviation
    torch.nn.init.zeros_(prior.weights[-1].weight)
    prior.weights[-1].bias.data.copy_(weights[:, 4].tolist()[0] * torch.eye(3)[0] + weights[1, 4] * torch.eye(3)[1])
    assert (prior(torch.randn(2, 4, 8, 8)) - planes[4]).abs().max() < 1e-5
    prior.learn(planes[:1])                                             # fewer avatars than components
    assert torch.equal(prior.mean[0], planes[0]) and prior.components.abs().max() < 1e-5


def test_networks_start_from_their_prior(tiny):
    """Before any training x_start is the prior; its two planes' parameters are not trained, its weights are."""
    base = rh.BaseUNet(tiny)
    base.prior.mean.data.normal_()
    portrait = rh.encode_portrait(rh.VAE(tiny), torch.rand(2, 3, 64, 64) * 2 - 1, tiny)
    out = base(torch.randn(2, 3, 8, 8, 8), torch.tensor([3.0, 900.0]), portrait)
    assert out.shape == (2, 3, 16, 8, 8) and torch.equal(out[:, :, :8], base.prior(portrait.latent)) and not out[:, :, 8:].any()
    assert [n for n, p in base.named_parameters() if not p.requires_grad] == ['prior.mean', 'prior.components']


def test_front_features_lie_where_the_portrait_shows_them(tiny):
    """Features that tell their own place in the image are found at the texels of the points that project there."""
    P, R = tiny.portrait, 32
    y, x = torch.meshgrid(*[(torch.arange(P // 2) + 0.5) * 2] * 2, indexing='ij')                       # of y1, in pixels of the portrait
    y1 = torch.stack([x, y] + [x] * 6)[None]
    features = shortcuts.front_features(rh.Portrait(torch.zeros(1, 4, P // 8, P // 8), [y1]), R)[0, 4:6]
    at = torch.linspace(-1, 1, R)
    z, x = torch.meshgrid(at, at, indexing='ij')                                                        # rows of the xz plane are z
    points = torch.stack([x, torch.full_like(x, -0.4), z], dim=-1).view(-1, 3)
    pose, (fx, fy, cx, cy) = rh.orbit_pose(0, 0), rh.intrinsics_of(34.0, P)
    local = (points - pose[:3, 3]) @ pose[:3, :3]
    pixels = torch.stack([cx - fx * local[:, 0] / local[:, 2], cy + fy * local[:, 1] / local[:, 2]]).view(2, R, R)
    assert (features - pixels)[:, 2:-2, 2:-2].abs().max() < 1.5                                         # half a texel of y1 is a pixel
