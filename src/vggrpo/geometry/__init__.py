"""Pure functions on cameras, depth and points, and the `GeometryPrediction` contract."""

from vggrpo.geometry.edges import depth_edges
from vggrpo.geometry.epipolar import (
    epipolar_lines,
    essential_from_cameras,
    fundamental_from_cameras,
    sampson_distance,
)
from vggrpo.geometry.prediction import GeometryPrediction
from vggrpo.geometry.projection import (
    pixel_grid,
    pixel_index,
    pixel_rays,
    point_visibility,
    project,
    unproject,
    zbuffer,
    zbuffer_reference,
)
from vggrpo.geometry.se3 import (
    anchor_cameras,
    hat,
    invert_se3,
    relative_pose,
    rotation_angle,
    safe_norm,
    so3_exp,
    so3_log,
)

__all__ = [
    "GeometryPrediction",
    "anchor_cameras",
    "depth_edges",
    "epipolar_lines",
    "essential_from_cameras",
    "fundamental_from_cameras",
    "hat",
    "invert_se3",
    "pixel_grid",
    "pixel_index",
    "pixel_rays",
    "point_visibility",
    "project",
    "relative_pose",
    "rotation_angle",
    "safe_norm",
    "sampson_distance",
    "so3_exp",
    "so3_log",
    "unproject",
    "zbuffer",
    "zbuffer_reference",
]
