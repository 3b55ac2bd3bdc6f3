"""Rendered clips with exact truth in which an object melts while it moves, or moves rigidly."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch

from vggrpo.geometry import GeometryPrediction
from vggrpo.world.render import SceneTensors, camera_rays, cast
from vggrpo.world.scene import sample_scene


def moving_seeds(count: int, camera: str = "truck_right") -> list[int]:
    """The first scenes whose first object moves."""
    found: list[int] = []
    seed = 0
    while len(found) < count:
        if sample_scene(seed, camera=camera).moves[0]:
            found.append(seed)
        seed += 1
    return found


def melting_geometry(
    seed: int, melt: float, *, size: tuple[int, int] = (64, 64), every: int = 4, camera: str = "truck_right"
) -> GeometryPrediction:
    """The truth of one clip whose objects change their height by the factor 1 - melt from first to last view, while
    their sides grow by as much; melt = 0 is the plain, rigid clip.

    Depth, masks and scene flow are exact: a point of an object keeps its place on the changing object.
    """
    scene = sample_scene(seed, shake="smooth", camera=camera)
    frames = range(0, len(scene.cam2room), every)
    depth, ids, scales = [], [], []
    for number, frame in enumerate(frames):
        share = number / (len(frames) - 1)
        scale = np.array([1 + melt * share, 1 - melt * share, 1 + melt * share])
        part = replace(copy.copy(scene), half_size=scene.half_size * scale, cam2room=scene.cam2room[[frame]],
                       pose=scene.pose[:, [frame]])  # fmt: skip
        tensors = SceneTensors.stack([part])
        hit = cast(tensors, *camera_rays(tensors, size))
        depth.append(hit.depth[0].view(1, *size))
        ids.append(hit.object_id[0].view(1, *size).long())
        scales.append(torch.from_numpy(scale).float())
    cameras = torch.from_numpy(scene.cam2room[list(frames)]).float()[None]
    to_world = torch.linalg.inv(cameras[:, :1])
    poses = to_world[:, None] @ torch.from_numpy(scene.pose[:, list(frames)]).float()[None]  # (1, N, S, 4, 4)
    focal = scene.focal * size[1]
    intrinsics = torch.tensor([[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1]]).expand(
        1, len(frames), 3, 3
    )
    object_id = torch.cat(ids)[None]
    prediction = GeometryPrediction.from_depth(to_world @ cameras, intrinsics, torch.cat(depth)[None])
    flow = torch.zeros_like(prediction.points)
    for view in range(len(frames) - 1):
        for k in range(poses.shape[1]):
            mine = object_id[0, view] == k + 1
            local = (torch.linalg.inv(poses[0, k, view]) @ homogeneous(prediction.points[0, view][mine]).T).T[:, :3]
            grown = local * scales[view + 1] / scales[view]
            after = (poses[0, k, view + 1] @ homogeneous(grown).T).T[:, :3]
            flow[0, view][mine] = after - prediction.points[0, view][mine]
    prediction.scene_flow = flow
    prediction.subject_mask = object_id > 0
    moves = torch.cat([torch.zeros(1, dtype=torch.bool), torch.from_numpy(scene.moves)])
    prediction.dynamic_mask = moves[object_id]
    return prediction


def homogeneous(points: torch.Tensor) -> torch.Tensor:
    return torch.cat([points, torch.ones_like(points[:, :1])], 1)
