"""Rendered clips on disk: shards of safetensors that all recipes share.

A shard holds `video` (N, 3, T, H, W) uint8 and the truth of every frame: `depth` (float16), `cam2world`, `intrinsics`,
`object_id`, `object_pose`, `moves`; captions and attributes travel in the header. Shards are made from consecutive
seeds, so a shard's number says which clips it holds, and a killed run goes on with the next one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vggrpo.world import WorldBatch, sample_batch

SHARD_SIZE = 256
HELDOUT_SEED = 10_000_000  # clips from here on are never trained on
_TRUTH = ("depth", "cam2world", "intrinsics", "object_id", "object_pose", "moves", "frame_index")


def shard_path(folder: Path, number: int) -> Path:
    """File of one shard."""
    return folder / f"{number:05d}.safetensors"


def render_shard(
    folder: Path, number: int, *, split: str | None = "train", first_seed: int = 0, batch: int = 16
) -> Path:
    """Render clips `first_seed + number * SHARD_SIZE ...` unless the file is there; written aside, then renamed."""
    path = shard_path(folder, number)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    start = first_seed + number * SHARD_SIZE
    parts: dict[str, list[Tensor]] = {}
    texts: list[dict] = []
    for low in range(start, start + SHARD_SIZE, batch):
        world = sample_batch(range(low, min(low + batch, start + SHARD_SIZE)), split=split)
        parts.setdefault("video", []).append((world.video * 255).round().to(torch.uint8))
        parts.setdefault("depth", []).append(world.depth.half())  # to 5e-4: half a gigabyte less a thousand clips
        for name in _TRUTH[1:-1]:
            parts.setdefault(name, []).append(getattr(world, name))
        texts += [
            {"caption": c, "attributes": a, "handheld": h}
            for c, a, h in zip(world.captions, world.attributes, world.handheld, strict=True)
        ]
    tensors = {name: torch.cat(rows) for name, rows in parts.items()} | {"frame_index": world.frame_index.contiguous()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"texts": json.dumps(texts)})
    temporary.replace(path)
    return path


@dataclass
class Shards:
    """All clips of some shards in memory (uint8 video, float truth)."""

    tensors: dict[str, Tensor]
    texts: list[dict]

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def load(cls, paths: Sequence[Path], video: bool = True, truth: bool = True) -> Shards:
        columns: dict[str, list[Tensor]] = {}
        texts: list[dict] = []
        for path in paths:
            with safe_open(path, "pt") as file:
                texts += json.loads(file.metadata()["texts"])
                for name in (("video",) if video else ()) + (_TRUTH if truth else ()):
                    columns.setdefault(name, []).append(file.get_tensor(name))
        tensors = {k: (v[0] if k == "frame_index" else torch.cat(v)) for k, v in columns.items()}
        return cls(tensors, texts)

    def video(self, index: Tensor) -> Tensor:
        """Frames (B, 3, T, H, W) in [0, 1]."""
        return self.tensors["video"][index].float() / 255

    def world(self, index: Tensor, first: int = 0, every: int = 4, views: int = 5) -> WorldBatch:
        """The clips `index` with their truth: frames `first`, `first + every`, ..., the world anchored at the first."""
        t = self.tensors
        frames = first + every * torch.arange(views)
        to_first = torch.linalg.inv(t["cam2world"][index, first])[:, None]
        return WorldBatch(
            video=t["video"][index][:, :, frames].float() / 255,
            depth=t["depth"][index][:, frames].float(),
            cam2world=to_first @ t["cam2world"][index][:, frames],
            intrinsics=t["intrinsics"][index][:, frames],
            object_id=t["object_id"][index][:, frames],
            object_pose=to_first[:, None] @ t["object_pose"][index][:, :, frames],
            moves=t["moves"][index],
            frame_index=t["frame_index"][frames],
        )


def mirror(world: WorldBatch) -> WorldBatch:
    """The batch as a mirror shows it, left and right exchanged."""
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    return replace(
        world,
        video=world.video.flip(-1),
        depth=world.depth.flip(-1),
        object_id=world.object_id.flip(-1),
        cam2world=flip @ world.cam2world @ flip,
        object_pose=flip @ world.object_pose @ flip,
    )


def augment(world: WorldBatch, generator: torch.Generator) -> WorldBatch:
    """The batch mirrored left to right and played backwards, each with probability one half.

    Both are worlds of the same kind.
    """
    if torch.rand((), generator=generator) < 0.5:
        world = mirror(world)
    if torch.rand((), generator=generator) < 0.5:
        to_last = torch.linalg.inv(world.cam2world[:, -1:])
        world = replace(
            world,
            video=world.video.flip(2),
            depth=world.depth.flip(1),
            object_id=world.object_id.flip(1),
            cam2world=to_last @ world.cam2world.flip(1),
            object_pose=to_last[:, None] @ world.object_pose.flip(2),
        )
    return world
