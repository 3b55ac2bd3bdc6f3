"""TUM and COLMAP cameras, PLY points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vggrpo.errors import UserError
from vggrpo.io.cameras import (
    _matrix_from_quaternion,
    _quaternion_from_matrix,
    read_colmap,
    read_tum,
    write_colmap,
    write_tum,
)
from vggrpo.io.points import read_ply, write_ply


def random_poses(seed: int, count: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = _matrix_from_quaternion(rng.normal(size=(count, 4)))
    poses[:, :3, 3] = rng.normal(size=(count, 3)) * 3
    return poses


def test_quaternion_known_answers():
    turn = np.array([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])  # +90 degrees about z
    assert np.allclose(_quaternion_from_matrix(turn), [[np.sqrt(0.5), 0, 0, np.sqrt(0.5)]])
    half_turns = np.stack([np.diag([1.0, -1, -1]), np.diag([-1.0, 1, -1]), np.diag([-1.0, -1, 1])])
    assert np.allclose(_matrix_from_quaternion(_quaternion_from_matrix(half_turns)), half_turns)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 1e-2))
def test_quaternion_round_trip(quaternion):
    matrix = _matrix_from_quaternion(np.array([quaternion]))
    assert np.allclose(matrix @ matrix.transpose(0, 2, 1), np.eye(3), atol=1e-9)
    assert np.linalg.det(matrix)[0] == pytest.approx(1)
    assert np.allclose(_matrix_from_quaternion(_quaternion_from_matrix(matrix)), matrix, atol=1e-9)


def test_tum_round_trip_and_axis_order(tmp_path):
    poses = random_poses(0)
    path = write_tum(tmp_path / "t.txt", poses, timestamps=[0, 0.5, 1, 1.5, 2])
    read, times = read_tum(path)
    assert np.allclose(read, poses, atol=1e-7) and np.allclose(times, [0, 0.5, 1, 1.5, 2])
    pose = np.eye(4)
    pose[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    pose[:3, 3] = [1, 2, 3]
    line = write_tum(tmp_path / "one.txt", pose[None]).read_text().splitlines()[1]
    assert np.allclose([float(word) for word in line.split()], [0, 1, 2, 3, 0, 0, np.sqrt(0.5), np.sqrt(0.5)])


def test_colmap_round_trip_is_world2cam_in_the_file(tmp_path):
    poses = random_poses(1)
    lens = np.tile(np.array([[70.0, 0, 32], [0, 71, 31.5], [0, 0, 1]]), (5, 1, 1))
    folder = write_colmap(tmp_path / "sparse", poses, lens, size=(64, 66))
    read, intrinsics, names = read_colmap(folder)
    assert np.allclose(read, poses, atol=1e-6) and np.allclose(intrinsics, lens)
    assert names[0] == "frame_00000.png"
    assert "1 PINHOLE 66 64 70 71 32 31.5" in (folder / "cameras.txt").read_text()
    first = (folder / "images.txt").read_text().splitlines()[1].split()
    assert np.allclose([float(word) for word in first[5:8]], np.linalg.inv(poses[0])[:3, 3])


def test_colmap_names_with_spaces_and_simple_pinhole(tmp_path):
    (tmp_path / "cameras.txt").write_text("# comment\n4 SIMPLE_PINHOLE 10 8 9 5 4\n")
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 2 4 b c.png\n\n2 1 0 0 0 0 0 1 4 a.png\n1 2 -1 3 4 5\n")
    poses, lens, names = read_colmap(tmp_path)
    assert names == ["a.png", "b c.png"]
    assert np.allclose(poses[:, 2, 3], [-1, -2])
    assert np.allclose(lens[0], [[9, 0, 5], [0, 9, 4], [0, 0, 1]])


def test_bad_camera_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_tum(tmp_path / "absent.txt")
    path = tmp_path / "t.txt"
    for content, message in [
        ("# only\n", "holds no pose"),
        ("0 1 2 3", "expected 8"),
        ("0 1 2 3 a b c d", "not a row of numbers"),
        ("0 1 2 3 0 0 0 0", "length zero"),
        ("0 1 2 nan 0 0 0 1", "expected 8"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_tum(path)
    (tmp_path / "cameras.txt").write_text("1 OPENCV 10 8 9 9 5 4 0 0 0 0\n")
    with pytest.raises(UserError, match="undistort"):
        read_colmap(tmp_path)
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 10 8 9 9 5 4\n")
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 0 9 a.png\n\n")
    with pytest.raises(UserError, match=r"camera of cameras\.txt"):
        read_colmap(tmp_path)


def test_bad_camera_arrays(tmp_path):
    with pytest.raises(ValueError, match=r"\(S, 4, 4\), got \(3, 4\)"):
        write_tum(tmp_path / "t.txt", np.eye(4)[:3])
    with pytest.raises(ValueError, match="NaN"):
        write_tum(tmp_path / "t.txt", np.full((1, 4, 4), np.nan))
    with pytest.raises(ValueError, match="2 timestamps"):
        write_tum(tmp_path / "t.txt", np.tile(np.eye(4), (2, 1, 1)), timestamps=[0])
    with pytest.raises(ValueError, match="skew"):
        write_colmap(tmp_path / "c", np.eye(4)[None], np.ones((1, 3, 3)), (8, 8))


def test_ply_round_trip_drops_non_finite_points(tmp_path):
    points = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    points[2, 1] = np.nan
    colours = np.linspace(0, 1, 18).reshape(6, 3)
    keep = [0, 1, 3, 4, 5]
    read, read_colours = read_ply(write_ply(tmp_path / "p.ply", points, colours))
    assert np.array_equal(read, points[keep])
    assert np.array_equal(read_colours, np.rint(colours[keep] * 255).astype(np.uint8))
    read, read_colours = read_ply(write_ply(tmp_path / "p.ply", points))
    assert np.array_equal(read, points[keep]) and read_colours is None


def test_bad_ply(tmp_path):
    path = write_ply(tmp_path / "p.ply", np.zeros((4, 3)))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="truncated: 43 of 48 bytes"):
        read_ply(path)
    path.write_text("ply\nformat ascii 1.0\nend_header\n")
    with pytest.raises(UserError, match="binary little-endian"):
        read_ply(path)
    with pytest.raises(ValueError, match=r"\(N, 3\), got \(3,\)"):
        write_ply(path, np.zeros(3))
    with pytest.raises(ValueError, match="colours of shape"):
        write_ply(path, np.zeros((4, 3)), np.zeros((3, 3)))
