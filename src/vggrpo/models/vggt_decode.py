"""What VGGT's heads put out, turned into a `GeometryPrediction`: anchored cam2world, z-depth, confidence in [0, 1]."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vggrpo.geometry import GeometryPrediction
from vggrpo.geometry.se3 import anchor_cameras, invert_se3
from vggrpo.models.border import fov_intrinsics, rigid, rotation_from_xyzw

# Channels of the light decoder's dense head.
_INVERSE_DEPTH, _CONF, _FLOW, _DYNAMIC, _SUBJECT = 0, 1, slice(2, 5), 5, 6
LIGHT_CHANNELS = 7
_FLOW_SCALE = 0.1


def light_prediction(
    pose: Float[Tensor, "B S 9"], dense: Float[Tensor, "B S 7 H W"], frame_index: Int[Tensor, " S"], threshold: float
) -> tuple[GeometryPrediction, dict[str, Tensor]]:
    """The light decoder: rotations around the identity, fields of view around one radian, inverse depth.

    Args:
        threshold: probability above which a pixel counts as moving, or as one that may move.
    """
    height, width = dense.shape[-2:]
    translation, quaternion = pose[..., :3], pose[..., 3:7] + pose.new_tensor([0.0, 0.0, 0.0, 1.0])
    fov = 1.0 + 0.5 * torch.tanh(pose[..., 7:9])
    # Near 1 at the start: scenes are scaled so that the first view's median depth is 1.
    depth = 1 / (F.softplus(dense[:, :, _INVERSE_DEPTH] + 0.5413) + 1e-3)
    flow = (_FLOW_SCALE * dense[:, :, _FLOW]).permute(0, 1, 3, 4, 2)
    flow = torch.cat([flow[:, :-1], torch.zeros_like(flow[:, -1:])], 1)
    raw = {
        "conf_logit": dense[:, :, _CONF],
        "dynamic_logit": dense[:, :, _DYNAMIC],
        "subject_logit": dense[:, :, _SUBJECT],
    }
    prediction = GeometryPrediction.from_depth(
        anchor_cameras(invert_se3(rigid(_rotation(quaternion), translation))),
        fov_intrinsics(fov, (height, width)),
        depth,
        conf=torch.sigmoid(raw["conf_logit"]),
        scene_flow=flow,
        dynamic_mask=torch.sigmoid(raw["dynamic_logit"]) > threshold,
        subject_mask=torch.sigmoid(raw["subject_logit"]) > threshold,
        frame_index=frame_index,
    )
    return prediction, raw


def dpt_prediction(
    pose: Float[Tensor, "B S 9"],
    dense: Float[Tensor, "B S 2 H W"],
    frame_index: Int[Tensor, " S"],
    own_points: Float[Tensor, "B S 4 H W"] | None,
) -> tuple[GeometryPrediction, dict[str, Tensor]]:
    """The public decoder: depth `exp(x)`, confidence `c = 1 + exp(y)`, hence `1 - 1/c = sigmoid(y)`.

    Args:
        own_points: output of the head of points, `sign(x) (exp|x| - 1)` in the network's own world, with a confidence
            of its own; None: points are the unprojected depth.
    """
    height, width = dense.shape[-2:]
    cam2world = invert_se3(rigid(rotation_from_xyzw(pose[..., 3:7]), pose[..., :3]))
    logit = dense[:, :, 1] if own_points is None else own_points[:, :, 3]
    prediction = GeometryPrediction.from_depth(
        anchor_cameras(cam2world),
        fov_intrinsics(pose[..., 7:9], (height, width)),
        torch.exp(dense[:, :, 0]),
        conf=torch.sigmoid(logit),
        frame_index=frame_index,
    )
    if own_points is not None:
        points = own_points[:, :, :3].permute(0, 1, 3, 4, 2)
        points = torch.sign(points) * torch.expm1(points.abs())
        anchor = invert_se3(cam2world[:, :1])[:, :, None, None]  # (B, 1, 1, 1, 4, 4)
        points = (anchor[..., :3, :3] @ points[..., None])[..., 0] + anchor[..., :3, 3]
        prediction = replace(prediction, points=points)
    return prediction, {"conf_logit": logit}


def _rotation(quaternion: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 3 3"]:
    # Not `rotation_from_xyzw`: equal but for the last bits, and shipped networks keep their outputs to the bit.
    x, y, z, w = F.normalize(quaternion, dim=-1).unbind(-1)
    entries = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(entries, -1).unflatten(-1, (3, 3))
