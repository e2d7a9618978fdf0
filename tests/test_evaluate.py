"""The metrics against independent implementations, the papers' figures, and the disturbances of
portraits."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import batches
import evaluate
import metrics
import rodinhd as rh
import running
import scenes
import surface
from papers import figures


# Metrics ------------------------------------------------------------------------------------------
def test_ssim_is_scikit_images():
    theirs = pytest.importorskip('skimage.metrics')
    a = torch.rand(3, 40, 50)
    b = (a + 0.2 * torch.randn(3, 40, 50)).clamp(0, 1)
    pair = [x.permute(1, 2, 0).double().numpy() for x in (a, b)]
    _, full = theirs.structural_similarity(
        *pair,
        channel_axis=2,
        full=True,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert abs(metrics.ssim(a, b) - full[5:-5, 5:-5].mean()) < 1e-4  # ours has no border


def test_frechet_distance_of_two_gaussians():
    """With diagonal covariances it is |m - n|^2 + sum (s - t)^2. A set of +-sqrt(N - 1) s e_i has
    exactly the covariance diag(s^2)."""
    def cloud(mean, std):
        n = 2 * len(std)
        points = torch.diag(torch.tensor(std)) * ((n - 1) / 2) ** 0.5
        return torch.cat([points, -points]) + torch.tensor(mean)

    a = cloud([0.0, 1.0, 2.0], [1.0, 2.0, 0.5])
    b = cloud([1.0, 1.0, 0.0], [2.0, 1.0, 0.5])
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 1, abs=1e-5)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_of_correlated_gaussians():
    linalg = pytest.importorskip('scipy.linalg')
    a = torch.randn(200, 5) @ torch.randn(5, 5)
    b = torch.randn(300, 5) @ torch.randn(5, 5) + 1
    A, B = (np.cov(x.double().numpy().T) for x in (a, b))
    means = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    direct = means + np.trace(A + B - 2 * linalg.sqrtm(A @ B).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(direct, rel=1e-5)


@pytest.fixture(scope='module')
def inception(tmp_path_factory):
    """FID's network with random weights -> network, path of a file of them.

    torch-fidelity's class reads weights at once; here it keeps those that it starts with.
    """
    module = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')
    build = module.FeatureExtractorInceptionV3
    weights = {}

    def keep(self, state, *args, **how):
        weights.update(torch.nn.Module.state_dict(self))

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, 'load_state_dict', keep)
        patch.setattr(torch, 'load', lambda *args, **how: {})
        how = dict(feature_extractor_weights_path='none')
        network = build('inception-v3-compat', ['2048'], **how)
    path = tmp_path_factory.mktemp('inception') / 'inception.pth'
    torch.save(weights, path)
    return network.eval(), str(path)


def test_fid_on_random_weights_is_the_direct_computation(inception, tiny):
    """The features of --inception FILE are those of the network that wrote the file, rounded to 8
    bits as FID's are."""
    linalg = pytest.importorskip('scipy.linalg')
    network, path = inception
    feature = metrics.extractors(rh.VAE(tiny), path)['FID']

    def direct_features(images):
        return network((images * 255).round().byte())[0]

    sets = torch.rand(3, 3, 32, 32), torch.rand(4, 3, 32, 32) ** 2
    theirs = [direct_features(images) for images in sets]
    ours = [torch.stack([feature(image) for image in images]) for images in sets]
    assert ours[0].shape == (3, 2048)
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)

    # tr (A B)^(1/2), of few samples
    a, b = (features.double().numpy() for features in theirs)
    A, B = np.cov(a.T), np.cov(b.T)
    root = linalg.svdvals((a - a.mean(0)) @ (b - b.mean(0)).T).sum() / (2 * 3) ** 0.5
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    direct = means + np.trace(A) + np.trace(B) - 2 * root
    assert metrics.frechet_distance(*ours) == pytest.approx(direct, rel=1e-4)


def test_networks_of_others_are_asked_for_by_name(tiny):
    pytest.importorskip('torch_fidelity')
    advice = r'FID: .nowhere.pth. did not give .*give torch-fidelity.s weights-inception-2015'
    with pytest.raises(rh.Stop, match=advice):
        metrics.extractors(rh.VAE(tiny), 'nowhere.pth')
    with pytest.raises(rh.Stop, match=r'--judge csim=nowhere.pt.*TorchScript'):
        metrics.read_judges(['csim=nowhere.pt'])


class Mean(torch.nn.Module):
    """A judge that sees the mean colour."""
    def forward(self, x):
        return x.mean((2, 3))


def test_judges(tmp_path):
    torch.jit.script(Mean()).save(str(tmp_path / 'mean.pt'))
    names = ('csim', 'pose')
    judges = metrics.read_judges([f'{name}={tmp_path}/mean.pt' for name in names])
    red = torch.zeros(2, 3, 8, 8)
    red[:, 0] = 1
    green = torch.zeros(2, 3, 8, 8)
    green[:, 1] = 1
    scores = metrics.judge(judges, red, green)
    assert scores == pytest.approx({'csim': 0, 'csim-cross': 1, 'pose': 2 / 3})
    alone = metrics.judge(judges, red[:1], green[:1])  # one view has no other
    assert set(alone) == {'csim', 'pose'}


# Evaluation ---------------------------------------------------------------------------------------
def test_rows_that_only_some_ranks_have_are_pooled(monkeypatch):
    """One rank has no avatar, another one no fitted planes; one view has no covariance."""
    def views(*pairs):
        found = []
        for pair in pairs:
            found.append([{'f': torch.tensor([value, value * value])} for value in pair])
        return found

    ranks = [
        {},
        {'generated': views((3.0, 1.0), (4.0, 2.0))},
        {'generated': views((5.0, 3.0)), 'fitted': views((6.0, 5.0))},
    ]
    monkeypatch.setattr(evaluate, 'gather', lambda _: ranks)
    rows = evaluate.pooled(None)
    numbers = {}
    for row, pairs in rows.items():
        numbers[row] = [tuple(float(view['f'][0]) for view in pair) for pair in pairs]
    assert numbers == {'generated': [(3, 1), (4, 2), (5, 3)], 'fitted': [(6, 5)]}
    assert evaluate.frechet(rows['generated'], ['f'])['f'] > 4
    assert evaluate.frechet(rows['fitted'], ['f']) == {}


def test_a_surface_is_where_its_distance_is_zero():
    """A surface begins as its hull, here an ellipsoid of three different axes, so that none can be
    mixed up."""
    axis = (torch.arange(64) + 0.5) / 32 - 1
    x, y, z = torch.meshgrid(axis, axis, axis, indexing='ij')
    hull = (x / 0.3) ** 2 + (y / 0.5) ** 2 + (z / 0.7) ** 2 < 1
    solid = surface.Surface(hull.numpy(), channels=8, resolution=16, width=8)
    torch.nn.init.zeros_(solid.distance[2].weight)
    torch.nn.init.zeros_(solid.distance[2].bias)

    points = torch.tensor([
        [0.0, 0.0, 0.0],
        [0.3, 0.0, 0.0],
        [0.0, 0.5, 0.0],
        [0.0, 0.0, 0.7],
        [0.7, 0.0, 0.0],
        [0.0, 0.0, 0.9],
    ])
    with torch.no_grad():
        distance, _ = solid.signed_distance(points)
        sigma, _ = solid(points)
    expected = torch.tensor([-0.3, 0, 0, 0, 0.4, 0.2])
    assert torch.allclose(distance, expected, atol=2 / 64)
    s = float(solid.log_s.detach().exp())
    assert sigma[0] > 0.99 * s
    assert sigma[-1] < 1e-2 * s
    assert solid.eikonal(torch.rand(1000, 3) * 0.2 + 0.6) < 1e-2


# Portraits ----------------------------------------------------------------------------------------
def test_portraits_are_disturbed_by_little_and_the_same_way_each_time(tmp_path):
    rgb = torch.full((3, 64, 64), -1.0)
    alpha = torch.zeros(1, 64, 64)
    alpha[:, 16:48, 16:48] = 1
    photograph = tmp_path / 'green.png'
    Image.fromarray(np.full((40, 40, 3), (0, 255, 0), np.uint8)).save(photograph)
    green = torch.tensor([-1.0, 1.0, -1.0])

    on_photograph = 0
    for seed in range(20):
        out = batches.disturb(rgb, alpha, [photograph], seed)
        assert torch.equal(out, batches.disturb(rgb, alpha, [photograph], seed))

        corner = out[:, 0, 0]
        ground = corner[:, None, None].expand(3, 8, 8)
        assert torch.allclose(out[:, :8, :8], ground, atol=1e-5)
        on_photograph += torch.allclose(corner, green, atol=1e-2)

        inside = (out < -0.99).all(0)
        assert inside.sum() > 27 ** 2
        y, x = (inside.nonzero().float().mean(0) + 0.5 - 32).tolist()
        assert abs(y) <= 4.5  # 5 % of 64 pixels, over a scale of 0.9 to 1.1
        assert abs(x) <= 4.5
    assert 4 <= on_photograph <= 16


def test_training_portraits_stay_in_range():
    rgb = torch.rand(8, 3, 64, 64) * 2 - 1
    out = batches.photo(rgb, torch.rand(8, 1, 64, 64))
    assert out.shape == rgb.shape
    assert out.abs().max() <= 1
    assert out.isfinite().all()


def test_photographs_go_on_beyond_their_edge():
    """What cut_off takes away is as the last row or column that it leaves; the middle stays."""
    torch.manual_seed(0)
    images = torch.rand(64, 3, 32, 32)
    out = batches.cut_off(images)
    assert torch.equal(out[:, :, 8:16, 8:24], images[:, :, 8:16, 8:24])

    below = 0
    for image, cut in zip(images, out):
        changed = (image != cut).flatten(1).any(0).view(32, 32)
        rows = changed[:, 12].nonzero().flatten()
        lower = rows[rows > 16]
        if len(lower):
            below += 1
            first = int(lower[0])
            last_shown = cut[:, first - 1:first]
            assert torch.equal(cut[:, first:], last_shown.expand(-1, 32 - first, -1))
    assert 14 <= below <= 38  # two in five of 64


def test_mirrored_planes_are_the_mirrored_avatar(tiny):
    """In what rays see of them, and in the portrait."""
    torch.manual_seed(0)
    decoder = rh.Decoder(tiny)
    item = {
        'x_start': torch.rand(3, 8, 32, 32) * 2 - 1,
        'portrait': torch.rand(3, 64, 64),
        'alpha': torch.rand(1, 64, 64),
        'patch': {
            'rays_o': torch.tensor([[0.3, -4.0, 0.2]]),
            'rays_d': torch.tensor([[0.1, 1.0, -0.1]]),
        },
    }
    mirrored = batches.mirrored(item)
    assert torch.equal(mirrored['portrait'], item['portrait'].flip(2))
    assert torch.equal(mirrored['alpha'], item['alpha'].flip(2))

    points = torch.rand(100, 3) * 2 - 1
    over_there = points * torch.tensor([-1.0, 1.0, 1.0])
    features = rh.sample_planes(item['x_start'], points)
    assert torch.allclose(rh.sample_planes(mirrored['x_start'], over_there), features, atol=1e-5)

    # A ray and its mirror image see the same density.
    seen, also = (
        rh.render(rh.PlaneField(one['x_start'], decoder), **one['patch'], steps=64).opacity
        for one in (item, mirrored)
    )
    assert torch.allclose(seen, also, atol=1e-4)
    assert seen.item() > 0.01


# The papers' figures ------------------------------------------------------------------------------
def test_spectrum_finds_a_wave_and_all_of_its_power():
    wave = torch.sin(2 * np.pi * 5 * torch.arange(32) / 32)
    power = figures.spectrum(wave.expand(3, 2, 32, 32) + 7)
    assert power.argmax() == 5
    assert power[5] == pytest.approx(0.5, rel=1e-4)
    assert power.sum() == pytest.approx(0.5, rel=1e-4)


@pytest.fixture(scope='module')
def trained(tmp_path_factory, tiny):
    """A folder with random models and planes of two avatars in fits/ and runs/, and a log."""
    folder = tmp_path_factory.mktemp('figures')
    torch.manual_seed(0)
    for kind, (build, _) in running.MODELS.items():
        place = 'fits' if kind == 'decoder' else 'runs'
        path = folder / place / f'{kind}.pt'
        running.write_model(path, kind, tiny, build(tiny).state_dict(), 0)
    for name in ('a', 'b'):
        planes = torch.randn(3, 8, 32, 32).half() * 0.1
        running.write_checkpoint(folder / 'fits' / f'{name}.pt', 'planes', {'planes': planes})
    lines = [json.dumps({'first_avatar_psnr': psnr}) for psnr in (20.0, 21.0)]
    (folder / 'fits/decoder.jsonl').write_text('\n'.join(lines))
    return folder


def draw_moving_line(folder):
    """Four frames of a line that moves to the right, a pixel a frame."""
    folder.mkdir()
    for i in range(4):
        pixels = np.full((16, 16), 255, np.uint8)
        pixels[:, i] = 0
        Image.fromarray(pixels).save(folder / f'{i}.png')


def draw_figure(name, trained, *options):
    where = ['--fits', trained / 'fits', '--runs', trained / 'runs', '--size', 16]
    figures.main(figures.parse([name, *map(str, (*where, *options))]))


@pytest.mark.parametrize('name', sorted(set(figures.FIGURES) - {'meshes'}))
def test_every_figure(tmp_path, trained, data, name):
    """Meshes are in test_mesh.py."""
    pytest.importorskip('matplotlib')
    out = tmp_path / 'assets'
    turn = tmp_path / 'turn'
    draw_moving_line(turn)
    face = scenes.portrait_path(data / 'avatar_0000')
    draw_figure(name, trained, '--portrait', face, face, '--out', out, '--frames', turn)
    with Image.open(out / f'{name}.png') as image:
        assert min(image.size) >= 16
        pixels = np.asarray(image.convert('L'))

    if name == 'epipolar':
        slanted = pixels[16:, 48:]  # the second row's stack of lines
        assert [row.argmin() for row in slanted] == [i for i in range(4) for _ in range(4)]
    if name == 'forgetting':
        assert json.loads((out / 'forgetting.json').read_text()) == {'fits': [20.0, 21.0]}


def test_a_figure_says_what_it_needs(trained):
    with pytest.raises(rh.Stop, match='epipolar needs --portrait'):
        draw_figure('epipolar', trained)
