"""Structure from motion: can one rigid scene with one moving camera explain the clip?

pycolmap (extra `sfm`) reconstructs frames sampled every quarter of a second from the SIFT matches of `features`:

- `sfm_registered`: share of those frames in the largest reconstruction.
- `sfm_track_length`: mean number of frames that see a reconstructed point, times the share of frames registered: a
  piece of a clip that holds together does not score like a clip that does.
- `sfm_reprojection`: mean reprojection error / diagonal of the working frame, over frames; one that isn't registered
  counts with the largest error that the mapper keeps. Points that stay always fit: of a strong wobble only those of two
  frames do, so that the error tells bent from rigid and the track length how strongly it is bent.
- `sfm_camera_acceleration`, `sfm_camera_largest_step`: the numbers of `camera`, of poses that no network has touched.

A clip that can't be reconstructed has the worst score (0 frames registered, 0 frames a track, the largest error that
the mapper would have kept), it isn't dropped. Three kinds of clip say nothing about consistency, since no baseline or
no point exists to say it with; they are listed apart as invalid, with the reason: a still camera, one that only turns
(a homography explains the matches, and it is a rotation for some focal length), and frames without texture.

All of it is seeded and runs in one thread, so that it repeats. The camera is a pinhole whose focal length is refined
from COLMAP's usual guess. Bounds that COLMAP sets for photographs are loosened for short, small clips (see `_options`).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vggrpo.evaluation.metrics.base import Clip, Measurement
from vggrpo.evaluation.metrics.camera import path_numbers
from vggrpo.evaluation.metrics.features import LONGEST, SHORTEST, Sift, still_below
from vggrpo.evaluation.metrics.two_view import fit_fundamental, fit_homography, sampson_distance, transfer_distance

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels

STEP = 0.25  # seconds between the frames that are reconstructed
MOST_FRAMES = 48  # the first 12 seconds
FARTHEST = 8  # frames that are matched with each other lie at most so many apart
FEWEST_FEATURES = 40  # a median frame with fewer has no texture
FEWEST_MATCHES = 15
FLAT = 0.83  # homography inliers over epipolar inliers, mean over pairs; above it there is no parallax
ROTATION = 1.03  # largest over smallest singular value of a homography that is taken for a rotation
MAX_ERROR = 2.0  # px of the working frame; what is farther off is no observation of a point
MOST_TRIALS = 1000  # of each robust fit to a pair; unrelated frames would use up COLMAP's ten thousand
FIRST_ANGLES = (4.0, 1.5)  # degrees between the rays of the first two frames; the second is tried if frames are left
FOCAL_GUESS = 1.2  # of the longer side, as COLMAP's
NAMES = (
    "sfm_registered",
    "sfm_track_length",
    "sfm_reprojection",
    "sfm_camera_acceleration",
    "sfm_camera_largest_step",
)

Pair = tuple[int, int]


@dataclass(frozen=True)
class _Matches:
    """Keypoints of the sampled frames, and the rows of them that match, by pair of frames."""

    points: list[NDArray[np.float64]]  # (N_i, 2)
    rows: dict[Pair, NDArray[np.uint32]]  # (M, 2)
    size: tuple[int, int]  # (height, width)

    def positions(self, pair: Pair) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        rows = self.rows[pair]
        return self.points[pair[0]][rows[:, 0]], self.points[pair[1]][rows[:, 1]]


def sfm(clip: Clip, models: EvaluationModels | None = None, *, seed: int = 0) -> dict[str, Measurement]:
    """All structure-from-motion metrics of one clip; see the module's docstring."""
    stride = max(1, round(STEP * clip.fps))
    indices = list(range(0, clip.num_frames, stride))[:MOST_FRAMES]
    if len(indices) < 3:
        return _all_invalid(f"the clip lasts {clip.seconds:.2f} s; three frames {STEP} s apart are needed")
    matches = _match(clip, indices)
    apart = _listed_apart(matches, still_below(min(clip.frames.shape[1:3])), seed)
    if apart is not None:
        return _all_invalid(apart)
    best = _reconstruct(matches, seed)
    diagonal = float(np.hypot(*matches.size))
    if best is None:
        return _failed(MAX_ERROR / diagonal)
    registered = sorted(best.reg_image_ids())
    share, error = len(registered) / len(indices), best.compute_mean_reprojection_error()
    tracks = [float(point.track.length()) for point in best.points3D.values()]
    errors = [point.error / diagonal for point in best.points3D.values()]
    out = {
        "sfm_registered": Measurement.of(share, frames=[float((image - 1) * stride) for image in registered]),
        "sfm_track_length": Measurement.of(share * float(np.mean(tracks)), points=tracks),
        "sfm_reprojection": Measurement.of((share * error + (1 - share) * MAX_ERROR) / diagonal, points=errors),
    }
    return out | _camera(best, registered, stride)


def _match(clip: Clip, indices: list[int]) -> _Matches:
    sift = Sift()
    frames = [clip.grey_at(index, SHORTEST, LONGEST) for index in indices]
    features = [sift.detect(frame) for frame in frames]
    rows = {}
    for i in range(len(frames)):
        for j in range(i + 1, min(i + FARTHEST, len(frames) - 1) + 1):
            rows[i, j] = np.stack(sift.match_indices(features[i], features[j]), 1).astype(np.uint32)
    return _Matches([points for points, _ in features], rows, frames[0].shape)


def _listed_apart(matches: _Matches, still: float, seed: int) -> str | None:
    """Why structure from motion has nothing to say about this clip, or None."""
    if np.median([len(points) for points in matches.points]) < FEWEST_FEATURES:
        return f"no texture: a median frame has fewer than {FEWEST_FEATURES} features"
    last = len(matches.points) - 1
    wide = [(i, j) for i, j in matches.rows if j == min(i + FARTHEST, last) and j - i >= min(FARTHEST, last) / 2]
    found = [matches.positions(pair) for pair in wide if len(matches.rows[pair]) >= FEWEST_MATCHES]
    if not found:
        return None  # nothing matches: a failure, not a clip without a baseline
    moves = [float(np.median(np.linalg.norm(b - a, axis=1))) for a, b in found]
    if np.median(moves) < still:
        return "still: the median match moves by no more than noise does"
    fits = [_flatness(a, b, matches.size, seed) for a, b in found]
    if np.mean([flat for flat, _ in fits]) > FLAT and np.median([spread for _, spread in fits]) < ROTATION:
        return "pure rotation: a turning camera, or a scene too far for parallax, explains the matches"
    return None


def _flatness(
    first: NDArray[np.float64], second: NDArray[np.float64], size: tuple[int, int], seed: int
) -> tuple[float, float]:
    """How much of what F explains a homography explains too, and how far that homography is from K R K^-1.

    The latter is the smallest, over focal lengths, of the largest over the smallest singular value of K^-1 H K: 1 for
    a rotation. A pair without a model is no sign of a rotation: (0, inf).
    """
    fundamental, homography = fit_fundamental(first, second, seed), fit_homography(first, second, seed)
    if fundamental is None or homography is None:
        return 0.0, np.inf
    epipolar = np.mean(sampson_distance(fundamental, first, second) <= MAX_ERROR)
    flat = np.mean(transfer_distance(homography, first, second) <= MAX_ERROR)
    spreads = []
    for focal in max(size) * np.geomspace(0.4, 4.0, 25):
        camera = np.array([[focal, 0, size[1] / 2 - 0.5], [0, focal, size[0] / 2 - 0.5], [0, 0, 1.0]])
        singular = np.linalg.svd(np.linalg.inv(camera) @ homography @ camera, compute_uv=False)
        spreads.append(singular[0] / max(singular[2], 1e-12))
    return float(flat / max(epipolar, 1e-9)), float(min(spreads))


def _reconstruct(matches: _Matches, seed: int) -> Any | None:
    """The reconstruction with most frames, or None."""
    import pycolmap

    pycolmap.logging.minloglevel = pycolmap.logging.FATAL  # it writes a page a clip
    pycolmap.set_random_seed(seed)
    best: Any | None = None
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "database.db"
        _write_database(pycolmap, database, matches, seed)
        for first_angle in FIRST_ANGLES:
            output = Path(folder) / f"models-{first_angle}"
            output.mkdir()
            models = pycolmap.incremental_mapping(database, folder, output, _options(pycolmap, first_angle, seed))
            for model in models.values():
                if model.num_points3D() and model.num_reg_images() > (best.num_reg_images() if best else 1):
                    best = model
            if best and best.num_reg_images() == len(matches.points):
                break
    return best


def _write_database(pycolmap: Any, path: Path, matches: _Matches, seed: int) -> None:
    height, width = matches.size
    camera = pycolmap.Camera(
        model="SIMPLE_PINHOLE",
        width=width,
        height=height,
        params=[FOCAL_GUESS * max(width, height), width / 2, height / 2],
        camera_id=1,
    )
    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.max_error, options.ransac.random_seed, options.detect_watermark = MAX_ERROR, seed, False
    options.ransac.max_num_trials = MOST_TRIALS
    with pycolmap.Database.open(path) as database:
        database.write_camera(camera, use_camera_id=True)
        rig = pycolmap.Rig(rig_id=1)
        rig.add_ref_sensor(camera.sensor_id)
        database.write_rig(rig, use_rig_id=True)
        for index, points in enumerate(matches.points):
            image = pycolmap.Image(name=f"{index:05d}", camera_id=1, image_id=index + 1)
            database.write_image(image, use_image_id=True)
            frame = pycolmap.Frame(frame_id=index + 1, rig_id=1)
            frame.add_data_id(image.data_id)
            database.write_frame(frame, use_frame_id=True)
            database.write_keypoints(index + 1, (points + 0.5).astype(np.float32))  # COLMAP: pixel centres at +0.5
        for (i, j), rows in matches.rows.items():
            if len(rows) < FEWEST_MATCHES:
                continue
            a, b = matches.points[i] + 0.5, matches.points[j] + 0.5
            database.write_matches(i + 1, j + 1, rows)
            geometry = pycolmap.estimate_two_view_geometry(camera, a, camera, b, rows, options)
            database.write_two_view_geometry(i + 1, j + 1, geometry)


def _options(pycolmap: Any, first_angle: float, seed: int) -> Any:
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed, options.num_threads, options.extract_colors = seed, 1, False
    options.multiple_models, options.min_model_size = False, 3
    options.structure_less_registration_fallback = False  # it registers melted frames that share no point with others
    options.mapper.random_seed, options.mapper.num_threads = seed, 1
    options.triangulation.random_seed = seed
    # A short clip moves little and a small frame has few points: COLMAP's bounds (16 degrees, 100 and 30 points) are
    # made for photographs from all around.
    options.mapper.init_min_tri_angle = first_angle
    options.mapper.init_min_num_inliers = 30
    options.mapper.init_max_forward_motion = 1.0  # a dolly is nothing but forward motion
    options.mapper.abs_pose_min_num_inliers = 15
    # Tighter than COLMAP's 4 and 12 px, which a frame of 256 px with a melting wall would still pass.
    options.mapper.init_max_error = options.mapper.filter_max_reproj_error = MAX_ERROR
    options.mapper.abs_pose_max_error = 2 * MAX_ERROR
    options.triangulation.merge_max_reproj_error = options.triangulation.complete_max_reproj_error = MAX_ERROR
    return options


def _camera(best: Any, registered: list[int], stride: int) -> dict[str, Measurement]:
    """Smoothness of the reconstructed camera path."""
    names = {"camera_acceleration": "sfm_camera_acceleration", "camera_largest_step": "sfm_camera_largest_step"}
    if len(registered) < 3:
        return {name: Measurement.invalid("fewer than three frames are registered") for name in names.values()}
    poses = np.tile(np.eye(4), (len(registered), 1, 1))
    depths = []
    points = np.array([point.xyz for point in best.points3D.values()])
    for index, image_id in enumerate(registered):
        world2cam = best.image(image_id).cam_from_world()
        rotation = world2cam.rotation.matrix()
        poses[index, :3, :3], poses[index, :3, 3] = rotation.T, -rotation.T @ world2cam.translation
        depths.append(points @ rotation[2] + world2cam.translation[2])
    numbers = path_numbers(poses, float(np.median(depths)), [(i - 1) * stride for i in registered])
    return {name: numbers[source] for source, name in names.items()}


def _failed(worst_error: float) -> dict[str, Measurement]:
    """The worst scores, for a clip that ought to have been reconstructed."""
    nothing = "no two frames could be reconstructed, so there is no camera path"
    return {
        "sfm_registered": Measurement.of(0.0),
        "sfm_track_length": Measurement.of(0.0),
        "sfm_reprojection": Measurement.of(worst_error),
    } | {name: Measurement.invalid(nothing) for name in NAMES[3:]}


def _all_invalid(reason: str) -> dict[str, Measurement]:
    return {name: Measurement.invalid(reason) for name in NAMES}
