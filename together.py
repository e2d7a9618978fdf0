"""Fits the planes of many avatars at once, where a GPU would wait for one alone.

`fit.py --together 64` uses it. What is fitted is what rodinhd.fit_avatar fits under a frozen
decoder, with the same losses, learning rates and sizes; each avatar has rays and moments of its
own, and none sees another. A step of small planes is some hundred kernels, and takes a GPU as long
for 64 avatars as for one.

All avatars' planes are one table, and whatever belongs to one of them, a ray or a sample, carries
the avatar's number, its owner. Samples are those in cells that may not be empty: a grid of all
avatars takes the place of an OccupancyGrid for each.
"""
import torch
import torch.nn.functional as F

import rodinhd as rh


class Fields:
    """The radiance fields of B avatars: planes (B, 3, C, R, R) read by one decoder.

    It is called with points (N, 3), their owners (N,), integers below B, and unit directions
    (N, 3), or None, and returns what a PlaneField does.
    """
    def __init__(self, planes, decoder):
        self.decoder = decoder
        self.size = planes.shape[-1]
        self.table = planes.permute(0, 1, 3, 4, 2).flatten(0, 3)  # (B 3 R R, C)

    def __call__(self, points, owner, dirs=None):
        index, weight = rh.rows_of(points, self.size)
        index = index + (owner * (len(rh.AXES) * self.size ** 2)).int()[:, None]
        table = self.table
        if dirs is None:
            table = table[:, -self.decoder.density_channels:].contiguous()
        return self.decoder(rh.RowSum.apply(table, index, weight), dirs)


class RaysOfMany:
    """Random training rays of B avatars: what each of their rodinhd.Rays draws, n each."""
    def __init__(self, rays, device):
        def joined(parts, device=device):
            return torch.cat(parts).to(device)

        def numbers(values):
            return torch.tensor(values, device=device)

        near = [torch.arange(len(x.pixels)) if x.near is None else x.near.cpu() for x in rays]
        edge = [torch.zeros(0) if x.edge is None else x.edge.cpu() for x in rays]
        self.pixels = joined([x.pixels.cpu() for x in rays])
        self.near = joined(near)
        self.edge = joined(edge).int()
        self.c2w = joined([x.c2w.cpu() for x in rays])
        self.intrinsics = joined([x.intrinsics.cpu() for x in rays])

        # Where each avatar's part of these begins, and how long it is
        self.counts = numbers([len(x) for x in near])
        self.edges = numbers([len(x) for x in edge])
        self.views = numbers([len(x.c2w) for x in rays])
        self.height = numbers([x.height for x in rays])
        self.width = numbers([x.width for x in rays])
        self.share = max(x.edges for x in rays)  # of the rays that are of pixels at an edge

    def draw(self, n, generator):
        """The owners (B n,) of rays, rays_o and rays_d (B n, 3), and the colours (B n, 3) on white
        that they should have."""
        B = len(self.counts)
        device = self.pixels.device
        begin = self.counts.cumsum(0) - self.counts
        place = torch.rand(B, n, dtype=torch.float64, generator=generator, device=device)
        pick = (place * self.counts[:, None]).long()
        at_edge = int(self.share * n)
        if at_edge and len(self.edge):
            first = (self.edges.cumsum(0) - self.edges)[:, None]
            among = first + (place[:, :at_edge] * self.edges[:, None]).long()
            has_edge = self.edges[:, None] > 0
            of_edge = self.edge[among.clamp(max=len(self.edge) - 1)].long()
            pick[:, :at_edge] = torch.where(has_edge, of_edge, pick[:, :at_edge])
        pick = (pick + begin[:, None]).flatten()
        owner = torch.arange(B, device=device).repeat_interleave(n)

        flat = self.near[pick].long()
        width = self.width[owner]
        area = width * self.height[owner]
        view = flat // area + (self.views.cumsum(0) - self.views)[owner]
        rays_o, rays_d = rh.pixel_rays(
            self.c2w[view], self.intrinsics[view], flat % width, flat // width % self.height[owner]
        )
        return owner, rays_o, rays_d, rh.on_white(self.pixels[pick])


class Cells:
    """Which cells of B avatars' boxes may hold something: a rodinhd.OccupancyGrid of each."""
    def __init__(self, hulls, config, device):
        G = config.grid
        full = torch.ones(G, G, G, dtype=torch.bool)
        hulls = torch.stack([full if hull is None else hull for hull in hulls]).to(device)
        self.B = len(hulls)
        self.G = G
        self.threshold = 10 * config.steps / 1024
        self.hull = hulls.flatten()  # (B G^3,)
        self.inside = self.hull.nonzero()[:, 0]  # flat numbers of the cells in hulls
        self.owner = self.inside // G ** 3
        self.values = torch.full((len(self.inside),), self.threshold, device=device)
        self.occupied = self.hull

    def number(self, points, owner):
        """Flat numbers of the cells of points (..., 3) in the boxes of their owners (...)."""
        x, y, z = ((points + 1) * (self.G / 2)).long().clamp(0, self.G - 1).unbind(-1)
        return ((owner * self.G + x) * self.G + y) * self.G + z

    def random_points(self, cells, generator):
        """A random point (N, 3) in each of cells (N,), flat numbers."""
        G = self.G
        corner = torch.stack([cells // (G * G) % G, cells // G % G, cells % G], dim=-1)
        jitter = torch.rand(len(cells), 3, generator=generator, device=cells.device)
        return (corner + jitter) * (2 / G) - 1

    @torch.no_grad()
    def update(self, fields, generator):
        """value <- max(0.95 value, sigma at a random point), as OccupancyGrid.update has it."""
        points = self.random_points(self.inside, generator)
        parts = zip(points.split(2 ** 20), self.owner.split(2 ** 20), strict=True)
        sigma = torch.cat([fields(*part)[0] for part in parts])
        self.values = torch.maximum(0.95 * self.values, sigma)

        # Each avatar's mean, for fields that are still thin everywhere
        total = self.values.new_zeros(self.B).index_add_(0, self.owner, self.values)
        least = (total / self.G ** 3).clamp(max=0.999 * self.threshold)
        self.occupied = torch.zeros_like(self.hull)
        self.occupied[self.inside] = self.values > least[self.owner]

    def grids(self, config):
        """An OccupancyGrid for each avatar."""
        values = torch.full(self.hull.shape, -1.0, device=self.hull.device)
        values[self.inside] = self.values
        grids = []
        for part, hull in zip(values.chunk(self.B), self.hull.chunk(self.B), strict=True):
            shape = (self.G, self.G, self.G)
            grid = rh.OccupancyGrid(self.G, config.steps, values.device, hull.view(shape))
            grid.values = part.view(shape)
            grid.refresh()
            grids.append(grid)
        return grids


@torch.no_grad()
def march(fields, cells, owner, rays_o, rays_d, steps, offset):
    """Samples of rays in cells that may hold something, or with cells None in all, of which light
    reaches all that are returned: rodinhd.march for rays (N, 3) of many owners (N,)."""
    lattice = rh.lattice_of(rays_o, rays_d, steps, offset)
    k = torch.arange(steps + 1, device=rays_o.device)
    t = lattice.start[:, None] + k * lattice.delta
    points = (rays_o[:, None] + t[..., None] * rays_d[:, None]).clamp(-1, 1)  # (N, K, 3)
    keep = k < lattice.count[:, None]
    if cells is not None:
        keep = keep & cells.occupied[cells.number(points, owner[:, None])]
    kept = keep.view(-1).nonzero()[:, 0]
    ray = kept // len(k)
    points = points.view(-1, 3)[kept]
    tau = fields(points, owner[ray])[0] * lattice.delta
    T = rh.transmittance(tau, ray, len(rays_o))
    lit = ((T >= rh.T_MIN) & (T * tau >= rh.W_MIN)).nonzero()[:, 0]
    return rh.Samples(ray[lit], t.view(-1)[kept[lit]], points[lit])


def render(fields, cells, owner, rays_o, rays_d, steps, offset, background=1.0):
    """rodinhd.render for rays (N, 3) of many owners (N,)."""
    ray, t, points = march(fields, cells, owner, rays_o, rays_d, steps, offset)
    sigma, rgb = fields(points, owner[ray], rays_d[ray])
    delta = rh.step_length(steps)
    return rh.composite(sigma, rgb, t, ray, len(rays_o), delta, background)


def losses_of_rays(fields, rays, cells, config, generator):
    """rodinhd.ray_losses, as the sum over avatars."""
    owner, rays_o, rays_d, target = rays.draw(config.rays, generator)
    offset = torch.rand(len(rays_o), generator=generator, device=owner.device)
    rendered = render(fields, cells, owner, rays_o, rays_d, config.steps, offset)
    B = len(rays.counts)
    terms = {'rgb': B * F.mse_loss(rendered.rgb, target)}
    if config.weight_distortion:
        spread = rh.distortion(
            rendered.weights, rendered.t, rendered.ray_index, len(rays_o), config.steps
        )
        terms['distortion'] = B * config.weight_distortion * spread
    return terms


def regularisers(planes, fields, cells, config, generator):
    """rodinhd.regularisers of planes (B, 3, C, R, R), as the sum over avatars."""
    B = len(planes)
    every = B * config.regulariser_every
    terms = {
        'tv': every * config.weight_tv * rh.total_variation(planes),
        'l2': every * config.weight_l2 * len(rh.AXES) * planes.square().mean(),
    }
    device = planes.device
    owner = torch.arange(B, device=device)
    if config.weight_empty:
        of_avatars = owner.repeat_interleave(4096)
        count = config.grid ** 3
        cell = torch.randint(count, (B * 4096,), generator=generator, device=device)
        cell = cell + count * of_avatars
        sigma = fields(cells.random_points(cell, generator), of_avatars)[0]
        excess = torch.log(sigma.clamp(min=rh.EMPTY) / rh.EMPTY)
        terms['empty'] = every * config.weight_empty * (excess * ~cells.hull[cell]).mean()
    if config.weight_sparse or config.weight_smooth:
        of_avatars = owner.repeat_interleave(1000).repeat(2)  # points, and those beside them
        points = 2 * torch.rand(B * 1000, 3, generator=generator, device=device) - 1
        found = rh.density_losses(lambda x: fields(x, of_avatars), points, generator)
        for name, term in found.items():
            terms[name] = every * getattr(config, f'weight_{name}') * term
    return terms


def fit(avatars, start, decoder, config, steps, *, seed=0, report=None):
    """Fits planes of many avatars under a frozen decoder -> a rodinhd.Visit of each.

    avatars: what rodinhd.prepare made of each one's Views. start: planes (3, C, r, r) of any size,
    or (B, 3, C, r, r). report: called with the share done and the terms of the loss, now and then.
    """
    device = next(decoder.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    sizes = torch.Generator().manual_seed(seed)  # of what the host has to know
    rays = RaysOfMany([x.rays for x in avatars], device)
    cells = Cells([x.hull for x in avatars], config, device)
    finite = rh.Finite('fit')
    table = None

    for step, done in enumerate(rh.by_steps(steps)):
        # At the first step, and where the planes double: a new table, and an optimizer for it
        size = rh.size_of_planes(done, config)
        if table is None or table.shape[2] != size:
            if table is None:
                source = start.to(device).float().expand(len(avatars), *start.shape[-4:])
            else:
                source = table.detach().permute(0, 1, 4, 2, 3)
            source = rh.resize_planes(source, size)
            table = source.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format)
            table.requires_grad_()
            optimizer = torch.optim.Adam([table], betas=(0.9, 0.99), fused=True)
        planes = table.permute(0, 1, 4, 2, 3)  # (B, 3, C, R, R)
        optimizer.param_groups[0]['lr'] = config.lr_planes * config.planes_final_lr ** done

        if step % 16 == 0:
            cells.update(Fields(planes.detach(), decoder), generator)
        rescaled = torch.rand((), generator=sizes) < config.rescale
        lower = int(torch.randint(size // 4, size, (), generator=sizes))
        seen = rh.resize_planes(planes, lower) if rescaled else planes

        fields = Fields(seen, decoder)
        terms = losses_of_rays(fields, rays, cells, config, generator)
        if step % config.regulariser_every == 0:
            fields = Fields(planes, decoder)
            terms |= regularisers(planes, fields, cells, config, generator)
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        finite.step(optimizer, loss, table.grad)
        table.data.clamp_(-1, 1)
        if report and step % 50 == 0:
            report(done, {name: term.item() / len(avatars) for name, term in terms.items()})

    finite.look()
    planes = table.detach().permute(0, 1, 4, 2, 3)
    return [rh.Visit(*both, None) for both in zip(planes, cells.grids(config), strict=True)]
