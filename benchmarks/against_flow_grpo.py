"""Seconds of an update, stage by stage, against flow_grpo's own loop: equal mathematics, same small transformer.

    python benchmarks/against_flow_grpo.py PATH/TO/flow_grpo [--videos 8] [--steps 6] [--repeats 5] [--clock wall]

The peer's roll-out (`wan_pipeline_with_logprob`), its `compute_log_prob` and the loop over time steps of its `main` are
taken from its source files as they are; only what surrounds them (data loader, text encoder, video decoding, logging)
is left out. Equal for both: the embedded transformer with LoRA 32/64 on the same layers, K videos of one prompt, the
SDE `s = s_min + (s_max - s_min) t`, all steps but the last trained, one micro-batch of K, KL against the model without
LoRA, gradient checkpointing (flow_grpo has it on), one optimizer step, no guidance, no EMA. That the mathematics is
equal is measured first: from one roll-out and one LoRA both compute a gradient, and their difference relative to its
norm is in the result. Rewards are the same call in both and are not timed.

The stages are measured in turn (ours, theirs, ours, ...), so a busy machine hits both. `--clock processor` counts what
this process computed instead of what passed on the wall: with one thread that is the wall time of an idle machine.
Stages: the roll-out; the replay with its backward passes; the optimizer (clipping and step). Prints JSON: medians, and
how often each stage of ours was slower.
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
from collections.abc import Callable, Iterator
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
PEER = "zhtmike/flow_grpo"  # a fork that has a trainer for Wan2.1
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
STAGES = ("roll-out", "replay", "optimizer")


class Meter:
    """Seconds by stage, by one clock."""

    def __init__(self, clock: str = "wall") -> None:
        self.clock = CLOCKS[clock]
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = self.clock()
        try:
            yield
        finally:
            self.seconds[name] += self.clock() - began

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self.seconds = self.seconds, dict.fromkeys(STAGES, 0.0)
        return taken


class Ours:
    """The stages as `vggrpo.posttraining.grpo` runs them."""

    def __init__(self, config: TrainConfig, text: Tensor, initial: Tensor, pipeline: Path, clock: str = "wall") -> None:
        self.meter = Meter(clock)
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

    def backward(self, trajectory: Trajectory, advantages: Tensor) -> None:
        chosen = all_transitions(torch.arange(len(self.text)), len(trajectory.steps))
        old = OldPolicy.of(trajectory, chosen)
        self.replayer.backward(trajectory, self.text, chosen, old, advantages, len(chosen))

    def update(self, number: int, advantages_of: Callable[[Any], Tensor]) -> None:
        """One whole update; rewards and advantages are not timed."""
        with self.meter.stage("roll-out"):
            trajectory = self.roll_out(number)
        advantages = advantages_of(trajectory)
        with self.meter.stage("replay"):
            self.backward(trajectory, advantages)
        with self.meter.stage("optimizer"):
            self.policy.step(0)


class Theirs:
    """The stages of flow_grpo, from its source."""

    def __init__(self, folder: Path, config: TrainConfig, text: Tensor, pipeline: Path, clock: str = "wall") -> None:
        from diffusers import WanPipeline
        from peft import LoraConfig, get_peft_model

        self.meter = Meter(clock)
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

    def update(self, number: int, advantages_of: Callable[[Any], Tensor]) -> None:
        """One whole update; rewards and advantages are not timed."""
        with self.meter.stage("roll-out"):
            sample = self.roll_out(number)
        advantages = advantages_of(sample)
        before = self.meter.seconds["optimizer"]
        with self.meter.stage("replay"):
            self.replay(sample, advantages)
        self.meter.seconds["replay"] -= self.meter.seconds["optimizer"] - before  # the loop itself calls it

    def replay(self, sample: dict[str, Tensor], advantages: Tensor, optimize: bool = True) -> None:
        """The loop over time steps; without `optimize` the gradients stay as they are."""
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
            "accelerator": _Accelerator(steps, self.trained if optimize else [], self.meter),
            "optimizer": _Every(steps if optimize else steps + 1, self.optimizer, self.meter),
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

    def __init__(self, steps: int, trained: list[nn.Parameter], meter: Meter) -> None:
        self.steps, self.trained, self.meter, self.done = steps, trained, meter, 0
        self.sync_gradients = False

    @contextlib.contextmanager
    def accumulate(self, module: nn.Module) -> Any:
        self.done += 1
        self.sync_gradients = self.done % self.steps == 0
        yield

    def backward(self, loss: Tensor) -> None:
        (loss / self.steps).backward()

    def clip_grad_norm_(self, parameters: Any, limit: float) -> None:
        with self.meter.stage("optimizer"):
            nn.utils.clip_grad_norm_(self.trained, limit)

    def reduce(self, info: dict[str, Tensor], reduction: str) -> dict[str, Tensor]:
        return info

    def log(self, info: dict[str, Any], step: int) -> None:
        """Nothing to log to."""


class _Every:
    """accelerate's optimizer: steps and clears only when gradients are whole."""

    def __init__(self, steps: int, optimizer: torch.optim.Optimizer, meter: Meter) -> None:
        self.steps, self.optimizer, self.meter, self.calls = steps, optimizer, meter, 0

    def step(self) -> None:
        self.calls += 1
        if self.calls % self.steps == 0:
            with self.meter.stage("optimizer"):
                self.optimizer.step()

    def zero_grad(self) -> None:
        if self.calls % self.steps == 0:
            with self.meter.stage("optimizer"):
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


@torch.no_grad()
def copy_adapter(source: nn.Module, target: nn.Module) -> None:
    """The LoRA of one network into the other, whose names may have something in front."""
    adapter = {name: value for name, value in source.named_parameters() if "lora_" in name}
    copied = 0
    for name, parameter in target.named_parameters():
        match = [value for ours, value in adapter.items() if name.endswith(ours)]
        if match:
            parameter.copy_(match[0])
            copied += 1
    if copied != len(adapter):
        raise UserError(f"the peer's LoRA has {copied} of our {len(adapter)} tensors; it is another version")


def gradient_difference(ours: Ours, theirs: Theirs, advantages: Tensor) -> float:
    """How far the peer's gradient is from ours, relative to its norm: same roll-out, same schedule, same LoRA, whose B
    is drawn anew, so that KL and every gradient are there; then the LoRAs are what they were."""
    before = [parameter.detach().clone() for parameter in ours.policy.parameters]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.policy.parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    copy_adapter(ours.model.transformer, theirs.pipeline.transformer)
    trajectory = ours.roll_out(0)
    with torch.no_grad():  # the policy has moved since, so that ratios are not 1
        for parameter in ours.policy.parameters:
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
    copy_adapter(ours.model.transformer, theirs.pipeline.transformer)
    scheduler = theirs.pipeline.scheduler
    scheduler.set_timesteps(ours.config.sampling.num_steps)
    # Its own schedule is ours to three digits: it rounds times to whole numbers.
    scheduler.sigmas, scheduler.timesteps = ours.sigmas, 1000 * ours.sigmas[:-1]
    sample = {
        "timesteps": scheduler.timesteps.repeat(len(ours.text), 1),
        "latents": torch.stack(trajectory.samples, dim=1),
        "next_latents": torch.stack(trajectory.next_samples, dim=1),
        "log_probs": trajectory.log_probs,
        "prompt_embeds": ours.text,
    }
    ours.backward(trajectory, advantages)
    theirs.replay(sample, advantages, optimize=False)
    peer = {name: p.grad for name, p in theirs.pipeline.transformer.named_parameters() if p.grad is not None}
    pairs = [
        (parameter.grad, next(grad for name, grad in peer.items() if name.endswith(own)))
        for own, parameter in ours.policy.named.items()
    ]
    miss = torch.stack([(mine - their).square().sum() for mine, their in pairs]).sum()
    norm = torch.stack([their.square().sum() for _, their in pairs]).sum()
    with torch.no_grad():
        for parameter, value in zip(ours.policy.parameters, before, strict=True):
            parameter.copy_(value)
    copy_adapter(ours.model.transformer, theirs.pipeline.transformer)
    ours.policy.discard_gradients()
    theirs.optimizer.zero_grad()
    return float((miss / norm).sqrt())


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
    ours = Ours(config, text, initial, pipeline, clock)
    theirs = Theirs(folder, config, text, pipeline, clock)
    advantages = torch.linspace(-1, 1, videos)
    result: dict[str, Any] = {
        "peer": f"{PEER}, from a checkout",
        "videos": videos,
        "steps": steps,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "clock": clock,
        "gradient_difference": gradient_difference(ours, theirs, advantages),
    }
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for number in range(repeats + 1):
        for name, side in (("ours", ours), ("theirs", theirs)):
            side.update(number, lambda _: advantages)
            rows[name].append(side.meter.take())
    for stage in STAGES:
        mine, peer = ([row[stage] for row in rows[name][1:]] for name in ("ours", "theirs"))  # the first warms up
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
