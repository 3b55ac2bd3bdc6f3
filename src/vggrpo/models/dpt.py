"""Dense prediction transformer: tokens of four layers, brought to four scales and fused from coarse to fine.

The pyramid (`scratch` in the public checkpoints) is the same in Any4D, Depth Anything 3 and VGGT, as are the names of
its parameters; what differs is how tokens get onto its levels and what turns the fused map into numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.models.recompute import recomputed

# Views whose dense maps are made at one time: at 420x728 pixels one of Any4D's maps takes 150 MB a view.
VIEWS_AT_ONCE = 8


def resized(x: Float[Tensor, "N C h w"], size: tuple[int, int]) -> Float[Tensor, "N C H W"]:
    """Bilinear, corner pixels on corner pixels."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def in_chunks(
    function: Callable[[list[Tensor]], Tensor], maps: Sequence[Float[Tensor, "N ..."]], count: int = VIEWS_AT_ONCE
) -> Tensor:
    """`function` of the maps, `count` views at a time."""
    return torch.cat([function(list(part)) for part in zip(*(m.split(count) for m in maps), strict=True)])


class ResidualConv(nn.Module):
    """Two convolutions of rectified maps, added to what came in; `rectified`: to that, rectified, too.

    VGGT's code rectifies in place, so its sum is with the rectified map.
    """

    def __init__(self, features: int, rectified: bool) -> None:
        super().__init__()
        self.rectified = rectified
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        positive = F.relu(x)
        return (positive if self.rectified else x) + self.conv2(F.relu(self.conv1(positive)))


class Fusion(nn.Module):
    """Adds a finer level to the map so far, refines it and enlarges it.

    A convolution of single pixels and an interpolation, whose weights add up to one, give the same in either order; the
    public codes enlarge first, which costs four times as much.
    """

    def __init__(self, features: int, lateral: bool, rectified: bool) -> None:
        super().__init__()
        if lateral:
            self.resConfUnit1 = ResidualConv(features, rectified)
        self.resConfUnit2 = ResidualConv(features, rectified)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, lateral: Tensor | None, size: tuple[int, int]) -> Tensor:
        if lateral is not None:
            x = x + self.resConfUnit1(lateral)
        return resized(self.out_conv(self.resConfUnit2(x)), size)


class Pyramid(nn.Module):
    """Four levels, the finest first, to one map twice as fine as the finest.

    Args:
        widths: channels of the levels.
        features: channels of the fused map.
        crop: how the coarsest level meets a grid with an odd side: doubled and cut (Any4D), or resized to it.
        rectified: see `ResidualConv`.
    """

    def __init__(self, widths: Sequence[int], features: int, *, crop: bool = False, rectified: bool = False) -> None:
        super().__init__()
        self.crop = crop
        for level, width in enumerate(widths, 1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(width, features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{level}", Fusion(features, level < 4, rectified))

    def forward(self, levels: Sequence[Float[Tensor, "N C h w"]]) -> Float[Tensor, "N F H W"]:
        one, two, three, four = (self.get_submodule(f"layer{i}_rn")(x) for i, x in enumerate(levels, 1))
        size = three.shape[-2:]
        if self.crop:
            x = self.refinenet4(four, None, _double(four))[..., : size[0], : size[1]]
        else:
            x = self.refinenet4(four, None, size)
        x = self.refinenet3(x, three, two.shape[-2:])
        x = self.refinenet2(x, two, one.shape[-2:])
        return self.refinenet1(x, one, _double(one))


def _double(x: Tensor) -> tuple[int, int]:
    return 2 * x.shape[-2], 2 * x.shape[-1]


def resizer(level: int, width: int) -> nn.Module:
    """What brings patch tokens to the scale of a level 1 to 4: four times and twice as fine, as they are, half."""
    if level < 3:
        factor = 4 // level
        return nn.ConvTranspose2d(width, width, factor, factor)
    return nn.Identity() if level == 3 else nn.Conv2d(width, width, 3, 2, 1)


class MapHead(nn.Module):
    """Patch tokens of four layers to maps, as Depth Anything 3 and VGGT have it.

    Convolutions learn where in the picture they are from sines that are added to their inputs.

    Args:
        dim: width of the tokens.
        channels: of the maps.
        features: channels while fusing.
        widths: channels of the four levels, the finest first.
        rectified: see `ResidualConv`.
    """

    recompute = False

    def __init__(self, dim: int, channels: int, features: int, widths: Sequence[int], rectified: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, width, 1) for width in widths)
        self.resize_layers = nn.ModuleList(resizer(level, width) for level, width in enumerate(widths, 1))
        self.scratch = Pyramid(widths, features, rectified=rectified)
        half = features // 2
        self.scratch.output_conv1 = nn.Conv2d(features, half, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(half, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, channels, 1)
        )

    def forward(self, tokens: Sequence[Float[Tensor, "N D h w"]], size: tuple[int, int]) -> Float[Tensor, "N C H W"]:
        """Maps of `size` pixels."""
        return in_chunks(lambda part: recomputed(self, self._maps, part, size), tokens)

    def _maps(self, tokens: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        aspect = size[1] / size[0]
        levels = []
        for x, project, resize in zip(tokens, self.projects, self.resize_layers, strict=True):
            x = project(self.norm(x.movedim(1, -1)).movedim(-1, 1))
            levels.append(resize(x + place(x, aspect)))
        x = resized(self.scratch.output_conv1(self.scratch(levels)), size)
        return self.scratch.output_conv2(x + place(x, aspect))


def place(x: Float[Tensor, "N C h w"], aspect: float) -> Float[Tensor, "C h w"]:
    """Sines and cosines of where each cell lies, half of the channels for x, half for y, a tenth strong.

    The picture's half diagonal is 1, `aspect` its width over its height.
    """
    channels, height, width = x.shape[1:]
    diagonal = (aspect**2 + 1) ** 0.5
    across, down = (
        _waves(cells, span / diagonal, channels // 2, x.device) for cells, span in ((width, aspect), (height, 1.0))
    )
    grid = torch.cat([across[:, None].expand(-1, height, -1), down[:, :, None].expand(-1, -1, width)])
    return (0.1 * grid).to(x.dtype)


def _waves(cells: int, span: float, channels: int, device: torch.device) -> Float[Tensor, "C n"]:
    """Sines, then cosines, with frequencies from 1 to 1/100, of `cells` centres between -span and span."""
    edge = span * (cells - 1) / cells
    position = torch.linspace(-edge, edge, cells, device=device)
    frequency = 100.0 ** -(torch.arange(channels // 2, device=device) / (channels / 2))
    angle = frequency[:, None] * position
    return torch.cat([angle.sin(), angle.cos()])
