"""Stage 4: how good are the avatars? The papers' metrics at held-out cameras, in one table.

    python evaluate.py                                       avatars of data/: fitted, and generated from their portraits
    python evaluate.py --data test --train data              generated for avatars that training never saw
    python evaluate.py --guidance 1 1.3 2 3 --steps 10 50 --refine 0    one row for each pair, of the model alone
    python evaluate.py --disturb photographs                 portraits shifted, scaled, on flat colours or pieces of photographs
    python evaluate.py --images rodin=folder                 another method's renders, folder/<avatar>/<name of the held-out view>.png
                                                             (with --consistency: a posed set of them in each folder/<avatar>/)
    python evaluate.py --inception download --clip clip.pt   FID, of Inception and of CLIP features, as well
    python evaluate.py --judge csim=face.pt expression=e.pt  identity, expression, pose, shape: any TorchScript from image to vector
    python evaluate.py --consistency 6                       planes and a surface fitted to 36 renders of each of six generated avatars
    python evaluate.py --unconditional 64                    avatars of nobody: how far from one another and from the training set?
    torchrun --standalone --nproc_per_node=2 evaluate.py     any of these

Rows: `fitted` (planes in --fits), `generated` (from the portrait, as sample.py does), `sampled` (the model alone, from the portrait as it
is), and two baselines that any generator must beat: `nearest`, the training avatar with the nearest portrait, and `mean`, the mean of the
training planes. `front` is the PSNR of the view that is the portrait, which `generated` has been fitted to; FD-VAE a Frechet distance of
the project's own features, not FID. Writes results/<--name>.json and .png.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from tqdm import tqdm

import batches
import metrics
import refine
import rodinhd as rh

ROWS = 'fitted', 'generated', 'disturbed', 'sampled', 'nearest', 'mean'
USELESS = {'evaluate': (),              # options that a measurement does not read, and refuses
           'consistency': ('train', 'count', 'no_truth', 'guidance', 'steps', 'disturb', 'inception', 'clip', 'judge', 'rows'),
           'unconditional': ('count', 'no_truth', 'guidance', 'steps', 'refine', 'disturb', 'images', 'judge', 'rows')}

# Avatars and pictures -------------------------------------------------------------------------------------------------

def load(args, device):
    """The generator's models, and the decoder of --fits, which may be another one, for what was fitted there."""
    models = rh.load_models(args.runs, args.fits, device)
    return models, rh.load_model('decoder', args.fits, device) if (args.fits / 'decoder.pt').exists() else models['decoder']

def some(items, count):
    """`count` of the items, evenly spread; all of them where there are no more."""
    return items if not count or len(items) <= count else [items[i * len(items) // count] for i in range(count)]

def read_planes(path, device):
    return rh.read_checkpoint(path, 'planes', 'python fit.py')['planes'].float().clamp(-1, 1).to(device)

def seed_of(folder, args):
    """A seed of its own for each avatar, or all would be made of the same noise."""
    return args.seed + zlib.crc32(folder.name.encode())

def thumbnail(folder):
    """The portrait of an avatar on white, (3, 64, 64) in 0..1."""
    return (rh.portrait_on_white(*rh.read_portrait(rh.portrait_path(folder), 64)) + 1) / 2

class Baselines:
    """The training avatars that have planes, in order of the distance of their portraits from an image; and the mean of their planes."""

    def __init__(self, args, device):
        self.folders = [f for f in rh.list_avatars(args.train or args.data) if (args.fits / f'{f.name}.pt').exists()]
        self.planes = [functools.partial(read_planes, args.fits / f'{f.name}.pt', device) for f in self.folders]
        self.thumbnails = [thumbnail(f) for f in self.folders]
        if not self.folders and dist.get_rank() == 0:
            print(f'{args.fits} holds no planes of {args.train or args.data}: no baselines (fit them with python fit.py)')

    @functools.cached_property
    def mean(self):
        return sum(planes() / len(self.planes) for planes in self.planes)

    def neighbours(self, image, but=None):
        """[(mean squared difference from an image (3, 64, 64) in 0..1, index)], nearest first; one named `but` is no neighbour."""
        return sorted((float(F.mse_loss(t, image)), i) for i, t in enumerate(self.thumbnails) if self.folders[i].name != but)

def see(field, grid, views, config, device):
    """A field as the cameras of `views` see it: images (V, 3, H, W) in 0..1 and opacities (V, 1, H, W)."""
    height, width = views.images.shape[1:3]
    shots = [rh.render_view(field, c.to(device), k.to(device), height, width, config.steps, grid)
             for c, k in zip(views.c2w, views.intrinsics)]
    return torch.stack([rgb.cpu().permute(2, 0, 1) for rgb, _ in shots]), torch.stack([opacity.cpu()[None] for _, opacity in shots])

def photograph(planes, decoder, views, device):     # `see` planes, without their hull
    field = rh.PlaneField(planes, decoder)
    return see(field, rh.grid_for(field, decoder.config, device), views, decoder.config, device)

def cameras(angles, size):
    """Views without content at (azimuth, elevation) in degrees, 4 away, 34 degrees wide."""
    c2w = torch.stack([rh.orbit_pose(*a) for a in angles])
    images = torch.zeros(len(angles), size, size, 4, dtype=torch.uint8)
    return rh.Views(images, c2w, rh.intrinsics_of(34.0, size).expand(len(angles), 4), has_alpha=True)

class Sheet:
    """Strips of pictures of the avatars that came out best and worst, four of each, and what is above their columns."""

    def __init__(self, legend=()):
        self.strips, self.legend = [], legend                           # strips: (score, name, uint8 image (H, W, 3))

    def add(self, score, name, images):
        strip = (torch.cat(list(images), dim=2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        self.merge([(score, name, strip)])

    def merge(self, strips):
        strips = sorted([*self.strips, *strips], key=lambda s: s[:2], reverse=True)
        self.strips = strips[:4] + strips[max(len(strips) - 4, 4):]

    def save(self, path):
        strips = [s for _, _, s in self.strips if s.shape == self.strips[0][2].shape]
        picture = Image.fromarray(np.concatenate(strips))
        sheet = Image.new('RGB', (picture.width, picture.height + 14), 'white')
        sheet.paste(picture, (0, 14))
        for i, word in enumerate(self.legend):
            ImageDraw.Draw(sheet).text((i * picture.width / len(self.legend) + 3, 1), word, fill='black')
        sheet.save(path)

def gather(value):
    """The values of all ranks, a list."""
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, value)
    return everything

def pooled(features):
    """{row: [what there is of a view]} of all ranks, which may have rows that others have not."""
    everyone = gather(features)
    return {row: [view for part in everyone for view in part.get(row, [])] for rows in everyone for row in rows}

def frechet(pairs, names):
    """{name: Frechet distance} of [(our view's features, the true one's)], each {name: (D,)}; empty where there is a single view."""
    return {} if len(pairs) < 2 else {
        n: metrics.frechet_distance(*(torch.stack([view[n] for view in views]) for views in zip(*pairs))) for n in names}

def write(args, name, result, sheet):
    """Writes <out>/<name>.json, and <name>.png if there is a picture."""
    path = args.out / f'{args.name or name}.json'
    with rh.atomic(path) as temporary:
        temporary.write_text(json.dumps({**result, 'seed': args.seed}, indent=1) + '\n')
    if sheet.strips:
        with rh.atomic(path.with_suffix('.png')) as temporary:
            sheet.save(temporary)
    print(f'written: {path}' + (f', {path.with_suffix(".png")}' if sheet.strips else ''))

# Measurements ---------------------------------------------------------------------------------------------------------

def held_out(folder, box, args):
    """Views of an avatar that training never saw, of all where there are none such, and these on white, (V, 3, H, W) in 0..1."""
    size = args.downscale, args.views
    views = rh.load_views(folder, 'test', box, *size) or rh.load_views(folder, 'train', box, *size)
    return views, torch.stack([rh.on_white(image).permute(2, 0, 1) for image in views.images])

def portrait_view(folder, box, downscale):
    """The training view that is the portrait, as Views; None where the portrait is a file of its own."""
    paths, portrait = [frame['path'] for frame in rh.read_frames(folder, 'train')[1]], rh.portrait_path(folder)
    return rh.load_views(folder, 'train', box, downscale, pick=paths.index(portrait)) if portrait in paths else None

def read_renders(renders, folder, truth):
    """Another method's renders of the held-out views of an avatar, as large as the truth (V, 3, H, W)."""
    split = 'test' if rh.read_frames(folder, 'test')[1] else 'train'
    paths = [renders / f'{frame["path"].stem}.png' for frame in some(rh.read_frames(folder, split)[1], len(truth))]
    images = torch.stack([rh.on_white(torch.from_numpy(np.asarray(rh.open_image(path)))).permute(2, 0, 1) for path in paths])
    return images if images.shape == truth.shape else F.interpolate(images, size=truth.shape[2:], mode='area')

def candidates_for(folder, shown, args, models, fitted_decoder, baselines, device):
    """{row of the table: (planes, decoder), or a folder of renders} of one avatar; shown: {row: (portrait, alpha)}."""
    def wanted(name):
        return not args.rows or name in args.rows
    config, candidates = models['base'].config, {name: Path(root) / folder.name for name, root in args.images}
    if wanted('fitted') and (args.fits / f'{folder.name}.pt').exists():
        candidates['fitted'] = read_planes(args.fits / f'{folder.name}.pt', device), fitted_decoder
    settings = list(itertools.product(args.guidance or [config.guidance], args.steps or [config.sample_steps]))
    for (name, (portrait, alpha)), (guidance, steps) in itertools.product(shown.items(), settings):
        how = dict(guidance=guidance, steps=steps, seed=seed_of(folder, args))
        if not wanted(name):
            continue
        name = name if len(settings) == 1 else f'{name}, s={guidance:g}, {steps} steps'
        candidates[name] = refine.avatars_of(models, portrait[None], args.refine, alpha[None], **how)[0], models['decoder']
    if wanted('sampled') and args.refine and len(settings) == 1:
        candidates['sampled'] = rh.generate(models, shown['generated'][0][None], **how)[0][0], models['decoder']
    if neighbours := baselines.neighbours(thumbnail(folder), but=folder.name):
        if wanted('nearest'):
            candidates['nearest'] = baselines.planes[neighbours[0][1]](), fitted_decoder
        if wanted('mean'):
            candidates['mean'] = baselines.mean, fitted_decoder
    return candidates or rh.stop(f'{folder.name}: has none of the rows {" ".join(args.rows)} (planes are looked for in {args.fits})')

def evaluate(args, rank, world, device):
    models, fitted_decoder = load(args, device)
    config, vae = models['upsample'].config, copy.deepcopy(models['vae']).cpu()
    if max(args.steps or [1]) > min(config.base_timesteps, config.up_timesteps):
        rh.stop(f'--steps {max(args.steps)}: the models have {config.base_timesteps} and {config.up_timesteps} timesteps')
    compare = metrics.of_pairs(vae)
    photographs = sorted(p for p in args.disturb.iterdir() if p.suffix.lower() in rh.IMAGE_SUFFIXES) if args.disturb else []
    baselines, folders = Baselines(args, device), some(rh.list_avatars(args.data), args.count)
    features_of, judges = metrics.extractors(vae, args.inception, args.clip), metrics.read_judges(args.judge)
    results, features, sheet = {}, {}, Sheet()                          # features: {row: [({name: (D,)}, that of the truth) a view]}
    for folder in tqdm(folders[rank::world], disable=rank > 0, desc='evaluating'):
        box = rh.read_box(folder)
        views, truth = held_out(folder, box, args)
        front, (rgb, alpha) = portrait_view(folder, box, args.downscale), rh.read_portrait(rh.portrait_path(folder), config.portrait)
        shown = {'generated': (rh.portrait_on_white(rgb, alpha), alpha)}
        if args.disturb:
            image = batches.disturb(rgb, alpha, photographs, seed_of(folder, args))
            shown['disturbed'] = image, torch.ones_like(alpha)
        seen = [F.interpolate((p[None] + 1) / 2, size=truth.shape[2:], mode='area')[0] for p, _ in shown.values()]
        strip, results[folder.name] = [] if args.no_truth else [*seen, truth[0], truth[-1]], {}
        true_features = [{n: f(x) for n, f in features_of.items()} for x in truth]
        for name, planes in candidates_for(folder, shown, args, models, fitted_decoder, baselines, device).items():
            ours = read_renders(planes, folder, truth) if isinstance(planes, Path) else photograph(*planes, views, device)[0]
            results[folder.name][name] = scores = {m: sum(map(f, ours, truth)) / len(truth) for m, f in compare.items()}
            scores.update(metrics.judge(judges, ours, truth))
            if front and not isinstance(planes, Path):
                scores['front'] = rh.psnr(photograph(*planes, front, device)[0][0], rh.on_white(front.images[0]).permute(2, 0, 1))
            strip += [ours[0], ours[-1]]
            features.setdefault(name, []).extend(({n: f(x) for n, f in features_of.items()}, y) for x, y in zip(ours, true_features))
        sheet.legend = [*([] if args.no_truth else [*shown, 'truth', '']), *(w for n in results[folder.name] for w in (n, ''))]
        scores = results[folder.name]   # the sheet is sorted by the first row of generated avatars, if any, else by the first
        score = scores[next((n for n in scores if n.startswith('generated')), next(iter(scores)))]['PSNR']
        sheet.add(score, folder.name, strip)
    features = pooled(features)
    for part in gather(sheet.strips)[1:]:
        sheet.merge(part)
    results = dict(sorted(pair for part in gather(results) for pair in part.items()))
    if rank == 0:
        names = list(dict.fromkeys(n for r in results.values() for n in r))
        columns = list(dict.fromkeys(m for r in results.values() for scores in r.values() for m in scores))
        table = {n: {m: float(np.mean(values)) for m in columns if (values := [r[n][m] for r in results.values() if m in r.get(n, {})])}
                 for n in names}
        for n in names:
            table[n].update(frechet(features[n], features_of))
            if (count := sum(n in r for r in results.values())) < len(results):
                table[n]['avatars'] = count         # a mean over others than the rows above and below: not to be compared with them
        columns += [*features_of, *(['avatars'] if any('avatars' in row for row in table.values()) else [])]
        print(f'{"":28s}' + ''.join(f'{m:>9s}' for m in columns) + f'   mean of {len(results)} avatars')
        for n in names:
            print(f'{n:28s}' + ''.join(f'{table[n][m]:9.3f}' if m in table[n] else f'{"-":>9s}' for m in columns))
        write(args, 'evaluate', {'mean': table, 'avatars': results}, sheet)

class Surface(nn.Module):
    """A surface model (after NeuS): planes and two small networks give a signed distance d and a colour that is the same from everywhere;
    density is s sigmoid(-s d). A field, as `render` wants it. It begins as the surface of `hull` (G, G, G)."""

    def __init__(self, hull, channels=16, resolution=128, width=32):
        super().__init__()
        self.table = nn.Parameter(0.01 * torch.randn(3, resolution, resolution, channels))         # planes, channels-last
        start = (ndimage.distance_transform_edt(~hull) - ndimage.distance_transform_edt(hull)) * 2 / len(hull)
        self.register_buffer('start', torch.from_numpy(start).float()[None, None])                 # (1, 1, G, G, G), signed distances
        self.distance = nn.Sequential(nn.Linear(channels, width), nn.Softplus(), nn.Linear(width, 1 + width))
        self.colour = nn.Sequential(nn.Linear(channels + width, width), nn.ReLU(), nn.Linear(width, 3), nn.Sigmoid())
        self.log_s = nn.Parameter(torch.tensor(4.0))

    def signed_distance(self, points):      # of the hull, and what is learned; features (N, channels + width)
        features = rh.sample_planes(self.table.permute(0, 3, 1, 2), points)
        d, hidden = self.distance(features).split([1, self.distance[2].out_features - 1], dim=1)
        start = F.grid_sample(self.start, points.flip(1)[None, None, None], padding_mode='border', align_corners=False)
        return start.flatten() + 0.3 * d[:, 0], torch.cat([features, hidden], dim=1)

    def __call__(self, points, dirs=None):
        d, features = self.signed_distance(points)
        s = self.log_s.exp()
        return s * torch.sigmoid(-s * d), None if dirs is None else self.colour(features)

    def eikonal(self, points, step=1e-2):   # mean (|gradient| - 1)^2 by central differences
        ends = torch.cat([points + sign * step * axis for axis in torch.eye(3, device=points.device) for sign in (1, -1)])
        plus, minus = self.signed_distance(ends)[0].view(3, 2, -1).unbind(1)
        return ((((plus - minus) / (2 * step)).square().sum(0) + 1e-12).sqrt() - 1).square().mean()

def fit_surface(views, config, device, seed=0):
    """Surface fitted to views, and its occupancy grid."""
    torch.manual_seed(seed)
    hull = rh.visual_hull(views, config.grid)
    surface, rays = Surface(hull.numpy(), config.channels, config.resolution).to(device), rh.Rays(views, device, margin=6)
    grid = rh.OccupancyGrid(config.grid, config.steps, device, hull)
    optimizer, generator = torch.optim.Adam(surface.parameters(), betas=(0.9, 0.99)), torch.Generator().manual_seed(seed)
    for step in range(config.fit_steps):
        for group in optimizer.param_groups:
            group['lr'] = 1e-2 * 0.05 ** (step / config.fit_steps)
        if step % 16 == 0:
            grid.update(surface, generator, None if step < 256 else grid.some_cells(generator))
        rays_o, rays_d, target = rays.draw(config.rays, generator)
        shift = torch.rand(len(rays_o), generator=generator).to(device)
        loss = F.mse_loss(rh.render(surface, rays_o, rays_d, config.steps, grid, shift)[0], target)
        loss = loss + 1e-3 * surface.eikonal(2 * torch.rand(512, 3, generator=generator).to(device) - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return surface, grid

def consistency(args, rank, world, device):
    """Are the views of a generated avatar those of one solid thing (Tables 3 and 8)? 6 views after fitting to 36 others: fresh planes; a
    surface; and a surface to views that were sharpened one by one, which are not of one thing and must come out worse. Then a surface to
    another method's renders, a posed set FOLDER/<avatar>/ for each (--images), measured at its held-out views."""
    models, _ = load(args, device)
    decoder, config, compare = models['decoder'], models['decoder'].config, metrics.of_pairs(copy.deepcopy(models['vae']).cpu())
    train = cameras([(30 * i + 10 * j, -15 + 22 * j) for j in range(3) for i in range(12)], config.portrait)
    test = cameras([(15 + 60 * i, 25 * (i % 2) - 4) for i in range(6)], config.portrait)
    scores, sheet = {}, Sheet(['render', 'planes', 'surface', 'sharpened', 'its surface'])
    folders = some(rh.list_avatars(args.data), args.consistency)
    for folder, (_, root) in itertools.product(folders, args.images):                           # all there? Before the long work
        rh.read_frames(Path(root) / folder.name, 'train')
    for folder in tqdm(folders[rank::world], disable=rank > 0, desc='consistency'):
        rgb, alpha = rh.read_portrait(rh.portrait_path(folder), models['upsample'].config.portrait)
        planes = refine.avatars_of(models, rh.portrait_on_white(rgb, alpha)[None], args.refine, alpha[None], seed=args.seed)[0]
        def shots(views, planes=planes):    # (V, 3, H, W) on white, and as Views with alpha; then the same sharpened
            rgb, alpha = photograph(planes, decoder, views, device)
            pixels = [Image.fromarray(x.permute(1, 2, 0).mul(255).round().byte().numpy()) for x in rgb]
            for shown in pixels, [x.filter(ImageFilter.UnsharpMask(radius=2, percent=150, threshold=0)) for x in pixels]:
                rgb = torch.from_numpy(np.stack([np.asarray(x) for x in shown])).permute(0, 3, 1, 2) / 255
                straight = torch.where(alpha > 0, (rgb - 1 + alpha) / alpha.clamp(min=1e-3), 0.0)
                images = (torch.cat([straight, alpha], dim=1).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
                yield rgb, views._replace(images=images)
        (_, plain), (_, sharpened) = shots(train)
        (truth, _), (sharp_truth, _) = shots(test)
        fresh, _, _ = rh.fit_avatar(plain, decoder.start, decoder, config, steps=config.fit_steps, seed=args.seed)
        ours = {'planes': (photograph(fresh, decoder, test, device)[0], truth)}
        sets = [('surface', plain, test, truth), ('sharpened', sharpened, test, sharp_truth)]
        for name, root in args.images:
            box = rh.read_box(path := Path(root) / folder.name)
            sets.append((name, rh.load_views(path, 'train', box, args.downscale), *held_out(path, box, args)))
        for name, views, unseen, target in sets:
            surface, grid = fit_surface(views, config, device, args.seed)
            ours[name] = see(surface, grid, unseen, config, device)[0], target
        scores[folder.name] = {name: {m: sum(map(f, *pair)) / len(pair[1]) for m, f in compare.items()} for name, pair in ours.items()}
        strip = [truth[0], ours['planes'][0][0], ours['surface'][0][0], sharp_truth[0], ours['sharpened'][0][0]]
        sheet.add(scores[folder.name]['surface']['PSNR'], folder.name, strip)
    for part in gather(sheet.strips)[1:]:
        sheet.merge(part)
    scores = dict(sorted(pair for part in gather(scores) for pair in part.items()))
    if rank == 0:
        mean = {name: {m: float(np.mean([r[name][m] for r in scores.values()])) for m in compare}
                for name in next(iter(scores.values()))}
        for avatar, row in {**scores, 'mean': mean}.items():
            for name, values in row.items():
                print(f'{avatar:28s}{name:12s}' + ''.join(f'  {m} {v:.3f}' for m, v in values.items()))
        write(args, 'consistency', {'mean': mean, 'avatars': scores}, sheet)

def unconditional(args, rank, world, device):
    """Avatars of nobody: PSNR of frontal views, 64 x 64, between each and its nearest other, and its nearest training avatar, beside the
    same of training avatars among themselves. And the Frechet distances of renders of them to the held-out images of --data, each by the
    cameras of one of these avatars in turn. The picture shows samples, each with its three nearest training avatars, refitted."""
    models, fitted_decoder = load(args, device)
    features_of = metrics.extractors(copy.deepcopy(models['vae']).cpu(), args.inception, args.clip)
    folders, features = rh.list_avatars(args.data), {'sample': []}
    baselines, front, samples = Baselines(args, device), cameras([(0, 2)], models['vae'].config.portrait // 2), []
    len(baselines.folders) > 1 or rh.stop(f'--unconditional: {args.fits} needs planes of two avatars of {args.train or args.data}')
    for i in tqdm(range(rank, args.unconditional, world), disable=rank > 0, desc='unconditional'):
        planes = rh.generate(models, 1, seed=args.seed + i)[0][0]
        samples.append((i, photograph(planes, models['decoder'], front, device)[0][0]))
        folder = folders[i % len(folders)]
        views, truth = held_out(folder, rh.read_box(folder), args)
        for pair in zip(photograph(planes, models['decoder'], views, device)[0], truth):
            features['sample'].append([{n: f(x) for n, f in features_of.items()} for x in pair])
    images = [image for _, image in sorted((pair for part in gather(samples) for pair in part), key=lambda pair: pair[0])]
    features = pooled(features)
    if rank == 0:
        sheet, small = Sheet(['sample', 'nearest', 'second', 'third']), [F.interpolate(x[None], size=64, mode='area')[0] for x in images]
        near = [baselines.neighbours(x)[:3] for x in small]
        def dB(distances):                  # of nearest neighbours: their PSNR, median
            return float(np.median([-10 * math.log10(max(d, 1e-10)) for d in distances]))
        result = {
            'samples': len(images), 'sample_to_sample': dB([min(float(F.mse_loss(a, b)) for b in small if b is not a) for a in small]),
            'sample_to_training': dB([n[0][0] for n in near]),
            'training_to_training': dB([baselines.neighbours(t, f.name)[0][0] for t, f in zip(baselines.thumbnails, baselines.folders)]),
            'views': len(features['sample']), **frechet(features['sample'], features_of)}
        pairs = sorted(zip(images, near), key=lambda pair: pair[1][0][0])
        for image, neighbours in pairs[:4] + pairs[max(len(pairs) - 4, 4):]:            # what the sheet keeps
            others = [photograph(baselines.planes[i](), fitted_decoder, front, device)[0][0] for _, i in neighbours]
            sheet.add(neighbours[0][0], '', [image, *others])
        print('\n'.join(f'{k:28s}{v:9.2f}' for k, v in result.items()))
        write(args, 'unconditional', result, sheet)

def main(args):
    rank, world, device = rh.start(args.device, args.seed)
    counts = (args.views, args.downscale, args.count, args.consistency, args.unconditional and args.unconditional - 1, *(args.steps or ()))
    if min(1 if c is None else c for c in counts) < 1 or args.refine < 0:
        rh.stop('--views, --downscale, --count, --consistency, --steps must be at least 1, --unconditional at least 2, --refine at least 0')
    mode = 'consistency' if args.consistency else 'unconditional' if args.unconditional else 'evaluate'
    if given := [name for name in USELESS[mode] if getattr(args, name) != getattr(parse([]), name)]:
        rh.stop(f'--{mode} has no use for --{given[0].replace("_", "-")}; leave out one of them')
    args.images = [item.partition('=')[::2] for item in args.images]
    if args.disturb and not args.disturb.is_dir():
        rh.stop(f'--disturb {args.disturb}: no such folder; give one with photographs, or an empty one for flat colours alone')
    {'consistency': consistency, 'unconditional': unconditional, 'evaluate': evaluate}[mode](args, rank, world, device)

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('data'), help='avatars to evaluate')
    p.add_argument('--train', type=Path, help='training avatars, for the baselines (default: --data)')
    p.add_argument('--fits', type=Path, default=Path('fits'))
    p.add_argument('--runs', type=Path, default=Path('runs'))
    p.add_argument('--out', type=Path, default=Path('results'))
    p.add_argument('--name', help='of the files written (default: what is measured)')
    p.add_argument('--count', type=int, help='only this many avatars, evenly spread')
    p.add_argument('--rows', nargs='+', help='only these, of: ' + ' '.join(ROWS), choices=ROWS)
    p.add_argument('--views', type=int, default=6, help='held-out views of each')
    p.add_argument('--downscale', type=int, default=1, help='average the images of --data down by this factor')
    p.add_argument('--no-truth', action='store_true', help='a picture without the data set\'s own images')
    p.add_argument('--guidance', type=float, nargs='+', help='of the base model (default: its own)')
    p.add_argument('--steps', type=int, nargs='+', help='sampling steps of each model (default: its own)')
    p.add_argument('--refine', type=int, default=40, metavar='STEPS', help='of fitting to the portrait (see refine.py); 0: none')
    p.add_argument('--disturb', type=Path, metavar='FOLDER', help='also portraits shifted, scaled, on other backgrounds')
    p.add_argument('--images', nargs='+', default=[], metavar='NAME=FOLDER', help='also renders of others (see above)')
    p.add_argument('--inception', metavar='FILE', help='FID: weights of torch-fidelity\'s Inception, or `download`')
    p.add_argument('--clip', metavar='FILE', help='FID of CLIP ViT-B/32 features: its weights, or `download`')
    p.add_argument('--judge', nargs='+', default=[], metavar='NAME=FILE', help='TorchScript; csim... by cosine, others by difference')
    p.add_argument('--consistency', type=int, metavar='N', help='instead: do the views of N generated avatars agree?')
    p.add_argument('--unconditional', type=int, metavar='N', help='instead: how distinct are N avatars of nobody?')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', help='cuda where there is one, else cpu')
    return p.parse_args(argv)

if __name__ == '__main__':
    main(parse())
