"""VGGT, a feed-forward geometry network: one class for the public model and for the embedded teacher and judge.

Views of a clip -> tokens of patches (+ one camera token and registers a view) -> pairs of frame-wise and global
attention -> cameras and maps. Two choices in the config separate the sizes:

- what is before the attention: DINOv2 (the public model), or a light stem and residual 3D convolutions, because motion
  between neighbouring views is most of what a small network can learn from;
- the decoder: `dpt` has the public heads (cameras by refinement, depth and confidence by a dense prediction
  transformer), `light` reads pose, inverse depth, confidence, scene flow and two masks with a few layers.

Public weights load through `vggrpo.models.vggt_official`. Inside, cameras are world2cam with quaternions (VGGT's pose
encoding: translation, xyzw, fields of view); everything that leaves this file follows `GeometryPrediction`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from vggrpo.geometry import GeometryPrediction
from vggrpo.models.border import check_frames, full_precision, patch_image_size
from vggrpo.models.dinov2 import DinoConfig, DinoV2
from vggrpo.models.dpt import MapHead
from vggrpo.models.pretrained import build, read_config, read_weights, reading, write_pretrained
from vggrpo.models.vggt_camera import CameraHead
from vggrpo.models.vggt_decode import LIGHT_CHANNELS, dpt_prediction, light_prediction
from vggrpo.models.vggt_layers import ConvBlock, ConvStem, DenseHead, PatchStem
from vggrpo.models.vggt_official import is_official, official_config, official_state
from vggrpo.models.vit_layers import Block, rope_tables


class VGGTConfig(BaseModel):
    """Sizes of one network."""

    model_config = ConfigDict(extra="forbid")
    dim: int = Field(192, ge=16, description="token width")
    heads: int = Field(6, ge=1)
    conv_layers: int = Field(3, ge=0, description="residual 3D convolutions before attention; 0 with dinov2")
    pairs: int = Field(4, ge=1, description="pairs of frame and global attention blocks")
    registers: int = Field(2, ge=0, description="register tokens a view")
    patch_embed: Literal["conv", "patch", "dinov2"] = Field(
        "conv", description="stem: strided convolutions, one linear map a patch, or DINOv2 with the same registers"
    )
    stem_blocks: int = Field(0, ge=0, description="residual blocks after each of the stem's first two convolutions")
    stem_displacement: bool = Field(
        False, description="the conv stem sees how far everything is displaced in neighbouring views"
    )
    encoder_layers: int = Field(24, ge=1, description="blocks of DINOv2")
    position_grid: int = Field(37, ge=1, description="side of the square of patches that DINOv2 learned positions on")
    patch: int = Field(8, ge=2, description="pixels a token")
    mlp_ratio: float = Field(3.0, gt=0)
    rope_base: float = Field(100.0, gt=1)
    decoder: Literal["light", "dpt"] = Field("light", description="heads: see the module")
    head_features: int = Field(48, ge=8)
    head_detail: bool = Field(False, description="the light dense head reads inside tokens, not only between them")
    head_widths: tuple[int, int, int, int] = Field(
        (256, 512, 1024, 1024), description="channels of the four levels of a DPT, the finest first"
    )
    hooks: tuple[int, ...] = Field((2, 4), description="number of pairs after which the dense heads read tokens")
    points: Literal["depth", "head"] = Field(
        "depth", description="points: unprojected depth, or the DPT's own head, with that head's confidence"
    )
    frame_stride: int = Field(4, ge=1, description="RGB frames between the views it was trained on")
    dynamic_threshold: float = Field(0.5, gt=0, lt=1, description="probability above which a pixel counts as moving")

    @model_validator(mode="after")
    def _fits_together(self) -> VGGTConfig:
        if self.patch_embed == "dinov2" and self.conv_layers:
            raise ValueError(f"conv_layers is {self.conv_layers}; DINOv2 needs none, set it to 0")
        if self.patch_embed == "conv" and self.patch != ConvStem.patch:
            raise ValueError(f"patch is {self.patch}; the conv stem makes tokens of {ConvStem.patch} pixels")
        if self.decoder == "dpt" and (len(self.hooks) != 4 or self.hooks[-1] != self.pairs):
            raise ValueError(
                f"hooks are {self.hooks}; a DPT reads four layers, the last one after all {self.pairs} pairs"
            )
        if self.points == "head" and self.decoder != "dpt":
            raise ValueError("points is 'head', but the light decoder has no head of points; set it to 'depth'")
        return self


class VGGT(nn.Module):
    """See the module's docstring.

    Layers: those of the encoder (0: what enters it), then the pairs of attention. The last layer of the encoder stands
    for what enters the first pair: special tokens of the trunk and, with DINOv2, normalised patches. What enters a
    stem of strided convolutions is the picture itself, so layer 0 has its patches, pixel by pixel, as tokens: linear in
    the picture as DINOv2's are.
    """

    model_type: ClassVar[str] = "vggt"

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.stem = _stem(c)
        self.convs = nn.ModuleList(ConvBlock(c.dim) for _ in range(c.conv_layers))
        # Index 0: the first view, which anchors the world; index 1: all others.
        self.special = nn.Parameter(0.02 * torch.randn(2, 1 + c.registers, c.dim))
        self.frame_blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_ratio) for _ in range(c.pairs))
        self.global_blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_ratio) for _ in range(c.pairs))
        if c.decoder == "light":
            self.camera_norm = nn.LayerNorm(2 * c.dim)
            self.camera_head = nn.Sequential(nn.Linear(2 * c.dim, 2 * c.dim), nn.GELU(), nn.Linear(2 * c.dim, 9))
            self.dense_head = DenseHead(c.dim, len(c.hooks), c.head_features, LIGHT_CHANNELS, c.head_detail)
        else:
            self.camera_head = CameraHead(2 * c.dim, c.heads)
            self.depth_head = MapHead(2 * c.dim, 2, c.head_features, c.head_widths, rectified=True)
            if c.points == "head":
                self.point_head = MapHead(2 * c.dim, 4, c.head_features, c.head_widths, rectified=True)

    # --- the protocol `GeometryModel` ---------------------------------------------------------------------------------

    def forward(self, frames: Float[Tensor, "B S 3 H W"]) -> GeometryPrediction:
        """Geometry of S ordered views with values in [0, 1]; height and width must be multiples of the patch."""
        return self.predict(frames)[0]

    def stitch_points(self) -> list[int]:
        """Layers up to which nothing that the heads read has been computed yet."""
        return list(range(self.encoder_layers + min(self.config.hooks)))

    def embed_dim(self, layer: int) -> int:
        """Width of the tokens after `layer`: the same everywhere, but for pixels."""
        return 3 * self.config.patch**2 if self._of_pixels(layer) else self.config.dim

    def walk(self, frames: Float[Tensor, "B S 3 H W"]) -> Iterator[Float[Tensor, "B S N D"]]:
        """All tokens after layer 0, 1, ...; before attention, the special tokens are parameters of stem or trunk."""
        check_frames(frames, self.config.patch)
        grid = self._grid(frames)
        if isinstance(self.stem, DinoV2):
            tokens = self.stem.embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        elif self._of_pixels(0):
            tokens = F.pixel_unshuffle(frames * 2 - 1, self.config.patch).flatten(3).transpose(2, 3)
        else:
            tokens = self._add_special(self.stem(frames).flatten(3).permute(0, 2, 3, 1))
        yield tokens
        for layer in self.stitch_points()[:-1]:
            pair = layer - self.encoder_layers
            tokens = self._encode(tokens, layer, layer + 1, grid) if pair < 0 else self._pair(tokens, pair, grid)[1]
            yield tokens

    def tap(self, frames: Float[Tensor, "B S 3 H W"], layer: int) -> Float[Tensor, "B S N D"]:
        """All tokens after `layer`, a stitch point."""
        return next(islice(self.walk(frames), layer, None))

    def resume(self, tokens: Float[Tensor, "B S N D"], layer: int, grid: tuple[int, int]) -> GeometryPrediction:
        """Geometry from the tokens after `layer`; maps have `patch` pixels a token."""
        return self.resume_raw(tokens, layer, grid)[0]

    def special_tokens(self, layer: int) -> Float[Tensor, "2 M D"]:
        """Special tokens of the first view and of the others: parameters, which attention changes."""
        if isinstance(self.stem, DinoV2) and layer < self.encoder_layers:
            return self.stem.special_tokens().expand(2, -1, -1)
        if self._of_pixels(layer):
            return self.special.new_zeros(2, 0, self.embed_dim(layer))
        return self.special

    def lora_targets(self) -> list[str]:
        """Linear layers of the blocks and of the camera head; convolutions before and after them, or what brings tokens
        into a DPT."""
        if self.config.decoder == "light":
            dense = [f"dense_head.{name}" for name in ("fuse", "up1", "up2")]
            return ["conv", "point", "attn.qkv", "attn.proj", "fc1", "fc2", "camera_head.0", "camera_head.2", *dense]
        heads = ["embed_pose", "poseLN_modulation.1", "pose_branch.fc1", "pose_branch.fc2"]
        return ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", *heads, *(f"projects.{level}" for level in range(4))]

    def image_size_for(self, video_size: tuple[int, int]) -> tuple[int, int]:
        """With DINOv2 the size that has the video's own tokens (480x832 is seen at 420x728), else the video's own."""
        return patch_image_size(video_size, self.config.patch) if self.config.patch_embed == "dinov2" else video_size

    # --- inside ---

    @property
    def encoder_layers(self) -> int:
        """Layers before the first pair."""
        if isinstance(self.stem, DinoV2):
            return len(self.stem.blocks)
        return isinstance(self.stem, ConvStem) + len(self.convs)

    def _of_pixels(self, layer: int) -> bool:
        """Whether the tokens after `layer` are the picture's own patches."""
        return layer == 0 and isinstance(self.stem, ConvStem)

    def predict(self, frames: Float[Tensor, "B S 3 H W"]) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """`forward` with the raw outputs that a loss needs."""
        return self.resume_raw(self.tap(frames, 0), 0, self._grid(frames))

    def resume_raw(
        self, tokens: Float[Tensor, "B S N D"], layer: int, grid: tuple[int, int]
    ) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """`resume` with the raw outputs (B, S, H, W): `conf_logit`, of the light decoder also `dynamic_logit` and
        `subject_logit`."""
        first = self.encoder_layers
        tokens = self._encode(tokens, layer, first, grid)
        hooked = []
        for pair in range(max(0, layer - first), self.config.pairs):
            within, tokens = self._pair(tokens, pair, grid)
            if pair + 1 in self.config.hooks:
                hooked.append(tokens if self.config.decoder == "light" else torch.cat([within, tokens], -1))
        return self._light(tokens, hooked, grid) if self.config.decoder == "light" else self._dpt(hooked, grid)

    def _encode(self, tokens: Float[Tensor, "B S N D"], layer: int, until: int, grid: tuple[int, int]) -> Tensor:
        """Tokens after layer `until` of the encoder from those after `layer`; unchanged where that is past it."""
        if layer >= self.encoder_layers:
            return tokens
        b, s = tokens.shape[:2]
        if isinstance(self.stem, DinoV2):
            x = tokens.flatten(0, 1)
            for block in self.stem.blocks[layer:until]:
                x = block(x)
            if until == self.encoder_layers:
                return self._add_special(self.stem.norm(x)[:, self.stem.special :].unflatten(0, (b, s)))
            return x.unflatten(0, (b, s))
        if self._of_pixels(layer):
            pictures = F.pixel_shuffle(tokens.transpose(2, 3).unflatten(3, grid), self.config.patch)
            tokens = self._add_special(self.stem((pictures + 1) / 2).flatten(3).permute(0, 2, 3, 1))
        special, before = 1 + self.config.registers, self.encoder_layers - len(self.convs)
        x = tokens[:, :, special:].transpose(2, 3).reshape(b, s, -1, *grid).transpose(1, 2)
        for conv in self.convs[max(0, layer - before) : until - before]:
            x = conv(x)
        return torch.cat([tokens[:, :, :special], x.flatten(3).permute(0, 2, 3, 1)], 2)

    def _pair(self, tokens: Tensor, pair: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Attention within each view, then across all views; tokens (B, S, N, D) after each of the two."""
        b, s, n, d = tokens.shape
        head_dim = d // self.config.heads
        cos, sin = (
            x.to(tokens.device) for x in rope_tables(grid, n - grid[0] * grid[1], head_dim, self.config.rope_base)
        )
        within = self.frame_blocks[pair](tokens.reshape(b * s, n, d), (cos, sin)).view(b, s, n, d)
        every = (cos.repeat(s, 1), sin.repeat(s, 1))
        return within, self.global_blocks[pair](within.reshape(b, s * n, d), every).view(b, s, n, d)

    def _add_special(self, patches: Float[Tensor, "B S M D"]) -> Float[Tensor, "B S N D"]:
        others = self.special[1:].expand(patches.shape[1] - 1, -1, -1)
        special = torch.cat([self.special[:1], others]).to(patches.dtype).expand(len(patches), -1, -1, -1)
        return torch.cat([special, patches], 2)

    def _light(
        self, tokens: Tensor, hooked: list[Tensor], grid: tuple[int, int]
    ) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """The light decoder: pose from the camera token and the mean patch token of each view."""
        special, size = 1 + self.config.registers, self._pixels(grid)
        maps = [x[:, :, special:].flatten(0, 1).transpose(1, 2).unflatten(2, grid) for x in hooked]
        pooled = torch.cat([tokens[:, :, 0], tokens[:, :, special:].mean(2)], -1)
        with full_precision(pooled.device):
            pose = self.camera_head(self.camera_norm(pooled.float()))
        dense = self.dense_head(maps, size).unflatten(0, tokens.shape[:2])
        with full_precision(dense.device):
            return light_prediction(pose, dense.float(), self._frame_index(dense), self.config.dynamic_threshold)

    def _dpt(self, hooked: list[Tensor], grid: tuple[int, int]) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """The public decoder, in full precision throughout."""
        size, special = self._pixels(grid), 1 + self.config.registers
        with full_precision(hooked[0].device):
            pose = self.camera_head(hooked[-1][:, :, 0].float())
            maps = [x[:, :, special:].float().flatten(0, 1).transpose(1, 2).unflatten(2, grid) for x in hooked]
            dense = self.depth_head(maps, size).unflatten(0, pose.shape[:2])
            own = self.point_head(maps, size).unflatten(0, pose.shape[:2]) if self.config.points == "head" else None
            return dpt_prediction(pose, dense, self._frame_index(dense), own)

    def _grid(self, frames: Tensor) -> tuple[int, int]:
        return frames.shape[-2] // self.config.patch, frames.shape[-1] // self.config.patch

    def _pixels(self, grid: tuple[int, int]) -> tuple[int, int]:
        return grid[0] * self.config.patch, grid[1] * self.config.patch

    def _frame_index(self, dense: Float[Tensor, "B S C H W"]) -> Tensor:
        return torch.arange(dense.shape[1], device=dense.device) * self.config.frame_stride

    # --- files ---

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `config.json` and `model.safetensors`."""
        write_pretrained(
            directory, {"model_type": self.model_type} | self.config.model_dump(), self.state_dict(), dtype
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> VGGT:
        """Read what `save_pretrained` wrote.

        Raises:
            UserError: missing directory, foreign config or weights that do not fit it.
        """
        with reading("geometry model", directory, "download or train it again"):
            return cls.from_checkpoint(read_config(Path(directory)), read_weights(Path(directory)))

    @classmethod
    def from_checkpoint(cls, config: dict[str, Any], state: dict[str, Tensor]) -> VGGT:
        """See `GeometryModel`; `config` may choose `points` for public weights, whose sizes are read off them."""
        if is_official(state):
            values = VGGTConfig(**official_config(state), points=config.get("points", "depth"))
            state = official_state(state, values.points == "head")
        else:
            values = VGGTConfig(**{name: value for name, value in config.items() if name != "model_type"})
        return build(lambda: cls(values), state)


def _stem(c: VGGTConfig) -> nn.Module:
    if c.patch_embed == "conv":
        return ConvStem(c.dim, c.stem_blocks, c.stem_displacement)
    if c.patch_embed == "patch":
        return PatchStem(c.dim, c.patch)
    return DinoV2(
        DinoConfig(
            dim=c.dim,
            depth=c.encoder_layers,
            heads=c.heads,
            registers=c.registers,
            patch=c.patch,
            position_grid=c.position_grid,
            antialias=True,
            offset=0.0,
        )
    )
