"""Paired statistics whose unit is the prompt.

Two arms share prompts and seeds. Differences are taken per (prompt, seed), seeds are averaged within a prompt, and
prompts are resampled. Pooling all videos as if they were independent gives intervals that cover 76 % where 95 % is
claimed (measured on correlated seeds); a test holds the coverage of these.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
_BLOCK = 2_000_000  # resampled indices held at once (16 MB)


@dataclass(frozen=True)
class Interval:
    """Mean of n prompts with a bootstrap confidence interval and a two-sided p-value for a mean of zero."""

    mean: float
    low: float
    high: float
    p: float
    n: int

    @property
    def off_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class WinRate:
    """Prompts on which the second arm is better, equal, worse; a tie counts half."""

    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        total = self.wins + self.ties + self.losses
        return (self.wins + self.ties / 2) / total if total else float("nan")


@dataclass(frozen=True)
class NonInferiority:
    """Whether the interval of the harm stays inside the margin."""

    holds: bool
    worst: float
    margin: float


def bootstrap_means(values: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Means of `resamples` draws with replacement from values (n,): (resamples,). Same seed, same draws."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    out = np.empty(resamples)
    rows = max(1, _BLOCK // max(1, len(values)))
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        out[start:stop] = values[rng.integers(0, len(values), (stop - start, len(values)))].mean(1)
    return out


def paired_bootstrap(
    differences: ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile interval of the mean of per-prompt differences (n,), widened by sqrt(n / (n - 1)).

    The plain percentile bootstrap uses the biased variance and is a little narrow for small n; the factor undoes
    that. With fewer than two prompts there is no spread to resample and the interval is infinite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("differences must be finite; leave invalid pairs out and count them")
    n = len(values)
    if n < 2:
        return Interval(float(values.mean()) if n else float("nan"), -np.inf, np.inf, 1.0, n)
    mean = float(values.mean())
    means = mean + (bootstrap_means(values, resamples, seed) - mean) * np.sqrt(n / (n - 1))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    # + 1: a p-value from resampling is never exactly zero.
    tail = (1 + min(int((means <= 0).sum()), int((means >= 0).sum()))) / (resamples + 1)
    return Interval(mean, float(low), float(high), min(1.0, 2 * tail), n)


def mean_by_prompt(values: Mapping[tuple[str, Hashable], float]) -> dict[str, float]:
    """Averages seeds within a prompt: {(prompt, seed): value} -> {prompt: mean}. Order of first appearance is kept."""
    groups: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        groups.setdefault(prompt, []).append(value)
    return {prompt: float(np.mean(group)) for prompt, group in groups.items()}


def win_rate(improvements: ArrayLike, tie: float = 0.0) -> WinRate:
    """Counts prompts whose improvement (n,) is above `tie`, within it, and below -`tie`."""
    values = np.asarray(improvements, dtype=np.float64)
    wins, losses = int((values > tie).sum()), int((values < -tie).sum())
    return WinRate(wins, len(values) - wins - losses, losses)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the given order: max over smaller ones of (m - rank) p, capped at 1."""
    m = len(p_values)
    adjusted, running = [0.0] * m, 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, (m - rank) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted


def motion_matched(base: float, tuned: float, low: float = 0.8, high: float = 1.25) -> bool:
    """Whether the tuned video moves about as much as the base video: low <= tuned / base <= high. Two still videos
    match.
    """
    if base == 0:
        return tuned == 0
    return low <= tuned / base <= high


def non_inferiority(difference: Interval, margin: float, higher_is_better: bool) -> NonInferiority:
    """Non-inferior when even the bad end of the interval of tuned - base loses less than `margin` (> 0, same unit)."""
    worst = -difference.low if higher_is_better else difference.high
    return NonInferiority(bool(worst < margin), float(worst), float(margin))


def rank_with_ties(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1, equal values share the mean of their ranks: (n,)."""
    values = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Rank correlation of two (n,) samples, ties averaged; NaN when either is constant or n < 3."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected two vectors of one length, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("ranks of NaN or infinity are undefined; leave invalid samples out and count them")
    if len(a) < 3:
        return float("nan")
    a, b = rank_with_ties(a), rank_with_ties(b)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def within_group_spearman(first: ArrayLike, second: ArrayLike, groups: Sequence[Hashable]) -> float:
    """Rank correlation after each group's own mean rank is taken out: do the two agree *within* a group (one prompt)?

    Ranks are taken inside each group and divided by its size, so that prompts that are hard for both don't count as
    agreement. The correlation is pooled over groups of at least three; NaN when there is none or all are constant.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if not len(a) == len(b) == len(groups):
        raise ValueError(f"expected equal lengths, got {len(a)}, {len(b)} and {len(groups)}")
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    left, right = [], []
    for indices in members.values():
        if len(indices) >= 3:
            for values, out in ((a, left), (b, right)):
                ranks = rank_with_ties(values[indices])
                out.append((ranks - ranks.mean()) / len(indices))
    if not left:
        return float("nan")
    x, y = np.concatenate(left), np.concatenate(right)
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else float("nan")
