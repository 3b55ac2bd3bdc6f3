"""A stand-in for the LGM: geometry that depends smoothly on the latents (24 x 24 maps), without a network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vggrpo.geometry import GeometryPrediction, so3_exp


def fake_lgm(latents: Tensor) -> GeometryPrediction:
    """One view per latent frame: camera from the frame's mean, depth from the first channel."""
    batch, _, views = latents.shape[:3]
    height = width = 24
    means = latents.float().mean(dim=(3, 4)).transpose(1, 2)[..., :3]  # (B, S, 3)
    steps = torch.linspace(0, 1, views, device=latents.device).view(1, -1, 1)
    cam2world = torch.eye(4, device=latents.device).repeat(batch, views, 1, 1)
    cam2world[..., :3, 3] = steps * (1 + means)
    cam2world[..., :3, :3] = so3_exp(0.1 * (means - means[:, :1]))
    cam2world[:, 0] = torch.eye(4, device=latents.device)
    intrinsics = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]], device=latents.device)
    coarse = latents[:, 0].float().flatten(0, 1)[:, None]  # (B S, 1, h, w)
    fine = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)[:, 0]
    depth = 3 + 0.02 * torch.tanh(fine).unflatten(0, (batch, views))
    return GeometryPrediction.from_depth(
        cam2world, intrinsics.expand(batch, views, 3, 3), depth, torch.ones_like(depth)
    )
