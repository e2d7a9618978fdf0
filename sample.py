"""Stage 3: a portrait -> an avatar that can be seen from all around.

    python sample.py --portrait me.png
    python sample.py --portrait photograph.jpg --align          finds the face, frames it as the training portraits, drops the background
    python sample.py --portrait me.png you.png --count 2        several portraits, two avatars each, in one go
    python sample.py --portrait me.png --interpolate you.png    from one to the other, while it turns
    python sample.py --prompt "a man with a red beard"          the portrait by Stable Diffusion (see words.py)
    python sample.py --unconditional --count 4 --seed 7
    python sample.py --portrait me.png --mesh avatar.glb        also a mesh, for Blender and games

Uses the models in runs/ (with fits/decoder.pt) where they have been trained, else those in weights/. Writes samples/<name>/:
portrait.png (what the model saw; portrait1.png and so on of further ones), align.png (what --align did), grid.png (each avatar from six
sides), turntable.webp, .gif and .mp4 (where imageio-ffmpeg is installed), viewer.html (one file for a browser; viewer1.html and so on
of further avatars), the mesh that --mesh names, and planes.pt (fp16). --interpolate writes strip.png (front and side of each avatar) in
place of grid.png and viewers.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import export
import photo
import refine
import rodinhd as rh
import words

SIDES = (0, 320, 40, 270, 90, 180)      # azimuths of the grid's views, degrees: the frames of the turntable nearest to them
STRIP = (0, 50)                         # of the strip's rows


def check(args):
    """Stops where options make no sense, before anything is loaded."""
    numbers = [n for n in (args.count, args.frames, args.steps, args.triangles) if n is not None]
    if min(numbers) < 1 or args.refine < 0 or args.size < 16 or not 0 <= args.eta <= 1:
        rh.stop('--count, --frames, --steps and --triangles must be at least 1, --refine 0, --size 16, --eta between 0 and 1')
    if args.mesh and (args.mesh.suffix not in ('.glb', '.ply', '.obj') or args.mesh.name != str(args.mesh)):
        rh.stop(f'--mesh {args.mesh}: give a file name with .glb, .ply or .obj; it goes where the rest goes (see --out)')
    if args.interpolate and (len(args.portrait or ()) != 1 or args.count == 1):
        rh.stop('--interpolate needs one --portrait to begin with, and a --count of at least 2')
    if args.crop and (args.unconditional or len(args.portrait or [args.prompt]) + bool(args.interpolate) != 1):
        rh.stop('--crop goes with one portrait')
    if args.lora and args.prompt is None:
        rh.stop('--lora goes with --prompt')


def interpolate(models, images, share, **how):
    """Two images (2, 3, P, P) -> planes and low-resolution planes of the avatars that are `share` (n,) of the way from the first to the
    second: what the networks see of the portraits is mixed linearly, the noise of seeds `seed` and `seed` + 1 on the sphere. how: see
    rh.generate."""
    seen = rh.encode_portrait(models['vae'], images, models['base'].config)
    def between(x):
        return torch.cat([x[:1].lerp(x[1:], s) for s in share.tolist()])
    mix = torch.stack([torch.cos(share * math.pi / 2), torch.sin(share * math.pi / 2)], dim=1)
    return rh.generate(models, rh.Portrait(between(seen.latent), [between(x) for x in seen.maps]), mix=mix, **how)


def fit(planes, seen, share, decoder, steps):
    """Planes of len(planes) / len(seen.images) avatars of each portrait, fitted to it; with `share`, of avatars between two portraits,
    both of which are, and their corrections mixed."""
    if share is None:
        each = len(planes) // len(seen.images)
        return refine.refine(planes, refine.Seen(*(x.repeat_interleave(each, dim=0) for x in seen)), decoder, steps, progress=True)
    ends = planes[[0, -1]]
    first, last = refine.refine(ends, seen, decoder, steps, progress=True) - ends
    return (planes + torch.stack([torch.lerp(first, last, s) for s in share.tolist()])).clamp(-1, 1)


def draw(field, grid, azimuth, args, config):
    """One view of the turntable: (size, size, 3) uint8."""
    device = grid.values.device
    pose, intrinsics = rh.orbit_pose(azimuth, 5).to(device), rh.intrinsics_of(34.0, args.size).to(device)
    view, _ = rh.render_view(field, pose, intrinsics, args.size, args.size, config.steps, grid)
    return (view * 255).round().byte().cpu().numpy()


def draw_each(folder, fields, portraits, decoder, args, config):
    """Every avatar turns: grid.png, turntables (tiled), viewers."""
    turns, each = [], len(fields) // max(len(portraits), 1)             # avatars of a portrait
    bar = tqdm(total=len(fields) * args.frames, desc='rendering')
    for k, (field, grid) in enumerate(fields):
        turn = []
        for f in range(args.frames):
            turn.append(draw(field, grid, 360 * f / args.frames, args, config))
            bar.update()
        turns.append(turn)
        few = [Image.fromarray(turn[i * len(turn) // 12]) for i in range(12)] if len(turn) > 12 else map(Image.fromarray, turn)
        export.write_viewer(folder / f'viewer{k or ""}.html', field.planes, decoder, grid, few, portraits[k // each] if portraits else None)
    bar.close()
    rows = [np.concatenate([turn[round(side / 360 * args.frames) % args.frames] for side in SIDES], axis=1) for turn in turns]
    if portraits:
        small = [np.asarray(portrait.resize((args.size, args.size), Image.LANCZOS)) for portrait in portraits]
        rows = [np.concatenate([small[k // each], row], axis=1) for k, row in enumerate(rows)]
    export.save_image(folder / 'grid.png', Image.fromarray(np.concatenate(rows)))
    columns = -(-len(turns) // max(1, int(len(turns) ** 0.5)))
    turns += [[np.full_like(turns[0][0], 255)] * args.frames] * (-len(turns) % columns)
    tiles = [turns[i:i + columns] for i in range(0, len(turns), columns)]
    frames = [np.concatenate([np.concatenate([t[f] for t in row], axis=1) for row in tiles]) for f in range(args.frames)]
    return ['grid.png', *export.save_animation(folder, frames), 'viewer.html']


def draw_passage(folder, fields, args, config):
    """One avatar becomes another: strip.png (front and side of each), and a turntable along the way."""
    bar = tqdm(total=len(fields) * len(STRIP) + args.frames, desc='rendering')
    def drawn(field, grid, azimuth):
        bar.update()
        return draw(field, grid, azimuth, args, config)
    strip = np.concatenate([np.concatenate([drawn(*one, azimuth) for one in fields], axis=1) for azimuth in STRIP])
    export.save_image(folder / 'strip.png', Image.fromarray(strip))
    frames = [drawn(*fields[f * len(fields) // args.frames], 360 * f / args.frames) for f in range(args.frames)]
    bar.close()
    return ['strip.png', *export.save_animation(folder, frames)]


def main(args):
    check(args)
    _, _, device = rh.start(args.device, args.seed)
    paths = [path for path in (args.portrait or []) + [args.interpolate] * bool(args.interpolate) if rh.open_image(path)]   # bad ones first
    models = rh.load_models(args.runs, args.fits, device)
    config = models['upsample'].config
    if (args.steps or 1) > min(config.base_timesteps, config.up_timesteps):
        rh.stop(f'--steps {args.steps}: the models have {config.base_timesteps} and {config.up_timesteps} timesteps')
    count = args.count or (8 if args.interpolate else 1)                # of each portrait
    name = paths[0].stem if paths else 'unconditional' if args.unconditional else words.name_of(args.prompt)
    folder = args.out / (args.name or name)
    if args.prompt is not None:
        paths = [folder / 'prompt.png']
        export.save_image(paths[0], words.portrait_of(args.prompt, args.sd, args.lora, args.seed, device))
    pairs = [photo.align(path, config.portrait, args.crop, folder / f'align{i or ""}.png') if args.align or args.crop else
             rh.read_portrait(path, config.portrait) for i, path in enumerate(paths)]
    images = torch.stack([rh.portrait_on_white(*pair) for pair in pairs]).to(device) if pairs else None
    alpha = torch.stack([alpha for _, alpha in pairs]) if pairs else None
    how = dict(guidance=args.guidance, steps=args.steps, eta=args.eta, seed=args.seed)
    began, share = time.monotonic(), torch.linspace(0, 1, count)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda' if args.bf16 is None else args.bf16):
        if pairs and args.refine:
            seen = refine.straighten(models, images, alpha, **how, progress=True)
            images = seen.images
        if args.interpolate:
            planes, low = interpolate(models, images, share, **how, progress=True)
        else:
            planes, low = rh.generate(models, images.repeat_interleave(count, dim=0) if pairs else count, **how, progress=True)
    if pairs and args.refine:
        planes = fit(planes, seen, share if args.interpolate else None, models['decoder'], args.refine)
        low = rh.resize_planes(planes, low.shape[-1])
    print(f'{len(planes)} avatar(s) sampled in {time.monotonic() - began:.1f} s')

    portraits = [Image.fromarray(x) for x in ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()] if pairs else []
    for i, portrait in enumerate(portraits):
        export.save_image(folder / f'portrait{i or ""}.png', portrait)
    rh.write_checkpoint(folder / 'planes.pt', 'avatars', {
        'planes': planes.cpu().half(), 'low': low.cpu().half(), 'seed': args.seed, 'refine': args.refine, 'config': vars(config)})
    fields = [(field := rh.PlaneField(p, models['decoder']), rh.grid_for(field, config, device, threshold=10 * config.steps / 1024))
              for p in planes]                                          # the paper's threshold: haze is not drawn
    for k, (field, grid) in enumerate(fields if args.mesh else ()):
        mesh = export.mesh_of(field, grid, triangles=args.triangles)
        export.write_mesh(folder / f'{args.mesh.stem}{k or ""}{args.mesh.suffix}', mesh)
    written = (draw_passage(folder, fields, args, config) if args.interpolate else
               draw_each(folder, fields, portraits, models['decoder'], args, config))
    print(f'written to {folder}: {", ".join(written)}, planes.pt')


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument('--portrait', type=Path, nargs='+', help='any images of faces, best head and shoulders from the front')
    what.add_argument('--prompt', help='words, of which Stable Diffusion makes the portrait: pip install diffusers transformers peft')
    what.add_argument('--unconditional', action='store_true', help='avatars of nobody')
    p.add_argument('--interpolate', type=Path, metavar='IMAGE', help='from the portrait to this one, over --count avatars')
    p.add_argument('--align', action='store_true', help='of any photograph: find, level and frame the face, drop the background')
    p.add_argument('--crop', type=int, nargs=3, metavar=('X', 'Y', 'SIZE'), help='--align to this square, where it does not find the face')
    p.add_argument('--sd', default=words.SD, help='with --prompt: folder or model id of a text-to-image pipeline of diffusers')
    p.add_argument('--lora', type=Path, help='with --prompt: a LoRA, as train.py --stage lora writes it')
    p.add_argument('--count', type=int, help='how many avatars (of each portrait), 1, with --interpolate 8; avatar i draws its noise from '
                                             'seed + i')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--guidance', type=float, help='classifier-free guidance of the base model; 1 is none (default: the model\'s own)')
    p.add_argument('--steps', type=int, help='sampling steps of each model (default: its own)')
    p.add_argument('--refine', type=int, default=40, metavar='STEPS', help='of fitting the avatar to the portrait (see refine.py); 0: none')
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
