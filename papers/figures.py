"""The papers' figures, each as assets/<figure>.png, with its numbers as JSON where it has some.

    python -m papers.figures forgetting --fits once replay        while the decoder learns (Fig. 2)
    python -m papers.figures spectra --fits fits no_iwc no_tv     frequencies of planes (Fig. 4)
    python -m papers.figures frequencies --data test              planes, and images (Fig. 4, left)
    python -m papers.figures noise --fits channels8 channels32    planes under noise (Fig. 5)
    python -m papers.figures schedules                            noise schedules (Fig. 6)
    python -m papers.figures nobody                               unconditional avatars (Fig. 8)
    python -m papers.figures epipolar --portrait x.png            a moving camera (Figs. 9 and 16)
    python -m papers.figures fitting --fits once replay           ways of fitting (Fig. 10)
    python -m papers.figures ablation --portrait x.png --others single        models (Fig. 11, and
                                                                  Rodin, Fig. 16)
    python -m papers.figures resolution --fits r32 r64 r128       planes of other sizes (Fig. 14)
    python -m papers.figures scaling --fits without with          planes reduced (Rodin, Fig. 3)
    python -m papers.figures images --data test                   few and many (Rodin, Fig. 14)
    python -m papers.figures denoising --portrait x.png           step by step (Fig. 15)
    python -m papers.figures neighbours --portrait x.png          nearest avatars (Rodin, Fig. 17)
    python -m papers.figures lookalikes --portrait x.png          nearest portraits, by CLIP
    python -m papers.figures meshes --fits fits                   volumes and meshes
    python -m papers.figures curves --runs runs                   losses while the stages train
    python -m papers.figures views --data test                    one photograph, and several

Figures are RodinHD's where nothing else is said; views writes results/views.json, too. --fits are
folders of fit.py, of the same avatars; the models are those of runs/ or weights/, as for sample.py.
Plots need matplotlib, meshes trimesh and embreex. From one avatar to another (Rodin, Fig. 6) goes
sample.py --interpolate.

A new figure is a function and a line of FIGURES.
"""
import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import endings  # noqa: F401  # isort: skip  # before PyTorch, whose import takes seconds
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import likeness
import rodin
import rodinhd as rh
import running
import scenes
import watching
from meshes import TEXTURE, TRIANGLES, mesh_of
from refiner import side_of

ROOT = Path(__file__).parents[1]


# What figures are made of -------------------------------------------------------------------------
def axes(xlabel, ylabel, width=7.2, height=3.6):
    """Makes a matplotlib figure with one plot -> figure, plot."""
    try:
        import matplotlib
    except ImportError:
        rh.stop('figures need matplotlib: pip install matplotlib')
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, plot = pyplot.subplots(figsize=(width, height), layout='constrained')
    plot.set(xlabel=xlabel, ylabel=ylabel)
    plot.grid(alpha=0.3)
    return figure, plot


def save_plot(args, figure, numbers=None):
    """Writes a matplotlib figure as <out>/<figure>.png, and numbers as <figure>.json."""
    path = args.out / f'{args.figure}.png'
    with running.atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)
    save_numbers(path, numbers)


def save_images(args, rows, numbers=None):
    """Writes rows of images (H, W, 3) in 0..1 as <out>/<figure>.png, and numbers beside it."""
    path = args.out / f'{args.figure}.png'
    image = torch.cat([torch.cat(row, dim=1) for row in rows])
    pixels = (image.clamp(0, 1) * 255).round().byte().numpy()
    with running.atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary)
    save_numbers(path, numbers)


def save_numbers(path, numbers):
    """Writes the numbers of a picture, if any, and says what is written."""
    if numbers is None:
        print(f'written: {path}')
        return
    running.write_json(path.with_suffix('.json'), numbers)
    print(f'written: {path}, {path.with_suffix(".json")}')


def about(args):
    """What numbers are of: the command, in which a path from the root is its last part alone, the
    seed, the commit and the machine; avatars come into it."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in args.words]
    ask = ['git', 'rev-parse', '--short', 'HEAD']
    answer = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    return {
        'command': ' '.join(['python -m papers.figures', *words]),
        'seed': args.seed,
        'commit': answer.stdout.strip() or 'unknown',
        'machine': f'{os.cpu_count()} CPU cores, PyTorch {torch.__version__}',
        'avatars': {},
    }


def camera_at(azimuth, args, elevation=5):
    """Makes the camera of a view, on the CPU: c2w (4, 4), intrinsics (4,)."""
    return rh.orbit_pose(azimuth, elevation), rh.intrinsics_of(rh.PORTRAIT_FOV, args.size)


def render(field, grid, camera, config, args):
    """Renders a field from a camera -> rh.Picture of args.size pixels a side, on the CPU."""
    c2w, intrinsics = (x.to(args.device) for x in camera)
    picture = rh.render_view(field, c2w, intrinsics, args.size, args.size, config.steps, grid)
    return rh.Picture(picture.rgb.cpu(), picture.opacity.cpu())


def view(planes, decoder, args, azimuth=0):
    """Renders planes (3, C, R, R) from one side: (size, size, 3) in 0..1."""
    field = rh.PlaneField(planes.to(args.device), decoder)
    grid = rh.grid_for(field, decoder.config, args.device)
    return render(field, grid, camera_at(azimuth, args), decoder.config, args).rgb


def fitted(folder, decoder=None, most=None):
    """Reads {avatar: planes (3, C, R, R)} of a folder of fit.py, which must be of the decoder."""
    paths = sorted(p for p in folder.glob('*.pt') if p.name != 'decoder.pt')[:most]
    if not paths:
        rh.stop(f'{folder}: holds no planes of fit.py')
    planes = {}
    for path in paths:
        planes[path.stem] = running.read_planes(path, decoder)['planes'].float()
    return planes


def first_fitted(folder, args):
    """Reads the planes of a folder's first avatar, and its decoder."""
    decoder = running.load_model('decoder', folder, args.device)
    planes, = fitted(folder, decoder, most=1).values()
    return planes, decoder


def load_models(args):
    return running.load_models(args.runs, args.fits[0], args.device)


def portrait(args, models, i=0):
    """Reads portrait number i of the command line, (1, 3, P, P) in [-1, 1]."""
    if not args.portrait or len(args.portrait) <= i:
        rh.stop(f'figures.py {args.figure} needs --portrait')
    size = models['upsample'].config.portrait
    rgb, alpha = scenes.read_portrait(args.portrait[i], size)
    return scenes.portrait_on_white(rgb, alpha)[None].to(args.device)


# Figures about fitting ----------------------------------------------------------------------------
def forgetting_curve(folder):
    """Reads the PSNR of the first avatar after each visit, from the log of fit.py."""
    path = folder / 'decoder.jsonl'
    try:
        lines = path.read_text().splitlines()
        curve = [json.loads(line)['first_avatar_psnr'] for line in lines]
    except (OSError, ValueError, KeyError):
        curve = []
    if not curve:
        rh.stop(f'{path}: not a log of fit.py --decoder --watch')
    return curve


def forgetting(args):
    """Draws the PSNR of the first avatar while the decoder goes on to others."""
    figure, plot = axes(
        'training of the decoder, share of its steps', 'PSNR of the first avatar (dB)'
    )
    curves = {}
    for folder in args.fits:
        curve = forgetting_curve(folder)
        done = [(i + 1) / len(curve) for i in range(len(curve))]
        plot.plot(done, curve, label=folder.name)
        curves[folder.name] = curve
    plot.legend()
    save_plot(args, figure, curves)


def spectrum(planes):
    """Averages the power of planes (3, C, R, R), their mean left out, at radial frequencies.

    Returns (R/2 + 1,), of 0 ... R/2 cycles a plane. The last value has what is above it, too, in
    the corners; the plot leaves it out.
    """
    R = planes.shape[-1]
    waves = torch.fft.fft2(planes - planes.mean((2, 3), keepdim=True))
    power = waves.abs().square().mean((0, 1)) / R ** 4
    frequency = torch.fft.fftfreq(R, 1 / R)
    radius = (frequency[:, None] ** 2 + frequency ** 2).sqrt()
    radius = radius.round().long().clamp(max=R // 2)
    return torch.zeros(R // 2 + 1).index_add_(0, radius.flatten(), power.flatten())


def spectra(args):
    """Draws the power of planes by frequency.

    The numbers are its share at and above a quarter of the sampling rate (R/4 cycles a plane).
    """
    figure, plot = axes('cycles a plane', 'power')
    shares = {}
    for folder in args.fits:
        power = torch.stack([spectrum(planes) for planes in fitted(folder).values()]).mean(0)
        share = float(power[len(power) // 2:].sum() / power.sum())
        label = f'{folder.name}: {share:.2%} in the upper half'
        plot.loglog(range(1, len(power) - 1), power[1:-1], label=label)
        shares[folder.name] = share
    plot.legend()
    save_plot(args, figure, shares)


def fitted_avatars(args):
    """Lists the folders of --data of which the first folder of --fits holds planes, --count of
    them, evenly spread."""
    fits = args.fits[0]
    folders = [x for x in scenes.list_avatars(args.data) if (fits / f'{x.name}.pt').exists()]
    if not folders:
        rh.stop(f'{fits}: holds planes of none of the avatars of {args.data}')
    return spread(folders, args.count)


def spread(items, count):
    """So many of a list, evenly spread, or all of them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def planes_in(folder, avatar, decoder=None):
    """Reads the planes (3, C, R, R) of one avatar from a folder of fit.py, of the decoder."""
    return running.read_planes(folder / f'{avatar}.pt', decoder)['planes'].float()


def frequencies(args):
    """Draws the power of fitted planes and of portraits of the same avatars by frequency, each as a
    share of its own whole; portraits are as large as the planes.

    The numbers are the shares at and above a quarter of the sampling rate.
    """
    folders = fitted_avatars(args)
    planes = [planes_in(args.fits[0], folder.name) for folder in folders]
    whites = [front_of(folder, planes[0].shape[-1]) for folder in folders]
    powers = {
        'planes': torch.stack([spectrum(x) for x in planes]).mean(0),
        'images': spectrum(torch.stack(whites)),
    }
    figure, plot = axes('cycles a plane, or an image', 'share of the power')
    shares = {}
    for name, power in powers.items():
        power = power / power.sum()
        shares[name] = float(power[len(power) // 2:].sum())
        label = f'{name}: {shares[name]:.2%} in the upper half'
        plot.loglog(range(1, len(power) - 1), power[1:-1], label=label)
    plot.legend()
    save_plot(args, figure, shares)


def front_of(folder, size):
    """Reads the portrait of an avatar on white, (3, size, size) in [-1, 1]."""
    return scenes.portrait_on_white(*scenes.portrait_of(folder, size))


def noise(args):
    """Draws x_t / sqrt(alpha_bar) of the first avatar, a row a folder, the clean planes first.

    The log-SNR is 4, 2, 0.57 (the paper's) and -1.
    """
    rows = []
    for folder in args.fits:
        planes, decoder = first_fitted(folder, args)
        draw = torch.randn(planes.shape, generator=torch.Generator().manual_seed(args.seed))
        row = []
        for snr in (np.inf, 4, 2, 0.57, -1):
            noisy = planes + np.exp(-snr / 2) * draw
            row.append(view(noisy.clamp(-1, 1), decoder, args))
        rows.append(row)
    save_images(args, rows)


def resolution(args):
    """Draws the first avatar of each folder, from the front and from one side."""
    avatars = [first_fitted(folder, args) for folder in args.fits]
    rows = []
    for azimuth in (0, 50):
        rows.append([view(planes, decoder, args, azimuth) for planes, decoder in avatars])
    save_images(args, rows)


def scaling(args):
    """Draws the first avatar of each folder (a row) by its planes, and by these reduced to the
    decoder's low resolution (Rodin, Fig. 3).

    Folders with and without rescale show whether planes survive it. The numbers are the PSNR of the
    second beside the first.
    """
    rows, numbers = [], {}
    for folder in args.fits:
        planes, decoder = first_fitted(folder, args)
        low = rh.resize_planes(planes, decoder.config.base_resolution)
        row = [view(x, decoder, args) for x in (planes, low)]
        rows.append(row)
        numbers[folder.name] = rh.psnr(*row)
    save_images(args, rows, numbers)


def fitting(args):
    """Draws avatars of --data (a row): the truth, then what each folder of --fits made of it, by
    the held-out camera that is most frontal. The numbers are the PSNR."""
    rows, numbers = [], {}
    for folder in fitted_avatars(args):
        truth = scenes.load_views(folder, 'test', scenes.read_box(folder), args.downscale)
        if truth is None:
            rh.stop(f'{folder}: has no held-out views')
        front = min(range(len(truth.c2w)), key=lambda k: abs(bearing(truth.c2w[k])[0]))
        truth = truth._replace(
            images=truth.images[front:front + 1],
            c2w=truth.c2w[front:front + 1],
            intrinsics=truth.intrinsics[front:front + 1],
        )
        row = [rh.on_white(truth.images[0])]
        for fits in args.fits:
            decoder = running.load_model('decoder', fits, args.device)
            field = rh.PlaneField(planes_in(fits, folder.name, decoder).to(args.device), decoder)
            grid = rh.grid_for(field, decoder.config, args.device)
            row += pictures_of(field, grid, truth, args)
            numbers.setdefault(fits.name, {})[folder.name] = rh.psnr(row[-1], row[0])
        rows.append([resized(image.permute(2, 0, 1) * 2 - 1, args.size) for image in row])
    save_images(args, rows, numbers)


def images(args):
    """Draws how well avatars of --data are fitted from 3, 6, 12, ... and all of their images, as
    the mean PSNR of held-out views, under the decoder of --fits (one folder)."""
    decoder = running.load_model('decoder', args.fits[0], args.device)
    config = decoder.config
    found = {}
    for folder in spread(scenes.list_avatars(args.data), args.count):
        box = scenes.read_box(folder)
        truth = scenes.load_views(folder, 'test', box, args.downscale, 6)
        if truth is None:
            rh.stop(f'{folder}: has no held-out views')
        total = len(scenes.read_frames(folder, 'train')[1])
        for n in (*doubled(3, total), total):
            given = scenes.load_views(folder, 'train', box, args.downscale, n)
            pace = rh.by_steps(config.fit_steps)
            with torch.enable_grad():
                visit = rh.fit_avatar(given, decoder.start, decoder, config, pace, seed=args.seed)
            field = rh.PlaneField(visit.planes, decoder)
            grid = rh.grid_for(field, config, args.device)
            pairs = zip(pictures_of(field, grid, truth, args), truth.images)
            psnr = np.mean([rh.psnr(ours, rh.on_white(image)) for ours, image in pairs])
            found.setdefault(n, {})[folder.name] = float(psnr)

    means = {n: float(np.mean(list(psnrs.values()))) for n, psnrs in sorted(found.items())}
    figure, plot = axes('images that an avatar is fitted from', 'PSNR of held-out views (dB)')
    plot.plot(list(means), list(means.values()), marker='o')
    save_plot(args, figure, {'mean': means, 'avatars': found})


def doubled(first, below):
    """first, 2 first, 4 first ... that are below a number."""
    numbers = []
    while first < below:
        numbers.append(first)
        first *= 2
    return numbers


# Figures about generation -------------------------------------------------------------------------
class Schedule(NamedTuple):
    label: str
    name: str
    timesteps: int


SCHEDULES = [
    Schedule('cosine (base)', 'cosine', 1000),
    Schedule('sigmoid (upsample)', 'sigmoid', 100),
    Schedule('linear', 'linear', 1000),
]


def schedules(args):
    """Draws the log signal-to-noise ratio of the noise schedules."""
    figure, plot = axes('t', 'log signal-to-noise ratio')
    for label, name, timesteps in SCHEDULES:
        alpha_bar = torch.cumprod(1 - rh.noise_schedule(name, timesteps), 0)
        t = (torch.arange(timesteps) + 1) / timesteps
        plot.plot(t, torch.log(alpha_bar / (1 - alpha_bar)), label=label)
    plot.set_ylim(-20, 8)
    plot.legend()
    save_plot(args, figure)


def read_turn(folder, size):
    """Reads the images of a folder, by name, as squares (size, size, 3) in 0..1 on white."""
    paths = sorted(p for p in folder.glob('*') if p.suffix.lower() in scenes.IMAGE_SUFFIXES)
    if not paths:
        rh.stop(f'{folder}: holds no images')
    images = []
    for path in paths:
        rgb, alpha = scenes.read_portrait(path, size)
        images.append((scenes.portrait_on_white(rgb, alpha).permute(1, 2, 0) + 1) / 2)
    return images


def stacked_line(images, size):
    """Stacks a line through the face, 45 % from above, of all images: (size, size, 3)."""
    lines = torch.stack([image[int(0.45 * size)] for image in images])  # (images, size, 3)
    lines = lines.permute(2, 0, 1)[None]
    return F.interpolate(lines, size=(size, size))[0].permute(1, 2, 0)


def epipolar(args):
    """Draws a line of the image while the camera turns: what is solid draws smooth lines.

    The turn goes from -40 to 40 degrees. A row has three views and the stack of lines; there is one
    more row with --refiner, whose views are refined one by one (Rodin*), and for each of --frames,
    whose images, by name, are such a turn. The numbers are each row's roughness.
    """
    models = load_models(args)
    planes = rh.generate(models, portrait(args, models), seed=args.seed).planes[0]
    angles = torch.linspace(-40, 40, args.size // 2).tolist()
    turns = {'rendered': [view(planes, models['decoder'], args, azimuth) for azimuth in angles]}
    if args.refiner:
        turns['refined'] = refined_turn(planes, models['decoder'], args, angles)
    for folder in args.frames:
        turns[folder.name] = read_turn(folder, args.size)

    rows = []
    for turn in turns.values():
        middle = turn[len(turn) // 2]
        rows.append([turn[0], middle, turn[-1], stacked_line(turn, args.size)])
    save_images(args, rows, {name: roughness(turn, args.size) for name, turn in turns.items()})


def refined_turn(planes, decoder, args, angles):
    """Renders planes from all angles by fewer pixels, and refines each view on its own."""
    network = running.load_refiner(args.runs, args.device)
    size = side_of(args.size, network)
    smaller = argparse.Namespace(**{**vars(args), 'size': size})
    views = [view(planes, decoder, smaller, azimuth) for azimuth in angles]
    return [network.refine(image.to(args.device)).cpu() for image in views]


def roughness(turn, size):
    """How jagged the lines are that a turn draws: the mean squared second difference from view to
    view, over that along the image's line, which takes out how much detail there is."""
    lines = torch.stack([image[int(0.45 * size)] for image in turn])  # (views, size, 3)
    from_view_to_view = torch.diff(lines, n=2, dim=0).square().mean()
    along = torch.diff(lines, n=2, dim=1).square().mean()
    return float(from_view_to_view / along)


def denoising(args):
    """Draws x_start as both models predict it, from the first to the last step.

    The upper row is the base model's, enlarged, the lower one the upsample model's.
    """
    models = load_models(args)
    config = models['upsample'].config
    condition = rh.encode_portrait(models['vae'], portrait(args, models), config)
    rows, planes = [], None
    for stage in ('base', 'upsample'):
        predicted = []
        planes = rh.sample_stage(
            stage, models[stage], condition, planes, seed=args.seed, watch=predicted.append
        )
        row = []
        for x_start in predicted:
            enlarged = rh.resize_planes(x_start[0], config.resolution)
            row.append(view(enlarged, models['decoder'], args, azimuth=20))
        rows.append(row)
    save_images(args, rows)


def neighbours(args):
    """Draws each generated avatar beside the three of --fits (one folder) that look most like it.

    These are the ones whose fitted frontal view is nearest to its own, by squared error.
    """
    models = load_models(args)
    decoder = running.load_model('decoder', args.fits[0], args.device)
    planes_of = fitted(args.fits[0], decoder)
    known = [view(planes, decoder, args) for planes in planes_of.values()]
    rows = []
    for i in range(len(args.portrait or ()) or 1):
        planes = rh.generate(models, portrait(args, models, i), seed=args.seed).planes[0]
        ours = view(planes, models['decoder'], args)
        distances = [float(F.mse_loss(image, ours)) for image in known]
        nearest = sorted(range(len(known)), key=distances.__getitem__)[:3]
        rows.append([ours, *(known[index] for index in nearest)])
    save_images(args, rows)


def lookalikes(args):
    """Draws each generated avatar beside the three training portraits of --data whose vectors of
    CLIP are nearest to that of its frontal view. The numbers are the cosines."""
    models = load_models(args)
    clip = running.load_clip(models['base'].path.parent, args.device)
    folders = scenes.list_avatars(args.data)
    known = []
    for folder in folders:  # one at a time, however many there are
        image = front_of(folder, args.size)[None].to(args.device)
        known.append(clip.encode_images(image))
    known = torch.cat(known)
    rows, numbers = [], {}
    for i in range(len(args.portrait or ()) or 1):
        planes = rh.generate(models, portrait(args, models, i), seed=args.seed).planes[0]
        ours = view(planes, models['decoder'], args)
        z = clip.encode_images(ours.permute(2, 0, 1)[None].to(args.device) * 2 - 1)
        cosines = F.cosine_similarity(z, known)
        nearest = cosines.argsort(descending=True)[:3].tolist()
        shown = [front_of(folders[k], args.size) for k in nearest]
        shown += [torch.ones_like(shown[0])] * (3 - len(shown))
        rows.append([ours, *(resized(image, args.size) for image in shown)])
        name = f'{i + 1}: {args.portrait[i].name}'
        numbers[name] = {folders[k].name: float(cosines[k]) for k in nearest}
    save_images(args, rows, numbers)


def nobody(args):
    """Draws --count avatars of nobody: of the null condition and, in a second row, of vectors that
    the prior draws, where there is one."""
    models = load_models(args)
    seeds = range(args.seed, args.seed + args.count)
    rows = [[rh.generate(models, 1, seed=seed).planes[0] for seed in seeds]]
    if running.has_latents(models, 'prior'):
        running.load_latents(models, 'prior')
        rows.append([])
        for seed in seeds:
            z = rodin.draw_latents(models['prior'], 1, seed=seed)
            drawn = rh.nobody(models['base'].config, 1, z)
            rows[1].append(rh.generate(models, drawn, seed=seed).planes[0])
    pictures = [[view(planes, models['decoder'], args, 20) for planes in row] for row in rows]
    save_images(args, pictures)


def ablation(args):
    """Draws what models make of portraits (a row each): the portrait, the avatar of --runs, then
    those of the models of --others, which were trained otherwise; all with the same noise."""
    rows = [[] for _ in args.portrait or [None]]
    for runs in (args.runs, *args.others):
        models = running.load_models(runs, args.fits[0], args.device)
        for i, row in enumerate(rows):
            given = portrait(args, models, i)
            if not row:
                row.append(resized(given[0].cpu(), args.size))
            planes = rh.generate(models, given, seed=args.seed).planes[0]
            row.append(view(planes, models['decoder'], args, 20))
    save_images(args, rows)


# Meshes -------------------------------------------------------------------------------------------
def draw_mesh(mesh, camera, size):
    """Casts a ray through each pixel at a mesh with a texture -> image (size, size, 3), and hits
    (size^2,)."""
    import trimesh
    rays_o, rays_d = rh.view_rays(*camera, size, size)
    points, ray, face = mesh.ray.intersects_location(
        rays_o.numpy(), rays_d.numpy(), multiple_hits=False
    )
    weights = trimesh.triangles.points_to_barycentric(mesh.triangles[face], points)
    uv = (mesh.visual.uv[mesh.faces[face]] * weights[..., None]).sum(1)  # (hits, 2), v goes up
    texture = np.array(mesh.visual.material.baseColorTexture.convert('RGB')) / 255
    texels = torch.tensor(texture, dtype=torch.float32).permute(2, 0, 1)
    places = torch.tensor(uv * [2, -2] + [-1, 1], dtype=torch.float32)
    looked_up = F.grid_sample(
        texels[None], places[None, None], align_corners=False, padding_mode='border'
    )

    image = torch.ones(size ** 2, 3)
    image[ray] = looked_up[0, :, 0].T
    solid = torch.zeros(size ** 2, dtype=torch.bool)
    solid[ray] = True
    return image.view(size, size, 3), solid


def meshes(args):
    """Draws three avatars of --fits (one folder) from four sides, as volumes and as meshes.

    Meshes are as sample.py --mesh writes them: 10,000 triangles with a texture. The numbers are the
    overlap of their silhouettes, and PSNR.
    """
    try:
        import embreex  # noqa: F401
        import trimesh  # noqa: F401
        import xatlas  # noqa: F401
    except ImportError as error:
        rh.stop(
            f'meshes are drawn with the {error.name} package: '
            'pip install trimesh embreex scikit-image fast-simplification xatlas'
        )
    decoder = running.load_model('decoder', args.fits[0], args.device)
    planes = fitted(args.fits[0], decoder)
    rows, numbers = [], about(args)
    for name in list(planes)[::max(len(planes) // 3, 1)][:3]:
        field = rh.PlaneField(planes[name].to(args.device), decoder)
        grid = rh.grid_for(field, decoder.config, args.device)
        mesh = mesh_of(field, grid, triangles=TRIANGLES, texture=TEXTURE)

        volume = []
        surface = []
        psnrs = []
        overlaps = []
        for azimuth in (0, 90, 180, 270):
            camera = camera_at(azimuth, args)
            picture = render(field, grid, camera, decoder.config, args)
            image, solid = draw_mesh(mesh, camera, args.size)
            seen = picture.opacity.view(-1) > 0.5
            psnrs.append(rh.psnr(image, picture.rgb))
            overlaps.append(float((solid & seen).sum() / (solid | seen).sum()))
            volume.append(picture.rgb)
            surface.append(image)
        rows += [volume, surface]
        numbers['avatars'][name] = {
            'PSNR': np.mean(psnrs),
            'overlap': np.mean(overlaps),
            'triangles': len(mesh.faces),
        }
    save_images(args, rows, numbers)


# Training -----------------------------------------------------------------------------------------
def smooth(values, share=0.02):
    """Values (n,) as running means over a share of them, so that a noisy loss shows its course."""
    width = max(1, int(share * len(values)))
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode='edge')
    return np.convolve(padded, np.ones(width) / width, mode='valid')


def curves(args):
    """Draws the logs of all stages in --runs: the losses, and those on fixed noise."""
    logs = {path.stem: watching.lines_of(path) for path in sorted(args.runs.glob('*.jsonl'))}
    if not any(logs.values()):
        rh.stop(f'{args.runs}: holds no log of train.py')
    beside = {'step', 'seconds', 'lr', 'norm', 'skipped', 'fixed', 'held_out'}
    figure, plot = axes('step', 'loss')
    numbers = {}
    for stage, lines in logs.items():
        steps = [line['step'] for line in lines]
        losses = [sum(x for name, x in line.items() if name not in beside) for line in lines]
        drawn, = plot.plot(steps, smooth(losses), label=stage)
        for name, style in (('fixed', 'o'), ('held_out', 's')):
            at = [line for line in lines if line.get(name) is not None]
            values = [line[name] for line in at]
            label = f'{stage}, {"held out" if name == "held_out" else "on fixed noise"}'
            if at:
                marks = {'marker': style, 'color': drawn.get_color(), 'label': label}
                plot.plot([line['step'] for line in at], values, linestyle=':', **marks)
                numbers[label] = dict(zip((line['step'] + 1 for line in at), values))
    plot.set_yscale('log')
    plot.legend()
    save_plot(args, figure, numbers)


# Further photographs ------------------------------------------------------------------------------
SIDES = (-55, 45)  # azimuths near which further photographs are taken, degrees


def bearing(c2w):
    """Azimuth and elevation in degrees of the camera of a pose (4, 4)."""
    back = c2w[:3, 2]
    azimuth = math.degrees(math.atan2(back[0], -back[1]))
    return azimuth, math.degrees(math.asin(back[2].clamp(-1, 1)))


def photograph_near(folder, views, azimuth, size):
    """The training view of an avatar that is most level and nearest to an azimuth, as somebody
    would give it: its azimuth in steps of five degrees -> likeness.Photograph."""
    bearings = [bearing(pose) for pose in views.c2w]
    costs = [abs(a - azimuth) + 2 * abs(elevation) for a, elevation in bearings]
    best = costs.index(min(costs))
    meta, frames = scenes.read_frames(folder, 'train')
    pixels = scenes.pixels_of_frame(folder, meta, frames[best], size)
    rgb, alpha = scenes.portrait_in_floats(pixels)
    image = scenes.portrait_on_white(rgb, alpha)
    return likeness.Photograph(image, alpha, 5 * round(bearings[best][0] / 5))


class FromPhotographs(NamedTuple):
    """Avatars of one person, and what they were made of."""
    planes: dict  # {how many photographs: (3, C, R, R)}
    images: list  # the photographs (3, P, P) in [-1, 1], the portrait first
    azimuths: list  # given, of the further ones
    angles: list  # found: azimuth and elevation


def fitted_to_photographs(folder, models, box, args):
    """Makes avatars of the portrait in a folder, and of one and two further photographs."""
    size = models['upsample'].config.portrait
    rgb, alpha = scenes.portrait_of(folder, size)
    portrait = scenes.portrait_on_white(rgb, alpha)[None]
    views = scenes.load_views(folder, 'train', box)
    sides = [photograph_near(folder, views, azimuth, size) for azimuth in SIDES]

    decoder = models['decoder']
    steps = models['base'].config.likeness_steps
    seen = likeness.straighten(models, portrait, alpha[None], seed=args.seed)
    seen = likeness.Seen(*(x[0] for x in seen))
    sampled = likeness.sample_towards(models, seen, (), seed=args.seed)

    # What likeness.fit_to_photographs does, whose beginning is the same for all
    planes = {1: likeness.fit_one(sampled, seen, decoder, steps)}
    found = likeness.find_views(planes[1], decoder, sides)
    for n in (1, 2):
        more = likeness.steps_for(steps, found[:n])
        again = likeness.sample_towards(models, seen, found[:n], seed=args.seed)
        planes[1 + n] = likeness.fit_one(again, seen, decoder, more, views=found[:n])
    angles = [view.angles for view in found]
    images = [portrait[0], *(side.image for side in sides)]
    return FromPhotographs(planes, images, [side.azimuth for side in sides], angles)


def views(args):
    """Measures avatars of a portrait and of one or two further photographs on held-out views.

    A row shows the three photographs, then from one side what one, two and three of them gave, and
    the truth. --data: avatars, of which --count are taken, evenly spread.
    """
    models = load_models(args)
    config = models['decoder'].config
    folders = spread(scenes.list_avatars(args.data), args.count)
    rows, found = [], {}
    for folder in folders:
        box = scenes.read_box(folder)
        truth = scenes.load_views(folder, 'test', box, args.downscale, 6)
        with torch.enable_grad():
            made = fitted_to_photographs(folder, models, box, args)
        whites = [rh.on_white(image) for image in truth.images]
        ours, psnrs = {}, {}
        for n, planes in made.planes.items():
            field = rh.PlaneField(planes, models['decoder'])
            grid = rh.grid_for(field, config, args.device)
            ours[n] = pictures_of(field, grid, truth, args)
            psnrs[n] = float(np.mean([rh.psnr(a, b) for a, b in zip(ours[n], whites)]))
        found[folder.name] = {'given': made.azimuths, 'found': made.angles, 'PSNR': psnrs}
        write_views(found, args)

        turned = [abs(bearing(pose)[0]) for pose in truth.c2w]
        side = min(range(len(turned)), key=lambda k: abs(turned[k] - 60))
        row = [resized(image, len(whites[0])) for image in made.images]
        rows.append([*row, *(pictures[side] for pictures in ours.values()), whites[side]])
    save_images(args, rows)


def write_views(found, args):
    """Writes what was found of the avatars so far to results/views.json."""
    means = {n: float(np.mean([x['PSNR'][n] for x in found.values()])) for n in (1, 2, 3)}
    path = ROOT / 'results' / 'views.json'
    numbers = {**about(args), 'PSNR of 1, 2, 3 photographs': means, 'avatars': found}
    running.write_json(path, numbers)


def pictures_of(field, grid, views, args):
    """Renders a field as the cameras of Views see it, [(H, W, 3)]."""
    height, width = views.images.shape[1:3]
    pictures = []
    for c2w, intrinsics in zip(views.c2w, views.intrinsics):
        camera = c2w.to(args.device), intrinsics.to(args.device)
        picture = rh.render_view(field, *camera, height, width, grid.steps, grid)
        pictures.append(picture.rgb.cpu())
    return pictures


def resized(image, side):
    """A portrait (3, P, P) in [-1, 1] as a picture (side, side, 3) in 0..1."""
    shrunk = F.interpolate(image[None] / 2 + 0.5, size=side, mode='area')[0]
    return shrunk.permute(1, 2, 0)


# The command --------------------------------------------------------------------------------------
FIGURES = {
    'forgetting': forgetting,
    'spectra': spectra,
    'frequencies': frequencies,
    'noise': noise,
    'schedules': schedules,
    'epipolar': epipolar,
    'resolution': resolution,
    'scaling': scaling,
    'fitting': fitting,
    'images': images,
    'denoising': denoising,
    'neighbours': neighbours,
    'lookalikes': lookalikes,
    'nobody': nobody,
    'ablation': ablation,
    'meshes': meshes,
    'views': views,
    'curves': curves,
}


def main(args):
    if args.size < 16:
        rh.stop('--size must be at least 16')
    if args.count < 1 or args.downscale < 1:
        rh.stop('--count and --downscale must be at least 1')
    _, _, args.device = running.start(args.device, args.seed)
    with torch.no_grad():
        FIGURES[args.figure](args)


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add('figure', choices=FIGURES)
    add('--fits', type=Path, nargs='+', default=[Path('fits')])
    add('--runs', type=Path, default=Path('runs'))
    add('--portrait', type=Path, nargs='+')
    frames = 'epipolar: folders of frames of other methods'
    add('--frames', type=Path, nargs='*', default=[], help=frames)
    add('--data', type=Path, default=Path('data'), help='avatars')
    add('--count', type=int, default=6, help='so many avatars, evenly spread')
    add('--downscale', type=int, default=1, help='average images of --data down by this factor')
    add('--others', type=Path, nargs='*', default=[], help='ablation: folders of other models')
    add('--refiner', action='store_true', help="epipolar: a row through Rodin's refiner, too")
    add('--size', type=int, default=256, help='pixels a side of a rendered view')
    add('--out', type=Path, default=Path('assets'))
    add('--seed', type=int, default=0)
    add('--device', help='cuda where there is one, else cpu')
    args = p.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    return args


if __name__ == '__main__':
    main(parse())
