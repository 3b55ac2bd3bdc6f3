"""Displacement between two pictures by Lucas and Kanade's least squares, from coarse to fine: nothing to learn.

A small network learns matching late and to a pixel at best, and pose is read off displacements; on rendered pairs with
five pixels of motion this is within a third of a pixel at half of all places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# (pixels of the picture a cell, rounds): a cell is at most a few cells away from where the level above said.
PYRAMID = ((8, 4), (4, 3), (2, 2), (1, 2))
WINDOW, SMOOTH = 4, 2  # reach in cells of the least squares' Gaussian window and of the smoothing between levels
DAMPING, FLAT = 0.02, 1e-4  # of the window's own gradients, and of a window without any
MAX_STEP = 1.5  # cells a round


def displacement(
    first: Float[Tensor, "N 3 H W"], second: Float[Tensor, "N 3 H W"]
) -> tuple[Float[Tensor, "N 2 H W"], Float[Tensor, "N H W"]]:
    """Where each pixel of the first picture lies in the second, minus where it is: (x, y) in pixels; and how much the
    two then differ there (mean absolute difference). Values in [0, 1]. Sides are multiples of 8.

    The gradient is that of the last round: where a round no longer changes anything, how its answer changes with the
    pictures is how the place itself does.
    """
    with torch.no_grad():
        flow = first.new_zeros(len(first), 2, *(side // PYRAMID[0][0] for side in first.shape[-2:]))
        for cell, rounds in PYRAMID:
            one, two = (F.avg_pool2d(picture, cell) for picture in (first, second))
            if flow.shape[-1] != one.shape[-1]:
                ratio = one.shape[-1] / flow.shape[-1]
                flow = ratio * F.interpolate(flow, size=one.shape[-2:], mode="bilinear", align_corners=False)
            slope = _gradient(one)
            for _ in range(rounds if cell > 1 else rounds - 1):
                flow = flow + _step(one, slope, two, flow)
            flow = _blur(flow, SMOOTH) if cell > 1 else flow
    flow = _blur(flow + _step(first, _gradient(first), second, flow), SMOOTH)
    return flow, (first - _warp(second, flow)).abs().mean(1)


def _step(
    first: Float[Tensor, "N 3 H W"],
    slope: tuple[Tensor, Tensor],
    second: Float[Tensor, "N 3 H W"],
    flow: Float[Tensor, "N 2 H W"],
) -> Float[Tensor, "N 2 H W"]:
    """One round of least squares: what is to be added to `flow`. `slope`: that of the first picture (`_gradient`)."""
    moved = _warp(second, flow)
    gx, gy = ((a + b) / 2 for a, b in zip(slope, _gradient(moved), strict=True))
    miss = first - moved
    sums = torch.stack([(a * b).sum(1) for a, b in ((gx, gx), (gx, gy), (gy, gy), (gx, miss), (gy, miss))], 1)
    xx, xy, yy, bx, by = _blur(sums, WINDOW).unbind(1)
    damping = FLAT + DAMPING * (xx + yy)
    xx, yy = xx + damping, yy + damping
    step = torch.stack([yy * bx - xy * by, xx * by - xy * bx], 1) / (xx * yy - xy * xy)[:, None]
    return step.clamp(-MAX_STEP, MAX_STEP)


def _blur(maps: Float[Tensor, "N C H W"], reach: int) -> Float[Tensor, "N C H W"]:
    """Gaussian of standard deviation reach / 2."""
    offset = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(offset**2) / (2 * (reach / 2) ** 2))
    kernel = (kernel / kernel.sum()).expand(maps.shape[1], 1, 1, -1)
    maps = F.conv2d(F.pad(maps, (reach, reach, 0, 0), mode="replicate"), kernel, groups=maps.shape[1])
    kernel = kernel.transpose(-1, -2)
    return F.conv2d(F.pad(maps, (0, 0, reach, reach), mode="replicate"), kernel, groups=maps.shape[1])


def _warp(picture: Float[Tensor, "N C H W"], flow: Float[Tensor, "N 2 H W"]) -> Float[Tensor, "N C H W"]:
    height, width = picture.shape[-2:]
    v = torch.arange(height, device=flow.device)[:, None] + 0.5 + flow[:, 1]
    u = torch.arange(width, device=flow.device)[None, :] + 0.5 + flow[:, 0]
    grid = torch.stack([u * 2 / width - 1, v * 2 / height - 1], -1)
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _gradient(picture: Float[Tensor, "N C H W"]) -> tuple[Tensor, Tensor]:
    """Central differences along x and y."""
    wide = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    return (wide[:, :, 1:-1, 2:] - wide[:, :, 1:-1, :-2]) / 2, (wide[:, :, 2:, 1:-1] - wide[:, :, :-2, 1:-1]) / 2
