"""Depth Anything 3 under its heads: DINOv2 whose later blocks attend across views by turns, and the camera decoder."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.models.dinov2 import DinoConfig, DinoV2
from vggrpo.models.vit_layers import rope_tables

_ROPE_BASE = 100.0


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve a later call that has gradients, too
def _across_tables(patches: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Positions that tell a view's camera token from its patches and nothing more: (0, 0) and (1, 1)."""
    return tuple(
        torch.cat([table[:1], table[1:].expand(patches, -1)]) for table in rope_tables((1, 1), 1, head_dim, _ROPE_BASE)
    )


class AnyViewDino(DinoV2):
    """DINOv2 up to block `turn`. There a camera token takes the class token's place, one for the first view and one for
    all others; from there on odd blocks see all views at once, even blocks see each view with its patches' positions.
    """

    def __init__(self, config: DinoConfig, turn: int) -> None:
        super().__init__(config)
        self.turn = turn
        self.camera_token = nn.Parameter(torch.randn(1, 2, config.dim))

    def across_views(self, index: int) -> bool:
        """Whether block `index` sees all views at once."""
        return index >= self.turn and index % 2 == 1

    def step(self, tokens: Float[Tensor, "B S N D"], index: int, grid: tuple[int, int]) -> Float[Tensor, "B S N D"]:
        """Tokens after block `index`, from those before it."""
        b, s, n, d = tokens.shape
        if index == self.turn:
            camera = torch.cat([self.camera_token[:, :1], self.camera_token[:, 1:].expand(-1, s - 1, -1)], 1)
            tokens = torch.cat([camera[:, :, None].expand(b, -1, -1, -1).to(tokens), tokens[:, :, 1:]], 2)
        block = self.blocks[index]
        head_dim = d // self.config.heads
        if self.across_views(index):
            cos, sin = (table.to(tokens.device).repeat(s, 1) for table in _across_tables(n - 1, head_dim))
            return block(tokens.reshape(b, s * n, d), (cos, sin)).view(b, s, n, d)
        rope = None
        if index >= self.turn:
            cos, sin = (table.to(tokens.device) for table in rope_tables(grid, 1, head_dim, _ROPE_BASE))
            rope = (cos, sin)
        return block(tokens.reshape(b * s, n, d), rope).view(b, s, n, d)


class CameraDecoder(nn.Module):
    """Camera token to translation, quaternion (x, y, z, w) and fields of view (vertical, horizontal) of cam2world."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t, self.fc_qvec = nn.Linear(dim, 3), nn.Linear(dim, 4)
        self.fc_fov = nn.Sequential(nn.Linear(dim, 2), nn.ReLU())

    def forward(
        self, tokens: Float[Tensor, "B S D"]
    ) -> tuple[Float[Tensor, "B S 3"], Float[Tensor, "B S 4"], Float[Tensor, "B S 2"]]:
        x = self.backbone(tokens)
        return self.fc_t(x), self.fc_qvec(x), self.fc_fov(x)
