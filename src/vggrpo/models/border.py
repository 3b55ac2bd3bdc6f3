"""From the conventions of public geometry models to those of `GeometryPrediction`: what several backends share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.errors import UserError

# A video VAE and the transformer behind it see 16 pixels a token; geometry models see 14 (METHOD section 1).
_VIDEO_TOKEN = 16


def patch_image_size(video_size: tuple[int, int], patch: int = 14) -> tuple[int, int]:
    """(height, width) at which a network with `patch` pixels a token has the video's token grid: 480x832 is 420x728."""
    height, width = (max(1, round(side / _VIDEO_TOKEN)) * patch for side in video_size)
    return height, width


def rotation_from_xyzw(quaternion: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotation of a quaternion (x, y, z, w) of any length but zero."""
    x, y, z, w = quaternion.unbind(-1)
    two = 2 / quaternion.square().sum(-1)
    entries = [
        1 - two * (y * y + z * z),
        two * (x * y - z * w),
        two * (x * z + y * w),
        two * (x * y + z * w),
        1 - two * (x * x + z * z),
        two * (y * z - x * w),
        two * (x * z - y * w),
        two * (y * z + x * w),
        1 - two * (x * x + y * y),
    ]
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def rigid(rotation: Float[Tensor, "*batch 3 3"], translation: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 4 4"]:
    """The motion `x -> R x + t` as a matrix."""
    top = torch.cat([rotation, translation[..., None]], -1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], -2)


def pinhole(focal: Float[Tensor, "*batch 2"], principal: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 3 3"]:
    """Intrinsics of (fx, fy) and (cx, cy), pixels."""
    zero, one = torch.zeros_like(focal[..., 0]), torch.ones_like(focal[..., 0])
    entries = [focal[..., 0], zero, principal[..., 0], zero, focal[..., 1], principal[..., 1], zero, zero, one]
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def fov_intrinsics(fov: Float[Tensor, "*batch 2"], size: tuple[int, int]) -> Float[Tensor, "*batch 3 3"]:
    """Intrinsics of vertical and horizontal fields of view (radians), the principal point in the middle of (H, W)."""
    half = torch.tensor([size[1], size[0]], dtype=fov.dtype, device=fov.device) / 2
    focal = half / (fov.flip(-1) / 2).tan().clamp_min(1e-6)
    return pinhole(focal, half.expand_as(focal))


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Without autocast, as geometry heads run: a degree is 0.017, bf16 rounds poses away."""
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device, where costs are counted
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def check_frames(frames: Tensor, patch: int) -> None:
    """Refuse what is not a batch of views, or does not divide into patches.

    Raises:
        ValueError: wrong shape.
        UserError: sides that are not multiples of the patch.
    """
    if frames.ndim != 5 or frames.shape[2] != 3:
        raise ValueError(f"frames: expected shape (B, S, 3, H, W), got {tuple(frames.shape)}")
    height, width = frames.shape[-2:]
    if height % patch or width % patch:
        raise UserError(f"frames of {height}x{width} pixels do not divide into patches of {patch}; resize them")
