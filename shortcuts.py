"""Two shortcuts that the papers do not have, for networks that are small and trained briefly.

They need not find out by themselves what all avatars have in common (`Prior`, with the setting
components above 0), nor where in space it is that a portrait shows (`front_features`, with the
settings base_aligned and aligned). The networks here are those of rodinhd.py with these beside;
`base_network` and `upsample_network` pick by the configuration. Both are off in `paper`. Letters as
in rodinhd.py.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import rodinhd as rh


def base_network(config):
    """The base network that a config asks for."""
    if with_components(config) or config.base_aligned:
        return BaseUNet(config)
    return rh.BaseUNet(config)


def with_components(config):
    """Whether the base network has a Prior: what that adds is planes, so the network has to predict
    planes, too."""
    return bool(config.components) and config.base_predict == 'x_start'


def upsample_network(config):
    """The upsample network that a config asks for."""
    if config.components or config.aligned:
        return UpsampleUNet(config)
    return rh.UpsampleUNet(config)


class Prior(nn.Module):
    """A morphable model of planes (after Blanz and Vetter): a latent (B, 4, P/8, P/8) to
    (B, 3, C, R, R).

    That is the mean of the training planes plus `count` principal components of them, which the
    latent weights or, where that is dropped, a vector (B, `width`) does.
    """
    def __init__(self, config, resolution, count, width=0):
        super().__init__()
        shape = (3, config.channels, resolution, resolution)
        self.mean = nn.Parameter(torch.zeros(1, *shape), requires_grad=False)
        self.components = nn.Parameter(torch.zeros(count, *shape), requires_grad=False)
        self.weights = None
        self.by_vector = None
        if count and width:
            self.by_vector = nn.Sequential(
                nn.Linear(width, 256),
                nn.SiLU(),
                nn.Linear(256, 256),
                nn.SiLU(),
                rh.zero(nn.Linear(256, count)),
            )
        if count:
            (channels, pixels), _ = rh.feature_shapes(config)
            inputs = channels * (pixels // 2) ** 2
            self.weights = nn.Sequential(
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(inputs, 256),
                nn.SiLU(),
                nn.Linear(256, 256),
                nn.SiLU(),
                nn.Linear(256, count),
            )

    def forward(self, latent, vector=None):
        if not self.weights:
            return self.mean.expand(len(latent), *self.mean.shape[1:])
        with torch.autocast(latent.device.type, enabled=False):  # bfloat16 has two digits
            weights = self.weights(latent.float())
            if self.by_vector is not None and vector is not None:
                weights = weights + self.weights_of_vector(latent, vector.float())
            return self.mean + torch.tensordot(weights, self.components, 1)

    def weights_of_vector(self, latent, vector):
        """What a vector adds to the weights (B, count): nothing where it was dropped, or where
        there is a latent, which says more."""
        alone = (latent == 0).flatten(1).all(1) & (vector != 0).any(1)
        return alone[:, None] * self.by_vector(vector)

    @torch.no_grad()
    def learn(self, planes):
        """Sets the mean and the components by an iterable of planes (3, C, R, R).

        Components are scaled by their standard deviations; where avatars are too few they are zero.
        """
        rows = []
        for n, x in enumerate(planes, start=1):
            self.mean.lerp_(x.to(self.mean), 1 / n)
            if self.weights:
                rows.append(x.flatten())
        if not rows:
            return
        rows = torch.stack(rows).to(self.mean) - self.mean.flatten()  # (N, 3CRR)
        vectors = torch.linalg.eigh(rows @ rows.T)[1].flip(1)  # (N, N), the largest first
        vectors = vectors[:, :len(self.components)].T  # (K, N)
        found = (vectors @ rows / n ** 0.5).view(-1, *self.mean.shape[1:])
        self.components.zero_()
        self.components[:len(found)] = found


def front_features(portrait, R):
    """Pixel-aligned features (PIFu): latent and y1 of a Portrait as the texels of the xz plane see
    them, (B, 4 + c1, R, R).

    A portrait shows a face, at y = -0.4, from a distance of 4. Its first row is on top, the
    plane's last is.
    """
    half_width = (4 - 0.4) * math.tan(math.radians(rh.PORTRAIT_FOV / 2))  # of what is in view
    x = torch.linspace(-1, 1, R, device=portrait.latent.device) / half_width
    grid = torch.stack(torch.meshgrid(x, -x, indexing='xy'), dim=-1)
    grid = grid.expand(len(portrait.latent), R, R, 2)
    maps = [
        F.interpolate(features.float(), size=R, mode='bilinear', antialias=True)
        for features in (portrait.latent, portrait.maps[0])
    ]
    return F.grid_sample(torch.cat(maps, dim=1), grid, align_corners=False)


def front_layer(config, width):
    """The layer that takes front_features to the first features of a network; it starts at zero."""
    (latent, _), maps = rh.feature_shapes(config)
    y1, _ = maps[0]
    return rh.zero(rh.conv(latent + y1, width))


def on_middle_plane(layer, portrait, R):
    """What `layer` makes of front_features, (B, c, R, 3R): the xz plane is the middle one."""
    return F.pad(layer(front_features(portrait, R)), (R, R))


@dataclass
class Condition(rh.Condition):
    """A Condition with what the shortcuts add."""
    prior: torch.Tensor | None = None  # added to x_start, (B, 3, C, R, R)
    front: torch.Tensor | None = None  # added to the first features, (B, c, R, 3R)


class Shortcuts:
    """What a network has with the shortcuts, beside its class of rodinhd.py: a `prior`, a `front`
    layer, or None. `texels` is the height of its planes."""
    def condition(self, portrait):
        condition = Condition(**vars(super().condition(portrait)))
        if self.prior is not None:
            condition.prior = self.prior(portrait.latent, portrait.vector)
        if self.front is not None:
            condition.front = on_middle_plane(self.front, portrait, self.texels)
        return condition

    def first_features(self, x, condition):
        features = super().first_features(x, condition)
        return features if condition.front is None else features + condition.front

    def forward(self, x, t, condition):
        """What the network makes of (x, t, condition), plus the prior; its variance stays as it
        is."""
        if isinstance(condition, rh.Portrait):
            condition = self.condition(condition)
        out = super().forward(x, t, condition)
        if condition.prior is None:
            return out
        variance = out.shape[2] - x.shape[2]  # channels
        return out + F.pad(condition.prior, (0, 0, 0, 0, 0, variance))


class BaseUNet(Shortcuts, rh.BaseUNet):
    """The base network that adds what all avatars have in common to its x_start, with the portrait
    laid onto the xz plane, or with both."""
    added = (*rh.BaseUNet.added, 'prior.by_vector.', 'front.')

    def add_condition(self):
        super().add_condition()
        config = self.config
        self.texels = config.base_resolution
        self.prior = None
        if with_components(config):
            self.prior = Prior(config, self.texels, config.components, config.latent_width)

    def add_body(self, *sizes):
        super().add_body(*sizes)
        self.front = None
        if self.config.base_aligned:
            self.front = front_layer(self.config, self.config.base_width)


class UpsampleUNet(Shortcuts, rh.UpsampleUNet):
    """The upsample network with what all avatars have in common (their mean alone), with the
    portrait laid onto the xz plane, or with both."""
    def add_condition(self):
        super().add_condition()
        self.texels = self.config.resolution
        self.prior = None
        if self.config.components:
            self.prior = Prior(self.config, self.texels, 0)

    def add_body(self, *sizes):
        super().add_body(*sizes)
        self.front = None
        if self.config.aligned:
            self.front = front_layer(self.config, self.config.up_width)
