"""Building blocks of vision transformers: attention with 2D rotary positions, feed-forward layers, residual blocks.

Names of parameters are those of DINOv2, VGGT and Depth Anything 3, so their checkpoints load without renaming.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.models.recompute import recomputed


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve a later call that has gradients, too
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

    def __init__(self, dim: int, heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
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
    """Two linear layers with GELU, `ratio * dim` wide between them."""

    def __init__(self, dim: int, ratio: float = 4.0, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(ratio * dim))
        self.fc2 = nn.Linear(int(ratio * dim), out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """One learned factor a channel."""

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(scale * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale.

    Args:
        scale: what LayerScale starts from.
        qk_norm: whether queries and keys are normalised a head.
        eps: of the two norms over `dim`; DINOv2 has 1e-6.
    """

    recompute = False

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        scale: float = 0.1,
        *,
        qk_norm: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps), Attention(dim, heads, qk_norm)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps), Mlp(dim, mlp_ratio)
        self.ls1, self.ls2 = LayerScale(dim, scale), LayerScale(dim, scale)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return recomputed(self, self._layers, x, rope)

    def _layers(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The embedded networks' first files hold the factors of LayerScale under the bare names `ls1` and `ls2`.
        for name in ("ls1", "ls2"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}{name}.gamma"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)
