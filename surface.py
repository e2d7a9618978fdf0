"""A surface model (after NeuS), which tells whether views are those of one solid thing.

RodinHD measures the consistency of generated views so (section 4.1, Tables 3 and 8). A surface has
one colour at each point, from wherever it is seen, so it can show views that disagree only as their
mean: the better it fits them, the more they agree.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import ndimage

import rodinhd as rh


class Surface(nn.Module):
    """Planes and two small networks that give a signed distance and a colour: a field.

    Density is s sigmoid(-s d) of the signed distance d, positive outside; s is learned. Colour is
    the same from all sides. The surface begins as that of `hull`, a bool array (G, G, G).
    """
    def __init__(self, hull, channels=16, resolution=128, width=32):
        super().__init__()
        self.table = nn.Parameter(0.01 * torch.randn(3, resolution, resolution, channels))

        # Signed distances (1, 1, G, G, G) of the hull, whose cells are 2 / G wide.
        outside = ndimage.distance_transform_edt(~hull)
        inside = ndimage.distance_transform_edt(hull)
        start = torch.from_numpy((outside - inside) * 2 / len(hull)).float()
        self.register_buffer('start', start[None, None])

        self.distance = nn.Sequential(
            nn.Linear(channels, width),
            nn.Softplus(),
            nn.Linear(width, 1 + width),
        )
        self.colour = nn.Sequential(
            nn.Linear(channels + width, width),
            nn.ReLU(),
            nn.Linear(width, 3),
            nn.Sigmoid(),
        )
        self.log_s = nn.Parameter(torch.tensor(4.0))

    def signed_distance(self, points):
        """Returns distances (N,) of points (N, 3), the hull's plus a learned one, and features."""
        features = rh.sample_planes(self.table.permute(0, 3, 1, 2), points)
        d, hidden = self.distance(features).split([1, self.distance[2].out_features - 1], dim=1)

        # grid_sample takes the last axis first.
        where = points.flip(1)[None, None, None]
        start = F.grid_sample(self.start, where, padding_mode='border', align_corners=False)
        return start.flatten() + 0.3 * d[:, 0], torch.cat([features, hidden], dim=1)

    def __call__(self, points, dirs=None):
        """Returns density (N,) at points (N, 3), and colour (N, 3) where `dirs` asks for it."""
        d, features = self.signed_distance(points)
        s = self.log_s.exp()
        density = s * torch.sigmoid(-s * d)
        if dirs is None:
            return density, None
        return density, self.colour(features)

    def eikonal(self, points, step=1e-2):
        """Averages (|gradient of the distance| - 1)^2 at points (N, 3), by central differences."""
        ends = []
        for axis in torch.eye(3, device=points.device):
            ends += [points + step * axis, points - step * axis]
        distance, _ = self.signed_distance(torch.cat(ends))

        plus, minus = distance.view(3, 2, -1).unbind(1)  # (3, N)
        gradient = (plus - minus) / (2 * step)
        norm = (gradient.square().sum(0) + 1e-12).sqrt()
        return (norm - 1).square().mean()


def fit_surface(views, config, device, seed=0):
    """Fits a Surface to views in `config.fit_steps` steps; returns it and its occupancy grid."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    hull = rh.visual_hull(views, config.grid)
    surface = Surface(hull.numpy(), config.channels, config.resolution).to(device)
    rays = rh.Rays(views, device, margin=6, edges=0.5)
    grid = rh.OccupancyGrid(config.grid, config.steps, device, hull)
    optimizer = torch.optim.Adam(surface.parameters(), betas=(0.9, 0.99))

    for step in range(config.fit_steps):
        if step % 16 == 0:
            cells = None if step < 256 else grid.some_cells(generator)
            grid.update(surface, generator, cells)

        rays_o, rays_d, target = rays.draw(config.rays, generator)
        shift = torch.rand(len(rays_o), generator=generator).to(device)
        rgb = rh.render(surface, rays_o, rays_d, config.steps, grid, shift).rgb
        points = 2 * torch.rand(512, 3, generator=generator).to(device) - 1
        loss = F.mse_loss(rgb, target) + 1e-3 * surface.eikonal(points)

        for group in optimizer.param_groups:
            group['lr'] = 1e-2 * 0.05 ** (step / config.fit_steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return surface, grid
