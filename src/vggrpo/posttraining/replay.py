"""Replay: score the stochastic steps of a roll-out again, with gradient, in micro-batches over samples and steps at
once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vggrpo.config import GRPOConfig
from vggrpo.models.base import VideoModel
from vggrpo.posttraining.loss import clipped_policy_loss, gaussian_kl
from vggrpo.posttraining.micro_batch import MicroBatch
from vggrpo.posttraining.policy import Policy
from vggrpo.sampling.flow_sde import SDEStep, diffusion_scale, sde_step
from vggrpo.sampling.rollout import NoiseSettings, Trajectory, guided_velocity


@dataclass(frozen=True)
class Replayer:
    """The policy and how its steps were made; scores transitions (sample, step) of one roll-out.

    Attributes:
        model: calls the policy's network.
        policy: knows the reference.
        settings: the update's hyperparameters.
        noise: the roll-out's noise.
        micro_batch: transitions per network call.
        guidance_scale: the roll-out's guidance, 1 = none.
        negative_text: embedding for guidance.
    """

    model: VideoModel
    policy: Policy
    settings: GRPOConfig
    noise: NoiseSettings
    micro_batch: MicroBatch
    guidance_scale: float = 1.0
    negative_text: Float[Tensor, "1 L D"] | None = None

    def step(self, trajectory: Trajectory, text: Float[Tensor, "B L D"], chosen: Int[Tensor, "M 2"]) -> SDEStep:
        """Score M transitions, given as (sample, place in the window)."""
        device = self.model.device
        x, x_next, t, t_next = _pick(trajectory, chosen, device)
        velocity = guided_velocity(
            self.model,
            x,
            t,
            text[chosen[:, 0].to(text.device)],
            guidance_scale=self.guidance_scale,
            negative_text=self.negative_text,
            pinned=trajectory.pinned,
        )
        return sde_step(x, velocity, t, t_next, next_sample=x_next, mask=trajectory.mask, **vars(self.noise))

    def old_policy(self, trajectory: Trajectory, text: Tensor, chosen: Int[Tensor, "M 2"]) -> OldPolicy:
        """The policy now as the old one, with the replay's own batching: for when the roll-out's log-probabilities
        differ too much from it."""
        return self.micro_batch.run(
            len(chosen), self.model.device, lambda size: self._old_policy(trajectory, text, chosen, size)
        )

    @torch.no_grad()
    def _old_policy(self, trajectory: Trajectory, text: Tensor, chosen: Tensor, size: int) -> OldPolicy:
        log_probs, means = [], []
        for part in chosen.split(size):
            step = self.step(trajectory, text, part)
            log_probs.append(step.log_prob)
            if trajectory.means:
                means += [mean.to(trajectory.means[0].device) for mean in step.mean]
        return OldPolicy(torch.cat(log_probs) if log_probs else trajectory.log_probs.new_zeros(0), means)

    def backward(
        self,
        trajectory: Trajectory,
        text: Float[Tensor, "B L D"],
        chosen: Int[Tensor, "M 2"],
        old: OldPolicy,
        advantages: Float[Tensor, " B"],
        total: int,
        filler: int = 0,
    ) -> ReplayStatistics:
        """The gradient of `sum (policy loss + beta KL) / total` over M transitions; there must be none before.

        Args:
            total: transitions of all processes, so that gradients can be summed over them.
            filler: so many of the last transitions have no weight; they only keep processes in step.
        """
        return self.micro_batch.run(
            len(chosen),
            self.model.device,
            lambda size: self._backward(trajectory, text, chosen, old, advantages, total, filler, size),
            undo=self.policy.discard_gradients,
        )

    def _backward(
        self,
        trajectory: Trajectory,
        text: Tensor,
        chosen: Tensor,
        old: OldPolicy,
        advantages: Tensor,
        total: int,
        filler: int,
        size: int,
    ) -> ReplayStatistics:
        statistics = ReplayStatistics()
        for places in torch.arange(len(chosen)).split(size):
            part, counts = chosen[places], places < len(chosen) - filler
            # The reference goes first: switching the adapter off and on must not happen between forward and backward.
            reference = self._reference(trajectory, text, part) if self.settings.kl > 0 else None
            step = self.step(trajectory, text, part)
            policy = clipped_policy_loss(
                step.log_prob,
                old.log_probs[places.to(old.log_probs.device)].to(step.log_prob),
                advantages[part[:, 0].to(advantages.device)].to(step.log_prob),
                clip=self.settings.clip,
                advantage_clip=self.settings.advantage_clip,
                **(self._guard(trajectory, part, step, old, places) if self.settings.ratio_norm else {}),
            )
            loss = policy.per_sample
            kl = torch.zeros_like(loss)
            if reference is not None:
                kl = gaussian_kl(
                    step.mean, reference.mean, self._kl_scale(trajectory, part, step), mask=trajectory.mask
                )
                loss = loss + self.settings.kl * kl
            counts = counts.to(loss.device)
            (torch.where(counts, loss, 0.0 * loss).sum() / total).backward()
            statistics.add(loss[counts], kl[counts], policy.ratio[counts], policy.clipped[counts])
        return statistics

    def _guard(
        self, trajectory: Trajectory, part: Tensor, step: SDEStep, old: OldPolicy, places: Tensor
    ) -> dict[str, Tensor]:
        """What GRPO-Guard normalises a step's ratio with."""
        old_mean = torch.stack([old.means[i] for i in places.tolist()]).to(step.mean)
        index = torch.tensor(trajectory.steps)[part[:, 1]].to(trajectory.sigmas.device)
        return {
            "mean_shift": gaussian_kl(step.mean, old_mean, step.std, mask=trajectory.mask),
            "std": step.std.flatten(),
            "step_length": trajectory.sigmas[index] - trajectory.sigmas[index + 1],
        }

    @torch.no_grad()
    def _reference(self, trajectory: Trajectory, text: Tensor, chosen: Tensor) -> SDEStep:
        with self.policy.reference():
            return self.step(trajectory, text, chosen)

    def _kl_scale(self, trajectory: Trajectory, chosen: Tensor, step: SDEStep) -> Float[Tensor, "M 1 1 1 1"]:
        """What divides the distance of the means: the step's std, or flow_grpo's diffusion coefficient without |dt|."""
        if self.settings.kl_unit == "gaussian":
            return step.std
        index = torch.tensor(trajectory.steps)[chosen[:, 1]].to(trajectory.sigmas.device)
        t, t_next = trajectory.sigmas[index], trajectory.sigmas[index + 1]
        return diffusion_scale(t, t_next, **vars(self.noise)).view(-1, 1, 1, 1, 1)


@dataclass(frozen=True)
class OldPolicy:
    """The policy that took M transitions.

    Attributes:
        log_probs: of the transitions, (M,).
        means: of the Gaussians, M tensors (C, T', H', W'); only where the roll-out kept them.
    """

    log_probs: Float[Tensor, " M"]
    means: list[Tensor]

    @classmethod
    def of(cls, trajectory: Trajectory, chosen: Int[Tensor, "M 2"]) -> OldPolicy:
        """As the roll-out saw it."""
        means = [trajectory.means[w][i] for i, w in chosen.tolist()] if trajectory.means else []
        return cls(trajectory.log_probs[chosen[:, 0], chosen[:, 1]], means)


@dataclass
class ReplayStatistics:
    """Sums over transitions; kept as tensors, so that nothing waits for the device until the end."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    deviation: Tensor | None = None
    count: int = 0

    def add(self, loss: Tensor, kl: Tensor, ratio: Tensor, clipped: Tensor) -> None:
        """Count one micro-batch."""
        if len(loss) == 0:
            return
        for name, value in (("loss", loss), ("kl", kl), ("ratio", ratio), ("clip_fraction", clipped.float())):
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double().sum()
        deviation = (ratio - 1).abs().max()
        self.deviation = deviation if self.deviation is None else torch.maximum(self.deviation, deviation)
        self.count += len(loss)

    def merge(self, other: ReplayStatistics) -> None:
        """Count another pass."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if other.deviation is not None:
            self.deviation = (
                other.deviation if self.deviation is None else torch.maximum(self.deviation, other.deviation)
            )
        self.count += other.count


def _pick(
    trajectory: Trajectory, chosen: Int[Tensor, "M 2"], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States before and after, and times, of M transitions, on `device`."""
    pairs = chosen.tolist()
    x = torch.stack([trajectory.samples[w][i] for i, w in pairs]).to(device).float()
    x_next = torch.stack([trajectory.next_samples[w][i] for i, w in pairs]).to(device).float()
    index = torch.tensor([trajectory.steps[w] for _, w in pairs], device=trajectory.sigmas.device)
    return x, x_next, trajectory.sigmas[index].to(device), trajectory.sigmas[index + 1].to(device)


def all_transitions(samples: Int[Tensor, " B"], window: int) -> Int[Tensor, "M 2"]:
    """(sample, place in the window) for every kept sample and stochastic step."""
    return torch.cartesian_prod(samples, torch.arange(window)).view(-1, 2)


def inner_parts(transitions: Int[Tensor, "M 2"], parts: int, split: bool, seed: int) -> Iterator[Int[Tensor, "P 2"]]:
    """What each of `parts` optimizer steps replays: a random share of the transitions, or all of them."""
    if parts == 1 or not split:
        yield from [transitions] * parts
        return
    order = torch.randperm(len(transitions), generator=torch.Generator().manual_seed(seed))
    yield from transitions[order].tensor_split(parts)
