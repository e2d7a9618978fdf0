"""The metrics against independent implementations, and the disturbances of portraits."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import batches
import evaluate
import figures
import metrics
import rodinhd as rh


def test_ssim_is_scikit_images():
    theirs = pytest.importorskip('skimage.metrics')
    a = torch.rand(3, 40, 50)
    b = (a + 0.2 * torch.randn(3, 40, 50)).clamp(0, 1)
    pair = [x.permute(1, 2, 0).double().numpy() for x in (a, b)]
    _, full = theirs.structural_similarity(*pair, channel_axis=2, full=True, data_range=1.0, gaussian_weights=True, sigma=1.5,
                                            use_sample_covariance=False)
    assert abs(metrics.ssim(a, b) - full[5:-5, 5:-5].mean()) < 1e-4   # ours has no border


def test_frechet_distance_of_two_gaussians():
    """Diagonal covariances: |m - n|^2 + sum (s - t)^2. A set of +-sqrt(N - 1) s e_i has exactly the covariance diag(s^2)."""
    def cloud(mean, std):
        n = 2 * len(std)
        return torch.cat([sign * torch.diag(torch.tensor(std)) * ((n - 1) / 2) ** 0.5 for sign in (1, -1)]) + torch.tensor(mean)
    a, b = cloud([0.0, 1.0, 2.0], [1.0, 2.0, 0.5]), cloud([1.0, 1.0, 0.0], [2.0, 1.0, 0.5])
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 1, abs=1e-5)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_of_correlated_gaussians():
    linalg = pytest.importorskip('scipy.linalg')
    a, b = torch.randn(200, 5) @ torch.randn(5, 5), torch.randn(300, 5) @ torch.randn(5, 5) + 1
    A, B = (np.cov(x.double().numpy().T) for x in (a, b))
    direct = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + np.trace(A + B - 2 * linalg.sqrtm(A @ B).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(direct, rel=1e-5)


def test_fid_on_random_weights_is_the_direct_computation(tmp_path, tiny):
    """The features of --inception FILE are those of the network that wrote the file, rounded to 8 bits as FID's are."""
    inception = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3').FeatureExtractorInceptionV3
    state = {}
    with pytest.MonkeyPatch.context() as patch:                         # the class reads weights at once: keep those that it starts with
        patch.setattr(inception, 'load_state_dict', lambda self, s, *a, **k: state.update(torch.nn.Module.state_dict(self)))
        patch.setattr(torch, 'load', lambda *a, **k: {})
        network = inception('inception-v3-compat', ['2048'], feature_extractor_weights_path='none')
    torch.save(state, tmp_path / 'inception.pth')
    feature = metrics.extractors(rh.VAE(tiny), str(tmp_path / 'inception.pth'))['FID']
    image = torch.rand(3, 32, 32)
    expected = network.eval()((image[None] * 255).round().byte())[0][0]
    assert feature(image).shape == (2048,) and torch.allclose(feature(image), expected, atol=1e-5)
    sets = torch.rand(4, 3, 32, 32), torch.rand(5, 3, 32, 32) ** 2
    a, b = (network((x * 255).round().byte())[0].double().numpy() for x in sets)
    A, B = np.cov(a.T), np.cov(b.T)
    linalg = pytest.importorskip('scipy.linalg')
    root = linalg.svdvals((a - a.mean(0)) @ (b - b.mean(0)).T).sum() / (3 * 4) ** 0.5              # tr (A B)^(1/2), of few samples
    direct = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * root
    ours = metrics.frechet_distance(*(torch.stack([feature(x) for x in images]) for images in sets))
    assert ours == pytest.approx(direct, rel=1e-4)


def test_networks_of_others_are_asked_for_by_name(tiny):
    pytest.importorskip('torch_fidelity')
    with pytest.raises(SystemExit, match=r'FID: .nowhere.pth. did not give .*give torch-fidelity.s weights-inception-2015'):
        metrics.extractors(rh.VAE(tiny), 'nowhere.pth')
    with pytest.raises(SystemExit, match=r'--judge csim=nowhere.pt.*TorchScript'):
        metrics.read_judges(['csim=nowhere.pt'])


def test_rows_that_only_some_ranks_have_are_pooled(monkeypatch):
    """One rank has no avatar, another one no fitted planes; one view has no covariance."""
    ranks = [{}, {'generated': [(3.0, 1.0), (4.0, 2.0)]}, {'generated': [(5.0, 3.0)], 'fitted': [(6.0, 5.0)]}]
    monkeypatch.setattr(evaluate, 'gather', lambda _: [{row: [[{'f': torch.tensor([v, v * v])} for v in pair] for pair in pairs]
                                                        for row, pairs in part.items()} for part in ranks])
    rows = evaluate.pooled(None)
    assert {row: [tuple(float(v['f'][0]) for v in pair) for pair in pairs] for row, pairs in rows.items()} == {
        'generated': [(3, 1), (4, 2), (5, 3)], 'fitted': [(6, 5)]}
    assert evaluate.frechet(rows['generated'], ['f'])['f'] > 4 and evaluate.frechet(rows['fitted'], ['f']) == {}


def test_judges(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))
    torch.jit.script(Mean()).save(str(tmp_path / 'mean.pt'))
    judges = metrics.read_judges([f'csim={tmp_path}/mean.pt', f'pose={tmp_path}/mean.pt'])
    red, green = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    red[:, 0], green[:, 1] = 1, 1
    scores = metrics.judge(judges, red, green)
    assert scores == pytest.approx({'csim': 0, 'csim-cross': 1, 'pose': 2 / 3})
    assert set(metrics.judge(judges, red[:1], green[:1])) == {'csim', 'pose'}           # one view has no other


def test_a_surface_is_where_its_distance_is_zero():
    """A surface begins as its hull, here an ellipsoid of three different axes, so that none can be mixed up."""
    axis = (torch.arange(64) + 0.5) / 32 - 1
    x, y, z = torch.meshgrid(axis, axis, axis, indexing='ij')
    hull = (x / 0.3) ** 2 + (y / 0.5) ** 2 + (z / 0.7) ** 2 < 1
    surface = evaluate.Surface(hull.numpy(), channels=8, resolution=16, width=8)
    torch.nn.init.zeros_(surface.distance[2].weight)
    torch.nn.init.zeros_(surface.distance[2].bias)
    points = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.7], [0.7, 0.0, 0.0], [0.0, 0.0, 0.9]])
    with torch.no_grad():
        (distance, _), (sigma, _) = surface.signed_distance(points), surface(points)
    assert torch.allclose(distance, torch.tensor([-0.3, 0, 0, 0, 0.4, 0.2]), atol=2 / 64)
    s = float(surface.log_s.detach().exp())
    assert sigma[0] > 0.99 * s and sigma[-1] < 1e-2 * s
    assert surface.eikonal(torch.rand(1000, 3) * 0.2 + 0.6) < 1e-2


def test_portraits_are_disturbed_by_little_and_the_same_way_each_time(tmp_path):
    rgb, alpha = torch.full((3, 64, 64), -1.0), torch.zeros(1, 64, 64)
    alpha[:, 16:48, 16:48] = 1
    Image.fromarray(np.full((40, 40, 3), (0, 255, 0), np.uint8)).save(tmp_path / 'green.png')
    greens = 0
    for seed in range(20):
        out = batches.disturb(rgb, alpha, [tmp_path / 'green.png'], seed)
        assert torch.equal(out, batches.disturb(rgb, alpha, [tmp_path / 'green.png'], seed))
        corner, inside = out[:, 0, 0], (out < -0.99).all(0)
        assert torch.allclose(out[:, :8, :8], corner[:, None, None].expand(3, 8, 8), atol=1e-5) and inside.sum() > 27 ** 2
        y, x = (inside.nonzero().float().mean(0) + 0.5 - 32).tolist()
        assert abs(y) <= 4.5 and abs(x) <= 4.5                          # 5 % of 64 pixels, over a scale of 0.9 to 1.1
        greens += torch.allclose(corner, torch.tensor([-1.0, 1.0, -1.0]), atol=1e-2)
    assert 4 <= greens <= 16


def test_training_portraits_stay_in_range():
    rgb, alpha = torch.rand(8, 3, 64, 64) * 2 - 1, torch.rand(8, 1, 64, 64)
    out = batches.photo(rgb, alpha)
    assert out.shape == rgb.shape and out.abs().max() <= 1 and out.isfinite().all()


def test_spectrum_finds_a_wave_and_all_of_its_power():
    planes = torch.sin(2 * np.pi * 5 * torch.arange(32) / 32).expand(3, 2, 32, 32) + 7
    power = figures.spectrum(planes)
    assert power.argmax() == 5 and power[5] == pytest.approx(0.5, rel=1e-4) and power.sum() == pytest.approx(0.5, rel=1e-4)


def test_every_figure(tmp_path, tiny, data):
    pytest.importorskip('matplotlib')
    decoder, fits = rh.Decoder(tiny), tmp_path / 'fits'
    rh.write_model(fits / 'decoder.pt', 'decoder', tiny, decoder.state_dict(), 0)
    for kind in ('vae', 'base', 'upsample'):
        rh.write_model(tmp_path / 'runs' / f'{kind}.pt', kind, tiny, rh.MODELS[kind][0](tiny).state_dict(), 0)
    for name in ('a', 'b'):
        rh.write_checkpoint(fits / f'{name}.pt', 'planes', {'planes': torch.randn(3, 8, 32, 32).half() * 0.1})
    (fits / 'decoder.jsonl').write_text(json.dumps({'first_avatar_psnr': 20.0}) + '\n' + json.dumps({'first_avatar_psnr': 21.0}) + '\n')
    face = str(rh.portrait_path(data / 'avatar_0000'))
    (turn := tmp_path / 'turn').mkdir()
    for i in range(4):                  # a line that moves to the right, a pixel a frame
        Image.fromarray(np.where(np.arange(16)[:, None] == i, 0, 255).astype(np.uint8).repeat(16, 1).T).save(turn / f'{i}.png')
    for name in set(figures.FIGURES) - {'meshes'}:                      # that one is in test_mesh.py
        figures.main(figures.parse([name, '--fits', str(fits), '--runs', str(tmp_path / 'runs'), '--portrait', face, face,
                                    '--size', '16', '--out', str(tmp_path / 'assets'), '--frames', str(turn)]))
        with Image.open(tmp_path / 'assets' / f'{name}.png') as image:
            assert min(image.size) >= 16
    slanted = np.asarray(Image.open(tmp_path / 'assets/epipolar.png').convert('L'))[16:, 48:]
    assert [row.argmin() for row in slanted] == [i for i in range(4) for _ in range(4)]
    assert json.loads((tmp_path / 'assets/forgetting.json').read_text()) == {'fits': [20.0, 21.0]}
    with pytest.raises(SystemExit, match='epipolar needs --portrait'):
        figures.main(figures.parse(['epipolar', '--fits', str(fits), '--runs', str(tmp_path / 'runs')]))
