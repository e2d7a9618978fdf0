"""Stage 3: a portrait -> an avatar that can be seen from all around.

    python sample.py --portrait me.png
    python sample.py --portrait me.png you.png --count 2        several portraits, two avatars each, in one go
    python sample.py --unconditional --count 4 --seed 7
    python sample.py --portrait me.png --mesh avatar.glb        also a mesh, for Blender and games

Uses the models in runs/ (with fits/decoder.pt) where they have been trained, else those in weights/. Writes samples/<name>/:
portrait.png (what the model saw; portrait1.png and so on of further ones), grid.png (each avatar from six sides), turntable.webp and
turntable.gif, viewer.html (one file to open in a browser; viewer1.html and so on of further avatars), the mesh that --mesh names, and
planes.pt (fp16).
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import export
import rodinhd as rh

SIDES = (0, 320, 40, 270, 90, 180)      # azimuths of the grid's views, degrees: the frames of the turntable nearest to them


def save_image(path, image, **how):
    """Writes a PIL image, whole or not at all."""
    with rh.atomic(path) as temporary:
        image.save(temporary, **how)


def save_animation(folder, frames):
    """frames: list of (H, W, 3) uint8 arrays -> turntable.webp, turntable.gif, 12 frames a second, looping."""
    images = [Image.fromarray(f) for f in frames]
    save_image(folder / 'turntable.webp', images[0], save_all=True, append_images=images[1:], duration=83, loop=0, quality=85)
    palette = [i.quantize(128, dither=Image.Dither.NONE) for i in images]
    save_image(folder / 'turntable.gif', palette[0], save_all=True, append_images=palette[1:], duration=83, loop=0)


def main(args):
    numbers = [n for n in (args.count, args.frames, args.steps, args.triangles) if n is not None]
    if min(numbers) < 1 or args.size < 16 or not 0 <= args.eta <= 1:
        rh.stop('--count, --frames, --steps and --triangles must be at least 1, --size at least 16, --eta between 0 and 1')
    if args.mesh and (args.mesh.suffix not in ('.glb', '.ply', '.obj') or args.mesh.name != str(args.mesh)):
        rh.stop(f'--mesh {args.mesh}: give a file name with .glb, .ply or .obj; it goes where the rest goes (see --out)')
    _, _, device = rh.start(args.device, args.seed)
    portraits = [path for path in args.portrait or () if rh.open_image(path)]               # a bad file is told before the models load
    models = rh.load_models(args.runs, args.fits, device)
    config = models['upsample'].config
    if (args.steps or 1) > min(config.base_timesteps, config.up_timesteps):
        rh.stop(f'--steps {args.steps}: the models have {config.base_timesteps} and {config.up_timesteps} timesteps')
    images = count = args.count * max(len(portraits), 1)
    if portraits:
        squares = torch.stack([rh.portrait_on_white(*rh.read_portrait(path, config.portrait)) for path in portraits])
        images = squares.repeat_interleave(args.count, dim=0)
    began = time.monotonic()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda' if args.bf16 is None else args.bf16):
        planes, low = rh.generate(models, images, args.guidance, args.steps, args.eta, args.seed, progress=True)
    print(f'{count} avatar(s) sampled in {time.monotonic() - began:.1f} s')

    folder = args.out / (args.name or (portraits[0].stem if portraits else 'unconditional'))
    columns = -(-count // max(1, int(count ** 0.5)))                    # the turntable tiles the avatars
    intrinsics, turns = rh.intrinsics_of(34.0, args.size).to(device), []
    seen = [Image.fromarray(((square + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for square in (squares if portraits else ())]
    bar = tqdm(total=count * args.frames, desc='rendering')
    for k, p in enumerate(planes):
        field = rh.PlaneField(p, models['decoder'])
        grid, turn = rh.grid_for(field, config, device, threshold=10 * config.steps / 1024), []     # the paper's: haze is not drawn
        for i in range(args.frames):
            pose = rh.orbit_pose(360 * i / args.frames, 5).to(device)
            view, _ = rh.render_view(field, pose, intrinsics, args.size, args.size, config.steps, grid)
            turn.append((view * 255).round().byte().cpu().numpy())
            bar.update()
        turns.append(turn)
        few = [Image.fromarray(turn[i * len(turn) // 12]) for i in range(12)] if len(turn) > 12 else map(Image.fromarray, turn)
        if args.mesh:
            mesh = export.mesh_of(field, grid, triangles=args.triangles)
            export.write_mesh(folder / f'{args.mesh.stem}{k or ""}{args.mesh.suffix}', mesh)
        export.write_viewer(folder / f'viewer{k or ""}.html', p, models['decoder'], grid, few, seen[k // args.count] if seen else None)
    rows = [np.concatenate([turn[round(side / 360 * args.frames) % args.frames] for side in SIDES], axis=1) for turn in turns]
    bar.close()
    for i, portrait in enumerate(seen):
        save_image(folder / f'portrait{i or ""}.png', portrait)
        small = np.asarray(portrait.resize((args.size, args.size), Image.LANCZOS))
        for k in range(i * args.count, (i + 1) * args.count):
            rows[k] = np.concatenate([small, rows[k]], axis=1)
    save_image(folder / 'grid.png', Image.fromarray(np.concatenate(rows)))
    blank = np.full_like(turns[0][0], 255)
    turns += [[blank] * args.frames] * (-len(turns) % columns)
    tiles = [turns[i:i + columns] for i in range(0, len(turns), columns)]
    save_animation(folder, [np.concatenate([np.concatenate([t[f] for t in row], axis=1) for row in tiles]) for f in range(args.frames)])
    rh.write_checkpoint(folder / 'planes.pt', 'avatars', {
        'planes': planes.cpu().half(), 'low': low.cpu().half(), 'seed': args.seed, 'config': vars(config)})
    print(f'written to {folder}: grid.png, turntable.webp, turntable.gif, viewer.html, planes.pt')


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument('--portrait', type=Path, nargs='+', help='any images of faces, best head and shoulders from the front')
    what.add_argument('--unconditional', action='store_true', help='avatars of nobody')
    p.add_argument('--count', type=int, default=1, help='how many avatars (of each portrait); avatar i draws its noise from seed + i')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--guidance', type=float, help='classifier-free guidance of the base model; 1 is none (default: the preset\'s)')
    p.add_argument('--steps', type=int, help='sampling steps of each model (default: the preset\'s)')
    p.add_argument('--eta', type=float, default=1.0, help='1 is ancestral sampling, 0 deterministic DDIM')
    p.add_argument('--bf16', action=argparse.BooleanOptionalAction, help='autocast to bfloat16 (default: on a GPU)')
    p.add_argument('--size', type=int, default=256, help='pixels a side of a rendered view')
    p.add_argument('--frames', type=int, default=36, help='frames of the turntable')
    p.add_argument('--mesh', type=Path, metavar='FILE', help='a mesh too: .glb (Y up), .ply or .obj (Z up), in the unit cube [-1, 1]^3')
    p.add_argument('--triangles', type=int, help='at most about this many in the mesh (default: all, some 300,000)')
    p.add_argument('--name', help='folder in --out (default: the portrait\'s name)')
    p.add_argument('--out', type=Path, default=Path('samples'))
    p.add_argument('--runs', type=Path, default=Path('runs'))
    p.add_argument('--fits', type=Path, default=Path('fits'))
    p.add_argument('--device', help='cuda where there is one, else cpu')
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
