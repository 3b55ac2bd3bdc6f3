"""Building blocks of the VGGT family: attention with 2D rotary positions, residual 3D convolutions, a dense head."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@lru_cache(maxsize=32)
def rope_tables(grid: tuple[int, int], special: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (special + h w, head_dim) of the 2D rotary embedding; special tokens sit at 0, patches at 1.. ."""
    h, w = grid
    ys, xs = torch.meshgrid(torch.arange(1, h + 1), torch.arange(1, w + 1), indexing="ij")
    positions = torch.cat([torch.zeros(special, 2), torch.stack([ys.flatten(), xs.flatten()], -1).float()])
    half = head_dim // 2
    frequency = base ** (-torch.arange(0, half, 2).float() / half)  # (half / 2,)
    angles = positions[:, :, None] * frequency  # (N, 2, half / 2)
    angles = torch.cat([angles, angles], -1).flatten(1)  # (N, head_dim): y half, then x half
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the y half and the x half of each head by their positions; x (..., N, head_dim)."""
    y, xx = x.chunk(2, -1)

    def rotated(part: Tensor) -> Tensor:
        one, two = part.chunk(2, -1)
        return torch.cat([-two, one], -1)

    turned = torch.cat([rotated(y), rotated(xx)], -1)
    return x * cos.to(x) + turned * sin.to(x)


def attend(
    q: Float[Tensor, "B H N C"], k: Float[Tensor, "B H N C"], v: Float[Tensor, "B H N C"]
) -> Float[Tensor, "B H N C"]:
    """Softmax attention. On a CPU the fused kernel's backward pass is three times slower than two plain products."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention; `rope` rotates queries and keys when given."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B N D"], rope: tuple[Tensor, Tensor] | None = None) -> Float[Tensor, "B N D"]:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        out = attend(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(ratio * dim))
        self.fc2 = nn.Linear(int(ratio * dim), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, scale: float = 0.1) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, mlp_ratio)
        self.ls1, self.ls2 = nn.Parameter(scale * torch.ones(dim)), nn.Parameter(scale * torch.ones(dim))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x), rope)
        return x + self.ls2 * self.mlp(self.norm2(x))


class ConvBlock(nn.Module):
    """Residual 3x3x3 convolution over (view, row, column): what neighbouring views share is motion, hence pose."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, dim)
        self.conv = nn.Conv3d(dim, dim, 3, padding=1)
        self.point = nn.Conv3d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "B D S h w"]) -> Float[Tensor, "B D S h w"]:
        return x + self.point(F.gelu(self.conv(self.norm(x))))


class ViewBlock(nn.Module):
    """Residual 3x3 convolutions within each view; the identity at the start."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, dim)
        self.conv1 = nn.Conv3d(dim, dim, (1, 3, 3), padding=(0, 1, 1))
        self.conv2 = nn.Conv3d(dim, dim, (1, 3, 3), padding=(0, 1, 1))
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Float[Tensor, "B D S h w"]) -> Float[Tensor, "B D S h w"]:
        return x + self.conv2(F.gelu(self.conv1(self.norm(x))))


class ConvStem(nn.Module):
    """RGB -> patch tokens by three strided convolutions (8 pixels a token), the last two across views.

    `blocks` residual blocks follow each of the first two: layout is read off edges that one convolution does not see.
    """

    patch = 8

    def __init__(self, dim: int, blocks: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(*(ViewBlock(width) for _ in range(blocks))) for width in (32, 64))
        self.stages = nn.ModuleList(
            [
                nn.Conv3d(3, 32, (1, 4, 4), (1, 2, 2), (0, 1, 1)),
                nn.Conv3d(32, 64, 3, (1, 2, 2), 1),
                nn.Conv3d(64, dim, 3, (1, 2, 2), 1),
            ]
        )

    def forward(self, frames: Float[Tensor, "B S 3 H W"]) -> Float[Tensor, "B D S h w"]:
        x = frames.transpose(1, 2) * 2 - 1
        for stage, blocks in zip(self.stages[:-1], self.blocks, strict=True):
            x = blocks(F.gelu(stage(x)))
        return self.stages[-1](x)


class PatchStem(nn.Module):
    """RGB -> patch tokens by one linear map a patch and view."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(3, dim, (1, patch, patch), (1, patch, patch))

    def forward(self, frames: Float[Tensor, "B S 3 H W"]) -> Float[Tensor, "B D S h w"]:
        return self.proj(frames.transpose(1, 2) * 2 - 1)


class DenseHead(nn.Module):
    """A light DPT: features of several layers, fused from coarse to fine by convolutions, then one map a channel.

    Maps come out at half resolution and are enlarged linearly: depth is predicted as inverse depth, in which
    planes are linear.
    """

    def __init__(self, dim: int, hooks: int, features: int, channels: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(dim, 2 * features, 1) for _ in range(hooks))
        self.fuse = nn.Conv2d(2 * features, 2 * features, 3, padding=1)
        self.up1 = nn.Conv2d(2 * features, features, 3, padding=1)
        self.up2 = nn.Conv2d(features, features, 3, padding=1)
        self.out = nn.Conv2d(features, channels, 1)

    def forward(self, maps: list[Float[Tensor, "N D h w"]], size: tuple[int, int]) -> Float[Tensor, "N C H W"]:
        x = sum(project(m) for project, m in zip(self.project, maps, strict=True))
        x = F.gelu(x)
        x = x + F.gelu(self.fuse(x))
        h, w = x.shape[-2:]
        x = F.gelu(self.up1(F.interpolate(x, size=(2 * h, 2 * w), mode="bilinear", align_corners=False)))
        x = F.interpolate(x, size=(4 * h, 4 * w), mode="bilinear", align_corners=False)
        x = x + F.gelu(self.up2(x))
        return F.interpolate(self.out(x).float(), size=size, mode="bilinear", align_corners=False)
