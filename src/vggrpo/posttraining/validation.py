"""Validation: videos of fixed prompts and seeds, made by the pipeline's own solver, with their rewards.

The same prompts come without the tuning once a start of the program, so that rewards which compare with the base model
can be computed, and there is something to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vggrpo.config import EMBEDDED, TrainConfig
from vggrpo.config_algorithms import least_micro_batch
from vggrpo.io.prompts import read_prompts
from vggrpo.models.base import VideoModel
from vggrpo.posttraining.algorithm import Context
from vggrpo.posttraining.scoring import measure_motion, score_latents
from vggrpo.posttraining.watch import BaseMotion, base_motion_by, mean_of
from vggrpo.sampling.generate import solve, video_seed


def validation_prompts(config: TrainConfig) -> list[str]:
    """The fixed prompts; none when there is no validation."""
    validation = config.validation
    if not validation.every:
        return []
    if validation.prompts is not None:
        return read_prompts(validation.prompts)[: validation.num_prompts]
    assert config.data.prompts == EMBEDDED
    from vggrpo.world import sample_prompts

    return sample_prompts(validation.num_prompts, config.seed, split="demo")


class Validation:
    """Samples, measures and decodes the fixed prompts."""

    def __init__(self, context: Context, prompts: Sequence[str]) -> None:
        self.context, self.prompts, self.settings = context, list(prompts), context.config.validation
        self._base: dict[str, BaseMotion] | None = None

    def due(self, number: int) -> bool:
        """Whether to validate before update `number`."""
        return bool(self.settings.every) and number % self.settings.every == 0

    @torch.no_grad()
    def run(self) -> tuple[dict[str, float], list[UInt8[Tensor, "T H W 3"]]]:
        """Mean rewards and motion of the fixed videos, and the first of them."""
        context, config = self.context, self.context.config
        if context.lgm is not None and self._base is None:
            with context.policy.reference():
                motion = measure_motion(context.lgm, self._sample(), config.lgm.micro_batch)
            self._base = base_motion_by(self.prompts, motion.T.tolist())
        with context.policy.averaged():
            latents = self._sample()
        metrics: dict[str, float] = {}
        if context.lgm is not None:
            assert self._base is not None
            scores = score_latents(
                context.lgm,
                latents,
                config.rewards,
                prompts=self.prompts,
                base=self._base,
                micro_batch=config.lgm.micro_batch,
            )
            metrics = {f"reward/{name}": mean_of(v) for name, v in zip(config.rewards, scores.values, strict=True)}
            metrics |= {name: mean_of(value) for name, value in scores.watched.items()}
            metrics["camera_travel_base"] = BaseMotion.mean(list(self._base.values())).travel
        return metrics, [_frames(context.model, latent) for latent in latents[: self.settings.videos]]

    def _sample(self) -> Float[Tensor, "P C T H W"]:
        """Clean latents; every process makes all of them, which are few."""
        context, config = self.context, self.context.config
        model, data, settings = context.model, config.data, self.settings
        shape = model.latent_spec.latent_shape(data.num_frames, data.height, data.width)
        text = context.conditions.text(self.prompts, model.device)
        negative = context.conditions.text([""], model.device)
        parts = []
        for places in torch.arange(len(self.prompts)).split(least_micro_batch(config.sampling.micro_batch)):
            chosen = places.tolist()
            parts.append(
                solve(
                    model,
                    [self.prompts[i] for i in chosen],
                    shape=shape,
                    seeds=[video_seed(i, config.seed) for i in chosen],
                    num_steps=settings.num_steps,
                    guidance_scale=settings.guidance_scale,
                    text=text[places.to(text.device)],
                    negative_text=negative,
                    first_frame=context.conditions.first_frames([self.prompts[i] for i in chosen], model.device),
                )
            )
        return torch.cat(parts)


def _frames(model: VideoModel, latent: Float[Tensor, "C T H W"]) -> UInt8[Tensor, "T H W 3"]:
    video = model.decode(latent[None])[0]  # (3, T, H, W)
    return (video * 255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()
