"""The log of a run: one JSON line per update, TensorBoard curves and videos, and a progress bar for people.

The JSON lines are the record. At resume, lines of updates that the checkpoint does not know are cut off, so that an
interrupted run's log
equals an uninterrupted one's (wall-clock seconds aside).
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write
from vggrpo.io.video import write_video


class Tracker:
    """Writes the metrics of each update to `OUTPUT/log.jsonl`, `OUTPUT/tensorboard` and the terminal; those of each
    validation to `OUTPUT/validation.jsonl`, its videos to `OUTPUT/validation/`.

    Args:
        output: the run's directory.
        total: updates of the whole run.
        start: updates done before.
        enabled: False writes nothing (all processes but one).
        progress: show a progress bar.
        trackers: further places, "wandb" or "trackio".
        settings: the run's config, for them.
    """

    def __init__(
        self,
        output: Path,
        *,
        total: int,
        start: int = 0,
        enabled: bool = True,
        progress: bool = True,
        trackers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = output / "log.jsonl"
        self._output = output
        self._enabled = enabled
        self._progress: Any = None
        self._writer: Any = None
        self._others: list[Any] = []
        if not enabled:
            return
        self._others = [_start_tracker(name, output, settings or {}) for name in trackers]
        _cut_after(self.path, start)
        _cut_after(output / "validation.jsonl", start)
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=start)
        if progress:
            self._start_progress(total, start)

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one update (0 is the first); NaN becomes null, because JSON has no NaN."""
        if not self._enabled:
            return
        self._record(self.path, update, metrics, "")
        if self._progress is not None:
            shown = {key: metrics[key] for key in metrics if key.startswith("reward/")}
            text = "  ".join(f"{key.removeprefix('reward/')} {value:.4f}" for key, value in shown.items())
            self._progress.update(self._task, completed=update + 1, description=text)

    def validate(self, update: int, metrics: Mapping[str, float], videos: Sequence[Any], fps: float = 8.0) -> None:
        """Record a validation after `update` updates.

        Args:
            update: updates done.
            metrics: of the fixed videos.
            videos: uint8 frames (T, H, W, 3) of some of them.
            fps: frames per second.
        """
        if not self._enabled:
            return
        self._record(self._output / "validation.jsonl", update, metrics, "validation/")
        for place, frames in enumerate(videos):
            file = write_video(self._output / "validation" / f"{update:06d}" / f"{place}.mp4", frames, fps)
            self._writer.file_writer.add_summary(_gif_summary(f"validation/{place}", frames, fps), update)
            for other in self._others:
                other.log({f"validation/{place}": other.Video(str(file), format="mp4")}, step=update)

    def _record(self, file: Path, update: int, metrics: Mapping[str, float], prefix: str) -> None:
        row = {"update": update, **{key: _json_number(value) for key, value in metrics.items()}}
        with file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        for key, value in metrics.items():
            self._writer.add_scalar(prefix + key, value, update)
        for other in self._others:
            other.log({prefix + key: value for key, value in metrics.items()}, step=update)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._progress is not None:
            self._progress.stop()
        for other in self._others:
            other.finish()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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


def _start_tracker(name: str, output: Path, settings: Mapping[str, Any]) -> Any:
    """The module of wandb or trackio (which share their API) with a run begun; a resumed run goes on in its own."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"trackers: {name} is not installed; pip install 'vggrpo[{name}]', or leave it out") from error
    identity = f"{output.name}-{hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:8]}"
    options = {"id": identity, "dir": str(output)} if name == "wandb" else {}
    module.init(project="vggrpo", name=identity, config=dict(settings), resume="allow", **options)
    return module


def _gif_summary(tag: str, frames: Any, fps: float) -> Any:
    """A video as TensorBoard shows it: an animated GIF in an image summary."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    images = [Image.fromarray(frame) for frame in np.asarray(frames)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    picture = Summary.Image(
        height=images[0].height, width=images[0].width, colorspace=3, encoded_image_string=buffer.getvalue()
    )
    return Summary(value=[Summary.Value(tag=tag, image=picture)])


def _cut_after(path: Path, start: int) -> None:
    """Leave only the lines of updates before `start`."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if lines or path.name == "log.jsonl":
        atomic_write(path, "".join(line + "\n" for line in lines if _update_of(line) < start))


def _update_of(line: str) -> float:
    """The update of a log line; infinity for a line that a crash cut short."""
    try:
        return int(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
