"""Typed recipe of a Latent Geometry Model: what `vggrpo train-lgm` reads. Imports no torch, like `vggrpo.config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from vggrpo.config import EMBEDDED, Section
from vggrpo.config_loading import first_difference, load_section
from vggrpo.errors import UserError

# What may change when a run goes on: it decides how long a run is and where it writes, not what is trained.
RESUMABLE_LGM = frozenset(
    {
        "output", "cache", "updates", "save_every", "keep_last", "video.device",
        # These change rounding at most, and are what a run that ran out of memory needs.
        "distill.gradient_checkpointing", "distill.micro_batch",
    }
)  # fmt: skip
LOSS_WEIGHTS = {
    "depth": 3.0, "slope": 1.0, "translation": 4.0, "rotation": 4.0, "focal": 0.5, "points": 0.5, "conf": 0.05,
    "flow": 1.0, "dynamic": 0.05, "subject": 0.05,
}  # fmt: skip


class VideoSourceConfig(Section):
    """Whose latents the LGM reads."""

    kind: Literal["wan", "image"] = "wan"
    """"wan": a diffusers WanPipeline; "image": a small image autoencoder (`*_encoder.pth`, `*_decoder.pth`) that
    encodes every frame by itself and generates nothing."""
    path: str = EMBEDDED
    """Directory or hub id of the pipeline, directory of the autoencoder; "embedded" is the shipped pipeline."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the generator's weights (only generated clips need it); the VAE stays float32."""
    device: str = "auto"
    """"auto" (CUDA if there is one), "cpu", "cuda", "cuda:1"; each process of several takes its own."""


class TeacherConfig(Section):
    """The geometry model that is stitched and distilled."""

    path: str = EMBEDDED
    """Directory, weights file or hub id; the kind of network is read off it. "embedded" is the shipped one."""


class ClipsConfig(Section):
    """The clips of the cache."""

    videos: str = EMBEDDED
    """A folder of videos, a manifest (.jsonl), a webdataset shard (.tar), a glob of them or numbered ones
    (`shards-{000..127}.tar`, quoted in a shell); "embedded" renders clips of the embedded world."""
    max_clips: int = Field(default=256, ge=2)
    """At most this many clips of `videos`."""
    clips_per_video: int = Field(default=8, ge=1)
    """At most this many consecutive clips of one video, from its beginning."""
    num_frames: int = Field(default=17, ge=2)
    """RGB frames of a clip: 4n+1 for a VAE that compresses time by 4."""
    frame_stride: int = Field(default=1, ge=1)
    """Every n-th frame of a video."""
    height: int = Field(default=64, ge=8)
    """Pixels; a video is scaled to cover height x width, and its middle is cut out."""
    width: int = Field(default=64, ge=8)
    """Pixels."""
    min_kept: float = Field(default=0.5, ge=0, le=1)
    """A video of which less than this share of the picture would be left is passed over (portrait in a landscape
    recipe)."""
    generated_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of clips that the base model generates; 0 = real videos only."""
    prompts: str = EMBEDDED
    """Prompts of the generated clips: a file with one a line; "embedded" draws the world's captions."""
    generated_steps: int = Field(default=20, ge=1)
    """Denoising steps of a generated clip."""
    guidance_scale: float = Field(default=1.0, ge=1)
    """Classifier-free guidance of generated clips; 1 = none."""
    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of videos (not clips: two clips of one video are alike) that are never trained on."""
    shard_size: int = Field(default=32, ge=1)
    """Clips in one file of the cache."""
    micro_batch: int = Field(default=4, ge=1)
    """Clips per call of VAE and teacher while the cache is made and layers are searched; clips are generated one by
    one."""


class StitchConfig(Section):
    """Where the connector enters the geometry model."""

    view_rate: Literal["latent", "frame"] = "latent"
    """One view a latent frame, or latents interpolated to one view an RGB frame (about 9 times dearer)."""
    layer: int | None = Field(default=None, ge=0)
    """Stitch point; null: the best of the search."""
    layers: list[int] | None = None
    """Layers that the search fits; null: all that are safe for the heads."""
    rank_by: Literal["downstream", "r2"] = "downstream"
    """What makes a layer the best: the error of the geometry that comes out, or the share of token variance."""
    ridge: float = Field(default=1e-3, gt=0)
    """Penalty of the regression, relative to the mean square of the latents."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of white noise on normalised latents (at view rate) that the connector shall bear, at some
    loss on clean ones."""
    max_clips: int = Field(default=512, ge=1)
    """Training clips that the search reads."""
    max_heldout: int = Field(default=64, ge=1)
    """Held-out clips that layers are scored and ranked on."""


class DistillConfig(Section):
    """Training of connector and LoRA."""

    batch: int = Field(default=8, ge=1)
    """Clips per update, over all processes."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Clips per forward and backward pass, and per measurement of held-out clips; null: all of a process at once.
    Gradients are those of the whole batch."""
    gradient_checkpointing: bool = False
    """Make activations again in the backward pass instead of keeping them: the same numbers, a fraction of the memory,
    about a third more time."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Step size after warm-up (paper: 2e-4)."""
    warmup_updates: int = Field(default=100, ge=0)
    """Updates over which the step size grows linearly; a cosine to 2 % follows."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Bound on the gradient's norm."""
    lora_rank: int = Field(default=64, ge=0)
    """Rank on the remaining layers and the heads (paper: 64); 0 trains the connector alone."""
    lora_alpha: int = Field(default=32, ge=1)
    """The LoRA's update is scaled by alpha / rank."""
    bf16: bool = False
    """bfloat16 in the trunk; cameras, depth and losses stay float32."""
    weights: dict[str, float] = Field(default_factory=lambda: dict(LOSS_WEIGHTS))
    """Weight of each head's loss; those not named keep their default, 0 switches one off."""

    @field_validator("weights")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(LOSS_WEIGHTS))
        if unknown or any(weight < 0 for weight in value.values()):
            raise ValueError(f"weights are 0 or more, by name: {', '.join(LOSS_WEIGHTS)}; {unknown or value} is not")
        return LOSS_WEIGHTS | value


class TrainLGMConfig(Section):
    """One Latent Geometry Model."""

    output: str = "runs/lgm"
    """Directory: `lgm/` (the model), `search.json`, `checkpoints/`, `log.jsonl`."""
    seed: int = Field(default=0, ge=0)
    """Decides every random number of the run."""
    updates: int = Field(default=200, ge=1)
    """Optimizer steps."""
    save_every: int = Field(default=100, ge=1)
    """Updates between checkpoints; the held-out clips are measured then."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints to keep."""
    cache: str | None = None
    """Directory of latents and teacher geometry, which several runs may share; null: OUTPUT/cache."""
    video: VideoSourceConfig = Field(default_factory=VideoSourceConfig)
    """The video model."""
    geometry: TeacherConfig = Field(default_factory=TeacherConfig)
    """The geometry model."""
    clips: ClipsConfig = Field(default_factory=ClipsConfig)
    """The data."""
    stitch: StitchConfig = Field(default_factory=StitchConfig)
    """The connector's place."""
    distill: DistillConfig = Field(default_factory=DistillConfig)
    """The training."""

    @property
    def cache_directory(self) -> Path:
        return Path(self.output) / "cache" if self.cache is None else Path(self.cache)

    @model_validator(mode="after")
    def _check_together(self) -> TrainLGMConfig:
        if self.video.kind == "image" and self.clips.generated_share > 0:
            raise ValueError(
                "video.kind image generates no clips; set clips.generated_share: 0 or take a video.kind that does"
            )
        if self.video.kind == "image" and self.video.path == EMBEDDED:
            raise ValueError("video.kind image needs video.path: a directory with *_encoder.pth and *_decoder.pth")
        if self.stitch.layer is not None and self.stitch.layers is not None:
            raise ValueError("stitch.layer fixes the layer and stitch.layers searches some; give one of the two")
        return self


def load_lgm_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainLGMConfig:
    """Parse an LGM recipe with `key=value` overrides on top; errors are those of `vggrpo.config.load_config`."""
    return load_section(TrainLGMConfig, source, overrides)


def dump_lgm_config(config: TrainLGMConfig) -> str:
    """The whole config as YAML, as it is kept beside the results."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def check_resumable(saved: Mapping[str, Any], current: TrainLGMConfig) -> None:
    """Refuse to go on with another config.

    Raises:
        UserError: names the first field that differs and may not.
    """
    if difference := first_difference(saved, current, RESUMABLE_LGM):
        raise UserError(
            f"{current.output} holds a run with another config ({difference}); undo the change or set another "
            "output=DIR"
        )
