"""`evaluate_manifest`: one JSONL row of metrics for every video of a manifest; resumable, parallel over videos.

Rows are appended as videos finish, so an interrupted run goes on where it stopped; what changed since (the file, the
judge, this package's version, an extra that was installed) is measured again. What can't be read is a row with a
reason, and so is a video whose process dies: a failure is counted, never dropped. Per-pair and per-frame values go to
`details.jsonl` beside it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vggrpo import __version__
from vggrpo.errors import UserError
from vggrpo.evaluation.footage import listed, load_clip
from vggrpo.evaluation.journal import Journal, Key
from vggrpo.evaluation.metrics import METRICS, Clip, Measurement, Metric, compute, insisted, select
from vggrpo.evaluation.models import EvaluationModels
from vggrpo.evaluation.pool import Died, each
from vggrpo.io.atomic import ensure_directory
from vggrpo.io.manifest import ManifestRow

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Job:
    """What is left to measure of one video."""

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
            arm = folder name), for which `output/manifest.jsonl` is written.
        output: directory for `metrics.jsonl` and `details.jsonl`.
        metrics: `fast`, `all`, or names.
        workers: processes; 1 stays in this one.
        models: the judges; the embedded ones when left out.
        progress: called with (videos done, videos in total).
        fresh: measure everything again.

    Returns:
        Path of `metrics.jsonl`, rows in the manifest's order.

    Raises:
        UserError: before any work, when the manifest is bad or something is missing that the metrics need. What only
            `all` asks for may be missing: its metrics are then invalid, with that reason.
    """
    metrics = metrics if isinstance(metrics, str) else list(metrics)
    chosen = select(metrics)
    models = models or EvaluationModels()
    needs = {metric.name: metric.needs for metric in insisted(metrics)}
    models.check(need for some in needs.values() for need in some)
    directory = ensure_directory(output)
    rows, root = listed(Path(manifest), directory)
    sources = {metric.name: _sources(metric, models) for metric in chosen}
    journal = Journal(directory, fresh=fresh)
    jobs = [_job(row, root, journal, sources) for row in rows]
    todo = [job for job in jobs if job.metrics]
    models.load(need for job in todo for name in job.metrics for need in needs.get(name, ()))
    done = len(jobs) - len(todo)
    for job, result in each(_measure, todo, models, workers):
        if isinstance(result, Died):
            result = _row(job, dict.fromkeys(job.metrics, Measurement.invalid(str(result))))
        row, detail = result
        detail["sources"] = {name: sources[name] for name in job.metrics if sources[name]}
        journal.append(*_merged(journal, job, row, detail))
        done += 1
        if progress is not None:
            progress(done, len(jobs))
    return journal.put_in_order(job.key for job in jobs)


def evaluate_clip(
    clip: Clip, metrics: str | Iterable[str] = "fast", models: EvaluationModels | None = None
) -> dict[str, Measurement]:
    """Measurements of one clip in memory."""
    return compute(clip, select(metrics), models or EvaluationModels())


def _sources(metric: Metric, models: EvaluationModels) -> str:
    """What a metric's numbers depend on beside the clip and this package."""
    return ", ".join(f"{need}: {models.identity(need)}" for need in metric.needs)


def _job(row: ManifestRow, root: Path, journal: Journal, sources: dict[str, str]) -> _Job:
    """The video with those metrics that no earlier run has measured under the same circumstances."""
    file = root / row.path
    stamp = f"{_digest(file)}@{row.fps:g} {__version__}"
    job = _Job(row, file, stamp, tuple(sources))
    known = journal.read(job.key)
    if known is None or known[1].get("fingerprint") != stamp:
        return job
    before = known[1].get("sources", {})
    left = (n for n, source in sources.items() if n not in known[0]["metrics"] or before.get(n, "") != source)
    return _Job(row, file, stamp, tuple(left))


def _digest(file: Path) -> str:
    if not os.path.isfile(file):  # unlike Path's, it does not fail on a name that is too long
        return "missing"
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()[:16]


def _merged(
    journal: Journal, job: _Job, row: dict[str, Any], detail: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """New lines with what was measured before and is still valid."""
    known = journal.read(job.key)
    if known is None or known[1].get("fingerprint") != job.fingerprint:
        return row, detail
    metrics = known[0]["metrics"] | row["metrics"]
    order = [name for name in METRICS if name in metrics] + [name for name in metrics if name not in METRICS]
    row["metrics"] = {name: metrics[name] for name in order}
    for part in ("sources", "raw"):
        kept = {name: value for name, value in known[1].get(part, {}).items() if name not in job.metrics}
        detail[part] = kept | detail[part]
    return row, detail


def _measure(job: _Job, models: EvaluationModels) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics row and the details row of one video."""
    note = ""
    try:
        clip = load_clip(job.row, job.file)
        note = clip.note
        results = compute(clip, select(job.metrics), models)
    except (UserError, MemoryError, ValueError) as error:
        # The manifest's own name for the file: rows stay the same wherever the run directory lies.
        reason = " ".join(str(error).split()).replace(str(job.file), job.row.path) or type(error).__name__
        results = {name: Measurement.invalid(reason) for name in job.metrics}
    return _row(job, results, note)


def _row(job: _Job, results: dict[str, Measurement], note: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    identity: dict[str, Any] = dict(zip(("path", "prompt", "seed", "arm"), job.key, strict=True))
    row = dict(identity)
    if job.row.tags:
        row["tags"] = list(job.row.tags)
    if note:
        row["note"] = note
    row["metrics"] = {
        name: {"value": found.value, "unit": METRICS[name].unit, "valid": found.valid, "reason": found.reason}
        for name, found in results.items()
    }
    raw = {
        name: {part: [_finite(value) for value in values] for part, values in found.raw.items()}
        for name, found in results.items()
        if found.raw
    }
    return row, identity | {"fingerprint": job.fingerprint, "sources": {}, "raw": raw}


def _finite(value: float) -> float | None:
    # JSON has no NaN; a pair without a number is null.
    return float(value) if abs(value) < float("inf") else None
