"""Plain forms of what rodinhd.py does in a faster way: tests compare the numbers, bench.py the
time."""
import torch
import torch.nn.functional as F

import rodinhd as rh


def grid_sample_planes(planes, points):
    """sample_planes with PyTorch's own bilinear sampling.

    Takes planes (3, C, R, R) and points (N, 3) in the box, and returns (N, C).
    """
    uv = torch.stack([points[:, axes] for axes in ([0, 1], [0, 2], [1, 2])])  # (3, N, 2)
    features = F.grid_sample(planes, uv[:, None], align_corners=True)  # (3, C, 1, N)
    return features[:, :, 0].mean(0).T


def naive_aware_conv(x, conv):
    """The 3D-aware convolution as Rodin draws it.

    Each plane sees its own map, concatenated with the two others' means. Planes are rolled out in
    x: xy[..., y, x], xz[..., z, x] and yz[..., z, y] side by side.
    """
    xy, xz, yz = x.chunk(3, dim=3)
    H = xy.shape[2]

    def along_width(mean):
        return mean[:, :, None, :].expand(-1, -1, H, -1)

    def along_height(mean):
        return mean[:, :, :, None].expand(-1, -1, -1, H)

    inputs = [
        # f(x) of xz, f(y) of yz
        torch.cat([xy, along_width(xz.mean(2)), along_height(yz.mean(2))], dim=1),
        # f(x) of xy, f(z) of yz
        torch.cat([along_width(xy.mean(2)), xz, along_height(yz.mean(3))], dim=1),
        # f(y) of xy, f(z) of xz
        torch.cat([along_width(xy.mean(3)), along_height(xz.mean(3)), yz], dim=1),
    ]
    outputs = [
        F.conv2d(seen, own.weight, own.bias, padding=1)
        for seen, own in zip(inputs, conv.convs, strict=True)
    ]
    return torch.cat(outputs, dim=3)


def dense_render(planes, decoder, rays_o, rays_d, samples):
    """Colours (N, 3) of rays (N, 3), with as many samples on every ray that meets the box.

    None is skipped, and planes are looked up with grid_sample.
    """
    near, far = rh.intersect_box(rays_o, rays_d)
    near = near.clamp(max=far)[:, None]
    far = far[:, None]
    t = near + (far - near) * (torch.arange(samples, device=near.device) / samples)  # (N, S)

    points = (rays_o[:, None] + t[..., None] * rays_d[:, None]).view(-1, 3)
    dirs = rays_d[:, None].expand(-1, samples, 3).reshape(-1, 3)
    sigma, rgb = decoder(grid_sample_planes(planes, points), dirs)

    tau = sigma.view_as(t) * (far - near) / samples
    weights = torch.exp(tau - tau.cumsum(1)) * -torch.expm1(-tau)
    pixels = (weights[..., None] * rgb.view(*t.shape, 3)).sum(1)
    return pixels + 1 - weights.sum(1, keepdim=True)


def ngp_render(planes, decoder, rays_o, rays_d, samples):
    """The same as torch-ngp goes about it where its CUDA extensions are not used: the density of
    every sample, and the colours of those whose weight is above 1e-4.

    It is written anew, after what that path does; none of its code is here.
    """
    near, far = rh.intersect_box(rays_o, rays_d)
    near = near.clamp(max=far)[:, None]
    far = far[:, None]
    t = near + (far - near) * (torch.arange(samples, device=near.device) / samples)  # (N, S)
    points = (rays_o[:, None] + t[..., None] * rays_d[:, None]).clamp(-1, 1).view(-1, 3)

    density_planes = planes[:, -decoder.density_channels:]
    sigma, _ = decoder(grid_sample_planes(density_planes, points))
    tau = sigma.view_as(t) * (far - near) / samples
    alpha = -torch.expm1(-tau)
    passed = torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-15], dim=1)
    weights = alpha * passed.cumprod(1)[:, :-1]

    seen = weights.view(-1) > 1e-4
    dirs = rays_d[:, None].expand(-1, samples, 3).reshape(-1, 3)
    rgb = planes.new_zeros(len(points), 3)
    rgb[seen] = decoder(grid_sample_planes(planes, points[seen]), dirs[seen])[1]
    pixels = (weights[..., None] * rgb.view(*t.shape, 3)).sum(1)
    return pixels + 1 - weights.sum(1, keepdim=True)
