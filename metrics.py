"""The papers' metrics, of two images, of two sets of images, and of any network's outputs.

Images are (3, H, W) in 0..1. Of two of them: SSIM, LPIPS, and a distance of the VAE's features
(PSNR is `rh.psnr`); `of_pairs` lists them, and a new one is one more line there. Of two sets: the
Frechet distance of their features, which is FID where these are Inception's (`extractors`). And
what any network, a judge, makes of images, as in Table 7 of RodinHD (`judge`).

What needs weights of others says in one line which file is missing, and where it goes.
"""
import contextlib
import functools
import io
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

import rodinhd as rh


# Of two images ------------------------------------------------------------------------------------
def ssim(a, b):
    """Measures structural similarity (Wang 2004), with a Gaussian window of 11 pixels, sigma 1.5.

    Returns the mean over channels and over those pixels whose window lies in the image.
    """
    tap = torch.exp(-torch.arange(-5.0, 6.0) ** 2 / (2 * 1.5 ** 2))
    window = (tap[:, None] * tap / tap.sum() ** 2).expand(3, 1, 11, 11)

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


def lpips_metric():
    """Makes LPIPS (AlexNet), a function of two images, or None where its weights cannot be had."""
    import lpips
    silent = io.StringIO()
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            network = lpips.LPIPS(net='alex', verbose=False).eval()
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


def of_pairs(vae):
    """Lists {name: function of two images} of what can be had here. A new metric is added here."""
    found = {
        'PSNR': rh.psnr,
        'SSIM': ssim,
        'LPIPS': lpips_metric(),
        'VAE': vae_distance(vae),
    }
    return {name: metric for name, metric in found.items() if metric}


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
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)

    # The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def fidelity_extractor(name, path):
    """Makes a function of an image that returns features (D,) of a network of FIDELITY.

    path: of its weights, or `download`.
    """
    kind, feature, file = FIDELITY[name]
    weights = {} if path == 'download' else {'feature_extractor_weights_path': path}
    try:
        from torch_fidelity.utils import create_feature_extractor
        network = create_feature_extractor(kind, [feature], cuda=False, **weights)
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


def extractors(vae, inception=None, clip=None):
    """Makes {name of a Frechet distance: function of an image that returns features (D,)}.

    FD-VAE, of the project's own features, is always there; FID and FID-CLIP are where `inception`
    or `clip` is the path of their weights, or `download`.
    """
    found = {'FD-VAE': functools.partial(vae_feature, vae)}
    for name, path in (('FID', inception), ('FID-CLIP', clip)):
        if path:
            found[name] = fidelity_extractor(name, path)
    return found


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
