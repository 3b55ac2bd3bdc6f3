"""Where the clips of an LGM's training come from: folders of videos, manifests, webdataset shards (.tar).

A source that cannot be used (corrupt, too short, portrait in a landscape recipe) raises `UserError` when it is opened;
the cache records why and goes on with the next.
"""

from __future__ import annotations

import glob
import itertools
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.io.manifest import read_manifest
from vggrpo.io.video import read_video

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi")
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        key: names the clip for ever: source and first frame.
        video: frames, None where `latents` come from a generator.
        latents: normalised latents of a generated clip.
        kind: "real" or "generated", for the record.
    """

    key: str
    video: UInt8[Tensor, "3 T H W"] | None = None
    latents: Float[Tensor, "C T1 H1 W1"] | None = None
    kind: str = "real"


@dataclass(frozen=True)
class Source:
    """Something that clips come from. `clips` raises UserError when it cannot be read."""

    name: str
    clips: Callable[[], Iterator[Clip]]


def video_sources(
    path: str,
    *,
    num_frames: int,
    size: tuple[int, int],
    frame_stride: int = 1,
    min_kept: float = 0.5,
    clips_per_video: int = 8,
) -> Iterator[Source]:
    """The videos of a folder (and its sub-folders), a manifest, a tar shard or a glob of any of them, in a fixed order.

    A source is named by its path in the folder, or, of a glob, by its path after the folders that hold no wildcard:
    `scenes/*/video.mp4` gives `a/video.mp4` and `b/video.mp4`. A name comes once. Numbers in braces stand for as many
    paths: `shards-{000..127}.tar`.

    Raises:
        UserError: nothing is there, or one of numbered paths is missing.
    """
    cut = _Cutter(num_frames, size, frame_stride, min_kept, clips_per_video)
    named: set[str] = set()
    for root, base in _roots(path):
        if not root.exists():
            raise UserError(f"clips.videos {root} does not exist; give a folder, a manifest (.jsonl) or .tar shards")
        for source in _sources_of(root, base, cut):
            if source.name not in named:  # `**` finds a folder and the files in it
                named.add(source.name)
                yield source
    if not named:
        raise UserError(f"clips.videos {path} holds no video ({', '.join(SUFFIXES)}, in folders or .tar shards)")


def _roots(path: str) -> list[tuple[Path, Path]]:
    """What `path` names, each with the folder that its videos' names are relative to."""
    if not _is_pattern(path):
        root = Path(path)
        return [(root, root if root.is_dir() else root.parent)]
    base = Path(*itertools.takewhile(lambda part: not _is_pattern(part), Path(path).parts))
    return [
        (Path(found), base)
        for one in _numbered(path)
        for found in (sorted(glob.glob(one, recursive=True)) if glob.has_magic(one) else [one])
    ]


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) or _NUMBERS.search(path) is not None


def _numbered(path: str) -> list[str]:
    """The paths of a pattern with numbers in braces, `{008..010}`: as many digits as its first number has."""
    numbers = _NUMBERS.search(path)
    if numbers is None:
        return [path]
    first, last = numbers.groups()
    rest = _numbered(path[numbers.end() :])
    start = path[: numbers.start()]
    return [f"{start}{n:0{len(first)}}{end}" for n in range(int(first), int(last) + 1) for end in rest]


def _sources_of(root: Path, base: Path, cut: _Cutter) -> Iterator[Source]:
    if root.suffix == ".tar" and not root.is_dir():
        yield from _tar_sources(root, str(root.relative_to(base)), cut)
        return
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    elif root.suffix == ".jsonl":
        files = [root.parent / row.path for row in read_manifest(root)]
    else:
        files = [root]
    for file in files:
        # A manifest may name files that are elsewhere; such a path is a name of its own.
        name = str(file.relative_to(base)) if file.is_relative_to(base) else str(file)
        yield Source(name, _from_file(file, name, cut))


def _from_file(file: Path, name: str, cut: _Cutter) -> Callable[[], Iterator[Clip]]:
    return lambda: cut(file, name)


def _tar_sources(path: Path, shard: str, cut: _Cutter) -> Iterator[Source]:
    """Videos of one shard, by its table of contents; each is copied out when it is its turn.

    Args:
        shard: its name, which the names of its videos begin with.
    """
    try:
        with tarfile.open(path) as archive:
            members = [m.name for m in archive if m.isfile() and m.name.lower().endswith(SUFFIXES)]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is no readable .tar shard ({type(error).__name__}); download it again") from error

    def extracted(member: str) -> Callable[[], Iterator[Clip]]:
        def clips() -> Iterator[Clip]:
            with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as archive:
                # Under a name of our own: a member's name may point anywhere.
                target = Path(folder) / f"video{Path(member).suffix}"
                handle = archive.extractfile(member)
                target.write_bytes(handle.read() if handle is not None else b"")
                yield from cut(target, f"{shard}/{member}")

        return clips

    for member in members:
        yield Source(f"{shard}/{member}", extracted(member))


@dataclass(frozen=True)
class _Cutter:
    """Cuts a video into consecutive clips of one size."""

    num_frames: int
    size: tuple[int, int]
    frame_stride: int
    min_kept: float
    clips_per_video: int

    def __call__(self, file: Path, name: str) -> Iterator[Clip]:
        frames, _ = read_video(file, self.clips_per_video * self.num_frames * self.frame_stride)
        frames = frames[:: self.frame_stride]
        if len(frames) < self.num_frames:
            raise UserError(
                f"{name} has {len(frames)} frames at clips.frame_stride {self.frame_stride}, "
                f"clips.num_frames is {self.num_frames}"
            )
        kept = kept_share(frames.shape[1:3], self.size)
        if kept < self.min_kept:
            raise UserError(
                f"{name} is {frames.shape[2]}x{frames.shape[1]}: cut to {self.size[1]}x{self.size[0]} (width x height) "
                f"only {kept:.0%} of the picture would be left; set clips.height and clips.width to its shape, "
                f"or lower clips.min_kept"
            )
        for start in range(0, len(frames) - self.num_frames + 1, self.num_frames):
            part = [fit_frame(frame, self.size) for frame in frames[start : start + self.num_frames]]
            video = torch.from_numpy(np.stack(part)).permute(3, 0, 1, 2).contiguous()
            yield Clip(f"{name}#{start}", video)


def kept_share(have: tuple[int, int], want: tuple[int, int]) -> float:
    """Share of a picture of shape `have` (height, width) that a cut to the aspect ratio of `want` leaves."""
    ratio = (have[1] / have[0]) / (want[1] / want[0])
    return min(ratio, 1 / ratio)


def fit_frame(frame: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Scale to cover `size` (height, width), then cut out the middle."""
    height, width = size
    scale = max(height / frame.shape[0], width / frame.shape[1])
    new = (max(height, round(frame.shape[0] * scale)), max(width, round(frame.shape[1] * scale)))
    if new != frame.shape[:2]:
        frame = cv2.resize(frame, new[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (new[0] - height) // 2, (new[1] - width) // 2
    return np.ascontiguousarray(frame[top : top + height, left : left + width])
