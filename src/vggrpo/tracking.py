"""The log of a run: one JSON line per update, TensorBoard curves, and a progress bar for people.

The JSON lines are the record. At resume, lines of updates that the checkpoint does not know are cut off, so that an
interrupted run's log
equals an uninterrupted one's (wall-clock seconds aside).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from vggrpo.io.atomic import atomic_write


class Tracker:
    """Writes the metrics of each update to `OUTPUT/log.jsonl`, `OUTPUT/tensorboard` and the terminal."""

    def __init__(
        self, output: Path, *, total: int, start: int = 0, enabled: bool = True, progress: bool = True
    ) -> None:
        self.path = output / "log.jsonl"
        self._enabled = enabled
        self._progress: Any = None
        self._writer: Any = None
        if not enabled:
            return
        self._cut_after(start)
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=start)
        if progress:
            self._start_progress(total, start)

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one update (0 is the first); NaN becomes null, because JSON has no NaN."""
        if not self._enabled:
            return
        row = {"update": update, **{key: _json_number(value) for key, value in metrics.items()}}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, update)
        if self._progress is not None:
            shown = {key: metrics[key] for key in metrics if key.startswith("reward/")}
            text = "  ".join(f"{key.removeprefix('reward/')} {value:.4f}" for key, value in shown.items())
            self._progress.update(self._task, completed=update + 1, description=text)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._progress is not None:
            self._progress.stop()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut_after(self, start: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _update_of(line) < start]
        atomic_write(self.path, "".join(line + "\n" for line in kept))

    def _start_progress(self, total: int, start: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns)
        self._task = self._progress.add_task("", total=total, completed=start)
        self._progress.start()


class Stopwatch:
    """Seconds by stage of one update. On a GPU the device is waited for, so that a stage pays for its own work."""

    def __init__(self, device: Any = None) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to stage `name`."""
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _wait(self) -> None:
        if self._device is not None and self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)


def _update_of(line: str) -> float:
    """The update of a log line; infinity for a line that a crash cut short."""
    try:
        return int(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
