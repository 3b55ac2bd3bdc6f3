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
    """Two convolutions of rectified maps, added to what came in."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a finer level to the map so far, refines it and enlarges it."""

    def __init__(self, features: int, lateral: bool) -> None:
        super().__init__()
        if lateral:
            self.resConfUnit1 = ResidualConv(features)
        self.resConfUnit2 = ResidualConv(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, lateral: Tensor | None, size: tuple[int, int]) -> Tensor:
        if lateral is not None:
            x = x + self.resConfUnit1(lateral)
        return self.out_conv(resized(self.resConfUnit2(x), size))


class Pyramid(nn.Module):
    """Four levels, the finest first, to one map twice as fine as the finest.

    Args:
        widths: channels of the levels.
        features: channels of the fused map.
        crop: how the coarsest level meets a grid with an odd side: doubled and cut (Any4D), or resized to it.
    """

    def __init__(self, widths: Sequence[int], features: int, crop: bool) -> None:
        super().__init__()
        self.crop = crop
        for level, width in enumerate(widths, 1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(width, features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{level}", Fusion(features, lateral=level < 4))

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
