"""The auto-encoder that Rodin compares its base model with (Table 1): no noise, one pass.

An encoder makes z of the front view, and the layers of the base network make planes of z, by AdaGN
in every block; both are trained together, on planes that many views were fitted to. Rodin says no
more of it than that the decoder is what differs. Letters as in rodinhd.py, and D: the width of z.
"""
import torch
import torch.nn as nn

import rodinhd as rh
import shortcuts

WIDTH = 64  # channels of the encoder
D = 512  # Rodin's


def base_network(config):
    """The base network that a config asks for: this one with autoencoder=1."""
    return AutoEncoder(config) if config.autoencoder else shortcuts.base_network(config)


class FrontEncoder(nn.Module):
    """The VAE's latent (B, 4, P/8, P/8) of the front view to z (B, D), and that to (B, E)."""
    def __init__(self, config, emb):
        super().__init__()
        (channels, pixels), _ = rh.feature_shapes(config)
        layers = [rh.conv(channels, WIDTH)]
        while pixels > 4:
            layers += [nn.SiLU(), rh.halved(WIDTH), rh.norm(WIDTH)]
            pixels //= 2
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Flatten())
        self.z = nn.Linear(WIDTH * pixels ** 2, D)
        self.out = nn.Linear(D, emb)

    def forward(self, latent):
        return self.out(self.z(self.layers(latent)))


class AutoEncoder(rh.BaseUNet):
    """Called as the base network is, but neither looks at x nor at t: it returns x_start.

    In the place of noisy planes it has planes of its own, which training finds. Sampled in any
    number of steps it gives the same. ValueError unless the config has what makes sense with it.
    """
    def __init__(self, config):
        if config.base_predict != 'x_start' or config.tokens != 'none':
            raise ValueError('autoencoder=1 needs base_predict=x_start and tokens=none')
        super().__init__(config)
        r = config.base_resolution
        self.start = nn.Parameter(torch.zeros(1, len(rh.AXES), config.channels, r, r))

    def add_condition(self):
        super().add_condition()
        self.pooled = FrontEncoder(self.config, self.emb)

    def forward(self, x, t, condition):
        start = self.start.expand_as(x)
        planes = super().forward(start, torch.zeros_like(t), condition).chunk(2, dim=2)[0]
        return torch.cat([planes, torch.zeros_like(planes)], dim=2)  # its variance is nobody's
