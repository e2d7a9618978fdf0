"""Avatars as 3D Gaussian splats, for splat viewers: what `sample.py --splats` writes.

Rays from all around find which cells of a lattice are lit; each becomes a Gaussian, with the mean
colour and the density of the samples in it. It is written as .ply in the layout of 3D Gaussian
Splatting (Kerbl et al., 2023) or as .glb with KHR_gaussian_splatting.
"""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import gltf
import rodinhd as rh
import running

CELLS = 160  # along the box
VIEWS = 20  # that look for lit cells
PIXELS = 160  # a side of each
LIT = 0.05  # a cell is lit if a ray gets at least this share of its light there
WIDTH = 0.45  # standard deviation of a Gaussian, in cells
SHARE = 0.5  # of a cell's optical depth that its Gaussian has in the middle: others overlap it
OPAQUE = 0.99
SH_0 = 0.5 / math.sqrt(math.pi)  # the constant spherical harmonic


class Splats(NamedTuple):
    """Round Gaussians of one size."""
    points: np.ndarray  # (N, 3), in the unit cube, Z up
    colours: np.ndarray  # (N, 3), 0..1
    opacity: np.ndarray  # (N,), 0..1
    scale: float  # standard deviation


def cameras(count):
    """Poses (4, 4) of cameras evenly spread over the sphere, those far below left out."""
    poses = []
    for k in range(count):
        height = 0.95 - 1.35 * (k + 0.5) / count  # sine of the elevation
        azimuth = 180 * (3 - math.sqrt(5)) * k
        poses.append(rh.orbit_pose(azimuth, math.degrees(math.asin(height))))
    return poses


@torch.no_grad()
def splats_of(field, grid, cells=CELLS, views=VIEWS):
    """Makes Splats of a field, with the occupancy grid that says where it is dense."""
    device = grid.values.device
    intrinsics = rh.intrinsics_of(rh.PORTRAIT_FOV, PIXELS).to(device)
    sums = torch.zeros(cells**3, 8, device=device)  # of weight, points, colour, density
    lit = torch.zeros(cells**3, dtype=torch.bool, device=device)
    for pose in cameras(views):
        rays_o, rays_d = rh.view_rays(pose.to(device), intrinsics, PIXELS, PIXELS)
        ray, t, points = rh.march(rays_o, rays_d, grid.steps, grid, None, field)
        sigma, rgb = field(points, rays_d[ray])
        delta = rh.step_length(grid.steps)
        weights = rh.composite(sigma, rgb, t, ray, len(rays_o), delta).weights[:, None]

        where = ((points + 1) / 2 * cells).long().clamp(0, cells - 1)
        cell = (where[:, 0] * cells + where[:, 1]) * cells + where[:, 2]
        content = torch.cat([torch.ones_like(weights), points, rgb, sigma[:, None]], dim=1)
        sums.index_add_(0, cell, weights * content)
        lit[cell[weights[:, 0] > LIT]] = True

    means = sums[lit] / sums[lit, :1]
    if not len(means):
        rh.stop('splats: this avatar is empty')
    size = 2 / cells
    opacity = -torch.expm1(-means[:, 7] * size * SHARE)
    return Splats(
        means[:, 1:4].cpu().numpy(),
        means[:, 4:7].clamp(0, 1).cpu().numpy(),
        opacity.clamp(1e-3, OPAQUE).cpu().numpy(),
        WIDTH * size,
    )


FIELDS = (
    *('x', 'y', 'z', 'nx', 'ny', 'nz', 'f_dc_0', 'f_dc_1', 'f_dc_2', 'opacity'),
    *('scale_0', 'scale_1', 'scale_2', 'rot_0', 'rot_1', 'rot_2', 'rot_3'),
)


def write_ply(path, splats):
    """Writes Splats as .ply in the layout of 3D Gaussian Splatting, Z up."""
    count = len(splats.points)
    zeros = np.zeros((count, 3))
    columns = [
        splats.points,
        zeros,  # normals
        (splats.colours - 0.5) / SH_0,
        np.log(splats.opacity / (1 - splats.opacity))[:, None],
        np.full((count, 3), math.log(splats.scale)),
        np.tile([1.0, 0.0, 0.0, 0.0], (count, 1)),  # rotations, w first
    ]
    head = ['ply', 'format binary_little_endian 1.0', f'element vertex {count}']
    head += [f'property float {name}' for name in FIELDS]
    text = '\n'.join([*head, 'end_header', ''])
    with running.atomic(path) as temporary:
        temporary.write_bytes(text.encode() + np.hstack(columns).astype('<f4').tobytes())


def write_glb(path, splats):
    """Writes Splats as glTF with KHR_gaussian_splatting, Y up."""
    count = len(splats.points)
    x, y, z = splats.points.T
    content = {
        'ROTATION': np.tile([0.0, 0.0, 0.0, 1.0], (count, 1)),  # w last
        'SCALE': np.full((count, 3), splats.scale),
        'OPACITY': splats.opacity.astype(np.float32),
        'SH_DEGREE_0_COEF_0': (splats.colours - 0.5) / SH_0,
    }
    attributes = {
        'POSITION': np.stack([x, z, -y], axis=1),
        'COLOR_0': gltf.linear(splats.colours),  # for programs that show points
    }
    for name, array in content.items():
        attributes[f'{gltf.SPLATS}:{name}'] = array
    gltf.write(path, gltf.of_splats(attributes))


def write_splats(path, splats):
    """Writes Splats as .ply or .glb; returns the paths of what was written."""
    path = Path(path)
    write = write_glb if path.suffix.lower() == '.glb' else write_ply
    write(path, splats)
    return [path]
