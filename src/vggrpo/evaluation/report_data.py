"""Gathers what a run directory holds into the plain data that the report shows.

A run directory: `base/` and `tuned/` (manifest.jsonl and mp4s), `eval/base` and `eval/tuned` (metrics.jsonl), and,
where there are any, `scenes/base.jsonl` and `scenes/tuned.jsonl` (see `scenes`), `summary.json`, `train/log.jsonl`,
`train/config.yaml`, `benchmark.yaml`, `audit.json`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

from vggrpo.errors import UserError
from vggrpo.evaluation.compare import Comparison, MetricComparison, compare
from vggrpo.evaluation.metrics import HEADLINE, METRICS
from vggrpo.evaluation.metrics.quality import KERNEL_DISTANCE, KernelComparison
from vggrpo.evaluation.statistics import Interval
from vggrpo.evaluation.summary import kernel_entry, verdict
from vggrpo.io.manifest import ManifestRow, read_jsonl, read_manifest

PACKAGES = (
    "vggrpo",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "opencv-python-headless",
    "opencv-python",
    "av",
    "numpy",
    "plotly",
)
MOST_CURVE_POINTS = 400
MOST_SEEDS = 12  # listed one by one
ABOUT_OTHERS = {
    "motion_reward": "Camera motion smoothness from the latents: what training optimised.",
    "geometry_reward": "Reprojection consistency from the latents: what training optimised.",
    KERNEL_DISTANCE: "Distance of the clips to rendered footage in a classifier's features; one number an arm.",
}


def collect(
    run_dir: Path,
    videos: Mapping[Path, str],
    scenes: Sequence[Mapping[str, Any]],
    left_out: str | None,
    kernel: KernelComparison | None = None,
) -> dict[str, Any]:
    """All that the page shows, as JSON data.

    Args:
        videos: id of each embedded file.
        scenes: see `read_scenes`.
        left_out: what had to be left out or shrunk to keep the page small, in words.
        kernel: the arms' distances to rendered clips, where they aren't in `summary.json`.
    """
    base_rows, tuned_rows = (read_jsonl(run_dir / "eval" / arm / "metrics.jsonl") for arm in ("base", "tuned"))
    comparison = compare(base_rows, tuned_rows)
    summary = read_json(run_dir / "summary.json") or {}
    if kernel is not None:
        summary["metrics"] = (summary.get("metrics") or {}) | {KERNEL_DISTANCE: kernel_entry(kernel)}
    prompts = list(dict.fromkeys(str(row["prompt"]) for row in [*base_rows, *tuned_rows]))
    number = {prompt: index for index, prompt in enumerate(prompts)}
    return {
        "prompts": prompts,
        "metrics": _metrics(comparison, summary, number),
        "checks": _checks(comparison, summary),
        "remarks": comparison.remarks(),
        "motionRatio": comparison.motion_ratio,
        "seeds": comparison.seeds,
        "cards": _cards(run_dir, number, videos, base_rows, tuned_rows),
        "leftOut": left_out,
        "training": training_curves(run_dir / "train" / "log.jsonl"),
        "scenes": [{**entry, "prompt": number[entry["prompt"]]} for entry in scenes if entry["prompt"] in number],
        "audit": read_json(run_dir / "audit.json"),
        "run": _run(run_dir, summary, [*base_rows, *tuned_rows]),
    }


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when there is no such file.

    Raises:
        UserError: when the file is there and isn't a JSON object.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); remove it or make it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def arm_manifest(run_dir: Path, arm: str) -> list[ManifestRow]:
    return read_manifest(run_dir / arm / "manifest.jsonl")


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {"mean": finite(interval.mean), "low": finite(interval.low), "high": finite(interval.high), "n": interval.n}


def finite(value: Any) -> float | None:
    """A JSON number, or None for what is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) else None


def _metrics(comparison: Comparison, summary: Mapping[str, Any], number: Mapping[str, int]) -> list[dict[str, Any]]:
    out = [_metric(metric, number) for metric in comparison.metrics.values()]
    for name, entry in (summary.get("metrics") or {}).items():
        if name not in comparison.metrics and isinstance(entry, dict):
            out.append(_from_summary(name, entry))
    return out


def _metric(metric: MetricComparison, number: Mapping[str, int]) -> dict[str, Any]:
    return {
        "name": metric.name,
        "unit": metric.unit,
        "about": METRICS[metric.name].about if metric.name in METRICS else ABOUT_OTHERS.get(metric.name, ""),
        "higher": metric.higher_is_better,
        "label": metric.independence,
        "role": metric.role,
        "headline": metric.name in HEADLINE,
        "base": finite(metric.base),
        "tuned": finite(metric.tuned),
        "diff": _interval(metric.difference),
        "matched": _interval(metric.motion_matched),
        "tags": {tag: _interval(interval) for tag, interval in metric.by_tag.items()},
        "wins": [metric.wins.wins, metric.wins.ties, metric.wins.losses],
        "pHolm": finite(metric.p_holm),
        "failures": [metric.failures_base, metric.failures_tuned],
        "points": [[number[prompt], base, tuned] for prompt, (base, tuned) in metric.prompts.items()],
    }


def _from_summary(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A metric that has no rows of its own: a number of an arm."""
    label = entry.get("independence") or ("independent" if entry.get("independent") else "reward-related")
    return {
        "name": name,
        "unit": str(entry.get("unit", "")),
        "about": ABOUT_OTHERS.get(name, ""),
        "higher": bool(entry.get("higher_is_better")),
        "label": str(label),
        "role": str(entry.get("role", "score")),
        "headline": False,
        "base": finite(entry.get("base")),
        "tuned": finite(entry.get("tuned")),
        "diff": {
            "mean": finite(entry.get("diff")),
            "low": finite(entry.get("ci_low")),
            "high": finite(entry.get("ci_high")),
            "n": entry.get("n"),
        },
        "matched": None,
        "tags": {},
        "wins": None,
        "pHolm": None,
        "failures": [None, None],
        "points": [],
    }


def _checks(comparison: Comparison, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    checks = dict(verdict(comparison).checks)
    kernel = (summary.get("metrics") or {}).get(KERNEL_DISTANCE)
    if isinstance(kernel, dict) and "non_inferior" in kernel:
        change, margin = (
            "unknown" if (value := finite(kernel.get(name))) is None else f"{value:.3g}" for name in ("diff", "margin")
        )
        text = f"kernel distance changes by {change}; base against itself {margin}"
        checks["quality"] = (bool(kernel["non_inferior"]), text)
    return [{"name": name, "outcome": outcome, "text": text} for name, (outcome, text) in checks.items()]


def _cards(
    run_dir: Path,
    number: Mapping[str, int],
    videos: Mapping[Path, str],
    base_rows: Iterable[Mapping[str, Any]],
    tuned_rows: Iterable[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One card a (prompt, seed): both videos and their values."""
    arms = {}
    for arm, rows in (("base", base_rows), ("tuned", tuned_rows)):
        values = {(row["prompt"], row["seed"]): row["metrics"] for row in rows}
        files = {(row.prompt, row.seed): (run_dir / arm / row.path, row.tags) for row in arm_manifest(run_dir, arm)}
        arms[arm] = (values, files)
    cards = []
    for pair in dict.fromkeys([*arms["base"][0], *arms["tuned"][0]]):
        card: dict[str, Any] = {"prompt": number[pair[0]], "seed": pair[1], "tags": []}
        for arm, (values, files) in arms.items():
            path, tags = files.get(pair, (None, ()))
            card["tags"] = sorted({*card["tags"], *tags})
            found = values.get(pair, {})
            card[arm] = {
                "video": videos.get(path) if path is not None else None,
                "values": {name: finite(entry["value"]) for name, entry in found.items() if entry["valid"]},
                "reasons": sorted(
                    {entry["reason"] for entry in found.values() if not entry["valid"] and entry["reason"]}
                ),
            }
        cards.append(card)
    return cards


def training_curves(log: Path) -> dict[str, Any] | None:
    """`{x, series: {name: [...]}}` of every number in the training log, thinned to a few hundred points; None without
    a log.
    """
    if not log.is_file():
        return None
    rows = [_flat(row) for row in read_jsonl(log)]
    if not rows:
        return None
    if len(rows) > MOST_CURVE_POINTS:
        rows = [rows[round(i * (len(rows) - 1) / (MOST_CURVE_POINTS - 1))] for i in range(MOST_CURVE_POINTS)]
    axis = next((key for key in ("update", "step", "iteration") if all(key in row for row in rows)), None)
    names = [
        name
        for name in dict.fromkeys(key for row in rows for key in row)
        if name not in ("update", "step", "iteration", "time")
    ]
    return {
        "axis": axis or "row",
        "x": [row[axis] if axis else index for index, row in enumerate(rows)],
        "series": {name: [row.get(name) for row in rows] for name in names},
    }


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    out: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        elif finite(value) is not None:
            out[prefix + key] = float(value)
    return out


def read_scenes(run_dir: Path) -> list[dict[str, Any]]:
    """Scenes by (prompt, seed): `{prompt, seed, base, tuned}`, each arm's as `scene_of` made it where there is one.

    Raises:
        UserError: when a row isn't a scene.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for arm in ("base", "tuned"):
        path = run_dir / "scenes" / f"{arm}.jsonl"
        for number, row in enumerate(read_jsonl(path) if path.is_file() else [], start=1):
            if not {"prompt", "seed", "by", "frames", "cameras", "fov", "points"} <= set(row):
                raise UserError(f"{path}:{number} is not a scene; remove the file and make it again")
            scene = {key: value for key, value in row.items() if key not in ("prompt", "seed")}
            pair = (row["prompt"], row["seed"])
            found.setdefault(pair, {"prompt": pair[0], "seed": pair[1]})[arm] = scene
    return list(found.values())


def _run(run_dir: Path, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Facts of the run, the settings of each arm's sampler, versions, and the configs as text."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue  # only one of the two OpenCV wheels is installed, and a source tree may not be
    facts: dict[str, Any] = {"videos": len(rows), "seeds": sorted({row["seed"] for row in rows})}
    facts |= {k: v for k, v in summary.items() if k != "metrics" and isinstance(v, str | int | float | list)}
    if len(facts["seeds"]) > MOST_SEEDS:
        facts["seeds"] = f"{len(facts['seeds'])} seeds from {facts['seeds'][0]} to {facts['seeds'][-1]}"
    configs = {"Training config": run_dir / "train" / "config.yaml", "Benchmark config": run_dir / "benchmark.yaml"}
    return {
        "facts": facts,
        "settings": {
            arm: found for arm in ("base", "tuned") if (found := read_json(run_dir / arm / arm / "settings.json"))
        },
        "config": {name: path.read_text(encoding="utf-8") for name, path in configs.items() if path.is_file()},
        "versions": versions,
    }
