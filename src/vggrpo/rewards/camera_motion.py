"""Camera motion smoothness, the first reward of VGGRPO (METHOD.md section 2).

With camera centres c_i and rotations R_i:

    v_i = c_{i+1} - c_i     a_i = v_{i+1} - v_i      w_i = log(R_i^T R_{i+1})     al_i = w_{i+1} - w_i
    e_trans = mean_i |a_i| / (|v_i| + |v_{i+1}| + eps)      e_rot = mean_i |al_i| / (|w_i| + |w_{i+1}| + eps)
    r_motion = 1/2 [ 1/(1 + e_trans) + 1/(1 + e_rot) ]

Deviations, both explicit: eps is 1e-3 of the clip's median depth (translation) and 1e-3 rad (rotation), because with
eps = 0 the noise of a still shot or of a pan's centre would decide the reward; and where the views are not equally
spaced in time, v_i and w_i are brought to the mean spacing, so that a dropped frame is not an acceleration. With
equal spacing this is the formula above.

The reward cannot tell a smooth camera from a still one, and hardly a teleport: read it beside `travel` and
`largest_step`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat
from torch import Tensor

from vggrpo.geometry import GeometryPrediction, safe_norm
from vggrpo.rewards.base import Reward, RewardContext, full_precision, judged
from vggrpo.rewards.travel import camera_steps, safe_cameras


def normalised_acceleration(velocity: Float[Tensor, "B T 3"], eps: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """``mean_i |v_{i+1} - v_i| / (|v_i| + |v_{i+1}| + eps)``, in [0, 1]; `velocity` and `eps` share their unit."""
    speed = safe_norm(velocity)
    change = safe_norm(velocity[:, 1:] - velocity[:, :-1])
    return (change / (speed[:, 1:] + speed[:, :-1] + eps[:, None])).mean(1)


@full_precision
def camera_motion_smoothness(
    prediction: GeometryPrediction,
    *,
    context: RewardContext | None = None,
    eps_translation: NonNegativeFloat = 1e-3,
    eps_rotation: NonNegativeFloat = 1e-3,
) -> Reward:
    """``r_motion`` of the predicted camera path.

    Args:
        prediction: geometry of B clips; fewer than 3 views are invalid.
        context: unused; part of every reward's signature.
        eps_translation: in median depths of the clip.
        eps_rotation: in radians.

    Returns:
        The reward in [1/2, 1]; terms `e_trans`, `e_rot` (in [0, 1]), `travel` (median depths + radians), `largest_step`
        (median depths) and `largest_turn` (radians) between neighbouring views.
    """
    del context
    cameras, scale, valid = safe_cameras(prediction)
    if prediction.num_views < 3:
        nothing = torch.zeros_like(scale)
        terms = dict.fromkeys(("e_trans", "e_rot", "travel", "largest_step", "largest_turn"), nothing)
        return judged(nothing, terms, torch.zeros_like(valid))
    steps, turns = camera_steps(cameras)
    assert prediction.frame_index is not None
    spacing = prediction.frame_index.diff().to(steps)
    if not bool((spacing > 0).all()):
        raise ValueError(f"frame_index: expected strictly increasing times, got {prediction.frame_index.tolist()}")
    pace = (spacing.mean() / spacing)[None, :, None]
    e_trans = normalised_acceleration(pace * steps, eps_translation * scale)
    e_rot = normalised_acceleration(pace * turns, torch.full_like(scale, eps_rotation))
    value = 0.5 * (1 / (1 + e_trans) + 1 / (1 + e_rot))
    lengths, angles = safe_norm(steps) / scale[:, None], safe_norm(turns)
    terms = {
        "e_trans": e_trans,
        "e_rot": e_rot,
        "travel": lengths.sum(1) + angles.sum(1),
        "largest_step": lengths.amax(1),
        "largest_turn": angles.amax(1),
    }
    return judged(value, terms, valid)
