"""Rewards in RGB space, the rival of the LGM: decode the latents, then ask a geometry model about the frames.

The same rewards, the same trainer; only the reader of the geometry differs (`reward.space: rgb`). It costs a VAE decode
and the whole geometry network for every clip.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vggrpo import assets
from vggrpo.config_algorithms import EMBEDDED, RewardSpaceConfig
from vggrpo.geometry import GeometryPrediction
from vggrpo.models.base import GeometryModel, VideoModel
from vggrpo.models.loading import load_geometry_model


class RGBGeometry:
    """Latents -> geometry, through decoded frames 0, stride, 2 stride, ...

    Args:
        model: decodes.
        geometry: reads frames.
        view_stride: RGB frames from view to view.
    """

    def __init__(self, model: VideoModel, geometry: GeometryModel, view_stride: int = 4) -> None:
        self.model, self.geometry, self.view_stride = model, geometry, view_stride

    def __call__(self, latents: Float[Tensor, "B C T H W"]) -> GeometryPrediction:
        """Geometry of each clip, differentiable in the latents where gradients are on."""
        video = self.model.decode(latents)  # (B, 3, T, H, W)
        frames = video[:, :, :: self.view_stride].transpose(1, 2)  # (B, S, 3, H, W)
        size = self.geometry.image_size_for((frames.shape[-2], frames.shape[-1]))
        if tuple(frames.shape[-2:]) != tuple(size):
            flat = functional.interpolate(
                frames.flatten(0, 1), size, mode="bilinear", antialias=True, align_corners=False
            )
            frames = flat.unflatten(0, frames.shape[:2])
        prediction = self.geometry(frames)
        times = self.view_stride * torch.arange(frames.shape[1], device=prediction.depth.device)
        return replace(prediction, frame_index=times)


def load_rgb_reader(settings: RewardSpaceConfig, model: VideoModel) -> RGBGeometry:
    """The configured geometry model, frozen, on the video model's device."""
    source = assets.path("geometry") if settings.geometry == EMBEDDED else settings.geometry
    geometry = load_geometry_model(source)
    if isinstance(geometry, nn.Module):
        geometry = geometry.to(model.device).eval().requires_grad_(False)
    return RGBGeometry(model, geometry, settings.view_stride)
