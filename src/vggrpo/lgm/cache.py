"""What an LGM is trained on, computed once: latents by the VAE, the views in RGB, the teacher's geometry of them.

A cache is a directory: `cache.json` says what it was made with, and every shard `clips-HASH.safetensors` has a
`clips-HASH.json` beside it with its checksum, its clips, and the sources that were finished when it was written. A
shard without that file does not exist, so an interrupted cache goes on where it stopped; a shard whose bytes do not
match is made again. Processes share the sources, and each writes shards of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.io.atomic import atomic_write, atomic_write_json, ensure_directory
from vggrpo.lgm.clips import Clip, Source
from vggrpo.models.base import GeometryModel
from vggrpo.models.vae import VAE

logger = logging.getLogger(__name__)
IDENTITY = "cache.json"
_MAPS = ("depth", "conf", "scene_flow", "dynamic_mask", "subject_mask")
_CAMERAS = ("cam2world", "intrinsics")
FIRST_FLOW = "flow_from_first"  # raw output of backends whose flow head follows the points of view 0 (Any4D)
_HALF_MAX = 6e4  # float16 ends at 65504; what lies further away is as good as infinite


@dataclass(frozen=True)
class CacheSettings:
    """How clips become rows.

    Attributes:
        identity: what the cache depends on (VAE, teacher, sizes); a cache with another one is refused.
        view_stride: RGB frames between two views.
        shard_size: clips a shard.
        micro_batch: clips per call of VAE and teacher.
    """

    identity: Mapping[str, Any]
    view_stride: int
    shard_size: int = 32
    micro_batch: int = 4


def build_cache(
    directory: Path,
    sources: Iterable[Source],
    vae: VAE,
    teacher: GeometryModel,
    settings: CacheSettings,
    *,
    max_clips: int,
    processes: Processes | None = None,
) -> None:
    """Add the clips of `sources` that are not there yet, up to `max_clips` in all that share the sources' kind.

    Args:
        sources: in a fixed order; process r takes every `size`-th.
        max_clips: of this call's kind of clips, over all processes.

    Raises:
        UserError: the cache belongs to another VAE, teacher or clip size.
    """
    processes = processes or Processes()
    if processes.is_main:
        claim_cache(directory, settings.identity)
        forget_damaged(directory)
    processes.barrier()
    done, keys = _finished(directory)
    writer = _Writer(directory, vae, teacher, settings)
    budget = -(-max_clips // processes.size)
    for number, source in enumerate(sources):
        if number % processes.size != processes.rank:
            continue
        if budget <= 0:
            break
        if source.name in done:
            budget -= done[source.name]
            continue
        made, whole = 0, False
        try:
            for clip in source.clips():
                if made == budget:
                    break
                made += 1
                if clip.key not in keys:
                    writer.add(clip)
            else:
                whole = True
        except UserError as error:
            logger.warning("passed over: %s", error)
            writer.skipped[source.name] = str(error)
        budget -= made
        if whole:
            writer.done[source.name] = made
    writer.close()
    processes.barrier()


def claim_cache(directory: Path, identity: Mapping[str, Any]) -> None:
    """Write `cache.json`, or check that the one that is there says the same.

    Raises:
        UserError: names what differs.
    """
    path = ensure_directory(directory) / IDENTITY
    wanted = json.loads(json.dumps(dict(identity)))
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged; delete {directory} or name another cache=DIR") from error
        differs = [key for key in wanted if there.get(key, wanted[key]) != wanted[key]]
        if differs:
            key = differs[0]
            raise UserError(
                f"the cache in {directory} was made with another {key} ({_short(there.get(key))} instead of "
                f"{_short(wanted[key])}); set cache=DIR to a new directory, or delete it"
            )
    else:
        atomic_write_json(path, wanted)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "..."


def forget_damaged(directory: Path) -> None:
    """Delete what is left of shards that are missing or whose bytes changed, so that their clips are made again."""
    for row in read_sidecars(directory):
        shard: Path = row["shard"]
        if row["sha256"] is not None and (not shard.is_file() or _sha256(shard) != row["sha256"]):
            logger.warning("%s is missing or damaged; its clips are made again", shard)
            shard.with_suffix(".json").unlink()
            shard.unlink(missing_ok=True)


def source_of(key: str) -> str:
    """The source of a clip: what held-out clips are chosen by."""
    return key.rsplit("#", 1)[0]


def _first_frame(key: str) -> int:
    return int(key.rsplit("#", 1)[1])


def _finished(directory: Path) -> tuple[dict[str, int], set[str]]:
    """Sources all of whose clips are there, with their number, and the keys of all clips."""
    sidecars = read_sidecars(directory)
    keys = {key for row in sidecars for key in [*(clip["key"] for clip in row["clips"]), *row["duplicates"]]}
    there = Counter(source_of(key) for key in keys)
    done = {name: made for row in sidecars for name, made in row["done"].items()}
    return {name: made for name, made in done.items() if there[name] >= made}, keys


class _Writer:
    """Collects clips, encodes them in micro-batches, writes shards."""

    def __init__(self, directory: Path, vae: VAE, teacher: GeometryModel, settings: CacheSettings) -> None:
        self.directory, self.vae, self.teacher, self.settings = directory, vae, teacher, settings
        self.waiting: list[Clip] = []
        self.rows: list[dict[str, Tensor]] = []
        self.clips: list[dict[str, str]] = []
        self.hashes = {clip["hash"] for shard in read_sidecars(directory) for clip in shard["clips"]}
        self.duplicates: dict[str, str] = {}  # hashes by key
        self.done: dict[str, int] = {}
        self.skipped: dict[str, str] = {}

    def add(self, clip: Clip) -> None:
        content = clip.video if clip.video is not None else clip.latents
        assert content is not None
        digest = hashlib.sha256(content.contiguous().numpy().tobytes()).hexdigest()
        if digest in self.hashes:
            self.duplicates[clip.key] = digest
            return
        self.hashes.add(digest)
        self.clips.append({"key": clip.key, "hash": digest, "kind": clip.kind})
        self.waiting.append(clip)
        if len(self.waiting) >= self.settings.micro_batch:
            self._encode()
        if len(self.rows) >= self.settings.shard_size:
            self._write()

    def close(self) -> None:
        """Write what is left."""
        if self.waiting:
            self._encode()
        if self.rows or self.done or self.skipped:
            self._write()

    def _encode(self) -> None:
        self.rows += encode_clips(self.waiting, self.vae, self.teacher, self.settings.view_stride)
        self.waiting = []

    def _write(self) -> None:
        name = hashlib.sha256(json.dumps([self.clips, self.done, self.skipped]).encode()).hexdigest()[:16]
        shard = self.directory / f"clips-{name}.safetensors"
        if self.rows:
            atomic_write(shard, save({k: torch.stack([row[k] for row in self.rows]) for k in self.rows[0]}))
        content = {
            "sha256": _sha256(shard) if self.rows else None, "clips": self.clips, "duplicates": self.duplicates,
            "done": self.done, "skipped": self.skipped,
        }  # fmt: skip
        atomic_write_json(shard.with_suffix(".json"), content)
        self.rows, self.clips, self.duplicates, self.done, self.skipped = [], [], {}, {}, {}


@torch.no_grad()
def encode_clips(clips: Sequence[Clip], vae: VAE, teacher: GeometryModel, view_stride: int) -> list[dict[str, Tensor]]:
    """Rows of the cache: latents (C, T', H', W'), views (S, 3, h, w) uint8, the teacher's geometry of the views."""
    device = next(teacher.parameters()).device  # type: ignore[attr-defined]
    if clips[0].latents is not None:
        latents = torch.stack([clip.latents for clip in clips if clip.latents is not None])
        video = vae.decode(latents.to(device))
    else:
        video = torch.stack([clip.video for clip in clips if clip.video is not None]).to(device).float() / 255
        latents = vae.encode_video(video)
    views = teacher_views(video, teacher, view_stride)
    geometry, raw = teacher.predict(views.float() / 255)
    rows = {"latents": latents.half(), "views": views} | pack_geometry(geometry)
    if FIRST_FLOW in raw:
        rows[FIRST_FLOW] = raw[FIRST_FLOW].half()
    return [{name: value[i].cpu().contiguous() for name, value in rows.items()} for i in range(len(clips))]


def teacher_views(
    video: Float[Tensor, "B 3 T H W"], teacher: GeometryModel, view_stride: int
) -> UInt8[Tensor, "B S 3 h w"]:
    """Every `view_stride`-th frame at the size the geometry model wants."""
    frames = video[:, :, ::view_stride].transpose(1, 2)  # (B, S, 3, H, W)
    size = teacher.image_size_for((video.shape[-2], video.shape[-1]))
    if tuple(frames.shape[-2:]) != tuple(size):
        flat = F.interpolate(frames.flatten(0, 1), size=size, mode="bilinear", antialias=True, align_corners=False)
        frames = flat.unflatten(0, frames.shape[:2])
    return (frames * 255).round().clamp(0, 255).to(torch.uint8)


def pack_geometry(geometry: GeometryPrediction) -> dict[str, Tensor]:
    """Maps in float16, cameras in float32; points are left out, they are depth and camera. A pixel without a finite
    depth gets confidence 0."""
    known = geometry.depth.isfinite() & (geometry.depth > 0)
    fields = {name: getattr(geometry, name) for name in (*_CAMERAS, *_MAPS)}
    fields["depth"] = torch.where(known, geometry.depth, torch.ones_like(geometry.depth)).clamp(max=_HALF_MAX)
    fields["conf"] = torch.where(known, geometry.conf, torch.zeros_like(geometry.conf))
    rows = {name: value for name, value in fields.items() if value is not None}
    return {
        name: value.half() if value.is_floating_point() and name in _MAPS else value for name, value in rows.items()
    }


def read_sidecars(directory: Path) -> list[dict[str, Any]]:
    """What is known of each shard, with its path under "shard"."""
    rows = []
    for sidecar in sorted(directory.glob("clips-*.json")):
        try:
            rows.append(
                json.loads(sidecar.read_text(encoding="utf-8")) | {"shard": sidecar.with_suffix(".safetensors")}
            )
        except ValueError as error:
            raise UserError(f"{sidecar} is damaged; delete it and run again: its clips are made again") from error
    return rows


class CachedClips:
    """The clips of a cache, read when they are asked for. Clips with the content of an earlier one are left out."""

    def __init__(self, directory: Path) -> None:
        self.keys: list[str] = []
        self.kinds: list[str] = []
        self._places: list[tuple[Path, int]] = []
        self._verified: set[Path] = set()
        seen: set[str] = set()
        sidecars = read_sidecars(directory)
        found = [(clip, row["shard"], i) for row in sidecars for i, clip in enumerate(row["clips"])]
        self._sums: dict[Path, str] = {row["shard"]: row["sha256"] for row in sidecars}
        # By content, so that the order does not depend on how many processes wrote the shards.
        for clip, shard, place in sorted(found, key=lambda item: item[0]["hash"]):
            if clip["hash"] in seen:
                continue
            seen.add(clip["hash"])
            self.keys.append(clip["key"])
            self.kinds.append(clip["kind"])
            self._places.append((shard, place))
        # A clip goes by every name that its content was found under.
        hashes = {clip["key"]: clip["hash"] for clip, _, _ in found}
        for row in sidecars:
            if isinstance(row["duplicates"], dict):  # once it was a list of keys alone
                hashes |= row["duplicates"]
        kept = {hashes[key]: key for key in self.keys}
        self._names = {name: kept[digest] for name, digest in hashes.items() if digest in kept}

    def __len__(self) -> int:
        return len(self.keys)

    def first_of(self, sources: Iterable[str], at_most: int) -> list[str]:
        """Keys of the first clips of these sources, in the order of the sources and of the frames in each.

        What else is in the cache does not matter, so a run takes the clips that a cache of its own would hold. A clip
        that is kept under the name of another source has that key.
        """
        there: dict[str, list[str]] = {}
        for name in self._names:
            there.setdefault(source_of(name), []).append(name)
        names: list[str] = []
        for source in sources:
            names += sorted(there.get(source, ()), key=_first_frame)
            if len(names) >= at_most:
                break
        return list(dict.fromkeys(self._names[name] for name in names[:at_most]))

    def split(self, share: float, among: Collection[str]) -> tuple[list[int], list[int]]:
        """Clips to train on and clips held out: whole sources, chosen by their names' hashes; at least one of each.

        Args:
            among: keys of the clips to split; all others are in neither part.

        Raises:
            UserError: they are of fewer than two sources.
        """
        among = frozenset(among)
        ranked = sorted({source_of(key) for key in among}, key=_rank)
        if len(ranked) < 2:
            raise UserError(
                f"there are clips of {len(ranked)} video(s), and one must be held out; give clips.videos more "
                "videos, or see the warnings above for why they were passed over"
            )
        count = min(max(1, sum(_rank(name) < share for name in ranked)), len(ranked) - 1)
        heldout = set(ranked[:count])
        chosen = [i for i, key in enumerate(self.keys) if key in among]
        train = [i for i in chosen if source_of(self.keys[i]) not in heldout]
        return train, [i for i in chosen if source_of(self.keys[i]) in heldout]

    def rows(self, index: Sequence[int], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The named columns (default: all) of some clips, stacked.

        Raises:
            UserError: a shard is damaged.
        """
        parts = []
        for i in index:
            shard, place = self._places[i]
            self._verify(shard)
            with safe_open(shard, "pt") as file:
                columns = file.keys() if names is None else names
                parts.append({name: file.get_slice(name)[place : place + 1][0] for name in columns})
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

    def pairs(self, index: Sequence[int], batch: int, device: Any = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """Latents (B, C, T', H', W') and views (B, S, 3, h, w) in [0, 1], `batch` clips at a time."""
        for low in range(0, len(index), batch):
            rows = self.rows(index[low : low + batch], ("latents", "views"))
            yield rows["latents"].to(device).float(), rows["views"].to(device).float() / 255

    def targets(
        self, index: Sequence[int], batch: int, view_stride: int, device: Any = "cpu"
    ) -> Iterator[tuple[Tensor, GeometryPrediction]]:
        """Latents (B, C, T', H', W') and the teacher's geometry of the same clips, `batch` clips at a time."""
        for low in range(0, len(index), batch):
            rows = self.rows(index[low : low + batch])
            yield rows["latents"].to(device).float(), self.geometry(rows, view_stride, device)

    def geometry(self, rows: Mapping[str, Tensor], view_stride: int, device: Any = "cpu") -> GeometryPrediction:
        """The teacher's prediction from what `rows` gave."""
        values = {k: rows[k].to(device) for k in (*_CAMERAS, *_MAPS) if k in rows}
        values = {k: v.float() if v.is_floating_point() else v for k, v in values.items()}
        frames = torch.arange(values["depth"].shape[1], device=device) * view_stride
        return GeometryPrediction.from_depth(**values, frame_index=frames)

    def _verify(self, shard: Path) -> None:
        if shard in self._verified:
            return
        try:
            with safe_open(shard, "pt") as file:
                file.keys()
            good = _sha256(shard) == self._sums[shard]
        except (OSError, SafetensorError):
            good = False
        if not good:
            raise UserError(f"{shard} is missing or damaged; run `vggrpo train-lgm` again: its clips are made again")
        self._verified.add(shard)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _rank(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
