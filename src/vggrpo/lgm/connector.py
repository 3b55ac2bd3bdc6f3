"""The connector `S_psi`: one 3D convolution from video latents to the tokens of a geometry network.

See METHOD section 1.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

KERNEL, PADDING = 5, 2
ViewRate = Literal["latent", "frame"]


def at_view_rate(
    latents: Float[Tensor, "B C T H W"], view_rate: ViewRate, temporal_stride: int
) -> Float[Tensor, "B C S H W"]:
    """One latent a view: the latent frames themselves, or interpolated in time to one per RGB frame.

    A video VAE encodes frame 0 alone and then groups of `temporal_stride`, so latent frame k ends at RGB frame
    k * stride.
    """
    if view_rate == "latent":
        return latents
    frames = (latents.shape[2] - 1) * temporal_stride + 1
    return F.interpolate(latents, size=(frames, *latents.shape[-2:]), mode="trilinear", align_corners=True)


class Connector(nn.Module):
    """`Conv3d(C -> d, 5x5x5, stride (1, s, s), padding 2)`.

    s = 2 where the VAE compresses space by 8 and a token is 16 pixels. Views before the first and after the last are
    zeros; `forward` leaves their products out (a quarter of all for five views), and `self.conv` is the reference.
    """

    def __init__(self, channels: int, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, dim, KERNEL, (1, stride, stride), PADDING)

    def forward(self, latents: Float[Tensor, "B C S H W"]) -> Float[Tensor, "B D S h w"]:
        views = latents.shape[2]
        first = self._views(latents, 0, min(PADDING, views))
        last = self._views(latents, max(views - PADDING, PADDING), views)
        inner = [self._convolved(latents, slice(None))] if views >= KERNEL else []
        return torch.cat([*first, *inner, *last], 2)

    def _views(self, latents: Tensor, low: int, high: int) -> list[Tensor]:
        """Outputs `low` to `high`, one by one, each from the views that there are under its kernel."""
        views, out = latents.shape[2], []
        for at in range(low, high):
            under = slice(max(at - PADDING, 0), min(at + PADDING + 1, views))
            taps = slice(under.start - at + PADDING, under.stop - at + PADDING)
            out.append(self._convolved(latents[:, :, under], taps))
        return out

    def _convolved(self, latents: Tensor, taps: slice) -> Tensor:
        conv = self.conv
        return F.conv3d(latents, conv.weight[:, :, taps], conv.bias, conv.stride, (0, PADDING, PADDING))
