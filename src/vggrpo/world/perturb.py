"""Inconsistency of known size: rendered clips whose walls and objects wobble.

Every frame is warped by its own smooth displacement field, colour and depth alike, under unchanged cameras. What
comes out is the exact geometry of a world that does not hold together: the amplitude in pixels says how badly.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vggrpo.world.batch import WorldBatch

_CELLS = 5  # bumps of the displacement field a side


def wobble(
    world: WorldBatch, amplitude: float | Tensor, seed: int = 0, truth_every: int = 1, period: int = 1
) -> WorldBatch:
    """Warp each frame by a random smooth field of root-mean-square `amplitude` pixels (one number, or one a clip).

    Args:
        truth_every: the truth maps of `world` belong to frames 0, truth_every, ... of its video (1: to every frame).
        period: frames between two fields that have nothing in common; those in between pass from one to the other.
            1: the picture flickers, which a video VAE averages away; its temporal stride: things slowly change shape,
            as they do in generated videos.
    """
    b, _, t, h, w = world.video.shape
    rng = np.random.default_rng(seed)
    keys = -(-(t - 1) // period) + 1
    key = torch.from_numpy(rng.standard_normal((b, keys, 2, _CELLS, _CELLS))).float().to(world.video.device)
    time = torch.arange(t, device=key.device) / period
    before, share = time.floor().long(), (time % 1)[:, None, None, None]
    coarse = (key[:, before].lerp(key[:, (before + 1).clamp_max(keys - 1)], share)).flatten(0, 1)
    field = F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=False)
    field = field / field.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() * 2**-0.5
    amplitude = torch.as_tensor(amplitude, dtype=torch.float32, device=field.device).expand(b).repeat_interleave(t)
    field = field * amplitude[:, None, None, None]
    v, u = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    grid = torch.stack([(u.to(field) + field[:, 0]) * 2 / w - 1, (v.to(field) + field[:, 1]) * 2 / h - 1], -1)

    def warp(maps: Tensor, mode: str, frames: Tensor) -> Tensor:
        return F.grid_sample(maps, frames, mode=mode, padding_mode="border", align_corners=False)

    video = warp(world.video.transpose(1, 2).flatten(0, 1), "bilinear", grid).unflatten(0, (b, t)).transpose(1, 2)
    kept = grid.unflatten(0, (b, t))[:, ::truth_every].flatten(0, 1)
    # Nearest: a depth halfway between a ball and the wall behind it belongs to nothing.
    depth = warp(world.depth.flatten(0, 1)[:, None], "nearest", kept)[:, 0].view_as(world.depth)
    ids = warp(world.object_id.flatten(0, 1)[:, None].float(), "nearest", kept)[:, 0].view_as(world.object_id)
    return replace(world, video=video, depth=depth, object_id=ids.to(world.object_id.dtype))
