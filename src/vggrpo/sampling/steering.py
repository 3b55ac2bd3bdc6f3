"""What a latent reward does while videos are made, beyond training: guidance, best of N, or both; and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write_json
from vggrpo.sampling.best_of import best_of
from vggrpo.sampling.guidance import LatentReward, RewardGuidance


@dataclass
class Steering:
    """A reward that steers sampling.

    Attributes:
        reward: judges the candidates (guidance brings its own, usually the same).
        name: says in the settings which reward it is.
        guidance: None = no guidance.
        candidates: keep the best of so many; 1 = no choice.
        options: what the reward was made with beside its defaults, by the names of its parts; for the settings too.
    """

    reward: LatentReward
    name: str
    guidance: RewardGuidance | None = None
    candidates: int = 1
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise UserError(f"the best of {self.candidates} candidates does not exist; give 1 or more")
        if self.guidance is not None and self.guidance.scale == 0:
            self.guidance = None

    def settings(self) -> dict[str, Any]:
        """What decides the videos; None for what is off, so that plain sampling stays plain."""
        by: dict[str, Any] = {"reward": self.name}
        if self.options:
            by["options"] = {name: dict(options) for name, options in self.options.items()}
        guided = None
        if self.guidance is not None:
            names = ("scale", "every", "max_t", "detach_velocity")
            guided = {name: getattr(self.guidance, name) for name in names} | by
        chosen = None if self.candidates == 1 else {"candidates": self.candidates} | by
        return {"guidance": guided, "best_of": chosen}

    def sample(
        self,
        sample: Callable[[Sequence[int]], Float[Tensor, "B C T H W"]],
        seeds: Sequence[int],
        prompts: Sequence[str],
    ) -> tuple[Float[Tensor, "B C T H W"], Float[Tensor, "N B"] | None]:
        """The videos' latents, and the rewards of all candidates where there is a choice."""
        if self.candidates == 1:
            return sample(seeds), None
        return best_of(sample, seeds, prompts, self.reward, self.candidates)


def append_choices(path: Path, videos: Sequence[str], prompts: Sequence[str], rewards: Float[Tensor, "N B"]) -> None:
    """Add a line a video with the rewards of its candidates, null where one could not be computed."""
    with path.open("a", encoding="utf-8") as handle:
        for video, prompt, values in zip(videos, prompts, rewards.T.tolist(), strict=True):
            known = [value if value == value else None for value in values]
            handle.write(json.dumps({"path": video, "prompt": prompt, "rewards": known}, ensure_ascii=False) + "\n")


def add_cost(
    path: Path, videos: int, seconds: float, *, num_steps: int, passes: int, steering: Steering | None, device: str
) -> None:
    """Add a batch of videos to what an arm cost: seconds on this machine, and passes a video, which hold on all.

    Args:
        path: `cost.json` of the arm; earlier batches are in it.
        videos: in this batch.
        seconds: it took, decoding and writing included.
        num_steps: denoising steps.
        passes: network passes a step (2 with classifier-free guidance).
        steering: what else was done.
        device: where.
    """
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"videos": 0, "seconds": 0.0}
    total, spent = before["videos"] + videos, before["seconds"] + seconds
    count = 1 if steering is None else steering.candidates
    guidance = None if steering is None else steering.guidance
    guided = 0 if guidance is None else count * guidance.guided_steps(num_steps)
    cost = {
        "videos": total,
        "seconds": round(spent, 3),
        "seconds_per_video": round(spent / total, 4),
        "device": device,
        "network_passes_per_video": num_steps * passes * count,
        "network_gradients_per_video": 0 if guidance is None or guidance.detach_velocity else guided * passes,
        "reward_passes_per_video": guided + (count if count > 1 else 0),
        "reward_gradients_per_video": guided,
    }
    if guidance is not None:
        skipped = before.get("guided_steps_without_gradient", 0) + guidance.take_skipped()
        cost["guided_steps_without_gradient"] = skipped
    atomic_write_json(path, cost)
