"""Between pixels and world points: the pixel grid, unprojection, projection, z-buffers and point visibility.

Pixel centres are at +0.5, depth is z-depth, cameras are OpenCV ``cam2world``. All functions work on all videos and all
views at once; the loops in `zbuffer_reference` are the definition that `zbuffer` is tested against.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Points this close to the camera plane (in the unit of the depth) count as behind it: their pixel is meaningless.
NEAR = 1e-6


def pixel_grid(
    height: int, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "H W 2"]:
    """Coordinates (u, v) of all pixel centres: u = column + 0.5, v = row + 0.5, in pixels."""
    v, u = torch.meshgrid(
        torch.arange(height, device=device, dtype=dtype) + 0.5,
        torch.arange(width, device=device, dtype=dtype) + 0.5,
        indexing="ij",
    )
    return torch.stack([u, v], -1)


def pixel_rays(intrinsics: Float[Tensor, "*batch 3 3"], size: tuple[int, int]) -> Float[Tensor, "*batch H W 3"]:
    """Directions ``K^-1 (u, v, 1)`` in the camera's frame, z = 1, through all pixel centres of a `size` (H, W) map."""
    grid = pixel_grid(*size, device=intrinsics.device, dtype=intrinsics.dtype)
    fx, fy, skew = intrinsics[..., 0, 0], intrinsics[..., 1, 1], intrinsics[..., 0, 1]
    cx, cy = intrinsics[..., 0, 2], intrinsics[..., 1, 2]
    fx, fy, skew, cx, cy = (entry[..., None, None] for entry in (fx, fy, skew, cx, cy))
    y = (grid[..., 1] - cy) / fy
    x = (grid[..., 0] - cx - skew * y) / fx
    return torch.stack([x, y, torch.ones_like(x)], -1)


def unproject(
    depth: Float[Tensor, "B S H W"], intrinsics: Float[Tensor, "B S 3 3"], cam2world: Float[Tensor, "B S 4 4"]
) -> Float[Tensor, "B S H W 3"]:
    """World points of all pixels, ``X = R (d K^-1 (u, v, 1)) + c``.

    Args:
        depth: z-depth.
        intrinsics: in pixels of the depth map.
        cam2world: camera poses.

    Returns:
        Points in the world frame, in the unit of the depth.
    """
    height, width = depth.shape[-2:]
    in_camera = depth[..., None] * pixel_rays(intrinsics, (height, width))
    rotation, centre = cam2world[..., :3, :3], cam2world[..., :3, 3]
    return torch.einsum("bsij,bshwj->bshwi", rotation, in_camera) + centre[..., None, None, :]


def project(
    points: Float[Tensor, "B N 3"], intrinsics: Float[Tensor, "B S 3 3"], cam2world: Float[Tensor, "B S 4 4"]
) -> tuple[Float[Tensor, "B S N 2"], Float[Tensor, "B S N"]]:
    """Pixel positions and depths of every point in every view, ``(u, v, 1) ~ K R^T (X - c)``.

    Args:
        points: one world cloud a video.
        intrinsics: in pixels.
        cam2world: camera poses.

    Returns:
        Pixel positions (u, v) and z-depths. For points on or behind the camera plane (z <= NEAR) the position is a
        finite placeholder far outside of the image.
    """
    rotation, centre = cam2world[..., :3, :3], cam2world[..., :3, 3]
    # R^T X - R^T c: the offset is a small (B, S, 3), so that no (B, S, N, 3) difference is stored.
    offset = torch.einsum("bsji,bsj->bsi", rotation, centre)
    in_camera = torch.einsum("bsji,bnj->bsni", rotation, points) - offset[:, :, None]
    z = in_camera[..., 2]
    in_front = z > NEAR
    safe_z = torch.where(in_front, z, torch.ones_like(z))
    normalised = in_camera[..., :2] / safe_z[..., None]
    linear = intrinsics[..., :2, :2]
    uv = torch.einsum("bsij,bsnj->bsni", linear, normalised) + intrinsics[:, :, None, :2, 2]
    return torch.where(in_front[..., None], uv, torch.full_like(uv, -1e6)), z


def pixel_index(
    uv: Float[Tensor, "*batch N 2"], size: tuple[int, int]
) -> tuple[Int[Tensor, "*batch N"], Bool[Tensor, "*batch N"]]:
    """Flat index ``row * W + column`` of the pixel that holds each position, and whether it is inside of the image.

    Positions outside (or NaN) get index 0 and False.
    """
    height, width = size
    u, v = uv[..., 0], uv[..., 1]
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)  # a NaN fails every comparison
    column = torch.where(inside, u, torch.zeros_like(u)).long()
    row = torch.where(inside, v, torch.zeros_like(v)).long()
    return row * width + column, inside


def zbuffer(
    uv: Float[Tensor, "B S N 2"],
    z: Float[Tensor, "B S N"],
    size: tuple[int, int],
    *,
    mask: Bool[Tensor, "B S N"] | None = None,
) -> Float[Tensor, "B S H W"]:
    """The smallest z of the points that fall into each pixel; infinity where none does.

    Args:
        uv: pixel positions.
        z: depths (or any other key of which the smallest wins).
        size: (H, W).
        mask: points that take part; by default all with z > NEAR.

    Returns:
        The buffer, without gradient: which point wins is not differentiable.
    """
    index, inside = pixel_index(uv.detach(), size)
    takes_part = inside & ((z > NEAR) if mask is None else mask)
    key = torch.where(takes_part, z.detach(), torch.full_like(z, math.inf))
    buffer = torch.full((*z.shape[:2], size[0] * size[1]), math.inf, dtype=z.dtype, device=z.device)
    return buffer.scatter_reduce(-1, index, key, "amin").unflatten(-1, size)


def zbuffer_reference(
    uv: Float[Tensor, "B S N 2"],
    z: Float[Tensor, "B S N"],
    size: tuple[int, int],
    *,
    mask: Bool[Tensor, "B S N"] | None = None,
) -> Float[Tensor, "B S H W"]:
    """What `zbuffer` computes, one point at a time."""
    buffer = torch.full((*z.shape[:2], *size), math.inf, dtype=z.dtype, device=z.device)
    for video in range(z.shape[0]):
        for view in range(z.shape[1]):
            for point in range(z.shape[2]):
                u, v = uv[video, view, point].tolist()
                depth = z[video, view, point].item()
                takes_part = depth > NEAR if mask is None else bool(mask[video, view, point])
                if takes_part and 0 <= u < size[1] and 0 <= v < size[0]:
                    row, column = int(v), int(u)
                    buffer[video, view, row, column] = min(buffer[video, view, row, column].item(), depth)
    return buffer


def point_visibility(
    uv: Float[Tensor, "B S N 2"],
    z: Float[Tensor, "B S N"],
    size: tuple[int, int],
    *,
    tolerance: float = 0.01,
    mask: Bool[Tensor, "B S N"] | None = None,
) -> Bool[Tensor, "B S N"]:
    """Which points each view sees: inside of the image and at most `tolerance` behind the front-most point of their
    pixel.

    Args:
        uv: pixel positions.
        z: depths (or any other positive key of which the smallest is in front).
        size: (H, W).
        tolerance: relative; a point is visible if ``z <= (1 + tolerance) * buffer``.
        mask: points that take part; by default all with z > NEAR. Others are never visible and occlude nothing.
    """
    index, inside = pixel_index(uv.detach(), size)
    takes_part = inside & ((z > NEAR) if mask is None else mask)
    front = zbuffer(uv, z, size, mask=mask).flatten(-2).gather(-1, index)
    return takes_part & (z.detach() <= front * (1 + tolerance))
