"""Rendered clips with exact truth: the public face of the embedded world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vggrpo.geometry import GeometryPrediction
from vggrpo.world.render import SceneTensors, camera_rays, cast, shade
from vggrpo.world.scene import FPS, Scene, sample_scene


@dataclass
class WorldBatch:
    """B clips of T frames. World frame = camera of frame 0, metres, OpenCV axes.

    `object_id`: 0 room, k object k - 1. `object_pose`: object to world. `moves`: whether an object ever moves.
    """

    video: Float[Tensor, "B 3 T H W"]
    depth: Float[Tensor, "B T H W"]
    cam2world: Float[Tensor, "B T 4 4"]
    intrinsics: Float[Tensor, "B T 3 3"]
    object_id: Int[Tensor, "B T H W"]
    object_pose: Float[Tensor, "B N T 4 4"]
    moves: Bool[Tensor, "B N"]
    frame_index: Int[Tensor, " T"]
    captions: list[str] = field(default_factory=list)
    attributes: list[dict] = field(default_factory=list)
    handheld: list[bool] = field(default_factory=list)
    fps: float = FPS

    @property
    def dynamic_mask(self) -> Bool[Tensor, "B T H W"]:
        """Pixels of objects that move in this clip."""
        room = torch.zeros_like(self.moves[:, :1])
        table = torch.cat([room, self.moves], 1)
        return torch.gather(table, 1, self.object_id.flatten(1).long()).view(self.object_id.shape)

    @property
    def subject_mask(self) -> Bool[Tensor, "B T H W"]:
        """Pixels of objects, which may move, whether they do or not."""
        return self.object_id > 0

    @property
    def points(self) -> Float[Tensor, "B T H W 3"]:
        """World points of every pixel."""
        return GeometryPrediction.from_depth(self.cam2world, self.intrinsics, self.depth).points

    @property
    def scene_flow(self) -> Float[Tensor, "B T H W 3"]:
        """Motion of each pixel's point to the next frame, metres, world frame; zero at the last frame."""
        pose = torch.cat([torch.eye(4).expand_as(self.object_pose[:, :1]).to(self.object_pose), self.object_pose], 1)
        step = pose[:, :, 1:] @ torch.linalg.inv(pose[:, :, :-1])  # (B, N + 1, T - 1, 4, 4)
        still = torch.eye(4).to(step).expand_as(pose[:, :, :1])
        step = torch.cat([step, still], 2).transpose(1, 2)  # (B, T, N + 1, 4, 4)
        b, t, h, w = self.object_id.shape
        index = self.object_id.view(b, t, h * w, 1).long().expand(-1, -1, -1, 16)
        matrix = torch.gather(step.flatten(3), 2, index).view(b, t, h, w, 4, 4)
        points = self.points
        moved = torch.einsum("bthwij,bthwj->bthwi", matrix[..., :3, :3], points) + matrix[..., :3, 3]
        return (moved - points) * (self.object_id > 0)[..., None]

    def views(self, every: int = 4) -> WorldBatch:
        """Frames 0, every, 2 every, ...: the views of a video latent (one RGB frame a latent frame)."""
        keep = slice(None, None, every)
        return WorldBatch(
            self.video[:, :, keep],
            self.depth[:, keep],
            self.cam2world[:, keep],
            self.intrinsics[:, keep],
            self.object_id[:, keep],
            self.object_pose[:, :, keep],
            self.moves,
            self.frame_index[keep],
            self.captions,
            self.attributes,
            self.handheld,
            self.fps,
        )

    def geometry(self, every: int = 4) -> GeometryPrediction:
        """The truth of every `every`-th frame, as a geometry model would predict it; confidence 1."""
        part = self.views(every)
        return GeometryPrediction(
            cam2world=part.cam2world,
            intrinsics=part.intrinsics,
            depth=part.depth,
            points=part.points,
            conf=torch.ones_like(part.depth),
            scene_flow=part.scene_flow,
            dynamic_mask=part.dynamic_mask,
            subject_mask=part.subject_mask,
            frame_index=part.frame_index,
            is_metric=True,
        )


def sample_batch(
    seeds: Sequence[int],
    *,
    num_frames: int = 17,
    size: tuple[int, int] = (64, 64),
    shake: str = "mixed",
    camera: str | None = None,
    split: str | None = None,
    device: torch.device | str = "cpu",
    supersample: int = 2,
) -> WorldBatch:
    """Render one clip a seed.

    Args:
        size: (height, width).
        shake: "smooth", "handheld", "mixed" (40 % hand-held) or "footage" (60 %, twice as shaky).
        camera: force a move of `captions.CAMERA_MOVES` (two joined by "+"), else drawn.
        split: only scenes whose caption belongs to this prompt split ("train", "heldout", "demo").
        supersample: rays a pixel and axis for colour (anti-aliasing); depth is at pixel centres.
    """
    scenes = [sample_scene(int(s), num_frames=num_frames, shake=shake, camera=camera, split=split) for s in seeds]
    return render_scenes(scenes, size=size, device=device, supersample=supersample)


def render_scenes(
    scenes: Sequence[Scene],
    *,
    size: tuple[int, int] = (64, 64),
    device: torch.device | str = "cpu",
    supersample: int = 2,
) -> WorldBatch:
    """Render scenes of one length on `device`; `size` and `supersample` as for `sample_batch`."""
    scene = SceneTensors.stack(list(scenes), device)
    b, num_frames, (height, width) = len(scenes), scene.cam2room.shape[1], size
    hit = cast(scene, *camera_rays(scene, size))
    colour = torch.zeros(*hit.depth.shape, 3, device=device)
    steps = [(i + 0.5) / supersample for i in range(supersample)]
    for dy in steps:
        for dx in steps:
            colour += shade(scene, cast(scene, *camera_rays(scene, size, (dx, dy))))
    colour = (colour / supersample**2).view(b, num_frames, height, width, 3)
    to_world = torch.linalg.inv(scene.cam2room[:, :1])
    intrinsics = torch.eye(3, device=device).repeat(b, num_frames, 1, 1)
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = (scene.focal * width)[:, None]
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = width / 2, height / 2
    grid = (b, num_frames, height, width)
    return WorldBatch(
        colour.permute(0, 4, 1, 2, 3).contiguous(),
        hit.depth.view(grid),
        to_world @ scene.cam2room,
        intrinsics,
        hit.object_id.view(grid),
        to_world[:, None] @ scene.pose,
        scene.moves,
        torch.arange(num_frames, device=device),
        [s.caption for s in scenes],
        [s.attributes for s in scenes],
        [s.handheld for s in scenes],
    )
