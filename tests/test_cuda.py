"""Everything that runs on a GPU, on it and on the CPU: the same numbers, in fp32 and bf16, compiled
and not. Skipped where there is no GPU; RODINHD_DEVICE=cpu runs it against the CPU itself, which
tests the tests."""
import functools
import os

import pytest
import torch

import batches
import fit
import metrics
import provenance
import rodinhd as rh
import running
import scenes
import together
import train

DEVICE = os.environ.get('RODINHD_DEVICE', 'cuda')
pytestmark = pytest.mark.skipif(
    DEVICE == 'cuda' and not torch.cuda.is_available(), reason='needs a CUDA GPU'
)


@pytest.fixture(autouse=True)
def exact():
    """Matrix products and convolutions in fp32, not in TF32, which start() allows."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def on(device, x):
    """Tensors and modules, in lists and dicts too, on a device."""
    if isinstance(x, (list, tuple)):
        return type(x)(*(on(device, y) for y in x)) if hasattr(x, '_fields') else [
            on(device, y) for y in x]
    return x.to(device) if hasattr(x, 'to') else x


def differ(work, *inputs):
    """The largest difference of work(*inputs) on the two devices, over the largest value."""
    ours, theirs = (work(*on(device, list(inputs))).detach().cpu().float()
                    for device in (DEVICE, 'cpu'))
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))


def gradient_of(work):
    """A function that returns the gradient of the sum of squares of work(x, ...) in x."""
    def gradient(x, *more):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(work(x, *more).square().sum(), x)[0]
    return gradient


def camera_rays(n=512):
    side = int(n ** 0.5)
    return rh.view_rays(rh.orbit_pose(30, 10), rh.intrinsics_of(34.0, side), side, side)


# Planes and rendering -----------------------------------------------------------------------------
@pytest.mark.parametrize(('C', 'R', 'points'), [(8, 32, 5000), (16, 128, 20000)])
@pytest.mark.parametrize('channels_last', [False, True])
def test_look_ups(C, R, points, channels_last):
    planes = torch.randn(3, C, R, R)
    if channels_last:
        planes = planes.contiguous(memory_format=torch.channels_last)
    x = 2.2 * torch.rand(points, 3) - 1.1
    for work in (rh.sample_planes_plainly, rh.sample_planes_by_rows):
        assert differ(work, planes, x) < 1e-4
        assert differ(gradient_of(work), planes, x) < 1e-3


def field_and_grid(planes, decoder, config):
    field = rh.PlaneField(planes, decoder)
    return field, rh.grid_for(field, config, planes.device)


@pytest.mark.parametrize('cull', [False, True])
def test_march_and_composite(tiny, cull):
    rays = camera_rays()

    def rendered(planes, decoder, rays_o, rays_d):
        field, grid = field_and_grid(planes, decoder, tiny)
        return rh.render(field, rays_o, rays_d, tiny.steps, grid, cull=cull).rgb

    planes = 0.5 * torch.randn(3, tiny.channels, tiny.resolution, tiny.resolution)
    assert differ(rendered, planes, rh.Decoder(tiny), *rays) < 2e-3


def test_losses(tiny):
    planes = torch.randn(3, 8, 32, 32)
    assert differ(gradient_of(rh.total_variation), planes) < 1e-5
    assert differ(lambda x: batches.blur(x).mean((0, 2, 3)), planes) < 2  # random on each device

    diffusion = rh.diffusion_of('base', tiny)
    x = torch.rand(4, 3, 8, 8, 8) * 2 - 1
    noise = torch.randn(4, 3, 8, 8, 8)

    def loss(x, noise, t):
        terms, _ = diffusion.loss(lambda x, t, _: torch.cat([x, x], 2), x, t, noise)
        return torch.stack(list(terms.values()))

    assert differ(loss, x, noise, torch.tensor([0, 1, 500, 999])) < 1e-4


def test_a_fit(data, tiny):
    """Twenty steps on either device; what they leave differs by rounding that they amplify."""
    folder = scenes.list_avatars(data)[0]
    views = scenes.load_views(folder, 'train', scenes.read_box(folder))
    seen = {}
    for device in (DEVICE, 'cpu'):
        torch.manual_seed(0)
        decoder = rh.Decoder(tiny).to(device)
        start = rh.new_planes(decoder, tiny, torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-3, fused=True)
        joint = rh.Joint(optimizer, None, lambda: None)
        visit = rh.fit_avatar(views, start, decoder, tiny, rh.by_steps(20), joint=joint)
        assert visit.planes.isfinite().all()
        seen[device] = visit.planes.cpu()
    assert (seen[DEVICE] - seen['cpu']).abs().mean() < 0.02


def test_a_fit_of_many(data, tiny):
    """Fifty steps of two avatars at once show as much as on the CPU."""
    folders = scenes.list_avatars(data)
    views = [scenes.load_views(folder, 'train', scenes.read_box(folder)) for folder in folders]
    prepared = [rh.prepare(x, tiny, 'cpu', decoder_learns=False) for x in views]
    seen = {DEVICE: [], 'cpu': []}
    for device, lost in seen.items():
        torch.manual_seed(0)
        decoder = rh.Decoder(tiny).to(device).requires_grad_(False)
        start = rh.new_planes(decoder, tiny, torch.Generator().manual_seed(0))
        report = functools.partial(keep_loss, lost)
        together.fit(prepared, start, decoder, tiny, 51, report=report)
    assert abs(seen[DEVICE][-1] / seen['cpu'][-1] - 1) < 0.15


def keep_loss(lost, done, terms):
    lost.append(terms['rgb'])


# Networks -----------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', ['vae', 'base', 'upsample'])
@pytest.mark.parametrize('bf16', [False, True])
def test_networks(tiny, kind, bf16, compiled=False):
    torch.manual_seed(0)
    network = running.build(kind, tiny)
    for p in network.parameters():  # no branch starts at zero
        torch.nn.init.normal_(p, std=0.1)
    (channels, pixels), maps = rh.feature_shapes(tiny)
    images = torch.rand(2, 3, tiny.portrait, tiny.portrait)
    size = tiny.base_resolution if kind == 'base' else tiny.resolution
    x = torch.randn(2, 3, tiny.channels, size, size)
    low = torch.randn(2, 3, tiny.channels, tiny.base_resolution, tiny.base_resolution)
    seen = [torch.randn(2, c, p, p) for c, p in maps]
    latent = torch.randn(2, channels, pixels, pixels)

    def forward(network, images, x, latent, low, *seen):
        if compiled and images.device.type != 'cpu':
            network = torch.compile(network)
        enabled = bf16 and images.device.type == DEVICE
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=enabled):
            if kind == 'vae':
                return network(images, torch.zeros_like(latent))[0]
            portrait = rh.Portrait(latent, list(seen), low)
            t = torch.tensor([10.0, 900.0], device=x.device)
            return network(x, t, portrait)

    allowed = 0.1 if bf16 else 2e-3
    assert differ(forward, network, images, x, latent, low, *seen) < allowed


def test_the_sampler(tiny):
    torch.manual_seed(0)
    models = {kind: running.build(kind, tiny).eval() for kind in ('vae', 'base', 'upsample')}
    made = {}
    for device in (DEVICE, 'cpu'):
        there = {kind: model.to(device) for kind, model in models.items()}
        portrait = torch.rand(1, 3, tiny.portrait, tiny.portrait, generator=generator()) * 2 - 1
        made[device] = rh.generate(there, portrait, steps=2).planes.cpu()
    assert (made[DEVICE] - made['cpu']).abs().mean() < 1e-2


def generator():
    return torch.Generator().manual_seed(0)


def test_metrics(tiny):
    vae = rh.VAE(tiny).requires_grad_(False)
    works = [metrics.ssim, metrics.vae_distance(vae), functools.partial(metrics.vae_feature, vae)]
    images = torch.rand(2, 3, 64, 64)
    seen = {}
    for device in (DEVICE, 'cpu'):
        vae.to(device)
        ssim, distance, features = (metrics.on(device, work) for work in works)
        seen[device] = torch.tensor([ssim(*images), distance(*images), *features(images[0])])
    assert torch.allclose(seen[DEVICE], seen['cpu'], rtol=1e-3, atol=1e-4)


# Scripts ------------------------------------------------------------------------------------------
@pytest.mark.parametrize('bf16', ['--bf16', '--no-bf16'])
@pytest.mark.parametrize('stage', ['vae', 'base', 'upsample'])
def test_steps_of_training(data, tiny, tmp_path, stage, bf16):
    decoder = rh.Decoder(tiny)
    running.write_model(tmp_path / 'decoder.pt', 'decoder', tiny, decoder.state_dict(), 0)
    running.write_model(tmp_path / 'vae.pt', 'vae', tiny, rh.VAE(tiny).state_dict(), 0)
    for avatar in scenes.list_avatars(data):
        planes = torch.rand(3, 8, 32, 32) * 2 - 1
        portrait = provenance.of_portrait(avatar, tiny.portrait)
        path = tmp_path / f'{avatar.name}.pt'
        box = scenes.read_box(avatar)
        fit.write_planes(path, planes, box, tiny, decoder, [], {}, portrait=portrait)
    prefix = 'up' if stage == 'upsample' else stage
    options = ['--stage', stage, '--preset', 'tiny', '--device', DEVICE, bf16, '--data', data]
    options += ['--fits', tmp_path, '--runs', tmp_path, '--micro-batch', 1, '--workers', 1, '--set']
    settings = [f'{prefix}_steps=2', f'{prefix}_batch=2', 'sample_steps=1']
    train.main(train.parse([str(x) for x in (*options, *settings)]))
    state = running.read_checkpoint(tmp_path / f'{stage}-state.pt', f'{stage}-state')
    assert state['skipped'] == 0
    assert all(x.isfinite().all() for x in state['model'].values())


# What takes longest -------------------------------------------------------------------------------
@pytest.mark.parametrize('channels_last', [False, True])
def test_a_million_look_ups(channels_last):
    """With channels-last planes this is where grid_sample of cuDNN may go wrong."""
    test_look_ups(32, 512, 10**6, channels_last)


@pytest.mark.skipif(DEVICE == 'cpu', reason='takes minutes and 60 GB on a CPU')
@pytest.mark.parametrize('stage', ['base', 'upsample'])
def test_a_step_at_the_papers_size(stage):
    from bench import Bench, training_step
    config = rh.make_config('paper')
    bench = Bench(torch.device(DEVICE), 0.1)
    network, step = training_step(bench, config, stage)
    step(1, True)
    assert all(p.isfinite().all() for p in network.parameters())


@pytest.mark.skipif(DEVICE == 'cpu', reason='minutes of a C++ compiler')
@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('kind', ['vae', 'base', 'upsample'])
def test_compiled_networks(tiny, kind, bf16):
    test_networks(tiny, kind, bf16, compiled=True)
