"""The short form of a comparison (`summary.json`), and whether an improvement counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vggrpo.evaluation.compare import Comparison, compare
from vggrpo.evaluation.metrics import HEADLINE
from vggrpo.evaluation.metrics.quality import KERNEL_DISTANCE, KernelComparison
from vggrpo.evaluation.statistics import Interval, non_inferiority

ADHERENCE_MARGIN = 0.05  # 5 points
MOTION_RANGE = (0.8, 1.25)
FEWEST_PROMPTS, FEWEST_SEEDS = 96, 2


@dataclass(frozen=True)
class Verdict:
    """Whether the improvement counts: every check with its outcome (None: not measured) and a sentence."""

    checks: dict[str, tuple[bool | None, str]]

    @property
    def counts(self) -> bool:
        return all(outcome is True for outcome, _ in self.checks.values())


def summarise(
    base_rows: Sequence[Mapping[str, Any]],
    tuned_rows: Sequence[Mapping[str, Any]],
    *,
    kernel: KernelComparison | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """`{name: {base, tuned, diff, ci_low, ci_high, higher_is_better, independent, ...}}` of every metric in the rows.

    Rewards that the caller merged into the rows as `motion_reward` and `geometry_reward` are included and labelled
    `reward`. A bound that doesn't exist (one prompt) is None.
    """
    return summarise_comparison(compare(base_rows, tuned_rows, resamples=resamples, seed=seed), kernel)


def summarise_comparison(
    comparison: Comparison, kernel: KernelComparison | None = None, runs: Sequence[Comparison] = ()
) -> dict[str, dict[str, Any]]:
    """As `summarise`, from a comparison that was made already.

    Args:
        runs: one comparison a training seed, where `comparison` pools several; each headline metric then carries their
            mean differences as `by_training_seed` (None: no valid pair).
    """
    out: dict[str, dict[str, Any]] = {
        metric.name: _entry(metric.base, metric.tuned, metric.difference, metric.higher_is_better, metric.independence)
        | {"unit": metric.unit, "role": metric.role, "p_holm": metric.p_holm, "win_rate": _number(metric.wins.rate),
           "failures_base": metric.failures_base, "failures_tuned": metric.failures_tuned,
           "motion_matched": None if metric.motion_matched is None else _bounds(metric.motion_matched)}
        for metric in comparison.metrics.values()
    }  # fmt: skip
    for name in HEADLINE if runs else ():
        if name in out:
            out[name]["by_training_seed"] = [_run_difference(run, name) for run in runs]
    if kernel is not None:
        out[KERNEL_DISTANCE] = kernel_entry(kernel)
    return out


def kernel_entry(kernel: KernelComparison) -> dict[str, Any]:
    """The kernel distance as `summarise` gives the metrics of videos, with its margin of non-inferiority."""
    return _entry(kernel.base, kernel.tuned, kernel.difference, False, "independent") | {
        "unit": "MMD^2", "role": "score", "p_holm": None,
        "non_inferior": kernel.against_base_itself.holds, "margin": kernel.against_base_itself.margin,
    }  # fmt: skip


def verdict(comparison: Comparison, kernel: KernelComparison | None = None, runs: Sequence[Comparison] = ()) -> Verdict:
    """The conditions under which an improvement counts, fixed before any result was seen.

    Args:
        runs: one comparison a training seed, where `comparison` pools several: the headline must improve in each, and
            videos are counted in one of them. Empty: `comparison` is of one model.
    """
    checks: dict[str, tuple[bool | None, str]] = {}
    seeds = min((run.seeds for run in runs), default=comparison.seeds)
    checks["sample"] = (
        comparison.prompts >= FEWEST_PROMPTS and seeds >= FEWEST_SEEDS,
        f"{comparison.prompts} prompts x {seeds} video seeds; a claim needs {FEWEST_PROMPTS} x {FEWEST_SEEDS}",
    )
    ratio = comparison.motion_ratio
    inside = None if ratio is None else MOTION_RANGE[0] <= ratio <= MOTION_RANGE[1]
    checks["motion"] = (
        inside,
        "not measured" if ratio is None else f"motion ratio {ratio:.2f}; allowed {MOTION_RANGE[0]}-{MOTION_RANGE[1]}",
    )
    for name in HEADLINE:
        checks[name] = _headline(comparison, name, runs)
    adherence = comparison.metrics.get("adherence")
    if adherence is None or not adherence.pairs:
        checks["adherence"] = (None, "not measured")
    else:
        result = non_inferiority(adherence.difference, ADHERENCE_MARGIN, higher_is_better=True)
        checks["adherence"] = (result.holds, f"loses at most {result.worst:.3f}; margin {ADHERENCE_MARGIN}")
    kernel = kernel or comparison.kernel
    if kernel is None:
        checks["quality"] = (None, "not measured")
    else:
        same = kernel.against_base_itself
        checks["quality"] = (
            same.holds,
            f"kernel distance grows by at most {same.worst:.3g}; base against itself {same.margin:.3g}",
        )
    return Verdict(checks)


def _headline(comparison: Comparison, name: str, runs: Sequence[Comparison]) -> tuple[bool | None, str]:
    metric = comparison.metrics.get(name)
    if metric is None or not metric.pairs:
        return None, "not measured"
    interval, matched = metric.difference, metric.motion_matched
    by_run = [_run_difference(run, name) for run in runs]
    towards = 1 if metric.higher_is_better else -1
    better = metric.improved is True and matched is not None and towards * matched.mean > 0
    everywhere = all(difference is not None and towards * difference > 0 for difference in by_run)
    text = f"{interval.mean:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"
    text += "; no motion-matched pair" if matched is None else f"; motion-matched {matched.mean:+.3g} (n={matched.n})"
    if len(by_run) > 1:
        text += "; by training seed " + ", ".join("unknown" if d is None else f"{d:+.3g}" for d in by_run)
    return better and everywhere, text


def _run_difference(run: Comparison, name: str) -> float | None:
    """Mean difference of one training seed; None without a valid pair."""
    return _number(run.metrics[name].difference.mean) if name in run.metrics else None


def _bounds(difference: Interval) -> dict[str, Any]:
    return {
        "diff": _number(difference.mean),
        "ci_low": _number(difference.low),
        "ci_high": _number(difference.high),
        "n": difference.n,
    }


def _entry(
    base: float, tuned: float, difference: Interval, higher_is_better: bool, independence: str
) -> dict[str, Any]:
    return {
        "base": _number(base),
        "tuned": _number(tuned),
        **_bounds(difference),
        "p": _number(difference.p),
        "higher_is_better": higher_is_better,
        "independent": independence == "independent",
        "independence": independence,
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
