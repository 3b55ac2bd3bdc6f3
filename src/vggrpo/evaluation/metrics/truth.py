"""`truth_*`: how far a geometry network is from the renderer, on rendered clips only (generated ones have no truth).

The judge answers for the clip; the truth is what `vggrpo world sample` wrote beside the video as `NAME.npz`. Lengths
are compared after one scale for the clip, the median ratio of true to predicted depth:

- `truth_depth`: AbsRel, mean |s d - D| / D.
- `truth_rotation`: mean angle between predicted and true rotation to the first view, degrees.
- `truth_translation`: mean |s c_i - C_i| / length of the true path; undefined for a camera that stays in its place.
- `truth_mask`: intersection over union of predicted and true moving pixels; undefined where nothing moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vggrpo.evaluation.metrics.base import Clip, Measurement
from vggrpo.geometry import rotation_angle

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels

NAMES = ("truth_depth", "truth_rotation", "truth_translation", "truth_mask")
SHORTEST_PATH = 0.01  # median depths


def truth(clip: Clip, models: EvaluationModels) -> dict[str, Measurement]:
    """The judge against the renderer; see the module's docstring."""
    if clip.truth is None or not clip.truth.is_file():
        nothing = "no truth: only rendered clips have an .npz beside them"
        return {name: Measurement.invalid(nothing) for name in NAMES}
    prediction = models.judge_prediction(clip)
    assert prediction.frame_index is not None
    with np.load(clip.truth, allow_pickle=False) as file:
        index = prediction.frame_index.cpu().numpy()
        real = {name: torch.from_numpy(file[name][index]) for name in ("depth", "cam2world", "dynamic_mask")}
    size = prediction.depth.shape[-2:]
    # Nearest: a depth halfway between a ball and the wall behind it belongs to nothing.
    depth = torch.nn.functional.interpolate(real["depth"][None], size=size)[0]
    moving = torch.nn.functional.interpolate(real["dynamic_mask"][None].float(), size=size)[0] > 0.5
    scale = (depth / prediction.depth[0]).median()
    relative = ((scale * prediction.depth[0] - depth).abs() / depth).mean((1, 2))  # (S,)
    return {
        "truth_depth": Measurement.of(float(relative.mean()), views=relative.tolist()),
        **_pose_errors(prediction.cam2world[0], real["cam2world"], scale, depth.median()),
        "truth_mask": _overlap(prediction.dynamic_mask, moving),
    }


def _pose_errors(found: Tensor, real: Tensor, scale: Tensor, median_depth: Tensor) -> dict[str, Measurement]:
    real = torch.linalg.inv(real[:1]) @ real
    angles = torch.rad2deg(rotation_angle(found[1:, :3, :3].mT @ real[1:, :3, :3]))
    centres, wanted = scale * found[1:, :3, 3], real[1:, :3, 3]
    path = (real[1:, :3, 3] - real[:-1, :3, 3]).norm(dim=-1).sum()
    if len(angles) == 0:
        return {name: Measurement.invalid("the clip has one view") for name in NAMES[1:3]}
    errors = (centres - wanted).norm(dim=-1) / path
    still = Measurement.invalid("the camera stays in its place; its path has no length to measure with")
    return {
        "truth_rotation": Measurement.of(float(angles.mean()), views=angles.tolist()),
        "truth_translation": still
        if path < SHORTEST_PATH * median_depth
        else Measurement.of(float(errors.mean()), views=errors.tolist()),
    }


def _overlap(found: Tensor | None, moving: Tensor) -> Measurement:
    if found is None:
        return Measurement.invalid("this geometry network predicts no moving pixels")
    if not bool(moving.any()):
        return Measurement.invalid("nothing moves in this clip")
    mask = found[0].cpu()
    return Measurement.of(float((mask & moving).sum() / (mask | moving).sum()))
