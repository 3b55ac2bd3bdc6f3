"""`vggrpo evaluate`: metrics of every video of a manifest, as JSON lines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vggrpo.commands.arguments import GO_ON, Subparsers, at_least


def add_parser(subparsers: Subparsers) -> None:
    """Add `evaluate`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="metrics per video, as JSON lines",
        description="Measure every video. Videos that are measured already are not measured again.",
    )
    parser.add_argument("manifest", type=Path, help="JSON lines of {path, prompt, seed, fps, arm}, or a folder of MP4s")
    parser.add_argument("--output", type=Path, required=True, help="directory for metrics.jsonl and details.jsonl")
    parser.add_argument("--metrics", default="fast", help="fast, all, or names joined by commas (default: fast)")
    parser.add_argument("--workers", type=at_least(1), default=1, help="processes (default: %(default)s)")
    parser.add_argument("--judge", type=Path, help="directory of the geometry network that judges (default: embedded)")
    parser.add_argument("--attributes", type=Path, help="directory of the attribute classifier (default: embedded)")
    parser.add_argument("--device", default="cpu", help="where the judges run (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument(
        "--offline",
        action="store_true",
        help="only say what is missing (nothing is ever downloaded; a missing model stops the run before it starts)",
    )
    parser.set_defaults(run=run, resume=GO_ON)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, with a line of progress."""
    from vggrpo.evaluation import EvaluationModels, evaluate_manifest
    from vggrpo.evaluation.metrics import select

    models = EvaluationModels(arguments.judge, arguments.attributes, device=arguments.device)
    chosen = select(arguments.metrics)
    if arguments.offline:
        models.check(need for metric in chosen for need in metric.needs)
        print("nothing is missing")
        return
    path = evaluate_manifest(
        arguments.manifest,
        arguments.output,
        arguments.metrics,
        workers=arguments.workers,
        models=models,
        progress=_show_progress,
        fresh=arguments.fresh,
    )
    print(f"metrics in {path}")


def _show_progress(done: int, total: int) -> None:
    # One line that overwrites itself on a terminal; nothing in a log file.
    if sys.stderr.isatty():
        print(f"\r{done} of {total} videos", end="\n" if done == total else "", file=sys.stderr, flush=True)
