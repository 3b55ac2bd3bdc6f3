"""Distillation of an LGM: connector and LoRA learn the teacher's geometry from cached clips (METHOD section 1).

AdamW, warm-up, cosine, clipped gradients; every head's loss is logged. The batch of an update depends on (seed, update)
alone and is shared by the processes, so a resumed run repeats an uninterrupted one bit for bit, and several processes
do what one does. A process takes its share some clips at a time (`distill.micro_batch`); gradients add up to those of
the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vggrpo.checkpoint import load_latest, save_checkpoint
from vggrpo.config_lgm import DistillConfig, TrainLGMConfig, check_resumable
from vggrpo.distributed import Processes, stop_signals
from vggrpo.errors import UserError
from vggrpo.lgm.cache import FIRST_FLOW, CachedClips
from vggrpo.lgm.losses import distillation_loss, geometry_errors, moving_mask
from vggrpo.lgm.model import LatentGeometryModel, LGMConfig
from vggrpo.lgm.search import StitchFit
from vggrpo.models.recompute import set_recompute
from vggrpo.tracking import Stopwatch, Tracker

MAX_BAD_STEPS = 10  # updates in a row without a finite gradient, after which a run stops


@dataclass(frozen=True)
class Material:
    """What is trained on.

    Attributes:
        clips: the cache.
        train, heldout: indices of its clips.
        view_stride: RGB frames between two views.
    """

    clips: CachedClips
    train: Sequence[int]
    heldout: Sequence[int]
    view_stride: int


def stitched(config: LGMConfig, teacher: nn.Module, fit: StitchFit) -> LatentGeometryModel:
    """The teacher with the connector of a fit in front of its layers after `fit.layer`, without LoRA.

    The layers are the teacher's own: training the LGM changes the teacher.
    """
    model = LatentGeometryModel(config, teacher)  # type: ignore[arg-type]
    fit.load_into(model.connector)
    model.special.copy_(fit.special)
    return model.to(next(teacher.parameters()).device)


def warmup_cosine(step: int, *, peak: float, total: int, warmup: int) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def distill(
    config: TrainLGMConfig,
    model: LatentGeometryModel,
    material: Material,
    *,
    processes: Processes | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Train; resumes by itself from OUTPUT/checkpoints.

    Args:
        model: with its LoRA attached (`add_lora`); what requires gradients is trained, in place.

    Returns:
        Mean errors on the held-out clips, by `geometry_errors`.

    Raises:
        UserError: the output directory holds another run, or training diverges.
        KeyboardInterrupt: after SIGINT or SIGTERM, when the resumable state is saved.
    """
    processes = processes or Processes()
    run = _Distillation(config, model, material, processes)
    start = run.resume()
    tracker = Tracker(
        Path(config.output), total=config.updates, start=start, enabled=processes.is_main, progress=progress
    )
    errors: dict[str, float] = {}
    at_once = config.distill.micro_batch or config.distill.batch
    with tracker, stop_signals() as stop:
        for update in range(start, config.updates):
            watch = Stopwatch(run.device)
            metrics = run.update(update, watch)
            done = update + 1
            stopping = processes.any(stop.is_set(), run.device)
            save = done % config.save_every == 0 or done == config.updates
            if save:
                errors = heldout_errors(model, material, at_once)
                metrics |= {f"heldout/{name}": value for name, value in errors.items()}
            tracker.log(update, metrics | {f"seconds/{name}": value for name, value in watch.seconds.items()})
            if save or stopping:
                run.save(done)
            if stopping and done < config.updates:
                raise KeyboardInterrupt(f"stopped after update {done} of {config.updates}; run again to go on")
    return errors or heldout_errors(model, material, at_once)


def check_batch(batch: int, processes: int) -> None:
    """Refuse a batch that processes cannot share evenly.

    Raises:
        UserError: names the remedy.
    """
    if batch % processes:
        raise UserError(
            f"distill.batch {batch} cannot be shared by {processes} processes; make it a multiple of {processes}"
        )


class _Distillation:
    """What changes while a run goes on."""

    def __init__(
        self, config: TrainLGMConfig, model: LatentGeometryModel, material: Material, processes: Processes
    ) -> None:
        self.config, self.model, self.material, self.processes = config, model, material, processes
        self.settings: DistillConfig = config.distill
        check_batch(self.settings.batch, processes.size)
        self.device = next(model.parameters()).device
        set_recompute(model, self.settings.gradient_checkpointing)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.first_flow = FIRST_FLOW in material.clips.rows(material.train[:1])
        self.bad_steps = 0

    def update(self, number: int, watch: Stopwatch) -> dict[str, float]:
        """One optimizer step on one batch; this process computes its share of it."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = warmup_cosine(
                number, peak=settings.learning_rate, total=self.config.updates, warmup=settings.warmup_updates
            )
        batch = draw_batch(self.config.seed, number, self.material.train, settings.batch)
        mine = batch[self.processes.share(len(batch))]
        with watch.stage("data"):
            moving = self._moving_pixels(mine)
        means: dict[str, float] = {}
        self.model.train()
        for clips in _chunks(mine, settings.micro_batch or len(mine)):
            share = len(clips) / len(mine)
            count = None if moving is None else moving * len(clips) / len(batch)
            for name, value in self._backward(clips, share, count, watch).items():
                means[name] = means.get(name, 0.0) + share * value
        with watch.stage("update"):
            self.processes.sum_gradients(self.trained.values())
            norm = nn.utils.clip_grad_norm_(list(self.trained.values()), settings.grad_clip)
            self._step(norm)
        return self._mean(means) | {
            "grad_norm": norm.item(), "learning_rate": self.optimizer.param_groups[0]["lr"]
        }  # fmt: skip

    def _backward(
        self, clips: Sequence[int], share: float, moving_pixels: float | None, watch: Stopwatch
    ) -> dict[str, float]:
        """Add the gradients of some clips; their losses.

        Args:
            share: of these clips among those of this process.
            moving_pixels: see `distillation_loss`.
        """
        with watch.stage("data"):
            rows = self.material.clips.rows(clips, None)
            target = self.material.clips.geometry(rows, self.material.view_stride, self.device)
            latents = rows["latents"].to(self.device).float()
            first_flow = rows[FIRST_FLOW].to(self.device).float() if self.first_flow else None
        with watch.stage("update"):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
                prediction, raw = self.model.predict(latents)
            weights = self.settings.weights
            loss, parts = distillation_loss(prediction, raw, target, weights, first_flow, moving_pixels)
            (loss * share / self.processes.size).backward()
            return {name: value.item() for name, value in (parts | {"loss": loss}).items()}

    def _moving_pixels(self, clips: Sequence[int]) -> float | None:
        """Pixels of the whole batch that move, at least 1; None where nobody asks: this process sees the batch
        in one piece, or the flow head is taught by its own output, whose error is a mean over clips.

        The error on moving pixels is a mean over all of them and not over clips, so a part of a batch needs the number.

        Args:
            clips: this process's share of the batch.
        """
        cache, at_once = self.material.clips, self.settings.micro_batch or len(clips)
        if self.first_flow or (self.processes.size == 1 and at_once >= len(clips)):
            return None
        count = torch.zeros((), dtype=torch.int64)
        for part in _chunks(clips, at_once):
            mask = moving_mask(cache.geometry(cache.rows(part), self.material.view_stride))
            count += 0 if mask is None else mask.sum()
        return max(1.0, self.processes.sum(count.to(self.device)).item())

    def _step(self, norm: Tensor) -> None:
        """Step, unless the gradient is not finite: one bad clip may be left out, a diverged run may not go on."""
        if torch.isfinite(norm):
            self.optimizer.step()
            self.bad_steps = 0
        else:
            self.bad_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.bad_steps >= MAX_BAD_STEPS:
            raise UserError(
                f"{MAX_BAD_STEPS} updates in a row had no finite gradient; lower distill.learning_rate, set "
                "distill.bf16: false, or look at the clips"
            )

    def _mean(self, values: dict[str, float]) -> dict[str, float]:
        if self.processes.size == 1:
            return values
        total = self.processes.sum(torch.tensor(list(values.values()), device=self.device))
        return dict(zip(values, (total / self.processes.size).tolist(), strict=True))

    def save(self, step: int) -> None:
        """A checkpoint by the main process; all wait for it."""
        if self.processes.is_main:
            tensors = {
                "trained": {name: p.detach().cpu().clone() for name, p in self.trained.items()},
                "optimizer": self.optimizer.state_dict(),
            }
            state = {"config": self.config.model_dump(mode="json"), "lgm": self.model.config.model_dump(mode="json")}
            save_checkpoint(
                Path(self.config.output) / "checkpoints", step, tensors, state, keep_last=self.config.keep_last
            )
        self.processes.barrier()

    def resume(self) -> int:
        """Put back the newest checkpoint, if there is one; returns the next update's number."""
        checkpoint = load_latest(Path(self.config.output) / "checkpoints")
        if checkpoint is None:
            return 0
        check_resumable(checkpoint.state["config"], self.config)
        saved = checkpoint.tensors["trained"]
        if saved.keys() != self.trained.keys():
            raise UserError(f"the checkpoint in {self.config.output} is of another network; set another output=DIR")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(saved[name])
        self.optimizer.load_state_dict(checkpoint.tensors["optimizer"])
        return checkpoint.step


def _chunks(clips: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`size` clips at a time."""
    return (clips[low : low + size] for low in range(0, len(clips), size))


def draw_batch(seed: int, update: int, among: Sequence[int], size: int) -> list[int]:
    """Clips of one update: each epoch is a new permutation of all clips, cut into batches."""
    count = len(among)
    places = [divmod(position, count) for position in range(update * size, (update + 1) * size)]
    orders = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        for epoch in {epoch for epoch, _ in places}
    }
    return [among[orders[epoch][place]] for epoch, place in places]


@torch.no_grad()
def heldout_errors(model: LatentGeometryModel, material: Material, batch: int) -> dict[str, float]:
    """Mean `geometry_errors` against the teacher over the held-out clips."""
    was_training = model.training
    model.eval()
    parts = []
    device = next(model.parameters()).device
    for latents, target in material.clips.targets(material.heldout, batch, material.view_stride, device):
        parts.append(geometry_errors(model(latents), target))
    model.train(was_training)
    return mean_errors(parts)


def mean_errors(parts: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Means over clips of what `geometry_errors` gave batch by batch; NaN (nothing moves) is left out."""
    columns: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, values in part.items():
            columns.setdefault(name, []).append(values)
    return {name: torch.cat(values).nanmean().item() for name, values in columns.items()}
