"""`evaluate_manifest`: one JSONL row of metrics for every video of a manifest; resumable, parallel over videos.

Rows are appended as videos finish, so an interrupted run goes on where it stopped; a video whose file changed is
measured again. At the end the file is written once more in the manifest's order. What can't be read is a row with a
reason: a failure is counted, never dropped. Per-pair and per-frame values go to `details.jsonl` beside it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vggrpo.errors import UserError
from vggrpo.evaluation.metrics import Clip, Measurement, Metric, compute, select
from vggrpo.evaluation.models import EvaluationModels
from vggrpo.io.atomic import ensure_directory
from vggrpo.io.manifest import ManifestRow, read_manifest, write_jsonl
from vggrpo.io.video import read_video

MOST_FRAMES = 1200  # a minute at 20 fps; what is longer is refused rather than filling the memory
Progress = Callable[[int, int], None]
Key = tuple[str, str, int, str]


@dataclass(frozen=True)
class _Job:
    row: ManifestRow
    file: Path
    fingerprint: str
    metrics: tuple[str, ...]

    @property
    def key(self) -> Key:
        return (self.row.path, self.row.prompt, self.row.seed, self.row.arm)


def evaluate_manifest(
    manifest: Path | str,
    output: Path | str,
    metrics: str | Iterable[str] = "fast",
    *,
    workers: int = 1,
    models: EvaluationModels | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> Path:
    """Measure every video of a manifest.

    Args:
        manifest: JSONL of `{path, prompt, seed, fps, arm, tags}`, or a folder of MP4s (prompt = file name, seed 0,
            arm = folder name).
        output: directory for `metrics.jsonl` and `details.jsonl`.
        metrics: `fast`, `all`, or names.
        workers: processes; 1 stays in this one.
        models: the judges; the embedded ones when left out.
        progress: called with (videos done, videos in total).
        fresh: measure everything again.

    Returns:
        Path of `metrics.jsonl`, rows in the manifest's order.

    Raises:
        UserError: before any work, when the manifest is bad or a needed model is missing.
    """
    chosen = select(metrics)
    models = models or EvaluationModels()
    models.check(need for metric in chosen for need in metric.needs)
    rows, root = _rows(Path(manifest))
    directory = ensure_directory(output)
    target, details = directory / "metrics.jsonl", directory / "details.jsonl"
    finished = {} if fresh else _finished(target, details)
    jobs = [_job(row, root, chosen) for row in rows]
    done: dict[Key, tuple[dict[str, Any], dict[str, Any]]] = {}
    todo = []
    for job in jobs:
        kept = finished.get(job.key)
        if kept and kept[1]["fingerprint"] == job.fingerprint and set(job.metrics) <= set(kept[0]["metrics"]):
            done[job.key] = kept
        else:
            todo.append(job)
    if fresh:
        target.unlink(missing_ok=True)
        details.unlink(missing_ok=True)
    for job, row, detail in _run(todo, models, workers):
        previous = finished.get(job.key)
        if previous and previous[1]["fingerprint"] == job.fingerprint:
            row["metrics"] = previous[0]["metrics"] | row["metrics"]
            detail["raw"] = previous[1]["raw"] | detail["raw"]
        done[job.key] = (row, detail)
        # Details first: a row counts as finished only when both lines are there.
        _append(details, detail)
        _append(target, row)
        if progress is not None:
            progress(len(done), len(jobs))
    write_jsonl(details, (done[job.key][1] for job in jobs))
    return write_jsonl(target, (done[job.key][0] for job in jobs))


def evaluate_clip(
    clip: Clip, metrics: str | Iterable[str] = "fast", models: EvaluationModels | None = None
) -> dict[str, Measurement]:
    """Measurements of one clip in memory."""
    return compute(clip, select(metrics), models or EvaluationModels())


def _rows(source: Path) -> tuple[list[ManifestRow], Path]:
    """Manifest rows and the directory their paths are relative to."""
    if source.is_dir():
        files = sorted(source.glob("*.mp4"))
        if not files:
            raise UserError(f"the folder {source} holds no .mp4 file; name a manifest or a folder of videos")
        # fps 0 is never read: a folder has no manifest to disagree with, the file's own rate is used.
        return [ManifestRow(file.name, file.stem, 0, 0.0, source.resolve().name) for file in files], source
    rows = read_manifest(source)
    seen: dict[tuple[str, int, str], str] = {}
    for row in rows:
        unit = (row.prompt, row.seed, row.arm)
        if unit in seen:
            raise UserError(
                f"{source}: {seen[unit]!r} and {row.path!r} have the same prompt, seed {row.seed} and arm {row.arm!r}; "
                "give them different seeds"
            )
        seen[unit] = row.path
    return rows, source.parent


def _job(row: ManifestRow, root: Path, metrics: Sequence[Metric]) -> _Job:
    file = root / row.path
    stamp = "missing"
    if file.is_file():
        digest = hashlib.sha256()
        with file.open("rb") as handle:
            for block in iter(lambda: handle.read(1 << 20), b""):
                digest.update(block)
        stamp = digest.hexdigest()[:16]
    return _Job(row, file, f"{stamp}@{row.fps:g}", tuple(metric.name for metric in metrics))


def _finished(target: Path, details: Path) -> dict[Key, tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of an earlier run that have both their lines; a last line cut off by a crash is left out."""

    def whole(file: Path) -> Iterator[dict[str, Any]]:
        if file.is_file():
            for line in file.read_text(encoding="utf-8").split("\n"):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(row, dict) and {"path", "prompt", "seed", "arm"} <= set(row):
                    yield row

    def key(row: dict[str, Any]) -> Key:
        return (row["path"], row["prompt"], row["seed"], row["arm"])

    raw = {key(row): row for row in whole(details)}
    return {key(row): (row, raw[key(row)]) for row in whole(target) if key(row) in raw}


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _run(
    jobs: Sequence[_Job], models: EvaluationModels, workers: int
) -> Iterator[tuple[_Job, dict[str, Any], dict[str, Any]]]:
    if workers <= 1 or len(jobs) < 2:
        for job in jobs:
            yield job, *_measure(job, models)
        return
    context = multiprocessing.get_context("spawn")  # fork and threaded libraries don't mix
    try:
        with ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (models,)) as pool:
            futures = {pool.submit(_measure_in_worker, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], *future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "an evaluation process died (often: out of memory); run again with fewer workers, finished videos are kept"
        ) from error


_worker_models: list[EvaluationModels] = []  # one entry in a worker process, none elsewhere


def _start_worker(models: EvaluationModels) -> None:
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    _worker_models[:] = [models]


def _measure_in_worker(job: _Job) -> tuple[dict[str, Any], dict[str, Any]]:
    return _measure(job, _worker_models[0])


def _measure(job: _Job, models: EvaluationModels) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics row and the details row of one video."""
    chosen = select(job.metrics)
    try:
        results = compute(_load(job), chosen, models)
    except (UserError, MemoryError, ValueError) as error:
        # The manifest's own name for the file: rows stay the same wherever the run directory lies.
        reason = " ".join(str(error).split()).replace(str(job.file), job.row.path) or type(error).__name__
        results = {metric.name: Measurement.invalid(reason) for metric in chosen}
    identity: dict[str, Any] = {
        "path": job.row.path,
        "prompt": job.row.prompt,
        "seed": job.row.seed,
        "arm": job.row.arm,
    }
    row = dict(identity)
    if job.row.tags:
        row["tags"] = list(job.row.tags)
    row["metrics"] = {
        metric.name: {"value": found.value, "unit": metric.unit, "valid": found.valid, "reason": found.reason}
        for metric in chosen
        for found in (results[metric.name],)
    }
    raw = {
        name: {key: list(map(float, values)) for key, values in found.raw.items()}
        for name, found in results.items()
        if found.raw
    }
    return row, identity | {"fingerprint": job.fingerprint, "raw": _finite(raw)}


def _load(job: _Job) -> Clip:
    frames, file_fps = read_video(job.file, max_frames=MOST_FRAMES + 1)
    if len(frames) > MOST_FRAMES:
        raise UserError(f"{job.row.path} has more than {MOST_FRAMES} frames; cut it into shorter clips")
    return Clip(frames, job.row.fps or file_fps, job.row.prompt, job.row.seed)


def _finite(raw: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float | None]]]:
    # JSON has no NaN; a pair without a number is null.
    return {
        name: {key: [v if abs(v) < float("inf") else None for v in values] for key, values in parts.items()}
        for name, parts in raw.items()
    }
