"""`vggrpo world`: rendered clips with exact truth, and the recipes of the shipped models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggrpo.assets import NAMES
from vggrpo.commands.arguments import GO_ON, START_AGAIN, Subparsers, add_device, at_least, image_size, seed

if TYPE_CHECKING:
    from vggrpo.io.manifest import ManifestRow
    from vggrpo.world import WorldBatch

# Clips are rendered a few at a time, so that memory does not grow with --count.
_BATCH = 8


def add_parser(subparsers: Subparsers) -> None:
    """Add `world` with its subcommands."""
    parser = subparsers.add_parser("world", help="the embedded 4D world: rendered clips with exact truth")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_sample(actions)
    _add_pretrain(actions)


def _add_sample(actions: Subparsers) -> None:
    sample = actions.add_parser(
        "sample",
        help="render clips: video, caption, depth, cameras, scene flow, masks",
        description="Render clips of the embedded world. A clip is a function of its seed: the n-th has seed SEED + n.",
    )
    sample.add_argument("--output", type=Path, required=True, help="new directory for the clips and manifest.jsonl")
    sample.add_argument("--count", type=at_least(1), default=8, help="clips (default: %(default)s)")
    sample.add_argument("--seed", type=seed, default=0, help="first seed (default: %(default)s)")
    sample.add_argument("--frames", type=at_least(2), default=17, help="frames a clip (default: %(default)s)")
    sample.add_argument(
        "--size", type=image_size, default=(64, 64), metavar="N|HxW", help="pixels, 64 or 48x96 (default: 64)"
    )
    sample.add_argument("--shake", choices=("mixed", "smooth", "handheld", "footage"), default="mixed",
                        help="how steady; footage: as the generator saw it last (default: %(default)s)")  # fmt: skip
    sample.add_argument("--camera", default=None, metavar="MOVE", help="one camera move for all clips (default: drawn)")
    sample.set_defaults(run=run_sample, resume=START_AGAIN)


def _add_pretrain(actions: Subparsers) -> None:
    pretrain = actions.add_parser(
        "pretrain",
        help="train one of the shipped models again",
        description="Run the recipe of one shipped model; the same command goes on from its last checkpoint.",
    )
    pretrain.add_argument("model", choices=NAMES, help="which one")
    pretrain.add_argument("--output", type=Path, default=Path("runs/pretrain"), help="directory (default: %(default)s)")
    pretrain.add_argument("--steps", type=at_least(1), default=None, help="optimizer steps (default: the recipe's)")
    pretrain.add_argument(
        "--start", default=None, metavar="DIR", help='go on from the models in DIR, or from the "shipped" ones'
    )
    add_device(pretrain)
    pretrain.add_argument(
        "--batch-scale", type=at_least(1, most=1024), default=1, metavar="K", help="K times the recipe's clips a step"
    )
    pretrain.set_defaults(run=run_pretrain, resume=GO_ON)


def run_pretrain(arguments: argparse.Namespace) -> None:
    """Train one shipped model."""
    from vggrpo import assets
    from vggrpo.pretraining import pretrain

    start = assets.path(arguments.model).parent if arguments.start == "shipped" else arguments.start
    pretrain(
        arguments.model,
        arguments.output,
        steps=arguments.steps,
        start=start,
        device=arguments.device,
        batch_scale=arguments.batch_scale,
    )


def run_sample(arguments: argparse.Namespace) -> None:
    """Render, write, and say where it is."""
    from vggrpo.errors import UserError
    from vggrpo.io.atomic import ensure_directory
    from vggrpo.io.manifest import write_manifest
    from vggrpo.world import CAMERA_MOVES, sample_batch

    _check_camera(arguments.camera, tuple(CAMERA_MOVES))
    manifest = arguments.output / "manifest.jsonl"
    if manifest.exists():
        raise UserError(f"{manifest} exists already; name another --output or remove that directory")
    ensure_directory(arguments.output)
    rows: list[ManifestRow] = []
    last = arguments.seed + arguments.count
    for start in range(arguments.seed, last, _BATCH):
        seeds = list(range(start, min(start + _BATCH, last)))
        batch = sample_batch(
            seeds, num_frames=arguments.frames, size=arguments.size, shake=arguments.shake, camera=arguments.camera
        )
        rows += [_write_clip(arguments.output, batch, index, seed) for index, seed in enumerate(seeds)]
    # Last: a manifest means that all its clips are there.
    write_manifest(manifest, rows)
    print(f"{len(rows)} clips in {arguments.output}, listed in {manifest}")


def _check_camera(camera: str | None, moves: tuple[str, ...]) -> None:
    from vggrpo.errors import UserError

    unknown = [move for move in (camera or moves[0]).split("+") if move not in moves]
    if unknown:
        raise UserError(f"camera move {unknown[0]!r} is not known; use one of {', '.join(moves)}, or two joined by '+'")


def _write_clip(folder: Path, batch: WorldBatch, index: int, seed: int) -> ManifestRow:
    """Write clip `index` of a batch as MP4, NPZ (truth) and TUM trajectory; return its manifest row."""
    import numpy as np

    from vggrpo.io.atomic import atomic_path
    from vggrpo.io.cameras import write_tum
    from vggrpo.io.manifest import ManifestRow
    from vggrpo.io.video import write_video

    name = f"clip_{seed:06d}"
    caption, dynamic = batch.captions[index], bool(batch.dynamic_mask[index].any())
    write_video(folder / f"{name}.mp4", batch.video[index], fps=batch.fps)
    cam2world = batch.cam2world[index].cpu().numpy()
    times = [frame / batch.fps for frame in batch.frame_index.tolist()]
    write_tum(folder / f"{name}.tum.txt", cam2world, timestamps=times)
    truth: dict[str, Any] = {
        key: getattr(batch, key)[index].cpu().numpy()
        for key in ("depth", "cam2world", "intrinsics", "scene_flow", "dynamic_mask", "subject_mask")
    }
    truth["frame_index"] = batch.frame_index.cpu().numpy()
    truth |= {"fps": batch.fps, "caption": caption, "attributes": json.dumps(batch.attributes[index], default=str)}
    with atomic_path(folder / f"{name}.npz") as temporary:
        np.savez_compressed(temporary, **truth)
    tags = ("dynamic" if dynamic else "static",)
    return ManifestRow(f"{name}.mp4", caption, seed, float(batch.fps), "rendered", tags)
