"""The papers' figures, each as assets/<figure>.png (--out), with its numbers as JSON where it has some.

    python figures.py forgetting --fits once replay          PSNR of the first avatar while the decoder goes on to others (Fig. 2)
    python figures.py spectra --fits fits no_iwc no_tv       how much of the planes is of high frequency (Fig. 4)
    python figures.py noise --fits channels8 channels32      planes under the same noise, with few and with many channels (Fig. 5)
    python figures.py schedules                              log signal-to-noise ratio of the noise schedules (Fig. 6)
    python figures.py epipolar --portrait x.png              one line of the image while the camera moves (Figs. 9 and 16)
    python figures.py resolution --fits r32 r64 r128         the same view from planes of other sizes (Fig. 14)
    python figures.py denoising --portrait x.png             what the models take the avatar for, step by step (Fig. 15)
    python figures.py neighbours --portrait x.png            a generated avatar beside its nearest training avatars (Rodin, Fig. 17)
    python figures.py meshes --fits fits                     volumes and their meshes; needs trimesh and embreex

--fits are folders of fit.py, of the same avatars; the models are those of runs/ or weights/, as for sample.py. Needs matplotlib. From one
avatar to another (Rodin, Fig. 6) goes sample.py --interpolate.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import export
import rodinhd as rh


def axes(xlabel, ylabel, width=7.2, height=3.6):
    """A matplotlib figure with one plot."""
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

def save(args, picture, numbers=None):
    """Writes <out>/<figure>.png, of a matplotlib figure or of rows of images (H, W, 3) in 0..1, and <figure>.json."""
    path = args.out / f'{args.figure}.png'
    with rh.atomic(path) as temporary:
        if isinstance(picture, list):
            image = torch.cat([torch.cat(row, dim=1) for row in picture])
            Image.fromarray((image.clamp(0, 1) * 255).round().byte().numpy()).save(temporary)
        else:
            picture.savefig(temporary, dpi=120)
    if numbers is not None:
        with rh.atomic(path.with_suffix('.json')) as temporary:
            temporary.write_text(json.dumps(numbers, indent=1) + '\n')
    print(f'written: {path}' + (f', {path.with_suffix(".json")}' if numbers is not None else ''))

def view(planes, decoder, args, azimuth=0, elevation=5):
    """Planes (3, C, R, R) from one side: (size, size, 3) in 0..1."""
    field = rh.PlaneField(planes.to(args.device), decoder)
    pose, intrinsics = rh.orbit_pose(azimuth, elevation).to(args.device), rh.intrinsics_of(34.0, args.size).to(args.device)
    grid = rh.grid_for(field, decoder.config, args.device)
    return rh.render_view(field, pose, intrinsics, args.size, args.size, decoder.config.steps, grid)[0].cpu()

def fitted(folder, most=None):
    """{avatar: planes (3, C, R, R)} of a folder of fit.py."""
    paths = sorted(p for p in folder.glob('*.pt') if p.name != 'decoder.pt')[:most]
    return {p.stem: rh.read_checkpoint(p, 'planes')['planes'].float() for p in paths} or rh.stop(f'{folder}: holds no planes of fit.py')

def portrait(args, models, i=0):
    """Portrait number i of the command line, (1, 3, P, P) in [-1, 1]."""
    if not args.portrait or len(args.portrait) <= i:
        rh.stop(f'figures.py {args.figure} needs --portrait')
    return rh.portrait_on_white(*rh.read_portrait(args.portrait[i], models['upsample'].config.portrait))[None].to(args.device)

def forgetting(args):
    figure, plot = axes("training of the decoder, share of its steps", "PSNR of the first avatar (dB)")
    curves = {}
    for folder in args.fits:
        try:
            curve = [json.loads(line)['first_avatar_psnr'] for line in (folder / 'decoder.jsonl').read_text().splitlines()]
            curve[0]
        except (OSError, ValueError, KeyError, IndexError):
            rh.stop(f'{folder}/decoder.jsonl: not a log of fit.py --decoder --watch')
        plot.plot([(i + 1) / len(curve) for i in range(len(curve))], curve, label=folder.name)
        curves[folder.name] = curve
    plot.legend()
    save(args, figure, curves)

def spectrum(planes):
    """Mean power of planes (3, C, R, R), their mean left out, at radial frequencies 0 ... R/2 cycles a plane: (R/2 + 1,). The last has what
    is above it, too, in the corners; the plot leaves it out."""
    R = planes.shape[-1]
    power = torch.fft.fft2(planes - planes.mean((2, 3), keepdim=True)).abs().square().mean((0, 1)) / R ** 4
    frequency = torch.fft.fftfreq(R, 1 / R)
    radius = (frequency[:, None] ** 2 + frequency ** 2).sqrt().round().long().clamp(max=R // 2)
    return torch.zeros(R // 2 + 1).index_add_(0, radius.flatten(), power.flatten())

def spectra(args):
    """Shares are of the power at and above a quarter of the sampling rate (R/4 cycles a plane)."""
    figure, plot = axes('cycles a plane', 'power')
    shares = {}
    for folder in args.fits:
        mean = torch.stack([spectrum(planes) for planes in fitted(folder).values()]).mean(0)
        shares[folder.name] = float(mean[len(mean) // 2:].sum() / mean.sum())
        plot.loglog(range(1, len(mean) - 1), mean[1:-1], label=f'{folder.name}: {shares[folder.name]:.2%} in the upper half')
    plot.legend()
    save(args, figure, shares)

def noise(args):
    """x_t / sqrt(alpha_bar) of the first avatar at log-SNR 4, 2, 0.57 (the paper's) and -1: a row a folder, the clean planes first."""
    rows = []
    for folder in args.fits:
        planes, decoder = next(iter(fitted(folder, 1).values())), rh.load_model('decoder', folder, args.device)
        draw = torch.randn(planes.shape, generator=torch.Generator().manual_seed(args.seed))
        rows.append([view((planes + np.exp(-snr / 2) * draw).clamp(-1, 1), decoder, args) for snr in (np.inf, 4, 2, 0.57, -1)])
    save(args, rows)

def schedules(args):
    figure, plot = axes('t', 'log signal-to-noise ratio')
    for label, name, steps in (('cosine (base)', 'cosine', 1000), ('sigmoid (upsample)', 'sigmoid', 100), ('linear', 'linear', 1000)):
        alpha_bar = torch.cumprod(1 - rh.noise_schedule(name, steps), 0)
        plot.plot((torch.arange(steps) + 1) / steps, torch.log(alpha_bar / (1 - alpha_bar)), label=label)
    plot.set_ylim(-20, 8)
    plot.legend()
    save(args, figure)

def epipolar(args):
    """A line of the image through the face (45 % from above), stacked while the camera turns from -40 to 40 degrees: what is solid draws
    smooth lines. A row of three views and the stack; one more for each of --frames, whose images, by name, are such a turn."""
    models = rh.load_models(args.runs, args.fits[0], args.device)
    planes, _ = rh.generate(models, portrait(args, models), seed=args.seed)
    turns = [[view(planes[0], models['decoder'], args, azimuth) for azimuth in torch.linspace(-40, 40, args.size // 2).tolist()]]
    for folder in args.frames:
        paths = sorted(p for p in folder.glob('*') if p.suffix.lower() in rh.IMAGE_SUFFIXES) or rh.stop(f'{folder}: holds no images')
        turns.append([(rh.portrait_on_white(*rh.read_portrait(p, args.size)).permute(1, 2, 0) + 1) / 2 for p in paths])
    rows = []
    for views in turns:
        lines = torch.stack([v[int(0.45 * args.size)] for v in views]).permute(2, 0, 1)[None]      # (1, 3, views, size)
        stack = F.interpolate(lines, size=(args.size, args.size))[0].permute(1, 2, 0)
        rows.append([views[0], views[len(views) // 2], views[-1], stack])
    save(args, rows)

def resolution(args):
    planes = [(next(iter(fitted(folder, 1).values())), rh.load_model('decoder', folder, args.device)) for folder in args.fits]
    save(args, [[view(*one, args, azimuth) for one in planes] for azimuth in (0, 50)])

def denoising(args):
    """x_start as the base model (upper row, enlarged) and then the upsample model (lower) predict it, first to last step."""
    models = rh.load_models(args.runs, args.fits[0], args.device)
    config, rows, low = models['upsample'].config, [], None
    condition = rh.encode_portrait(models['vae'], portrait(args, models), config)
    for stage in ('base', 'upsample'):
        trajectory = []
        low = rh.sample_stage(stage, models[stage], condition, low, seed=args.seed, watch=trajectory.append)
        rows.append([view(rh.resize_planes(x[0], config.resolution), models['decoder'], args, 20) for x in trajectory])
    save(args, rows)

def neighbours(args):
    """Beside each generated avatar the three of --fits (one folder) whose fitted frontal view is nearest to its own."""
    models, decoder = rh.load_models(args.runs, args.fits[0], args.device), rh.load_model('decoder', args.fits[0], args.device)
    known = [view(planes, decoder, args) for planes in fitted(args.fits[0]).values()]
    rows = []
    for i in range(len(args.portrait or ()) or 1):
        ours = view(rh.generate(models, portrait(args, models, i), seed=args.seed)[0][0], models['decoder'], args)
        rows.append([ours, *sorted(known, key=lambda image, ours=ours: float(F.mse_loss(image, ours)))[:3]])
    save(args, rows)

def meshes(args):
    """Three avatars of --fits (one folder) from four sides, as volumes and as meshes of 20,000 triangles; silhouettes' overlap, PSNR."""
    try:
        import embreex  # noqa: F401
        import trimesh
    except ImportError as error:
        rh.stop(f'meshes are drawn with the {error.name} package: pip install trimesh embreex scikit-image fast-simplification')
    planes, decoder = fitted(args.fits[0]), rh.load_model('decoder', args.fits[0], args.device)
    rows, numbers = [], {}
    for name in list(planes)[::max(len(planes) // 3, 1)][:3]:
        field = rh.PlaneField(planes[name].to(args.device), decoder)
        grid = rh.grid_for(field, decoder.config, args.device)
        mesh = export.mesh_of(field, grid, triangles=20000)
        volume, surface, scores = [], [], []
        for azimuth in (0, 90, 180, 270):
            pose, intrinsics = rh.orbit_pose(azimuth, 5), rh.intrinsics_of(34.0, args.size)
            rgb, opacity = (x.cpu() for x in rh.render_view(field, pose.to(args.device), intrinsics.to(args.device), args.size, args.size,
                                                            decoder.config.steps, grid))
            rays_o, rays_d = rh.view_rays(pose, intrinsics, args.size, args.size)
            hit, ray, face = mesh.ray.intersects_location(rays_o.numpy(), rays_d.numpy(), multiple_hits=False)
            weights = trimesh.triangles.points_to_barycentric(mesh.triangles[face], hit)
            colours = mesh.visual.vertex_colors[mesh.faces[face]][:, :, :3] / 255
            image, solid = torch.ones(args.size ** 2, 3), torch.zeros(args.size ** 2, dtype=torch.bool)
            image[ray], solid[ray] = torch.tensor(weights[:, None] @ colours, dtype=torch.float32)[:, 0], True
            seen = opacity.view(-1) > 0.5
            scores.append((rh.psnr(image.view_as(rgb), rgb), float((solid & seen).sum() / (solid | seen).sum())))
            volume.append(rgb)
            surface.append(image.view_as(rgb))
        numbers[name] = dict(zip(('PSNR', 'overlap'), np.mean(scores, axis=0)), triangles=len(mesh.faces))
        rows += [volume, surface]
    save(args, rows, numbers)

FIGURES = {f.__name__: f for f in (forgetting, spectra, noise, schedules, epipolar, resolution, denoising, neighbours, meshes)}

def main(args):
    if args.size < 16:
        rh.stop('--size must be at least 16')
    _, _, args.device = rh.start(args.device, args.seed)
    with torch.no_grad():
        FIGURES[args.figure](args)

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('figure', choices=FIGURES)
    p.add_argument('--fits', type=Path, nargs='+', default=[Path('fits')])
    p.add_argument('--runs', type=Path, default=Path('runs'))
    p.add_argument('--portrait', type=Path, nargs='+')
    p.add_argument('--frames', type=Path, nargs='*', default=[], help='epipolar: folders of frames of other methods')
    p.add_argument('--size', type=int, default=256, help='pixels a side of a rendered view')
    p.add_argument('--out', type=Path, default=Path('assets'))
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', help='cuda where there is one, else cpu')
    return p.parse_args(argv)

if __name__ == '__main__':
    main(parse())
