"""Finished avatars, drawn in about a third of the time that rodinhd.render_view takes.

A field that does not change any more is prepared once, a Frozen, and `render_view` draws it from
any side. The picture is that of rh.render_view: the same samples of the same lattice, and the same
numbers but for rounding. docs/speed.md has the figures.

What is done otherwise, and why that is faster:

    Decoder    it is folded (rh.Folded); what depends on the direction alone is computed once a
               ray; what the density found serves the colour
    look-up    the weights of the 12 texels of a point are a matrix product, too
    marching   rays are narrowed to the box of what is occupied; each round looks at one more
               block of 4 lattice points of every ray that has light left, and adds its colour
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import rodinhd as rh

RAYS = 2**16  # that are marched together,
PIECE = 2**13  # and whose next blocks are evaluated together: what these need stays in the cache
BLOCK = 4  # lattice points that are tested against the grid in one go


# 1 The decoder and the planes ---------------------------------------------------------------------
def corner_weights():
    """A matrix (7, 12) that makes 1, x, y, z, xy, xz, yz, shares of a texel, the weights of the
    four texels around a point on each plane: (1 - u)(1 - v), u (1 - v), (1 - u) v, u v."""
    products = {(0, 1): 4, (0, 2): 5, (1, 2): 6}
    matrix = torch.zeros(7, 4 * len(rh.AXES))
    for plane, (u, v) in enumerate(rh.AXES):
        both = products[u, v]
        of_plane = matrix[:, 4 * plane:]
        of_plane[[0, 1 + u, 1 + v, both], 0] = torch.tensor([1.0, -1.0, -1.0, 1.0])
        of_plane[[1 + u, both], 1] = torch.tensor([1.0, -1.0])
        of_plane[[1 + v, both], 2] = torch.tensor([1.0, -1.0])
        of_plane[both, 3] = 1.0
    return matrix / rh.PLANE_DIVISOR


def softplus_in_place(x):
    """log(1 + exp(x)) of x below 80."""
    return x.exp_().add_(1).log_()


class Frozen(rh.PlaneField):
    """The radiance field of a finished avatar, planes (3, C, R, R) read by a decoder, in the
    occupied cells of a grid.

    It is an rh.PlaneField. `density`, `of_rays` and `colour` are its decoder in three parts.
    """
    @torch.no_grad()
    def __init__(self, planes, decoder, grid):
        super().__init__(planes.detach().float(), decoder)
        self.grid = grid
        self.room = room_of(grid) if grid.occupied.any() else None
        self.R = planes.shape[-1]
        self.D = decoder.density_channels
        table = self.planes[:, :-self.D].permute(0, 2, 3, 1)  # of colour
        self.table = table.reshape(-1, planes.shape[1] - self.D).contiguous()
        self.density_planes = self.density_planes.contiguous()  # there will be many look-ups
        corners = torch.tensor([0, 1, self.R, self.R + 1], dtype=torch.int32)
        self.corners = corners.to(planes.device)
        self.axes = torch.tensor(rh.AXES, device=planes.device).view(-1)
        self.corner_weights = corner_weights().to(planes.device)

        # Where the density net is known to stay below 80, whose exp is finite
        self.folded = rh.Folded(decoder)
        largest = self.density_planes.abs().amax().clamp(min=1)
        bound = self.folded.density.abs().sum(1) * largest + self.folded.density_bias.abs()
        self.softplus = softplus_in_place if bound.amax() < 80 else rh.softplus

    def density(self, x):
        """Density (N,) at points x (3, N) in the box, and what `colour` needs of them, (N, W)."""
        uv = x.index_select(0, self.axes).view(3, 2, -1).transpose(1, 2)  # (3, N, 2)
        on_planes = F.grid_sample(self.density_planes, uv[:, None], align_corners=True)
        rows = rh.encoded_rows(on_planes[:, :, 0].sum(0) / rh.PLANE_DIVISOR)
        folded = self.folded
        hidden = torch.addmm(folded.density_bias, rows.T, folded.density.T)  # (N, W)
        hidden = self.softplus(hidden)
        return (hidden @ folded.sigma).add_(folded.sigma_bias).exp_(), hidden

    def of_rays(self, rays_d):
        """What `colour` needs of rays of directions (N, 3), (N, W)."""
        rows = rh.encoded_rows(rays_d.T)
        return torch.addmm(self.folded.colour_bias, rows.T, self.folded.direction.T)

    def colour(self, x, hidden, of_ray):
        """Colour (N, 3) at points x (3, N), with what `density` gave of each, (N, W), and
        `of_rays` (N, W), which is written over."""
        rows = rh.encoded_rows(self.colour_features(x).T)
        layer = of_ray.addmm_(hidden, self.folded.geometry.T)
        layer = layer.addmm_(rows.T, self.folded.colour.T)
        for weight in self.folded.others:
            layer = layer.relu_() @ weight.T
        return layer.sigmoid_()

    def colour_features(self, x):
        """Features (N, C') of colour at points x (3, N): rh.sample_planes."""
        if not x.is_cpu:  # whose matrix products may round to TF32
            table = self.table.view(len(rh.AXES), self.R, self.R, -1)
            return rh.sample_planes(table.permute(0, 3, 1, 2), x.T)

        R = self.R
        texels = (x + 1) * (0.5 * (R - 1))
        below = texels.floor().clamp_(max=R - 2)
        share = texels - below
        below = below.int()
        first = [
            below[u] + R * below[v] + plane * R * R for plane, (u, v) in enumerate(rh.AXES)
        ]
        index = torch.stack(first, dim=1)[..., None] + self.corners  # (N, 3, 4)

        rows = x.new_empty(7, x.shape[1])
        rows[0] = 1
        rows[1:4] = share
        for row, (u, v) in zip(rows[4:], rh.AXES, strict=True):
            torch.mul(share[u], share[v], out=row)
        weight = rows.T @ self.corner_weights  # (N, 12)
        return F.embedding_bag(
            index.view(weight.shape), self.table, per_sample_weights=weight, mode='sum'
        )


def freeze(planes, decoder, threshold=rh.EMPTY):
    """Makes planes (3, C, R, R) a Frozen, with the grid of what is denser than `threshold`."""
    grid = rh.grid_for(
        rh.PlaneField(planes, decoder), decoder.config, planes.device, threshold
    )
    return Frozen(planes, decoder, grid)


# 2 Marching ---------------------------------------------------------------------------------------
class Room(NamedTuple):
    """Where there is something to see, of an occupancy grid."""
    lower: torch.Tensor  # (3,), corners of the box around all occupied cells
    upper: torch.Tensor
    occupied: torch.Tensor  # (G + 1, G + 1, G + 1) bool; the last cells are there twice,
    near: torch.Tensor  # as points on the box's upper faces ask for; widened by half a block
    half: float  # G / 2, cells in a unit of the box


class Blocks(NamedTuple):
    """Blocks of lattice points that may hold samples, sorted by ray and along it."""
    first: torch.Tensor  # (K,), their first points
    begin: torch.Tensor  # (N,), where the blocks of each ray begin among the K,
    count: torch.Tensor  # (N,), and how many it has
    end: torch.Tensor  # (N,), the first lattice point behind all that is occupied


def room_of(grid):
    """The Room of an occupancy grid that is not empty."""
    G = grid.G
    lower, upper = [], []
    for axis in range(3):
        others = [k for k in range(3) if k != axis]
        slices = grid.occupied.any(dim=others[1]).any(dim=others[0]).nonzero()[:, 0]
        lower.append(slices[0] * (2 / G) - 1)
        upper.append((slices[-1] + 1) * (2 / G) - 1)

    half_block = BLOCK / 2 * rh.step_length(grid.steps) * G / 2  # in cells
    near = rh.widened(grid.occupied, math.ceil(half_block + 1e-6))
    last_twice = torch.arange(G + 1, device=near.device).clamp(max=G - 1)
    occupied, near = (
        cells[last_twice][:, last_twice][:, :, last_twice] for cells in (grid.occupied, near)
    )
    return Room(torch.stack(lower), torch.stack(upper), occupied, near, G / 2)


def points_at(origin, d, t):
    """Points at distances t (N, n) from `origin`, a list of 3, in directions d, three of (N,), as
    x, y and z (N, n), in the box."""
    axes = zip(origin, d, strict=True)
    return [(t * along[:, None]).add_(o).clamp_(-1, 1) for o, along in axes]


def cells_at(room, points):
    """Flat indices (N, n) of cells of a Room that points are in; see rh.OccupancyGrid.cell."""
    flat = 0
    for axis in points:
        flat = axis.add(1).mul_(room.half).int().add_(flat, alpha=len(room.occupied))
    return flat.long()


def narrowed(lattice, room):
    """Which lattice points (N,), (N,) of each ray may be in the box of what is occupied: the
    first of them, and the first behind them."""
    rays_d = torch.where(lattice.rays_d.abs() < 1e-9, 1e-9, lattice.rays_d)
    t0 = (room.lower - lattice.rays_o) / rays_d
    t1 = (room.upper - lattice.rays_o) / rays_d
    enter = torch.minimum(t0, t1).amax(-1)
    leave = torch.maximum(t0, t1).amin(-1)
    begin = ((enter - lattice.start) / lattice.delta - 1e-3).ceil().clamp(min=0)
    end = ((leave - lattice.start) / lattice.delta + 1e-3).floor() + 1
    return begin, torch.minimum(end, lattice.count)


def blocks_of(lattice, room, origin, d):
    """The Blocks of the rays of a lattice; see rh.occupied_blocks."""
    begin, all_ends = narrowed(lattice, room)
    end = all_ends
    ray = (begin < end).nonzero()[:, 0]
    begin, end = begin.take(ray), end.take(ray)
    most = int((end - begin).amax()) if len(ray) else 0
    k = begin[:, None] + torch.arange(0, most, BLOCK, device=begin.device)
    middle = (k + (BLOCK - 1) / 2).mul_(lattice.delta).add_(lattice.start.take(ray)[:, None])
    cell = cells_at(room, points_at(origin, [along.take(ray) for along in d], middle))
    keep = room.near.take(cell) & (k < end[:, None])
    count = torch.zeros(len(lattice.start), dtype=torch.long, device=ray.device)
    count[ray] = keep.sum(1)
    return Blocks(k[keep], count.cumsum(0) - count, count, all_ends)


def light_before(tau, depth):
    """The share of the light that reaches points of optical depths tau (N, n), behind `depth`
    (N,) on their rays."""
    tau = tau.clamp(max=64)
    return (tau - tau.cumsum(1)).sub_(depth[:, None]).exp_()


def march(field, lattice):
    """Draws the rays of a camera, a lattice (N,), through a Frozen -> colours (N, 3) on white,
    opacity (N,)."""
    room = field.room
    N = len(lattice.start)
    origin = lattice.rays_o[0].tolist()
    d = lattice.rays_d.T.contiguous()
    blocks = blocks_of(lattice, room, origin, d)
    rgb = lattice.start.new_zeros(N, 3)
    opacity = lattice.start.new_zeros(N)
    depth = lattice.start.new_zeros(N)  # optical, of all that was looked at
    ray = (blocks.count > 0).nonzero()[:, 0]
    of_rays = lattice.start.new_empty(N, len(field.folded.colour_bias))
    of_rays[ray] = field.of_rays(lattice.rays_d[ray])
    in_block = torch.arange(BLOCK, device=ray.device)

    turn = 0
    while len(ray):
        for part in ray.split(PIECE if ray.is_cpu else len(ray)):
            first = blocks.first.take(blocks.begin.take(part) + turn)
            k = first[:, None] + in_block  # (n, 4)
            t = (k * lattice.delta).add_(lattice.start.take(part)[:, None])
            axes = points_at(origin, [along.take(part) for along in d], t)
            inside = room.occupied.take(cells_at(room, axes)) & (k < blocks.end.take(part)[:, None])
            place = inside.view(-1).nonzero()[:, 0]  # of samples among these points
            if not len(place):
                continue
            points = torch.stack([axis.take(place) for axis in axes])  # (3, S)

            sigma, hidden = field.density(points)
            tau = torch.zeros_like(t)
            tau.view(-1).scatter_(0, place, sigma.mul_(lattice.delta))
            T = light_before(tau, depth.take(part))
            depth.index_add_(0, part, tau.sum(1))

            # The samples that light reaches, as in rh.lit_samples
            T = T.take(place)
            tau = tau.take(place)
            lit = ((T >= rh.T_MIN) & (T * tau >= rh.W_MIN)).nonzero()[:, 0]
            row = part.take(place.take(lit) // BLOCK)
            weight = T.take(lit) * -torch.expm1(-tau.take(lit))
            colour = field.colour(
                points.index_select(1, lit),
                hidden.index_select(0, lit),
                of_rays.index_select(0, row),
            )
            opacity.index_add_(0, row, weight)
            rgb.index_add_(0, row, colour.mul_(weight[:, None]))

        turn += 1
        left = (blocks.count.take(ray) > turn) & (depth.take(ray) < -math.log(rh.T_MIN))
        ray = ray[left]
    return rgb + (1 - opacity[:, None]), opacity


@torch.no_grad()
def render_view(field, c2w, intrinsics, height, width):
    """A Picture of a Frozen from a camera (4, 4), (4,): rh.render_view, faster."""
    rays_o, rays_d = rh.view_rays(c2w, intrinsics, height, width)
    rgb, opacity = [], []
    for o, d in zip(rays_o.split(RAYS), rays_d.split(RAYS), strict=True):
        if field.room is None:  # nothing is there
            rgb.append(torch.ones_like(d))
            opacity.append(torch.zeros_like(d[:, 0]))
            continue
        lattice = rh.lattice_of(o, d, field.grid.steps)
        part = march(field, lattice)
        rgb.append(part[0])
        opacity.append(part[1])
    rgb = torch.cat(rgb).view(height, width, 3).clamp(0, 1)
    return rh.Picture(rgb, torch.cat(opacity).view(height, width))
