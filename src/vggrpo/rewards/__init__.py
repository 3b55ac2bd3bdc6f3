"""Rewards: what a clip's predicted geometry says about its consistency. One reward a file, one call signature.

reward(prediction, *, context=None, **options) -> Reward(value (B,), terms {name: (B,)}, valid (B,))
"""

from vggrpo.rewards.adherence import camera_adherence
from vggrpo.rewards.base import Reward, RewardContext, RewardFunction
from vggrpo.rewards.camera_motion import camera_motion_smoothness
from vggrpo.rewards.presence import subject_presence_hinge, subject_share
from vggrpo.rewards.registry import REWARDS, get_reward
from vggrpo.rewards.reprojection import geometry_reprojection_consistency
from vggrpo.rewards.rigidity import subject_rigidity
from vggrpo.rewards.travel import camera_motion_hinge, camera_travel

__all__ = [
    "REWARDS",
    "Reward",
    "RewardContext",
    "RewardFunction",
    "camera_adherence",
    "camera_motion_hinge",
    "camera_motion_smoothness",
    "camera_travel",
    "geometry_reprojection_consistency",
    "get_reward",
    "subject_presence_hinge",
    "subject_rigidity",
    "subject_share",
]
