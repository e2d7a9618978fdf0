"""Stage 4: how good are the avatars? PSNR, SSIM, LPIPS and the distance of VAE features, at held-out cameras.

    python evaluate.py                                   avatars of data/: fitted, and generated from their portraits
    python evaluate.py --data test --train data          generated for avatars that training never saw
    torchrun --standalone --nproc_per_node=2 evaluate.py
    python evaluate.py --forgetting fits_once fits_replay    the forgetting curve of runs of fit.py --decoder --watch (Fig. 2)

Rows of the table: `fitted` (planes in --fits), `generated` (from the portrait), and two baselines that any generator must beat: `nearest`,
the training avatar with the nearest portrait, and `mean`, the mean of the training planes. Writes results/evaluate.json and .png.
"""
import argparse
import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import rodinhd as rh


def ssim(a, b):
    """Structural similarity of images (3, H, W) in 0..1: Gaussian window of 11 pixels, sigma 1.5 (Wang 2004), mean over pixels."""
    tap = torch.exp(-torch.arange(-5.0, 6.0) ** 2 / (2 * 1.5 ** 2))
    window = (tap[:, None] * tap / tap.sum() ** 2).expand(3, 1, 11, 11)
    def blur(x):
        return F.conv2d(x[None], window, groups=3)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return float((((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))).mean())


def lpips_metric():
    """LPIPS (AlexNet) of images (3, H, W) in 0..1, or None with one line on stdout where the backbone's weights cannot be had."""
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
    """Mean over the VAE's three maps of the squared difference of channel-normalised features of images (3, H, W) in 0..1. Not LPIPS."""
    def distance(a, b):
        maps = [vae.features(x[None] * 2 - 1) for x in (a, b)]
        return sum(float((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()) for x, y in zip(*maps)) / 3
    return distance


def read_planes(path, device):
    return rh.read_checkpoint(path, 'planes', 'python fit.py')['planes'].float().clamp(-1, 1).to(device)


class Baselines:
    """Planes of the training avatar whose portrait is nearest (mean squared difference on white, 64 x 64), and the mean planes."""

    def __init__(self, args, config, device):
        self.fits, self.device = args.fits, device
        self.folders = [f for f in rh.list_avatars(args.train or args.data) if (args.fits / f'{f.name}.pt').exists()]
        self.portraits = [rh.portrait_on_white(*rh.read_portrait(rh.portrait_path(f), 64)) for f in self.folders]
        self.mean = sum(read_planes(args.fits / f'{f.name}.pt', device) / len(self.folders) for f in self.folders) if self.folders else None
        if not self.folders and dist.get_rank() == 0:
            print(f'{args.fits} holds no planes of {args.train or args.data}: no baselines (fit them with python fit.py)')

    def nearest(self, folder):
        """An avatar is not its own neighbour; with nobody else there is None."""
        portrait = rh.portrait_on_white(*rh.read_portrait(rh.portrait_path(folder), 64))
        others = [(float(F.mse_loss(p, portrait)), f) for p, f in zip(self.portraits, self.folders) if f.name != folder.name]
        return read_planes(self.fits / f'{min(others)[1].name}.pt', self.device) if others else None


def load(args, device):
    """The generator's models, of --runs (with the decoder of --fits) if it was trained there, else of weights/; and the decoder of --fits,
    which may be another one, for what was fitted there."""
    weights = Path(__file__).parent / 'weights'
    trained = any((args.runs / f'{k}.pt').exists() for k in ('base', 'upsample'))
    models = {k: rh.load_model(k, args.runs if trained else weights, device) for k in ('vae', 'base', 'upsample')}
    models['decoder'] = rh.load_model('decoder', args.fits if trained else weights, device)
    fitted = rh.load_model('decoder', args.fits, device) if (args.fits / 'decoder.pt').exists() else models['decoder']
    return models, fitted


def evaluate(args, rank, world, device):
    models, fitted_decoder = load(args, device)
    config = models['upsample'].config
    distances = {'PSNR': rh.psnr, 'SSIM': ssim, 'LPIPS': lpips_metric(), 'VAE': vae_distance(copy.deepcopy(models['vae']).cpu())}
    baselines = Baselines(args, config, device)
    folders = rh.list_avatars(args.data)
    if args.count and len(folders) > args.count:
        folders = [folders[i * len(folders) // args.count] for i in range(args.count)]
    results, pictures = {}, []
    for folder in tqdm(folders[rank::world], disable=rank > 0, desc='evaluating'):
        box = rh.read_box(folder)
        views = rh.load_views(folder, 'test', box, most=args.views) or rh.load_views(folder, 'train', box, most=args.views)
        candidates = {}
        if (args.fits / f'{folder.name}.pt').exists():
            candidates['fitted'] = read_planes(args.fits / f'{folder.name}.pt', device)
        portrait = rh.portrait_on_white(*rh.read_portrait(rh.portrait_path(folder), config.portrait))
        candidates['generated'] = rh.generate(models, portrait[None], args.guidance, args.steps, seed=args.seed)[0][0]
        candidates['nearest'] = baselines.nearest(folder)
        candidates['mean'] = baselines.mean
        height, width = views.images.shape[1:3]
        truth = [views.rgb(i).permute(2, 0, 1) for i in range(len(views.images))]
        seen = F.interpolate((portrait[None] + 1) / 2, size=(height, width), mode='area')[0]
        strip = [] if args.no_truth else [seen, truth[0], truth[-1]]
        results[folder.name] = {}
        for name, planes in candidates.items():
            if planes is None:
                continue
            decoder = models['decoder'] if name == 'generated' else fitted_decoder
            field = rh.PlaneField(planes, decoder)
            grid = rh.grid_for(field, decoder.config, device)
            ours = [rh.render_view(field, c.to(device), k.to(device), height, width, decoder.config.steps, grid)[0].cpu().permute(2, 0, 1)
                    for c, k in zip(views.c2w, views.intrinsics)]
            results[folder.name][name] = {m: sum(map(f, ours, truth)) / len(truth) for m, f in distances.items() if f}
            strip += [ours[0], ours[-1]]
        pictures.append(torch.cat(strip, dim=2))
    gathered, all_pictures = [None] * world, [None] * world
    dist.all_gather_object(gathered, results)
    dist.all_gather_object(all_pictures, [p for p in pictures if p.shape == pictures[0].shape][:8])
    if rank == 0:
        report(args, {k: v for part in gathered for k, v in sorted(part.items())}, [p for part in all_pictures for p in part][:8])


def report(args, results, pictures):
    """Prints the table of means, and writes results/evaluate.json and the picture: portrait, two truths, two views of each candidate."""
    names = [n for n in ('fitted', 'generated', 'nearest', 'mean') if any(n in r for r in results.values())]
    metrics = [m for m in ('PSNR', 'SSIM', 'LPIPS', 'VAE') if any(m in c for r in results.values() for c in r.values())]
    table = {n: {m: float(np.mean([r[n][m] for r in results.values() if n in r])) for m in metrics} for n in names}
    print(f'{"":12s}' + ''.join(f'{m:>9s}' for m in metrics) + f'   mean of {len(results)} avatars')
    for n in names:
        print(f'{n:12s}' + ''.join(f'{table[n][m]:9.3f}' for m in metrics))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'evaluate.json').write_text(json.dumps({'mean': table, 'avatars': results, 'seed': args.seed}, indent=1))
    if pictures and len({p.shape for p in pictures}) == 1:
        image = torch.cat(pictures, dim=1).permute(1, 2, 0).clamp(0, 1)
        picture = Image.fromarray((image * 255).round().byte().numpy())
        legend = [*([] if args.no_truth else ['portrait', 'truth', '']), *[w for n in names for w in (n, '')]]
        sheet = Image.new('RGB', (picture.width, picture.height + 14), 'white')
        sheet.paste(picture, (0, 14))
        for i, word in enumerate(legend):
            ImageDraw.Draw(sheet).text((i * picture.width / len(legend) + 3, 1), word, fill='black')
        sheet.save(args.out / 'evaluate.png')
        print(f'written to {args.out}: evaluate.json, evaluate.png')


def forgetting(args):
    """PSNR of the first avatar's planes under the decoder as it goes on to others, of several runs: a line plot and its numbers."""
    curves = {}
    for folder in args.forgetting:
        try:
            lines = [json.loads(line) for line in (folder / 'decoder.jsonl').read_text().splitlines()]
            curves[str(folder)] = [r['first_avatar_psnr'] for r in lines]
            curves[str(folder)][0]
        except (OSError, ValueError, KeyError, IndexError):
            rh.stop(f'{folder}/decoder.jsonl: not a log of fit.py --decoder --watch')
    W, H, left, colours = 720, 360, 50, ('#c0392b', '#2060b0', '#208040', '#806010')
    low, high = (f(v for c in curves.values() for v in c) for f in (min, max))
    low, high = low - 1, high + 1
    image = Image.new('RGB', (W, H), 'white')
    draw = ImageDraw.Draw(image)
    for dB in range(int(low) + 1, int(high) + 1, 2):
        y = H - 40 - (dB - low) / (high - low) * (H - 60)
        draw.line([(left, y), (W - 10, y)], fill='#dddddd')
        draw.text((8, y - 6), f'{dB} dB', fill='black')
    for i, (name, curve) in enumerate(curves.items()):
        colour = colours[i % len(colours)]
        points = [(left + (k + 1) / len(curve) * (W - left - 10), H - 40 - (v - low) / (high - low) * (H - 60))
                  for k, v in enumerate(curve)]
        draw.line(points, fill=colour, width=3)
        draw.text((W - 160, 10 + 14 * i), name, fill=colour)
    draw.text((left, H - 26), 'training of the decoder, share of its steps, 0 to 1; PSNR of the first avatar', fill='black')
    args.out.mkdir(parents=True, exist_ok=True)
    image.save(args.out / 'forgetting.png')
    (args.out / 'forgetting.json').write_text(json.dumps(curves))
    print(f'written to {args.out}: forgetting.json, forgetting.png')


def main(args):
    rank, world, device = rh.start(args.device, args.seed)
    if args.views < 1 or (args.count or 1) < 1 or not 1 <= (args.steps or 1) <= 100:
        rh.stop('--views and --count must be at least 1, --steps 1 to 100')
    if args.forgetting:
        return forgetting(args)
    evaluate(args, rank, world, device)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('data'), help='avatars to evaluate')
    p.add_argument('--train', type=Path, help='training avatars, for the baselines (default: --data)')
    p.add_argument('--fits', type=Path, default=Path('fits'))
    p.add_argument('--runs', type=Path, default=Path('runs'))
    p.add_argument('--out', type=Path, default=Path('results'))
    p.add_argument('--count', type=int, help='only this many avatars, evenly spread')
    p.add_argument('--views', type=int, default=6, help='held-out views of each')
    p.add_argument('--no-truth', action='store_true', help='a picture without the data set\'s own images')
    p.add_argument('--guidance', type=float)
    p.add_argument('--steps', type=int)
    p.add_argument('--forgetting', type=Path, nargs='+', metavar='FITS')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', help='cuda where there is one, else cpu')
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
