"""Any4D (arXiv 2512.10935), the metric 4D geometry model of the paper: poses, depth, and scene flow of dynamic scenes.

DINOv2-L/14 for each frame -> norm -> a trunk of 24 blocks that attend across views and within them by turns, with one
token for the scale of the scene -> two dense heads (rays, distance, confidence, ambiguity; scene flow), a pose head
and a scale head. Written after the public code (github.com/Any-4D/Any4D with `uniception`) and verified against it
with every parameter redrawn; **untested on real weights**, whose licence its authors do not state.

What the public model can take beside images (rays, depth, poses, flow) is left out. Its code draws random numbers to
decide what to drop even when nothing is given; with nothing given the result is the images' features, which go on alone
here. The dense heads read what the image encoder puts out, so the network can be cut anywhere in the encoder and not
behind it.

Inside: distance along rays, cam2world with quaternions xyzw, a first pose only near the identity, flow of view 0's
points. `any4d_geometry` turns all of it into `GeometryPrediction`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vggrpo.geometry import GeometryPrediction
from vggrpo.models.any4d_geometry import to_prediction
from vggrpo.models.any4d_layers import FeatureHead, PoseHead, RegressorHead, ScaleHead, Trunk, dense
from vggrpo.models.border import check_frames, full_precision, patch_image_size, rigid, rotation_from_xyzw
from vggrpo.models.dinov2 import DinoConfig, DinoV2
from vggrpo.models.pretrained import build, write_pretrained

# Channels of the dense head.
_RAYS, _LOG_DISTANCE, _CONF, _UNAMBIGUOUS = slice(0, 3), 3, 4, 5
_CHANNELS = 6

# In the public checkpoint and not here: second names of parts, and encoders of inputs that are never given.
_LEFT_OUT = re.compile(
    r"^(scene_flow_)?dense_head\.|\.scratch\.layer_rn\.|\.input_process\.\d\.1\."
    r"|^(ray_dirs|depth|depth_scale|cam_rot|cam_trans|cam_trans_scale|scene_flow)_encoder\."
)


class Any4DConfig(BaseModel):
    """Sizes of one network (by default the public one) and how its flow becomes masks."""

    model_config = ConfigDict(extra="forbid")
    encoder: DinoConfig = Field(default_factory=lambda: DinoConfig.of_size("large"), description="image encoder")
    dim: int = Field(768, ge=2, multiple_of=2, description="token width of the trunk")
    heads: int = Field(12, ge=1, description="attention heads of the trunk")
    layers: int = Field(24, ge=1, description="blocks of the trunk")
    hooks: tuple[int, int] = Field((11, 17), description="trunk blocks that the dense heads read, beside the last one")
    widths: tuple[int, int, int, int] = Field((96, 192, 384, 768), description="channels of the dense heads' levels")
    features: int = Field(256, ge=2, description="channels of the dense heads' fused map")
    scale_hidden: int = Field(196, ge=1, description="hidden width of the scale head")
    motion_threshold: float = Field(
        0.03, gt=0, description="how far a point must get to count as moving, in median depths of view 0"
    )
    hidden_tolerance: float = Field(
        0.05, gt=0, lt=1, description="how far behind a view's depth a point of view 0 is still seen, relative"
    )


class Any4D(nn.Module):
    """See the module's docstring. Layers: 0 (patch embeddings), then the blocks of the image encoder."""

    model_type: ClassVar[str] = "any4d"

    def __init__(self, config: Any4DConfig) -> None:
        super().__init__()
        self.config = c = config
        self.encoder = nn.ModuleDict({"model": DinoV2(c.encoder)})
        self.fusion_norm_layer = nn.LayerNorm(c.encoder.dim, 1e-6)
        self.scale_token = nn.Parameter(0.02 * torch.randn(c.encoder.dim))
        self.info_sharing = Trunk(c.encoder.dim, c.dim, c.heads, c.layers)
        dims = (c.encoder.dim, c.dim, c.dim, c.dim)
        self.dpt_feature_head = FeatureHead(dims, c.widths, c.features)
        self.dpt_regressor_head = RegressorHead(c.features, _CHANNELS)
        self.scene_flow_dpt_feature_head = FeatureHead(dims, c.widths, c.features)
        self.scene_flow_dpt_regressor_head = RegressorHead(c.features, 3)
        self.pose_head = PoseHead(c.dim, c.encoder.patch)
        self.scale_head = ScaleHead(c.dim, c.scale_hidden)

    # --- the protocol `GeometryModel` ---------------------------------------------------------------------------------

    def forward(self, frames: Float[Tensor, "B S 3 H W"]) -> GeometryPrediction:
        """Geometry of S ordered views with values in [0, 1]; height and width must be multiples of the patch."""
        return self.predict(frames)[0]

    def predict(self, frames: Float[Tensor, "B S 3 H W"]) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """`forward` with the raw outputs that a loss needs."""
        patch = self.config.encoder.patch
        return self.resume_raw(self.tap(frames, 0), 0, (frames.shape[-2] // patch, frames.shape[-1] // patch))

    def stitch_points(self) -> list[int]:
        """Every layer of the image encoder: the dense heads read its output first."""
        return list(range(self.config.encoder.depth + 1))

    def embed_dim(self, layer: int) -> int:
        """Width of the tokens after `layer`: the same in the whole encoder."""
        return self.config.encoder.dim

    def walk(self, frames: Float[Tensor, "B S 3 H W"]) -> Iterator[Float[Tensor, "B S N D"]]:
        """All tokens after layer 0, 1, ...: the class token, then the patches."""
        check_frames(frames, self.config.encoder.patch)
        x = self._dino.embed(frames.flatten(0, 1))
        yield x.unflatten(0, frames.shape[:2])
        for block in self._dino.blocks:
            x = block(x)
            yield x.unflatten(0, frames.shape[:2])

    def tap(self, frames: Float[Tensor, "B S 3 H W"], layer: int) -> Float[Tensor, "B S N D"]:
        """All tokens after `layer`, a stitch point."""
        return next(islice(self.walk(frames), layer, None))

    def resume(self, tokens: Float[Tensor, "B S N D"], layer: int, grid: tuple[int, int]) -> GeometryPrediction:
        """Geometry from the tokens after `layer`; maps have `patch` pixels a token."""
        return self.resume_raw(tokens, layer, grid)[0]

    def special_tokens(self, layer: int) -> Float[Tensor, "2 M D"]:
        """The class token as it enters layer 0, for the first view and the others alike; layers change it."""
        return self._dino.special_tokens().expand(2, -1, -1)

    def lora_targets(self) -> list[str]:
        """Linear layers of the encoder's and the trunk's blocks, and what the heads end in."""
        heads = ["out_conv", "conv1", "conv2.0", "conv2.2", "more_mlps.0", "more_mlps.2", "fc_t", "fc_rot"]
        return ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "proj_embed", *heads, "output_proj"]

    def image_size_for(self, video_size: tuple[int, int]) -> tuple[int, int]:
        """The size with the video's own token grid: 480x832 is seen at 420x728."""
        return patch_image_size(video_size, self.config.encoder.patch)

    # --- inside ---

    @property
    def _dino(self) -> DinoV2:
        dino = self.encoder["model"]
        assert isinstance(dino, DinoV2)
        return dino

    def resume_raw(
        self, tokens: Float[Tensor, "B S N D"], layer: int, grid: tuple[int, int]
    ) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """`resume` with what a loss needs: `conf_logit` (B, S, H, W) and `flow_from_first` (B, S, H, W, 3).

        The latter says where the points of view 0 are at the time of each view, less where they were: the flow head's
        own output in the world frame. In view 0 that is zero, and the head is not asked.
        """
        shape = tokens.shape[:2]
        x = tokens.flatten(0, 1)
        for block in self._dino.blocks[layer:]:
            x = block(x)
        patches = self._dino.norm(x)[:, self._dino.special :].unflatten(0, shape)
        with full_precision(patches.device):
            encoded = self.fusion_norm_layer(patches.float())
        shared, scale = self.info_sharing(encoded, self.scale_token, self.config.hooks)
        with full_precision(patches.device):  # the public model runs its heads in full precision, too
            maps = [x.float().flatten(0, 1).transpose(1, 2).unflatten(2, grid) for x in (encoded, *shared)]
            return self._assemble(maps, scale.float(), shape)

    def _assemble(
        self, maps: list[Float[Tensor, "N C h w"]], scale_token: Float[Tensor, "B D"], shape: torch.Size
    ) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        patch = self.config.encoder.patch
        size = (patch * maps[0].shape[-2], patch * maps[0].shape[-1])
        out = dense(self.dpt_feature_head, self.dpt_regressor_head, maps, size).unflatten(0, shape)
        later = [x.unflatten(0, shape)[:, 1:].flatten(0, 1) for x in maps]
        flow = dense(self.scene_flow_dpt_feature_head, self.scene_flow_dpt_regressor_head, later, size)
        pose = self.pose_head(maps[-1]).unflatten(0, shape)  # (B, S, 7)
        metres = self.scale_head(scale_token).exp().clamp_min(1e-8)  # (B,)
        cam2world = rigid(rotation_from_xyzw(pose[..., 3:]), pose[..., :3] * metres[:, None, None])
        flow = flow.unflatten(0, (shape[0], shape[1] - 1)).permute(0, 1, 3, 4, 2)
        flow = metres[:, None, None, None, None] * F.pad(flow, (0, 0, 0, 0, 0, 0, 1, 0))
        # The public confidence is 1 + exp(logit); 1 - 1 / that is the sigmoid.
        conf = out[:, :, _CONF].sigmoid() * (out[:, :, _UNAMBIGUOUS] > 0)
        prediction, flow = to_prediction(
            F.normalize(out[:, :, _RAYS], dim=2, eps=1e-8).permute(0, 1, 3, 4, 2),
            metres[:, None, None, None] * out[:, :, _LOG_DISTANCE].exp(),
            conf,
            cam2world,
            flow,
            motion_threshold=self.config.motion_threshold,
            hidden_tolerance=self.config.hidden_tolerance,
        )
        return prediction, {"conf_logit": out[:, :, _CONF], "flow_from_first": flow}

    # --- files ---

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `config.json` and `model.safetensors`."""
        config = {"model_type": self.model_type} | self.config.model_dump()
        write_pretrained(directory, config, self.state_dict(), dtype)

    @classmethod
    def from_checkpoint(cls, config: dict[str, Any], state: dict[str, Tensor]) -> Any4D:
        """See `GeometryModel`. Second names and the encoders of optional inputs are left out."""
        values = Any4DConfig(**{name: value for name, value in config.items() if name != "model_type"})
        return build(lambda: cls(values), {name: v for name, v in state.items() if not _LEFT_OUT.search(name)})
