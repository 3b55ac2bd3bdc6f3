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

from vggrpo.lgm.training import warmup_cosine

Loss = Callable[[nn.Module, int, torch.Generator], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Schedule:
    """Optimisation of one recipe. `lr` is the peak; `ema` 0 switches averaging off."""

    steps: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    save_every: int = 250
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then cosine to 2 % of the peak."""
        return warmup_cosine(step, peak=self.lr, total=self.steps, warmup=self.warmup)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def fit(model: nn.Module, loss: Loss, schedule: Schedule, folder: Path) -> nn.Module:
    """Train `model`'s parameters that require gradients; returns the averaged model in eval mode.

    `folder` gets `last.pt` (resumed from automatically) and `log.jsonl`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.98))
    average = deepcopy(model).requires_grad_(False) if schedule.ema else model
    start = _resume(folder, model, average, optimizer)
    began = time.time()
    sums: dict[str, list[float]] = {}
    model.train()
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        value, logs = loss(model, step, step_generator(schedule.seed, step))
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, schedule.clip)
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if schedule.ema:
            _average(average, model, min(schedule.ema, (1 + step) / (10 + step)))
        for name, number in (logs | {"loss": value.item(), "grad_norm": norm.item()}).items():
            sums.setdefault(name, []).append(float(number))
        last = step + 1 == schedule.steps
        if (step + 1) % 50 == 0 or last:
            row = {"step": step + 1, "seconds": round(time.time() - began, 1)} | {
                k: sum(v) / len(v) for k, v in sums.items()
            }
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            sums = {}
        if (step + 1) % schedule.save_every == 0 or last:
            _save(folder, step + 1, model, average, optimizer, schedule)
    return average.eval()


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, now in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(now, 1 - decay)
    for mean, now in zip(average.buffers(), model.buffers(), strict=True):
        mean.copy_(now)


def _save(
    folder: Path, step: int, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": asdict(schedule),
    }
    temporary = folder / f"last.{os.getpid()}.tmp"
    torch.save(state, temporary)
    temporary.replace(folder / "last.pt")


def _resume(folder: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    path = folder / "last.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
