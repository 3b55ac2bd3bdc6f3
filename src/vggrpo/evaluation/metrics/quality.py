"""Kernel distance (as KID, Binkowski et al. 2018) between an arm's clips and rendered reference clips, in the
attribute classifier's features.

    k(x, y) = (x . y / d + 1)^3
    MMD^2   = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)          (unbiased: it
    can be negative)

Deviation: features are divided by one scalar, the reference's root mean square, so that the number doesn't depend on
the classifier's scale. It is a number of an arm, not of a video. Both arms must have equally many clips, since small
samples differ in noise. Intervals resample prompts (all seeds of a prompt together); a clip drawn twice is never
paired with itself, which would bias the U-statistic upwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vggrpo.errors import UserError
from vggrpo.evaluation.statistics import RESAMPLES, Interval, NonInferiority, non_inferiority

Features = NDArray[Any]  # floating, (N, D)
KERNEL_DISTANCE = "kernel_distance"  # its name beside those of the per-video metrics


@dataclass(frozen=True)
class KernelComparison:
    """Kernel distances of both arms to the reference, and tuned - base (lower is better)."""

    base: float
    tuned: float
    difference: Interval
    against_base_itself: NonInferiority


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((x @ y.T / x.shape[1] + 1.0) ** 3)


def _off_diagonal_mean(kernel: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted mean of k(i, j) over i != j for each row of counts (R, N): (R,)."""
    total = ((counts @ kernel) * counts).sum(1) - counts**2 @ np.diag(kernel)
    weight = counts.sum(1) ** 2 - (counts**2).sum(1)
    return np.asarray(total / np.maximum(weight, 1e-12))


def _scaled(reference: Features, *arms: Features) -> list[NDArray[np.float64]]:
    scale = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
    if not scale > 0:
        raise UserError("the reference clips have all-zero features; the attribute classifier's weights are broken")
    out = [np.asarray(part, dtype=np.float64) / scale for part in (reference, *arms)]
    if not all(np.isfinite(part).all() for part in out):
        raise UserError("features hold NaN or infinity; check the clips and the attribute classifier")
    return out


def _distances(
    reference: NDArray[np.float64], arm: NDArray[np.float64], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """MMD^2 of the arm (N, D) drawn `counts` (R, N) times against the whole reference (M, D): (R,)."""
    everything = np.ones((1, len(reference)))
    own = _off_diagonal_mean(_kernel(arm, arm), counts)
    across = (counts @ _kernel(arm, reference).mean(1)) / counts.sum(1)
    return own + _off_diagonal_mean(_kernel(reference, reference), everything)[0] - 2 * across


def kernel_distance(features: Features, reference: Features) -> float:
    """Unbiased MMD^2 between features (N, D) and reference (M, D); N, M >= 2."""
    if len(features) < 2 or len(reference) < 2:
        raise UserError(f"a kernel distance needs two clips on each side, got {len(features)} and {len(reference)}")
    ref, arm = _scaled(reference, features)
    return float(_distances(ref, arm, np.ones((1, len(arm))))[0])


def compare_kernel_distance(
    base: Features,
    tuned: Features,
    reference: Features,
    prompts: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> KernelComparison:
    """Both arms against the reference, with a bootstrap over prompts.

    Args:
        base, tuned: (N, D), row i of both made from `prompts[i]` with the same seed.
        reference: (M, D) features of rendered clips.
        prompts: prompt of each row.

    The margin of non-inferiority is the 95th percentile of |base drawn once - base drawn again|: what the same model
    differs from itself by chance.
    """
    if not len(base) == len(tuned) == len(prompts):
        raise UserError(
            f"both arms need the same clips: got {len(base)} base, {len(tuned)} tuned, {len(prompts)} prompts"
        )
    if len(base) < 2 or len(reference) < 2:
        raise UserError(f"a kernel distance needs two clips on each side, got {len(base)} and {len(reference)}")
    ref, base_x, tuned_x = _scaled(reference, base, tuned)
    members = np.array(
        [[prompt == name for prompt in prompts] for name in dict.fromkeys(prompts)], dtype=np.float64
    )  # (P, N)
    rng = np.random.default_rng(seed)
    first, second = (
        rng.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples) @ members for _ in range(2)
    )
    once = np.ones((1, len(base_x)))
    base_value, tuned_value = float(_distances(ref, base_x, once)[0]), float(_distances(ref, tuned_x, once)[0])
    drawn = _distances(ref, base_x, first)
    differences = _distances(ref, tuned_x, first) - drawn
    low, high = np.quantile(differences, [0.025, 0.975])
    tail = (1 + min(int((differences <= 0).sum()), int((differences >= 0).sum()))) / (resamples + 1)
    if len(members) < 2:
        low, high, tail = -np.inf, np.inf, 0.5
    interval = Interval(tuned_value - base_value, float(low), float(high), min(1.0, 2 * tail), len(members))
    margin = float(np.quantile(np.abs(_distances(ref, base_x, second) - drawn), 0.95))
    return KernelComparison(
        base_value, tuned_value, interval, non_inferiority(interval, margin, higher_is_better=False)
    )
