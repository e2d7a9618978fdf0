"""What a training step sees: items from disk, and all that is random about them.

Training meets what will come later: portraits as people have them (`photo`; `disturb` measures what
that costs), and low-resolution planes as the base model makes them (`degrade`).

A batch is made in two halves. `Draws` and `collate`, in the processes that read, give what is on
disk as it is there: planes in fp16, portraits in bytes, and a seed of each sample. `drawn`, on the
device, makes floats of them, noise, degradation and the like: on one core that took longer than a
GPU takes for the step.

All that is random about a sample follows from the seed, the step and the sample's place in the
batch. So a run that was interrupted sees the same as one that was not, and any number of ranks,
of reading processes and of micro-batches sees the same batches. `Dice` has each sample's numbers,
and what is made of them is made of the whole batch at once: sample by sample, a GPU would get
thousands of small operations a step.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import provenance
import rodinhd as rh
import running
import scenes


# Items --------------------------------------------------------------------------------------------
class Images(torch.utils.data.Dataset):
    """Reads all training images of all avatars in `data`, for the VAE.

    An item is a dict of `pixels`, uint8 RGBA (4, P, P). Frames are counted at the start, and looked
    for when asked for: 46 K avatars have a million of them.
    """
    def __init__(self, data, config):
        self.made_with = {}
        self.size = config.portrait
        folders = scenes.list_avatars(data)
        self.data = folders[0].parent
        self.avatars = [folder.name for folder in folders]
        counts = [scenes.count_frames(folder, 'train') for folder in folders]
        self.ends = np.cumsum(counts)

    def names(self):
        """What tells these items from others."""
        return [f'{name} {end}' for name, end in zip(self.avatars, self.ends)]

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        i = range(len(self))[i]
        place = int(np.searchsorted(self.ends, i, side='right'))
        folder = self.data / self.avatars[place]
        number = i - int(self.ends[place])  # from the end
        meta, frame = scenes.one_frame(folder, 'train', number)
        return {'pixels': scenes.pixels_of_frame(folder, meta, frame, self.size)}


class Planes(torch.utils.data.Dataset):
    """Reads the fitted planes of the avatars in `fits`, and their portraits in `data`.

    An item is a dict of `planes`, fp16 (3, C, R, R), or with `low` the low-resolution planes
    (3, C, r, r) alone, and `pixels`, the portrait in uint8 RGBA (4, P, P). It is read when asked
    for and not kept: planes of the paper's 46 K avatars are 2.3 TB. With `patch`, the image-level
    loss's patches of so many pixels a side can be asked for.

    What costs more than reading is done when an avatar is met first, by whichever process: all
    bytes of its file are compared with their checksums, and what it was fitted to with what is in
    its folder.
    """
    def __init__(self, fits, data, config, low=False):
        self.config = config
        self.low = low
        self.made_with = {}
        self.decoder = None  # where it lies, and its fingerprint
        self.fits = Path(fits)
        folders = scenes.list_avatars(data)
        self.data = folders[0].parent
        fitted = {path.name for path in self.fits.glob('*.pt')}
        # names alone: of a hundred thousand avatars, paths would take 100 MB in each process
        self.avatars = [folder.name for folder in folders if f'{folder.name}.pt' in fitted]
        if not self.avatars:
            rh.stop(
                f'{fits}: holds no fitted planes of the avatars in {data}; '
                'run fit.py --decoder, then fit.py'
            )
        self.missing = len(folders) - len(self.avatars)
        self.met = torch.zeros(len(self.avatars), dtype=torch.bool).share_memory_()
        self.read(0)

    def path(self, i):
        return self.fits / f'{self.avatars[i]}.pt'

    def folder(self, i):
        return self.data / self.avatars[i]

    def paths(self):
        """All planes files, one after the other."""
        return map(self.path, range(len(self)))

    def check_decoder(self, decoder):
        """Stops where the planes are of another decoder: the first at once, others when read."""
        self.decoder = running.beside_of(decoder)
        self.met.zero_()
        self.read(0)

    def read(self, i):
        """The content of a planes file, of which only the planes that are asked for may be used;
        stops unless it is of this preset, this decoder and the images in this folder."""
        path = self.path(i)
        met = bool(self.met[i])
        folder = None if met else self.folder(i)
        known = met and not self.low
        file = running.read_planes(path, self.decoder, folder, low=self.low, known=known)
        self.check_sizes(path, file)
        if met:
            return file
        planes = file['low' if self.low else 'planes']
        if not is_finite(planes):
            rh.stop(f'{path}: holds NaN or infinite values; delete it and fit it again')
        self.met[i] = True
        return file

    def check_sizes(self, path, file):
        config = self.config
        shapes = [tuple(file[name].shape[1:3]) for name in ('planes', 'low')]
        resolutions = (config.resolution, config.base_resolution)
        if shapes != [(config.channels, resolution) for resolution in resolutions]:
            rh.stop(
                f'{path}: planes of {shapes} channels and texels do not fit '
                f'preset {config.preset}; fit again with it'
            )

    def names(self):
        """What tells these items from others."""
        return [f'{self.fits.name}{name}.pt' for name in self.avatars]

    def __len__(self):
        return len(self.avatars)

    def __getitem__(self, i):
        return self.item(i, self.read(i))

    def item(self, i, file):
        """What __getitem__ returns, of the content of a planes file."""
        i = range(len(self))[i]
        size = self.config.portrait
        pixels = provenance.kept_portrait(self.folder(i), file.get('portrait'), size)
        if pixels is None:
            pixels = scenes.pixels_of_portrait(self.folder(i), size)
        # copied, as they are views of the whole file, which would be sent with them
        planes = file['low' if self.low else 'planes'].clone()
        return {'planes': planes, 'pixels': pixels.clone()}

    def with_patch(self, i, p, front=0.0):
        """An item that also has a `patch`, which random_patch cuts out of a view or, with low
        planes, the `rays` of a whole_view."""
        file = self.read(i)
        box = (file['centre'], file['half'])
        if self.low:
            return {**self.item(i, file), 'rays': whole_view(self.folder(i), box, p)}
        patch = random_patch(self.folder(i), box, p, front)
        return {**self.item(i, file), 'patch': patch}


def is_finite(x):
    """Whether all of an fp16 tensor is finite: whether no exponent is the largest. isfinite() says
    the same and takes 6 times as long."""
    return int((x.view(torch.int16) & 0x7FFF).max()) < 0x7C00


def in_floats(sample):
    """An item, or a batch, with `x_start` in [-1, 1] in place of planes in fp16, and `portrait`
    (3, P, P) in [-1, 1] and `alpha` (1, P, P) in 0..1 in place of pixels."""
    made = {name: x for name, x in sample.items() if name not in ('planes', 'pixels')}
    if 'planes' in sample:
        made['x_start'] = sample['planes'].float().clamp(-1, 1)
    if 'pixels' in sample:
        made['portrait'], made['alpha'] = scenes.portrait_in_floats(sample['pixels'])
    return made


# Batches ------------------------------------------------------------------------------------------
class Draws(torch.utils.data.Dataset):
    """Reads what a step sees, in the processes of a DataLoader.

    The index (step, j, i) means sample j of the step's batch: item i, with the `seed` that `drawn`
    draws from. The first `patches` samples of a batch have patches of `side` pixels, a share
    `front` of which are of the face.
    """
    def __init__(self, items, seed, patches=0, side=0, front=0.0):
        self.items = items
        self.seed = seed
        self.patches = patches
        self.side = side
        self.front = front

    def __getitem__(self, index):
        step, j, i = index
        seed = 2 * (((self.seed * 1_000_003 + step) * MOST_SAMPLES + j) % 2 ** 61)
        torch.manual_seed(seed)
        try:
            if j < self.patches:
                sample = self.items.with_patch(i, self.side, self.front)
            else:
                sample = self.items[i]
        except rh.Stop as stop:  # a DataLoader would hand it on in twenty lines
            return {'stop': str(stop)}
        return {**sample, 'seed': seed + 1}


MOST_SAMPLES = 2 ** 17  # of a batch: more than rodinhd.LARGEST allows


def drawn(batch, draw, device):
    """Makes on the device what a step sees of a batch, as `collate` joined it.

    draw(batch, dice) returns what of it is random, or made of what is random, a dict. The batch has
    the `seed` of each sample, whose numbers are in the Dice.
    """
    if 'stop' in batch:
        rh.stop(batch['stop'])
    return draw(in_floats(moved(batch, device)), Dice(batch['seed'], device))


def moved(x, device):
    """Tensors, and those in lists and dicts, on a device; nobody waits for those that are
    pinned."""
    if torch.is_tensor(x):
        return x.to(device, non_blocking=True)
    if isinstance(x, dict):
        return {name: moved(value, device) for name, value in x.items()}
    return [moved(value, device) for value in x] if type(x) is list else x


def shares(batch, rank, world, micro=0):
    """What a rank sees of each batch -> micro-batches, lists of places in the batch, and the weight
    of each sample in the batch's mean.

    A rank takes every world-th sample, `micro` at a time (0: all at once). Where there are more
    ranks than samples, those without repeat one, with a weight of zero.
    """
    places = list(range(rank, batch, world))
    weight = 1 / batch
    if not places:
        places = [rank % batch]
        weight = 0.0
    size = micro or len(places)
    return [places[k:k + size] for k in range(0, len(places), size)], weight


def indices(n, batch, begin, steps, seed, parts):
    """Yields the indices of Draws that a rank sees, a list for each micro-batch, from a step on.

    The batch of a step, of items below n, follows from seed and step alone. parts: of `shares`.
    """
    for step in range(begin, steps):
        generator = np.random.default_rng((seed % 2 ** 32, step))
        picks = generator.integers(n, size=batch).tolist()
        for places in parts:
            yield [(step, j, picks[j]) for j in places]


def collate(samples):
    """Joins samples of Draws, which are dicts, to a batch.

    Tensors that all samples have are stacked, and rays of views are joined. What else only some
    have, or what is no tensor, becomes a list.
    """
    found = {}
    for sample in samples:
        if 'stop' in sample:
            return sample
        for key, value in sample.items():
            found.setdefault(key, []).append(value)

    batch = {}
    for key, values in found.items():
        stackable = len(values) == len(samples) and torch.is_tensor(values[0])
        batch[key] = torch.stack(values) if stackable else values
    if 'rays' in batch:
        batch['rays'] = joined([sample.get('rays') for sample in samples])
    return batch


def joined(views):
    """Joins the views of a batch, dicts of whole_view, or None for samples without -> a dict of all
    rays, with the place `owner` (N,) of the sample that each is of, and the `share` (N,) of its
    view that each is."""
    found = {}
    for place, view in enumerate(views):
        if view is not None:
            count = len(view['rgb'])
            view = {
                **view,
                'owner': torch.full((count,), place),
                'share': torch.full((count,), 1 / max(count, 1)),
            }
            for key, value in view.items():
                found.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in found.items()}


# Chance -------------------------------------------------------------------------------------------
MOST_NUMBERS = 256  # a sample


class Dice:
    """Random numbers for a batch: those of a sample follow from its seed, in any company.

    A sample's few numbers are drawn at once, by a CPU, and handed out column by column (B, ...).
    Noise, which is many numbers, is drawn on the device.
    """
    def __init__(self, seeds, device='cpu'):
        self.seeds = seeds
        self.device = torch.device(device)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = [torch.rand(MOST_NUMBERS, generator=generator) for generator in self.generators]
        numbers = torch.stack(rows)
        if self.device.type == 'cuda':
            numbers = numbers.pin_memory()
            self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.numbers = moved(numbers, device)
        self.taken = 0

    def uniform(self, *shape):
        """Numbers from 0 to below 1, (B, *shape)."""
        first = self.taken
        self.taken += math.prod(shape)
        if self.taken > MOST_NUMBERS:
            raise ValueError(f'more than {MOST_NUMBERS} random numbers a sample')
        return self.numbers[:, first:self.taken].reshape(len(self.seeds), *shape)

    def between(self, least, most, *shape):
        """Numbers between two others, (B, *shape)."""
        return least + (most - least) * self.uniform(*shape)

    def below(self, n):
        """Whole numbers from 0 to n - 1, (B,)."""
        return (self.uniform() * n).long().clamp(max=n - 1)  # a product in fp32 may round up to n

    def normal(self, *shape):
        """Unit noise (B, *shape)."""
        noise = torch.empty(len(self.seeds), *shape, device=self.device)
        for own, generator in zip(noise, self.generators, strict=True):
            own.normal_(generator=generator)
        return noise

    def one_by_one(self):
        """Yields the places 0 ... B - 1, with PyTorch seeded by the seed of the sample there."""
        for place, seed in enumerate(self.seeds):
            torch.manual_seed(seed)
            yield place


# Portraits as people have them --------------------------------------------------------------------
def place(rgb, alpha, scale, shift):
    """Shrinks portraits by scale (B,) and shifts them by shift (B, 2), in image widths.

    Takes rgb (B, 3, P, P) in [-1, 1] and alpha (B, 1, P, P), and returns premultiplied RGBA
    (B, 4, P, P) in 0..1, transparent where nothing was.
    """
    linear = torch.eye(2, device=rgb.device) * scale[:, None, None]
    theta = torch.cat([linear, 2 * shift[:, :, None]], dim=2)               # (B, 2, 3)
    rgba = torch.cat([(rgb + 1) / 2 * alpha, alpha], dim=1)

    # The grid is made in doubles, which autocast and TF32 do not round.
    grid = F.affine_grid(theta.double(), rgba.shape, align_corners=False).float()
    return F.grid_sample(rgba, grid, align_corners=False)


def photo(rgb, alpha, dice):
    """Makes portraits look as if people had taken them.

    Takes rgb (B, 3, P, P) in [-1, 1] and alpha (B, 1, P, P) and returns (B, 3, P, P) in [-1, 1]:
    scaled by up to 10 %, shifted by up to 5 %, with other colours and light, on a ground, sometimes
    blurred, sometimes cut off.
    """
    scale = dice.between(0.9, 1.1)
    shift = dice.between(-0.05, 0.05, 2)
    rgba = place(rgb, alpha, scale, shift)
    opacity = rgba[:, 3:]

    person = relight(jitter(rgba[:, :3], opacity, dice), dice)
    image = (person + (1 - opacity) * random_ground(rgb.shape[-1], dice)).clamp(0, 1)
    return cut_off(soften(image, dice), dice) * 2 - 1


def jitter(rgb, alpha, dice):
    """Varies saturation by 15 %, contrast and brightness by 10 % of premultiplied portraits."""
    grey = rgb.mean(1, keepdim=True)

    # The mean of the person alone, without what is transparent.
    covered = alpha.mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
    mean = rgb.mean((1, 2, 3), keepdim=True) / covered

    saturated = grey + (rgb - grey) * dice.between(0.85, 1.15, 1, 1, 1)
    contrasted = mean * alpha + (saturated - mean * alpha) * dice.between(0.9, 1.1, 1, 1, 1)
    return contrasted * dice.between(0.9, 1.1, 1, 1, 1)


def relight(images, dice):
    """Varies the white balance of images (B, 3, P, P) by 6 %, and lets half of them be brighter,
    by up to 15 %, towards one side."""
    balance = dice.between(0.94, 1.06, 3, 1, 1)

    angle = dice.between(0, 2 * math.pi, 1, 1, 1)
    across = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    ramp = angle.cos() * across + angle.sin() * across[:, None]  # (B, 1, P, P)
    light = 1 + dice.between(-0.15, 0.15, 1, 1, 1).clamp(min=0) * ramp
    return images * balance * light


def cut_off(images, dice):
    """Cuts images (B, C, P, P) off at their edges, as the frame of a photograph does.

    Beyond the cut the picture goes on as it was at its edge (likeness.straighten does the same to
    what a portrait does not show). Two in five lose some of the lower half: at the chest, the
    shoulders or the chin. One in seven loses up to a sixth on the left, as many on the right, and
    one in twenty a little at the top.
    """
    P = images.shape[-1]

    def lost(odds, most):
        """How many pixels each image loses at one side, (B, 1)."""
        chosen = dice.uniform(1) < odds
        return (chosen * most * dice.uniform(1) * P).long()

    below = lost(2 / 5, 0.45)
    left, right = lost(1 / 7, 1 / 6), lost(1 / 7, 1 / 6)
    above = lost(1 / 20, 0.08)
    pixels = torch.arange(P, device=images.device)
    rows = pixels.clamp(above, P - 1 - below)
    columns = pixels.clamp(left, P - 1 - right)
    return picked(images, rows, columns)


def picked(images, rows, columns):
    """Some rows (B, H) and columns (B, W) of images (B, C, P, P) -> (B, C, H, W)."""
    B, C, _, P = images.shape
    rows = rows[:, None, :, None].expand(B, C, -1, P)
    columns = columns[:, None, None].expand(B, C, rows.shape[2], -1)
    return images.gather(2, rows).gather(3, columns)


def mirrored(batch, chosen):
    """A batch in floats of which the chosen (B,) avatars are mirrored, left for right: planes,
    portraits, and the rays of patches and views. Exact where colours do not depend on the view."""
    def turned(x, mirror_image):
        return torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), mirror_image, x)

    x_start = batch['x_start']
    xy, xz, yz = x_start.unbind(1)  # the first two run along x
    made = {'x_start': turned(x_start, torch.stack([xy.flip(-1), xz.flip(-1), yz], dim=1))}
    for name in ('portrait', 'alpha'):
        made[name] = turned(batch[name], batch[name].flip(-1))

    signs = torch.ones(len(x_start), 3, device=x_start.device)  # of the three axes
    signs[:, 0] = 1 - 2 * chosen.float()
    if 'rays' in batch:
        made['rays'] = with_signs(batch['rays'], signs[batch['rays']['owner']])
    if 'patch' in batch:
        made['patch'] = [with_signs(*both) for both in zip(batch['patch'], signs)]
    return {**batch, **made}


def with_signs(rays, signs):
    """Rays in a dict, with their axes multiplied by signs (..., 3)."""
    return {**rays, **{name: rays[name] * signs for name in ('rays_o', 'rays_d')}}


def random_ground(P, dice):
    """Draws backgrounds (B, 3, P, P) in 0..1.

    Half of them are white, a quarter are of one colour, a quarter have a soft pattern.
    """
    kind = dice.uniform(1, 1, 1)
    flat = dice.uniform(3, 1, 1)
    blobs = dice.uniform(3, 5, 5)
    pattern = F.interpolate(blobs, size=P, mode='bicubic').clamp(0, 1)

    ground = torch.where(kind < 0.75, flat, pattern)
    return torch.where(kind < 0.5, 1.0, ground)


def soften(images, dice):
    """Blurs half of images (B, 3, P, P), by up to the mean of 3 x 3 pixels."""
    padded = F.pad(images, (1, 1, 1, 1), mode='replicate')
    soft = F.avg_pool2d(padded, 3, stride=1)
    return torch.lerp(images, soft, dice.between(-1, 1, 1, 1, 1).clamp(min=0))


def disturb(rgb, alpha, photographs, seed):
    """Places a portrait differently and on another ground, to measure what that costs.

    Takes rgb (3, P, P) in [-1, 1] and alpha (1, P, P) and returns (3, P, P) in [-1, 1]: shifted by
    up to 5 %, scaled by up to 10 %, on one colour or, every other time where there are any, on a
    piece of one of the image files `photographs`.
    """
    P = rgb.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(7, generator=generator).tolist()
    scale = torch.tensor([0.9 + 0.2 * draws[0]])
    shift = torch.tensor([[0.1 * draws[1] - 0.05, 0.1 * draws[2] - 0.05]])
    ground = torch.tensor(draws[4:])[:, None, None]                         # (3, 1, 1)
    if photographs and draws[3] < 0.5:
        ground = piece_of_one(photographs, P, generator)

    rgba = place(rgb[None], alpha[None], scale, shift)[0]
    return (rgba[:3] + (1 - rgba[3:]) * ground) * 2 - 1


def piece_of_one(photographs, P, generator):
    """Cuts a random piece (3, P, P) in 0..1 out of a random photograph, made 2 P wide."""
    pick = int(torch.randint(len(photographs), (), generator=generator))
    top = int(torch.randint(P, (), generator=generator))
    left = int(torch.randint(P, (), generator=generator))
    image, _ = scenes.read_portrait(photographs[pick], 2 * P)
    return (image[:, top:top + P, left:left + P] + 1) / 2


# Planes as the base model makes them --------------------------------------------------------------
def degrade(planes, size, dice):
    """Makes low-resolution planes as a base model might: condition augmentation.

    Takes planes (B, 3, C, R, R) and returns (B, 3, C, size, size) in [-1, 1]: a random combination
    of downsampling, Gaussian blur and Gaussian noise (Rodin, section 3.3). Neither paper says how
    much; the odds of blur and noise are those of the authors' code, a light BSRGAN degradation.
    """
    degraded = [degrade_one(planes[k], size) for k in dice.one_by_one()]
    return torch.stack(degraded).clamp(-1, 1)


def degrade_one(x, size):
    """Degrades the planes (3, C, R, R) of one avatar, all three alike."""
    if torch.rand(()) < 0.5:
        x = through_another_size(x, size)
    x = rh.resize_planes(x.double(), size).float()      # doubles are exempt from autocast
    if torch.rand(()) < 0.25:
        x = blur(x)
    return add_noise(x)


def through_another_size(x, size):
    """Resizes planes (3, C, R, R) to a random size between `size` and R, without antialiasing."""
    R = x.shape[-1]
    between = int(size * (1 + torch.rand(()) * (R / size - 1)))
    mode = 'bilinear' if torch.rand(()) < 0.5 else 'bicubic'
    return F.interpolate(x, size=between, mode=mode, align_corners=True)


def blur(x):
    """Convolves planes (3, C, r, r) with a Gaussian of 0.1 to 0.8 texels, cut off at 5 x 5."""
    C = x.shape[1]
    sigma = 0.1 + 0.7 * torch.rand((), device=x.device)
    tap = torch.exp(-torch.arange(-2, 3, device=x.device) ** 2 / (2 * sigma ** 2))
    kernel = tap[:, None] * tap / tap.sum() ** 2
    padded = F.pad(x, (2, 2, 2, 2), mode='replicate')
    return F.conv2d(padded, kernel.expand(C, 1, 5, 5), groups=C)


def add_noise(x):
    """Adds Gaussian noise, of 5/255 to 25/255, to planes (3, C, r, r) in 80 % of the cases.

    In half of these it is independent, in the others one map for all planes and channels.
    """
    kind = torch.rand(())
    sigma = (5 + 20 * torch.rand((), device=x.device)) / 255
    if kind >= 0.8:
        return x
    one_map = x[:1, :1]
    noise = torch.randn_like(x if kind < 0.4 else one_map)
    return x + sigma * noise


# Patches of views ---------------------------------------------------------------------------------
FACE = (0.0, -0.4, 0.35)  # where faces are in the box, as portraits are framed


def random_patch(folder, box, p, front=0.0):
    """Cuts a random patch of p x p pixels out of a random training view, for the loss of Eq. 6.

    Takes the folder of an avatar and its box. A share `front` of the patches is of the face (Rodin,
    section 3.3, which gives no number). Returns a dict of rays_o and rays_d (p, p, 3), rgb
    (3, p, p) in 0..1 and known (p, p) bool, false where the view is masked; smaller where the view
    is.
    """
    of_face = front > 0 and bool(torch.rand(()) < front)
    view = view_of_face(folder, box, p) if of_face else random_view(folder, box, p)
    height, width = view.images.shape[1:3]

    # An almost white crop is drawn again, once.
    for _ in range(2):
        if of_face:
            y, x = corner_at_face(view, p)
        else:
            y = int(torch.randint(max(height - p, 0) + 1, ()))
            x = int(torch.randint(max(width - p, 0) + 1, ()))
        rgb = rh.on_white(view.images[0, y:y + p, x:x + p])
        if rgb.mean() < 0.7:
            break

    known = torch.ones(rgb.shape[:2], dtype=torch.bool)
    if view.unknown is not None:
        known = ~view.unknown[0, y:y + p, x:x + p]
    rows, columns = torch.meshgrid(*map(torch.arange, rgb.shape[:2]), indexing='ij')
    pixels = (x + columns.flatten(), y + rows.flatten())
    rays_o, rays_d = rh.pixel_rays(view.c2w[0], view.intrinsics[0], *pixels)
    return {
        'rays_o': rays_o.reshape(rgb.shape).contiguous(),  # memory of its own, which can be pinned
        'rays_d': rays_d.reshape(rgb.shape),
        'rgb': rgb.permute(2, 0, 1),
        'known': known,
    }


def view_of_face(folder, box, p):
    """Draws views until one is from the front half, at most eight times."""
    for _ in range(8):
        view = random_view(folder, box, p)
        if view.c2w[0, 1, 3] < FACE[1]:
            break
    return view


def corner_at_face(view, p):
    """Draws the upper left corner, row and column, of a patch whose centre is at the face.

    It is off by up to a quarter of the patch, and the patch lies in the image.
    """
    c2w = view.c2w[0]
    local = (torch.tensor(FACE) - c2w[:3, 3]) @ c2w[:3, :3]  # the camera looks down -z
    fx, fy, cx, cy = view.intrinsics[0]
    depth = (-local[2]).clamp(min=1e-3)
    centre = torch.stack([cy - fy * local[1] / depth, cx + fx * local[0] / depth])
    corner = centre - p / 2 + p / 2 * (torch.rand(2) - 0.5)
    most = torch.tensor(view.images.shape[1:3]) - p
    return torch.minimum(corner.round(), most).clamp(min=0).int().tolist()


def whole_view(folder, box, p):
    """Loads a random training view of an avatar as about p x p pixels, each the mean of those that
    it covers, for the loss of the base network on views.

    Takes the folder of an avatar and its box. Returns a dict of rays_o and rays_d (N, 3), rgb
    (N, 3) on black in 0..1, and alpha (N, 1), of those pixels whose ray meets the box and which no
    mask hides; and, drawn for each of them, the colour of its ground (N, 3) and the offset (N,) of
    its samples.
    """
    pick = int(torch.randint(2 ** 30, ()))
    view = scenes.load_views(folder, 'train', box, pick=pick)
    side = min(view.images.shape[1:3])
    if side >= 2 * p:
        view = scenes.load_views(folder, 'train', box, side // p, pick=pick)

    height, width = view.images.shape[1:3]
    rays_o, rays_d = rh.view_rays(view.c2w[0], view.intrinsics[0], height, width)
    rays_o = rays_o.reshape(-1, 3)
    rays_d = rays_d.reshape(-1, 3)
    near, far = rh.intersect_box(rays_o, rays_d)
    used = far > near
    if view.unknown is not None:
        used &= ~view.unknown[0].flatten()
    rgba = view.images[0].reshape(-1, 4)[used].float() / 255
    return {
        'rays_o': rays_o[used],
        'rays_d': rays_d[used],
        'rgb': rgba[:, :3] * rgba[:, 3:],
        'alpha': rgba[:, 3:],
        'ground': torch.rand(len(rgba), 3),
        'offset': torch.rand(len(rgba)),
    }


def random_view(folder, box, p):
    """Loads a random training view, shrunk to 2, 4 or 8 patches of p pixels where it is larger.

    The paper does not say how large its patches are. These sizes and their odds are those of the
    authors' code.
    """
    pick = int(torch.randint(2 ** 30, ()))
    odds = torch.tensor([0.35, 0.45, 0.2])
    patches = 2 ** int(1 + torch.multinomial(odds, 1))
    return scenes.load_view(folder, box, pick, lambda height: max(height // (p * patches), 1))
