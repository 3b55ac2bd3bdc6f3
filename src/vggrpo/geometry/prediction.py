"""`GeometryPrediction`: the contract between whatever predicts geometry and whatever judges it.

Conventions: cameras are OpenCV ``cam2world``, anchored to the first view; intrinsics are in pixels of the maps; depth
    is
z-depth; points and scene flow live in the anchored world frame. Backends convert at their border.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vggrpo.geometry.projection import unproject

Selection = int | slice | Sequence[int] | Tensor


@dataclass
class GeometryPrediction:
    """Geometry of B clips in S views each.

    Attributes:
        cam2world: camera poses, anchored: the first is the identity.
        intrinsics: in pixels of the maps below, pixel centres at +0.5.
        depth: z-depth, positive. In metres if `is_metric`, otherwise in a unit of the clip's own.
        points: world points of all pixels, in the unit of the depth.
        conf: confidence in [0, 1]; 0 = invalid.
        scene_flow: motion of each pixel's point from view i to view i+1 in the world frame; zero in the last view.
        dynamic_mask: True = moving or unknown.
        subject_mask: True = belongs to something that may move.
        frame_index: time of each view in RGB frames, shared by the batch, strictly increasing; default 0, 1, 2, ...
        is_metric: whether the unit is the metre.
    """

    cam2world: Float[Tensor, "B S 4 4"]
    intrinsics: Float[Tensor, "B S 3 3"]
    depth: Float[Tensor, "B S H W"]
    points: Float[Tensor, "B S H W 3"]
    conf: Float[Tensor, "B S H W"]
    scene_flow: Float[Tensor, "B S H W 3"] | None = None
    dynamic_mask: Bool[Tensor, "B S H W"] | None = None
    subject_mask: Bool[Tensor, "B S H W"] | None = None
    frame_index: Int[Tensor, " S"] | None = None
    is_metric: bool = False

    def __post_init__(self) -> None:
        if self.depth.ndim != 4:
            raise ValueError(f"depth: expected shape (B, S, H, W), got {tuple(self.depth.shape)}")
        maps = tuple(self.depth.shape)
        batch, views = maps[:2]
        expected = {
            "cam2world": (batch, views, 4, 4),
            "intrinsics": (batch, views, 3, 3),
            "points": (*maps, 3),
            "conf": maps,
            "scene_flow": (*maps, 3),
            "dynamic_mask": maps,
            "subject_mask": maps,
            "frame_index": (views,),
        }
        if self.frame_index is None:
            self.frame_index = torch.arange(views, device=self.depth.device)
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape} to go with depth, got {tuple(value.shape)}")
        for name in ("dynamic_mask", "subject_mask"):
            value = getattr(self, name)
            if value is not None and value.dtype != torch.bool:
                raise ValueError(f"{name}: expected dtype torch.bool, got {value.dtype}; threshold it where it is made")

    @classmethod
    def from_depth(
        cls,
        cam2world: Float[Tensor, "B S 4 4"],
        intrinsics: Float[Tensor, "B S 3 3"],
        depth: Float[Tensor, "B S H W"],
        conf: Float[Tensor, "B S H W"] | None = None,
        *,
        scene_flow: Float[Tensor, "B S H W 3"] | None = None,
        dynamic_mask: Bool[Tensor, "B S H W"] | None = None,
        subject_mask: Bool[Tensor, "B S H W"] | None = None,
        frame_index: Int[Tensor, " S"] | None = None,
        is_metric: bool = False,
    ) -> GeometryPrediction:
        """A prediction whose points are its depth, unprojected; without `conf` every pixel is fully trusted.

        Points of pixels without a finite depth are NaN, but leave the cameras' gradient alone.
        """
        known = depth.isfinite()
        points = unproject(torch.where(known, depth, torch.zeros_like(depth)), intrinsics, cam2world)
        return cls(
            cam2world=cam2world,
            intrinsics=intrinsics,
            depth=depth,
            points=torch.where(known[..., None], points, torch.full_like(points, torch.nan)),
            conf=torch.ones_like(depth) if conf is None else conf,
            scene_flow=scene_flow,
            dynamic_mask=dynamic_mask,
            subject_mask=subject_mask,
            frame_index=frame_index,
            is_metric=is_metric,
        )

    @property
    def batch_size(self) -> int:
        """Number of clips B."""
        return self.depth.shape[0]

    @property
    def num_views(self) -> int:
        """Number of views S."""
        return self.depth.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the maps, pixels."""
        return self.depth.shape[2], self.depth.shape[3]

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> GeometryPrediction:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{k: function(k, v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GeometryPrediction:
        """The same on another device; `dtype` converts floating point fields and leaves masks and times alone."""
        return self._map(lambda _, v: v.to(device=device, dtype=dtype if v.is_floating_point() else None))

    def detach(self) -> GeometryPrediction:
        """The same, cut off from the graph."""
        return self._map(lambda _, v: v.detach())

    def index(self, clips: Selection) -> GeometryPrediction:
        """A part of the batch; an int keeps the batch axis. `frame_index` is shared and stays."""
        chosen = slice(clips, clips + 1 or None) if isinstance(clips, int) else clips
        return self._map(lambda name, v: v if name == "frame_index" else v[chosen])

    @classmethod
    def cat(cls, parts: Sequence[GeometryPrediction]) -> GeometryPrediction:
        """Parts of one batch, as `index` would give them, joined again."""
        return parts[0]._map(lambda k, v: v if k == "frame_index" else torch.cat([getattr(p, k) for p in parts]))
