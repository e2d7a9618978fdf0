"""Stage 4: how good are the avatars? The papers' metrics at held-out cameras, in one table.

    python evaluate.py                                    avatars of data/, fitted and generated
    python evaluate.py --data test --train data           avatars that training never saw
    python evaluate.py --guidance 1 2 --steps 10 50 --refine 0    a row for each pair of settings
    python evaluate.py --disturb photographs              portraits that are shifted, scaled, on
                                                          flat colours or pieces of photographs
    python evaluate.py --images rodin=folder              another method's renders
    python evaluate.py --inception download --clip clip.pt    FID, of Inception and CLIP features
    python evaluate.py --judge csim=face.pt expression=e.pt   identity, expression, pose, shape
    python evaluate.py --refiner                          Rodin*: fitted and generated, refined
    python evaluate.py --consistency 6                    do views of six generated avatars agree?
    python evaluate.py --rows latent --guidance 1 1.2 1.5 3 6     of CLIP's vector alone (Rodin)
    python evaluate.py --unconditional 64                 how distinct are avatars of nobody?
    python evaluate.py --unconditional 64 --null          the same without the prior of vectors
    torchrun --standalone --nproc_per_node=2 evaluate.py  any of these

Rows are `fitted` (planes in --fits), `generated` (from the portrait, as sample.py does), `sampled`
(the model alone, from the portrait as it is), `latent` (the model alone, from the vector that CLIP
makes of it, where there is one; see rodin.py), and two baselines that any generator must beat:
`nearest`, the training avatar with the nearest portrait, and `mean`, the mean of the training
planes. A new row is a function and a line of ROWS; a new metric is a line of metrics.of_pairs.

`front` is the PSNR of the view that is the portrait, which `generated` has been fitted to; 0-45,
45-135 and 135-180 are the PSNR of held-out cameras whose azimuth is that far from the front. FD-VAE
and FD-Lite0 are Frechet distances of the project's own features and of EfficientNet-Lite0's, not
FID. `haze` is the mean opacity, in percent, where a view shows nothing; `IoU` says how far outlines
agree, and `outlines` what percentage of the squared error lies within 3 pixels of them. CSIM (dlib)
is of faces within 60 degrees of the front. Below each row stands the standard error of its means,
over identities.

A judge is any TorchScript from image to vector. The renders of --images are those of the held-out
views, folder/<avatar>/<name of the view>.png; with --consistency they are a posed set in each
folder/<avatar>/.

Writes measured/<--name>.json and .png.
"""
import argparse
import functools
import itertools
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import endings  # noqa: F401  # isort: skip  # before PyTorch, whose import takes seconds
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw

import batches
import frozen
import likeness
import metrics
import refiner
import rodin
import rodinhd as rh
import running
import scenes
import surface


# Avatars and pictures of them ---------------------------------------------------------------------
class Avatar(NamedTuple):
    planes: torch.Tensor  # (3, C, R, R) in [-1, 1]
    decoder: rh.Decoder  # that reads them


class Refined(NamedTuple):
    """Holds an Avatar whose views are refined one by one (refiner.py)."""
    avatar: Avatar
    network: refiner.Refiner


class Shots(NamedTuple):
    """Holds pictures of a field by several cameras."""
    images: torch.Tensor  # (V, 3, H, W) in 0..1, on white
    opacity: torch.Tensor | None  # (V, 1, H, W) in 0..1, where it is known


def load(args, device):
    """Loads the generator's models, and the decoder of --fits, which may be another one."""
    models = running.load_models(args.runs, args.fits, device)
    if (args.fits / 'decoder.pt').exists():
        return models, running.load_model('decoder', args.fits, device)
    return models, models['decoder']


def likeness_steps(args, models):
    """Returns --refine, the steps of fitting to the portrait, or the model's own number."""
    if args.refine is None:
        return models['base'].config.likeness_steps
    return args.refine


def some(items, count):
    """Returns `count` of the items, evenly spread, or all of them where there are no more."""
    if not count or len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]


def read_planes(path, decoder, folder, device):
    """Reads the planes of the avatar in a folder, which are of this decoder."""
    planes = running.read_planes(path, decoder, folder)['planes'].float()
    if planes.shape[1] != decoder.config.channels or not planes.isfinite().all():
        rh.stop(f'{path}: holds planes of {planes.shape[1]} channels, or NaN or infinite values; '
                'delete it and fit it again with python fit.py')
    return planes.clamp(-1, 1).to(device)


def seed_of(folder, args):
    """Returns an avatar's own seed: with one for all, all would be made of the same noise."""
    return args.seed + zlib.crc32(folder.name.encode())


def shots_of(render, views, device):
    """Takes what render(c2w, intrinsics, height, width) draws for each camera of `views`, in
    pictures of their size -> Shots."""
    height, width = views.images.shape[1:3]
    images, opacities = [], []
    for c2w, intrinsics in zip(views.c2w, views.intrinsics):
        picture = render(c2w.to(device), intrinsics.to(device), height, width)
        images.append(picture.rgb.cpu().permute(2, 0, 1))
        opacities.append(picture.opacity.cpu()[None])
    return Shots(torch.stack(images), torch.stack(opacities))


def see(field, grid, views, config, device):
    """Renders a field as the cameras of `views` see it -> Shots."""

    def render(*camera):
        return rh.render_view(field, *camera, config.steps, grid)

    return shots_of(render, views, device)


def photograph(avatar, views, device):
    """Renders an Avatar as `see` does, with a grid made of its density: it may have no hull."""
    field = frozen.freeze(*avatar)
    return shots_of(functools.partial(frozen.render_view, field), views, device)


def photograph_refined(avatar, network, views, device):
    """Renders an Avatar by fewer pixels and refines each view to the size of `views` -> images
    (V, 3, H, W) in 0..1."""
    height, width = (refiner.side_of(side, network) for side in views.images.shape[1:3])
    smaller = views._replace(
        images=views.images[:, :height, :width],
        intrinsics=views.intrinsics / network.scale,
    )
    shots = photograph(avatar, smaller, device)
    images = [network.refine(image.permute(1, 2, 0).to(device)).cpu() for image in shots.images]
    return torch.stack(images).permute(0, 3, 1, 2)


def blank_views(c2w, size):
    """Makes Views without content by cameras (V, 4, 4) that are as wide as those of portraits."""
    count = len(c2w)
    images = torch.zeros(count, size, size, 4, dtype=torch.uint8)
    intrinsics = rh.intrinsics_of(rh.PORTRAIT_FOV, size).expand(count, 4)
    return rh.Views(images, c2w, intrinsics, has_alpha=True)


def blank_orbit(angles, size):
    """Makes Views without content at (azimuth, elevation) in degrees, 4 away."""
    return blank_views(torch.stack([rh.orbit_pose(*angle) for angle in angles]), size)


def on_white(views):
    """Returns the images of Views on white, (V, 3, H, W) in 0..1."""
    return torch.stack([rh.on_white(image).permute(2, 0, 1) for image in views.images])


def held_out(folder, box, args):
    """Loads views of an avatar that training never saw, or of all where there are none such."""
    size = args.downscale, args.views
    views = scenes.load_views(folder, 'test', box, *size)
    if views is None:
        views = scenes.load_views(folder, 'train', box, *size)
    return views


def thumbnail(folder):
    """Reads the portrait of an avatar, on white, (3, 64, 64) in 0..1."""
    rgb, alpha = scenes.portrait_of(folder, 64)
    return (scenes.portrait_on_white(rgb, alpha) + 1) / 2


class Neighbour(NamedTuple):
    """Names a training avatar, and how far its portrait is from some image."""
    distance: float  # mean squared difference of images (3, 64, 64) in 0..1
    index: int


class Baselines:
    """Holds the training avatars that have planes, in order of their names."""
    def __init__(self, args, decoder, device):
        self.fits = args.fits
        self.decoder = decoder
        self.device = device
        data = args.train or args.data
        folders = scenes.list_avatars(data)
        self.folders = [f for f in folders if (args.fits / f'{f.name}.pt').exists()]
        if not self.folders and dist.get_rank() == 0:
            print(
                f'{args.fits} holds no planes of {data}: '
                'no baselines (fit them with python fit.py)'
            )

    def planes(self, index):
        folder = self.folders[index]
        return read_planes(self.fits / f'{folder.name}.pt', self.decoder, folder, self.device)

    @functools.cached_property
    def thumbnails(self):
        return [thumbnail(folder) for folder in self.folders]

    @functools.cached_property
    def mean(self):
        """The mean of all planes or, where there are more than a thousand, of so many of them,
        evenly spread: those of 46 thousand avatars are two terabytes."""
        shown = some(range(len(self.folders)), 1000)
        return sum(self.planes(index) / len(shown) for index in shown)

    def neighbours(self, image, but=None):
        """Lists all as Neighbours of an image, nearest first, except one that is named `but`."""
        found = []
        for index, other in enumerate(self.thumbnails):
            if self.folders[index].name != but:
                found.append(Neighbour(float(F.mse_loss(other, image)), index))
        return sorted(found)


# What is shown and written ------------------------------------------------------------------------
class Strip(NamedTuple):
    """Holds pictures of one avatar, side by side."""
    score: float
    name: str
    pixels: np.ndarray  # (H, W, 3) uint8


class Sheet:
    """Collects strips of the avatars that came out best and worst, four of each."""
    def __init__(self, legend=()):
        self.strips = []
        self.legend = legend  # words above the strips, evenly spread over the width

    def add(self, score, name, images):
        """Adds a strip of images (3, H, W) in 0..1."""
        strip = (torch.cat(list(images), dim=2).clamp(0, 1) * 255).round().byte()
        self.merge([Strip(score, name, strip.permute(1, 2, 0).numpy())])

    def merge(self, strips):
        """Keeps the best and the worst of its own and these strips."""
        everything = [*self.strips, *strips]
        self.strips = ends_of(sorted(everything, key=lambda strip: strip[:2], reverse=True))

    def merge_ranks(self):
        """Gives rank 0 what all ranks have collected."""
        for strips in gather(self.strips)[1:]:
            self.merge(strips)

    def save(self, path):
        """Writes the strips, those that are as large as the first one, under the legend."""
        shape = self.strips[0].pixels.shape
        strips = [strip.pixels for strip in self.strips if strip.pixels.shape == shape]
        picture = Image.fromarray(np.concatenate(strips))
        sheet = Image.new('RGB', (picture.width, picture.height + 14), 'white')
        sheet.paste(picture, (0, 14))
        for i, word in enumerate(self.legend):
            left = i * picture.width / len(self.legend) + 3
            ImageDraw.Draw(sheet).text((left, 1), word, fill='black')
        sheet.save(path)


def ends_of(items):
    """Returns the first four and the last four of a list, or all of it where there are no more."""
    return items[:4] + items[max(len(items) - 4, 4):]


def gather(value):
    """Lists the values of all ranks."""
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, value)
    return everything


def merged(results):
    """Merges {avatar: what was measured} of all ranks, sorted by name."""
    everything = {}
    for part in gather(results):
        everything.update(part)
    return dict(sorted(everything.items()))


def pooled(features):
    """Merges {row: what there is of each view} of all ranks; one may have rows that others lack."""
    everything = {}
    for part in gather(features):
        for row, views in part.items():
            everything.setdefault(row, []).extend(views)
    return everything


def write(args, name, result, sheet, device):
    """Writes <out>/<name>.json, with what made it, and <name>.png if there is a picture."""
    path = args.out / f'{args.name or name}.json'
    running.write_json(path, {**result, 'seed': args.seed, **running.origin(device)})
    if not sheet.strips:
        print(f'written: {path}')
        return
    picture = path.with_suffix('.png')
    with running.atomic(picture) as temporary:
        sheet.save(temporary)
    print(f'written: {path}, {picture}')


# Scores -------------------------------------------------------------------------------------------
def mean_scores(compare, ours, truth):
    """Averages the metrics `compare` over views, images (V, 3, H, W) -> {metric: value}."""
    scores = {}
    for name, metric in compare.items():
        scores[name] = sum(metric(a, b) for a, b in zip(ours, truth)) / len(truth)
    return scores


def each_view(compare, views, ours, truth):
    """Lists the metrics `compare` of each view, images (V, 3, H, W) -> {metric: [value]}.

    PSNR is of the pixels that are not masked.
    """
    scores = {}
    for name, metric in compare.items():
        scores[name] = [metric(a, b) for a, b in zip(ours, truth)]
    if views.unknown is not None:
        pairs = zip(ours.permute(0, 2, 3, 1), truth.permute(0, 2, 3, 1))
        scores['PSNR'] = [rh.psnr(*views.known_pixels(i, *pair)) for i, pair in enumerate(pairs)]
    return scores


BINS = {'0-45': (0, 45), '45-90': (45, 90), '90-135': (90, 135), '135-180': (135, 181),
        '45-135': (45, 135), '30-60': (30, 60)}  # degrees from the front, on either side
SHOWN_AT = ('0-45', '45-135', '135-180')  # the PSNR of these stands in the printed table
FACES_WITHIN = 60  # degrees from the front, in which a face is looked for


def azimuths_of(views):
    """Lists the azimuths of Views in degrees, -180 to 180: 0 is the front, 90 is at +X."""
    x, y = views.c2w[:, 0, 3], views.c2w[:, 1, 3]
    return torch.rad2deg(torch.atan2(x, -y)).tolist()


def averages(scores, azimuths):
    """Averages {metric: [value of each view, or None]} -> {metric: mean, 'metric at 0-45': mean of
    the views that stand there ...}, without what no view has."""
    found = {}
    for name, values in scores.items():
        there = [value for value in values if value is not None]
        if there:
            found[name] = float(np.mean(there))
    for (name, values), (place, (low, high)) in itertools.product(scores.items(), BINS.items()):
        there = [
            value
            for value, azimuth in zip(values, azimuths)
            if value is not None and low <= abs(azimuth) < high
        ]
        if there:
            found[f'{name} at {place}'] = float(np.mean(there))
    return found


def outlines_of(opacity, views, images, truth):
    """Measures {'IoU', 'outlines': [value of each view]} of our opacity (V, 1, H, W).

    Both are of where opacity and true alpha are above a half, and empty where there is no alpha.
    """
    if not views.has_alpha:
        return {}
    ours = opacity[:, 0] > 0.5
    theirs = views.images[..., 3] > 127
    known = torch.ones_like(ours)
    if views.unknown is not None:
        known = ~views.unknown
        ours = torch.where(known, ours, theirs)
    overlaps, shares = [], []
    for i in range(len(truth)):
        overlaps.append(metrics.overlap(ours[i] & known[i], theirs[i] & known[i]))
        shares.append(metrics.share_at_outlines(images[i], truth[i], ours[i], theirs[i]))
    return {'IoU': overlaps, 'outlines': shares}


def haze_of(shots, views):
    """Measures {'haze': the mean opacity, in percent, of pixels that views show to be empty}.

    That is what floats where nothing should be. It is empty where no pixel is.
    """
    empty = views.images[..., 3] == 0  # (V, H, W)
    if views.unknown is not None:
        empty &= ~views.unknown
    if not empty.any():
        return {}
    return {'haze': float(100 * shots.opacity[:, 0][empty].mean())}


def features_of(image, extract):
    """Extracts {Frechet distance: features (D,)} of an image (3, H, W) in 0..1."""
    return {name: features(image) for name, features in extract.items()}


def frechet(pairs, names):
    """Measures {name: Frechet distance} of views, pairs of our features_of and the true ones.

    It is empty where there is a single view, which has no covariance.
    """
    if len(pairs) < 2:
        return {}
    distances = {}
    for name in names:
        ours = torch.stack([our_view[name] for our_view, _ in pairs])
        truth = torch.stack([true_view[name] for _, true_view in pairs])
        distances[name] = metrics.frechet_distance(ours, truth)
    return distances


# What is evaluated --------------------------------------------------------------------------------
class Shown(NamedTuple):
    """Holds a portrait as the generator gets it."""
    image: torch.Tensor  # (3, P, P) in [-1, 1]
    alpha: torch.Tensor  # (1, P, P) in 0..1


class Subject(NamedTuple):
    """Holds what is known of an avatar of --data."""
    folder: Path
    views: rh.Views  # that training never saw
    truth: torch.Tensor  # these on white, (V, 3, H, W) in 0..1
    front: rh.Views | None  # the training view that is the portrait
    azimuths: list  # of `views`, in degrees: 0 is the front
    identity: str  # who it is; the folder's name where no file says it
    portraits: dict  # {row: Shown}


def portrait_view(folder, box, downscale):
    """Loads the training view that is the portrait; None where that is a file of its own."""
    _, frames = scenes.read_frames(folder, 'train')
    paths = [frame['path'] for frame in frames]
    portrait = scenes.portrait_path(folder)
    if portrait not in paths:
        return None
    return scenes.load_views(folder, 'train', box, downscale, pick=paths.index(portrait))


def identity_of(folder):
    """Returns the `identity` of an avatar's transforms file, or its folder's name."""
    meta, _ = scenes.read_frames(folder, 'train')
    return str(meta.get('identity') or folder.name)


def read_subject(folder, args, size, photographs):
    """Reads the Subject of a folder, with portraits of `size` pixels a side."""
    box = scenes.read_box(folder)
    views = held_out(folder, box, args)
    front = portrait_view(folder, box, args.downscale)

    rgb, alpha = scenes.portrait_of(folder, size)
    portraits = {'generated': Shown(scenes.portrait_on_white(rgb, alpha), alpha)}
    if args.disturb:
        image = batches.disturb(rgb, alpha, photographs, seed_of(folder, args))
        portraits['disturbed'] = Shown(image, torch.ones_like(alpha))
    where = azimuths_of(views)
    return Subject(folder, views, on_white(views), front, where, identity_of(folder), portraits)


# The rows of the table ----------------------------------------------------------------------------
# Each is made by a function of the Subject and of Sources, which returns {title: Avatar}, empty
# where the row cannot be made. ROWS names them, in the order of the table.
class Sources(NamedTuple):
    """Holds what avatars are made of."""
    args: argparse.Namespace
    models: dict  # of running.load_models
    fitted_decoder: rh.Decoder  # of the planes in --fits
    baselines: Baselines
    device: torch.device
    network: refiner.Refiner | None = None  # with --refiner


def from_fits(subject, sources):
    """Reads the avatar's own planes."""
    path = sources.args.fits / f'{subject.folder.name}.pt'
    if not path.exists():
        return {}
    decoder = sources.fitted_decoder
    planes = read_planes(path, decoder, subject.folder, sources.device)
    return {'fitted': Avatar(planes, decoder)}


def settings_of(sources):
    """Lists the pairs (guidance, steps) of sampling that are asked for."""
    args, config = sources.args, sources.models['base'].config
    guidance = args.guidance or [config.guidance]
    steps = args.steps or [config.sample_steps]
    return list(itertools.product(guidance, steps))


def from_portrait(name, subject, sources):
    """Generates from the portrait of a name, as sample.py does, a row for each pair of settings."""
    if name not in subject.portraits:
        return {}
    args, models = sources.args, sources.models
    image, alpha = subject.portraits[name]
    settings = settings_of(sources)

    rows = {}
    for guidance, steps in settings:
        title = name
        if len(settings) > 1:
            title = f'{name}, s={guidance:g}, {steps} steps'
        steps = steps if args.steps else None  # else each model's own
        how = dict(guidance=guidance, steps=steps, seed=seed_of(subject.folder, args))
        fitting = likeness_steps(args, models)
        planes = likeness.avatars_of(models, image[None], fitting, alpha[None], **how)[0]
        rows[title] = Avatar(planes, models['decoder'])
    return rows


def from_model_alone(subject, sources):
    """Samples from the portrait as it is, where `generated` is more than that."""
    args, models = sources.args, sources.models
    settings = settings_of(sources)
    if not likeness_steps(args, models) or len(settings) > 1:
        return {}
    image = subject.portraits['generated'].image
    guidance, _ = settings[0]
    steps = args.steps and args.steps[0]
    how = dict(guidance=guidance, steps=steps, seed=seed_of(subject.folder, args))
    planes = rh.generate(models, image[None], **how).planes[0]
    return {'sampled': Avatar(planes, models['decoder'])}


def from_latent(subject, sources):
    """Samples from the vector that CLIP makes of the portrait alone, as Rodin does, a row for each
    pair of settings."""
    args, models = sources.args, sources.models
    if not running.has_latents(models, 'clip'):
        return {}
    if 'clip' not in models:
        running.load_latents(models)
    image = subject.portraits['generated'].image[None].to(sources.device)
    seen = rh.nobody(models['base'].config, 1, models['clip'].encode_images(image))
    settings = settings_of(sources)
    rows = {}
    for guidance, steps in settings:
        title = 'latent'
        if len(settings) > 1:
            title = f'latent, s={guidance:g}, {steps} steps'
        steps = steps if args.steps else None  # else those of avatars of a vector
        how = dict(guidance=guidance, steps=steps, seed=seed_of(subject.folder, args))
        rows[title] = Avatar(rh.generate(models, seen, **how).planes[0], models['decoder'])
    return rows


def nearest_known(subject, sources):
    """Reads the training avatar whose portrait is nearest, another one than this."""
    baselines = sources.baselines
    found = baselines.neighbours(thumbnail(subject.folder), but=subject.folder.name)
    if not found:
        return {}
    planes = baselines.planes(found[0].index)
    return {'nearest': Avatar(planes, sources.fitted_decoder)}


def mean_known(subject, sources):
    """Takes the mean of all training planes, where there are others than this avatar's."""
    names = {folder.name for folder in sources.baselines.folders}
    if not names - {subject.folder.name}:
        return {}
    return {'mean': Avatar(sources.baselines.mean, sources.fitted_decoder)}


ROWS = {
    'fitted': from_fits,
    'generated': functools.partial(from_portrait, 'generated'),
    'disturbed': functools.partial(from_portrait, 'disturbed'),
    'sampled': from_model_alone,
    'latent': from_latent,
    'nearest': nearest_known,
    'mean': mean_known,
}


def candidates_for(subject, sources):
    """Makes {title of the row: Avatar, Refined, or the folder of another method's renders}."""
    args, avatar = sources.args, subject.folder.name
    candidates = {name: Path(root) / avatar for name, root in args.images}
    for name, make in ROWS.items():
        if not args.rows or name in args.rows:
            candidates.update(make(subject, sources))
    if sources.network is not None:
        for title, made in list(candidates.items()):
            if isinstance(made, Avatar) and title not in ('nearest', 'mean'):
                candidates[f'{title}, refined'] = Refined(made, sources.network)
    if not candidates:
        rh.stop(
            f'{avatar}: has none of the rows {" ".join(args.rows)} '
            f'(planes are looked for in {args.fits})'
        )
    return candidates


# Measurement 1: evaluate --------------------------------------------------------------------------
class Measures(NamedTuple):
    """Holds what is measured of a row."""
    compare: dict  # {metric: function of two images}
    extract: dict  # {Frechet distance: function of an image -> features}
    judges: dict  # {judge: function of an image -> vector}
    face: Callable | None  # of an image -> vector of its face, or None where it shows none


class Known(NamedTuple):
    """Holds what is made of an avatar's true images once, for all rows."""
    features: list  # of each view, features_of
    faces: list  # of each view and of the front, a vector or None: none is looked for behind


class Row(NamedTuple):
    """Holds what was measured of one avatar in one row."""
    images: torch.Tensor  # (V, 3, H, W) in 0..1
    scores: dict  # {metric: value}
    features: list  # of each view, (features_of ours, features_of the truth)


def known_of(subject, measures):
    """Makes what is Known of a Subject."""
    features = [features_of(image, measures.extract) for image in subject.truth]
    faces = []
    if measures.face is not None:
        for image, azimuth in zip(subject.truth, subject.azimuths):
            faces.append(measures.face(image) if abs(azimuth) <= FACES_WITHIN else None)
        front = None
        if subject.front is not None:
            front = measures.face(on_white(subject.front)[0])
        faces.append(front)
    return Known(features, faces)


def read_renders(renders, folder, truth):
    """Reads another method's renders of the held-out views, as large as the truth (V, 3, H, W)."""
    _, frames = scenes.read_frames(folder, 'test')
    if not frames:
        _, frames = scenes.read_frames(folder, 'train')
    images = []
    for frame in some(frames, len(truth)):
        pixels = np.array(scenes.open_image(renders / f'{frame["path"].stem}.png'))
        images.append(rh.on_white(torch.from_numpy(pixels)).permute(2, 0, 1))
    images = torch.stack(images)
    if images.shape == truth.shape:
        return images
    return F.interpolate(images, size=truth.shape[2:], mode='area')


def shots_by(candidate, views, folder, device):
    """Takes the pictures of a candidate by the cameras of `views` -> Shots."""
    if isinstance(candidate, Avatar):
        return photograph(candidate, views, device)
    if isinstance(candidate, Refined):
        return Shots(photograph_refined(*candidate, views, device), None)
    return Shots(read_renders(candidate, folder, on_white(views)), None)


def front_scores(front, views, compare):
    """Compares an image (3, H, W) with the view that is the portrait -> {'front': PSNR,
    'metric at front': value}."""
    truth = on_white(views)
    images = front[None]
    if views.unknown is not None:
        images = torch.where(views.unknown[:, None], truth, images)
    found = {}
    for name, values in each_view(compare, views, images, truth).items():
        found['front' if name == 'PSNR' else f'{name} at front'] = values[0]
    return found


def face_scores(face, images, front, azimuths, true_faces):
    """Compares the faces of images (V, 3, H, W), and of the front (3, H, W) or None, with the true
    ones -> {metric: value}.

    Where the truth shows no face, none is looked for. CSIM is of the images. CSIM-cross is of our
    own in neighbouring ones, the front among them. `faces` counts those that the truth shows in
    all of them, `faces missed` those of them that ours does not.
    """
    ours = [None] * len(true_faces)
    pictures = [*images, front]
    for i, (picture, true) in enumerate(zip(pictures, true_faces)):
        if picture is None:
            true_faces = [*true_faces[:i], None]  # the front, which comes last
        elif true is not None:
            ours[i] = face(picture)

    alike = [metrics.csim(a, b) for a, b in zip(ours, true_faces)]
    scores = averages({metrics.CSIM: alike[:-1]}, azimuths)
    if alike[-1] is not None:
        scores[f'{metrics.CSIM} at front'] = alike[-1]

    where = [*azimuths, 0.0]
    around = sorted(range(len(where)), key=where.__getitem__)
    cross = metrics.csim_cross([ours[i] for i in around], [true_faces[i] for i in around])
    if cross is not None:
        scores[metrics.CSIM_CROSS] = cross
    shown = [a for a, true in zip(ours, true_faces) if true is not None]
    scores['faces'] = len(shown)
    scores['faces missed'] = sum(a is None for a in shown)
    return scores


def measure(candidate, subject, known, measures, device):
    """Measures a candidate, an Avatar, a Refined one or a folder of renders -> Row."""
    truth, views = subject.truth, subject.views
    shots = shots_by(candidate, views, subject.folder, device)
    images = shots.images
    if views.unknown is not None:  # masked pixels are not measured
        images = torch.where(views.unknown[:, None], truth, images)
    by_view = each_view(measures.compare, views, images, truth)
    scores = {}
    if shots.opacity is not None:
        scores = haze_of(shots, views)
        by_view.update(outlines_of(shots.opacity, views, images, truth))
    scores = {**averages(by_view, subject.azimuths), **scores}
    scores.update(metrics.judge(measures.judges, images, truth))

    front = None
    if subject.front is not None and isinstance(candidate, Avatar):
        front = photograph(candidate, subject.front, device).images[0]
        scores.update(front_scores(front, subject.front, measures.compare))
    if measures.face is not None:
        how = images, front, subject.azimuths, known.faces
        scores.update(face_scores(measures.face, *how))

    our_features = [features_of(image, measures.extract) for image in images]
    return Row(images, scores, list(zip(our_features, known.features)))


def add_strip(sheet, subject, rows, with_truth):
    """Puts the first and the last view of all Rows on the sheet.

    Before them stand the portraits and the truth, where these may be shown. The sheet is sorted by
    the first row of generated avatars, if any, else by the first row.
    """
    truth = subject.truth
    images, legend = [], []
    if with_truth:
        for name, shown in subject.portraits.items():
            image = (shown.image[None] + 1) / 2
            images.append(F.interpolate(image, size=truth.shape[2:], mode='area')[0])
            legend.append(name)
        images += [truth[0], truth[-1]]
        legend += ['truth', '']
    for title, row in rows.items():
        images += [row.images[0], row.images[-1]]
        legend += [title, '']
    sheet.legend = legend

    generated = [title for title in rows if title.startswith('generated')]
    titles = generated or list(rows)
    sheet.add(rows[titles[0]].scores['PSNR'], subject.folder.name, images)


def in_order(groups):
    """Lists what is in some of the groups, each once, in order of first appearance."""
    found = {}
    for group in groups:
        found.update(dict.fromkeys(group))
    return list(found)


def columns_of(results):
    """Lists the metrics that some row of some avatar has."""
    groups = []
    for rows in results.values():
        groups += rows.values()
    return in_order(groups)


def table_of(results, features, names):
    """Averages {avatar: {row: scores}} -> {row: scores}, with the Frechet distances `names`.

    Where only some avatars have a row, `avatars` is their number: its mean is over others than the
    rows above and below, and not to be compared with them.
    """
    columns = columns_of(results)
    table = {}
    for row in in_order(results.values()):
        scores = [rows[row] for rows in results.values() if row in rows]
        table[row] = {}
        for column in columns:
            values = [of_avatar[column] for of_avatar in scores if column in of_avatar]
            if values:
                table[row][column] = float(np.mean(values))
        table[row].update(frechet(features[row], names))
        if len(scores) < len(results):
            table[row]['avatars'] = len(scores)
    return table


def standard_error(values, identities):
    """Returns the standard error of a mean over avatars, whose errors are alike within an identity.

    values: one of each avatar; identities: who each is. With k identities of n avatars each, of
    means m_i, it is the deviation of m_i over sqrt(k); with n_i that differ, that of the ratio of
    sums, sqrt(k / (k - 1) sum (n_i (m_i - mean))^2) / sum n_i. None of fewer than two identities.
    """
    mean = float(np.mean(values))
    sums = {}
    for value, identity in zip(values, identities):
        sums[identity] = sums.get(identity, 0.0) + value - mean
    k = len(sums)
    if k < 2:
        return None
    return math.sqrt(k / (k - 1) * sum(x * x for x in sums.values())) / len(values)


def errors_of(results, identities):
    """Measures the standard errors of table_of's means, of {avatar: {row: scores}} and {avatar:
    identity} -> {row: {metric: value}}. Frechet distances, of all views at once, have none."""
    errors = {}
    for row in in_order(results.values()):
        errors[row] = {}
        for column in columns_of(results):
            those = [a for a in results if column in results[a].get(row, {})]
            values = [results[a][row][column] for a in those]
            error = standard_error(values, [identities[a] for a in those]) if values else None
            if error is not None:
                errors[row][column] = error
    return errors


def over_nearest(results):
    """Subtracts the row `nearest` of each avatar from its other rows -> {avatar: {row: scores}}.

    The standard error of these is smaller than that of either: what is hard for one is for both.
    """
    found = {}
    for avatar, rows in results.items():
        base = rows.get('nearest', {})
        found[avatar] = {}
        for row, scores in rows.items():
            if row != 'nearest':
                both = [x for x in scores if x in base and not x.startswith('faces')]
                found[avatar][row] = {name: scores[name] - base[name] for name in both}
    return found


def shown_columns(columns):
    """Lists those columns that are printed: the JSON file alone has the others of a part of the
    views, and the counts of faces."""
    whole = [x for x in columns if ' at ' not in x and not x.startswith('faces')]
    parts = [f'PSNR at {place}' for place in SHOWN_AT]
    return [*whole, *(x for x in parts if x in columns)]


def print_table(table, errors, columns, count):
    """Prints {row: scores}, means of `count` avatars, with '-' for what a row lacks, and below each
    its standard errors, if any."""
    if any('avatars' in scores for scores in table.values()):
        columns = [*columns, 'avatars']
    heads = [column.removeprefix('PSNR at ') for column in columns]
    widths = [max(9, len(head) + 2) for head in heads]

    def line(title, scores, lacking):
        cells = []
        for column, width in zip(columns, widths):
            text = f'{scores[column]:.3f}' if column in scores else lacking
            cells.append(f'{text:>{width}s}')
        print(f'{title:28s}' + ''.join(cells))

    head = ''.join(f'{head:>{width}s}' for head, width in zip(heads, widths))
    print(f'{"":28s}{head}   mean of {count} avatars')
    for row, scores in table.items():
        line(row, scores, '-')
        if errors[row]:
            line('  ±', errors[row], '')


def print_faces(faces):
    """Prints {row: (faces missed, faces)} where a face was missed."""
    for row, (lost, shown) in faces.items():
        if lost:
            print(f'{row}: shows no face in {lost} of {shown} views in which the truth does')


def faces_of(results):
    """Sums the faces of {avatar: {row: scores}} -> {row: (missed, of those that the truth
    shows)}."""
    found = {}
    for rows in results.values():
        for row, scores in rows.items():
            if 'faces' in scores:
                lost, shown = found.get(row, (0, 0))
                found[row] = (lost + scores['faces missed'], shown + scores['faces'])
    return found


def check_steps(args, config):
    fewest = min(config.base_timesteps, config.up_timesteps)
    if args.steps and max(args.steps) > fewest:
        rh.stop(
            f'--steps {max(args.steps)}: the models have '
            f'{config.base_timesteps} and {config.up_timesteps} timesteps'
        )


def photographs_in(folder):
    """Lists the image files of a folder; none where there is no folder."""
    if folder is None:
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in scenes.IMAGE_SUFFIXES)


def evaluate(args, rank, world, device):
    """Measures all rows for the avatars of --data, at cameras that training never saw."""
    models, fitted_decoder = load(args, device)
    config = models['upsample'].config
    check_steps(args, config)
    vae = models['vae']
    compare = metrics.of_pairs(vae, device)
    photographs = photographs_in(args.disturb)
    baselines = Baselines(args, fitted_decoder, device)
    network = running.load_refiner(args.runs, device) if args.refiner else None
    sources = Sources(args, models, fitted_decoder, baselines, device, network)
    folders = some(scenes.list_avatars(args.data), args.count)
    extract = metrics.extractors(vae, args.inception, args.clip, device)
    judges = metrics.read_judges(args.judge)
    measures = Measures(compare, extract, judges, metrics.face_network())

    results = {}
    features = {}
    identities = {}
    sheet = Sheet()
    for folder in running.Bar(folders[rank::world], disable=rank > 0, desc='evaluating'):
        subject = read_subject(folder, args, config.portrait, photographs)
        identities[folder.name] = subject.identity
        known = known_of(subject, measures)
        rows = {}
        for title, candidate in candidates_for(subject, sources).items():
            rows[title] = measure(candidate, subject, known, measures, device)
            features.setdefault(title, []).extend(rows[title].features)
        results[folder.name] = {title: row.scores for title, row in rows.items()}
        add_strip(sheet, subject, rows, with_truth=not args.no_truth)

    features = pooled(features)
    sheet.merge_ranks()
    results = merged(results)
    identities = merged(identities)
    if rank == 0:
        table = table_of(results, features, extract)
        content = {'mean': table, 'standard_error': errors_of(results, identities)}
        differences = over_nearest(results)
        if in_order(differences.values()):
            content['over_nearest'] = {
                'mean': table_of(differences, features, []),
                'standard_error': errors_of(differences, identities),
            }
        content['faces'] = faces_of(results)
        content['identities'] = identities

        columns = [*shown_columns(columns_of(results)), *extract]
        print_table(table, content['standard_error'], columns, len(results))
        print_faces(content['faces'])
        write(args, 'evaluate', {**content, 'avatars': results}, sheet, device)


# Measurement 2: consistency -----------------------------------------------------------------------
# What is of one solid thing can be fitted again; what is not comes out blurred. RodinHD fits a
# surface model to renders (section 4.1, Tables 3 and 8), and so do we.

class Capture(NamedTuple):
    """Holds renders of an avatar in 8 bits, as pictures and as a set that can be fitted."""
    images: torch.Tensor  # (V, 3, H, W) in 0..1, on white
    views: rh.Views  # the same with straight alpha


class Trial(NamedTuple):
    """Holds a set that a surface is fitted to, and what it is measured by."""
    views: rh.Views
    unseen: rh.Views  # whose cameras measure
    truth: torch.Tensor  # what these see, (V, 3, H, W) in 0..1


class Outcome(NamedTuple):
    """Holds images (V, 3, H, W) in 0..1 of what was fitted, and the true ones."""
    images: torch.Tensor
    truth: torch.Tensor


def cameras_to_fit(size):
    """Makes 36 blank views around an avatar, in three rings of twelve."""
    angles = []
    for ring in range(3):
        angles += [(30 * i + 10 * ring, -15 + 22 * ring) for i in range(12)]
    return blank_orbit(angles, size)


def cameras_to_measure(size):
    """Makes six other blank views around an avatar, in turn lower and higher ones."""
    return blank_orbit([(15 + 60 * i, 25 * (i % 2) - 4) for i in range(6)], size)


def capture_of(images, opacity, cameras):
    """Makes a Capture of images (V, 3, H, W) in 0..1 on white and of opacity (V, 1, H, W)."""
    images = (images * 255).round() / 255

    # On white, a pixel is alpha c + 1 - alpha, and c is its straight colour.
    colour = (images - 1 + opacity) / opacity.clamp(min=1e-3)
    colour = torch.where(opacity > 0, colour, 0.0)
    rgba = (torch.cat([colour, opacity], dim=1).clamp(0, 1) * 255).round().byte()
    return Capture(images, cameras._replace(images=rgba.permute(0, 2, 3, 1).contiguous()))


def captures(avatar, cameras, network, device):
    """Makes Captures of an avatar, {name of what is fitted to it: Capture}: as it is and, where
    there is a refiner, with each picture refined on its own."""
    shots = photograph(avatar, cameras, device)
    made = {'surface': capture_of(shots.images, shots.opacity, cameras)}
    if network is not None:
        images = photograph_refined(avatar, network, cameras, device)
        made['refined'] = capture_of(images, shots.opacity, cameras)
    return made


def fit_again(avatar, folder, args, network, device):
    """Fits planes and surfaces to renders of an avatar, and surfaces to those of others.

    Returns {what was fitted: Outcome}.
    """
    decoder, config = avatar.decoder, avatar.decoder.config
    unseen = cameras_to_measure(config.portrait)
    fitted = captures(avatar, cameras_to_fit(config.portrait), network, device)
    truth = captures(avatar, unseen, network, device)

    pace = rh.by_steps(config.fit_steps)
    views = fitted['surface'].views
    visit = rh.fit_avatar(views, decoder.start, decoder, config, pace, seed=args.seed)
    shots = photograph(Avatar(visit.planes, decoder), unseen, device)
    outcomes = {'planes': Outcome(shots.images, truth['surface'].images)}

    trials = {
        name: Trial(capture.views, unseen, truth[name].images) for name, capture in fitted.items()
    }
    for name, root in args.images:
        posed = Path(root) / folder.name
        box = scenes.read_box(posed)
        views = scenes.load_views(posed, 'train', box, args.downscale)
        theirs = held_out(posed, box, args)
        trials[name] = Trial(views, theirs, on_white(theirs))
    for name, trial in trials.items():
        solid, grid = surface.fit_surface(trial.views, config, device, args.seed)
        shots = see(solid, grid, trial.unseen, config, device)
        outcomes[name] = Outcome(shots.images, trial.truth)
    return outcomes


def first_views(outcomes):
    """Lists images by the first camera: a render, and what was fitted to such; then refined."""
    planes, solid = outcomes['planes'], outcomes['surface']
    shown = [solid.truth, planes.images, solid.images]
    if 'refined' in outcomes:
        shown += outcomes['refined'][::-1]
    return [images[0] for images in shown]


def mean_over_avatars(results, names):
    """Averages {avatar: {row: scores}}, all with the same rows and metrics -> {row: scores}."""
    means = {}
    for row in next(iter(results.values())):
        means[row] = {}
        for name in names:
            values = [rows[row][name] for rows in results.values()]
            means[row][name] = float(np.mean(values))
    return means


def consistency(args, rank, world, device):
    """Asks whether the views of a generated avatar are those of one solid thing.

    Six views are measured after fitting to 36 others: of fresh planes; of a surface; and, with
    --refiner, of a surface fitted to views that were refined one by one, as Rodin* makes them
    (RodinHD, Table 3). Then of a surface fitted to another method's renders, a posed set
    FOLDER/<avatar>/ for each (--images), at its held-out views.
    """
    models, _ = load(args, device)
    compare = metrics.of_pairs(models['vae'], device)
    folders = some(scenes.list_avatars(args.data), args.consistency)
    for folder, (_, root) in itertools.product(folders, args.images):
        scenes.read_frames(Path(root) / folder.name, 'train')  # stops before the long work

    results = {}
    network = None
    legend = ['render', 'planes', 'surface']
    if args.refiner:
        network = running.load_refiner(args.runs, device)
        legend += ['refined', 'its surface']
    sheet = Sheet(legend)
    for folder in running.Bar(folders[rank::world], disable=rank > 0, desc='consistency'):
        rgb, alpha = scenes.portrait_of(folder, models['upsample'].config.portrait)
        image = scenes.portrait_on_white(rgb, alpha)
        fitting = likeness_steps(args, models)
        planes = likeness.avatars_of(models, image[None], fitting, alpha[None], seed=args.seed)[0]

        avatar = Avatar(planes, models['decoder'])
        outcomes = fit_again(avatar, folder, args, network, device)
        rows = {name: mean_scores(compare, *outcome) for name, outcome in outcomes.items()}
        results[folder.name] = rows
        sheet.add(rows['surface']['PSNR'], folder.name, first_views(outcomes))

    sheet.merge_ranks()
    results = merged(results)
    if rank == 0:
        means = mean_over_avatars(results, compare)
        for avatar, rows in {**results, 'mean': means}.items():
            for name, scores in rows.items():
                cells = [f'  {metric} {value:.3f}' for metric, value in scores.items()]
                print(f'{avatar:28s}{name:12s}' + ''.join(cells))
        write(args, 'consistency', {'mean': means, 'avatars': results}, sheet, device)


# Measurement 3: unconditional ---------------------------------------------------------------------
def median_psnr(distances):
    """Returns the median of mean squared differences of images in 0..1, in dB."""
    return float(np.median([-10 * math.log10(max(d, 1e-10)) for d in distances]))


def distances_to_others(images):
    """Lists the mean squared difference of each image from the nearest other one."""
    distances = []
    for image in images:
        others = [other for other in images if other is not image]
        distances.append(min(float(F.mse_loss(image, other)) for other in others))
    return distances


def distances_to_known(baselines):
    """Lists the same of the portraits of training avatars."""
    distances = []
    for image, folder in zip(baselines.thumbnails, baselines.folders):
        distances.append(baselines.neighbours(image, but=folder.name)[0].distance)
    return distances


def sheet_of_neighbours(images, neighbours, baselines, decoder, front):
    """Shows samples (3, H, W), each beside its Neighbours as the camera `front` sees them."""
    sheet = Sheet(['sample', 'nearest', 'second', 'third'])
    pairs = sorted(zip(images, neighbours), key=lambda pair: pair[1][0].distance)
    for image, found in ends_of(pairs):  # the sheet would keep no others
        strip = [image]
        for neighbour in found:
            known = Avatar(baselines.planes(neighbour.index), decoder)
            strip.append(photograph(known, front, baselines.device).images[0])
        sheet.add(found[0].distance, '', strip)
    return sheet


def nobody(models, seed, args):
    """The planes (3, C, R, R) of an avatar of nobody: of a vector that the prior draws, where one
    was trained, else, and with --null, of the null condition."""
    if args.null or not running.has_latents(models, 'prior'):
        return rh.generate(models, 1, seed=seed).planes[0]
    if 'prior' not in models:
        running.load_latents(models, 'prior')
    z = rodin.draw_latents(models['prior'], 1, seed=seed)
    return rh.generate(models, rh.nobody(models['base'].config, 1, z), seed=seed).planes[0]


def unconditional(args, rank, world, device):
    """Asks how far avatars of nobody are from one another and from the training set.

    It measures the PSNR of frontal views, 64 x 64, between each and its nearest other, and its
    nearest training avatar, beside the same of training avatars among themselves. And the Frechet
    distances of renders of them to the held-out images of --data, each by the cameras of one of
    these avatars in turn. The picture shows samples, each with its three nearest training avatars
    as these were fitted.
    """
    models, fitted_decoder = load(args, device)
    extract = metrics.extractors(models['vae'], args.inception, args.clip, device)
    folders = scenes.list_avatars(args.data)
    baselines = Baselines(args, fitted_decoder, device)
    if len(baselines.folders) < 2:
        data = args.train or args.data
        rh.stop(f'--unconditional: {args.fits} needs planes of two avatars of {data}')
    size = models['vae'].config.portrait // 2
    front = blank_views(rh.portrait_camera(size)[0][None], size)

    samples = {}  # {number: frontal view}
    pairs = []  # of each other view, [features_of ours, features_of the truth]
    mine = range(rank, args.unconditional, world)
    for i in running.Bar(mine, disable=rank > 0, desc='unconditional'):
        planes = nobody(models, args.seed + i, args)
        avatar = Avatar(planes, models['decoder'])
        samples[i] = photograph(avatar, front, device).images[0]
        folder = folders[i % len(folders)]
        views = held_out(folder, scenes.read_box(folder), args)
        for ours, truth in zip(photograph(avatar, views, device).images, on_white(views)):
            pairs.append([features_of(ours, extract), features_of(truth, extract)])

    images = list(merged(samples).values())
    pairs = pooled({'sample': pairs})['sample']
    if rank == 0:
        small = [F.interpolate(image[None], size=64, mode='area')[0] for image in images]
        neighbours = [baselines.neighbours(image)[:3] for image in small]
        result = {
            'samples': len(images),
            'sample_to_sample': median_psnr(distances_to_others(small)),
            'sample_to_training': median_psnr([found[0].distance for found in neighbours]),
            'training_to_training': median_psnr(distances_to_known(baselines)),
            'views': len(pairs),
            **frechet(pairs, extract),
        }
        sheet = sheet_of_neighbours(images, neighbours, baselines, fitted_decoder, front)
        for name, value in result.items():
            print(f'{name:28s}{value:9.2f}')
        write(args, 'unconditional', result, sheet, device)


# The command --------------------------------------------------------------------------------------
class Mode(NamedTuple):
    run: Callable  # of args, rank, world, device
    useless: str  # options that it does not read, and refuses


MODES = {
    'evaluate': Mode(evaluate, useless='null'),
    'consistency': Mode(
        consistency,
        useless='train count no_truth guidance steps disturb inception clip judge rows null',
    ),
    'unconditional': Mode(
        unconditional,
        useless='count no_truth guidance steps refine refiner disturb images judge rows',
    ),
}


def check_numbers(args):
    """Stops where an option is too small. Options that were not given are None."""
    at_least_1 = [args.views, args.downscale, args.count, args.consistency, *(args.steps or [])]
    too_small = any(number is not None and number < 1 for number in at_least_1)
    if args.unconditional is not None and args.unconditional < 2:
        too_small = True
    if args.refine is not None and args.refine < 0:
        too_small = True
    if not all(math.isfinite(number) for number in args.guidance or ()):
        rh.stop('--guidance must be finite')
    if too_small:
        rh.stop(
            '--views, --downscale, --count, --consistency, --steps must be at least 1, '
            '--unconditional at least 2, --refine at least 0'
        )


def check_useful(args, mode):
    """Stops where an option is given that the mode of this name does not read."""
    usual = parse([])
    for option in MODES[mode].useless.split():
        if getattr(args, option) != getattr(usual, option):
            flag = option.replace('_', '-')
            rh.stop(f'--{mode} has no use for --{flag}; leave out one of them')


def main(args):
    rank, world, device = running.start(args.device, args.seed)
    check_numbers(args)
    mode = 'evaluate'
    if args.consistency:
        mode = 'consistency'
    elif args.unconditional:
        mode = 'unconditional'
    check_useful(args, mode)
    if args.disturb and not args.disturb.is_dir():
        rh.stop(
            f'--disturb {args.disturb}: no such folder; '
            'give one with photographs, or an empty one for flat colours alone'
        )
    args.images = [item.partition('=')[::2] for item in args.images]  # (name, folder)
    MODES[mode].run(args, rank, world, device)


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add('--data', type=Path, default=Path('data'), help='avatars to evaluate')
    add('--train', type=Path, help='training avatars, for the baselines (default: --data)')
    add('--fits', type=Path, default=Path('fits'))
    add('--runs', type=Path, default=Path('runs'))
    add('--out', type=Path, default=Path('measured'))
    add('--name', help='of the files written (default: what is measured)')
    add('--count', type=int, help='only this many avatars, evenly spread')
    add('--rows', nargs='+', choices=ROWS, help='only these, of: ' + ' '.join(ROWS))
    add('--views', type=int, default=6, help='held-out views of each')
    add('--downscale', type=int, default=1, help='average images of --data down by this factor')
    add('--no-truth', action='store_true', help="a picture without the data set's own images")
    add('--guidance', type=float, nargs='+', help='of the base model (default: its own)')
    add('--steps', type=int, nargs='+', help='sampling steps of each model (default: its own)')
    fitting = "of fitting to the portrait (see likeness.py); 0: none (default: the model's own)"
    add('--refine', type=int, metavar='STEPS', help=fitting)
    refined = "also with each view passed through Rodin's refiner (see refiner.py)"
    add('--refiner', action='store_true', help=refined)
    disturbed = 'also portraits shifted, scaled, on other backgrounds'
    add('--disturb', type=Path, metavar='FOLDER', help=disturbed)
    others = 'also renders of others (see above)'
    add('--images', nargs='+', default=[], metavar='NAME=FOLDER', help=others)
    inception = "FID: weights of torch-fidelity's Inception, or `download`"
    add('--inception', metavar='FILE', help=inception)
    clip = 'FID of CLIP ViT-B/32 features: its weights, or `download`'
    add('--clip', metavar='FILE', help=clip)
    judges = 'TorchScript; csim... by cosine, others by difference'
    add('--judge', nargs='+', default=[], metavar='NAME=FILE', help=judges)
    agree = 'instead: do the views of N generated avatars agree?'
    add('--consistency', type=int, metavar='N', help=agree)
    distinct = 'instead: how distinct are N avatars of nobody?'
    add('--unconditional', type=int, metavar='N', help=distinct)
    alone = 'with --unconditional: of the null condition, though there is a prior of vectors'
    add('--null', action='store_true', help=alone)
    add('--seed', type=int, default=0)
    add('--device', help='cuda where there is one, else cpu')
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
