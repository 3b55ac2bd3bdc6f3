"""Seconds of an update, stage by stage, against flow_grpo's own loop: equal mathematics, same small transformer.

    python benchmarks/against_flow_grpo.py PATH/TO/flow_grpo [--videos 8] [--steps 6] [--repeats 5] [--clock wall]

The peer's roll-out (`wan_pipeline_with_logprob`), its `compute_log_prob` and the loop over time steps of its `main` are
taken from its source files as they are; only what surrounds them (data loader, text encoder, video decoding, logging)
is left out. Equal for both: the embedded transformer with LoRA 32/64 on the same layers, K videos of one prompt, the
SDE `s = s_min + (s_max - s_min) t`, all steps but the last trained, one micro-batch of K, KL against the model without
LoRA, gradient checkpointing (flow_grpo has it on), one optimizer step, no guidance, no EMA. Not equal, and in nobody's
favour: flow_grpo weighs each step's loss by a number. Rewards are the same call in both and are not timed.

The stages are measured in turn (ours, theirs, ours, ...), so a busy machine hits both. `--clock processor` counts what
this process computed instead of what passed on the wall: with one thread that is the wall time of an idle machine.
Prints JSON: medians, and how often each stage of ours was slower.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vggrpo import assets
from vggrpo.config import TrainConfig, load_config
from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining.micro_batch import replay_micro_batch
from vggrpo.posttraining.policy import Policy
from vggrpo.posttraining.replay import OldPolicy, Replayer, all_transitions
from vggrpo.sampling.rollout import NoiseSettings, Trajectory, rollout

FRAMES, SIZE = 17, 64
ADVANTAGE_CLIP, CLIP, KL = 5.0, 1e-3, 0.004


class Ours:
    """The stages as `vggrpo.posttraining.grpo` runs them."""

    def __init__(self, config: TrainConfig, text: Tensor, initial: Tensor, pipeline: Path) -> None:
        self.model = WanVideoModel.from_pretrained(pipeline, load_text=False, load_vae=False)
        self.policy = Policy(config, self.model, Processes())
        self.config, self.text = config, text
        self.sigmas = self.model.sigmas(config.sampling.num_steps)
        sampling = config.sampling
        peers = {} if sampling.sigma_max is None else {"sigma_min": 0.0, "sigma_max": float(self.sigmas[1])}
        self.noise = NoiseSettings(sampling.noise_level, sampling.variant, **peers)
        at_once = replay_micro_batch(config, self.model, Processes())
        self.replayer = Replayer(self.model, self.policy, config.grpo, self.noise, at_once)
        self.shape = tuple(initial.shape[1:])

    def roll_out(self, number: int) -> Trajectory:
        videos = len(self.text)
        return rollout(
            self.model,
            self.text,
            shape=self.shape,
            noise_seeds=[1000 * number + i for i in range(videos)],
            step_seeds=[1000 * number + 500 + i for i in range(videos)],
            sigmas=self.sigmas,
            sde_steps=range(len(self.sigmas) - 2),
            noise=self.noise,
            prompt_ids=range(videos),
            micro_batch=videos,
        )

    def replay(self, trajectory: Trajectory, advantages: Tensor) -> None:
        chosen = all_transitions(torch.arange(len(self.text)), len(trajectory.steps))
        old = OldPolicy.of(trajectory, chosen)
        self.replayer.backward(trajectory, self.text, chosen, old, advantages, len(chosen))
        self.policy.step(0)


class Theirs:
    """The stages of flow_grpo, from its source."""

    def __init__(self, folder: Path, config: TrainConfig, text: Tensor, pipeline: Path) -> None:
        from diffusers import WanPipeline
        from peft import LoraConfig, get_peft_model

        self.config, self.text = config, text
        self.patch = _module(folder / "flow_grpo" / "diffusers_patch" / "wan_pipeline_with_logprob.py")
        self.pipeline = WanPipeline.from_pretrained(str(pipeline))
        self.pipeline.set_progress_bar_config(disable=True)
        lora, optim = config.lora, config.optim
        adapter = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=list(lora.targets)
        )
        self.pipeline.transformer.requires_grad_(False)
        self.pipeline.transformer = get_peft_model(self.pipeline.transformer, adapter)
        self.pipeline.transformer.enable_gradient_checkpointing()
        self.trained = [p for p in self.pipeline.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
        )
        self.namespace, self.loop = _training_loop(folder / "scripts" / "train_wan2_1.py")

    def roll_out(self, number: int) -> dict[str, Tensor]:
        torch.manual_seed(number)
        self.pipeline.transformer.eval()
        with torch.no_grad():
            _, latents, log_probs, _ = self.patch.wan_pipeline_with_logprob(
                self.pipeline,
                prompt_embeds=self.text,
                num_inference_steps=self.config.sampling.num_steps,
                guidance_scale=1.0,
                output_type="latent",
                return_dict=False,
                num_frames=FRAMES,
                height=SIZE,
                width=SIZE,
            )
        states = torch.stack(latents, dim=1)
        return {
            "timesteps": self.pipeline.scheduler.timesteps.repeat(len(self.text), 1),
            "latents": states[:, :-1],
            "next_latents": states[:, 1:],
            "log_probs": torch.stack(log_probs, dim=1),
            "prompt_embeds": self.text,
        }

    def replay(self, sample: dict[str, Tensor], advantages: Tensor) -> None:
        steps = self.config.sampling.num_steps - 1
        sample = sample | {"advantages": advantages[:, None].repeat(1, steps + 1)}
        self.pipeline.transformer.train()
        train = SimpleNamespace(
            cfg=False, beta=KL, adv_clip_max=ADVANTAGE_CLIP, clip_range=CLIP, max_grad_norm=1.0, ema=False
        )
        namespace = self.namespace | {
            "sde_step_with_logprob": self.patch.sde_step_with_logprob,
            "transformer": _Wrapped(self.pipeline.transformer),
            "pipeline": self.pipeline,
            "sample": sample,
            "embeds": self.text,
            "negative_embeds": None,
            "config": SimpleNamespace(train=train),
            "train_timesteps": range(steps),
            "accelerator": _Accelerator(steps, self.trained),
            "optimizer": _Every(steps, self.optimizer),
            "autocast": contextlib.nullcontext,
            "info": defaultdict(list),
            "epoch": 0,
            "inner_epoch": 0,
            "global_step": 0,
        }
        exec(self.loop, namespace)


class _Wrapped(nn.Module):
    """What DistributedDataParallel looks like to the loop, without a second process."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)


class _Accelerator:
    """The calls that the loop makes, with accelerate's arithmetic: losses are divided by the accumulated steps."""

    is_local_main_process = True

    def __init__(self, steps: int, trained: list[nn.Parameter]) -> None:
        self.steps, self.trained, self.done = steps, trained, 0
        self.sync_gradients = False

    @contextlib.contextmanager
    def accumulate(self, module: nn.Module) -> Any:
        self.done += 1
        self.sync_gradients = self.done % self.steps == 0
        yield

    def backward(self, loss: Tensor) -> None:
        (loss / self.steps).backward()

    def clip_grad_norm_(self, parameters: Any, limit: float) -> None:
        nn.utils.clip_grad_norm_(self.trained, limit)

    def reduce(self, info: dict[str, Tensor], reduction: str) -> dict[str, Tensor]:
        return info

    def log(self, info: dict[str, Any], step: int) -> None:
        """Nothing to log to."""


class _Every:
    """accelerate's optimizer: steps and clears only when gradients are whole."""

    def __init__(self, steps: int, optimizer: torch.optim.Optimizer) -> None:
        self.steps, self.optimizer, self.calls = steps, optimizer, 0

    def step(self) -> None:
        self.calls += 1
        if self.calls % self.steps == 0:
            self.optimizer.step()

    def zero_grad(self) -> None:
        if self.calls % self.steps == 0:
            self.optimizer.zero_grad()


def _module(file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"{file} does not exist; give a checkout of flow_grpo that has its Wan trainer")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _training_loop(file: Path) -> tuple[dict[str, Any], Any]:
    """`compute_log_prob` and the loop over time steps inside `main`, compiled from the source as it stands."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; give a checkout of flow_grpo that has its Wan trainer")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    helper = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "compute_log_prob")
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    loops = [node for node in ast.walk(main) if isinstance(node, ast.For) and "train_timesteps" in ast.dump(node.iter)]
    if len(loops) != 1:
        raise UserError(f"{file} has {len(loops)} loops over train_timesteps, expected 1; it is another version")
    loop = compile(ast.Module(body=[helper, loops[0]], type_ignores=[]), str(file), "exec")
    return {"torch": torch, "defaultdict": defaultdict, "tqdm": lambda items, **options: items}, loop


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


def seconds(work: Callable[[], Any], clock: str = "wall") -> tuple[float, Any]:
    """Time of one call by that clock, and its result."""
    began = CLOCKS[clock]()
    result = work()
    return CLOCKS[clock]() - began, result


def compare(folder: Path, videos: int, steps: int, repeats: int, clock: str = "wall") -> dict[str, Any]:
    """Medians by stage of both."""
    config = load_config(
        "tiny",
        [
            f"sampling.num_steps={steps}", f"sampling.window={steps - 1}", "sampling.window_last=null",
            "sampling.variant=flow_grpo_wan", "sampling.sigma_min=0", "sampling.sigma_max=1",
            f"grpo.samples_per_prompt={videos}", f"grpo.micro_batch={videos}", f"grpo.clip={CLIP}", f"grpo.kl={KL}",
            "lora={rank: 32, alpha: 64}", "optim.learning_rate=1e-4", "model.gradient_checkpointing=true",
        ],
    )  # fmt: skip
    pipeline = assets.path("pipeline")
    model = WanVideoModel.from_pretrained(pipeline)
    with torch.no_grad():
        text = model.encode_prompt(["the camera orbits a red sphere"]).repeat(videos, 1, 1)
    initial = torch.zeros(videos, *model.latent_spec.latent_shape(FRAMES, SIZE, SIZE))
    ours, theirs = Ours(config, text, initial, pipeline), Theirs(folder, config, text, pipeline)
    advantages = torch.linspace(-1, 1, videos)
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(repeats + 1):
        for name, side in (("ours", ours), ("theirs", theirs)):
            rolled, kept = seconds(lambda side=side, number=number: side.roll_out(number), clock)
            replayed, _ = seconds(lambda side=side, kept=kept: side.replay(kept, advantages), clock)
            if number:  # the first round warms up
                times[f"roll-out/{name}"].append(rolled)
                times[f"replay and step/{name}"].append(replayed)
    result: dict[str, Any] = {
        "videos": videos,
        "steps": steps,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "clock": clock,
    }
    for stage in ("roll-out", "replay and step"):
        mine, peer = times[f"{stage}/ours"], times[f"{stage}/theirs"]
        result[stage] = {
            "ours": statistics.median(mine),
            "theirs": statistics.median(peer),
            "theirs_over_ours": statistics.median(peer) / statistics.median(mine),
            "rounds_ours_was_slower": sum(a > b for a, b in zip(mine, peer, strict=True)),
        }
    return result


def main() -> None:
    """Print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flow_grpo", type=Path, help="a checkout of flow_grpo")
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    arguments = parser.parse_args()
    try:
        result = compare(arguments.flow_grpo, arguments.videos, arguments.steps, arguments.repeats, arguments.clock)
        print(json.dumps(result, indent=1))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
