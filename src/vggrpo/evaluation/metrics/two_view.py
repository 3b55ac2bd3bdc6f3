"""Two views of one scene: robust fundamental matrices and homographies of matched points, and distances to them.

    sampson(x, x') = |x'^T F x| / sqrt((F x)_1^2 + (F x)_2^2 + (F^T x')_1^2 + (F^T x')_2^2)     (in pixels)

F is found by seeded MAGSAC and then moved downhill on a robust (Cauchy) sum of squared Sampson distances over *all*
matches, with Levenberg-Marquardt over F's seven degrees of freedom. The refinement matters for what F says about the
camera, though it does not bring rotations within half a degree on four pairs of five yet (docs/metrics.md).

Positions are OpenCV's: the centre of the first pixel is (0, 0).
"""

from __future__ import annotations

from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Points: TypeAlias = NDArray[np.float64]  # (N, 2), pixels
Matrix: TypeAlias = NDArray[np.float64]  # (3, 3)

THRESHOLD = 1.0  # px of the working frame: an inlier
CAUCHY = 0.3  # px: where the refinement starts to distrust a match
REFINEMENT_STEPS = 15
FREE_FUNDAMENTAL, FREE_HOMOGRAPHY = 7, 4  # matches that determine the model, and so agree with it by construction


def sampson_distance(fundamental: Matrix, first: Points, second: Points) -> NDArray[np.float64]:
    """First-order distance in pixels of matches `first` <-> `second`, both (N, 2), to the epipolar geometry F: (N,)."""
    return np.abs(_signed_sampson(fundamental, first, second))


def transfer_distance(homography: Matrix, first: Points, second: Points) -> NDArray[np.float64]:
    """Distance in pixels of `second` to the homography's image of `first`, both (N, 2): (N,)."""
    moved = _homogeneous(first) @ homography.T
    depth = np.where(np.abs(moved[:, 2:]) < 1e-12, 1e-12, moved[:, 2:])
    return np.asarray(np.linalg.norm(moved[:, :2] / depth - second, axis=1))


def fit_fundamental(first: Points, second: Points, seed: int = 0) -> Matrix | None:
    """F (3, 3) of matched points (N, 2), or None when no model is found. The same seed gives the same matrix."""
    try:
        matrix, _ = cv2.findFundamentalMat(first, second, _robust(seed))
    except cv2.error:  # OpenCV raises when every sample is degenerate; the pair is then counted as failed
        return None
    if matrix is None or matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        return None
    return refine_fundamental(np.asarray(matrix, dtype=np.float64), first, second)


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
        return _signed_sampson(_build(left, right, sigma[1] / sigma[0], p), a, b) / (CAUCHY * scale)

    best, damping = np.zeros(7), 1e-3
    now = residuals(best)
    cost = float(np.log1p(now**2).sum())
    for _ in range(REFINEMENT_STEPS):
        jacobian = np.stack([(residuals(best + 1e-6 * unit) - now) / 1e-6 for unit in np.eye(7)], 1)  # (N, 7)
        weighted = jacobian / (1.0 + now**2)[:, None]
        hessian, slope = jacobian.T @ weighted, weighted.T @ now
        step = -np.linalg.solve(hessian + damping * (np.diag(np.diag(hessian)) + 1e-12 * np.eye(7)), slope)
        there = residuals(best + step)
        lower = float(np.log1p(there**2).sum())
        if not lower < cost:
            damping *= 10
            continue
        done = cost - lower < 1e-8 * cost
        best, now, cost, damping = best + step, there, lower, damping / 10
        if done:
            break
    return np.asarray(norm.T @ _build(left, right, sigma[1] / sigma[0], best) @ norm)


def relative_pose(
    fundamental: Matrix, first: Points, second: Points, intrinsics: Matrix
) -> tuple[Matrix, NDArray[np.float64]]:
    """Rotation (3, 3) and unit translation (3,) that take first-camera to second-camera coordinates.

    Args:
        fundamental: F of the pair.
        first, second: matched positions (N, 2); they decide which of E's four poses has the scene in front.
        intrinsics: (3, 3) of both frames, in pixels with OpenCV's pixel centres.
    """
    inverse = np.linalg.inv(intrinsics)
    rays = [np.ascontiguousarray((_homogeneous(points) @ inverse.T)[:, :2]) for points in (first, second)]
    essential = intrinsics.T @ fundamental @ intrinsics
    _, rotation, translation, _ = cv2.recoverPose(essential, rays[0], rays[1], np.eye(3))
    return np.asarray(rotation, dtype=np.float64), np.asarray(translation, dtype=np.float64)[:, 0]


def _build(left: Matrix, right: Matrix, ratio: float, p: NDArray[np.float64]) -> Matrix:
    turned = left @ cv2.Rodrigues(p[:3])[0] @ np.diag([1.0, ratio + p[6], 0.0])
    return np.asarray(turned @ cv2.Rodrigues(p[3:6])[0] @ right)


def _homogeneous(points: Points) -> NDArray[np.float64]:
    return np.hstack([points, np.ones((len(points), 1))])


def _signed_sampson(fundamental: Matrix, first: Points, second: Points) -> NDArray[np.float64]:
    x, y = _homogeneous(first), _homogeneous(second)
    forward, backward = x @ fundamental.T, y @ fundamental  # epipolar lines in the second and in the first frame
    slope = forward[:, 0] ** 2 + forward[:, 1] ** 2 + backward[:, 0] ** 2 + backward[:, 1] ** 2
    return np.asarray((y * forward).sum(1) / np.sqrt(np.maximum(slope, 1e-24)))


def _robust(seed: int) -> cv2.UsacParams:
    params = cv2.UsacParams()
    params.score = cv2.SCORE_METHOD_MAGSAC
    params.sampler = cv2.SAMPLING_UNIFORM
    params.loMethod = cv2.LOCAL_OPTIM_SIGMA
    params.threshold = THRESHOLD
    params.confidence = 0.999
    params.maxIterations = 2000
    params.randomGeneratorState = seed
    params.isParallel = False
    return params
