"""Numbers of a whole arm: classifier features of its clips, and the kernel distance of both arms to rendered
footage.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vggrpo.errors import UserError
from vggrpo.evaluation.metrics.base import Clip
from vggrpo.evaluation.metrics.quality import KernelComparison, compare_kernel_distance
from vggrpo.evaluation.models import EvaluationModels, as_tensor
from vggrpo.io.manifest import read_manifest
from vggrpo.io.video import read_video

Pair = tuple[str, int]
REFERENCE_SEED = 7_000_000  # rendered clips that no training set and no prompt list uses


def arm_features(
    manifest: Path | str, models: EvaluationModels
) -> tuple[dict[Pair, NDArray[np.float32]], list[tuple[Pair, str]]]:
    """Classifier features (D,) of every clip of a manifest by (prompt, seed), and the clips that couldn't be read
    with the reason.
    """
    models.check(["attributes"])
    found: dict[Pair, NDArray[np.float32]] = {}
    failed: list[tuple[Pair, str]] = []
    for row in read_manifest(manifest):
        try:
            frames, _ = read_video(Path(manifest).parent / row.path)
            found[row.prompt, row.seed] = _features(Clip(frames, row.fps), models)
        except (UserError, ValueError) as error:
            failed.append(((row.prompt, row.seed), str(error)))
    return found, failed


def reference_features(
    count: int, models: EvaluationModels, *, num_frames: int = 17, size: tuple[int, int] = (64, 64)
) -> NDArray[np.float32]:
    """Features (count, D) of rendered clips of the embedded world, in batches so that memory stays flat."""
    from vggrpo.world import sample_batch

    out = []
    for start in range(0, count, 8):
        seeds = range(REFERENCE_SEED + start, REFERENCE_SEED + min(start + 8, count))
        video = sample_batch(list(seeds), num_frames=num_frames, size=size).video  # (b, 3, T, H, W)
        frames = (video.permute(0, 2, 3, 4, 1) * 255).round().clamp(0, 255).byte().numpy()
        out += [_features(Clip(clip, 8.0), models) for clip in frames]
    return np.stack(out)


def compare_quality(
    base_manifest: Path | str,
    tuned_manifest: Path | str,
    models: EvaluationModels | None = None,
    *,
    reference: int | NDArray[np.floating] = 96,
    seed: int = 0,
) -> KernelComparison:
    """Kernel distance of both arms to rendered clips, over the pairs that both arms have.

    Args:
        reference: how many clips to render (in the arms' size and length), or ready-made features (M, D).

    Raises:
        UserError: when the arms share fewer than two readable pairs.
    """
    models = models or EvaluationModels()
    base, _ = arm_features(base_manifest, models)
    tuned, _ = arm_features(tuned_manifest, models)
    shared = [pair for pair in base if pair in tuned]
    if len(shared) < 2:
        raise UserError(
            f"the two manifests share {len(shared)} readable (prompt, seed) pairs; a kernel distance needs two"
        )
    if isinstance(reference, int):
        frames, _ = read_video(_first_readable(base_manifest, shared))
        reference = reference_features(
            reference, models, num_frames=len(frames), size=(frames.shape[1], frames.shape[2])
        )
    base_x, tuned_x = (np.stack([arm[pair] for pair in shared]) for arm in (base, tuned))
    return compare_kernel_distance(base_x, tuned_x, reference, [prompt for prompt, _ in shared], seed=seed)


def _first_readable(manifest: Path | str, pairs: list[Pair]) -> Path:
    wanted = set(pairs)
    return next(Path(manifest).parent / row.path for row in read_manifest(manifest) if (row.prompt, row.seed) in wanted)


def _features(clip: Clip, models: EvaluationModels) -> NDArray[np.float32]:
    video = as_tensor(clip).transpose(1, 2).to(models.device)  # (1, 3, T, H, W)
    with torch.inference_mode():
        return np.asarray(models.attributes.features(video)[0].float().cpu().numpy())
