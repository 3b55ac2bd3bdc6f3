"""The camera metrics on exact poses: known answers, and the paths of real clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vggrpo.evaluation.metrics.camera import path_numbers
from vggrpo.geometry import so3_exp
from vggrpo.world import sample_batch


def straight(steps: list[float]) -> np.ndarray:
    poses = np.tile(np.eye(4), (len(steps) + 1, 1, 1))
    poses[1:, 2, 3] = np.cumsum(steps)
    return poses


def numbers(poses: np.ndarray, depth: float = 2.0) -> dict[str, float]:
    found = path_numbers(poses, depth, range(0, 4 * len(poses), 4))
    assert all(measurement.valid for measurement in found.values()), found
    return {name.removeprefix("camera_"): float(measurement.value) for name, measurement in found.items()}  # type: ignore[arg-type]


def test_known_answers():
    steady = numbers(straight([0.2] * 5))
    assert steady["acceleration"] == pytest.approx(0, abs=1e-6)
    assert steady["travel"] == pytest.approx(0.5) and steady["largest_step"] == pytest.approx(1)
    back_and_forth = numbers(straight([0.2, -0.2, 0.2, -0.2]))
    assert back_and_forth["acceleration"] == pytest.approx(0.5, abs=0.01)  # translation 1, rotation 0
    teleport = numbers(straight([0.1, 0.1, 2.0, 0.1, 0.1]))
    assert teleport["largest_step"] == pytest.approx(20) and teleport["acceleration"] < 0.5
    assert not path_numbers(straight([0.1]), 1.0, [0, 4])["camera_acceleration"].valid


def test_unit_of_length_and_world_frame_do_not_matter():
    poses = straight([0.1, 0.2, 0.1, 0.3])
    turned = poses.copy()
    turned[:, :3, 3] *= 7
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = so3_exp(torch.tensor([0.3, -0.5, 0.2])).numpy(), [3, -1, 2]
    assert numbers(world @ turned, 14.0) == pytest.approx(numbers(poses, 2.0), abs=1e-6)


def test_rendered_clips_with_exact_truth():
    def mean(shake: str) -> dict[str, float]:
        batch = sample_batch(list(range(4)), size=(16, 16), shake=shake, camera="orbit_left", supersample=1)
        found = [numbers(poses[::4].numpy(), float(depth.median())) for poses, depth in
                 zip(batch.cam2world, batch.depth, strict=True)]  # fmt: skip
        return {name: float(np.mean([f[name] for f in found])) for name in found[0]}

    smooth, shaky = mean("smooth"), mean("handheld")
    assert shaky["acceleration"] > smooth["acceleration"] + 0.05
    assert smooth["travel"] > 0.1 and smooth["largest_step"] < 4


def test_real_camera_paths(shared_dir):
    """RealEstate10K: walks through houses are smooth; the same with noise, a teleport or no motion are told apart."""
    rng = np.random.default_rng(0)
    files = sorted((shared_dir / "data" / "cameras").glob("*.txt"))
    assert len(files) >= 10
    found: dict[str, list[dict[str, float]]] = {"real": [], "shaken": [], "teleport": [], "still": []}
    for file in files:
        rows = np.loadtxt(file, skiprows=1)
        world2cam = np.tile(np.eye(4), (len(rows), 1, 1))
        world2cam[:, :3] = rows[:, 7:].reshape(-1, 3, 4)
        poses = np.linalg.inv(world2cam)
        step = np.median(np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=-1))
        depth = 10 * step  # there is no depth in these files; it only sets the scale of travel
        shaken, teleport = poses.copy(), poses.copy()
        shaken[:, :3, 3] += step * rng.normal(size=(len(poses), 3))
        teleport[len(poses) // 2 :, :3, 3] += 30 * step
        for kind, path in (
            ("real", poses), ("shaken", shaken), ("teleport", teleport), ("still", np.repeat(poses[:1], len(poses), 0)),
        ):  # fmt: skip
            found[kind].append(numbers(path, depth))
    mean = {kind: {n: np.mean([f[n] for f in by]) for n in by[0]} for kind, by in found.items()}
    assert mean["real"]["acceleration"] < 0.6 * mean["shaken"]["acceleration"]
    assert mean["teleport"]["largest_step"] > 5 * mean["real"]["largest_step"]
    assert mean["still"]["travel"] == pytest.approx(0, abs=1e-6) and mean["real"]["travel"] > 0.5
    assert all(a["acceleration"] < b["acceleration"] for a, b in zip(found["real"], found["shaken"], strict=True))
