"""What the embedded networks of the VGGT family have beside attention: convolutions over views, and a light dense
head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.models.border import full_precision
from vggrpo.models.lucas_kanade import displacement


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


class Displacement(nn.Module):
    """What moved where: displacement to the next and to the previous view, as features of cells of four pixels."""

    cell = 4
    inputs = 10  # (x, y), mismatch and presence for both neighbours, and the cell's own place

    def __init__(self, out: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Conv3d(self.inputs, out, 1), nn.GELU(), nn.Conv3d(out, out, 1))

    def forward(self, frames: Float[Tensor, "B S 3 H W"]) -> Float[Tensor, "B O S h w"]:
        with full_precision(frames.device):
            return self.read(self.measure(frames.float()))

    def measure(self, frames: Float[Tensor, "B S 3 H W"]) -> Float[Tensor, "B 10 S h w"]:
        """Displacements in eighths of the width, mismatch, 1 where there is such a view, place in [-1, 1]."""
        b, s, _, _, width = frames.shape
        here, there = torch.cat([frames[:, :-1], frames[:, 1:]]), torch.cat([frames[:, 1:], frames[:, :-1]])
        flow, miss = displacement(here.flatten(0, 1), there.flatten(0, 1))
        maps = torch.cat([flow * (8 / width), miss[:, None], torch.ones_like(miss)[:, None]], 1)
        maps = F.avg_pool2d(maps, self.cell).unflatten(0, (2, b, s - 1))
        ahead, back = F.pad(maps[0], (0, 0) * 3 + (0, 1)), F.pad(maps[1], (0, 0) * 3 + (1, 0))
        h, w = maps.shape[-2:]
        v, u = (torch.linspace(-1, 1, n, device=frames.device) for n in (h, w))
        place = torch.stack([u.expand(h, w), v[:, None].expand(h, w)]).expand(b, s, -1, -1, -1)
        return torch.cat([ahead, back, place], 2).transpose(1, 2)


class ConvStem(nn.Module):
    """RGB -> patch tokens by three strided convolutions (8 pixels a token), the last two across views.

    `blocks` residual blocks follow each of the first two: layout is read off edges that one convolution does not see.
    `displaced`: the displacement between neighbouring views is measured and added.
    """

    patch = 8

    def __init__(self, dim: int, blocks: int = 0, displaced: bool = False) -> None:
        super().__init__()
        self.displacement = Displacement(64) if displaced else None
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
        if self.displacement is not None:
            coarse = coarse + self.displacement(frames)
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
    planes are linear. `detail`: tokens also say what they show inside, and half-size pixels what theirs do: outlines,
    which cost a third of the depth error that is asked for when they are enlarged smoothly.
    """

    def __init__(self, dim: int, hooks: int, features: int, channels: int, detail: bool = False) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(dim, 2 * features, 1) for _ in range(hooks))
        self.fuse = nn.Conv2d(2 * features, 2 * features, 3, padding=1)
        self.up1 = nn.Conv2d(2 * features, features, 3, padding=1)
        # Both are zero at the start.
        self.detail = nn.ConvTranspose2d(2 * features, features, 4, 4) if detail else None
        if self.detail is not None:
            nn.init.zeros_(self.detail.weight)
        self.up2 = nn.Conv2d(features, features, 3, padding=1)
        self.out = nn.Conv2d(features, channels, 1)
        self.fine = nn.ConvTranspose2d(features, channels, 2, 2) if detail else None
        if self.fine is not None:
            nn.init.zeros_(self.fine.weight)
            nn.init.zeros_(self.fine.bias)

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
        out = F.interpolate(self.out(y).float(), size=size, mode="bilinear", align_corners=False)
        if self.fine is None:
            return out
        return out + F.interpolate(self.fine(y).float(), size=size, mode="bilinear", align_corners=False)
