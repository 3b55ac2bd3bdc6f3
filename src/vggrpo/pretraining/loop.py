"""The one training loop of all recipes: AdamW, warm-up and cosine, EMA, exact resume, a JSONL log.

Every step draws its batch and its noise from a generator seeded by (seed, step), so a resumed run needs no random
state.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vggrpo.errors import UserError
from vggrpo.lgm.training import warmup_cosine

# What is logged stays on the device until it is written: reading it each step would let a GPU run dry.
Logs = dict[str, Tensor]
Loss = Callable[[nn.Module, int, torch.Generator], tuple[Tensor, Logs]]
Watch = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class Schedule:
    """Optimisation of one recipe. `lr` is the peak; `ema` 0 switches averaging off; a step has `batch_scale` times the
    recipe's clips.

    `seconds`: train for so long instead, by as many steps as that takes; learning rate and curricula then follow the
    clock, as if each moment were that share of `steps`.
    """

    steps: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    save_every: int = 250
    seed: int = 0
    batch_scale: int = 1
    seconds: float | None = None

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then cosine to 2 % of the peak."""
        return warmup_cosine(step, peak=self.lr, total=self.steps, warmup=self.warmup)


def go_on_from(model: nn.Module, start: nn.Module, name: str) -> None:
    """Give `model` the weights of `start`.

    Raises:
        UserError: they are of another architecture.
    """
    try:
        model.load_state_dict(start.float().state_dict())
    except RuntimeError as error:
        told = str(error).splitlines()[1].strip()[:120]
        raise UserError(
            f"the {name} to start from is of another architecture than this recipe's ({told}); start from one that the "
            "recipe made, or from nothing"
        ) from error


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def fit(model: nn.Module, loss: Loss, schedule: Schedule, folder: Path, watch: Watch | None = None) -> nn.Module:
    """Train `model`'s parameters that require gradients, on their device; returns the averaged model in eval mode.

    `folder` gets `last.pt` (resumed from automatically, on any device) and `log.jsonl`. With `schedule.seconds` a
    resumed run has the time that was left; its batches are those of the same steps, its learning rates are the clock's.

    Args:
        watch: called after every save with the number of steps done and the averaged model in eval mode, which it may
            not change. What it raises ends the training; the same call later goes on from that save.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.98), fused=_fused(parameters)
    )
    average = deepcopy(model).requires_grad_(False) if schedule.ema else model
    step, before = _resume(folder, model, average, optimizer)
    began = time.time() - before  # as if the run had never stopped

    def place() -> int:
        """Where in the schedule the run is."""
        if schedule.seconds is None:
            return step
        return min(schedule.steps, int(schedule.steps * (time.time() - began) / schedule.seconds))

    sums: dict[str, list[Tensor]] = {}
    model.train()
    saved = now = place()
    while now < schedule.steps:
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(now)
        value, logs = loss(model, now, step_generator(schedule.seed, step))
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, schedule.clip)
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if schedule.ema:
            _average(average, model, min(schedule.ema, (1 + step) / (10 + step)))
        for name, number in (logs | {"loss": value, "grad_norm": norm}).items():
            sums.setdefault(name, []).append(number.detach())
        step += 1
        now = place()
        seconds = time.time() - began
        if step % 50 == 0 or now == schedule.steps:
            row = {"step": step, "seconds": round(seconds, 1)} | {
                k: sum(map(float, v)) / len(v) for k, v in sums.items()
            }
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            sums = {}
        if now // schedule.save_every > saved // schedule.save_every or now == schedule.steps:
            saved = now
            _save(folder, step, seconds, model, average, optimizer, schedule)
            if watch is not None:
                watch(step, average.eval())
                model.train()  # which may be the average itself
    return average.eval()


def half_precision(device: torch.device, wanted: bool = True) -> torch.autocast:
    """bfloat16 for what comes inside, if `wanted` and the device multiplies in it: processors that only emulate it take
    more than twice the time of float32 (AVX-512 without its bfloat16, one thread: generator 2.1, RGB network 2.6)."""
    fast = device.type != "cpu" or any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and fast)


def _fused(parameters: list[nn.Parameter]) -> bool | None:
    """One kernel for all parameters on a GPU; None elsewhere: torch's choice, whose numbers the CPU recipes have."""
    return True if parameters[0].device.type == "cuda" else None


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    # All at once: hundreds of small kernels otherwise.
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(model.parameters()), None)
    for mean, now in zip(average.buffers(), model.buffers(), strict=True):
        mean.copy_(now)


def _save(
    folder: Path,
    step: int,
    seconds: float,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
) -> None:
    state = {
        "step": step,
        "seconds": seconds,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": asdict(schedule),
    }
    temporary = folder / f"last.{os.getpid()}.tmp"
    torch.save(state, temporary)
    temporary.replace(folder / "last.pt")


def _resume(folder: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Steps done, and the seconds they took."""
    path = folder / "last.pt"
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = optimizer.defaults["fused"]  # of this device, not of the one that the checkpoint comes from
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state.get("seconds", 0.0)
