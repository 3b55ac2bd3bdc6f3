"""Supervised fine-tuning, the simplest rival: flow matching on clips that were filtered by the rewards.

    loss = mean over clips of |v(x_t, t) - (eps - x0)|^2 / dims,     x_t = (1 - t) x0 + t eps

The clips are the base model's own, the best of several candidates per prompt (rejection sampling), or videos of a
manifest, the best share of all. They are made once, before the first update, and kept as latents in `OUTPUT/clips`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.posttraining.algorithm import Context
from vggrpo.posttraining.batches import items_of, mean_over_processes, share_of
from vggrpo.posttraining.clips import Clips, best_clips_of_base, clips_of_videos
from vggrpo.posttraining.forward_losses import drawn_times, network_input, velocity_error
from vggrpo.sampling.seeds import derive_seed, seeded_noise
from vggrpo.tracking import Stopwatch

FINE = 1000  # steps of the schedule that times are drawn from


class SFT:
    """Flow matching on stored clips."""

    needs_lgm: ClassVar[bool] = True

    def __init__(self, context: Context) -> None:
        self.context, self.settings = context, context.config.sft
        self.sigmas = context.model.sigmas(FINE, context.config.sampling.shift)
        self._clips: Clips | None = None

    def state(self) -> dict[str, Any]:
        """Nothing: the clips are on disk, and everything else follows from the seed."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `state`."""

    def update(self, number: int, watch: Stopwatch) -> dict[str, float]:
        """One optimizer step on `sft.batch` clips."""
        context, settings, seed = self.context, self.settings, self.context.config.seed
        with watch.stage("clips"):
            clips = self._prepared()
        chosen = items_of(number, settings.batch, len(clips), seed)
        mine = [(place, chosen[place]) for place in share_of(context, settings.batch)]
        times = drawn_times(settings.batch, self.sigmas, torch.Generator().manual_seed(derive_seed(seed, "t", number)))
        losses = []
        with watch.stage("backward"):
            for start in range(0, len(mine), settings.micro_batch):
                part = mine[start : start + settings.micro_batch]
                x0, prompts = clips.read([clip for _, clip in part], context.model.device)
                noise = [derive_seed(seed, "sft", number, place) for place, _ in part]
                loss = self._loss(x0, prompts, times[[place for place, _ in part]], noise)
                (loss.sum() / settings.batch).backward()
                losses.append(loss.detach())
        mean = mean_over_processes(context, torch.cat(losses))
        with watch.stage("optimizer"):
            norm = context.policy.step(number, loss=mean)
        return {
            "loss": mean,
            "grad_norm": norm,
            "learning_rate": context.policy.learning_rate,
            "clips": float(len(clips)),
            "videos": float(self._made() if number == 0 else 0),
        }

    def _made(self) -> int:
        """Videos that the base model had to make for this run."""
        return len(set(self.context.prompts)) * self.settings.candidates if self.settings.videos is None else 0

    def _loss(self, x0: Tensor, prompts: list[str], t: Tensor, noise: list[int]) -> Float[Tensor, " B"]:
        model = self.context.model
        eps = seeded_noise(noise, x0.shape[1:], model.device)
        pinned = self.context.conditions.has_first_frames
        state, times, mask = network_input(x0, eps, t.to(model.device), pinned=pinned)
        velocity = model.predict_velocity(state, times, self.context.conditions.text(prompts, model.device))
        return velocity_error(velocity, eps - x0, mask)

    def _prepared(self) -> Clips:
        if self._clips is None:
            source = self.settings.videos
            self._clips = best_clips_of_base(self.context) if source is None else clips_of_videos(self.context, source)
        return self._clips
