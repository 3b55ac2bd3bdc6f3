"""Camera trajectories: TUM (one pose a line) and COLMAP text models.

In memory a pose is always `cam2world` (S, 4, 4) with OpenCV axes (x right, y down, z forward); both formats use the
same axes. What differs is converted here and nowhere else:

| format | pose | quaternion | pixel centre |
|---|---|---|---|
| TUM | cam2world | x y z w | - |
| COLMAP | world2cam | w x y z | +0.5, as here |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write, ensure_directory


def _quaternion_from_matrix(rotation: Float[np.ndarray, "S 3 3"]) -> Float[np.ndarray, "S 4"]:
    """Unit quaternions (w, x, y, z), w >= 0, of rotation matrices.

    The largest eigenvector of Bar-Itzhack's symmetric 4x4 matrix: one formula without the four cases of the usual
    trace method, exact at 180 degrees, and the closest quaternion when the matrix is slightly off a rotation.
    """
    r = np.asarray(rotation, dtype=np.float64)
    k = np.empty((*r.shape[:-2], 4, 4))
    k[..., 0, 0] = r[..., 0, 0] + r[..., 1, 1] + r[..., 2, 2]
    for axis, (row, column) in enumerate(((2, 1), (0, 2), (1, 0)), start=1):
        k[..., 0, axis] = k[..., axis, 0] = r[..., row, column] - r[..., column, row]
    k[..., 1:, 1:] = r + np.swapaxes(r, -1, -2) - k[..., :1, :1] * np.eye(3)
    quaternion = np.linalg.eigh(k)[1][..., :, -1]
    return np.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def _matrix_from_quaternion(quaternion: Float[np.ndarray, "S 4"]) -> Float[np.ndarray, "S 3 3"]:
    """Rotation matrices of quaternions (w, x, y, z); they are normalised first."""
    w, x, y, z = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _check_poses(cam2world: np.ndarray) -> Float[np.ndarray, "S 4 4"]:
    poses = np.asarray(cam2world, dtype=np.float64)
    if poses.ndim != 3 or poses.shape[1:] != (4, 4):
        raise ValueError(f"expected cam2world of shape (S, 4, 4), got {poses.shape}")
    if not np.isfinite(poses).all():
        raise ValueError("cam2world holds NaN or infinite values; it was not written")
    return poses


def _numbers(line: str, where: str, count: int) -> list[float]:
    """The first `count` numbers of a line."""
    words = line.split()
    try:
        values = [float(word) for word in words[:count]]
    except ValueError as error:
        raise UserError(f"{where} is not a row of numbers: {line[:60]!r}") from error
    if len(values) < count or not np.isfinite(values).all():
        raise UserError(f"{where} has {len(values)} finite numbers at most, expected {count}: {line[:60]!r}")
    return values


def _data_lines(file: Path) -> list[tuple[int, str]]:
    """Numbered lines of a text file without comments; empty lines are kept, because COLMAP gives them a meaning."""
    if not file.is_file():
        raise UserError(f"camera file {file} does not exist or is not a file")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"camera file {file} cannot be read as text: {error}") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if not line.lstrip().startswith("#")]


def write_tum(path: Path | str, cam2world: np.ndarray, timestamps: Sequence[float] | None = None) -> Path:
    """Write `timestamp tx ty tz qx qy qz qw` a line (the TUM RGB-D format, read by evo and others).

    Args:
        path: target file.
        cam2world: (S, 4, 4), translations in scene units.
        timestamps: (S,) seconds; the view's index when not given.
    """
    poses = _check_poses(cam2world)
    times = list(range(len(poses))) if timestamps is None else [float(time) for time in timestamps]
    if len(times) != len(poses):
        raise ValueError(f"expected {len(poses)} timestamps, one a pose, got {len(times)}")
    quaternions = np.roll(_quaternion_from_matrix(poses[:, :3, :3]), -1, axis=-1)  # wxyz -> xyzw
    rows = np.concatenate([np.asarray(times)[:, None], poses[:, :3, 3], quaternions], axis=1)
    lines = [" ".join(f"{value:.9g}" for value in row) for row in rows]
    return atomic_write(path, "# timestamp tx ty tz qx qy qz qw\n" + "\n".join(lines) + "\n")


def read_tum(path: Path | str) -> tuple[Float[np.ndarray, "S 4 4"], Float[np.ndarray, " S"]]:
    """Read a TUM trajectory.

    Returns:
        cam2world (S, 4, 4) and timestamps (S,) in seconds.

    Raises:
        UserError: when the file is missing, empty, or a line is not eight numbers with a quaternion of length > 0.
    """
    file = Path(path)
    rows = [_numbers(line, f"{file}:{number}", 8) for number, line in _data_lines(file) if line.strip()]
    if not rows:
        raise UserError(f"camera file {file} holds no pose; expected `timestamp tx ty tz qx qy qz qw` a line")
    values = np.array(rows)
    if (np.linalg.norm(values[:, 4:], axis=1) < 1e-6).any():
        raise UserError(f"camera file {file} holds a quaternion of length zero")
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3, 3] = values[:, 1:4]
    poses[:, :3, :3] = _matrix_from_quaternion(np.roll(values[:, 4:], 1, axis=-1))  # xyzw -> wxyz
    return poses, values[:, 0]


def write_colmap(
    directory: Path | str,
    cam2world: np.ndarray,
    intrinsics: np.ndarray,
    size: tuple[int, int],
    image_names: Sequence[str] | None = None,
) -> Path:
    """Write a COLMAP text model: `cameras.txt` (one PINHOLE a view), `images.txt`, and an empty `points3D.txt`.

    Args:
        directory: created when absent.
        cam2world: (S, 4, 4).
        intrinsics: (S, 3, 3) in pixels, without skew.
        size: (H, W) of the images in pixels.
        image_names: S names; `frame_00000.png`, ... when not given.
    """
    poses = _check_poses(cam2world)
    matrices = np.asarray(intrinsics, dtype=np.float64)
    if matrices.shape != (len(poses), 3, 3):
        raise ValueError(f"expected intrinsics of shape ({len(poses)}, 3, 3), got {matrices.shape}")
    if np.abs(matrices[:, 0, 1]).max(initial=0.0) > 1e-6:
        raise ValueError("COLMAP's PINHOLE camera has no skew, but intrinsics[:, 0, 1] is not zero")
    names = image_names or [f"frame_{index:05d}.png" for index in range(len(poses))]
    if len(names) != len(poses):
        raise ValueError(f"expected {len(poses)} image names, one a pose, got {len(names)}")
    height, width = size
    world2cam = np.linalg.inv(poses)
    quaternions = _quaternion_from_matrix(world2cam[:, :3, :3])
    cameras = ["# CAMERA_ID MODEL WIDTH HEIGHT FX FY CX CY"]
    images = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of 2D points (none)"]
    for index, (k, pose, quaternion) in enumerate(zip(matrices, world2cam, quaternions, strict=True)):
        lens = " ".join(f"{value:.9g}" for value in (k[0, 0], k[1, 1], k[0, 2], k[1, 2]))
        cameras.append(f"{index + 1} PINHOLE {width} {height} {lens}")
        numbers = " ".join(f"{value:.9g}" for value in (*quaternion, *pose[:3, 3]))
        images.extend([f"{index + 1} {numbers} {index + 1} {names[index]}", ""])
    folder = ensure_directory(directory)
    atomic_write(folder / "cameras.txt", "\n".join(cameras) + "\n")
    atomic_write(folder / "images.txt", "\n".join(images) + "\n")
    atomic_write(folder / "points3D.txt", "# POINT3D_ID X Y Z R G B ERROR TRACK[]\n")
    return folder


def read_colmap(directory: Path | str) -> tuple[Float[np.ndarray, "S 4 4"], Float[np.ndarray, "S 3 3"], list[str]]:
    """Read the cameras of a COLMAP text model, sorted by image name.

    Returns:
        cam2world (S, 4, 4), intrinsics (S, 3, 3) in pixels, image names.

    Raises:
        UserError: when a file is missing or malformed, or a camera has lens distortion (undistort first).
    """
    folder = Path(directory)
    lenses = {}
    for number, line in _data_lines(folder / "cameras.txt"):
        if line.strip():
            identifier, matrix = _parse_camera(line, f"{folder / 'cameras.txt'}:{number}")
            lenses[identifier] = matrix
    views = {}
    # Two lines an image: the pose, then its 2D points, which may be an empty line.
    for number, line in _data_lines(folder / "images.txt")[::2]:
        if not line.strip():
            continue
        where = f"{folder / 'images.txt'}:{number}"
        words = line.split(maxsplit=9)
        if len(words) < 10 or words[8] not in lenses:
            raise UserError(f"{where} is not `ID QW QX QY QZ TX TY TZ CAMERA NAME` with a camera of cameras.txt")
        values = _numbers(line, where, 8)
        world2cam = np.eye(4)
        world2cam[:3, :3] = _matrix_from_quaternion(np.array(values[1:5]))
        world2cam[:3, 3] = values[5:8]
        views[words[9]] = (np.linalg.inv(world2cam), lenses[words[8]])
    if not views:
        raise UserError(f"{folder / 'images.txt'} holds no image")
    names = sorted(views)
    return np.stack([views[name][0] for name in names]), np.stack([views[name][1] for name in names]), names


def _parse_camera(line: str, where: str) -> tuple[str, np.ndarray]:
    """Identifier and 3x3 matrix of one line of `cameras.txt`."""
    words = line.split()
    counts = {"PINHOLE": 4, "SIMPLE_PINHOLE": 3}
    if len(words) < 4 or words[1] not in counts:
        model = words[1] if len(words) > 1 else line
        raise UserError(f"{where}: camera model {model!r} is not PINHOLE or SIMPLE_PINHOLE; undistort the images first")
    values = _numbers(" ".join(words[4:]), where, counts[words[1]])
    fx, fy, cx, cy = values if words[1] == "PINHOLE" else [values[0], *values]
    return words[0], np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
