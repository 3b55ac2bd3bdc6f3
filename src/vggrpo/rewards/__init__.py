"""Rewards: what a clip's predicted geometry says about its consistency. One reward a file, one call signature.

reward(prediction, *, context=None, **options) -> Reward(value (B,), terms {name: (B,)}, valid (B,))
"""

from vggrpo.rewards.base import Reward, RewardContext, RewardFunction
from vggrpo.rewards.camera_motion import camera_motion_smoothness
from vggrpo.rewards.reprojection import geometry_reprojection_consistency
from vggrpo.rewards.travel import camera_motion_hinge, camera_travel

REWARDS: dict[str, RewardFunction] = {
    "camera_motion_smoothness": camera_motion_smoothness,
    "geometry_reprojection_consistency": geometry_reprojection_consistency,
    "camera_motion_hinge": camera_motion_hinge,
}

__all__ = [
    "REWARDS",
    "Reward",
    "RewardContext",
    "RewardFunction",
    "camera_motion_hinge",
    "camera_motion_smoothness",
    "camera_travel",
    "geometry_reprojection_consistency",
]
