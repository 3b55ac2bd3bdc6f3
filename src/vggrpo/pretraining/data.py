"""Rendered clips on disk: shards of safetensors that all recipes share.

A shard holds `video` (N, 3, T, H, W) uint8 and the truth of every frame: `depth` (float16), `cam2world`, `intrinsics`,
`object_id`, `object_pose`, `moves`; captions and attributes travel in the header. Shards are made from consecutive
seeds, so a shard's number says which clips it holds, and a killed run goes on with the next one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vggrpo.world import WorldBatch
from vggrpo.world.batch import render_scenes
from vggrpo.world.scene import Scene, sample_scene

# Scenes of seeds, in their order: `map`, or that of a pool of processes.
DrawScenes = Callable[[Callable[[int], Scene], Iterable[int]], Iterable[Scene]]
CPU = torch.device("cpu")
MOST_WORKERS = 16
SHARD_SIZE = 256
HELDOUT_SEED = 10_000_000  # clips from here on are never trained on
_TRUTH = ("depth", "cam2world", "intrinsics", "object_id", "object_pose", "moves", "frame_index")


def shard_path(folder: Path, number: int) -> Path:
    """File of one shard."""
    return folder / f"{number:05d}.safetensors"


def at_once(device: torch.device, few: int, many: int) -> int:
    """Clips that are made at once: few on a CPU, many where small work leaves the device waiting."""
    return few if device.type == "cpu" else many


@contextmanager
def scene_drawer(device: torch.device) -> Iterator[DrawScenes]:
    """What draws scenes fast enough for `device`: for a CPU plain `map`; for a GPU, which renders hundreds of clips a
    second where a core draws eighty scenes, a process a core."""
    if device.type == "cpu":
        yield map
        return
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    # Not forked: a process that has a CUDA context must not be.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=4)


def render_shard(
    folder: Path,
    number: int,
    *,
    split: str | None = "train",
    shake: str = "mixed",
    first_seed: int = 0,
    device: torch.device = CPU,
    draw: DrawScenes = map,
) -> Path:
    """Render clips `first_seed + number * SHARD_SIZE ...` unless the file is there; written aside, then renamed.

    Args:
        device: where; the file is the same up to rounding.
        draw: see `scene_drawer`.
    """
    path = shard_path(folder, number)
    if path.exists():
        return path
    start = first_seed + number * SHARD_SIZE
    parts: dict[str, list[Tensor]] = {}
    texts: list[dict] = []
    batch = at_once(device, 16, 64)
    scenes = iter(draw(partial(sample_scene, split=split, shake=shake), range(start, start + SHARD_SIZE)))
    while some := list(islice(scenes, batch)):
        world = render_scenes(some, device=device)
        parts.setdefault("video", []).append((world.video * 255).round().to(torch.uint8).cpu())
        parts.setdefault("depth", []).append(world.depth.half().cpu())  # to 5e-4: half a gigabyte less a thousand clips
        for name in _TRUTH[1:-1]:
            parts.setdefault(name, []).append(getattr(world, name).cpu())
        texts += [
            {"caption": c, "attributes": a, "handheld": h}
            for c, a, h in zip(world.captions, world.attributes, world.handheld, strict=True)
        ]
    tensors = {name: torch.cat(rows) for name, rows in parts.items()} | {"frame_index": world.frame_index.cpu()}
    return write_tensors(path, tensors, {"texts": json.dumps(texts)})


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> Path:
    """Write a safetensors file aside, under a name that no search for shards finds, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata=header)
    temporary.replace(path)
    return path


@dataclass
class Shards:
    """All clips of some shards in memory (uint8 video, float truth).

    Attributes:
        tensors: one column a name; on `device` where they fit there, else in the host's memory.
        device: where batches are made.
    """

    tensors: dict[str, Tensor]
    texts: list[dict]
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def load(cls, paths: Sequence[Path], video: bool = True, truth: bool = True, device: torch.device = CPU) -> Shards:
        """Read shards; `video` and `truth` say which columns are needed."""
        columns: dict[str, list[Tensor]] = {}
        texts: list[dict] = []
        for path in paths:
            with safe_open(path, "pt") as file:
                texts += json.loads(file.metadata()["texts"])
                for name in (("video",) if video else ()) + (_TRUTH if truth else ()):
                    columns.setdefault(name, []).append(file.get_tensor(name))
        store = device if _fit(columns, device) else CPU
        tensors = {}
        for name in list(columns):  # one by one, or all would be in memory twice
            parts = columns.pop(name)
            tensors[name] = (parts[0] if name == "frame_index" else torch.cat(parts)).to(store)
        return cls(tensors, texts, device)

    def _here(self, rows: Tensor) -> Tensor:
        """A batch on `device`: it travels as it is stored, a quarter or half of what is computed with."""
        return rows.to(self.device)

    def video(self, index: Tensor) -> Tensor:
        """Frames (B, 3, T, H, W) in [0, 1]."""
        return self._here(self.tensors["video"][index]).float() / 255

    def world(self, index: Tensor, first: int = 0, every: int = 4, views: int = 5) -> WorldBatch:
        """The clips `index` with their truth: frames `first`, `first + every`, ..., the world anchored at the first."""
        t, here = self.tensors, self._here
        frames = first + every * torch.arange(views)
        to_first = torch.linalg.inv(here(t["cam2world"][index, first]))[:, None]
        return WorldBatch(
            video=here(t["video"][index][:, :, frames]).float() / 255,
            depth=here(t["depth"][index][:, frames]).float(),
            cam2world=to_first @ here(t["cam2world"][index][:, frames]),
            intrinsics=here(t["intrinsics"][index][:, frames]),
            object_id=here(t["object_id"][index][:, frames]),
            object_pose=to_first[:, None] @ here(t["object_pose"][index][:, :, frames]),
            moves=here(t["moves"][index]),
            frame_index=here(t["frame_index"][frames]),
        )


def _fit(columns: dict[str, list[Tensor]], device: torch.device) -> bool:
    """Whether the clips leave half of the device's free memory to the training."""
    if device.type != "cuda":
        return False
    return 2 * sum(part.nbytes for parts in columns.values() for part in parts) < torch.cuda.mem_get_info(device)[0]


def mirror(world: WorldBatch) -> WorldBatch:
    """The batch as a mirror shows it, left and right exchanged."""
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])).to(world.cam2world.device)
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
