"""The geometry reward's error e_geo, but of geometry that a network reads from RGB.

- `judge_reprojection`: by the judge, any geometry backend that training and distillation never used (for Wan: one that
  isn't the LGM's). The network is independent, the formula is the reward's, hence the label `reward-related`. It is
  part of the headline all the same, as fixed before any result was seen.
- `teacher_reprojection`: by the network that the LGM was made from. It shares the reward's blind spots, so its label
  is `reward` and it supports no claim; a judge with the teacher's weights is refused.

Known weakness: the network's own errors set a floor under every value, so compare arms and don't read the number alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vggrpo.evaluation.metrics.base import Clip, Measurement
from vggrpo.rewards import geometry_reprojection_consistency

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels


def judge_reprojection(clip: Clip, models: EvaluationModels) -> dict[str, Measurement]:
    """Mean depth disagreement of the judge's three worst views in median depths; lower is better."""
    return {"judge_reprojection": _error("judge", clip, models)}


def teacher_reprojection(clip: Clip, models: EvaluationModels) -> dict[str, Measurement]:
    """The same by the LGM's teacher."""
    return {"teacher_reprojection": _error("teacher", clip, models)}


def _error(name: str, clip: Clip, models: EvaluationModels) -> Measurement:
    reward = geometry_reprojection_consistency(models.geometry_of(name, clip), per_view=True)
    if not bool(reward.valid[0]):
        return Measurement.invalid(f"the {name} sees no static, confident surface in two views")
    views = reward.terms["e_geo_per_view"][0].tolist()
    return Measurement.of(float(reward.terms["e_geo"][0]), views=views)
