"""The camera head of the public VGGT: poses by refinement over several rounds (its maps: `vggrpo.models.dpt.MapHead`).

Parameters have the names of the public checkpoints. One deviation: a round is not cut off from the
one before (training of VGGT did), so that gradients with respect to the tokens are exact; the numbers are the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.models.vit_layers import Block, Mlp

_ROUNDS, _TRUNK, _POSE = 4, 4, 9


class CameraHead(nn.Module):
    """Camera tokens -> pose encodings: translation, quaternion xyzw and fields of view, of world2cam."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(Block(dim, heads, scale=0.01, qk_norm=False) for _ in range(_TRUNK)))
        self.token_norm, self.trunk_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, _POSE))
        self.embed_pose = nn.Linear(_POSE, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.pose_branch = Mlp(dim, 0.5, _POSE)

    def forward(self, tokens: Float[Tensor, "B S D"]) -> Float[Tensor, "B S 9"]:
        """Each round reads the pose so far; fields of view are rectified at the end of each."""
        tokens = self.token_norm(tokens)
        plain = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        pose = self.empty_pose_tokens.expand(*tokens.shape[:2], -1)
        for index in range(_ROUNDS):
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(pose)).chunk(3, -1)
            x = self.trunk(tokens + gate * (plain * (1 + scale) + shift))
            change = self.pose_branch(self.trunk_norm(x))
            pose = change if index == 0 else pose + change
        return torch.cat([pose[..., :7], F.relu(pose[..., 7:])], -1)
