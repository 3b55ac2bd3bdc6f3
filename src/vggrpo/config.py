"""Typed configuration of a training run: a YAML recipe plus `key=value` overrides. Imports no torch, so that errors
come at once.

Every field says what it is, in which unit, and carries its bounds. An unknown key is an error that names the nearest
known one.
Fields that only steer how long a run is, or where it writes, may change at resume (`RESUMABLE`); all others may not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from vggrpo.config_algorithms import (
    EMBEDDED,
    DirectConfig,
    DPOConfig,
    GRPOConfig,
    MicroBatchSize,
    NFTConfig,
    RewardSpaceConfig,
    SFTConfig,
    StopConfig,
)
from vggrpo.config_algorithms import Section as _Section
from vggrpo.config_loading import first_difference, load_section
from vggrpo.config_loading import recipe_path as recipe_path

RELATIVE_REWARDS = ("camera_motion_hinge", "subject_presence_hinge")
"""Rewards that compare a clip with the base model's of the same prompt."""

RESUMABLE = frozenset(
    {
        "output", "updates", "save_every", "keep_last", "trackers", "data.cache", "model.device", "model.shard",
        # These change rounding at most, and are what a run that ran out of memory needs.
        "model.gradient_checkpointing", "model.compile", "sampling.micro_batch", "sampling.offload",
        "grpo.micro_batch", "lgm.micro_batch", "sft.micro_batch", "dpo.micro_batch", "direct.micro_batch",
        "nft.micro_batch",
        "stop.travel_below", "stop.dynamics_below", "stop.subjects_below", "stop.kl_above", "stop.memory",
        "stop.seconds_above",
    }
)  # fmt: skip


Section = _Section  # for recipes of other kinds, in files of their own


class ModelConfig(_Section):
    """The video model that is tuned."""

    path: str = EMBEDDED
    """Directory or hub id of a diffusers WanPipeline; "embedded" is the shipped one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the transformer; latents, velocities and whatever is trained stay float32."""
    device: str = "auto"
    """"auto" (CUDA if there is one), "cpu", "cuda", "cuda:1"; each process of several takes its own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: one more forward pass of the replay, a fraction of the memory."""
    tune: Literal["lora", "full"] = "lora"
    """Train an adapter, or every weight of the transformer (20 bytes of memory a parameter, gradients included)."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile): minutes at the start, faster afterwards."""
    shard: bool = False
    """Split the weights over the processes (FSDP2): for models that do not fit one GPU."""


class LGMConfig(_Section):
    """The Latent Geometry Model that reads geometry from latents."""

    path: str = EMBEDDED
    """Directory of an LGM; "embedded" is the shipped one."""
    micro_batch: int = Field(default=16, ge=1)
    """Clips per call of the LGM and the rewards."""


class DataConfig(_Section):
    """What is generated."""

    prompts: str = EMBEDDED
    """Text file with one prompt a line; "embedded" draws from the world's training captions."""
    num_prompts: int = Field(default=64, ge=1)
    """How many embedded prompts to draw (unused with a file)."""
    num_frames: int = Field(default=17, ge=1)
    """RGB frames per video, 4n+1."""
    height: int = Field(default=64, ge=8)
    """Pixels."""
    width: int = Field(default=64, ge=8)
    """Pixels."""
    first_frames: str | None = None
    """Text file with one image a line, line n for prompt n, that videos start from (Wan2.2-TI2V); null: text to video.
    """
    cache: str | None = None
    """Directory of text embeddings and first frames' latents, may be shared by runs; null: OUTPUT/cache."""


class SamplingConfig(_Section):
    """The stochastic sampler of the roll-outs."""

    num_steps: int = Field(default=10, ge=2, le=1000)
    """Denoising steps of a roll-out."""
    shift: float | None = Field(default=None, gt=0)
    """Time shift of the schedule; null takes the pipeline's own."""
    variant: Literal["flow_grpo", "flow_grpo_wan", "dance", "cps"] = "flow_grpo"
    """Which SDE; see `vggrpo.sampling.flow_sde`."""
    noise_level: float = Field(default=0.7, gt=0, le=10)
    """Strength `a` of the exploration noise."""
    max_t: float | None = Field(default=None, gt=0, lt=1)
    """`flow_grpo`: above this time the next one stands in for it in the noise scale; null takes the variant's rule."""
    sigma_min: float | None = Field(default=None, ge=0)
    """`flow_grpo_wan`: noise scale at t = 0."""
    sigma_max: float | None = Field(default=None, gt=0)
    """`flow_grpo_wan`: noise scale at t = 1."""
    window: int = Field(default=4, ge=1)
    """Stochastic, trained steps per roll-out; the others are deterministic. The last step always is."""
    window_kind: Literal["contiguous", "random"] = "contiguous"
    """A run of steps that starts anywhere in the range, or any subset of it."""
    window_first: int = Field(default=0, ge=0)
    """First step that may be stochastic."""
    window_last: int | None = Field(default=None, ge=0)
    """Last step that may be stochastic; null: the last but one of the schedule."""
    shared_noise: bool = False
    """All samples of a group start from one noise, and the steps before the window are computed once per group."""
    guidance_scale: float = Field(default=1.0, ge=1)
    """Classifier-free guidance in training roll-outs; 1 = none, at half the cost."""
    micro_batch: MicroBatchSize = 32
    """Videos per network call in the roll-out; "auto": as many as fit the memory."""
    offload: bool = False
    """Keep the roll-out's states on the CPU."""
    trajectory_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the kept states. "bfloat16" halves them; the sampler then goes through the rounded states, so
    that replay scores exactly the steps that were taken."""


class RewardTerm(_Section):
    """One reward of the sum."""

    weight: float = Field(default=1.0, ge=0)
    """Share of this reward's own normalised advantage."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reward function."""


class LoraConfig(_Section):
    """The adapter; the base weights never change."""

    rank: int = Field(default=32, ge=1)
    """Rank (paper: 32)."""
    alpha: float = Field(default=64.0, gt=0)
    """The update is scaled by alpha / rank."""
    targets: list[str] = Field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"], min_length=1)
    """Endings of the names of the linear layers that are adapted."""


class OptimConfig(_Section):
    """AdamW."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Step size after warm-up."""
    warmup_updates: int = Field(default=0, ge=0)
    """Updates over which the step size grows linearly."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Bound on the gradient's norm."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per optimizer step of a moving average of the weights, which is then validated and exported; null = none.
    """


class ValidationConfig(_Section):
    """Videos of fixed prompts and seeds while training goes on."""

    every: int = Field(default=0, ge=0)
    """Updates between validations, the first one before any update; 0 = none."""
    prompts: str | None = None
    """Text file with one prompt a line; null: unseen captions of the embedded world."""
    first_frames: str | None = None
    """Text file with one image a line, the first frames of `prompts`; with `data.first_frames` only."""
    num_prompts: int = Field(default=4, ge=1)
    """At most so many prompts."""
    num_steps: int = Field(default=50, ge=1)
    """Denoising steps of the pipeline's own deterministic solver."""
    guidance_scale: float = Field(default=1.0, ge=1)
    """Classifier-free guidance, 1 = none."""
    videos: int = Field(default=4, ge=0)
    """How many of them are decoded and shown; the rewards are measured on all."""


def _default_rewards() -> dict[str, RewardTerm]:
    return {"camera_motion_smoothness": RewardTerm(), "geometry_reprojection_consistency": RewardTerm()}


class TrainConfig(_Section):
    """A post-training run."""

    output: str = "runs/train"
    """Directory for adapter, checkpoints and logs."""
    seed: int = Field(default=0, ge=0)
    """Decides every random number of the run."""
    updates: int = Field(default=100, ge=1)
    """Roll-out and update rounds."""
    save_every: int = Field(default=10, ge=1)
    """Updates between checkpoints."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints to keep."""
    algorithm: Literal["grpo", "sft", "dpo", "direct", "nft"] = "grpo"
    """How the model is tuned; see `vggrpo.posttraining.algorithm`."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """The video model."""
    lgm: LGMConfig = Field(default_factory=LGMConfig)
    """The geometry reader."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Prompts and sizes."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """The roll-out."""
    rewards: dict[str, RewardTerm] = Field(default_factory=_default_rewards, min_length=1)
    """Rewards by name with their weights: `name: {weight, options}` or `name: weight`."""
    reward: RewardSpaceConfig = Field(default_factory=RewardSpaceConfig)
    """Where the rewards read geometry."""
    grpo: GRPOConfig = Field(default_factory=GRPOConfig)
    """The update of `algorithm: grpo`."""
    sft: SFTConfig = Field(default_factory=SFTConfig)
    """The update of `algorithm: sft`."""
    dpo: DPOConfig = Field(default_factory=DPOConfig)
    """The update of `algorithm: dpo`."""
    direct: DirectConfig = Field(default_factory=DirectConfig)
    """The update of `algorithm: direct`."""
    nft: NFTConfig = Field(default_factory=NFTConfig)
    """The update of `algorithm: nft`."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """The adapter."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """The optimizer."""
    stop: StopConfig = Field(default_factory=StopConfig)
    """What ends a run early."""
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    """Fixed videos to look at."""
    trackers: list[Literal["wandb", "trackio"]] = Field(default_factory=list)
    """Where metrics go beside log.jsonl and TensorBoard; each needs its package (`pip install vggrpo[wandb]`)."""

    @field_validator("rewards", mode="before")
    @classmethod
    def _plain_weights(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: {"weight": term} if isinstance(term, int | float) else term for name, term in value.items()}
        return value

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        sampling, grpo = self.sampling, self.grpo
        last = sampling.num_steps - 2 if sampling.window_last is None else sampling.window_last
        if last > sampling.num_steps - 2 or sampling.window > last - sampling.window_first + 1:
            raise ValueError(
                f"sampling.window {sampling.window} does not fit steps {sampling.window_first} to {last} "
                f"of {sampling.num_steps} "
                "(the last step is deterministic); lower sampling.window or raise sampling.num_steps"
            )
        if sampling.variant == "flow_grpo_wan" and (sampling.sigma_min is None or sampling.sigma_max is None):
            raise ValueError("sampling.variant flow_grpo_wan needs sampling.sigma_min and sampling.sigma_max")
        if sampling.variant == "cps" and grpo.kl_unit == "diffusion":
            raise ValueError(
                "grpo.kl_unit diffusion has no meaning for sampling.variant cps; set grpo.kl_unit: gaussian"
            )
        if self.validation.every and self.validation.prompts is None and self.data.prompts != EMBEDDED:
            raise ValueError("validation.every is set but validation.prompts is not; name a text file with prompts")
        if self.validation.every and (self.data.first_frames is None) != (self.validation.first_frames is None):
            raise ValueError(
                "data.first_frames and validation.first_frames go together: videos of both kinds begin with given "
                "images, or none do; set both, or neither"
            )
        if grpo.ratio_norm and sampling.variant == "cps":
            raise ValueError("grpo.ratio_norm needs a Gaussian step; set a sampling.variant other than cps")
        self._check_algorithm()
        relative = (self.stop.travel_below, self.stop.dynamics_below, self.stop.subjects_below)
        if max(relative) > 0 and grpo.base_travel_samples == 0:
            raise ValueError(
                "stop.travel_below, stop.dynamics_below and stop.subjects_below compare with the base model; set "
                "grpo.base_travel_samples to 1 or more"
            )
        if not any(term.weight > 0 for term in self.rewards.values()):
            raise ValueError("all weights in rewards are 0; give at least one reward a positive weight")
        for name in RELATIVE_REWARDS:
            if name in self.rewards and grpo.base_travel_samples == 0:
                raise ValueError(
                    f"rewards.{name} compares with the base model; set grpo.base_travel_samples to 1 or more"
                )
        return self

    def _check_algorithm(self) -> None:
        """What the algorithms beside GRPO ask for."""
        if self.algorithm == "nft" and self.nft.old == "average" and self.optim.ema is None:
            raise ValueError("nft.old average needs a moving average; set optim.ema, such as 0.9")
        if self.algorithm == "direct" and self.direct.grad_steps > self.sampling.num_steps:
            raise ValueError(
                f"direct.grad_steps {self.direct.grad_steps} is more than sampling.num_steps "
                f"{self.sampling.num_steps}; lower it"
            )
        if self.algorithm != "grpo" and self.model.shard:
            raise ValueError("model.shard is for algorithm grpo; set model.shard: false")
        if self.algorithm == "sft" and self.sft.videos is not None and self.data.first_frames is not None:
            raise ValueError("sft.videos are not made from data.first_frames; give one of the two")

    @property
    def needs_vae(self) -> bool:
        """Whether training itself encodes or decodes video."""
        pixels = self.algorithm == "dpo" and self.dpo.pairs != "latent"
        return self.reward.space == "rgb" or pixels or (self.algorithm == "sft" and self.sft.videos is not None)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """Parse a recipe (file, shipped name, or mapping) with `key=value` overrides on top.

    Args:
        source: see `recipe_path`; a mapping is taken as is.
        overrides: such as `updates=20`, `grpo.kl=0.01`, `rewards.camera_motion_hinge.weight=0.5`; values are YAML.

    Raises:
        UserError: one line that names the field and the remedy.
    """
    return load_section(TrainConfig, source, overrides)


def parse_config(values: Mapping[str, Any]) -> TrainConfig:
    """Validate plain values; see `load_config`."""
    return load_section(TrainConfig, values)


def dump_config(config: TrainConfig) -> str:
    """The whole config as YAML, as it is kept beside a run's results."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def resume_difference(saved: Mapping[str, Any], current: TrainConfig) -> str | None:
    """The first field that differs and may not at resume, as "name: was X, is Y"; None if there is none."""
    return first_difference(saved, current, RESUMABLE)
