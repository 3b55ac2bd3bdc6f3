"""DINOv2, the image encoder inside VGGT, Any4D and Depth Anything 3: a plain vision transformer, 14 pixels a token.

Parameters have the names of the public checkpoints (`facebookresearch/dinov2`), which are also the names inside the
three geometry models, behind a prefix:

| checkpoint | prefix | options |
|---|---|---|
| VGGT | `aggregator.patch_embed.` | large, 4 registers, antialiased positions |
| Any4D | `encoder.model.` | large |
| Depth Anything 3 | `model.backbone.pretrained.` | small to large, `final_eps` 1e-5, `qk_norm_from` |

What masks patches while DINOv2 itself is trained (`mask_token`) plays no part here and is skipped when weights load.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vggrpo.models.vit_layers import Block

# Mean and standard deviation of ImageNet's colours, by which all three geometry models normalise.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


class DinoConfig(BaseModel):
    """Shape of one encoder."""

    model_config = ConfigDict(extra="forbid")
    dim: int = Field(1024, ge=4, description="token width")
    depth: int = Field(24, ge=1, description="transformer blocks")
    heads: int = Field(16, ge=1, description="attention heads")
    registers: int = Field(0, ge=0, description="register tokens an image")
    patch: int = Field(14, ge=1, description="pixels a token")
    position_grid: int = Field(37, ge=1, description="side of the square of patches that positions were learned on")
    antialias: bool = Field(False, description="blur positions when their grid shrinks; encoders with registers do")
    offset: float = Field(
        0.1, ge=0, description="added to the size of the grid when positions are resized, as DINO did"
    )
    final_eps: float = Field(1e-6, gt=0, description="of the norm after the last block; blocks have 1e-6")
    qk_norm_from: int | None = Field(None, ge=0, description="first block that normalises queries and keys")

    @classmethod
    def of_size(cls, size: Literal["small", "base", "large"], registers: int = 0, **options: Any) -> DinoConfig:
        """The public encoders; those with registers resize positions in another way."""
        dim, depth, heads = _SIZES[size]
        values = {"antialias": True, "offset": 0.0} if registers else {}
        return cls(dim=dim, depth=depth, heads=heads, registers=registers, **{**values, **options})


class DinoV2(nn.Module):
    """Frames to tokens: the class token, the registers, then the patches row by row."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.config = c = config
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, c.dim, c.patch, c.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + c.position_grid**2, c.dim))
        if c.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, c.registers, c.dim))
        first = c.depth if c.qk_norm_from is None else c.qk_norm_from
        self.blocks = nn.ModuleList(
            Block(c.dim, c.heads, scale=1.0, qk_norm=index >= first, eps=1e-6) for index in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.dim, c.final_eps)

    @property
    def special(self) -> int:
        """Tokens before the first patch: the class token and the registers."""
        return 1 + self.config.registers

    def forward(self, frames: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N M D"]:
        """Normalised tokens of frames in [0, 1] whose sides are multiples of the patch."""
        x = self.embed(frames)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def embed(self, frames: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N M D"]:
        """Tokens before the first block, positions included."""
        patches = self.patch_embed["proj"](colours(frames))  # (N, D, h, w)
        grid = (patches.shape[-2], patches.shape[-1])
        positions = self.positions(grid).to(patches.dtype)
        patches = patches.flatten(2).transpose(1, 2) + positions[:, 1:]
        return torch.cat([self.special_tokens().expand(len(frames), -1, -1).to(patches), patches], 1)

    def special_tokens(self) -> Float[Tensor, "1 M D"]:
        """Class token, with its position, and registers, which have none, as they enter the first block."""
        tokens = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([tokens, self.register_tokens], 1) if self.config.registers else tokens

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 M D"]:
        """Position embeddings of the class token and of a grid (rows, columns), resized from the learned square."""
        side = self.config.position_grid
        if grid == (side, side):
            return self.pos_embed
        learned = self.pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        # With an offset the ratio of the grids, not their size, places the samples: a quirk the weights are used to.
        offset = self.config.offset
        scale = tuple((n + offset) / side for n in grid) if offset else None
        resized = F.interpolate(learned, None if offset else grid, scale, "bicubic", antialias=self.config.antialias)
        return torch.cat([self.pos_embed[:, :1].float(), resized.flatten(2).transpose(1, 2)], 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "mask_token", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def colours(frames: Float[Tensor, "*N 3 H W"]) -> Float[Tensor, "*N 3 H W"]:
    """Frames in [0, 1] normalised by ImageNet's colours."""
    mean, std = (frames.new_tensor(x)[:, None, None] for x in (MEAN, STD))
    return (frames - mean) / std
