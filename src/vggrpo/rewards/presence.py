"""How much of the picture is subjects, and the hinge that keeps them there. (Ours; METHOD.md section 6, trap 8.)

Subjects cost a geometry reward at their outlines, so a consistent world is cheapest without them. `subject_share` is
watched beside the rewards, and `subject_presence_hinge` takes reward away from a clip that shows less of them than the
base model does for the same prompt:

    share = subject pixels / pixels, over all views            r = -max(0, keep - share / base_share)

The floor is relative, as that of `camera_motion_hinge`, because "an empty room" should not be furnished.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.rewards.base import Reward, RewardContext, finite_clips, full_precision, hinge_below_base, judged


@full_precision
def subject_share(prediction: GeometryPrediction) -> Float[Tensor, " B"]:
    """Share of each clip's pixels that the subject mask covers; NaN where the geometry is broken, or the geometry model
    has no such mask."""
    depth = prediction.depth
    if prediction.subject_mask is None:
        return depth.new_full((len(depth),), torch.nan)
    share = prediction.subject_mask.to(depth).flatten(1).mean(1)
    return torch.where(finite_clips(prediction), share, torch.nan)


@full_precision
def subject_presence_hinge(
    prediction: GeometryPrediction, *, context: RewardContext | None = None, keep: float = 1.0, empty: float = 0.005
) -> Reward:
    """Penalty for a clip that shows less of its subjects than the base model's, in [-keep, 0].

    A mask is a decision, so the penalty sends no gradient: it tells samples apart, and guides nothing.

    Args:
        prediction: geometry of B clips, with a subject mask.
        context: carries `base_subjects`.
        keep: share of what the base model shows that costs nothing.
        empty: base share under which a prompt asks for no subject: it never costs.

    Returns:
        The penalty; terms `share`, `base_share`, `share_ratio` (share over base share, 1 for empty scenes).

    Raises:
        UserError: no context, or a geometry model without a subject mask.
    """
    if context is None:
        raise UserError("subject_presence_hinge needs the base model's: pass RewardContext(prompts, base_subjects=...)")
    if prediction.subject_mask is None:
        raise UserError("subject_presence_hinge needs a geometry model with a subject mask; leave the reward out")
    share = subject_share(prediction)
    valid = share.isfinite()
    share = torch.where(valid, share, 0.0)
    base = context.base_subjects_of(share)
    valid = valid & base.isfinite()
    value, ratio = hinge_below_base(share, base, keep, empty)
    return judged(value, {"share": share, "base_share": base, "share_ratio": ratio}, valid)
