"""Typed recipe of a benchmark: what `vggrpo benchmark` reads. Imports no torch, like `vggrpo.config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from vggrpo.config import EMBEDDED, Section
from vggrpo.config_loading import first_difference, load_section

# What may change when a benchmark goes on: where and how fast it runs, and what is measured, not what is generated.
RESUMABLE_BENCHMARK = frozenset({
    "output", "sampling.micro_batch", "sampling.device", "metrics", "workers", "judge", "attributes", "reference",
})  # fmt: skip


class BenchmarkSamplingConfig(Section):
    """How videos are generated: the pipeline's own deterministic sampler, the same for both arms."""

    num_steps: int = Field(default=50, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float = Field(default=1.0, ge=1)
    """Classifier-free guidance; 1 = none."""
    num_frames: int = Field(default=17, ge=5)
    """RGB frames of a video, 4n+1."""
    height: int = Field(default=64, ge=8)
    """Pixels."""
    width: int = Field(default=64, ge=8)
    """Pixels."""
    fps: float = Field(default=8.0, gt=0)
    """Frames a second in the file."""
    micro_batch: int = Field(default=8, ge=1)
    """Videos at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the transformer's weights."""
    device: str = "auto"
    """"auto" (CUDA if there is one), "cpu", "cuda", "cuda:1"; also where the judges run."""


class BenchmarkConfig(Section):
    """One comparison of a base and a tuned model."""

    output: str = "runs/benchmark"
    """Directory of the run; the same command goes on there."""
    pipeline: str = EMBEDDED
    """Directory or hub id of a diffusers WanPipeline, for both arms; "embedded" is the shipped one."""
    tuned_lora: str
    """LoRA of the tuned arm: a file, or a directory such as OUTPUT/lora of a training run."""
    base_lora: str | None = None
    """LoRA of the base arm; null: the pipeline as it is."""
    prompts: list[str] = Field(default=["static", "dynamic"], min_length=1)
    """Prompt sets: static, dynamic, world-static, world-dynamic, or files (one's own, World-R1's, VBench's)."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many prompts of each set, spread evenly over it; null: all."""
    seeds: list[int] = Field(default=[0, 1], min_length=1)
    """One video a prompt and seed, in both arms."""
    sampling: BenchmarkSamplingConfig = Field(default_factory=BenchmarkSamplingConfig)
    """How they are made."""
    metrics: str = "fast"
    """fast, all, or names joined by commas."""
    workers: int = Field(default=1, ge=1)
    """Processes that measure."""
    judge: str | None = None
    """Directory of the geometry network that judges; null: the embedded one, which knows the embedded world only."""
    attributes: str | None = None
    """Directory of the attribute classifier; null: the embedded one."""
    lgm: str | None = None
    """Directory of an LGM ("embedded": the shipped one) to read the two rewards and the 3D scenes from the latents;
    null: no rewards, and scenes by the judge where it is among the metrics."""
    reference: Literal["world"] | None = None
    """What the kernel distance compares both arms with: "world" renders clips of the embedded world; null: none."""

    @model_validator(mode="after")
    def _check_together(self) -> BenchmarkConfig:
        if self.tuned_lora == self.base_lora:
            raise ValueError("tuned_lora and base_lora are the same; a benchmark compares two models")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds {self.seeds} must be different whole numbers from 0 up")
        if (self.sampling.num_frames - 1) % 4:
            nearest = round((self.sampling.num_frames - 1) / 4) * 4 + 1
            raise ValueError(f"sampling.num_frames must be 4n+1; the nearest is {nearest}")
        return self


def load_benchmark_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> BenchmarkConfig:
    """Parse a recipe (file, shipped name, or mapping) with `key=value` overrides on top; see `vggrpo.config`."""
    return load_section(BenchmarkConfig, source, overrides)


def dump_benchmark_config(config: BenchmarkConfig) -> str:
    """The whole config as YAML, as it is kept beside the results."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def benchmark_difference(saved: Mapping[str, Any], current: BenchmarkConfig) -> str | None:
    """The first field that differs and may not when a benchmark goes on, as "name: was X, is Y"."""
    return first_difference(saved, current, RESUMABLE_BENCHMARK)
