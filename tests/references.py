"""Plain forms of what rodinhd.py does in a faster way: tests compare the numbers, bench.py the time."""
import torch
import torch.nn.functional as F

import rodinhd as rh


def grid_sample_planes(planes, points):
    """sample_planes with PyTorch's own bilinear sampling: planes (3, C, R, R), points (N, 3) -> (N, C)."""
    where = torch.stack([points[:, axes] for axes in ([0, 1], [0, 2], [1, 2])])         # (3, N, 2) as (width, height)
    return F.grid_sample(planes, where[:, None], align_corners=True)[:, :, 0].mean(0).T


def naive_aware_conv(x, conv):
    """The 3D-aware convolution as Rodin draws it: for each plane, its own map and the two others' means, concatenated."""
    xy, xz, yz = x.chunk(3, dim=3)                                      # (.., height, width): xy[.., y, x], xz[.., z, x], yz[.., z, y]
    H = xy.shape[2]
    along_width = lambda v: v[:, :, None, :].expand(-1, -1, H, -1)
    along_height = lambda v: v[:, :, :, None].expand(-1, -1, -1, H)
    inputs = [torch.cat([xy, along_width(xz.mean(2)), along_height(yz.mean(2))], 1),           # f(x) of xz, f(y) of yz
              torch.cat([along_width(xy.mean(2)), xz, along_height(yz.mean(3))], 1),           # f(x) of xy, f(z) of yz
              torch.cat([along_width(xy.mean(3)), along_height(xz.mean(3)), yz], 1)]           # f(y) of xy, f(z) of xz
    return torch.cat([F.conv2d(i, c.weight, c.bias, padding=1) for i, c in zip(inputs, conv.convs)], dim=3)


def dense_render(planes, decoder, rays_o, rays_d, samples):
    """Rays (N, 3) -> rgb (N, 3): as many samples on every ray that meets the box, none skipped, looked up with grid_sample."""
    near, far = rh.intersect_box(rays_o, rays_d)
    near, far = near.clamp(max=far)[:, None], far[:, None]
    t = near + (far - near) * (torch.arange(samples, device=near.device) / samples)                # (N, S)
    points = (rays_o[:, None] + t[..., None] * rays_d[:, None]).view(-1, 3)
    sigma, rgb = decoder(grid_sample_planes(planes, points), rays_d[:, None].expand(-1, samples, 3).reshape(-1, 3))
    tau = sigma.view_as(t) * (far - near) / samples
    weights = torch.exp(tau - tau.cumsum(1)) * -torch.expm1(-tau)
    return (weights[..., None] * rgb.view(*t.shape, 3)).sum(1) + 1 - weights.sum(1, keepdim=True)
