"""Seconds until a held-out reward is reached: our trainer with a window against flow_grpo's own loop.

    python benchmarks/time_to_reward.py PATH/TO/flow_grpo [--pipeline DIR] [--videos 8] [--steps 8] [--updates 40]
        [--gain 1.0] [--seeds 3] [--clock processor]

Equal for both: the transformer, LoRA with its random start (peft's two ways of drawing it differ by a factor that
decides how far a first step goes), learning rate, KL, K videos of one prompt an update, rewards and advantages. Ours
samples and replays as `configs/tiny.yaml` says: a window of stochastic steps that follows a prefix computed once
for the group, in one batch, with the SDE of our recipes; the peer trains every step but the last, one after the other,
under gradient checkpointing, as its source does (`against_flow_grpo.py`). The reward is the mean of the clean latents'
first channel: it costs nothing, so that only the trainers' own time counts, and any policy gradient that works raises
it. It is measured after every update, untimed, on deterministic clips of another prompt and of seeds that are never
trained on, by one function for both. The goal is the base model's held-out reward plus `--gain` standard deviations of
its clips. A seed draws the LoRA's start and all noise anew. Prints JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vggrpo import assets
from vggrpo.config import TrainConfig, load_config
from vggrpo.errors import UserError
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining import group_advantages
from vggrpo.sampling.rollout import Trajectory, choose_window, rollout
from vggrpo.sampling.seeds import seeded_noise

HELD_OUT = 16
PROMPTS = ("the camera orbits a red sphere", "a blue box rolls left")
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def beside(name: str) -> ModuleType:
    """The script of that name in this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PEER = beside("against_flow_grpo")


class OurWindow(PEER.Ours):  # type: ignore[name-defined,misc]
    """A window of stochastic steps after a prefix that the group shares."""

    def roll_out(self, number: int) -> Trajectory:
        videos, sampling = len(self.text), self.config.sampling
        window = choose_window(sampling.num_steps, sampling.window, last=sampling.window_last, seed=number)
        return rollout(
            self.model,
            self.text,
            shape=self.shape,
            noise_seeds=[number] * videos,
            step_seeds=[1000 * number + i for i in range(videos)],
            sigmas=self.sigmas,
            sde_steps=window,
            noise=self.noise,
            prompt_ids=[0] * videos,
            micro_batch=videos,
        )

    def clips(self, kept: Trajectory) -> Tensor:
        return kept.latents

    def velocity(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.model.predict_velocity(x, t, text)


class TheirLoop(PEER.Theirs):  # type: ignore[name-defined,misc]
    """flow_grpo's roll-out and loop as they stand."""

    def clips(self, kept: dict[str, Tensor]) -> Tensor:
        return kept["next_latents"][:, -1]

    def velocity(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.pipeline.transformer(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False
        )[0]


def reward(latents: Tensor) -> Tensor:
    """(B,), from clean latents."""
    return latents[:, 0].float().flatten(1).mean(dim=1)


@torch.no_grad()
def held_out(velocity: Velocity, text: Tensor, sigmas: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rewards of Euler's deterministic clips from fixed noise."""
    x = seeded_noise(range(10**6, 10**6 + HELD_OUT), shape, torch.device("cpu"))
    text = text.expand(HELD_OUT, -1, -1)
    for t, t_next in pairwise(sigmas):
        x = x + velocity(x, t.expand(HELD_OUT), text) * (t_next - t)
    return reward(x)


def train(side: Any, evaluate: Callable[[Any], Tensor], goal: float, updates: int, seed: int) -> dict[str, Any]:
    """Updates, seconds by stage and held-out rewards until the goal."""

    def advantages_of(kept: Any) -> Tensor:
        rewards = reward(side.clips(kept))
        return group_advantages(rewards[None], torch.zeros(len(rewards), dtype=torch.long))

    curve: list[float] = []
    reached = False
    while len(curve) < updates and not reached:
        side.update(len(curve) + 10_000 * seed, advantages_of)
        curve.append(float(evaluate(side).mean()))
        reached = curve[-1] >= goal
    stages = side.meter.take()
    return {"reached": reached, "updates": len(curve), "seconds": sum(stages.values()), **stages, "held_out": curve}


def settings(videos: int, steps: int, learning_rate: float, *, ours: bool) -> TrainConfig:
    """The embedded recipe with the comparison's numbers; the roll-out is the recipe's own, or the peer's."""
    peers = [
        f"sampling.window={steps - 1}", "sampling.window_last=null", "sampling.variant=flow_grpo_wan",
        "sampling.sigma_min=0", "sampling.sigma_max=1",
    ]  # fmt: skip
    return load_config(
        "tiny",
        [
            f"sampling.num_steps={steps}", f"grpo.samples_per_prompt={videos}", f"grpo.clip={PEER.CLIP}",
            f"grpo.kl={PEER.KL}", "lora={rank: 32, alpha: 64}", f"optim.learning_rate={learning_rate}",
            *([] if ours else peers),
        ],
    )  # fmt: skip


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides to the same goal, from the same start."""
    pipeline = arguments.pipeline or assets.path("pipeline")
    model = WanVideoModel.from_pretrained(pipeline)
    with torch.no_grad():
        trained, other = (model.encode_prompt([prompt]) for prompt in PROMPTS)
    shape = model.latent_spec.latent_shape(PEER.FRAMES, PEER.SIZE, PEER.SIZE)
    sigmas, text = model.sigmas(arguments.steps), trained.repeat(arguments.videos, 1, 1)
    base = held_out(model.predict_velocity, other, sigmas, shape)
    goal = float(base.mean() + arguments.gain * base.std())
    result: dict[str, Any] = {
        "peer": f"{PEER.PEER}, from a checkout",
        **{name: getattr(arguments, name) for name in ("videos", "steps", "learning_rate", "gain", "clock")},
        "pipeline": "embedded" if arguments.pipeline is None else Path(arguments.pipeline).name,
        "base": float(base.mean()),
        "base_std": float(base.std()),
        "goal": goal,
    }
    config, peers = (
        settings(arguments.videos, arguments.steps, arguments.learning_rate, ours=ours) for ours in (True, False)
    )
    runs = []

    def evaluate(side: Any) -> Tensor:
        return held_out(side.velocity, other, sigmas, shape)

    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        ours = OurWindow(config, text, torch.zeros(arguments.videos, *shape), pipeline, arguments.clock)
        theirs = TheirLoop(arguments.flow_grpo, peers, text, pipeline, arguments.clock)
        PEER.copy_adapter(ours.model.transformer, theirs.pipeline.transformer)
        run: dict[str, Any] = {"seed": seed}
        for name, side in (("ours", ours), ("theirs", theirs)):
            run[name] = train(side, evaluate, goal, arguments.updates, seed)
        if run["ours"]["reached"] and run["theirs"]["reached"]:
            run["theirs_over_ours"] = run["theirs"]["seconds"] / run["ours"]["seconds"]
        runs.append(run)
    ratios = [run["theirs_over_ours"] for run in runs if "theirs_over_ours" in run]
    if len(ratios) == len(runs):
        result |= {"theirs_over_ours": {"median": median(ratios), "least": min(ratios), "most": max(ratios)}}
    return result | {"runs": runs}


def main() -> None:
    """Print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flow_grpo", type=Path, help="a checkout of flow_grpo")
    parser.add_argument("--pipeline", type=Path, help="a WanPipeline directory; the embedded one if left out")
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--updates", type=int, default=40, help="give up after so many")
    parser.add_argument("--gain", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--clock", choices=list(PEER.CLOCKS), default="processor")
    arguments = parser.parse_args()
    try:
        print(json.dumps(compare(arguments), indent=1))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
