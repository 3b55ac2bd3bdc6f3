"""Forward-process reinforcement learning in the manner of DiffusionNFT: rewards without log-probabilities.

    sample K videos per prompt with the old policy (any deterministic solver) -> rewards -> advantages A
    r = 1/2 + 1/2 clamp(A / c, -1, 1)
    loss = r |v+ - (eps - x0)|^2 + (1 - r) |v- - (eps - x0)|^2 + kl |v - v_base|^2       (means over the latents)
    v+ = (1 - beta) v_old + beta v_theta,     v- = (1 + beta) v_old - beta v_theta,      at x_t = (1 - t) x0 + t eps

Deviations: the old policy is the current one or the moving average that `optim.ema` keeps (the original moves its own
average, with a schedule), the weighting is uniform over t, and a clip is left out if a reward cannot be computed for it
that could be for another one of its group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vggrpo.posttraining.advantage import asked_rewards, group_advantages, judged_samples
from vggrpo.posttraining.algorithm import Context
from vggrpo.posttraining.batches import items_of, measure_base_motion, sample_clips, share_of
from vggrpo.posttraining.forward_losses import drawn_times, network_input, nft_loss, optimality_of, velocity_error
from vggrpo.posttraining.scoring import reward_weights, score_latents
from vggrpo.posttraining.sft import FINE
from vggrpo.posttraining.watch import BaseMotion, base_motion_by, reward_metrics
from vggrpo.sampling.seeds import derive_seed, seeded_noise
from vggrpo.tracking import Stopwatch


@dataclass(frozen=True)
class _Rollout:
    """This process's clips: samples `mine` of the update. `kept`, `advantages`: of all N samples of all processes."""

    mine: range
    prompts: list[str]
    latents: Float[Tensor, "B C T H W"]
    kept: Int[Tensor, " M"]
    advantages: Float[Tensor, " N"]


class NFT:
    """Negative-aware fine-tuning on the policy's own clips."""

    needs_lgm: ClassVar[bool] = True

    def __init__(self, context: Context) -> None:
        self.context, self.settings = context, context.config.nft
        self.sigmas = context.model.sigmas(FINE, context.config.sampling.shift)
        self.base: dict[str, BaseMotion] = {}

    def state(self) -> dict[str, Any]:
        """What the base model shows by prompt."""
        return {"base_motion": self.base}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.base = base_motion_by(state["base_motion"], state["base_motion"].values())

    def update(self, number: int, watch: Stopwatch) -> dict[str, float]:
        """Sample, score, and take `nft.inner_updates` optimizer steps."""
        rollout, metrics = self._roll_out(number, watch)
        pairs = torch.cartesian_prod(rollout.kept, torch.arange(self.settings.times)).view(-1, 2)
        if len(pairs) == 0:
            return metrics | {"loss": float("nan"), "grad_norm": float("nan")}
        seed = derive_seed(self.context.config.seed, "nft", number)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
        parts = pairs[order].tensor_split(min(self.settings.inner_updates, len(pairs)))
        losses, norms = [], []
        with watch.stage("old"):
            old = [self._old_velocities(rollout, part, number) for part in parts]
        for part, velocities in zip(parts, old, strict=True):
            with watch.stage("backward"):
                sums = self.context.processes.sum(self._backward(rollout, part, velocities, number))
            loss, kl = (sums / len(part)).tolist()
            with watch.stage("optimizer"):
                norms.append(self.context.policy.step(number, loss=loss))
            losses.append((loss, kl))
        mean = [sum(column) / len(losses) for column in zip(*losses, strict=True)]
        return metrics | {
            "loss": mean[0],
            "kl": mean[1],
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": self.context.policy.learning_rate,
        }

    def _roll_out(self, number: int, watch: Stopwatch) -> tuple[_Rollout, dict[str, float]]:
        context, settings, config = self.context, self.settings, self.context.config
        chosen = items_of(number, settings.prompts_per_update, len(context.prompts), config.seed)
        count, size = len(chosen) * settings.samples_per_prompt, settings.samples_per_prompt
        mine = share_of(context, count)
        prompts = [context.prompts[chosen[i // size]] for i in mine]
        with watch.stage("base_motion"):
            measure_base_motion(context, [context.prompts[i] for i in chosen], self.base)
        with watch.stage("rollout"), self._old_policy():
            latents = sample_clips(context, prompts, [derive_seed(config.seed, "clip", number, i) for i in mine])
        assert context.lgm is not None
        with watch.stage("reward"):
            scores = score_latents(context.lgm, latents, config.rewards, prompts=prompts, base=self.base,
                                   micro_batch=config.lgm.micro_batch)  # fmt: skip
        gather = context.processes.gather
        values, valid = gather(scores.values).cpu(), gather(scores.valid.float()).cpu() > 0
        watched = {name: gather(value).cpu() for name, value in scores.watched.items()}
        group, weights = torch.arange(count) // size, reward_weights(config.rewards)
        advantages = group_advantages(
            values,
            group,
            weights=weights,
            mode=config.grpo.mode,
            valid=valid,
            invalid="drop",
        )
        spread = advantages.view(-1, size).ne(0).any(dim=1)
        kept = (spread[group] & judged_samples(valid, asked_rewards(valid, group, weights))).nonzero().flatten()
        metrics = reward_metrics(list(config.rewards), values, valid, group, watched)
        metrics |= {"groups/skipped": float((~spread).sum()), "videos": float(count)}
        return _Rollout(mine, prompts, latents, kept, advantages), metrics

    @contextmanager
    def _old_policy(self) -> Iterator[None]:
        """Inside, the weights are those of the policy that samples."""
        if self.settings.old == "average":
            with self.context.policy.averaged():
                yield
        else:
            yield

    def _local(self, rollout: _Rollout, part: Int[Tensor, "P 2"]) -> list[Int[Tensor, "Q 2"]]:
        """The (sample, time) pairs that are this process's, in micro-batches."""
        here = (part[:, 0] >= rollout.mine.start) & (part[:, 0] < rollout.mine.stop)
        local = part[here]
        return list(local.split(self.settings.micro_batch)) if len(local) else []

    def _states(
        self, rollout: _Rollout, part: Int[Tensor, "Q 2"], number: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """x_t, t, text, target and mask of some pairs; all of it follows from the pair alone, so it is made twice
        alike."""
        model, seed = self.context.model, self.context.config.seed
        places = [int(i) - rollout.mine.start for i in part[:, 0]]
        seeds = [derive_seed(seed, "nft", number, int(i), int(k)) for i, k in part]
        x0 = rollout.latents[places]
        eps = seeded_noise(seeds, x0.shape[1:], model.device)
        times = [drawn_times(1, self.sigmas, torch.Generator().manual_seed(derive_seed(s, "t"))) for s in seeds]
        t = torch.cat(times).to(model.device)
        text = self.context.conditions.text([rollout.prompts[place] for place in places], model.device)
        state, times, mask = network_input(x0, eps, t, pinned=self.context.conditions.has_first_frames)
        return state, times, text, eps - x0, mask

    @torch.no_grad()
    def _old_velocities(self, rollout: _Rollout, part: Int[Tensor, "P 2"], number: int) -> list[Tensor]:
        with self._old_policy():
            return [
                self.context.model.predict_velocity(*self._states(rollout, piece, number)[:3])
                for piece in self._local(rollout, part)
            ]

    def _backward(
        self, rollout: _Rollout, part: Int[Tensor, "P 2"], old: list[Tensor], number: int
    ) -> Float[Tensor, 2]:
        """Accumulate the gradient of this process's pairs; the sums of loss and KL."""
        settings, context = self.settings, self.context
        sums = torch.zeros(2, device=context.model.device)
        for piece, velocity_old in zip(self._local(rollout, part), old, strict=True):
            state, t, text, target, mask = self._states(rollout, piece, number)
            kl = torch.zeros(len(piece), device=state.device)
            if settings.kl > 0:
                with torch.no_grad(), context.policy.reference():
                    reference = context.model.predict_velocity(state, t, text)
            velocity = context.model.predict_velocity(state, t, text)
            if settings.kl > 0:
                kl = velocity_error(velocity, reference, mask)
            optimality = optimality_of(rollout.advantages[piece[:, 0]], settings.advantage_clip).to(state)
            loss = nft_loss(velocity, velocity_old, target, optimality, settings.beta, mask) + settings.kl * kl
            (loss.sum() / len(part)).backward()
            sums += torch.stack([loss.detach().sum(), kl.detach().sum()])
        return sums
