"""What the embedded networks of the VGGT family have beside attention: convolutions over views, and a light dense
head."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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


class Compare(nn.Module):
    """Where each place of a view lies in the next and in the previous view: softmax over the cells around it."""

    def __init__(self, radius: int) -> None:
        super().__init__()
        self.radius = radius
        self.log_sharpness = nn.Parameter(torch.tensor(2.5))

    def forward(self, x: Float[Tensor, "B F S h w"]) -> Float[Tensor, "B S P 2K"]:
        """Probabilities of the K = (2 radius + 1)^2 displacements to the next view, then of those to the previous one;
        zero where there is no such view."""
        height, width = x.shape[-2:]
        places = F.normalize(x.float(), dim=1).flatten(3).permute(0, 2, 3, 1)  # (B, S, P, F)
        window, inside = _windows(height, width, self.radius, x.device)  # (P, K)
        found = []
        for step in (1, -1):
            scores = places @ torch.roll(places, -step, 1).transpose(-1, -2)  # (B, S, P, P)
            scores = scores.gather(-1, window.expand(*scores.shape[:2], -1, -1)) * self.log_sharpness.exp()
            known = torch.ones(x.shape[2], 1, 1, device=x.device)
            known[-1 if step == 1 else 0] = 0
            found.append(scores.masked_fill(~inside, -torch.inf).softmax(-1) * known)
        return torch.cat(found, -1)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept must serve a later call that has gradients, too
def _windows(height: int, width: int, radius: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index (P, K) of the K cells around each of P = height x width, rows first, and whether they exist."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    dy, dx = torch.meshgrid(*[torch.arange(-radius, radius + 1)] * 2, indexing="ij")
    y, x = ys.reshape(-1, 1) + dy.reshape(1, -1), xs.reshape(-1, 1) + dx.reshape(1, -1)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).to(device), inside.to(device)


class Correlation(nn.Module):
    """Features of neighbouring views compared: pose is read off displacements, and the mean of such a distribution is a
    displacement finer than a cell. Zero at the start."""

    def __init__(self, channels: int, out: int, radius: int, features: int = 48) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Conv3d(channels, features, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
            nn.GELU(),
            nn.Conv3d(features, features, (1, 3, 3), padding=(0, 1, 1)),
        )
        self.compare = Compare(radius)
        self.proj = nn.Linear(2 * (2 * radius + 1) ** 2, out)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Float[Tensor, "B C S h w"]) -> Float[Tensor, "B O S h2 w2"]:
        x = self.embed(x)
        return self.proj(self.compare(x)).permute(0, 3, 1, 2).unflatten(3, x.shape[-2:])


class ConvStem(nn.Module):
    """RGB -> patch tokens by three strided convolutions (8 pixels a token), the last two across views.

    `blocks` residual blocks follow each of the first two: layout is read off edges that one convolution does not see.
    `radius`: cells of four pixels in which neighbouring views are compared, 0 for no comparison.
    """

    patch = 8

    def __init__(self, dim: int, blocks: int = 0, radius: int = 0) -> None:
        super().__init__()
        self.correlation = Correlation(32, 64, radius) if radius else None
        self.blocks = nn.ModuleList(nn.Sequential(*(ViewBlock(width) for _ in range(blocks))) for width in (32, 64))
        self.stages = nn.ModuleList(
            [
                nn.Conv3d(3, 32, (1, 4, 4), (1, 2, 2), (0, 1, 1)),
                nn.Conv3d(32, 64, 3, (1, 2, 2), 1),
                nn.Conv3d(64, dim, 3, (1, 2, 2), 1),
            ]
        )

    def forward(self, frames: Float[Tensor, "B S 3 H W"]) -> Float[Tensor, "B D S h w"]:
        first, second, last = self.stages
        fine = self.blocks[0](F.gelu(first(frames.transpose(1, 2) * 2 - 1)))
        coarse = F.gelu(second(fine))
        if self.correlation is not None:
            coarse = coarse + self.correlation(fine)
        return last(self.blocks[1](coarse))


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

    def __init__(self, dim: int, hooks: int, features: int, channels: int, detail: bool = False) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(dim, 2 * features, 1) for _ in range(hooks))
        self.fuse = nn.Conv2d(2 * features, 2 * features, 3, padding=1)
        self.up1 = nn.Conv2d(2 * features, features, 3, padding=1)
        # What a token knows about its inside, beside the smooth enlargement: outlines. Zero at the start.
        self.detail = nn.ConvTranspose2d(2 * features, features, 4, 4) if detail else None
        if self.detail is not None:
            nn.init.zeros_(self.detail.weight)
        self.up2 = nn.Conv2d(features, features, 3, padding=1)
        self.out = nn.Conv2d(features, channels, 1)

    def forward(self, maps: list[Float[Tensor, "N D h w"]], size: tuple[int, int]) -> Float[Tensor, "N C H W"]:
        x = sum(project(m) for project, m in zip(self.project, maps, strict=True))
        x = F.gelu(x)
        x = x + F.gelu(self.fuse(x))
        h, w = x.shape[-2:]
        y = F.gelu(self.up1(F.interpolate(x, size=(2 * h, 2 * w), mode="bilinear", align_corners=False)))
        y = F.interpolate(y, size=(4 * h, 4 * w), mode="bilinear", align_corners=False)
        if self.detail is not None:
            y = y + self.detail(x)
        y = y + F.gelu(self.up2(y))
        return F.interpolate(self.out(y).float(), size=size, mode="bilinear", align_corners=False)
