"""Stage 3: a portrait -> an avatar that can be seen from all around.

    python sample.py --portrait me.png
    python sample.py --portrait photograph.jpg --align
    python sample.py --portrait me.png you.png --count 2
    python sample.py --portrait me.png --interpolate you.png
    python sample.py --prompt "a man with a red beard"
    python sample.py --unconditional --count 4 --seed 7

--align finds the face in any photograph, frames it as the training portraits are, and drops the
background. Several portraits, and several avatars of each (--count), are made in one go.
--interpolate goes from one portrait to another, while the avatar turns. With --prompt Stable
Diffusion makes the portrait (see words.py).

Uses the models in runs/ (with fits/decoder.pt) where they have been trained, else those in
weights/. Writes samples/<name>/:

    portrait.png                what the model saw (portrait1.png and so on of further portraits)
    align.png                   what --align did
    grid.png                    each avatar from six sides
    turntable.webp, .gif, .mp4  the last where imageio-ffmpeg is installed
    viewer.html                 one file for a browser (viewer1.html and so on of further avatars)
    planes.pt                   the planes, in fp16

and the mesh that --mesh names. --interpolate writes strip.png, front and side of each avatar, in
place of grid.png and viewers.
"""
import argparse
import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import export
import likeness
import photo
import rodinhd as rh
import running
import scenes
import words

ELEVATION = 5  # of the turntable's camera, degrees
SIDES = (0, 320, 40, 270, 90, 180)  # azimuths of the grid's views, degrees
STRIP = (0, 50)  # azimuths of the strip's rows
VIEWER_FRAMES = 12  # at most
MESHES = ('.glb', '.ply', '.obj')

sampling_bar = functools.partial(tqdm, desc='sampling')


class Portraits(NamedTuple):
    """Portraits that the models are shown."""

    images: torch.Tensor  # (B, 3, P, P) in [-1, 1], on white
    alpha: torch.Tensor  # (B, 1, P, P) in 0..1


class Sampled(NamedTuple):
    """Avatars, and the portraits that they are of."""

    planes: torch.Tensor  # (B, 3, C, R, R)
    low: torch.Tensor  # (B, 3, C, r, r), the same in low resolution
    images: torch.Tensor | None  # (.., 3, P, P), as the models saw them


class Avatar(NamedTuple):
    """An avatar to be drawn."""

    field: rh.PlaneField
    grid: rh.OccupancyGrid


# What is asked for --------------------------------------------------------------------------------
def check(args):
    """Stops where options make no sense, before anything is loaded."""
    numbers = [args.count, args.frames, args.steps, args.triangles]
    least = min(number for number in numbers if number is not None)
    negative = args.refine is not None and args.refine < 0
    if least < 1 or negative or args.size < 16 or not 0 <= args.eta <= 1:
        rh.stop(
            '--count, --frames, --steps and --triangles must be at least 1, '
            '--refine 0, --size 16, --eta between 0 and 1'
        )

    if args.mesh:
        is_name = args.mesh.name == str(args.mesh)
        if args.mesh.suffix not in MESHES or not is_name:
            rh.stop(
                f'--mesh {args.mesh}: give a file name with .glb, .ply or .obj; '
                'it goes where the rest goes (see --out)'
            )

    portraits = len(args.portrait) if args.portrait else 1
    if args.interpolate:
        if not args.portrait or portraits != 1 or args.count == 1:
            rh.stop(
                '--interpolate needs one --portrait to begin with, '
                'and a --count of at least 2'
            )
        portraits += 1
    if args.crop and (args.unconditional or portraits != 1):
        rh.stop('--crop goes with one portrait')
    if args.lora and args.prompt is None:
        rh.stop('--lora goes with --prompt')


def check_steps(args, config):
    """Stops where more sampling steps are asked for than the models have."""
    most = min(config.base_timesteps, config.up_timesteps)
    if args.steps and args.steps > most:
        rh.stop(
            f'--steps {args.steps}: the models have '
            f'{config.base_timesteps} and {config.up_timesteps} timesteps'
        )


def image_paths(args):
    """Returns the paths of the images that the options name; ends in one line where one of them
    cannot be read, which is known sooner than the models are loaded."""
    paths = list(args.portrait or [])
    if args.interpolate:
        paths.append(args.interpolate)
    for path in paths:
        scenes.open_image(path)
    return paths


def name_of(args, paths):
    """The name of the folder to write to."""
    if args.name:
        return args.name
    if paths:
        return paths[0].stem
    if args.unconditional:
        return 'unconditional'
    return words.name_of(args.prompt)


def numbered(name, k):
    """The file name of the k-th of several of a kind; the first has no number."""
    path = Path(name)
    return f'{path.stem}{k or ""}{path.suffix}'


def draw_prompt(args, folder, device):
    """Makes the portrait that --prompt describes; returns its path."""
    path = folder / 'prompt.png'
    image = words.portrait_of(args.prompt, args.sd, args.lora, args.seed, device)
    export.save_image(path, image)
    return path


def read_portraits(paths, size, args, folder):
    """Reads images as portraits of `size` pixels a side, photographs with --align or --crop ->
    Portraits, or None where there are none."""
    if not paths:
        return None
    images, alphas = [], []
    for k, path in enumerate(paths):
        if args.align or args.crop:
            sheet = folder / numbered('align.png', k)
            rgb, alpha = photo.align(path, size, args.crop, sheet)
        else:
            rgb, alpha = scenes.read_portrait(path, size)
        images.append(scenes.portrait_on_white(rgb, alpha))
        alphas.append(alpha)
    return Portraits(torch.stack(images), torch.stack(alphas))


# Avatars ------------------------------------------------------------------------------------------
def interpolate(models, images, share, **how):
    """Samples avatars that are `share` (n,) of the way from the first of two portraits (2, 3, P,
    P) to the second -> rh.Avatars. how: see rh.generate.

    What the networks see of the portraits is mixed linearly; the noise of seeds `seed` and
    `seed` + 1 is mixed on the sphere, so that it stays unit noise.
    """
    seen = rh.encode_portrait(models['vae'], images, models['base'].config)

    def between(x):
        return torch.cat([x[:1].lerp(x[1:], s) for s in share.tolist()])

    mixed = rh.Portrait(between(seen.latent), [between(x) for x in seen.maps])
    angle = share * math.pi / 2
    mix = torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
    return rh.generate(models, mixed, mix=mix, **how)


def fit(planes, seen, decoder, steps):
    """Fits planes (B, 3, C, R, R) to as many portraits, a Seen, with a progress bar."""
    with tqdm(total=len(planes) * steps, desc='fitting to the portrait') as bar:

        def report(loss):
            decibels = -10 * math.log10(max(loss, 1e-10))
            bar.set_postfix_str(f'{decibels:.1f} dB', refresh=False)
            bar.update()

        return likeness.fit_to_portrait(planes, seen, decoder, steps, report=report)


def fit_each(planes, seen, decoder, steps):
    """Fits planes of several avatars of each portrait to it."""
    count = len(planes) // len(seen.images)
    repeated = (x.repeat_interleave(count, dim=0) for x in seen)
    return fit(planes, likeness.Seen(*repeated), decoder, steps)


def fit_passage(planes, seen, share, decoder, steps):
    """Fits planes of avatars that are `share` (n,) of the way between two portraits: both ends are
    fitted, and their corrections mixed."""
    ends = planes[[0, -1]]
    first, last = fit(ends, seen, decoder, steps) - ends
    corrections = [torch.lerp(first, last, s) for s in share.tolist()]
    return (planes + torch.stack(corrections)).clamp(-1, 1)


def sample(models, given, count, args):
    """Samples avatars and fits them to their portraits in --refine steps -> Sampled.

    There are `count` avatars of each of the Portraits `given`, with --interpolate `count` between
    the two, and where `given` is None `count` avatars of nobody.
    """
    device = next(models['base'].parameters()).device
    bf16 = device.type == 'cuda' if args.bf16 is None else args.bf16
    share = torch.linspace(0, 1, count)
    how = {
        'guidance': args.guidance,
        'steps': args.steps,
        'eta': args.eta,
        'seed': args.seed,
        'progress': sampling_bar,
    }

    images = seen = None
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if given:
            images = given.images.to(device)
        if given and args.refine:
            seen = likeness.straighten(models, images, given.alpha, **how)
            images = seen.images

        if args.interpolate:
            avatars = interpolate(models, images, share, **how)
        elif given:
            repeated = images.repeat_interleave(count, dim=0)
            avatars = rh.generate(models, repeated, **how)
        else:
            avatars = rh.generate(models, count, **how)

    planes, low = avatars.planes, avatars.low
    if seen:
        decoder = models['decoder']
        if args.interpolate:
            planes = fit_passage(planes, seen, share, decoder, args.refine)
        else:
            planes = fit_each(planes, seen, decoder, args.refine)
        low = rh.resize_planes(planes, low.shape[-1])
    return Sampled(planes, low, images)


def avatar_of(planes, decoder, config):
    """Makes planes (3, C, R, R) an Avatar. Haze is not drawn: the threshold is the paper's."""
    field = rh.PlaneField(planes, decoder)
    threshold = 10 * config.steps / 1024
    return Avatar(field, rh.grid_for(field, config, planes.device, threshold=threshold))


# Pictures -----------------------------------------------------------------------------------------
# A picture is an array (H, W, 3) uint8, a turn is a list of pictures of one avatar.
def draw(avatar, azimuth, size):
    """Draws one view of an avatar as it turns."""
    field, grid = avatar
    device = grid.values.device
    pose = rh.orbit_pose(azimuth, ELEVATION).to(device)
    intrinsics = rh.intrinsics_of(rh.PORTRAIT_FOV, size).to(device)
    view = rh.render_view(field, pose, intrinsics, size, size, grid.steps, grid).rgb
    return (view * 255).round().byte().cpu().numpy()


def draw_turn(avatar, args, bar):
    """Draws --frames views of an avatar from all around; a step of the progress bar each."""
    turn = []
    for f in range(args.frames):
        turn.append(draw(avatar, 360 * f / args.frames, args.size))
        bar.update()
    return turn


def beside(pictures):
    return np.concatenate(pictures, axis=1)


def below(pictures):
    return np.concatenate(pictures, axis=0)


def tiled(pictures):
    """Lays pictures of one size out in about as many rows as columns; gaps are white."""
    rows = max(1, int(len(pictures) ** 0.5))
    columns = math.ceil(len(pictures) / rows)
    missing = -len(pictures) % columns
    pictures = pictures + [np.full_like(pictures[0], 255)] * missing
    starts = range(0, len(pictures), columns)
    return below([beside(pictures[i : i + columns]) for i in starts])


def pil_images(images):
    """Images (B, 3, P, P) in [-1, 1], or None for none, as a list of PIL images."""
    if images is None:
        return []
    pixels = ((images + 1) * 127.5).round().byte()
    return [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def frames_for_viewer(turn):
    """Few frames of a turn, evenly spread, as PIL images."""
    if len(turn) > VIEWER_FRAMES:
        turn = [turn[i * len(turn) // VIEWER_FRAMES] for i in range(VIEWER_FRAMES)]
    return [Image.fromarray(picture) for picture in turn]


def draw_grid(turns, portraits, size):
    """Returns a picture with a row for each turn: its portrait (PIL images; may be none) and the
    frames that are nearest to SIDES."""
    rows = []
    for k, turn in enumerate(turns):
        row = [turn[round(side / 360 * len(turn)) % len(turn)] for side in SIDES]
        if portraits:
            portrait = portraits[k * len(portraits) // len(turns)]
            row.insert(0, np.asarray(portrait.resize((size, size), Image.LANCZOS)))
        rows.append(beside(row))
    return below(rows)


def draw_each(folder, avatars, portraits, args):
    """Draws every avatar as it turns, with its portrait (PIL images; may be none): grid.png,
    turntables and viewers. Returns the names of what was written."""
    turns = []
    with tqdm(total=len(avatars) * args.frames, desc='rendering') as bar:
        for k, avatar in enumerate(avatars):
            turn = draw_turn(avatar, args, bar)
            turns.append(turn)

            field, grid = avatar
            path = folder / numbered('viewer.html', k)
            frames = frames_for_viewer(turn)
            portrait = None
            if portraits:
                portrait = portraits[k * len(portraits) // len(avatars)]
            export.write_viewer(path, field.planes, field.decoder, grid, frames, portrait)

    overview = draw_grid(turns, portraits, args.size)
    export.save_image(folder / 'grid.png', Image.fromarray(overview))
    frames = [tiled(list(pictures)) for pictures in zip(*turns)]
    return ['grid.png', *export.save_animation(folder, frames), 'viewer.html']


def draw_passage(folder, avatars, args):
    """Draws how one avatar becomes another: strip.png, with front and side of each, and a
    turntable along the way. Returns the names of what was written."""
    total = len(avatars) * len(STRIP) + args.frames
    with tqdm(total=total, desc='rendering') as bar:

        def drawn(avatar, azimuth):
            bar.update()
            return draw(avatar, azimuth, args.size)

        rows = [beside([drawn(avatar, side) for avatar in avatars]) for side in STRIP]
        export.save_image(folder / 'strip.png', Image.fromarray(below(rows)))

        frames = []
        for f in range(args.frames):
            avatar = avatars[f * len(avatars) // args.frames]
            frames.append(drawn(avatar, 360 * f / args.frames))
    return ['strip.png', *export.save_animation(folder, frames)]


# The stages of the work ---------------------------------------------------------------------------
def main(args):
    # What can be refused at once, before the models are loaded.
    check(args)
    _, _, device = running.start(args.device, args.seed)
    paths = image_paths(args)

    models = running.load_models(args.runs, args.fits, device)
    config = models['upsample'].config
    check_steps(args, config)
    if args.refine is None:
        args.refine = models['base'].config.likeness_steps

    # The portraits, of words where they are asked for.
    folder = args.out / name_of(args, paths)
    if args.prompt is not None:
        paths = [draw_prompt(args, folder, device)]
    given = read_portraits(paths, config.portrait, args, folder)

    # The avatars.
    began = time.monotonic()
    count = args.count or (8 if args.interpolate else 1)  # of each portrait
    sampled = sample(models, given, count, args)
    seconds = time.monotonic() - began
    print(f'{len(sampled.planes)} avatar(s) sampled in {seconds:.1f} s')

    # What the models saw, and what they made of it.
    portraits = pil_images(sampled.images)
    for k, image in enumerate(portraits):
        export.save_image(folder / numbered('portrait.png', k), image)
    content = {
        'planes': sampled.planes.cpu().half(),
        'low': sampled.low.cpu().half(),
        'seed': args.seed,
        'refine': args.refine,
        'config': vars(config),
    }
    running.write_checkpoint(folder / 'planes.pt', 'avatars', content)

    # Meshes, and pictures from all around.
    decoder = models['decoder']
    avatars = [avatar_of(planes, decoder, config) for planes in sampled.planes]
    if args.mesh:
        for k, avatar in enumerate(avatars):
            mesh = export.mesh_of(*avatar, triangles=args.triangles)
            export.write_mesh(folder / numbered(args.mesh, k), mesh)
    if args.interpolate:
        written = draw_passage(folder, avatars, args)
    else:
        written = draw_each(folder, avatars, portraits, args)
    print(f'written to {folder}: {", ".join(written)}, planes.pt')


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument(
        '--portrait',
        type=Path,
        nargs='+',
        help='any images of faces, best head and shoulders from the front',
    )
    what.add_argument(
        '--prompt',
        help='words, of which Stable Diffusion makes the portrait: '
        'pip install diffusers transformers peft',
    )
    what.add_argument('--unconditional', action='store_true', help='avatars of nobody')
    p.add_argument(
        '--interpolate',
        type=Path,
        metavar='IMAGE',
        help='from the portrait to this one, over --count avatars',
    )
    p.add_argument(
        '--align',
        action='store_true',
        help='of any photograph: find, level and frame the face, drop the background',
    )
    p.add_argument(
        '--crop',
        type=int,
        nargs=3,
        metavar=('X', 'Y', 'SIZE'),
        help='--align to this square, where it does not find the face',
    )
    p.add_argument(
        '--sd',
        default=words.SD,
        help='with --prompt: folder or model id of a text-to-image pipeline of diffusers',
    )
    p.add_argument(
        '--lora',
        type=Path,
        help='with --prompt: a LoRA, as train.py --stage lora writes it',
    )
    p.add_argument(
        '--count',
        type=int,
        help='how many avatars (of each portrait), 1, with --interpolate 8; '
        'avatar i draws its noise from seed + i',
    )
    p.add_argument('--seed', type=int, default=0)
    p.add_argument(
        '--guidance',
        type=float,
        help='classifier-free guidance of the base model; 1 is none '
        "(default: the model's own)",
    )
    p.add_argument(
        '--steps', type=int, help='sampling steps of each model (default: its own)'
    )
    p.add_argument(
        '--refine',
        type=int,
        metavar='STEPS',
        help='of fitting the avatar to the portrait (see likeness.py); 0: none '
        "(default: the model's own)",
    )
    p.add_argument(
        '--eta',
        type=float,
        default=1.0,
        help='1 is ancestral sampling, 0 deterministic DDIM',
    )
    p.add_argument(
        '--bf16',
        action=argparse.BooleanOptionalAction,
        help='autocast to bfloat16 (default: on a GPU)',
    )
    p.add_argument(
        '--size', type=int, default=256, help='pixels a side of a rendered view'
    )
    p.add_argument('--frames', type=int, default=36, help='frames of the turntable')
    p.add_argument(
        '--mesh',
        type=Path,
        metavar='FILE',
        help='a mesh too: .glb (Y up), .ply or .obj (Z up), in the unit cube [-1, 1]^3',
    )
    p.add_argument(
        '--triangles',
        type=int,
        help='at most about this many in the mesh (default: all, some 300,000)',
    )
    p.add_argument('--name', help="folder in --out (default: the portrait's name)")
    p.add_argument('--out', type=Path, default=Path('samples'))
    p.add_argument('--runs', type=Path, default=Path('runs'))
    p.add_argument('--fits', type=Path, default=Path('fits'))
    p.add_argument('--device', help='cuda where there is one, else cpu')
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
