"""Cost of `vggrpo evaluate` in CPU seconds: `python benchmarks/evaluate.py [--pairs N] [--video FILE] [--all]`.

CPU seconds rather than a clock, so that a busy machine doesn't matter: N of them are N / 2 seconds on two quiet cores.
The bounds are those of the project's plan: `fast` on 48 pairs of embedded clips (2 x 48 clips of 64x64, 17 frames)
within 3 minutes on two cores, and one real 720p clip of 80 frames within 60 s. With a sample of fewer pairs the bound
shrinks alike.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import cv2
import psutil
import torch

from vggrpo.evaluation import METRICS, Clip, EvaluationModels, evaluate_manifest
from vggrpo.evaluation.metrics import select
from vggrpo.io.manifest import ManifestRow, write_manifest
from vggrpo.io.video import decode_video, write_video
from vggrpo.world import sample_batch

PAIRS, PAIRS_BOUND, REAL_BOUND = 48, 360.0, 120.0  # CPU seconds
REAL_FRAMES = 80


def main() -> None:
    """Time what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of embedded clips (default: %(default)s)")
    parser.add_argument("--video", type=Path, help="a real video; its first 80 frames are measured")
    parser.add_argument("--all", action="store_true", help="time `--metrics all` too")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    groups = ["fast", "all"] if arguments.all else ["fast"]
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            _embedded(Path(folder), arguments.pairs, group)
        if arguments.video:
            clip = Path(folder) / "real.mp4"
            video = decode_video(arguments.video, REAL_FRAMES)
            write_video(clip, video.frames, video.fps)
            for group in groups:
                _real(Path(folder), clip, video.fps, group)
            _by_function(Clip(decode_video(clip).frames, video.fps), groups[-1])


def _embedded(folder: Path, pairs: int, group: str) -> None:
    rows = []
    for index in range(2 * pairs):
        path = folder / f"{index}.mp4"
        if not path.exists():
            batch = sample_batch([index // 2], shake="smooth" if index % 2 else "handheld")
            write_video(path, batch.video[0], batch.fps)
            (folder / f"{index}.txt").write_text(batch.captions[0], encoding="utf-8")
        caption = (folder / f"{index}.txt").read_text(encoding="utf-8")
        rows.append(ManifestRow(path.name, caption, index // 2, 8.0, "base" if index % 2 else "tuned"))
    seconds = _timed(write_manifest(folder / "manifest.jsonl", rows), folder / f"embedded-{group}", group)
    bound = f", bound {PAIRS_BOUND * pairs / PAIRS:.0f}" if group == "fast" else ""
    print(f"{group}: {pairs} pairs of embedded clips: {seconds:.1f} CPU seconds{bound}", flush=True)


def _real(folder: Path, clip: Path, fps: float, group: str) -> None:
    manifest = write_manifest(folder / "real.jsonl", [ManifestRow(clip.name, "a real clip", 0, fps, "real")])
    seconds = _timed(manifest, folder / f"real-{group}", group)
    bound = f", bound {REAL_BOUND:.0f}" if group == "fast" else ""
    peak = psutil.Process().memory_info().rss / 2**20
    print(
        f"{group}: one real clip of {REAL_FRAMES} frames: {seconds:.1f} CPU seconds{bound}; {peak:.0f} MB", flush=True
    )


def _timed(manifest: Path, output: Path, group: str) -> float:
    began = time.process_time()
    evaluate_manifest(manifest, output, group)
    return time.process_time() - began


def _by_function(clip: Clip, group: str) -> None:
    """CPU seconds of each metric function on the real clip, the dearest first."""
    models, spent = EvaluationModels(), {}
    for function in dict.fromkeys(metric.compute for metric in select(group)):
        needs = {need for metric in METRICS.values() if metric.compute is function for need in metric.needs}
        if models.missing(needs):
            continue
        began = time.process_time()
        function(clip, models)
        spent[function.__name__] = time.process_time() - began
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {name}: {seconds:.1f}", flush=True)


if __name__ == "__main__":
    main()
