"""The plug for other trainers: latents in, rewards out, one import and no config.

reward = LatentGeometryReward.from_pretrained("path/to/lgm")
scores = reward(latents)          # {"motion": (B,), "geometry": (B,), "valid": (B,), ...}
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.lgm.model import LatentGeometryModel
from vggrpo.rewards.camera_motion import camera_motion_smoothness
from vggrpo.rewards.reprojection import geometry_reprojection_consistency


class LatentGeometryReward(nn.Module):
    """Camera smoothness and reprojection consistency of latents.

    Args:
        lgm: the latent geometry model.
        chunk: clips that go through the LGM at once; lower it when memory is short.
        differentiable: keep the graph from rewards to latents (for guidance and direct training).
    """

    def __init__(self, lgm: LatentGeometryModel, chunk: int = 16, differentiable: bool = False) -> None:
        super().__init__()
        self.lgm, self.chunk, self.differentiable = lgm, chunk, differentiable

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, chunk: int = 16, differentiable: bool = False
    ) -> LatentGeometryReward:
        """Load the LGM from a directory; errors are those of `LatentGeometryModel.from_pretrained`."""
        return cls(LatentGeometryModel.from_pretrained(directory), chunk, differentiable)

    def forward(self, latents: Float[Tensor, "B C T H W"]) -> dict[str, Float[Tensor, " B"]]:
        """`motion` and `geometry` rewards in [0, 1], `valid` (bool), all terms (`e_trans`, `e_rot`, `e_geo`, ...)."""
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            parts = [self._score(piece) for piece in latents.split(self.chunk)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _score(self, latents: Tensor) -> dict[str, Tensor]:
        prediction = self.lgm(latents)
        motion, geometry = camera_motion_smoothness(prediction), geometry_reprojection_consistency(prediction)
        return {
            "motion": motion.value,
            "geometry": geometry.value,
            "valid": motion.valid & geometry.valid,
            **motion.terms,
            **geometry.terms,
        }
