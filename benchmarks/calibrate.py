"""What each metric says about clips whose truth is known: `python benchmarks/calibrate.py [--videos DIR] [--write]`.

Rendered clips of the embedded world, and stretches of real footage where `--videos` has it, as they are and spoilt in
known ways (tests/unit/calibration_clips.py). The tests assert the rankings; this prints the numbers, and `--write` puts
them between the marks in docs/metrics.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from vggrpo.evaluation import Clip, evaluate_clip
from vggrpo.io.atomic import atomic_write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "unit"))
from calibration_clips import REAL, SECONDS, Frames, another, footage, rendered, spoilt  # noqa: E402

# Metric -> digits; those without a network, so that the table doesn't change with the shipped weights.
METRICS = {
    "epipolar_inliers": 2, "epipolar_error": 5, "flow_cycle": 2, "sfm_registered": 2, "sfm_track_length": 1,
    "sfm_reprojection": 5, "epipolar_homography_gap": 2, "epipolar_matches": 0, "epipolar_displacement": 3,
    "motion_flow": 3, "ssim_change": 2, "sharpness": 4, "sfm_camera_acceleration": 2,
}  # fmt: skip
BEGIN, END = "<!-- calibration: begin -->", "<!-- calibration: end -->"


def main() -> None:
    """Measure, print, and write when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, default=ROOT.parent / "shared" / "data" / "videos")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/metrics.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    scenes = [*rendered([1, 2], "truck_right"), *rendered([3], "orbit_left")]
    tables = [
        f"Rendered, {len(scenes)} clips of 64x64, 17 frames at 8 per second:",
        "",
        *table([(s, 8.0) for s in scenes], arguments.jobs),
    ]
    if arguments.videos.is_dir():
        real = [footage(arguments.videos / name, start, SECONDS) for name, start in REAL]
        names = ", ".join(f"{name} from {start:g} s" for name, start in REAL)
        tables += ["", f"Real footage ({names}), {SECONDS:g} s of each at 256 lines:", "", *table(real, arguments.jobs)]
    text = "\n".join(tables)
    print(text)
    if arguments.write:
        page = ROOT / "docs" / "metrics.md"
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        atomic_write(page, before + BEGIN + "\n\n" + text + "\n\n" + END + rest.split(END)[1])


def table(clips: list[tuple[Frames, float]], jobs: int) -> list[str]:
    """Markdown rows: a metric a row, a way to spoil the clip a column."""
    frames = [clip for clip, _ in clips]
    versions = [
        (kind, clip, fps)
        for index, (whole, fps) in enumerate(clips)
        for kind, clip in spoilt(whole, another(frames, index), fps).items()
    ]
    found: dict[str, dict[str, list[float | None]]] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), cv2.setNumThreads, (1,)) as pool:
        for kind, numbers in pool.map(measured, versions):
            for name, value in numbers.items():
                found.setdefault(name, {}).setdefault(kind, []).append(value)
    kinds = list(next(iter(found.values())))
    rows = [["metric", *kinds], ["---"] * (len(kinds) + 1)]
    rows += [[f"`{name}`", *(cell(found[name][kind], digits) for kind in kinds)] for name, digits in METRICS.items()]
    return ["| " + " | ".join(row) + " |" for row in rows]


def measured(version: tuple[str, Frames, float]) -> tuple[str, dict[str, float | None]]:
    """The numbers of one version of one clip, by metric."""
    kind, clip, fps = version
    found = {name: measurement.value for name, measurement in evaluate_clip(Clip(clip, fps), METRICS).items()}
    print(kind, found, file=sys.stderr, flush=True)
    return kind, found


def cell(values: list[float | None], digits: int) -> str:
    """Mean over the clips that have a number, and how many have none."""
    valid = [value for value in values if value is not None]
    if not valid:
        return "undefined"
    without = f" ({len(values) - len(valid)} undefined)" if len(valid) < len(values) else ""
    return f"{np.mean(valid):.{digits}f}{without}"


if __name__ == "__main__":
    main()
