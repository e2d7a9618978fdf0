"""Rodin's convolutional refiner (section 3.3), by which Rodin becomes what RodinHD calls Rodin*.

A small network makes a rendered view twice or four times as large, one view at a time. So it knows
nothing of what other views show: RodinHD leaves it out, since it makes views better and their
consistency worse (Tables 2 and 3). `train.py --stage refiner` trains it on renders of fitted planes
beside what the true views show, `sample.py --refiner` uses it, and `evaluate.py` measures both.

Rodin says of its own only that it is a convolutional one after Wang et al. Here it is a stack of
residual blocks, without an adversary: its loss is refiner_loss in train.py. Letters as in
rodinhd.py, and s: the scale.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import rodinhd as rh
import scenes


class Block(nn.Module):
    """Two convolutions beside a shortcut; it starts as the identity."""
    def __init__(self, width):
        super().__init__()
        self.conv1 = rh.conv(width, width)
        self.conv2 = rh.zero(rh.conv(width, width))

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(x)))


class Refiner(nn.Module):
    """Views (B, 3, H, W) in [-1, 1], on white, to (B, 3, s H, s W), not clamped.

    It adds to the bicubically enlarged view, and starts as adding nothing.
    """
    def __init__(self, config):
        super().__init__()
        self.scale = config.refiner_scale
        width = config.refiner_width
        self.conv_in = rh.conv(3, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(config.refiner_blocks)))
        self.conv_out = rh.zero(rh.conv(width, 3 * self.scale ** 2))

    def forward(self, x):
        enlarged = F.interpolate(x, scale_factor=self.scale, mode='bicubic', align_corners=False)
        h = self.blocks(self.conv_in(x))
        return enlarged + F.pixel_shuffle(self.conv_out(h), self.scale)

    @torch.no_grad()
    def refine(self, picture):
        """A picture (H, W, 3) in 0..1, such as render_view makes, to (s H, s W, 3) in 0..1."""
        x = picture.permute(2, 0, 1)[None] * 2 - 1
        return ((self(x)[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0)


def side_of(size, network):
    """The side of the picture that a Refiner makes one of `size` pixels of; stops where that is no
    whole number."""
    if size % network.scale:
        rh.stop(f'the refiner makes pictures {network.scale} times as large: '
                f'a size of {size} pixels does not divide by that')
    return size // network.scale


# Pairs to learn of --------------------------------------------------------------------------------
def random_view(folder, box):
    """Loads a random training view of an avatar, whose box has this centre and half side."""
    return scenes.load_views(folder, 'train', box, pick=int(torch.randint(2 ** 30, ())))


def random_pair(field, grid, view, config, device='cpu'):
    """A random patch of rh.Views of one view, and what a field shows there by fewer pixels.

    Returns a dict of truth (3, p, p) and rendered (3, p/s, p/s), both in [-1, 1] on white, and
    known (1, p, p) bool: false where the view is masked and, where it is smaller than p, beyond it.
    """
    scale = config.refiner_scale
    height, width = (side // scale for side in view.images.shape[1:3])  # of the rendered view
    p = config.refiner_patch // scale
    for _ in range(2):  # an almost white patch is drawn again, once
        y = int(torch.randint(max(height - p, 0) + 1, ()))
        x = int(torch.randint(max(width - p, 0) + 1, ()))
        rows = slice(y * scale, min(y + p, height) * scale)
        columns = slice(x * scale, min(x + p, width) * scale)
        truth = rh.on_white(view.images[0, rows, columns]).permute(2, 0, 1)
        if truth.mean() < 0.9:
            break
    known = torch.ones(truth.shape[1:], dtype=torch.bool)
    if view.unknown is not None:
        known = ~view.unknown[0, rows, columns]

    # The same camera with pixels that are s times as large
    rays = rh.view_rays(view.c2w[0], view.intrinsics[0] / scale, height, width)
    rays_o, rays_d = (r.view(height, width, 3)[y:y + p, x:x + p].to(device) for r in rays)
    shape = rays_o.shape
    with torch.no_grad():
        rendered = rh.render(
            field, rays_o.reshape(-1, 3), rays_d.reshape(-1, 3), config.steps, grid
        ).rgb
    rendered = rendered.view(shape).permute(2, 0, 1)
    return {
        'rendered': filled(rendered.clamp(0, 1) * 2 - 1, p, 1.0),
        'truth': filled(truth * 2 - 1, p * scale, 1.0).to(device),
        'known': filled(known[None], p * scale, False).to(device),
    }


def filled(x, side, value):
    """An image (..., h, w) as one (..., side, side), with a value below and to the right of it."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, side - width, 0, side - height), value=value)
