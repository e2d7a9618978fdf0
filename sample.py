"""Stage 3: a portrait -> an avatar that can be seen from all around.

    python sample.py --portrait me.png
    python sample.py --portrait photograph.jpg
    python sample.py --portrait me.png --view left.png:-60 --view right.png:45
    python sample.py --portrait me.png you.png --count 2
    python sample.py --portrait me.png --interpolate you.png
    python sample.py --prompt "a smiling woman with long red hair in a blue shirt"
    python sample.py --portrait me.png --edit "red hair" "a dark green suit"
    python sample.py --unconditional --count 4 --seed 7

In a photograph the face is found, framed as the training portraits are, and the background dropped:
--align does so with any image, --no-align with none. --view gives further photographs of the
person, and says from where, in degrees around the head: 0 is the front, 90 the person's left side.
Several portraits, and several avatars of each (--count), are made in one go. --interpolate goes
from one portrait to another, while the avatar turns. A --prompt becomes an avatar by Rodin's
latents (rodin.py), which know the words of captions.py; with --sd Stable Diffusion draws a portrait
of any words (words.py). --edit changes what it names of an avatar, and no more.

Uses the models in runs/ (with fits/decoder.pt) where they have been trained, else those in
weights/. Writes samples/<name>/:

    portrait.png                what the model saw (portrait1.png and so on of further portraits)
    align.png, align-view.png   what was done to photographs
    grid.png                    each avatar from six sides
    turntable.webp, .gif, .mp4  the last where imageio-ffmpeg is installed
    viewer.html                 one file for a browser (viewer1.html and so on of further avatars)
    edits.png                   what --edit does, by strength
    planes.pt                   the planes, in fp16

and what --mesh and --splats name. --interpolate writes strip.png, front and side of each avatar, in
place of grid.png and viewers.
"""
import argparse
import contextlib
import itertools
import math
import os
import re
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import endings  # noqa: F401  # isort: skip  # before PyTorch, whose import takes seconds
import torch

import captions
import export
import likeness
import meshes
import paint
import photo
import pictures
import refiner
import rodin
import rodinhd as rh
import running
import scenes
import splats
import words

AT_ONCE = 8  # avatars that are sampled together, with planes of 128 x 128 texels
OURS = (  # files that a run may leave in its folder, besides meshes and splats
    r'(align|align-view|portrait)\d*\.png|(grid|strip|prompt|edits)\.png|turntable\.(webp|gif|mp4)|'
    r'viewer\d*\.html|planes\.pt'
)
SPLATS = ('.ply', '.glb')


class Portraits(NamedTuple):
    """Portraits that the models are shown."""

    images: torch.Tensor  # (B, 3, P, P) in [-1, 1], on white
    alpha: torch.Tensor  # (B, 1, P, P) in 0..1
    known: torch.Tensor  # (B, 1, P, P) in 0..1, 0 beyond the edge of a photograph


class Sampled(NamedTuple):
    """Avatars, and the portraits that they are of."""

    planes: torch.Tensor  # (B, 3, C, R, R)
    low: torch.Tensor  # (B, 3, C, r, r), the same in low resolution
    images: torch.Tensor | None  # (.., 3, P, P), as the models saw them


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
    most = {'size': 4096, 'frames': 3600, 'count': 10**4, 'refine': 10**6}
    for name, largest in most.items():
        if (getattr(args, name) or 0) > largest:
            rh.stop(f'--{name} {getattr(args, name)}: at most {largest}')
    if args.guidance is not None and not abs(args.guidance) < 1000:
        rh.stop(f'--guidance {args.guidance}: give a number, such as 1.5')
    if args.name is not None and args.name != one_name(args.name):
        rh.stop(f'--name {args.name!r}: give the name of one folder, which will be in --out')

    check_suffix('--mesh', args.mesh, meshes.FORMATS)
    check_suffix('--splats', args.splats, SPLATS)
    if args.mesh and args.mesh == args.splats:
        rh.stop(f'--mesh and --splats name one file, {args.mesh}: give them two names')
    if args.texture and not 64 <= args.texture <= 8192:
        rh.stop(f'--texture {args.texture}: 64 to 8192, or 0 for coloured vertices')
    if not 0 < args.height < 1e5:
        rh.stop(f'--height {args.height:g}: of the .stl in millimetres, such as 100')

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
    if args.view:
        check_views(args)
    if args.align and args.unconditional:
        rh.stop('--align has nothing to align with --unconditional: give a --portrait')
    if args.lora and args.prompt is None:
        rh.stop('--lora goes with --prompt')
    if args.prompt is not None and not (args.sd or args.lora):
        check_words('--prompt', args.prompt)
    for text in args.edit or []:
        check_words('--edit', text)
    if args.edit and (not args.portrait or portraits != 1 or args.count):
        rh.stop('--edit goes with one --portrait, and makes an avatar of each edit')
    if not 0 <= args.strength <= 10:
        rh.stop(f'--strength {args.strength:g}: give a number from 0 to 10, such as 1')


def check_words(option, text):
    """Stops where an option has words that say nothing, or too many."""
    if not text.strip():
        rh.stop(f'{option}: is empty; describe a person, such as "a man with short grey hair"')
    if len(text) > captions.LONGEST:
        rh.stop(f'{option}: {len(text)} letters, at most {captions.LONGEST} are read')


def check_views(args):
    """Stops where further photographs cannot be used."""
    for item in args.view:
        photograph_of(item)
    if len(args.portrait or ()) != 1 or args.interpolate:
        rh.stop('--view goes with one --portrait, from the front, and without --interpolate')
    if args.refine == 0:
        rh.stop('--view: avatars are fitted to further photographs; leave out --refine 0')


def photograph_of(item):
    """The path and the azimuth, in degrees, that IMAGE:DEGREES says."""
    path, _, degrees = item.rpartition(':')
    try:
        azimuth = float(degrees)
    except ValueError:
        azimuth = math.nan
    if not path or not -180 <= azimuth <= 180:
        rh.stop(
            f'--view {item}: give IMAGE:DEGREES, such as left.png:-60, from -180 to 180; '
            "0 is the front, 90 the person's left side"
        )
    return Path(path), azimuth


def check_suffix(option, path, suffixes):
    """Stops where a path that an option names has none of these suffixes."""
    if path and path.suffix.lower() not in suffixes:
        *others, last = suffixes
        rh.stop(f'{option} {path}: give a file with {", ".join(others)} or {last}')


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
    further = [path for path, _ in map(photograph_of, args.view)]
    for path in paths + further:
        scenes.open_image(path)
    return paths


def one_name(name):
    """Makes a name that is one folder, and not `..`, of what a file may be called."""
    name = re.sub(r'[/\\\0]', '-', name).strip('. ')
    return os.fsdecode(os.fsencode(name)[:200]) or 'portrait'


def name_of(args, paths):
    """The name of the folder to write to."""
    if args.name:
        return args.name
    if paths:
        return one_name(paths[0].stem)
    if args.unconditional:
        return 'unconditional'
    return words.name_of(args.prompt)


def source_of(args, paths):
    """A number of what avatars are made of: image files, a prompt, or nothing."""
    number = zlib.crc32((args.prompt or '').encode(errors='surrogateescape'))
    for path in paths:
        number = zlib.crc32(path.read_bytes(), number)
    return number


def folder_of(args, paths):
    """The folder to write to: that of the same portrait, or a new one. Without --name, another
    portrait of that name keeps its folder, and this one's gets a number."""
    name = name_of(args, paths)
    source = source_of(args, paths)
    for k in itertools.count(1):
        folder = args.out / (name if k == 1 else f'{name}-{k}')
        made_with = before(folder).get('made_with', {'source': source})
        if args.name or made_with['source'] == source:
            return folder


def before(folder):
    """What an earlier run has said of a folder, {} where there was none."""
    path = folder / 'planes.pt'
    if not path.exists():
        return {}
    content = running.read_checkpoint(path, 'avatars', whole=False)
    with running.reading(path, 'delete it'):
        content['made_with'] = {'source': None, **content.get('made_with', {})}
        return {name: content.get(name) for name in ('made_with', 'mesh', 'splats')}


def states_of(folder):
    """{path of each file: what tells whether it was written since}."""
    if not folder.is_dir():
        return {}
    states = {path: path.stat() for path in folder.iterdir() if path.is_file()}
    return {path: (state.st_ino, state.st_mtime_ns) for path, state in states.items()}


def remove_old(folder, states, shapes=()):
    """Removes what an earlier run, whose meshes and splats had these names, has left and this one
    has not written. states: states_of the folder before it."""
    ours = OURS
    for path in map(Path, shapes):
        suffixes = rf'{re.escape(path.suffix)}|\.mtl|-texture\.png'
        ours += rf'|{re.escape(path.stem)}\d*({suffixes})'
    now = states_of(folder)
    for path, state in states.items():
        if re.fullmatch(ours, path.name) and now.get(path) == state:
            path.unlink()


def heard(option, text, clip):
    """The facts that CLIP knows of an option's words; says what was understood and what was not,
    and stops where that is all."""
    understood = captions.understand(text)
    facts = rodin.known(understood.facts, clip)
    strange = list(understood.unknown)
    for factor, value in understood.facts.items():
        if factor not in facts:
            strange.append(f'{value} ({factor})')
    if not facts:
        rh.stop(
            f'{option}: none of these words is known; those that are say sex, hair, skin, clothes '
            'and expression, such as "a laughing man with short grey hair in a blue suit"'
        )
    print(f'understood: {captions.describe(facts)}')
    if strange:
        print(f'not understood: {", ".join(strange)}')
    return facts


def facts_for(args, models):
    """The facts of --prompt, where an avatar is made of them by Rodin's latents, else {}."""
    if args.prompt is None or args.sd or args.lora:
        return {}
    if not running.has_latents(models, 'text'):
        print(f'from words: by Stable Diffusion, as {models["base"].path} takes no words')
        return {}
    print('from words: by the latents of Rodin (--sd: by Stable Diffusion)')
    running.load_latents(models, 'text')
    return heard('--prompt', args.prompt, models['clip'])


def vectors_for(args, models, facts):
    """The vectors of Rodin's latents to make avatars of, (--count, D): of facts, of nobody in
    particular, or None where portraits are what is asked for or no network for it was trained."""
    count = args.count or 1
    if facts:
        return rodin.vectors_of(models, paint.before_painting(facts), count, seed=args.seed)
    if args.unconditional and running.has_latents(models, 'prior'):
        running.load_latents(models, 'prior')
        return rodin.draw_latents(models['prior'], count, seed=args.seed)
    return None


def draw_prompt(args, folder, device):
    """Makes the portrait that --prompt describes; returns its path."""
    path = folder / 'prompt.png'
    sd = args.sd or words.SD
    image = words.portrait_of(args.prompt, sd, args.lora, args.seed, device)
    export.save_image(path, image, args.tag)
    return path


def read_portraits(paths, size, args, folder):
    """Reads images as portraits of `size` pixels a side -> Portraits, or None where there are none.
    Photographs are aligned (see photo.read), the drawing of --prompt only with --align."""
    if not paths:
        return None
    align = args.align if args.prompt is None else bool(args.align)
    read = []
    for k, path in enumerate(paths):
        sheet = folder / export.numbered('align.png', k)
        rgb, alpha, known = photo.read(path, size, align, args.crop, sheet)
        read.append((scenes.portrait_on_white(rgb, alpha), alpha, known))
    return Portraits(*map(torch.stack, zip(*read)))


def read_photographs(args, size, folder):
    """Reads what --view gives, as read_portraits reads portraits -> [likeness.Photograph]."""
    found = []
    for k, (path, azimuth) in enumerate(map(photograph_of, args.view)):
        sheet = folder / export.numbered('align-view.png', k)
        rgb, alpha, known = photo.read_view(path, size, azimuth, args.align, sheet)
        image = scenes.portrait_on_white(rgb, alpha)
        found.append(likeness.Photograph(image, alpha, azimuth, known))
    return found


# Avatars ------------------------------------------------------------------------------------------
def bars(what, stages=('base', 'upsample')):
    """Makes what shows the steps of the models of stages, in turn, with a bar."""
    models = itertools.cycle(stages)

    def progress(steps):
        return running.Bar(steps, desc=f'{what}, {next(models)} model')

    return progress


def interpolate(models, images, share, **how):
    """Samples avatars that are `share` (n,) of the way from the first of two portraits (2, 3, P,
    P) to the second -> rh.Avatars. how: see rh.generate.

    What the networks see of the portraits is mixed linearly; the noise of seeds `seed` and
    `seed` + 1 is mixed on the sphere, so that it stays unit noise.
    """
    seen = rh.encode_portrait(models['vae'], images, models['base'].config)

    def between(x):
        return torch.cat([x[:1].lerp(x[1:], s) for s in share.tolist()])

    vector = None if seen.vector is None else between(seen.vector)
    mixed = rh.Portrait(between(seen.latent), [between(x) for x in seen.maps], vector=vector)
    angle = share * math.pi / 2
    mix = torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
    return rh.generate(models, mixed, mix=mix, **how)


@contextlib.contextmanager
def fitting_bar(total):
    """A bar of so many steps -> what is to be called with the loss of each."""
    with running.Bar(total=total, desc='fitting to the portrait') as bar:

        def report(loss):
            decibels = -10 * math.log10(max(loss, 1e-10))
            bar.set_postfix_str(f'{decibels:.1f} dB', refresh=False)
            bar.update()

        yield report


def fit(planes, seen, decoder, steps):
    """Fits planes (B, 3, C, R, R) to as many portraits, a Seen, with a progress bar."""
    with fitting_bar(len(planes) * steps) as report:
        return likeness.fit_to_portrait(planes, seen, decoder, steps, report=report)


def fit_to_all(models, planes, seen, photographs, steps, how):
    """Fits planes (B, 3, C, R, R) to one portrait, a Seen of one, and to further photographs; how:
    see rh.generate, of the first of them."""
    portrait = likeness.Seen(*(x[0] for x in seen))
    each = steps + likeness.steps_for(steps, photographs)
    fitted = []
    with fitting_bar(len(planes) * each) as report:
        for k, one in enumerate(planes):
            of_this = {**how, 'seed': how['seed'] + k}
            planes_of_one, views = likeness.fit_to_photographs(
                models, one, portrait, photographs, steps, report, **of_this
            )
            fitted.append(planes_of_one)
    for k, (photograph, view) in enumerate(zip(photographs, views), start=1):
        azimuth, elevation = view.angles
        print(
            f'--view number {k}, given at {photograph.azimuth:g} degrees: '
            f'found at {azimuth:g}, from {elevation:g} above'
        )
    return torch.stack(fitted)


def fit_each(planes, seen, decoder, steps):
    """Fits planes of several avatars of each portrait to it."""
    return fit(planes, repeated(seen, len(planes) // len(seen.images)), decoder, steps)


def repeated(seen, count):
    """A Seen that has each portrait `count` times."""
    return likeness.Seen(*(x.repeat_interleave(count, dim=0) for x in seen))


def fit_passage(planes, seen, share, decoder, steps):
    """Fits planes of avatars that are `share` (n,) of the way between two portraits: both ends are
    fitted, and their corrections mixed."""
    ends = planes[[0, -1]]
    first, last = fit(ends, seen, decoder, steps) - ends
    corrections = [torch.lerp(first, last, s) for s in share.tolist()]
    return (planes + torch.stack(corrections)).clamp(-1, 1)


def parts_of(total, config):
    """Slices of `total` avatars, as many at a time as fit into memory."""
    size = max(1, AT_ONCE * 128**2 // config.resolution**2)
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]


def straighten(models, given, parts, how):
    """Does likeness.straighten for the Portraits `given`, in parts -> likeness.Seen."""
    found = []
    for part in parts:
        portraits = (x[part] for x in given)
        seed = how['seed'] + part.start
        found.append(likeness.straighten(models, *portraits, **{**how, 'seed': seed}))
    return likeness.Seen(*map(torch.cat, zip(*found)))


class Edits(NamedTuple):
    """What --edit makes of one avatar."""

    planes: torch.Tensor  # (1 + E, 3, C, R, R): the avatar, and one of each edit
    strips: list  # for each edit planes (n, 3, C, R, R), from no strength to twice of what is asked


STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)  # of a strip, times --strength


def edit(models, sampled, args, how):
    """Edits the avatar of a portrait by the words of --edit -> Edits."""
    z = models['clip'].encode_images(sampled.images)[0]
    edited, strips = [], []
    for text in args.edit:
        changes = heard('--edit', text, models['clip'])
        strip = strip_of(models, sampled.planes[0], z, changes, args.strength, how)
        strips.append(strip)
        edited.append(strip[STRENGTHS.index(1.0)])
    return Edits(torch.stack([sampled.planes[0], *edited]), strips)


def strip_of(models, planes, z, changes, strength, how):
    """Planes (3, C, R, R) of an avatar whose vector is z (D,), changed by facts, at each of
    STRENGTHS, (n, 3, C, R, R).

    Rodin moves the vector of which it makes the avatar. Ours is made of a portrait, which says more
    than its vector, and was fitted to it. So two avatars are made of the vector alone, before and
    after it moved and with the same noise, and their difference is added to the planes where what
    is named may be. Colours of hair and clothes are painted (paint.py), which is all where nothing
    else is named; a colour that is reached is not passed.
    """
    clip = models['clip']
    strengths = [strength * share for share in STRENGTHS]
    where = rodin.region_of(changes, planes.shape[-1]).to(planes)
    moved = planes.expand(len(strengths), *planes.shape)
    changes = rodin.with_needed(rodin.facts_seen(clip, z), changes)
    if changes.keys() - paint.PAINTED:
        vectors = [rodin.edited(clip, z, changes, x) for x in strengths]
        config = models['base'].config
        made = [rh.generate(models, rh.nobody(config, 1, v[None]), **how).planes for v in vectors]
        made = torch.cat(made)
        moved = (planes + where * (made - made[:1])).clamp(-1, 1)

    # not by `where`: on planes, what is painted and what is kept are not told apart by place alone
    full = moved[STRENGTHS.index(1.0)]
    colours = paint.recoloured(full, models['decoder'], changes) - full
    share = torch.tensor(strengths).to(planes).clamp(max=1).view(-1, 1, 1, 1, 1)
    return (moved + share * colours).clamp(-1, 1)


def with_planes(sampled, planes):
    """A Sampled of other planes (B, 3, C, R, R)."""
    return sampled._replace(planes=planes, low=rh.resize_planes(planes, sampled.low.shape[-1]))


def how_to_sample(args):
    """What rh.generate is told besides the portrait."""
    return {
        'guidance': args.guidance,
        'steps': args.steps,
        'eta': args.eta,
        'seed': args.seed,
        'progress': bars('sampling'),
    }


def sample(models, given, count, args, photographs=(), vectors=None):
    """Samples avatars and fits them to their portraits in --refine steps, and to further
    photographs of the only one -> Sampled.

    There are `count` avatars of each of the Portraits `given`, with --interpolate `count` between
    the two, and where `given` is None `count` avatars of nobody, or one of each of the vectors.
    """
    device = next(models['base'].parameters()).device
    bf16 = device.type == 'cuda' if args.bf16 is None else args.bf16
    config = models['upsample'].config
    share = torch.linspace(0, 1, count)
    how = how_to_sample(args)

    images = seen = None
    found = []
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if given:
            images = given.images.to(device)
        if given and args.refine:
            parts = parts_of(len(images), config)
            found_by = {**how, 'progress': bars('finding the person', ['base'])}
            seen = straighten(models, given._replace(images=images), parts, found_by)
            images = seen.images
            how['samples'] = likeness.SAMPLES
            how['progress'] = bars('sampling', ['base'] * likeness.SAMPLES + ['upsample'])

        total = count
        if given and not args.interpolate:
            images_of_all = images.repeat_interleave(count, dim=0)
            total = len(images_of_all)
        for part in parts_of(total, config):
            size = part.stop - part.start
            following = {**how, 'seed': args.seed + part.start}
            if args.interpolate:
                mixed = dict(how)
                if seen:
                    mixed['correct'] = likeness.towards(
                        seen, models['decoder'], args.seed, share[part]
                    )
                found.append(interpolate(models, images, share[part], **mixed))
            elif given:
                if seen:
                    towards = likeness.Seen(*(x[part] for x in repeated(seen, count)))
                    following['correct'] = likeness.towards(towards, models['decoder'], args.seed)
                found.append(rh.generate(models, images_of_all[part], **following))
            elif vectors is not None:
                some = rh.nobody(models['base'].config, size, vectors[part])
                found.append(rh.generate(models, some, **following))
            else:
                found.append(rh.generate(models, size, **following))

    planes, low = map(torch.cat, zip(*found))
    if seen:
        decoder = models['decoder']
        if args.interpolate:
            planes = fit_passage(planes, seen, share, decoder, args.refine)
        elif photographs:
            planes = fit_to_all(models, planes, seen, photographs, args.refine, how)
        else:
            planes = fit_each(planes, seen, decoder, args.refine)
        low = rh.resize_planes(planes, low.shape[-1])
    return Sampled(planes, low, images)


# Meshes and splats --------------------------------------------------------------------------------
def place_of(folder, path, k):
    """Where the k-th file that an option names goes: a bare name into the folder."""
    if path.name == str(path):
        path = folder / path
    return path.with_name(export.numbered(path.name, k))


def name_in(folder, path):
    """How a file is called in what is printed: by its name, if it is in the folder."""
    return path.name if path.parent == folder else str(path)


def mesh_of(avatar, args):
    """The mesh of an avatar that suits the format of --mesh."""
    textured = args.mesh.suffix.lower() in meshes.TEXTURED
    texture = args.texture if textured else 0
    triangles = args.triangles
    if texture and not triangles:
        triangles = meshes.TRIANGLES
    return meshes.mesh_of(*avatar, triangles=triangles, texture=texture)


def write_shapes(folder, avatars, args, written):
    """Writes the meshes and splats that are asked for, and adds their names to `written`; returns
    the paths of the meshes."""
    first = []
    for k, avatar in enumerate(avatars):
        paths = []
        if args.mesh:
            path = place_of(folder, args.mesh, k)
            paths += meshes.write_mesh(path, mesh_of(avatar, args), args.height)
            first.append(path)
        if args.splats:
            path = place_of(folder, args.splats, k)
            paths += splats.write_splats(path, splats.splats_of(*avatar))
        written += [name_in(folder, path) for path in paths]
    return first


# The stages of the work ---------------------------------------------------------------------------
def main(args):
    # What can be refused at once, before the models are loaded.
    check(args)
    _, _, device = running.start(args.device, args.seed)
    paths = image_paths(args)

    models = running.load_models(args.runs, args.fits, device)
    config = models['upsample'].config
    check_steps(args, config)
    if args.refiner:
        models['refiner'] = running.load_refiner(args.runs, device)
        refiner.side_of(args.size, models['refiner'])
    if args.refine is None:
        args.refine = models['base'].config.likeness_steps

    # One run at a time writes to a folder.
    if args.edit:
        running.load_latents(models)
    folder = folder_of(args, paths)
    made_with = {'source': source_of(args, paths)}
    for kind, model in models.items():
        made_with[kind] = model.fingerprint
    with running.claim(folder) as mine:
        if not mine:
            rh.stop(f'{folder}: another process is writing to it; give another --name')
        running.remove_all_leftovers(folder)
        written = []
        try:
            make(args, models, paths, folder, made_with, written)
        except KeyboardInterrupt:
            what = 'nothing is written'
            if written:
                what = f'in {folder} there are {", ".join(written)}'
            raise KeyboardInterrupt(f'{what}; the same command begins anew') from None
    print(f'written to {folder}: {", ".join(written)}')


def make(args, models, paths, folder, made_with, written):
    """Makes the avatars of portraits, or of --prompt, and writes all there is of them; adds the
    name of each file to the list `written` as soon as it is there."""
    config = models['upsample'].config
    device = next(models['base'].parameters()).device
    earlier = before(folder)
    states = states_of(folder)
    facts = facts_for(args, models)
    vectors = vectors_for(args, models, facts)
    if args.prompt is not None and vectors is None:
        paths = [draw_prompt(args, folder, device)]
        written.append('prompt.png')
    given = read_portraits(paths, config.portrait, args, folder)

    # The avatars.
    began = time.monotonic()
    count = args.count or (8 if args.interpolate else 1)  # of each portrait
    photographs = read_photographs(args, config.portrait, folder)
    sampled = sample(models, given, count, args, photographs, vectors)
    if facts:
        sampled = with_planes(sampled, paint.recoloured_all(sampled.planes, models, facts))
    strips = []
    if args.edit:
        edits = edit(models, sampled, args, how_to_sample(args))
        sampled = with_planes(sampled, edits.planes)
        strips = edits.strips
    seconds = time.monotonic() - began
    print(f'{len(sampled.planes)} avatar(s) sampled in {seconds:.1f} s')

    # What an earlier run has left goes before anything of this one is there.
    shapes = [earlier[name] for name in ('mesh', 'splats') if earlier.get(name)]
    remove_old(folder, states, shapes)

    # Pictures first, which take the least time, and the turntable last.
    decoder = models['decoder']
    avatars = [pictures.avatar_of(planes, decoder, config) for planes in sampled.planes]
    refines = models.get('refiner')
    turns = [pictures.Turn(avatar, args.size, args.tag, refines) for avatar in avatars]
    portraits = pictures.pil_images(sampled.images)
    if args.interpolate:
        written += pictures.write_strip(folder, turns)
    else:
        written += pictures.write_grid(folder, turns, portraits)
    if strips:
        written += write_edits(folder, strips, decoder, config, args, refines)
    written += write_models_view(folder, portraits)
    written += write_planes(folder, sampled, config, made_with, args)
    shapes = write_shapes(folder, avatars, args, written)
    if not args.interpolate:
        title = folder.name
        written += pictures.write_viewers(folder, turns, portraits, args.frames, title, shapes)
    with running.Bar(total=args.frames, desc='turntable') as bar:
        write = pictures.write_passage if args.interpolate else pictures.write_turntable
        written += write(folder, turns, args.frames, bar)


def write_edits(folder, strips, decoder, config, args, refines):
    """Writes the strips (lists of planes) of --edit."""
    rows = []
    for strip in strips:
        avatars = [pictures.avatar_of(planes, decoder, config) for planes in strip]
        rows.append([pictures.Turn(avatar, args.size, args.tag, refines) for avatar in avatars])
    return pictures.write_edits(folder, rows)


def write_models_view(folder, portraits):
    """Writes what the models saw of the portraits, PIL images."""
    names = []
    for k, image in enumerate(portraits):
        names.append(export.numbered('portrait.png', k))
        export.save_image(folder / names[-1], image)
    return names


def write_planes(folder, sampled, config, made_with, args):
    """Writes the planes of what was Sampled, and what they were made with."""
    content = {
        'planes': sampled.planes.cpu().half(),
        'low': sampled.low.cpu().half(),
        'seed': args.seed,
        'refine': args.refine,
        'views': args.view,
        'config': vars(config),
        'mesh': args.mesh and str(args.mesh),
        'splats': args.splats and str(args.splats),
        'made_with': made_with,
    }
    running.write_checkpoint(folder / 'planes.pt', 'avatars', content)
    return ['planes.pt']


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    what = p.add_argument_group('what the avatar is of (one of the first three)')
    one = what.add_mutually_exclusive_group(required=True)
    one.add_argument('--portrait', type=Path, nargs='+', metavar='IMAGE',
                     help='any images of faces, best head and shoulders from the front')
    one.add_argument('--prompt',
                     help='words about a person: sex, hair, skin, clothes, expression; with --sd '
                          'any, of which Stable Diffusion makes the portrait')
    one.add_argument('--unconditional', action='store_true', help='avatars of nobody')
    what.add_argument('--view', action='append', default=[], metavar='IMAGE:DEGREES',
                      help='a further photograph of the person, and from where, such as '
                           'left.png:-60; may be given several times')
    what.add_argument('--interpolate', type=Path, metavar='IMAGE',
                      help='from the portrait to this one, over --count avatars')
    what.add_argument('--count', type=int,
                      help='how many avatars (of each portrait), 1, with --interpolate 8; '
                           'avatar i draws its noise from seed + i')

    seen = p.add_argument_group('photographs and words')
    seen.add_argument('--align', action=argparse.BooleanOptionalAction,
                      help='find, level and frame the face, drop the background (default: of '
                           'photographs, but not of portraits on a plain ground)')
    seen.add_argument('--crop', type=int, nargs=3, metavar=('X', 'Y', 'SIZE'),
                      help='--align to this square, where it does not find the face')
    seen.add_argument('--edit', nargs='+', metavar='WORDS',
                      help='what to change of the portrait, such as "red hair": an avatar of '
                           'each, and a strip of strengths')
    seen.add_argument('--strength', type=float, default=1.0,
                      help='of --edit; 0 changes nothing, 1 is as far as words move (default: 1)')
    seen.add_argument('--sd',
                      help='with --prompt: folder or model id of a text-to-image pipeline of '
                           f'diffusers (default, where the models take no words: {words.SD})')
    seen.add_argument('--lora', type=Path,
                      help='with --prompt: a LoRA, as train.py --stage lora writes it')

    how = p.add_argument_group('sampling')
    how.add_argument('--seed', type=int, default=0)
    how.add_argument('--refine', type=int, metavar='STEPS',
                     help='of fitting the avatar to the portrait (see likeness.py); 0: none '
                          "(default: the model's own)")
    how.add_argument('--guidance', type=float,
                     help='classifier-free guidance of the base model; 1 is none '
                          "(default: the model's own)")
    how.add_argument('--steps', type=int,
                     help='sampling steps of each model (default: its own)')
    how.add_argument('--eta', type=float, default=1.0,
                     help='1 is ancestral sampling, 0 deterministic DDIM')
    how.add_argument('--bf16', action=argparse.BooleanOptionalAction,
                     help='autocast to bfloat16 (default: on a GPU)')
    how.add_argument('--device', help='cuda where there is one, else cpu')

    drawn = p.add_argument_group('pictures')
    drawn.add_argument('--size', type=int, default=256, help='pixels a side of a rendered view')
    drawn.add_argument('--refiner', action='store_true',
                       help="pass each view through Rodin's refiner (see refiner.py): sharper, "
                            'but views then differ a little from one another')
    drawn.add_argument('--frames', type=int, default=36, help='frames of the turntable')
    drawn.add_argument('--tag', action=argparse.BooleanOptionalAction, default=True,
                       help='say in a corner, and in the metadata, that pictures and films are '
                            'synthetic (default: yes)')

    shapes = p.add_argument_group('meshes and splats')
    shapes.add_argument('--mesh', type=Path, metavar='FILE',
                        help='a mesh too: .glb (Y up), .obj, .ply (Z up), in the unit cube '
                             '[-1, 1]^3, or .stl; a bare name goes where the rest goes')
    shapes.add_argument('--triangles', type=int,
                        help='at most about this many in the mesh '
                             '(default: 10,000 with a texture, else all, some 200,000)')
    shapes.add_argument('--texture', type=int, default=meshes.TEXTURE, metavar='TEXELS',
                        help='a side, of the texture of .glb and .obj; 0: coloured vertices '
                             '(default: 1024)')
    shapes.add_argument('--height', type=float, default=meshes.HEIGHT, metavar='MM',
                        help='of the .stl, for printing (default: 100 mm)')
    shapes.add_argument('--splats', type=Path, metavar='FILE',
                        help='3D Gaussians too: .ply (Z up) or .glb (Y up, '
                             'KHR_gaussian_splatting)')

    where = p.add_argument_group('folders')
    where.add_argument('--name', help="folder in --out (default: the portrait's name)")
    where.add_argument('--out', type=Path, default=Path('samples'))
    where.add_argument('--runs', type=Path, default=Path('runs'))
    where.add_argument('--fits', type=Path, default=Path('fits'))
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
