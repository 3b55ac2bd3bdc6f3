"""Direct training: backpropagate the differentiable latent reward through the last denoising steps (as DRaFT-K).

    loss = - mean_k r( z_0(theta) )  +  kl * mean over the last steps of |v - v_base|^2 / dims

The first steps run without gradient, the last `direct.grad_steps` with it (truncation). r is the weighted mean of the
configured rewards, each in units of its own spread over clips (a running standard deviation), as GRPO normalises each
by itself: as they are, the motion reward, which spreads fifteen times as wide, would leave the geometry reward no say.
With `grpo.mode: sum` they are added as they are. One that cannot be computed for a clip, or weighs 0, has no part in
that clip's r. (Clips are not compared, so a reward that does not apply to a prompt needs no group to be told.) A clip
without any reward has no part in the update and is counted.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.posttraining.algorithm import Context
from vggrpo.posttraining.batches import items_of, latent_shape, measure_base_motion, share_of
from vggrpo.posttraining.forward_losses import velocity_error
from vggrpo.posttraining.watch import BaseMotion, base_motion_by, reward_context
from vggrpo.rewards import get_reward
from vggrpo.sampling.first_frame import acted_frames, pin_first_frame
from vggrpo.sampling.flow_sde import ode_step
from vggrpo.sampling.rollout import guided_velocity
from vggrpo.sampling.seeds import derive_seed, seeded_noise
from vggrpo.tracking import Stopwatch

MEMORY = 0.9
"""Share of a reward's running variance that an update leaves."""


class Direct:
    """Gradient ascent on the reward itself."""

    needs_lgm: ClassVar[bool] = True

    def __init__(self, context: Context) -> None:
        self.context, self.settings = context, context.config.direct
        sampling, model = context.config.sampling, context.model
        self.sigmas = model.sigmas(sampling.num_steps, sampling.shift).to(model.device)
        self.shape = latent_shape(context)
        self.base: dict[str, BaseMotion] = {}
        self.variance: dict[str, float] = {}  # of each reward over clips; empty before the first update

    def state(self) -> dict[str, Any]:
        """What the base model shows by prompt, and how widely each reward spreads."""
        return {"base_motion": self.base, "variance": self.variance}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.base = base_motion_by(state["base_motion"], state["base_motion"].values())
        self.variance = dict(state["variance"])

    def update(self, number: int, watch: Stopwatch) -> dict[str, float]:
        """One optimizer step on fresh clips of the policy."""
        context, settings, seed = self.context, self.settings, self.context.config.seed
        chosen = items_of(number, settings.prompts_per_update, len(context.prompts), seed)
        count = len(chosen) * settings.samples_per_prompt
        jobs = [
            (context.prompts[chosen[i // settings.samples_per_prompt]], derive_seed(seed, "direct", number, i))
            for i in share_of(context, count)
        ]
        with watch.stage("base_motion"):
            measure_base_motion(context, [context.prompts[i] for i in chosen], self.base)
        if not self.variance and context.config.grpo.mode == "decoupled":
            with watch.stage("spread"), torch.no_grad():
                self._observe(self._over_clips(jobs, count))
        with watch.stage("backward"):
            total = self._over_clips(jobs, count)
        self._observe(total)
        with watch.stage("optimizer"):
            norm = context.policy.step(number, loss=total["loss"])
        known = {name: total[f"known/{name}"] for name in self.context.config.rewards}
        rewards = {f"reward/{n}": total[f"reward/{n}"] / k if k else math.nan for n, k in known.items()}
        return rewards | {
            "loss": total["loss"] / count,
            "kl": total["kl"] / count,
            "samples/invalid": count - total["valid"],
            "grad_norm": norm,
            "learning_rate": context.policy.learning_rate,
            "videos": float(count),
        }

    def _over_clips(self, jobs: list[tuple[str, int]], count: int) -> dict[str, float]:
        """Sums over the clips of all processes; with gradients on, theirs are accumulated on the way."""
        sums: dict[str, Tensor] = {}
        for start in range(0, len(jobs), self.settings.micro_batch):
            for name, value in self._some_clips(jobs[start : start + self.settings.micro_batch], count).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
        totals = self.context.processes.sum(torch.stack([sums[name] for name in sorted(sums)]))
        return dict(zip(sorted(sums), totals.tolist(), strict=True))

    def _observe(self, total: dict[str, float]) -> None:
        """Take the rewards' variance over these clips into the running one."""
        for name in self.context.config.rewards:
            known = max(total[f"known/{name}"], 1.0)
            now = max(total[f"square/{name}"] / known - (total[f"reward/{name}"] / known) ** 2, 0.0)
            self.variance[name] = MEMORY * self.variance.get(name, now) + (1 - MEMORY) * now

    def _unit(self, name: str) -> float:
        """What a reward is divided by; 1 for one that told no two clips apart."""
        grpo, variance = self.context.config.grpo, self.variance.get(name, 0.0)
        return math.sqrt(variance) + grpo.eps if variance > 0 and grpo.mode == "decoupled" else 1.0

    def _some_clips(self, jobs: list[tuple[str, int]], count: int) -> dict[str, Tensor]:
        """Sums over a few clips, for the log; with gradients on, theirs are accumulated."""
        prompts = [prompt for prompt, _ in jobs]
        latents, kl = self._sample(prompts, [seed for _, seed in jobs])
        assert self.context.lgm is not None
        prediction = self.context.lgm(latents)
        context = reward_context(prompts, self.base)
        terms = self.context.config.rewards
        weights = sum(term.weight for term in terms.values())
        values = {n: get_reward(n)(prediction, context=context, **t.options).value for n, t in terms.items()}
        known = {name: value.detach().isfinite() for name, value in values.items()}
        safe = {name: torch.where(known[name], value, torch.zeros_like(value)) for name, value in values.items()}
        weighed = [name for name in terms if terms[name].weight > 0]
        total = torch.stack([terms[n].weight / weights / self._unit(n) * safe[n] for n in weighed]).sum(0)
        ok = torch.stack([known[name] for name in weighed]).any(0)
        loss = -total + self.settings.kl * kl
        if torch.is_grad_enabled():
            (loss.sum() / count).backward()
        sums = {f"reward/{name}": value.detach().sum() for name, value in safe.items()}
        sums |= {f"square/{name}": value.detach().square().sum() for name, value in safe.items()}
        sums |= {f"known/{name}": mask.sum() for name, mask in known.items()}
        return {n: v.double() for n, v in {**sums, "loss": loss.detach().sum(), "kl": kl.detach().sum(),
                                           "valid": ok.sum()}.items()}  # fmt: skip

    def _sample(self, prompts: list[str], seeds: list[int]) -> tuple[Float[Tensor, "B C T H W"], Float[Tensor, " B"]]:
        """Clean latents with gradient through the last steps, and the distance to the base model in these steps."""
        context, model, scale = self.context, self.context.model, self.context.config.sampling.guidance_scale
        text = context.conditions.text(prompts, model.device)
        negative = context.conditions.text([""], model.device) if scale != 1 else None
        given = context.conditions.first_frames(prompts, model.device)
        mask = None if given is None else acted_frames(self.shape[1], model.device)

        def velocity(latents: Tensor, step: int) -> Tensor:
            time, pinned = self.sigmas[step].expand(len(seeds)), given is not None
            return guided_velocity(
                model, latents, time, text, guidance_scale=scale, negative_text=negative, pinned=pinned
            )

        def advance(latents: Tensor, velocity: Tensor, step: int) -> Tensor:
            return ode_step(latents, velocity, self.sigmas[step], self.sigmas[step + 1], mask=mask)

        first, last = len(self.sigmas) - 1 - self.settings.grad_steps, len(self.sigmas) - 1
        kl = torch.zeros(len(seeds), device=model.device)
        with torch.no_grad():
            latents = pin_first_frame(seeded_noise(seeds, self.shape, model.device), given)
            for step in range(first):
                latents = advance(latents, velocity(latents, step), step)
            # The reference must not come between a forward and its backward, so the states are made once without.
            references, state = [], latents
            for step in range(first, last if self.settings.kl > 0 else first):
                with context.policy.reference():
                    references.append(velocity(state, step))
                if step < last - 1:
                    state = advance(state, velocity(state, step), step)
        for step in range(first, last):
            now = velocity(latents, step)
            if references:
                kl = kl + velocity_error(now, references[step - first], mask) / self.settings.grad_steps
            latents = advance(latents, now, step)
        return latents, kl
