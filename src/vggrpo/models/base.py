"""What the rest of the house needs from a video generator and from a geometry network, and nothing more.

A new video model (HunyuanVideo, LTX) is one file that satisfies `VideoModel`; a new geometry backend is one file that
satisfies `GeometryModel`. Conventions are those of the paper map: rectified flow with `t` in [0, 1], normalised float32
latents,
videos in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.errors import UserError

if TYPE_CHECKING:
    import torch

    from vggrpo.geometry import GeometryPrediction


@dataclass(frozen=True)
class LatentSpec:
    """The shape arithmetic of a video VAE and of the transformer's patches.

    Attributes:
        channels: latent channels C.
        temporal_stride: RGB frames per latent frame; the first frame stands alone, so clips have `temporal_stride * n +
            1` frames.
        spatial_stride: pixels per latent cell, both directions.
        patch_size: latent cells per transformer token, (time, height, width).
        mean, std: per channel, what the latents were normalised with; empty where nothing was.
    """

    channels: int
    temporal_stride: int = 4
    spatial_stride: int = 8
    patch_size: tuple[int, int, int] = (1, 2, 2)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T', H', W') of a clip of `num_frames` frames of `height` x `width` pixels.

        Raises:
            UserError: when the VAE cannot make such a clip; the message names the nearest size that it can.
        """
        stride = self.temporal_stride
        if num_frames < 1 or (num_frames - 1) % stride:
            nearest = max(0, round((num_frames - 1) / stride)) * stride + 1
            raise UserError(f"num_frames must be {stride}n+1, got {num_frames}; the nearest is {nearest}")
        for name, pixels, patch in (("height", height, self.patch_size[1]), ("width", width, self.patch_size[2])):
            multiple = self.spatial_stride * patch
            if pixels < multiple or pixels % multiple:
                nearest = max(1, round(pixels / multiple)) * multiple
                raise UserError(
                    f"{name} must be a positive multiple of {multiple} pixels, got {pixels}; the nearest is {nearest}"
                )
        return (
            self.channels,
            (num_frames - 1) // stride + 1,
            height // self.spatial_stride,
            width // self.spatial_stride,
        )

    def num_frames(self, latent_frames: int) -> int:
        """RGB frames that `latent_frames` latent frames decode to."""
        return (latent_frames - 1) * self.temporal_stride + 1


@runtime_checkable
class VideoModel(Protocol):
    """A latent text-to-video model under rectified flow: `x_t = (1-t) x0 + t eps`, `v = eps - x0`."""

    latent_spec: LatentSpec
    frame_times: bool
    """Whether each latent frame may have its own time, so that a given first frame can be continued."""
    autocast: torch.dtype | None
    """Number format of the network's arithmetic where it differs from its weights' (full fine-tuning), else None."""
    transformer: nn.Module
    """The network that predicts the velocity, a diffusers model: what a LoRA is put on."""
    pipeline: str
    """Name of the diffusers pipeline that the result is for: LoRA files are in its format."""

    @property
    def device(self) -> torch.device:
        """Where the transformer lives; latents are made there."""
        ...

    def release_encoders(self, vae: bool = True) -> None:
        """Forget the text encoder, and the VAE if asked: what they encode is cached."""
        ...

    def encode_prompt(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """Text embeddings, zero after the end of each text; texts beyond the model's length are cut."""
        ...

    def encode_video(self, video: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B C T1 H1 W1"]:
        """Normalised latents of a video in [0, 1] (the mode of the VAE's posterior, no sampling)."""
        ...

    def decode(self, latents: Float[Tensor, "B C T1 H1 W1"]) -> Float[Tensor, "B 3 T H W"]:
        """Video in [0, 1] of normalised latents."""
        ...

    def predict_velocity(
        self, latents: Float[Tensor, "B C T1 H1 W1"], t: Float[Tensor, "B ..."], text: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B C T1 H1 W1"]:
        """Velocity in float32 at flow time `t` in [0, 1] (1 = noise): one time per sample, or (B, T') one per latent
        frame where the model can (`frame_times`), with 0 for a given first frame."""
        ...

    def sigmas(self, num_steps: int, shift: float | None = None) -> Float[Tensor, " S1"]:
        """Flow times from 1 to 0, `num_steps + 1` of them, with the pipeline's own shift unless `shift` is given."""
        ...

    def solver(self, num_steps: int) -> Any:
        """A fresh deterministic solver (diffusers scheduler) with its `timesteps` set, as the plain pipeline uses
        it."""
        ...


@runtime_checkable
class GeometryModel(Protocol):
    """A feed-forward geometry network (an `nn.Module`) that can be cut open after a layer.

    `resume(tap(frames, l), l, grid) == forward(frames)` holds for every `l` in `stitch_points()`. What leaves a backend
    follows the conventions of `GeometryPrediction`: anchored cam2world, z-depth, confidence in [0, 1].

    A backend is a file of its own, listed in `vggrpo.models.loading`; `docs/add_geometry_backend.md` shows how.
    """

    model_type: str
    """Name of the backend in `config.json`."""

    @classmethod
    def from_checkpoint(cls, config: dict[str, Any], state: dict[str, Tensor]) -> GeometryModel:
        """A frozen network from the values of `config.json` (empty: a public checkpoint without one) and its weights.

        Raises:
            ValueError: names or shapes that do not fit, in one line.
        """
        ...

    def __call__(self, frames: Float[Tensor, "B S 3 H W"]) -> GeometryPrediction:
        """Geometry of `S` views with values in [0, 1]."""
        ...

    def predict(self, frames: Float[Tensor, "B S 3 H W"]) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """The same, with the raw outputs that a loss needs: see `resume_raw`."""
        ...

    def stitch_points(self) -> list[int]:
        """Layers after which the network may be cut without losing what its heads need."""
        ...

    def embed_dim(self, layer: int) -> int:
        """Width of the tokens that layer `layer` puts out."""
        ...

    def walk(self, frames: Float[Tensor, "B S 3 H W"]) -> Iterator[Float[Tensor, "B S N D"]]:
        """All tokens after layer 0, 1, ... up to the last stitch point; special ones first, then patches row by row."""
        ...

    def tap(self, frames: Float[Tensor, "B S 3 H W"], layer: int) -> Float[Tensor, "B S N D"]:
        """All tokens after layer `layer`, a stitch point."""
        ...

    def resume(self, tokens: Float[Tensor, "B S N D"], layer: int, grid: tuple[int, int]) -> GeometryPrediction:
        """Geometry from the tokens after layer `layer`; `grid` is the patch grid (rows, columns)."""
        ...

    def resume_raw(
        self, tokens: Float[Tensor, "B S N D"], layer: int, grid: tuple[int, int]
    ) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """`resume` with logits (B, S, H, W): `conf_logit`, and `dynamic_logit`, `subject_logit` where there are such
        heads."""
        ...

    def special_tokens(self, layer: int) -> Float[Tensor, "2 M D"]:
        """Special tokens of the first view and of all others as they stand after layer `layer`.

        Exact where they do not depend on the pictures; elsewhere what they start from, with the right shape: the layer
        search measures their mean, and the LGM keeps that.
        """
        ...

    def lora_targets(self) -> list[str]:
        """Module name endings that a LoRA may adapt."""
        ...

    def image_size_for(self, video_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) at which the network sees a video of that size."""
        ...
