"""Test-time latent reward guidance: steer a sample uphill on a differentiable reward of its latents, without training.

At chosen steps of the sampler (METHOD section 4)

    v~ = v - scale * t / (1 - t) * grad_{z_t} r( x0_hat(z_t) ),      x0_hat = z_t - t v(z_t)

The sampler goes from t = 1 to 0, so subtracting from the velocity adds to the sample. The gradient passes through the
network; with `detach_velocity` it takes v as a constant (x0_hat then moves one to one with z_t), which saves the
network's backward pass and its memory. No video is decoded.

t / (1 - t) diverges at t = 1: it is never larger than at `max_t`, and the first step is never guided. A sample whose
reward cannot be computed, or whose gradient is not finite, is left alone at that step and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.errors import UserError

LatentReward = Callable[[Float[Tensor, "B C T H W"], Sequence[str]], Float[Tensor, " B"]]
"""Clean latents and their prompts -> one reward a sample, higher is better, NaN where it cannot be computed."""


@dataclass
class RewardGuidance:
    """When and how strongly the reward steers; counts what it did.

    Attributes:
        reward: differentiable in the latents.
        scale: strength; 0 switches guidance off, bit for bit.
        every: steps between two guided ones (paper: 20 of 50, so steps 20 and 40).
        max_t: t / (1 - t) is clamped to its value here.
        detach_velocity: leave the network out of the gradient.
        skipped: samples without a usable gradient, counted once a step.
    """

    reward: LatentReward
    scale: float
    every: int = 20
    max_t: float = 0.95
    detach_velocity: bool = False
    skipped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise UserError(f"the guidance scale is {self.scale}; give a finite number from 0 up")
        if self.every < 1:
            raise UserError(f"guidance every {self.every} steps is impossible; give 1 or more")
        if not 0 < self.max_t < 1:
            raise UserError(f"max_t is {self.max_t}; it must lie between 0 and 1")

    def acts(self, step: int) -> bool:
        """Whether step `step` (0 is the first) is guided."""
        return self.scale > 0 and step > 0 and step % self.every == 0

    def guided_steps(self, num_steps: int) -> int:
        """How many of `num_steps` steps are guided."""
        return sum(self.acts(step) for step in range(num_steps))

    def check_steps(self, num_steps: int) -> None:
        """Guidance that would never act must not pass for guidance.

        Raises:
            UserError: when the scale is above 0 and none of `num_steps` steps is guided; names an `every` that works.
        """
        if self.scale == 0 or self.guided_steps(num_steps):
            return
        if num_steps < 2:
            raise UserError(f"of {num_steps} step none is guided, because the first never is; take 2 steps or more")
        like_the_paper = max(1, num_steps * 2 // 5)  # steps 20 and 40 of 50
        raise UserError(
            f"guidance every {self.every} steps guides none of {num_steps}; set every (--guidance-every) to "
            f"{num_steps - 1} or less, such as {like_the_paper}, or take more than {self.every} steps"
        )

    def take_skipped(self) -> int:
        """`skipped`, which starts from 0 again."""
        count, self.skipped = self.skipped, 0
        return count

    def velocity(
        self,
        predict: Callable[[Float[Tensor, "B C T H W"]], Float[Tensor, "B C T H W"]],
        latents: Float[Tensor, "B C T H W"],
        t: Float[Tensor, " B"],
        prompts: Sequence[str],
    ) -> Float[Tensor, "B C T H W"]:
        """``v~`` at (latents, t).

        Args:
            predict: the network's velocity at the given state.
            latents: z_t.
            t: flow time, one a sample.
            prompts: one a sample; some rewards read them.
        """
        time = t.to(latents).view(-1, *[1] * (latents.ndim - 1))
        with torch.enable_grad():
            state = latents.detach().requires_grad_()
            if self.detach_velocity:
                with torch.no_grad():
                    velocity = predict(state)
            else:
                velocity = predict(state)
            value = self.reward(state - time * velocity, prompts)
            usable = value.detach().isfinite()
            gradient = torch.zeros_like(latents)
            if bool(usable.any()):
                (gradient,) = torch.autograd.grad(value[usable].sum(), state)
        finite = usable & gradient.isfinite().flatten(1).all(1)
        self.skipped += int((~finite).sum())
        gradient = torch.where(finite.view(-1, *[1] * (latents.ndim - 1)), gradient, torch.zeros_like(gradient))
        factor = time.clamp(max=self.max_t) / (1 - time.clamp(max=self.max_t))
        return velocity.detach() - self.scale * factor * gradient
