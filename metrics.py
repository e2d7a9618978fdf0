"""The papers' metrics. Of two images (3, H, W) in 0..1: SSIM, LPIPS, a distance of the VAE's features (PSNR is `rh.psnr`). Of two sets:
the Frechet distance of their features, which is FID where these are Inception's. And what any network makes of images.

What needs weights of others says in one line which file is missing, and where it goes.
"""
import contextlib
import functools
import io

import torch
import torch.distributed as dist
import torch.nn.functional as F

import rodinhd as rh


def ssim(a, b):
    """Structural similarity: Gaussian window of 11 pixels, sigma 1.5 (Wang 2004), mean over pixels."""
    tap = torch.exp(-torch.arange(-5.0, 6.0) ** 2 / (2 * 1.5 ** 2))
    window = (tap[:, None] * tap / tap.sum() ** 2).expand(3, 1, 11, 11)
    def blur(x):
        return F.conv2d(x[None], window, groups=3)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return float((((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))).mean())

def lpips_metric():
    """LPIPS (AlexNet), or None with one line on stdout where the backbone's weights cannot be had."""
    import lpips
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            network = lpips.LPIPS(net='alex', verbose=False).eval()
    except Exception as error:          # a download that fails raises many types
        if dist.get_rank() == 0:
            print(f'LPIPS is missing ({type(error).__name__}): put alexnet-owt-7be5be79.pth into {torch.hub.get_dir()}/checkpoints')
        return None
    return lambda a, b: float(network(a[None] * 2 - 1, b[None] * 2 - 1))

def vae_distance(vae):
    """Mean over the VAE's three maps of the squared difference of channel-normalised features. Not LPIPS."""
    def distance(a, b):
        maps = [vae.features(x[None] * 2 - 1) for x in (a, b)]
        return sum(float((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()) for x, y in zip(*maps)) / 3
    return distance

def of_pairs(vae):
    """{name: metric of two images}, of those that can be had here."""
    found = {'PSNR': rh.psnr, 'SSIM': ssim, 'LPIPS': lpips_metric(), 'VAE': vae_distance(vae)}
    return {name: metric for name, metric in found.items() if metric}

def vae_feature(vae, image):
    """The means of the VAE's three maps: (sum of their widths,)."""
    return torch.cat([y.mean((0, 2, 3)) for y in vae.features(image[None] * 2 - 1)])

def frechet_distance(a, b):
    """Frechet distance of two sets of features (N, D) and (M, D), each taken for a Gaussian: |m - n|^2 + tr(A + B - 2 (A B)^(1/2))."""
    (m, A), (n, B) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T             # A^(1/2); the trace is that of (A^(1/2) B A^(1/2))^(1/2)
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return float((m - n).square().sum() + A.trace() + B.trace() - 2 * cross)

def extractors(vae, inception=None, clip=None):
    """{name of a Frechet distance: features of an image (3, H, W) in 0..1 -> (D,)}. FID's networks are torch-fidelity's."""
    found = {'FD-VAE': functools.partial(vae_feature, vae)}
    others = (('FID', 'inception-v3-compat', '2048', inception, 'weights-inception-2015-12-05-6726825d.pth'),
              ('FID-CLIP', 'clip-vit-b-32', 'clip', clip, 'ViT-B-32.pt'))
    for name, kind, feature, path, file in (other for other in others if other[3]):
        try:
            from torch_fidelity.utils import create_feature_extractor
            weights = {} if path == 'download' else {'feature_extractor_weights_path': path}
            network = create_feature_extractor(kind, [feature], cuda=False, **weights)
        except ImportError:
            rh.stop(f'{name} needs the torch-fidelity package: pip install torch-fidelity')
        except Exception as error:      # missing, damaged or not downloadable: many types
            rh.stop(f'{name}: {path!r} did not give the weights of {kind} ({type(error).__name__}); give torch-fidelity\'s {file}')
        found[name] = lambda image, network=network: network((image[None] * 255).round().byte())[0][0].float()
    return found

def read_judges(items):
    """{name: image (3, H, W) in 0..1 -> vector} from NAME=FILE, TorchScript modules that take (1, 3, H, W) in 0..1."""
    judges = {}
    for item in items:
        name, _, path = item.partition('=')
        try:
            module = torch.jit.load(path, map_location='cpu').eval()
        except Exception as error:      # torch.jit raises many types
            rh.stop(f'--judge {item}: {path!r} is no TorchScript file ({type(error).__name__}); write NAME=FILE, csim=face.pt for instance')
        judges[name] = lambda image, module=module: module(image[None]).flatten().float()
    return judges

def judge(judges, ours, truth):
    """csim: cosine similarity to the truth, and -cross between neighbouring views of our own, if there are two; others: mean absolute
    difference. Means over all views."""
    scores = {}
    for name, vector in judges.items():
        a, b = (torch.stack([vector(x) for x in images]) for images in (ours, truth))
        if name.startswith('csim'):
            scores[name] = float(F.cosine_similarity(a, b).mean())
            if len(a) > 1:
                scores[f'{name}-cross'] = float(F.cosine_similarity(a, a.roll(1, 0)).mean())
        else:
            scores[name] = float((a - b).abs().mean())
    return scores
