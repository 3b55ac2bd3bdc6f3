"""A feed-forward geometry network of the VGGT family; its small configurations are the embedded teacher and the judge.

Views of a clip -> patch tokens (+ one camera token and registers a view) -> residual 3D convolutions (optional) ->
pairs of frame-wise and global attention -> a camera head on the camera tokens and a dense head on the patch tokens. The
dense head gives inverse depth, confidence, scene flow, and logits of the dynamic and subject masks.

Inside, cameras are world2cam with quaternions (VGGT's pose encoding: translation, xyzw, field of view); everything that
leaves this file follows `GeometryPrediction`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.geometry.se3 import anchor_cameras, invert_se3
from vggrpo.models.pretrained import build, read_config, read_weights, reading, write_pretrained
from vggrpo.models.vggt_layers import ConvBlock, ConvStem, DenseHead, PatchStem
from vggrpo.models.vit_layers import Block, rope_tables

# Channels of the dense head.
_INVERSE_DEPTH, _CONF, _FLOW, _DYNAMIC, _SUBJECT = 0, 1, slice(2, 5), 5, 6
_CHANNELS = 7
_FLOW_SCALE = 0.1


class VGGTConfig(BaseModel):
    """Sizes of one network."""

    model_config = ConfigDict(extra="forbid")
    dim: int = Field(192, ge=16, description="token width")
    heads: int = Field(6, ge=1)
    conv_layers: int = Field(3, ge=0, description="residual 3D convolutions before attention")
    pairs: int = Field(4, ge=1, description="pairs of frame and global attention blocks")
    registers: int = Field(2, ge=0, description="register tokens a view")
    patch_embed: Literal["conv", "patch"] = Field(
        "conv", description="stem: strided convolutions, or one linear map a patch"
    )
    stem_blocks: int = Field(0, ge=0, description="residual blocks after each of the stem's first two convolutions")
    patch: int = Field(8, ge=2, description="pixels a token")
    mlp_ratio: float = Field(3.0, gt=0)
    rope_base: float = Field(100.0, gt=1)
    head_features: int = Field(48, ge=8)
    head_detail: bool = Field(False, description="the dense head reads what lies within a token, not between tokens")
    hooks: tuple[int, ...] = Field((2, 4), description="number of pairs after which the dense head reads tokens")
    frame_stride: int = Field(4, ge=1, description="RGB frames between the views it was trained on")
    dynamic_threshold: float = Field(0.5, gt=0, lt=1, description="probability above which a pixel counts as moving")


class VGGT(nn.Module):
    """See the module's docstring. Layers: 0 (after the stem), then convolutions, then pairs of attention."""

    model_type: ClassVar[str] = "vggt"

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.stem = ConvStem(c.dim, c.stem_blocks) if c.patch_embed == "conv" else PatchStem(c.dim, c.patch)
        self.convs = nn.ModuleList(ConvBlock(c.dim) for _ in range(c.conv_layers))
        # Index 0: the first view, which anchors the world; index 1: all others.
        self.special = nn.Parameter(0.02 * torch.randn(2, 1 + c.registers, c.dim))
        self.frame_blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_ratio) for _ in range(c.pairs))
        self.global_blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_ratio) for _ in range(c.pairs))
        self.camera_norm = nn.LayerNorm(2 * c.dim)
        self.camera_head = nn.Sequential(nn.Linear(2 * c.dim, 2 * c.dim), nn.GELU(), nn.Linear(2 * c.dim, 9))
        self.dense_head = DenseHead(c.dim, len(c.hooks), c.head_features, _CHANNELS, c.head_detail)

    # --- the protocol `GeometryModel` ---------------------------------------------------------------------------------

    def forward(self, frames: Float[Tensor, "B S 3 H W"]) -> GeometryPrediction:
        """Geometry of S ordered views with values in [0, 1]; height and width must be multiples of the patch."""
        return self.predict(frames)[0]

    def stitch_points(self) -> list[int]:
        """Layers up to which nothing that the heads read has been computed yet."""
        return list(range(self.config.conv_layers + min(self.config.hooks)))

    def embed_dim(self, layer: int) -> int:
        """Width of the tokens after `layer`: the same everywhere."""
        return self.config.dim

    def tap(self, frames: Float[Tensor, "B S 3 H W"], layer: int) -> Float[Tensor, "B S N D"]:
        """All tokens after `layer`; before the attention, the special tokens are their parameters."""
        self._check_frames(frames)
        x = self.stem(frames)
        for conv in self.convs[:layer]:
            x = conv(x)
        tokens = self._add_special(x)
        grid = (x.shape[-2], x.shape[-1])
        for pair in range(max(0, layer - self.config.conv_layers)):
            tokens = self._pair(tokens, pair, grid)
        return tokens

    def resume(self, tokens: Float[Tensor, "B S N D"], layer: int, grid: tuple[int, int]) -> GeometryPrediction:
        """Geometry from the tokens after `layer`; maps have `patch` pixels a token."""
        return self.resume_raw(tokens, layer, grid)[0]

    def special_tokens(self, layer: int) -> Float[Tensor, "2 M D"]:
        """Special tokens of the first view and of the others: their parameters, which pairs of attention change."""
        return self.special

    def lora_targets(self) -> list[str]:
        """Linear layers of the trunk and the heads."""
        return ["qkv", "proj", "fc1", "fc2", "camera_head.0", "camera_head.2"]

    def image_size_for(self, video_size: tuple[int, int]) -> tuple[int, int]:
        """This network sees a video at its own size."""
        return video_size

    # --- inside ---

    def predict(self, frames: Float[Tensor, "B S 3 H W"]) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """`forward` with the raw outputs that a loss needs."""
        grid = (frames.shape[-2] // self.config.patch, frames.shape[-1] // self.config.patch)
        return self.resume_raw(self.tap(frames, 0), 0, grid)

    def resume_raw(
        self, tokens: Float[Tensor, "B S N D"], layer: int, grid: tuple[int, int]
    ) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """`resume` with the raw outputs: `conf_logit`, `dynamic_logit`, `subject_logit` (B, S, H, W)."""
        b, s = tokens.shape[:2]
        special = 1 + self.config.registers
        x = tokens[:, :, special:].transpose(2, 3).reshape(b, s, -1, *grid).transpose(1, 2)
        for conv in self.convs[layer:]:
            x = conv(x)
        tokens = torch.cat([tokens[:, :, :special], x.flatten(3).permute(0, 2, 3, 1)], 2)
        maps = []
        for pair in range(max(0, layer - self.config.conv_layers), self.config.pairs):
            tokens = self._pair(tokens, pair, grid)
            if pair + 1 in self.config.hooks:
                maps.append(tokens[:, :, special:].flatten(0, 1).transpose(1, 2).unflatten(2, grid))
        pose = self._pose(tokens, special)
        size = (grid[0] * self.config.patch, grid[1] * self.config.patch)
        dense = self.dense_head(maps, size).view(b, s, _CHANNELS, *size)
        with torch.autocast(dense.device.type, enabled=False):  # matrices of poses are multiplied in full precision
            return self._assemble(pose, dense.float())

    def _pair(self, tokens: Tensor, pair: int, grid: tuple[int, int]) -> Tensor:
        """Attention within each view, then across all views; tokens (B, S, N, D)."""
        b, s, n, d = tokens.shape
        head_dim = d // self.config.heads
        cos, sin = (
            x.to(tokens.device) for x in rope_tables(grid, n - grid[0] * grid[1], head_dim, self.config.rope_base)
        )
        tokens = self.frame_blocks[pair](tokens.reshape(b * s, n, d), (cos, sin)).view(b, s, n, d)
        every = (cos.repeat(s, 1), sin.repeat(s, 1))
        return self.global_blocks[pair](tokens.reshape(b, s * n, d), every).view(b, s, n, d)

    def _add_special(self, x: Float[Tensor, "B D S h w"]) -> Float[Tensor, "B S N D"]:
        patches = x.flatten(3).permute(0, 2, 3, 1)
        others = self.special[1:].expand(patches.shape[1] - 1, -1, -1)
        special = torch.cat([self.special[:1], others]).to(patches.dtype).expand(len(patches), -1, -1, -1)
        return torch.cat([special, patches], 2)

    def _pose(self, tokens: Tensor, special: int) -> Float[Tensor, "B S 9"]:
        """Pose encoding of each view from its camera token and the mean of its patch tokens."""
        pooled = torch.cat([tokens[:, :, 0], tokens[:, :, special:].mean(2)], -1)
        with torch.autocast(pooled.device.type, enabled=False):  # a degree is 0.017: bf16 would round poses away
            return self.camera_head(self.camera_norm(pooled.float()))

    def _assemble(self, pose: Tensor, dense: Tensor) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        height, width = dense.shape[-2:]
        cam2world = anchor_cameras(invert_se3(decode_extrinsics(pose)))
        intrinsics = decode_intrinsics(pose, height, width)
        # Near 1 at the start: scenes are scaled so that the first view's median depth is 1.
        depth = 1 / (F.softplus(dense[:, :, _INVERSE_DEPTH] + 0.5413) + 1e-3)
        flow = (_FLOW_SCALE * dense[:, :, _FLOW]).permute(0, 1, 3, 4, 2)
        flow = torch.cat([flow[:, :-1], torch.zeros_like(flow[:, -1:])], 1)
        raw = {
            "conf_logit": dense[:, :, _CONF],
            "dynamic_logit": dense[:, :, _DYNAMIC],
            "subject_logit": dense[:, :, _SUBJECT],
        }
        level = self.config.dynamic_threshold
        prediction = GeometryPrediction.from_depth(
            cam2world,
            intrinsics,
            depth,
            conf=torch.sigmoid(raw["conf_logit"]),
            scene_flow=flow,
            dynamic_mask=torch.sigmoid(raw["dynamic_logit"]) > level,
            subject_mask=torch.sigmoid(raw["subject_logit"]) > level,
            frame_index=torch.arange(depth.shape[1], device=depth.device) * self.config.frame_stride,
        )
        return prediction, raw

    def _check_frames(self, frames: Tensor) -> None:
        if frames.ndim != 5 or frames.shape[2] != 3:
            raise ValueError(f"frames: expected shape (B, S, 3, H, W), got {tuple(frames.shape)}")
        patch = self.config.patch
        if frames.shape[-1] % patch or frames.shape[-2] % patch:
            raise UserError(
                f"frames of {frames.shape[-2]}x{frames.shape[-1]} pixels do not divide into patches of "
                f"{patch}; resize them"
            )

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
        """See `GeometryModel`."""
        values = VGGTConfig(**{name: value for name, value in config.items() if name != "model_type"})
        return build(lambda: cls(values), state)


def decode_extrinsics(pose: Float[Tensor, "B S 9"]) -> Float[Tensor, "B S 4 4"]:
    """world2cam from VGGT's pose encoding: translation (3), quaternion xyzw around the identity (4), fields of view."""
    x, y, z, w = F.normalize(pose[..., 3:7] + pose.new_tensor([0.0, 0.0, 0.0, 1.0]), dim=-1).unbind(-1)
    rotation = torch.stack(
        [
            1 - 2 * (y * y + z * z),
            2 * (x * y - z * w),
            2 * (x * z + y * w),
            2 * (x * y + z * w),
            1 - 2 * (x * x + z * z),
            2 * (y * z - x * w),
            2 * (x * z - y * w),
            2 * (y * z + x * w),
            1 - 2 * (x * x + y * y),
        ],
        -1,
    ).unflatten(-1, (3, 3))
    top = torch.cat([rotation, pose[..., :3, None]], -1)
    bottom = pose.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*pose.shape[:-1], 1, 4)
    return torch.cat([top, bottom], -2)


def decode_intrinsics(pose: Float[Tensor, "B S 9"], height: int, width: int) -> Float[Tensor, "B S 3 3"]:
    """Pinhole intrinsics in pixels, principal point in the middle; fields of view around one radian."""
    fov = 1.0 + 0.5 * torch.tanh(pose[..., 7:9])
    out = torch.zeros(*pose.shape[:-1], 3, 3, device=pose.device)
    out[..., 1, 1] = height / 2 / torch.tan(fov[..., 0] / 2)
    out[..., 0, 0] = width / 2 / torch.tan(fov[..., 1] / 2)
    out[..., 0, 2], out[..., 1, 2], out[..., 2, 2] = width / 2, height / 2, 1.0
    return out
