"""What a training step sees: items from disk, and all that is random about them.

Training meets what will come later: portraits as people have them (`photo`; `disturb` measures what
that costs), and low-resolution planes as the base model makes them (`degrade`).

All that is random about a sample follows from the seed, the step and the sample's place in the
batch. So a run that was interrupted sees the same as one that was not, and any number of ranks and
workers see the same batches.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import rodinhd as rh
import running
import scenes


# Items --------------------------------------------------------------------------------------------
class Images(torch.utils.data.Dataset):
    """Reads all training images of all avatars in `data`, for the VAE.

    An item is a dict of portrait (3, P, P) in [-1, 1] and alpha (1, P, P) in 0..1. Frames are
    counted at the start, and looked for when asked for: 46 K avatars have a million of them.
    """
    def __init__(self, data, config):
        self.made_with = {}
        self.size = config.portrait
        self.folders = scenes.list_avatars(data)
        counts = [scenes.count_frames(folder, 'train') for folder in self.folders]
        self.ends = np.cumsum(counts)

    def names(self):
        """What tells these items from others."""
        return [f'{folder.name} {end}' for folder, end in zip(self.folders, self.ends)]

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        i = range(len(self))[i]
        place = int(np.searchsorted(self.ends, i, side='right'))
        folder = self.folders[place]
        meta, frames = scenes.read_frames(folder, 'train')
        frame = frames[(i - int(self.ends[place])) % len(frames)]
        rgb, alpha = scenes.frame_as_portrait(folder, meta, frame, self.size)
        return {'portrait': rgb, 'alpha': alpha}


class Planes(torch.utils.data.Dataset):
    """Reads the fitted planes of the avatars in `fits`, and their portraits in `data`.

    An item is a dict of x_start (3, C, R, R) in [-1, 1], or with `low` the low-resolution planes
    (3, C, r, r) alone, portrait (3, P, P) in [-1, 1] and alpha (1, P, P) in 0..1. It is read when
    asked for and not kept: planes of the paper's 46 K avatars are 2.3 TB.
    """
    def __init__(self, fits, data, config, low=False):
        self.config = config
        self.name = 'low' if low else 'planes'
        self.made_with = {}
        self.decoder = None
        self.checked = set()  # numbers of the avatars whose images were compared
        self.folders = []
        self.paths = []
        avatars = scenes.list_avatars(data)
        fitted = {path.name for path in Path(fits).glob('*.pt')}
        for folder in avatars:
            path = Path(fits) / f'{folder.name}.pt'
            if path.name in fitted:
                self.folders.append(folder)
                self.paths.append(path)
        if not self.paths:
            rh.stop(
                f'{fits}: holds no fitted planes of the avatars in {data}; '
                'run fit.py --decoder, then fit.py'
            )
        self.missing = len(avatars) - len(self.paths)
        self.read(0)

    def check_decoder(self, decoder):
        """Stops where the planes are of another decoder: the first at once, others when read."""
        self.decoder = decoder
        self.read(0)

    def read(self, i):
        """The content of a planes file, of which only the planes of self.name may be used; stops
        unless it is of this preset, this decoder and the images in this folder."""
        config = self.config
        path = self.paths[i]
        folder = None if i in self.checked else self.folders[i]
        file = running.read_planes(path, self.decoder, folder, low=self.name == 'low')
        self.checked.add(i)
        shapes = [tuple(file[name].shape[1:3]) for name in ('planes', 'low')]
        resolutions = (config.resolution, config.base_resolution)
        if shapes != [(config.channels, resolution) for resolution in resolutions]:
            rh.stop(
                f'{path}: planes of {shapes} channels and texels do not fit '
                f'preset {config.preset}; fit again with it'
            )
        return file

    def names(self):
        """What tells these items from others."""
        return [path.parent.name + path.name for path in self.paths]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        file = self.read(i)
        planes = file[self.name].float().clamp(-1, 1)
        if not planes.isfinite().all():
            rh.stop(f'{self.paths[i]}: holds NaN or infinite values; delete it and fit it again')
        rgb, alpha = scenes.portrait_of(self.folders[i], self.config.portrait)
        return {'x_start': planes, 'portrait': rgb, 'alpha': alpha}


# Batches ------------------------------------------------------------------------------------------
class Draws(torch.utils.data.Dataset):
    """Makes what a step sees: items, with all that is random about them.

    The index (step, j, i) means sample j of the step's batch. It is draw(item, i, j), made of item
    i after PyTorch was seeded by seed, step and j.
    """
    def __init__(self, items, draw, seed):
        self.items = items
        self.draw = draw
        self.seed = seed

    def __getitem__(self, index):
        step, j, i = index
        torch.manual_seed(((self.seed * 1_000_003 + step) * 4096 + j) % 2 ** 63)
        return self.draw(self.items[i], i, j)


def indices(n, batch, begin, steps, seed, rank, world):
    """Yields the indices of Draws that a rank sees, a list for each step from `begin` on.

    The batch of a step, of items below n, follows from seed and step alone. A rank takes every
    world-th sample of it.
    """
    for step in range(begin, steps):
        generator = np.random.default_rng((seed % 2 ** 32, step))
        picks = generator.integers(n, size=batch).tolist()
        yield [(step, j, picks[j]) for j in range(rank, batch, world)]


def collate(samples):
    """Joins samples, which are dicts, to a batch.

    Tensors that all samples have are stacked. What only some have, or what is no tensor, becomes a
    list.
    """
    found = {}
    for sample in samples:
        for key, value in sample.items():
            found.setdefault(key, []).append(value)

    batch = {}
    for key, values in found.items():
        stackable = len(values) == len(samples) and torch.is_tensor(values[0])
        batch[key] = torch.stack(values) if stackable else values
    return batch


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


def uniform(least, most, images):
    """Draws a number between `least` and `most` for each of images (B, ...): (B, 1, 1, 1)."""
    share = torch.rand(len(images), 1, 1, 1, device=images.device)
    return least + (most - least) * share


def photo(rgb, alpha):
    """Makes portraits look as if people had taken them.

    Takes rgb (B, 3, P, P) in [-1, 1] and alpha (B, 1, P, P) and returns (B, 3, P, P) in [-1, 1]:
    scaled by up to 10 %, shifted by up to 5 %, with other colours, on a ground, sometimes blurred.
    """
    scale = uniform(0.9, 1.1, rgb).flatten()
    shift = 0.05 * (2 * torch.rand(len(rgb), 2, device=rgb.device) - 1)
    rgba = place(rgb, alpha, scale, shift)
    opacity = rgba[:, 3:]

    person = jitter(rgba[:, :3], opacity)
    image = (person + (1 - opacity) * random_ground(rgb)).clamp(0, 1)
    return soften(image) * 2 - 1


def jitter(rgb, alpha):
    """Varies saturation by 15 %, contrast and brightness by 10 % of premultiplied portraits."""
    grey = rgb.mean(1, keepdim=True)

    # The mean of the person alone, without what is transparent.
    covered = alpha.mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
    mean = rgb.mean((1, 2, 3), keepdim=True) / covered

    saturated = grey + (rgb - grey) * uniform(0.85, 1.15, rgb)
    contrasted = mean * alpha + (saturated - mean * alpha) * uniform(0.9, 1.1, rgb)
    return contrasted * uniform(0.9, 1.1, rgb)


def random_ground(images):
    """Draws a background in 0..1 for each of images (B, 3, P, P).

    Half of them are white, a quarter are of one colour, a quarter have a soft pattern.
    """
    B, _, P, _ = images.shape
    kind = uniform(0, 1, images)
    flat = torch.rand(B, 3, 1, 1, device=images.device)
    blobs = torch.rand(B, 3, 5, 5, device=images.device)
    pattern = F.interpolate(blobs, size=P, mode='bicubic').clamp(0, 1)

    ground = torch.where(kind < 0.75, flat, pattern)
    return torch.where(kind < 0.5, torch.ones_like(flat), ground)


def soften(images):
    """Blurs half of images (B, 3, P, P), by up to the mean of 3 x 3 pixels."""
    padded = F.pad(images, (1, 1, 1, 1), mode='replicate')
    soft = F.avg_pool2d(padded, 3, stride=1)
    return torch.lerp(images, soft, uniform(-1, 1, images).clamp(min=0))


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
def degrade(planes, size):
    """Makes low-resolution planes as a base model might: condition augmentation.

    Takes planes (B, 3, C, R, R) and returns (B, 3, C, size, size) in [-1, 1]: a random combination
    of downsampling, Gaussian blur and Gaussian noise (Rodin, section 3.3). Neither paper says how
    much; the odds of blur and noise are those of the authors' code, a light BSRGAN degradation.
    """
    degraded = [degrade_one(x, size) for x in planes]
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


def random_patch(folder, path, p, front=0.0):
    """Cuts a random patch of p x p pixels out of a random training view, for the loss of Eq. 6.

    Takes the folder of an avatar and the path of its planes, which know its box. A share `front` of
    the patches is of the face (Rodin, section 3.3, which gives no number). Returns a dict of rays_o
    and rays_d (p, p, 3), rgb (3, p, p) in 0..1 and known (p, p) bool, false where the view is
    masked; smaller where the view is.
    """
    of_face = front > 0 and bool(torch.rand(()) < front)
    view = view_of_face(folder, path, p) if of_face else random_view(folder, path, p)
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

    def crop(rays):
        return rays.view(height, width, 3)[y:y + p, x:x + p]

    known = torch.ones(rgb.shape[:2], dtype=torch.bool)
    if view.unknown is not None:
        known = ~view.unknown[0, y:y + p, x:x + p]
    rays_o, rays_d = rh.view_rays(view.c2w[0], view.intrinsics[0], height, width)
    return {
        'rays_o': crop(rays_o),
        'rays_d': crop(rays_d),
        'rgb': rgb.permute(2, 0, 1),
        'known': known,
    }


def view_of_face(folder, path, p):
    """Draws views until one is from the front half, at most eight times."""
    for _ in range(8):
        view = random_view(folder, path, p)
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


def random_view(folder, path, p):
    """Loads a random training view, shrunk to 2, 4 or 8 patches of p pixels where it is larger.

    The paper does not say how large its patches are. These sizes and their odds are those of the
    authors' code.
    """
    file = running.read_planes(path, low=True)
    box = (file['centre'], file['half'])
    pick = int(torch.randint(2 ** 30, ()))
    odds = torch.tensor([0.35, 0.45, 0.2])
    patches = 2 ** int(1 + torch.multinomial(odds, 1))

    view = scenes.load_views(folder, 'train', box, pick=pick)
    side = view.images.shape[1]
    if side >= 2 * p * patches:
        view = scenes.load_views(folder, 'train', box, side // (p * patches), pick=pick)
    return view
