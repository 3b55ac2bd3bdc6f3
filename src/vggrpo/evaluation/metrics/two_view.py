"""Two views of one scene: robust fundamental matrices and homographies of matched points, and distances to them.

    sampson(x, x') = |x'^T F x| / sqrt((F x)_1^2 + (F x)_2^2 + (F^T x')_1^2 + (F^T x')_2^2)     (in pixels)

F is found in two steps. Several seeded robust fits (MAGSAC, two kinds of RANSAC) propose matrices: where most matches
lie on a wall or two, many fit almost as well, and one fit may settle on a wrong one. Each is moved downhill on a robust
(Cauchy) sum of squared Sampson distances over *all* matches, by Levenberg-Marquardt over F's seven degrees of freedom,
and the one with the smallest sum is F. What it says about the camera where the intrinsics are known: `pose`.

Positions are OpenCV's: the centre of the first pixel is (0, 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Points: TypeAlias = NDArray[np.float64]  # (N, 2), pixels
Matrix: TypeAlias = NDArray[np.float64]  # (3, 3)
Vector: TypeAlias = NDArray[np.float64]  # (N,)

THRESHOLD = 1.0  # px of the working frame: an inlier
CONFIDENCE, MOST_TRIALS = 0.999, 2000  # of each robust fit
CAUCHY = 0.15  # px: where the refinement starts to distrust a match
MAGSAC_SEEDS = 4
REFINEMENT_STEPS = 15
FREE_FUNDAMENTAL, FREE_HOMOGRAPHY = 7, 4  # matches that determine the model, and so agree with it by construction


def sampson_distance(fundamental: Matrix, first: Points, second: Points) -> NDArray[np.float64]:
    """First-order distance in pixels of matches `first` <-> `second`, both (N, 2), to the epipolar geometry F: (N,)."""
    return np.abs(signed_sampson(fundamental, first, second))


def transfer_distance(homography: Matrix, first: Points, second: Points) -> NDArray[np.float64]:
    """Distance in pixels of `second` to the homography's image of `first`, both (N, 2): (N,)."""
    moved = homogeneous(first) @ homography.T
    depth = np.where(np.abs(moved[:, 2:]) < 1e-12, 1e-12, moved[:, 2:])
    return np.asarray(np.linalg.norm(moved[:, :2] / depth - second, axis=1))


def fit_fundamental(first: Points, second: Points, seed: int = 0) -> Matrix | None:
    """F (3, 3) of matched points (N, 2), or None when no model is found. The same seed gives the same matrix."""
    found = candidate_fundamentals(first, second, seed)
    return found[0] if found else None


def candidate_fundamentals(first: Points, second: Points, seed: int = 0) -> list[Matrix]:
    """Refined matrices (3, 3) of all robust fits that found one, the one with the smallest robust sum first."""
    attempts: list[tuple[cv2.UsacParams] | tuple[int, float, float, int]] = [
        (_robust(MAGSAC_SEEDS * seed + k),) for k in range(MAGSAC_SEEDS)
    ]
    attempts += [(method, THRESHOLD, CONFIDENCE, MOST_TRIALS) for method in (cv2.RANSAC, cv2.USAC_DEFAULT)]
    found: list[tuple[float, Matrix]] = []
    for attempt in attempts:
        try:
            matrix, _ = cv2.findFundamentalMat(first, second, *attempt)
        except cv2.error:  # OpenCV raises when every sample is degenerate
            continue
        if matrix is None or matrix.shape != (3, 3) or not np.isfinite(matrix).all():
            continue
        refined = refine_fundamental(np.asarray(matrix, dtype=np.float64), first, second)
        found.append((float(np.log1p((sampson_distance(refined, first, second) / CAUCHY) ** 2).sum()), refined))
    return [matrix for _, matrix in sorted(found, key=lambda pair: pair[0])]


def fit_homography(first: Points, second: Points, seed: int = 0) -> Matrix | None:
    """H (3, 3) of matched points (N, 2) by MAGSAC, or None when no model is found."""
    try:
        matrix, _ = cv2.findHomography(first, second, _robust(seed))
    except cv2.error:  # as above
        return None
    return None if matrix is None or matrix.shape != (3, 3) else np.asarray(matrix, dtype=np.float64)


def inlier_share(distance: NDArray[np.float64], free: int) -> float:
    """Share of matches (N,) within the threshold, without the `free` ones that the model always fits."""
    return max(0.0, float(((distance <= THRESHOLD).sum() - free) / (len(distance) - free)))


def refine_fundamental(fundamental: Matrix, first: Points, second: Points) -> Matrix:
    """Levenberg-Marquardt on sum of log(1 + (sampson / CAUCHY)^2), over F = U(a) diag(1, s, 0) V(b)^T.

    a and b are rotations, so F keeps its rank of two; a step that doesn't lower the sum is not taken.
    """
    both = np.vstack([first, second])
    centre, scale = both.mean(0), 1.0 / max(float(both.std()), 1e-9)
    norm = np.array([[scale, 0, -scale * centre[0]], [0, scale, -scale * centre[1]], [0, 0, 1.0]])
    inverse = np.linalg.inv(norm)
    a, b = (first - centre) * scale, (second - centre) * scale
    left, sigma, right = np.linalg.svd(inverse.T @ fundamental @ inverse)
    if sigma[0] < 1e-12:
        return fundamental

    def residuals(p: NDArray[np.float64]) -> NDArray[np.float64]:
        return signed_sampson(_build(left, right, sigma[1] / sigma[0], p), a, b) / (CAUCHY * scale)

    best, _ = minimise(residuals, 7, np.log1p, lambda square: 1.0 / (1.0 + square))
    return np.asarray(norm.T @ _build(left, right, sigma[1] / sigma[0], best) @ norm)


def minimise(
    residuals: Callable[[Vector], Vector],
    size: int,
    rho: Callable[[Vector], Vector],
    weight: Callable[[Vector], Vector],
) -> tuple[Vector, float]:
    """Levenberg-Marquardt on sum of rho(residual^2) from zero, with numerical derivatives: parameters (size,), sum.

    Args:
        residuals: parameters (size,) to residuals (N,).
        rho, weight: the robust function of a squared residual, and its derivative.
    """
    best, damping = np.zeros(size), 1e-3
    now = residuals(best)
    cost = float(rho(now**2).sum())
    for _ in range(REFINEMENT_STEPS):
        jacobian = np.stack([(residuals(best + 1e-6 * unit) - now) / 1e-6 for unit in np.eye(size)], 1)  # (N, size)
        weighted = jacobian * weight(now**2)[:, None]
        hessian, slope = jacobian.T @ weighted, weighted.T @ now
        step = -np.linalg.solve(hessian + damping * (np.diag(np.diag(hessian)) + 1e-12 * np.eye(size)), slope)
        there = residuals(best + step)
        lower = float(rho(there**2).sum())
        if not lower < cost:
            damping *= 10
            continue
        done = cost - lower < 1e-8 * cost
        best, now, cost, damping = best + step, there, lower, damping / 10
        if done:
            break
    return best, cost


def _build(left: Matrix, right: Matrix, ratio: float, p: NDArray[np.float64]) -> Matrix:
    turned = left @ cv2.Rodrigues(p[:3])[0] @ np.diag([1.0, ratio + p[6], 0.0])
    return np.asarray(turned @ cv2.Rodrigues(p[3:6])[0] @ right)


def homogeneous(points: Points) -> NDArray[np.float64]:
    """(N, 2) to (N, 3)."""
    return np.hstack([points, np.ones((len(points), 1))])


def signed_sampson(fundamental: Matrix, first: Points, second: Points) -> NDArray[np.float64]:
    """As `sampson_distance`, with the sign of x'^T F x."""
    x, y = homogeneous(first), homogeneous(second)
    forward, backward = x @ fundamental.T, y @ fundamental  # epipolar lines in the second and in the first frame
    slope = forward[:, 0] ** 2 + forward[:, 1] ** 2 + backward[:, 0] ** 2 + backward[:, 1] ** 2
    return np.asarray((y * forward).sum(1) / np.sqrt(np.maximum(slope, 1e-24)))


def _robust(seed: int) -> cv2.UsacParams:
    params = cv2.UsacParams()
    params.score = cv2.SCORE_METHOD_MAGSAC
    params.sampler = cv2.SAMPLING_UNIFORM
    params.loMethod = cv2.LOCAL_OPTIM_SIGMA
    params.threshold = THRESHOLD
    params.confidence = CONFIDENCE
    params.maxIterations = MOST_TRIALS
    params.randomGeneratorState = seed
    params.isParallel = False
    return params
