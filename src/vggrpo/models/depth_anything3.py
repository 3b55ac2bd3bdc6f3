"""Depth Anything 3 (arXiv 2511.10647), small and base: the light geometry model with a free licence (Apache-2.0).

A DINOv2 whose blocks from `turn` on attend across views by turns -> a dense head for depth and confidence, a camera
decoder on the camera tokens. Written after the public code (github.com/ByteDance-Seed/Depth-Anything-3) and verified
against it with every parameter redrawn; **untested on real weights**. The larger models are not free (CC BY-NC 4.0).

The public code moves a view that it likes to the front before views meet; here, as with its option `"first"`, the first
view leads, because the world is anchored to it. Left out: the head of ray maps and the encoder of known cameras.

Cameras come as cam2world (the public code inverts them on its way out), with quaternions xyzw and fields of view; depth
is z-depth in a unit of the clip's own. The model knows static scenes: no flow, no masks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vggrpo.geometry import GeometryPrediction, anchor_cameras
from vggrpo.models.border import (
    check_frames,
    fov_intrinsics,
    full_precision,
    patch_image_size,
    rigid,
    rotation_from_xyzw,
)
from vggrpo.models.depth_anything3_layers import AnyViewDino, CameraDecoder
from vggrpo.models.dinov2 import DinoConfig
from vggrpo.models.dpt import MapHead
from vggrpo.models.pretrained import build, write_pretrained

# Public weights have this before every name; the encoder of known cameras and the head of ray maps are left out.
_PREFIX = "model."
_LEFT_OUT = re.compile(r"^cam_enc\.|^head\.scratch\.\w+_aux\.")
# Width of the token -> channels of the dense head's fused map and of its levels.
_HEADS = {384: (64, (48, 96, 192, 384)), 768: (128, (96, 192, 384, 768))}
_TURN = 4


class DepthAnything3Config(BaseModel):
    """Sizes of one network; `of_size` gives the public ones."""

    model_config = ConfigDict(extra="forbid")
    encoder: DinoConfig = Field(description="image encoder; queries and keys are normalised from block `turn` on")
    turn: int = Field(_TURN, ge=1, description="first block with camera tokens, after which odd blocks see all views")
    hooks: tuple[int, int, int, int] = Field((5, 7, 9, 11), description="blocks that the heads read, the last one last")
    features: int = Field(64, ge=4, description="channels of the dense head's fused map")
    widths: tuple[int, int, int, int] = Field((48, 96, 192, 384), description="channels of the dense head's levels")

    @classmethod
    def of_size(cls, size: Literal["small", "base"]) -> DepthAnything3Config:
        """The public networks whose weights are free."""
        encoder = DinoConfig.of_size(size, final_eps=1e-5, qk_norm_from=_TURN)
        features, widths = _HEADS[encoder.dim]
        return cls(encoder=encoder, features=features, widths=widths)


class DepthAnything3(nn.Module):
    """See the module's docstring. Layers: 0 (patch embeddings), then the blocks of the encoder."""

    model_type: ClassVar[str] = "depth_anything_3"

    def __init__(self, config: DepthAnything3Config) -> None:
        super().__init__()
        self.config = c = config
        self.backbone = nn.ModuleDict({"pretrained": AnyViewDino(c.encoder, c.turn)})
        self.head = MapHead(2 * c.encoder.dim, 2, c.features, c.widths)
        self.cam_dec = CameraDecoder(2 * c.encoder.dim)

    # --- the protocol `GeometryModel` ---------------------------------------------------------------------------------

    def forward(self, frames: Float[Tensor, "B S 3 H W"]) -> GeometryPrediction:
        """Geometry of S ordered views with values in [0, 1]; height and width must be multiples of the patch."""
        return self.predict(frames)[0]

    def predict(self, frames: Float[Tensor, "B S 3 H W"]) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """`forward` with the raw outputs that a loss needs."""
        return self.resume_raw(self.tap(frames, 0), 0, self._grid(frames))

    def stitch_points(self) -> list[int]:
        """Layers up to which nothing that the heads read is over: they read what comes out of block `hooks[0]` and out
        of the last block within views before it."""
        return list(range(self.config.hooks[0] + 1))

    def embed_dim(self, layer: int) -> int:
        """Width of the tokens after `layer`: the same everywhere."""
        return self.config.encoder.dim

    def walk(self, frames: Float[Tensor, "B S 3 H W"]) -> Iterator[Float[Tensor, "B S N D"]]:
        """All tokens after layer 0, 1, ...: the class token (after `turn` the camera token), then the patches."""
        check_frames(frames, self.config.encoder.patch)
        tokens = self._dino.embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        yield tokens
        for index in self.stitch_points()[:-1]:
            tokens = self._dino.step(tokens, index, self._grid(frames))
            yield tokens

    def tap(self, frames: Float[Tensor, "B S 3 H W"], layer: int) -> Float[Tensor, "B S N D"]:
        """All tokens after `layer`, a stitch point."""
        return next(islice(self.walk(frames), layer, None))

    def resume(self, tokens: Float[Tensor, "B S N D"], layer: int, grid: tuple[int, int]) -> GeometryPrediction:
        """Geometry from the tokens after `layer`; maps have `patch` pixels a token."""
        return self.resume_raw(tokens, layer, grid)[0]

    def resume_raw(
        self, tokens: Float[Tensor, "B S N D"], layer: int, grid: tuple[int, int]
    ) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """`resume` with `conf_logit` (B, S, H, W)."""
        within, maps = tokens, []
        for index in range(layer, self.config.hooks[-1] + 1):
            tokens = self._dino.step(tokens, index, grid)
            if not self._dino.across_views(index):
                within = tokens
            if index in self.config.hooks:
                maps.append(torch.cat([within, self._dino.norm(tokens)], -1)[:, :, 1:])
        camera = torch.cat([within[:, :, 0], tokens[:, :, 0]], -1)
        with full_precision(camera.device):  # as the public model runs its heads
            planes = [x.float().flatten(0, 1).transpose(1, 2).unflatten(2, grid) for x in maps]
            patch = self.config.encoder.patch
            dense = self.head(planes, (patch * grid[0], patch * grid[1])).unflatten(0, tokens.shape[:2])
            return self._assemble(dense, camera.float())

    def special_tokens(self, layer: int) -> Float[Tensor, "2 M D"]:
        """The class token as it enters layer 0; past layer `turn` the camera tokens of the first view and the others.

        Layers change both.
        """
        if layer > self.config.turn:
            return self._dino.camera_token[0][:, None]
        return self._dino.special_tokens().expand(2, -1, -1)

    def lora_targets(self) -> list[str]:
        """Linear layers of the encoder's blocks and of the camera decoder, convolutions of the dense head."""
        heads = ["out_conv", "conv1", "conv2", "output_conv1", "output_conv2.0", "output_conv2.2"]
        cameras = ["cam_dec.backbone.0", "cam_dec.backbone.2", "fc_t", "fc_qvec", "fc_fov.0"]
        return ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", *heads, *cameras]

    def image_size_for(self, video_size: tuple[int, int]) -> tuple[int, int]:
        """The size with the video's own token grid: 480x832 is seen at 420x728."""
        return patch_image_size(video_size, self.config.encoder.patch)

    # --- inside ---

    @property
    def _dino(self) -> AnyViewDino:
        dino = self.backbone["pretrained"]
        assert isinstance(dino, AnyViewDino)
        return dino

    def _grid(self, frames: Tensor) -> tuple[int, int]:
        patch = self.config.encoder.patch
        return frames.shape[-2] // patch, frames.shape[-1] // patch

    def _assemble(
        self, dense: Float[Tensor, "B S 2 H W"], camera: Float[Tensor, "B S D"]
    ) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        translation, quaternion, fov = self.cam_dec(camera)
        cam2world = anchor_cameras(rigid(rotation_from_xyzw(quaternion), translation))
        log_depth, conf_logit = dense.unbind(2)
        intrinsics = fov_intrinsics(fov, (dense.shape[-2], dense.shape[-1]))
        # The public confidence is 1 + exp(logit); 1 - 1 / that is the sigmoid.
        prediction = GeometryPrediction.from_depth(cam2world, intrinsics, log_depth.exp(), conf_logit.sigmoid())
        return prediction, {"conf_logit": conf_logit}

    # --- files ---

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `config.json` and `model.safetensors`."""
        config = {"model_type": self.model_type} | self.config.model_dump()
        write_pretrained(directory, config, self.state_dict(), dtype)

    @classmethod
    def from_checkpoint(cls, config: dict[str, Any], state: dict[str, Tensor]) -> DepthAnything3:
        """See `GeometryModel`. Public weights tell their own size; their `config.json` is of another kind."""
        if config.get("model_type") == cls.model_type:
            values = DepthAnything3Config(**{name: value for name, value in config.items() if name != "model_type"})
        else:
            state = {name.removeprefix(_PREFIX): value for name, value in state.items()}
            state = {name: value for name, value in state.items() if not _LEFT_OUT.search(name)}
            values = _public_config(state)
        return build(lambda: cls(values), state)


def _public_config(state: dict[str, Tensor]) -> DepthAnything3Config:
    """Sizes of public weights.

    Raises:
        ValueError: neither small nor base.
    """
    dim = state["backbone.pretrained.camera_token"].shape[-1]
    for size in ("small", "base"):
        config = DepthAnything3Config.of_size(size)
        if config.encoder.dim == dim:
            return config
    raise ValueError(f"tokens are {dim} wide; of Depth Anything 3, small (384) and base (768) can be used")
