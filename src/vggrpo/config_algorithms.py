"""Config sections of the algorithms, one each, and of the space that rewards are read in. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

EMBEDDED = "embedded"


def _number_or_auto(value: Any) -> Any:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError("it must be a whole number from 1, or auto")
    return value


MicroBatchSize = Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)]
"""How much goes through the network at once; "auto": as much as fits the memory."""


def least_micro_batch(setting: MicroBatchSize) -> int:
    """The number, or 1 for "auto", which goes no lower."""
    return 1 if setting == "auto" else setting


class Section(BaseModel):
    """A part of the config: unknown keys, NaN and infinity are errors, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class RewardSpaceConfig(Section):
    """Where geometry is read, for every algorithm that asks for rewards."""

    space: Literal["latent", "rgb"] = "latent"
    """"latent": the LGM reads latents. "rgb": the VAE decodes, and a geometry model reads frames (the rival)."""
    geometry: str = EMBEDDED
    """`rgb`, and `dpo.pairs: geometry`: directory or hub id of the geometry model; "embedded" is the LGM's teacher."""
    view_stride: int = Field(default=4, ge=1)
    """`rgb`, and `dpo.pairs: geometry`: RGB frames from view to view; 4 are the views of a latent frame each."""


class StopConfig(Section):
    """When a run ends before its last update. Every rule is off unless it is set; one that ends a run saves it, and the
    run then is finished until the rule is changed."""

    travel_below: float = Field(default=0.0, ge=0, lt=1)
    """End when the camera travel falls under this share of the base model's (`grpo`; needs grpo.base_travel_samples);
    0 = never."""
    dynamics_below: float = Field(default=0.0, ge=0, lt=1)
    """End when the share of moving pixels falls under this share of the base model's (`grpo`; likewise); 0 = never."""
    subjects_below: float = Field(default=0.0, ge=0, lt=1)
    """End when the share of subject pixels falls under this share of the base model's (`grpo`; likewise); 0 = never."""
    kl_above: float | None = Field(default=None, gt=0)
    """End when the distance to the base model that the log calls `kl` rises above this; null = never."""
    memory: int = Field(default=10, ge=1)
    """Updates over which these four are averaged; none of them ends a run of fewer updates."""
    seconds_above: float | None = Field(default=None, gt=0)
    """End with the update in which the updates of the run have taken this many seconds in all; null = never."""


class GRPOConfig(Section):
    """The policy-gradient update."""

    prompts_per_update: int = Field(default=4, ge=1)
    """Groups per update."""
    samples_per_prompt: int = Field(default=8, ge=2)
    """Videos per group, K (paper: 64)."""
    clip: float = Field(default=1e-3, gt=0, lt=1)
    """Bound e of the ratio: 1 - e to 1 + e."""
    ratio_norm: bool = False
    """Normalise the log-ratio by step, so that the clip means the same at all noise levels (GRPO-Guard)."""
    advantage_clip: float | None = Field(default=5.0, gt=0)
    """Bound on |A|; null = none."""
    kl: float = Field(default=0.004, ge=0)
    """Weight beta of the KL to the model without LoRA; 0 saves one forward pass per replayed step."""
    kl_unit: Literal["gaussian", "diffusion"] = "gaussian"
    """"gaussian" divides by 2 s^2 |dt| (the true KL), "diffusion" by 2 s^2 (flow_grpo's, about 10 times smaller at 10
    steps)."""
    inner_updates: int = Field(default=1, ge=1)
    """Optimizer steps per roll-out."""
    inner_split: bool = True
    """Each inner update replays its own share of the trained steps (no extra cost); false: each replays all of them."""
    mode: Literal["decoupled", "sum"] = "decoupled"
    """Normalise each reward by itself (the paper), or the weighted mean of the rewards."""
    std: Literal["population", "sample"] = "population"
    """Which standard deviation divides."""
    std_scope: Literal["group", "global"] = "group"
    """Standard deviation of the group, or of all samples of the update."""
    eps: float = Field(default=1e-4, gt=0)
    """Added to the standard deviation, in units of the reward."""
    invalid: Literal["worst", "drop"] = "worst"
    """A sample whose reward cannot be computed gets its group's worst advantage, or is left out."""
    base_travel_samples: int = Field(default=2, ge=0)
    """Roll-outs of the base model per prompt that measure its own camera travel and subjects, once; 0 = off."""
    collapse_warning: float = Field(default=0.5, ge=0, le=1)
    """Warn when the mean camera travel, or the share of moving or of subject pixels, over 10 updates falls under this
    share of the base model's; needs base_travel_samples; 0 = never."""
    micro_batch: MicroBatchSize = 32
    """Replayed steps (videos x trained steps) per network call with gradient; "auto": as many as fit the memory."""


class SFTConfig(Section):
    """Supervised fine-tuning: flow matching on clips that the rewards like best."""

    videos: str | None = None
    """Manifest (or folder) of videos to train on, with their prompts; null: clips of the base model itself."""
    candidates: int = Field(default=4, ge=1)
    """Clips of the base model per prompt (unused with `videos`)."""
    keep: float = Field(default=0.25, gt=0, le=1)
    """Share that is kept, the best by the configured rewards: of each prompt's candidates, or of all videos."""
    batch: int = Field(default=16, ge=1)
    """Clips per update."""
    micro_batch: int = Field(default=16, ge=1)
    """Clips per network call with gradient."""


class DPOConfig(Section):
    """Direct preference optimisation of the flow on pairs of the base model's clips, scored once."""

    pairs: Literal["epipolar", "geometry", "latent"] = "epipolar"
    """What makes a clip the better one: the Sampson error of matches (as Epipolar-DPO), dense reprojection by an RGB
    geometry model (as VideoGPA), or the configured rewards read from latents."""
    candidates: int = Field(default=4, ge=2)
    """Clips of the base model per prompt, sampled with `sampling.guidance_scale`."""
    pairs_per_prompt: int = Field(default=1, ge=1)
    """Pairs at most: the best and the worst candidate, the second best and the second worst, and so on. More pairs are
    fitted by heart later."""
    min_gap: float = Field(default=0.1, ge=0, lt=1)
    """A pair counts if the better error is smaller by at least this share of the worse one (`latent`: if the mean
    normalised rewards differ by more than this)."""
    min_motion: float = Field(default=0.5, ge=0)
    """Candidates that move less than this share of their prompt's median are left out: a still clip must not win."""
    beta: float = Field(default=500.0, gt=0)
    """How strongly a difference of errors (means over the latents) counts."""
    fps: float = Field(default=8.0, gt=0)
    """`epipolar`: frames per second of the clips; matches are taken at fixed time gaps."""
    batch: int = Field(default=8, ge=1)
    """Pairs per update."""
    micro_batch: int = Field(default=8, ge=1)
    """Pairs per network call with gradient (two clips each)."""


class DirectConfig(Section):
    """Backpropagation of the differentiable reward through the last denoising steps."""

    prompts_per_update: int = Field(default=4, ge=1)
    """Prompts per update."""
    samples_per_prompt: int = Field(default=2, ge=1)
    """Clips per prompt."""
    grad_steps: int = Field(default=1, ge=1)
    """Last steps of the sampler that carry gradient; memory grows with them."""
    kl: float = Field(default=20.0, ge=0)
    """Weight of the squared distance to the base model's velocity (mean over the latents) in those steps, against
    rewards in units of their spread."""
    micro_batch: int = Field(default=4, ge=1)
    """Clips per backward pass."""


class NFTConfig(Section):
    """Forward-process reinforcement learning (DiffusionNFT): no log-probabilities, any solver."""

    prompts_per_update: int = Field(default=4, ge=1)
    """Groups per update."""
    samples_per_prompt: int = Field(default=8, ge=2)
    """Videos per group."""
    beta: float = Field(default=1.0, gt=0)
    """How far the implicit positive and negative policies lie from the one that sampled."""
    advantage_clip: float = Field(default=2.0, gt=0)
    """Advantage that makes a clip wholly positive; its negative wholly negative."""
    times: int = Field(default=4, ge=1)
    """Noise levels at which each clip is trained per update."""
    inner_updates: int = Field(default=1, ge=1)
    """Optimizer steps per roll-out; each takes its own share of the (clip, noise level) pairs."""
    old: Literal["current", "average"] = "current"
    """Which policy samples: the current one, or its moving average (`optim.ema`), which is steadier."""
    kl: float = Field(default=0.01, ge=0)
    """Weight of the squared distance to the base model's velocity, mean over the latents."""
    micro_batch: int = Field(default=32, ge=1)
    """(clip, noise level) pairs per network call with gradient."""
