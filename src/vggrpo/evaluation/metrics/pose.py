"""The camera's motion between two frames, from fundamental matrices and known intrinsics.

With intrinsics K, F has to be K^-T [t]_x R K^-1: five degrees of freedom where F has seven. Each of the refined
matrices of `candidate_fundamentals` is decomposed, its pose is moved downhill on a robust (Geman-McClure) sum of
squared Sampson distances over all matches, and the pose with the smallest sum is the answer: matrices that fit equally
well as long as any focal length goes are told apart by the one that is true. Turning and moving sideways look alike in
a short baseline, so that the sum has several minima; the best pose's rotation is therefore tried with translations all
around as well.
"""

from __future__ import annotations

import cv2
import numpy as np

from vggrpo.evaluation.metrics.two_view import (
    Matrix,
    Points,
    Vector,
    candidate_fundamentals,
    homogeneous,
    minimise,
    signed_sampson,
)

SCALE = 0.3  # px: matches further off hardly pull


def relative_pose(first: Points, second: Points, intrinsics: Matrix, seed: int = 0) -> tuple[Matrix, Vector] | None:
    """Rotation (3, 3) and unit translation (3,) that take first-camera to second-camera coordinates.

    Args:
        first, second: matched positions (N, 2).
        intrinsics: (3, 3) of both frames, in pixels with OpenCV's pixel centres.
        seed: of the robust fits; the same one gives the same pose.

    Returns:
        None when no fundamental matrix is found.
    """
    poses = [
        _refined(decompose(fundamental, first, second, intrinsics), first, second, intrinsics)
        for fundamental in candidate_fundamentals(first, second, seed)
    ]
    if not poses:
        return None
    (rotation, _), _ = min(poses, key=lambda pose: pose[1])
    poses += [_refined((rotation, away), first, second, intrinsics) for away in _all_around()]
    (rotation, translation), _ = min(poses, key=lambda pose: pose[1])
    return rotation, translation * _in_front(rotation, translation, first, second, intrinsics)


def _all_around() -> list[Vector]:
    """Thirteen directions (3,), one of each opposite pair: the sum of squares knows no sign."""
    steps = [np.array(step, dtype=np.float64) - 1 for step in np.ndindex(3, 3, 3)]
    return [step / np.linalg.norm(step) for step in steps if tuple(step) > (0, 0, 0)]


def _in_front(rotation: Matrix, translation: Vector, first: Points, second: Points, intrinsics: Matrix) -> float:
    """1 or -1: the sign of the translation (3,) with which most points lie before the first camera."""
    inverse = np.linalg.inv(intrinsics)
    there, seen = homogeneous(first) @ (rotation @ inverse).T, homogeneous(second) @ inverse.T
    depth = -(np.cross(seen, there) * np.cross(seen, translation)).sum(1)  # of d there + t = d' seen, times seen
    return 1.0 if np.median(np.sign(depth)) >= 0 else -1.0


def decompose(fundamental: Matrix, first: Points, second: Points, intrinsics: Matrix) -> tuple[Matrix, Vector]:
    """Rotation and unit translation of one fundamental matrix: of its four, the pose with the scene in front."""
    inverse = np.linalg.inv(intrinsics)
    rays = [np.ascontiguousarray((homogeneous(points) @ inverse.T)[:, :2]) for points in (first, second)]
    essential = intrinsics.T @ fundamental @ intrinsics
    _, rotation, translation, _ = cv2.recoverPose(essential, rays[0], rays[1], np.eye(3))
    return np.asarray(rotation, dtype=np.float64), np.asarray(translation, dtype=np.float64)[:, 0]


def _refined(
    pose: tuple[Matrix, Vector], first: Points, second: Points, intrinsics: Matrix
) -> tuple[tuple[Matrix, Vector], float]:
    """The pose at the next minimum of the robust sum, and the sum."""
    rotation, translation = pose
    inverse, sideways = np.linalg.inv(intrinsics), np.linalg.svd(translation[None])[2][1:]  # (2, 3)

    def moved(p: Vector) -> tuple[Matrix, Vector]:
        away = translation + p[3:] @ sideways
        return np.asarray(cv2.Rodrigues(p[:3])[0] @ rotation), away / np.linalg.norm(away)

    def residuals(p: Vector) -> Vector:
        turned, (x, y, z) = moved(p)
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        return signed_sampson(inverse.T @ cross @ turned @ inverse, first, second) / SCALE

    best, cost = minimise(residuals, 5, lambda u: u / (1.0 + u), lambda u: 1.0 / (1.0 + u) ** 2)
    return moved(best), cost
