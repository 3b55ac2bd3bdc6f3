"""`judge_reprojection`: the geometry reward's error e_geo, but of geometry that the judge reads from RGB.

The network is independent (other architecture and seed, never used for training or distillation), the formula is the
reward's, hence the label `reward-related`. It is part of the headline all the same, as fixed before any result was
seen. Known weakness: the judge's own errors set a floor under every value, so compare arms and don't read the number
alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vggrpo.evaluation.metrics.base import Clip, Measurement
from vggrpo.rewards import geometry_reprojection_consistency

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels


def judge_reprojection(clip: Clip, models: EvaluationModels) -> dict[str, Measurement]:
    """Mean depth disagreement of the three worst views in median depths; lower is better."""
    reward = geometry_reprojection_consistency(models.judge_prediction(clip))
    if not bool(reward.valid[0]):
        return {"judge_reprojection": Measurement.invalid("the judge sees no static, confident surface in two views")}
    return {"judge_reprojection": Measurement.of(float(reward.terms["e_geo"][0]))}
