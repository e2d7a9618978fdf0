"""Two shortcuts that the papers do not have, off at `paper`, for networks that are small and trained briefly: they need not find out by
themselves what all avatars have in common (`Prior`), nor where in space it is that a portrait shows (`front_features`). Letters as in
rodinhd.py.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Prior(nn.Module):
    """A morphable model of planes (after Blanz and Vetter): latent (B, 4, P/8, P/8) to (B, 3, C, R, R), the mean of the training planes
    plus `count` principal components of them, weighted by the latent. Networks that predict x_start add it to their output."""
    def __init__(self, config, resolution, count):
        super().__init__()
        inputs, shape = config.vae_latent * (config.portrait // 16) ** 2, (3, config.channels, resolution, resolution)
        self.mean, self.components = (nn.Parameter(torch.zeros(n, *shape), requires_grad=False) for n in (1, count))
        self.weights = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(inputs, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(),
                                     nn.Linear(256, count)) if count else None

    def forward(self, latent):
        if not self.weights:
            return self.mean.expand(len(latent), *self.mean.shape[1:])
        with torch.autocast(latent.device.type, enabled=False):        # planes in bfloat16 have two digits
            return self.mean + torch.tensordot(self.weights(latent.float()), self.components, 1)

    @torch.no_grad()
    def learn(self, planes):
        """Sets mean and components (times their standard deviations; zeros where avatars are too few) by an iterable of (3, C, R, R)."""
        rows = []
        for n, x in enumerate(planes, start=1):
            self.mean.lerp_(x.to(self.mean), 1 / n)
            if self.weights:
                rows.append(x.flatten())
        if rows:
            rows = torch.stack(rows).to(self.mean) - self.mean.flatten()                        # (N, 3CRR)
            vectors = torch.linalg.eigh(rows @ rows.T)[1].flip(1)[:, :len(self.components)].T   # (K, N), the largest first
            self.components.zero_()[:len(vectors)] = (vectors @ rows / n ** 0.5).view(-1, *self.mean.shape[1:])

def front_features(portrait, R):
    """Pixel-aligned features (PIFu): latent and y1 of a Portrait as texels of the xz plane see them, (B, 4 + c1, R, R). A portrait shows a
    face (y = -0.4) from a distance of 4 with a field of view of 34 degrees; its first row is on top, the plane's last is."""
    at = torch.linspace(-1, 1, R, device=portrait.latent.device) / ((4 - 0.4) * math.tan(math.radians(34 / 2)))
    grid = torch.stack(torch.meshgrid(at, -at, indexing='xy'), dim=-1).expand(len(portrait.latent), R, R, 2)
    maps = [F.interpolate(x.float(), size=R, mode='bilinear', antialias=True) for x in (portrait.latent, portrait.maps[0])]
    return F.grid_sample(torch.cat(maps, dim=1), grid, align_corners=False)
