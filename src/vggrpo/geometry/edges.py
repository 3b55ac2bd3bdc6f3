"""Depth edges: pixels beside which one surface ends and another begins.

On a plane the *inverse* depth is linear in the pixel coordinates, however grazing the view. So the test is on second
differences of the inverse depth: a floor running to the horizon passes, while a first difference of depth would throw
away its far half.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def _second_difference(inverse: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N"]:
    """``|r[k-1] - 2 r[k] + r[k+1]|`` along the last axis; the two ends repeat their neighbour's value."""
    if inverse.shape[-1] < 3:
        return torch.zeros_like(inverse)
    middle = (inverse[..., :-2] - 2 * inverse[..., 1:-1] + inverse[..., 2:]).abs()
    return torch.cat([middle[..., :1], middle, middle[..., -1:]], -1)


def depth_edges(
    depth: Float[Tensor, "*batch H W"],
    *,
    threshold: float = 0.03,
    radius: int = 0,
    mask: Bool[Tensor, "*batch H W"] | None = None,
) -> Bool[Tensor, "*batch H W"]:
    """Pixels where the surface is broken: ``max over both axes |r- - 2 r + r+| > threshold * r`` with ``r = 1 /
    depth``.

    A jump between two pixels marks both, so every interpolation cell that straddles an outline has a marked corner.
    Where two planes meet in a crease the pixels are marked only if a linear read across it would err by about
    `threshold` / 8.

    Args:
        depth: z-depth.
        threshold: relative to the pixel's own inverse depth.
        radius: the marked area grows by this many pixels, for predictions whose outlines are ramps rather than jumps.
        mask: pixels whose depth means something; a difference that needs another pixel marks nothing.

    Returns:
        The marked pixels, without gradient.
    """
    depth = depth.detach()
    known = depth > 0 if mask is None else mask & (depth > 0)
    inverse = torch.where(
        known, 1 / torch.where(known, depth, torch.ones_like(depth)), torch.full_like(depth, torch.nan)
    )
    along_rows = _second_difference(inverse)
    along_columns = _second_difference(inverse.transpose(-1, -2)).transpose(-1, -2)
    # Comparisons with NaN are False, which is what an unknown neighbour should say.
    edges = (along_rows > threshold * inverse) | (along_columns > threshold * inverse)
    if radius:
        flat = edges.reshape(-1, 1, *edges.shape[-2:]).to(torch.float32)
        edges = (functional.max_pool2d(flat, 2 * radius + 1, stride=1, padding=radius) > 0).reshape(edges.shape)
    return edges
