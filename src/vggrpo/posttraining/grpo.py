"""Group-relative policy optimisation in latent space (METHOD section 3): one update, readable from top to bottom.

    roll out K videos per prompt -> LGM -> rewards -> advantages within the group -> replay with gradient -> optimizer
    step

All randomness of update n comes from (seed, n), so a resumed run is the run that was not interrupted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.posttraining.advantage import asked_rewards, group_advantages, judged_samples
from vggrpo.posttraining.algorithm import Context
from vggrpo.posttraining.batches import items_of
from vggrpo.posttraining.micro_batch import replay_micro_batch, rollout_micro_batch
from vggrpo.posttraining.replay import OldPolicy, Replayer, ReplayStatistics, all_transitions, inner_parts
from vggrpo.posttraining.scoring import Scores, measure_motion, reward_weights, score_latents
from vggrpo.posttraining.watch import MotionWatch, base_motion_by, reward_metrics
from vggrpo.sampling.rollout import NoiseSettings, Trajectory, choose_window, rollout
from vggrpo.sampling.seeds import derive_seed
from vggrpo.tracking import Stopwatch

logger = logging.getLogger(__name__)


class GRPO:
    """The state of a GRPO run beside adapter and optimizer: base motion by prompt, and how old log-probabilities are
    made."""

    needs_lgm: ClassVar[bool] = True

    def __init__(self, context: Context) -> None:
        config, model = context.config, context.model
        assert context.lgm is not None
        self.config, self.model, self.lgm, self.prompts = config, model, context.lgm, list(context.prompts)
        self.policy, self.processes, self.conditions = context.policy, context.processes, context.conditions
        self.shape = model.latent_spec.latent_shape(config.data.num_frames, config.data.height, config.data.width)
        self.sigmas = model.sigmas(config.sampling.num_steps, config.sampling.shift)
        sampling = config.sampling
        self.noise = NoiseSettings(
            sampling.noise_level, sampling.variant, sampling.max_t, sampling.sigma_min, sampling.sigma_max
        )
        negative = self._encode([""]) if sampling.guidance_scale != 1 else None
        videos = config.grpo.prompts_per_update * config.grpo.samples_per_prompt
        self.at_once = rollout_micro_batch(config, model, self.processes, kept=math.ceil(videos / self.processes.size))
        replayed = replay_micro_batch(config, model, self.processes)
        self.replayer = Replayer(
            model, self.policy, config.grpo, self.noise, replayed, sampling.guidance_scale, negative
        )
        self.motion = MotionWatch(config.grpo.collapse_warning)
        self.recompute_old = False
        self.ratio_checked = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of this object (JSON)."""
        return {
            "base_motion": self.motion.base,
            "recent_motion": self.motion.recent,
            "recompute_old": self.recompute_old,
            "ratio_checked": self.ratio_checked,
            # Found anew they could differ, and with them the rounding.
            "micro_batches": [self.at_once.found, self.replayer.micro_batch.found],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.motion.base = base_motion_by(state["base_motion"], state["base_motion"].values())
        self.motion.recent = state["recent_motion"]
        self.recompute_old, self.ratio_checked = state["recompute_old"], state["ratio_checked"]
        self.at_once.found, self.replayer.micro_batch.found = state.get("micro_batches", (None, None))

    def update(self, number: int, watch: Stopwatch) -> dict[str, float]:
        """Do update `number` (0 is the first) and return its metrics."""
        grpo = self.config.grpo
        group_size = grpo.samples_per_prompt
        chosen = self._prompts_of(number)
        count = len(chosen) * group_size
        mine = range(count)[self.processes.share(count)]
        prompts = [self.prompts[chosen[i // group_size]] for i in mine]
        window = self._window(number)
        with watch.stage("base_motion"):
            self._measure_base([self.prompts[i] for i in chosen], window)
        with watch.stage("rollout"):
            text = self._encode(prompts)
            trajectory = self._rollout(number, mine, prompts, text, window)
        with watch.stage("reward"):
            scores = self._score(trajectory.latents, prompts)
        group = torch.arange(count) // group_size
        values, valid = (
            self.processes.gather(scores.values).cpu(),
            self.processes.gather(scores.valid.float()).cpu() > 0,
        )
        for name, ok in zip(self.config.rewards, valid, strict=True):
            if not ok.any():
                logger.warning(
                    "update %d: the reward %s could not be computed for any sample and has no part in it", number, name
                )
        advantages = self._advantages(values, valid, group)
        active = advantages.view(-1, group_size).ne(0).any(dim=1)  # groups with any spread
        kept = active[group]
        if grpo.invalid == "drop":
            asked = asked_rewards(valid, group, reward_weights(self.config.rewards))
            kept = kept & judged_samples(valid, asked)
        with watch.stage("replay"):
            statistics = self._optimize(number, trajectory, text, kept.nonzero().flatten(), advantages, mine, watch)
        watched = {name: self.processes.gather(value).cpu() for name, value in scores.watched.items()}
        metrics = reward_metrics(list(self.config.rewards), values, valid, group, watched)
        metrics |= self.motion.metrics(
            [self.prompts[i] for i in chosen],
            metrics["camera_travel"],
            metrics["dynamic_share"],
            metrics["subject_share"],
            number,
        )
        metrics |= {"groups/skipped": float((~active).sum()), "videos": float(count)}
        return metrics | statistics

    def _prompts_of(self, number: int) -> list[int]:
        """Indices of the update's prompts: a new random order of all prompts each time round."""
        return items_of(number, self.config.grpo.prompts_per_update, len(self.prompts), self.config.seed)

    def _window(self, number: int) -> tuple[int, ...]:
        sampling = self.config.sampling
        return choose_window(
            sampling.num_steps,
            sampling.window,
            kind=sampling.window_kind,
            first=sampling.window_first,
            last=sampling.window_last,
            seed=derive_seed(self.config.seed, "window", number),
        )

    def _encode(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        return self.conditions.text(prompts, self.model.device)

    def _rollout(
        self, number: int, mine: range, prompts: Sequence[str], text: Tensor, window: tuple[int, ...]
    ) -> Trajectory:
        """The policy's videos: samples `mine` of the update."""
        seed, group_size = self.config.seed, self.config.grpo.samples_per_prompt
        shared = self.config.sampling.shared_noise
        slots = [divmod(i, group_size) for i in mine]  # (prompt slot, sample of the group)
        return self._sample(
            prompts,
            text,
            window,
            noise_seeds=[derive_seed(seed, "noise", number, slot, "all" if shared else k) for slot, k in slots],
            step_seeds=[derive_seed(seed, "sde", number, slot, k) for slot, k in slots],
            slots=[slot for slot, _ in slots],
        )

    def _sample(
        self,
        prompts: Sequence[str],
        text: Tensor,
        window: Sequence[int],
        *,
        noise_seeds: list[int],
        step_seeds: list[int],
        slots: list[int],
    ) -> Trajectory:
        sampling = self.config.sampling
        roll_out = partial(
            rollout,
            self.model,
            text,
            shape=self.shape,
            noise_seeds=noise_seeds,
            step_seeds=step_seeds,
            sigmas=self.sigmas,
            sde_steps=window,
            noise=self.noise,
            guidance_scale=sampling.guidance_scale,
            negative_text=self.replayer.negative_text,
            # With split weights all processes must call the network equally often, so nothing is computed once.
            prompt_ids=list(range(len(slots))) if self.policy.sharded else slots,
            offload=sampling.offload,
            first_frame=self.conditions.first_frames(prompts, self.model.device),
            keep_means=self.config.grpo.ratio_norm,
            keep_dtype=getattr(torch, sampling.trajectory_dtype),
        )
        return self.at_once.run(len(slots), self.model.device, lambda size: roll_out(micro_batch=size))

    def _measure_base(self, prompts: Sequence[str], window: tuple[int, ...]) -> None:
        """Motion of the base model for prompts not seen before, with the roll-out's own sampler."""
        samples = self.config.grpo.base_travel_samples
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.motion.base]
        if not samples or not new:
            return
        jobs = [(prompt, derive_seed(self.config.seed, "base", prompt, k)) for prompt in new for k in range(samples)]
        # Each process measures a part where they divide; else all measure all.
        divides = len(jobs) % self.processes.size == 0
        mine = jobs[self.processes.share(len(jobs))] if divides else jobs
        seeds, repeated = [seed for _, seed in mine], [prompt for prompt, _ in mine]
        with self.policy.reference():
            latents = self._sample(
                repeated,
                self._encode(repeated),
                window,
                noise_seeds=seeds,
                step_seeds=seeds,
                slots=list(range(len(seeds))),
            ).latents
        motion = measure_motion(self.lgm, latents, self.config.lgm.micro_batch)
        motion = (self.processes.gather(motion) if divides else motion).view(3, len(new), samples).nanmean(dim=2)
        self.motion.base.update(base_motion_by(new, motion.T.tolist()))

    def _score(self, latents: Tensor, prompts: Sequence[str]) -> Scores:
        return score_latents(
            self.lgm,
            latents,
            self.config.rewards,
            prompts=prompts,
            base=self.motion.base,
            micro_batch=self.config.lgm.micro_batch,
        )

    def _advantages(self, values: Tensor, valid: Tensor, group: Tensor) -> Float[Tensor, " N"]:
        grpo = self.config.grpo
        return group_advantages(
            values,
            group,
            weights=reward_weights(self.config.rewards),
            mode=grpo.mode,
            std=grpo.std,
            std_scope=grpo.std_scope,
            eps=grpo.eps,
            valid=valid,
            invalid=grpo.invalid,
        )

    def _optimize(
        self,
        number: int,
        trajectory: Trajectory,
        text: Tensor,
        kept: Tensor,
        advantages: Tensor,
        mine: range,
        watch: Stopwatch,
    ) -> dict[str, float]:
        """`inner_updates` optimizer steps on the transitions of the samples `kept` (of all processes), of which `mine`
        are here. All processes split them alike, so that the number of processes changes nothing."""
        grpo = self.config.grpo
        if len(kept) == 0:
            return {"loss": math.nan, "grad_norm": math.nan}
        transitions = all_transitions(kept, len(trajectory.steps))
        seed = derive_seed(self.config.seed, "inner", number)
        everywhere = list(inner_parts(transitions, grpo.inner_updates, grpo.inner_split, seed))
        local = [_local_part(part, mine) for part in everywhere]
        fillers = [self._filler(part) for part in local]
        parts = [torch.cat([part, filler]) for part, filler in zip(local, fillers, strict=True)]
        advantages = advantages[mine.start : mine.stop]
        statistics, norms = ReplayStatistics(), []
        old = [self._old_policy(trajectory, text, part) for part in parts]
        for inner, part in enumerate(parts):
            total, filler = max(1, len(everywhere[inner])), len(fillers[inner])
            result = self.replayer.backward(trajectory, text, part, old[inner], advantages, total, filler)
            if inner == 0 and not self._first_ratio_holds(result):
                self.policy.discard_gradients()
                old = [self._old_policy(trajectory, text, each) for each in parts]
                result = self.replayer.backward(trajectory, text, part, old[inner], advantages, total, filler)
                if not self._first_ratio_holds(result):
                    raise UserError(
                        "the replayed ratio is not 1 before the first optimizer step: the model is not deterministic; "
                        "switch off dropout, or set model.dtype: float32"
                    )
            statistics.merge(result)
            with watch.stage("optimizer"):
                norms.append(self._step(number, result))
        return self._statistics(statistics, norms)

    def _filler(self, part: Tensor) -> Int[Tensor, "F 2"]:
        """Transitions without weight: with split weights all processes must replay equally many."""
        missing = self.processes.largest(len(part), self.model.device) - len(part) if self.policy.sharded else 0
        return torch.zeros(missing, 2, dtype=torch.long)

    def _old_policy(self, trajectory: Trajectory, text: Tensor, part: Tensor) -> OldPolicy:
        if self.recompute_old:
            return self.replayer.old_policy(trajectory, text, part)
        return OldPolicy.of(trajectory, part)

    def _first_ratio_holds(self, result: ReplayStatistics) -> bool:
        """Before the run's first optimizer step the ratio must be 1; if it is not, old log-probabilities get
        recomputed."""
        if self.ratio_checked:
            return True
        limit = 1e-5 if self.config.model.dtype == "float32" else self.config.grpo.clip / 10
        # NaN is not this check's business: the finite check before the optimizer step reports it.
        off = result.deviation is not None and bool(result.deviation >= limit)
        if self.processes.any(off, self.model.device):
            if not self.recompute_old:
                logger.warning(
                    "roll-out and replay differ by more than %.0e; old log-probabilities are recomputed from now on",
                    limit,
                )
            self.recompute_old = True
            return False
        self.ratio_checked = True
        return True

    def _step(self, number: int, result: ReplayStatistics) -> float:
        """The optimizer's step; returns the gradient's norm."""
        zero = torch.zeros((), dtype=torch.float64, device=self.model.device)
        return self.policy.step(number, loss=sum(result.sums.values(), zero))

    def _statistics(self, statistics: ReplayStatistics, norms: Sequence[float]) -> dict[str, float]:
        names = ("loss", "kl", "ratio", "clip_fraction")
        zero = torch.zeros((), dtype=torch.float64, device=self.model.device)
        sums = torch.stack([statistics.sums.get(name, zero) for name in names] + [zero + statistics.count])
        sums = self.processes.sum(sums.float() if self.model.device.type == "mps" else sums)
        means = (sums[:-1] / sums[-1]).tolist()
        metrics = dict(zip(names, means, strict=True))
        deviation = statistics.deviation if statistics.deviation is not None else zero
        metrics["ratio_deviation"] = float(self.processes.gather(deviation.float().view(1)).max())
        return metrics | {"grad_norm": sum(norms) / len(norms), "learning_rate": self.policy.learning_rate}


def _local_part(transitions: Int[Tensor, "M 2"], mine: range) -> Int[Tensor, "P 2"]:
    """The transitions whose sample is in `mine`, with samples counted from its start."""
    here = (transitions[:, 0] >= mine.start) & (transitions[:, 0] < mine.stop)
    return transitions[here] - torch.tensor([mine.start, 0])
