"""Epipolar consistency: do matched points of two frames obey one rigid camera motion?

For frame pairs at fixed time gaps: matches, a fundamental matrix F (`two_view`), then the Sampson distance to F over
**all** matches:

- `epipolar_inliers`: share of matches within 1 px of the working frame (short side 256 to 480 px; smaller clips are
  enlarged), mean over pairs.
- `epipolar_error`: median distance / diagonal, mean over pairs.

Both leave the 7 best matches out, which F explains whatever they are: with 15 matches of pure noise some F still fits
half of them, and a melted clip with few matches would score above a slightly bent one with many.

`epipolar_*` match SIFT features; `epipolar_xfeat_*` are the same with XFeat and LighterGlue, under their own names so
that the two are never mixed. XFeat's points are good to a pixel rather than to a fraction of one: expect fewer inliers.

Deviations from what peers do, and why: a mean over all matches with an 8-point fit and failed pairs dropped ranks
still, blurred and flat videos above correct geometry. Here a pair without enough matches counts as the worst score;
pairs that don't move are left out, because F is undefined for them, and a clip where hardly any pair moves is invalid.
The guards `epipolar_matches`, `epipolar_displacement`, `epipolar_homography_gap` (share of inliers that only F, and no
flat-world homography, explains) and `epipolar_failed_pairs` show the remaining cheats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vggrpo.evaluation.metrics.base import Clip, Measurement, frame_pairs
from vggrpo.evaluation.metrics.features import LONGEST, SHORTEST, STILL, Matcher, Sift, still_below
from vggrpo.evaluation.metrics.two_view import (
    FREE_FUNDAMENTAL,
    FREE_HOMOGRAPHY,
    fit_fundamental,
    fit_homography,
    inlier_share,
    sampson_distance,
    transfer_distance,
)

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels

GAPS = (0.5, 1.0)  # seconds
STEP = 0.5  # seconds between the starts of pairs
MOST_PAIRS = 16  # for each gap, so that cost doesn't grow with length
FEWEST_MATCHES = 12
MOVING_SHARE = 0.25  # of pairs; with fewer, what moves is a stray match of sensor noise
WORST_ERROR = 0.02  # diagonals; cap for failed and hopeless pairs
NAMES = (
    "epipolar_inliers",
    "epipolar_error",
    "epipolar_matches",
    "epipolar_displacement",
    "epipolar_homography_gap",
    "epipolar_failed_pairs",
)


@dataclass(frozen=True)
class PairFit:
    """One frame pair. `inliers`, `error` and `homography_inliers` are None when the pair is still or failed."""

    matches: int
    displacement: float  # median, in diagonals
    still: bool = False
    inliers: float | None = None
    error: float | None = None
    homography_inliers: float | None = None

    @property
    def failed(self) -> bool:
        return not self.still and self.inliers is None


def fit_pair(
    first: NDArray[np.float64], second: NDArray[np.float64], diagonal: float, seed: int = 0, *, still: float = STILL
) -> PairFit:
    """Judges the matches of one frame pair. Positions (N, 2), `diagonal` and `still` in pixels of the working frame;
    with a median displacement below `still` there is no motion to explain.
    """
    count = len(first)
    displacement = float(np.median(np.linalg.norm(second - first, axis=1))) if count else 0.0
    if count < FEWEST_MATCHES:
        return PairFit(count, displacement / diagonal)
    if displacement < still:
        return PairFit(count, displacement / diagonal, still=True)
    fundamental = fit_fundamental(first, second, seed)
    if fundamental is None:
        return PairFit(count, displacement / diagonal)
    distance = sampson_distance(fundamental, first, second)
    homography = fit_homography(first, second, seed)
    flat = 0.0 if homography is None else inlier_share(transfer_distance(homography, first, second), FREE_HOMOGRAPHY)
    median = float(np.median(np.sort(distance)[FREE_FUNDAMENTAL:]))
    return PairFit(
        count,
        displacement / diagonal,
        inliers=inlier_share(distance, FREE_FUNDAMENTAL),
        error=min(median / diagonal, WORST_ERROR),
        homography_inliers=flat,
    )


def epipolar(clip: Clip, models: EvaluationModels | None = None) -> dict[str, Measurement]:
    """All epipolar metrics of one clip by SIFT; see the module's docstring."""
    return measure(clip, Sift())


def epipolar_xfeat(clip: Clip, models: EvaluationModels) -> dict[str, Measurement]:
    """The same by XFeat and LighterGlue."""
    found = measure(clip, models.xfeat)
    return {name.replace("epipolar", "epipolar_xfeat"): measurement for name, measurement in found.items()}


def measure(clip: Clip, matcher: Matcher, *, seed: int = 0) -> dict[str, Measurement]:
    """The metrics `NAMES` of one clip with the given matcher."""
    pairs = [pair for gap in GAPS for pair in frame_pairs(clip.num_frames, clip.fps, gap, STEP, MOST_PAIRS)]
    if not pairs:
        reason = f"the clip lasts {clip.seconds:.2f} s, shorter than the smallest gap of {min(GAPS)} s"
        return {name: Measurement.invalid(reason) for name in NAMES}
    frames = {index: clip.grey_at(index, SHORTEST, LONGEST) for index in sorted({i for pair in pairs for i in pair})}
    diagonal = float(np.hypot(*next(iter(frames.values())).shape))
    features = {index: matcher.detect(frame) for index, frame in frames.items()}
    still = still_below(min(clip.frames.shape[1:3]))
    return summarise_pairs(
        [fit_pair(*matcher.match(features[i], features[j]), diagonal, seed, still=still) for i, j in pairs]
    )


def summarise_pairs(fits: list[PairFit]) -> dict[str, Measurement]:
    """Clip values from pair values: failed pairs count as worst, still pairs are left out."""
    matches = [float(fit.matches) for fit in fits]
    displacement = [fit.displacement for fit in fits]
    failed = [float(fit.failed) for fit in fits]
    moving = [fit for fit in fits if not fit.still]
    out = {
        "epipolar_matches": Measurement.of(float(np.mean(matches)), pairs=matches),
        "epipolar_displacement": Measurement.of(float(np.median(displacement)), pairs=displacement),
        "epipolar_failed_pairs": Measurement.of(float(np.mean(failed)), pairs=failed),
    }
    if len(moving) < MOVING_SHARE * len(fits):
        reason = "hardly a frame pair moves by more than noise does; a still clip has no epipolar geometry"
        return out | {name: Measurement.invalid(reason) for name in NAMES if name not in out}
    inliers = [0.0 if fit.inliers is None else fit.inliers for fit in moving]
    errors = [WORST_ERROR if fit.error is None else fit.error for fit in moving]
    gaps = [0.0 if fit.inliers is None else fit.inliers - (fit.homography_inliers or 0.0) for fit in moving]
    return out | {
        "epipolar_inliers": Measurement.of(float(np.mean(inliers)), pairs=inliers),
        "epipolar_error": Measurement.of(float(np.mean(errors)), pairs=errors),
        "epipolar_homography_gap": Measurement.of(float(np.mean(gaps)), pairs=gaps),
    }
