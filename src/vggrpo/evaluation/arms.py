"""Numbers of a whole arm: classifier features of its clips, from the videos or from what `evaluate` kept, and the
kernel distance of both arms to rendered footage.
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
from vggrpo.io.manifest import read_jsonl, read_manifest
from vggrpo.io.video import read_video

Pair = tuple[str, int]
REFERENCE_CLIPS = 96
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
    reference: int | NDArray[np.floating] = REFERENCE_CLIPS,
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


def compare_recorded_quality(
    base: Path | str,
    tuned: Path | str,
    models: EvaluationModels | None = None,
    *,
    reference: int = REFERENCE_CLIPS,
    seed: int = 0,
) -> KernelComparison:
    """As `compare_quality`, from the features that `evaluate` kept with `adherence`: the videos aren't needed.

    Args:
        base, tuned: `metrics.jsonl` of `vggrpo evaluate`, or its directory.
        models: carries the classifier that the features come from.
        reference: how many clips to render, in the size and length of the base arm's first clip.

    Raises:
        UserError: when the arms share fewer than two (prompt, seed) pairs with features, or another classifier made
            them.
    """
    models = models or EvaluationModels()
    base_x, shape = _recorded(Path(base), models)
    tuned_x, _ = _recorded(Path(tuned), models)
    shared = [pair for pair in base_x if pair in tuned_x]
    if len(shared) < 2:
        raise UserError(
            f"{len(shared)} pairs have the classifier's features in both arms, and two are needed; it knows captions "
            "of the embedded world only, and `vggrpo evaluate` keeps them with adherence (`--fresh` for older rows)"
        )
    real = reference_features(reference, models, num_frames=shape[0], size=(shape[1], shape[2]))
    x, y = (np.stack([arm[pair] for pair in shared]) for arm in (base_x, tuned_x))
    return compare_kernel_distance(x, y, real, [prompt for prompt, _ in shared], seed=seed)


def _recorded(source: Path, models: EvaluationModels) -> tuple[dict[Pair, NDArray[np.float32]], tuple[int, int, int]]:
    """Features (D,) by (prompt, seed), and frames, height and width of the first clip that has them."""
    details = (source if source.is_dir() else source.parent) / "details.jsonl"
    found: dict[Pair, NDArray[np.float32]] = {}
    shape = (0, 0, 0)
    for row in read_jsonl(details) if details.is_file() else []:
        kept = row.get("raw", {}).get("adherence", {})
        if "features" not in kept:
            continue
        made_by, wanted = row.get("sources", {}).get("adherence"), f"attributes: {models.identity('attributes')}"
        if made_by != wanted:
            raise UserError(f"the features in {details} are of {made_by}, not of {wanted}; name it with --attributes")
        if not found:
            frames, height, width = map(int, kept["shape"])
            shape = (frames, height, width)
        found[str(row["prompt"]), int(row["seed"])] = np.array(kept["features"], dtype=np.float32)
    return found, shape


def _first_readable(manifest: Path | str, pairs: list[Pair]) -> Path:
    wanted = set(pairs)
    return next(Path(manifest).parent / row.path for row in read_manifest(manifest) if (row.prompt, row.seed) in wanted)


def _features(clip: Clip, models: EvaluationModels) -> NDArray[np.float32]:
    video = as_tensor(clip).transpose(1, 2).to(models.device)  # (1, 3, T, H, W)
    with torch.inference_mode():
        return np.asarray(models.attributes.features(video)[0].float().cpu().numpy())
