"""Any4D after its image encoder: the trunk that views share, the two dense heads, the pose head, the scale head.

Parameters have the names of the public checkpoint. There, some parts occur under a second name (`dense_head.0` is
`dpt_feature_head`); here each occurs once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.models.dpt import Pyramid, in_chunks, resized, resizer
from vggrpo.models.recompute import recomputed
from vggrpo.models.vit_layers import Attention, Mlp


class TrunkBlock(nn.Module):
    """Pre-norm transformer block, without position embedding, without LayerScale."""

    recompute = False

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, 1e-6), Attention(dim, heads, qk_norm=False)
        self.norm2, self.mlp = nn.LayerNorm(dim, 1e-6), Mlp(dim)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return recomputed(self, self._layers, x)

    def _layers(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    """Even blocks attend across all views and the scale token, odd blocks within each view, without that token.

    The only mark of position is a constant on the tokens of view 0, which anchors the scene.
    """

    def __init__(self, source_dim: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.proj_embed = nn.Linear(source_dim, dim)
        self.self_attention_blocks = nn.ModuleList(TrunkBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, 1e-6)
        # Sine and cosine of position 0, channel by channel.
        self.register_buffer("view_pos_table", torch.tensor([0.0, 1.0]).repeat(dim // 2)[None])

    def forward(
        self, tokens: Float[Tensor, "B S N C"], scale: Float[Tensor, " C"], hooks: Sequence[int]
    ) -> tuple[list[Float[Tensor, "B S N D"]], Float[Tensor, "B D"]]:
        """Normalised tokens after the blocks in `hooks` and after the last one, and the scale token after it."""
        b, s, n, _ = tokens.shape
        x = self.proj_embed(tokens)
        x = torch.cat([x[:, :1] + self.view_pos_table, x[:, 1:]], 1).flatten(1, 2)  # (B, S N, D)
        x = torch.cat([x, self.proj_embed(scale).expand(b, 1, -1)], 1)
        taken = []
        for index, block in enumerate(self.self_attention_blocks):
            if self.across_views(index):
                x = block(x)
            else:
                views = block(x[:, :-1].reshape(b * s, n, -1)).view(b, s * n, -1)
                x = torch.cat([views, x[:, -1:]], 1)
            if index in hooks:
                taken.append(self.norm(x)[:, :-1].unflatten(1, (s, n)))
        x = self.norm(x)
        return [*taken, x[:, :-1].unflatten(1, (s, n))], x[:, -1]

    @staticmethod
    def across_views(index: int) -> bool:
        """Whether block `index` sees all views at once."""
        return index % 2 == 0


class FeatureHead(nn.Module):
    """Tokens of four depths to one map of `features` channels, eight times as fine as the patches."""

    recompute = False  # with the regressor behind it, see `dense`

    def __init__(self, dims: Sequence[int], widths: Sequence[int], features: int) -> None:
        super().__init__()
        # The public name of level i's layers is input_process.i.0.
        self.input_process = nn.ModuleList(
            nn.ModuleList([nn.Sequential(nn.Conv2d(dim, width, 1), resizer(level, width))])
            for level, (dim, width) in enumerate(zip(dims, widths, strict=True), 1)
        )
        self.scratch = Pyramid(widths, features, crop=True)

    def forward(self, maps: Sequence[Float[Tensor, "N C h w"]]) -> Float[Tensor, "N F H W"]:
        return self.scratch([process[0](x) for process, x in zip(self.input_process, maps, strict=True)])


class RegressorHead(nn.Module):
    """That map to `channels` numbers a pixel."""

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        half = features // 2
        self.conv1 = nn.Conv2d(features, half, 3, padding=1)
        self.conv2 = nn.Sequential(nn.Conv2d(half, half, 3, padding=1), nn.ReLU(), nn.Conv2d(half, channels, 1))

    def forward(self, x: Float[Tensor, "N F h w"], size: tuple[int, int]) -> Float[Tensor, "N C H W"]:
        return self.conv2(resized(self.conv1(x), size))


def dense(
    features: FeatureHead, regressor: RegressorHead, maps: Sequence[Float[Tensor, "N C h w"]], size: tuple[int, int]
) -> Float[Tensor, "N C H W"]:
    """The two heads one after the other, some views at a time."""
    return in_chunks(lambda part: recomputed(features, lambda part: regressor(features(part), size), part), maps)


class ResidualConvs(nn.Module):
    """Three rectified 1x1 convolutions, added to what came in."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv1, self.res_conv2, self.res_conv3 = (nn.Conv2d(dim, dim, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.res_conv3(F.relu(self.res_conv2(F.relu(self.res_conv1(x))))))


class PoseHead(nn.Module):
    """Patch tokens of one view to its translation (3) and quaternion (x, y, z, w), not normalised."""

    recompute = False

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        width = 4 * patch**2
        self.proj = nn.Conv2d(dim, width, 1)
        self.res_conv = nn.ModuleList(ResidualConvs(width) for _ in range(2))
        self.more_mlps = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.fc_t, self.fc_rot = nn.Linear(width, 3), nn.Linear(width, 4)

    def forward(self, x: Float[Tensor, "N D h w"]) -> Float[Tensor, "N 7"]:
        return recomputed(self, self._layers, x)

    def _layers(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        for block in self.res_conv:
            x = block(x)
        x = self.more_mlps(x.mean((-2, -1)))
        return torch.cat([self.fc_t(x), self.fc_rot(x)], -1)


class ScaleHead(nn.Module):
    """The scale token to the logarithm of metres a unit."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()) for _ in range(2))
        self.output_proj = nn.Linear(hidden, 1)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        x = self.proj(x)
        for layer in self.mlp:
            x = layer(x)
        return self.output_proj(x)[:, 0]
