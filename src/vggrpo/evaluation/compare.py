"""`compare`: two `metrics.jsonl` of the same prompts and seeds become one table of paired differences with
intervals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vggrpo.errors import UserError
from vggrpo.evaluation.metrics import HEADLINE, METRICS
from vggrpo.evaluation.metrics.quality import KERNEL_DISTANCE, KernelComparison
from vggrpo.evaluation.statistics import (
    Interval,
    WinRate,
    holm,
    mean_by_prompt,
    motion_matched,
    paired_bootstrap,
    win_rate,
)
from vggrpo.io.manifest import read_jsonl

Row = Mapping[str, Any]
Pair = tuple[str, Hashable]
MOTION = "motion_flow"
VERSION = "version"  # of this package, among what metrics were measured with
COLUMNS = (
    "metric",
    "label",
    "base",
    "tuned",
    "difference [95 % interval]",
    "win rate",
    "p (Holm)",
    "motion-matched",
    "failures",
    "prompts",
)
MOST_NAMED = 5  # pairs without a partner that are named; all are in the JSON
# What training optimised, computed on latents and merged into the rows by whoever trained: (unit, higher_is_better).
REWARDS = {"motion_reward": ("1", True), "geometry_reward": ("1", True)}


@dataclass(frozen=True)
class MetricComparison:
    """One metric over the pairs that are valid in both arms. `difference` is tuned - base, mean over prompts."""

    name: str
    unit: str
    higher_is_better: bool
    independence: str
    role: str
    base: float
    tuned: float
    difference: Interval
    wins: WinRate
    pairs: int
    failures_base: int
    failures_tuned: int
    p_holm: float | None = None
    motion_matched: Interval | None = None
    by_tag: dict[str, Interval] = field(default_factory=dict)
    reasons: dict[str, tuple[int, int]] = field(default_factory=dict)  # of failures: videos of base, of tuned
    prompts: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def improved(self) -> bool | None:
        """True or False when the interval excludes zero, None when it doesn't."""
        if not self.difference.off_zero:
            return None
        return (self.difference.mean > 0) == self.higher_is_better


@dataclass(frozen=True)
class Comparison:
    """Everything that EVALUATION's protocol asks for, by metric; `kernel` where the arms' features were compared."""

    metrics: dict[str, MetricComparison]
    pairs: int
    prompts: int
    seeds: int
    missing_base: list[Pair]
    missing_tuned: list[Pair]
    motion_ratio: float | None
    kernel: KernelComparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON (infinite bounds become null)."""
        return _jsonable(asdict(self))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """GitHub tables, headline metrics first: all pairs, then each tag (static, dynamic) apart, then remarks."""
        lines = _markdown(list(COLUMNS), self.table())
        by_tag = self.tag_table()
        if by_tag:
            lines += ["", "Difference by tag:", "", *_markdown(["metric", *self.tags], by_tag)]
        return "\n".join([*lines, "", *(f"- {remark}" for remark in self.remarks())]) + "\n"

    @property
    def tags(self) -> list[str]:
        """Tags that some metric has a difference for."""
        return sorted({tag for metric in self.metrics.values() for tag in metric.by_tag})

    def tag_table(self) -> list[list[str]]:
        """Cells of `metric, tag, tag, ...`: the difference among the prompts with each tag."""
        return [
            [metric.name, *(_interval_of(metric.by_tag.get(tag)) for tag in self.tags)]
            for metric in self.metrics.values()
            if metric.by_tag
        ]

    def table(self) -> list[list[str]]:
        """Cells of `COLUMNS`, one row a metric, for the terminal and for Markdown."""
        rows = []
        for metric in self.metrics.values():
            arrow = "higher is better" if metric.higher_is_better else "lower is better"
            rows.append([
                f"{metric.name} ({metric.unit}, {arrow})",
                metric.independence if metric.role == "score" else f"{metric.independence}, guard",
                _number(metric.base),
                _number(metric.tuned),
                _interval(metric.difference),
                f"{metric.wins.rate:.0%} ({metric.wins.wins}/{metric.wins.ties}/{metric.wins.losses})",
                "-" if metric.p_holm is None else f"{metric.p_holm:.2g}",
                _interval_of(metric.motion_matched),
                f"{metric.failures_base} / {metric.failures_tuned}",
                str(metric.difference.n),
            ])  # fmt: skip
        return rows + ([_kernel_row(self.kernel)] if self.kernel else [])

    def remarks(self) -> list[str]:
        """What a reader has to know beside the numbers."""
        out = [
            f"{self.pairs} pairs of {self.prompts} prompts; failures are base / tuned videos without a valid number; "
            "win rate (wins/ties/losses) over prompts."
        ]
        if self.motion_ratio is not None:
            inside = "inside" if 0.8 <= self.motion_ratio <= 1.25 else "OUTSIDE"
            out.append(
                f"Motion, tuned over base: {self.motion_ratio:.2f} ({inside} 0.8-1.25, where an improvement may count)."
            )
        for arm, pairs in (("base", self.missing_base), ("tuned", self.missing_tuned)):
            if pairs:
                named = ", ".join(f"seed {seed} of {prompt[:60]!r}" for prompt, seed in pairs[:MOST_NAMED])
                more = f" and {len(pairs) - MOST_NAMED} more" if len(pairs) > MOST_NAMED else ""
                out.append(f"Left out for want of a partner in {arm}: {named}{more}.")
        for metric in self.metrics.values():
            if metric.role == "score" and metric.reasons:
                reason, (base, tuned) = max(metric.reasons.items(), key=lambda item: sum(item[1]))
                out.append(f"{metric.name} fails most often ({base} base / {tuned} tuned videos) because: {reason}.")
        if self.prompts < 96 or self.seeds < 2:
            out.append("Fewer than 96 prompts x 2 seeds: shown, not claimed.")
        return out


def compare_files(base: Path | str, tuned: Path | str, **options: Any) -> Comparison:
    """`compare` on two `metrics.jsonl` files, or directories that hold one.

    Raises:
        UserError: as `compare`; or other weights, or another version, measured the one than the other.
    """
    files = [Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path) for path in (base, tuned)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist or is not a file; run `vggrpo evaluate` first")
    comparison = compare(*(read_jsonl(file) for file in files), **options)
    details = [file.with_name("details.jsonl") for file in files]
    _check_measured_alike(details[0], details[1], comparison.metrics)
    return comparison


def _check_measured_alike(base: Path, tuned: Path, metrics: Iterable[str]) -> None:
    """Numbers of two judges, or of two versions of this package, are not compared."""
    before, after = (_measured_by(file) for file in (base, tuned))
    for name in (VERSION, *metrics):
        if name in before and name in after and before[name] != after[name]:
            mine, theirs = (" and ".join(sorted(found[name])) for found in (before, after))
            raise UserError(
                f"{name} was measured with {mine} in base and with {theirs} in tuned; run `vggrpo evaluate` on both "
                "with the same models"
                if name != VERSION
                else f"base was measured by vggrpo {mine}, tuned by {theirs}; run `vggrpo evaluate` on both again"
            )


def _measured_by(details: Path) -> dict[str, set[str]]:
    """What `evaluate` says each metric was measured with; under `VERSION`, by which version."""
    found: dict[str, set[str]] = {}
    for row in read_jsonl(details) if details.is_file() else []:
        if "fingerprint" in row:
            found.setdefault(VERSION, set()).add(str(row["fingerprint"]).split()[-1])
        for name, source in row.get("sources", {}).items():
            found.setdefault(name, set()).add(source)
    return found


def compare(
    base_rows: Sequence[Row], tuned_rows: Sequence[Row], *, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Pairs rows by (prompt, seed) and compares every metric that both arms carry.

    Raises:
        UserError: when a row is none of `vggrpo evaluate`, an arm has two rows of one prompt and seed, or no pair or no
            metric is in both.
    """
    base, tuned = _by_pair(base_rows, "base"), _by_pair(tuned_rows, "tuned")
    shared = [pair for pair in base if pair in tuned]
    if not shared:
        raise UserError(
            "the two files share no (prompt, seed) pair; generate both arms from the same prompts and seeds"
        )
    have_base, have_tuned = (set().union(*(row["metrics"] for row in rows.values())) for rows in (base, tuned))
    names = _ordered(have_base & have_tuned)
    if not names:
        raise UserError(
            f"the two files share no metric (base has {', '.join(sorted(have_base)) or 'none'}, tuned has "
            f"{', '.join(sorted(have_tuned)) or 'none'}); run `vggrpo evaluate` with the same --metrics on both"
        )
    matched = _matched_pairs(base, tuned, shared)
    tags = sorted({tag for pair in shared for tag in base[pair].get("tags", [])})

    def bootstrap(differences: Mapping[Pair, float]) -> Interval:
        return paired_bootstrap(list(mean_by_prompt(differences).values()), resamples=resamples, seed=seed)

    metrics = {name: _compare_metric(name, base, tuned, shared, matched, tags, bootstrap) for name in names}
    return Comparison(
        metrics=_with_holm(metrics),
        pairs=len(shared),
        prompts=len({prompt for prompt, _ in shared}),
        seeds=min(np.unique([prompt for prompt, _ in shared], return_counts=True)[1].tolist()),
        missing_base=[pair for pair in tuned if pair not in base],
        missing_tuned=[pair for pair in base if pair not in tuned],
        motion_ratio=_motion_ratio(metrics.get(MOTION)),
    )


def _compare_metric(
    name: str,
    base: Mapping[Pair, Row],
    tuned: Mapping[Pair, Row],
    shared: Sequence[Pair],
    matched: set[Pair],
    tags: Sequence[str],
    bootstrap: Callable[[Mapping[Pair, float]], Interval],
) -> MetricComparison:
    """One metric. Pairs that failed in either arm are left out of the means and counted."""
    unit, higher, independence, role = _describe(name)
    values = {pair: (_value(base[pair], name), _value(tuned[pair], name)) for pair in shared}
    good = {pair: (a, b) for pair, (a, b) in values.items() if a is not None and b is not None}
    differences = {pair: b - a for pair, (a, b) in good.items()}
    by_prompt_base = mean_by_prompt({pair: a for pair, (a, _) in good.items()})
    by_prompt_tuned = mean_by_prompt({pair: b for pair, (_, b) in good.items()})
    change = np.array([by_prompt_tuned[prompt] - by_prompt_base[prompt] for prompt in by_prompt_base])
    in_matched = {pair: value for pair, value in differences.items() if pair in matched}
    tagged = {
        tag: {pair: value for pair, value in differences.items() if tag in base[pair].get("tags", [])} for tag in tags
    }
    return MetricComparison(
        name=name,
        unit=unit,
        higher_is_better=higher,
        independence=independence,
        role=role,
        base=float(np.mean(list(by_prompt_base.values()))) if good else float("nan"),
        tuned=float(np.mean(list(by_prompt_tuned.values()))) if good else float("nan"),
        difference=bootstrap(differences),
        wins=win_rate(change if higher else -change),
        pairs=len(good),
        reasons=_reasons(base, tuned, name),
        failures_base=sum(_value(row, name) is None for row in base.values()),
        failures_tuned=sum(_value(row, name) is None for row in tuned.values()),
        motion_matched=bootstrap(in_matched) if in_matched else None,
        by_tag={tag: bootstrap(part) for tag, part in tagged.items() if part},
        prompts={prompt: (by_prompt_base[prompt], by_prompt_tuned[prompt]) for prompt in by_prompt_base},
    )


def _describe(name: str) -> tuple[str, bool, str, str]:
    """Unit, direction, independence and role. The registry decides; a name it doesn't know is refused."""
    if name in REWARDS:
        unit, higher = REWARDS[name]
        return unit, higher, "reward", "score"
    metric = METRICS[name]
    return metric.unit, metric.higher_is_better, metric.independence, metric.role


def _ordered(names: Iterable[str]) -> list[str]:
    known = [*HEADLINE, *(name for name in METRICS if name not in HEADLINE), *REWARDS]
    names = set(names)
    unknown = sorted(names - set(known))
    if unknown:
        raise UserError(
            f"unknown metric {unknown[0]!r} in the rows; the registry must say its direction and independence"
        )
    return [name for name in known if name in names]


def _by_pair(rows: Sequence[Row], arm: str) -> dict[Pair, Row]:
    out: dict[Pair, Row] = {}
    for number, row in enumerate(rows, start=1):
        missing = {"prompt", "seed", "metrics"} - set(row)
        if missing:
            raise UserError(
                f"row {number} of {arm} lacks {', '.join(sorted(missing))}; expected the rows of `vggrpo evaluate`"
            )
        wrong = _misfit(row)
        if wrong is not None:
            raise UserError(
                f"row {number} of {arm}: {wrong} is {_at(row, wrong)!r:.80}, which `vggrpo evaluate` never writes; "
                "run it again"
            )
        pair = (row["prompt"], row["seed"])
        if pair in out:
            raise UserError(f"{arm} has two rows of seed {pair[1]} of the prompt {pair[0][:60]!r}; a pair needs one")
        out[pair] = row
    if not out:
        raise UserError(f"the {arm} arm has no rows; run `vggrpo evaluate` first")
    return out


def _misfit(row: Row) -> str | None:
    """The first field of a row that is not as `evaluate` writes it, or None."""
    tags = row.get("tags", [])
    fits = {
        "prompt": isinstance(row["prompt"], str),
        "seed": isinstance(row["seed"], int),
        "metrics": isinstance(row["metrics"], dict),
        "tags": isinstance(tags, list) and all(isinstance(tag, str) for tag in tags),
    }
    wrong = next((name for name, ok in fits.items() if not ok), None)
    return wrong or next((name for name, entry in row["metrics"].items() if not _is_entry(entry)), None)


def _at(row: Row, name: str) -> Any:
    return row[name] if name in row else row["metrics"][name]


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and "valid" in entry and isinstance(entry.get("value"), int | float | None)


def _value(row: Row, name: str) -> float | None:
    entry = row["metrics"].get(name)
    if entry is None or not entry["valid"] or entry["value"] is None or not np.isfinite(entry["value"]):
        return None
    return float(entry["value"])


def _reasons(base: Mapping[Pair, Row], tuned: Mapping[Pair, Row], name: str) -> dict[str, tuple[int, int]]:
    """Why videos have no valid number, and how many of each arm."""
    counts: dict[str, list[int]] = {}
    for arm, rows in enumerate((base, tuned)):
        for row in rows.values():
            if _value(row, name) is None:
                reason = str(row["metrics"].get(name, {}).get("reason") or "not measured")
                counts.setdefault(reason, [0, 0])[arm] += 1
    return {reason: (in_base, in_tuned) for reason, (in_base, in_tuned) in counts.items()}


def _matched_pairs(base: Mapping[Pair, Row], tuned: Mapping[Pair, Row], shared: Sequence[Pair]) -> set[Pair]:
    motion = {pair: (_value(base[pair], MOTION), _value(tuned[pair], MOTION)) for pair in shared}
    return {pair for pair, (a, b) in motion.items() if a is not None and b is not None and motion_matched(a, b)}


def _motion_ratio(motion: MetricComparison | None) -> float | None:
    """Mean motion of the tuned arm over the base arm's; None when motion wasn't measured or the base arm is still."""
    if motion is None or not motion.base > 0:
        return None
    return motion.tuned / motion.base


def _with_holm(metrics: dict[str, MetricComparison]) -> dict[str, MetricComparison]:
    """Adjusts the scores that training didn't optimise; guards make no claim and rewards are expected to move."""
    names = [
        name
        for name, metric in metrics.items()
        if metric.role == "score" and metric.independence != "reward" and metric.pairs
    ]
    adjusted = dict(zip(names, holm([metrics[name].difference.p for name in names]), strict=True))
    return {
        name: MetricComparison(**{**metric.__dict__, "p_holm": adjusted.get(name)}) for name, metric in metrics.items()
    }


def _number(value: float) -> str:
    return "-" if not np.isfinite(value) else f"{value:.4g}"


def _interval(interval: Interval) -> str:
    if not np.isfinite(interval.low):
        return f"{_number(interval.mean)} [too few prompts]"
    return f"{interval.mean:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


def _interval_of(interval: Interval | None) -> str:
    return "-" if interval is None else f"{_interval(interval)}, n={interval.n}"


def _kernel_row(kernel: KernelComparison) -> list[str]:
    """Cells of `COLUMNS` for a number that an arm has, and no single video."""
    numbers = [_number(kernel.base), _number(kernel.tuned), _interval(kernel.difference)]
    name = f"{KERNEL_DISTANCE} (MMD^2, lower is better)"
    return [name, "independent", *numbers, "-", "-", "-", "-", str(kernel.difference.n)]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    # A bar would end the cell.
    table = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
