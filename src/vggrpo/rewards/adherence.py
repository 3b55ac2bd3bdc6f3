"""Camera adherence: does the camera go where the prompt sends it? (Ours; METHOD.md section 6b.)

The path of the predicted cameras is summed up as one vector, in the camera's own axes: how far it went right, down and
ahead (median depths), how far it tilted up and panned right (radians),

    m = sum_i ( R_i^T (c_{i+1} - c_i) / median depth,  pitch and yaw of log(R_i^T R_{i+1}) )

For the moves k that the prompt names, with unit directions e_k (`DIRECTIONS`), c = the coefficients of m
along them (least squares) and u = |m - sum_k c_k e_k| what the prompt did not name:

    s_k = c_k / sqrt(c_k^2 + u^2 + still^2)          r = mean_k s_k in (-1, 1)
    a fixed camera:  r = still / sqrt(still^2 + travel^2) in (0, 1]

The named move alone scores near 1, its opposite near -1, standing still 0. How far the camera should go is not asked:
prompts do not say it, and the hinge on travel keeps it going.

A zoom counts as a dolly: generators draw it as one, and the two differ only in parallax.

A prompt that names no move, an orbit without its direction, or moves that cannot be told apart (in and out, or an orbit
beside the truck and the pan that it is made of), is invalid: there is nothing to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction, safe_norm
from vggrpo.io.camera_words import FIXED, ORBIT, camera_moves
from vggrpo.rewards.base import Reward, RewardContext, full_precision, judged
from vggrpo.rewards.travel import camera_steps, safe_cameras

# Move -> what the camera does, in the order (x right, y down, z forward, tilt up, pan right).
DIRECTIONS: dict[str, tuple[float, float, float, float, float]] = {
    "truck_left": (-1, 0, 0, 0, 0),
    "truck_right": (1, 0, 0, 0, 0),
    "pedestal_up": (0, -1, 0, 0, 0),
    "pedestal_down": (0, 1, 0, 0, 0),
    "dolly_in": (0, 0, 1, 0, 0),
    "dolly_out": (0, 0, -1, 0, 0),
    "tilt_up": (0, 0, 0, 1, 0),
    "tilt_down": (0, 0, 0, -1, 0),
    "pan_left": (0, 0, 0, 0, -1),
    "pan_right": (0, 0, 0, 0, 1),
    # Sideways around a point ahead, at about the median depth, and turning back to it.
    "orbit_left": (-1, 0, 0, 0, 1),
    "orbit_right": (1, 0, 0, 0, -1),
}
_ZOOMS = {"zoom_in": "dolly_in", "zoom_out": "dolly_out"}
_DEGENERATE = 0.05  # smallest singular value of the named directions that still tells them apart


def net_motion(cam2world: Float[Tensor, "B S 4 4"], scale: Float[Tensor, " B"]) -> Float[Tensor, "B 5"]:
    """How far the camera went right, down and ahead (in units of `scale`), tilted up and panned right (radians).

    Each step is read in the axes of the camera that makes it, so that an orbit is sideways all along.
    """
    steps, turns = camera_steps(cam2world)
    own = torch.einsum("bsji,bsj->bsi", cam2world[:, :-1, :3, :3], steps) / scale[:, None, None]
    # x right, y down, z ahead: a positive turn about x looks up, about y looks right.
    return torch.cat([own, turns[..., :2]], -1).sum(1)


@full_precision
def camera_adherence(
    prediction: GeometryPrediction, *, context: RewardContext | None = None, still: float = 0.05
) -> Reward:
    """How well the camera's path fits the moves that each clip's prompt names.

    Args:
        prediction: geometry of B clips; fewer than 2 views are invalid.
        context: carries one prompt a clip.
        still: motion (median depths + radians) that counts as none.

    Returns:
        The reward in (-1, 1]; terms `named` (motion along the named directions, median depths and radians), `unnamed`
        (the rest) and `travel`.

    Raises:
        UserError: without one prompt a clip.
    """
    if context is None or len(context.prompts) != prediction.batch_size:
        raise UserError("camera_adherence needs one prompt a clip: pass RewardContext(prompts)")
    cameras, scale, valid = safe_cameras(prediction)
    if prediction.num_views < 2:
        valid = torch.zeros_like(valid)
    motion = net_motion(cameras, scale)
    steps, turns = camera_steps(cameras)
    travel = safe_norm(steps).sum(1) / scale + safe_norm(turns).sum(1)
    rows = [_score(camera_moves(text), motion[b], travel[b], still) for b, text in enumerate(context.prompts)]
    nothing = torch.zeros_like(travel[0]) if len(travel) else travel.sum()
    value, named, unnamed = (
        torch.stack([nothing if row is None else row[i] for row in rows]) if rows else travel for i in range(3)
    )
    known = torch.tensor([row is not None for row in rows], dtype=torch.bool, device=valid.device)
    return judged(value, {"named": named, "unnamed": unnamed, "travel": travel}, valid & known)


def _score(
    moves: Sequence[str], motion: Float[Tensor, " 5"], travel: Float[Tensor, ""], still: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Value, named and unnamed motion of one clip; None when the prompt asks for nothing that can be checked."""
    moves = list(dict.fromkeys(_ZOOMS.get(move, move) for move in moves))
    if moves == [FIXED]:
        return still / (travel.square() + still**2).sqrt(), torch.zeros_like(travel), travel
    if ORBIT in moves:
        return None
    directions = motion.new_tensor([DIRECTIONS[move] for move in moves]).reshape(-1, motion.numel())
    directions = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)  # (K, 5)
    if len(moves) == 0 or torch.linalg.svdvals(directions.double()).min() < _DEGENERATE or len(moves) > 5:
        return None
    gram = directions @ directions.T
    along = torch.linalg.solve(gram, directions @ motion)  # (K,)
    rest = motion - along @ directions
    shares = along / (along.square() + rest.square().sum() + still**2).sqrt()
    return shares.mean(), safe_norm(along), safe_norm(rest)
