"""What every metric takes and gives: a `Clip` goes in, named `Measurement`s come out.

A metric never invents a number: what can't be computed is a `Measurement` with `valid=False` and a reason that a
person can act on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels

Independence = Literal["reward", "reward-related", "independent"]
Cost = Literal["fast", "slow"]
Role = Literal["score", "guard"]


@dataclass(frozen=True)
class Clip:
    """One video with what its manifest says about it.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        fps: frames per second, so that every gap is a time and not a number of frames.
        prompt: the text the clip was made from; empty when unknown.
        seed: the seed it was made with.
        truth: the renderer's arrays of a rendered clip (`vggrpo world sample`), where there are any.
        note: what was done to the file's frames before they were measured; empty when nothing was.
    """

    frames: NDArray[np.uint8]
    fps: float
    prompt: str = ""
    seed: int = 0
    truth: Path | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames must be (T, H, W, 3) uint8, got {self.frames.shape} {self.frames.dtype}")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be positive, got {self.fps}")

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    @property
    def seconds(self) -> float:
        """Time between the first and the last frame."""
        return (self.num_frames - 1) / self.fps

    @cached_property
    def grey(self) -> NDArray[np.uint8]:
        """(T, H, W) uint8 luma at the clip's own size."""
        return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in self.frames])

    def grey_at(self, index: int, shortest: int, longest: int) -> NDArray[np.uint8]:
        """Frame `index` in grey with its short side brought into [`shortest`, `longest`] pixels.

        Feature detectors and patch-based flow see nothing in a 64 x 64 frame and waste time on a 4K one.
        """
        frame = self.grey[index]
        side = min(frame.shape)
        target = min(max(side, shortest), longest)
        if target == side:
            return frame
        scale = target / side
        size = (round(frame.shape[1] * scale), round(frame.shape[0] * scale))
        interpolation = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
        return np.asarray(cv2.resize(frame, size, interpolation=interpolation), dtype=np.uint8)


@dataclass(frozen=True)
class Measurement:
    """A number with its validity; `raw` keeps the per-pair or per-frame values it was made from."""

    value: float | None
    reason: str | None = None
    raw: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        return self.reason is None

    @classmethod
    def of(cls, value: float, **raw: Sequence[float]) -> Measurement:
        """A valid measurement; a number that isn't finite becomes an invalid one instead."""
        if not math.isfinite(value):
            return cls(None, f"the result is not finite ({value})", raw)
        return cls(float(value), None, raw)

    @classmethod
    def invalid(cls, reason: str, **raw: Sequence[float]) -> Measurement:
        return cls(None, reason, raw)


MetricFunction = Callable[[Clip, "EvaluationModels"], dict[str, Measurement]]


@dataclass(frozen=True)
class Metric:
    """A registered metric: how to compute it and how to read it.

    Args:
        name: key in `metrics.jsonl`.
        unit: unit of the value ("1" for a pure number).
        higher_is_better: direction.
        independence: `reward` (what training optimised), `reward-related` (same formula or a relative of it),
            `independent`.
        cost: `fast` metrics need seconds a clip on one core and nothing but this package; `slow` ones are measured when
            asked for by name or as part of `all`.
        role: a `guard` is shown beside the scores to expose how they can be cheated; it makes no claim itself.
        compute: function that returns this metric, maybe with siblings made from the same work.
        about: one sentence for the report.
        needs: what it can't do without, by the names of `EvaluationModels` (`judge`, `sfm`, ...).
    """

    name: str
    unit: str
    higher_is_better: bool
    independence: Independence
    cost: Cost
    role: Role
    compute: MetricFunction
    about: str
    needs: tuple[str, ...] = ()


def frame_pairs(num_frames: int, fps: float, gap: float, step: float, most: int) -> list[tuple[int, int]]:
    """Index pairs (i, j) that lie `gap` seconds apart, starting every `step` seconds, at most `most` of them, evenly
    spread.

    Gaps are times, so that a clip at 8 fps and the same clip at 24 fps are asked the same question.
    """
    span = max(1, round(gap * fps))
    stride = max(1, round(step * fps))
    starts = list(range(0, num_frames - span, stride))
    if len(starts) > most:
        starts = [starts[i] for i in np.linspace(0, len(starts) - 1, most).round().astype(int)]
    return [(start, start + span) for start in starts]
