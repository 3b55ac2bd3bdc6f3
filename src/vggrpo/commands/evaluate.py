"""`vggrpo evaluate`: metrics of every video of a manifest, as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
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
    parser.add_argument("--jobs", type=at_least(1), default=None, help="processes (default: one a core)")
    parser.add_argument(
        "--judge", metavar="DIR", help="directory or hub id of the geometry network that judges (default: embedded)"
    )
    parser.add_argument(
        "--teacher", metavar="DIR", help="geometry network that the LGM was made from, which is no judge (same default)"
    )
    parser.add_argument("--attributes", metavar="DIR", help="directory of the attribute classifier (default: embedded)")
    parser.add_argument("--device", default="cpu", help="where the networks run (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument(
        "--offline", action="store_true", help="list what is missing first, and never ask the network for weights"
    )
    parser.set_defaults(run=run, resume=GO_ON)


def run(arguments: argparse.Namespace) -> None:
    """Say what is missing, evaluate with a line of progress, say how many videos have no number."""
    if arguments.offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # read when the hub's client loads
    from vggrpo.evaluation import EvaluationModels, evaluate_manifest
    from vggrpo.evaluation.metrics import insisted, select

    models = EvaluationModels(arguments.judge, arguments.attributes, arguments.device, teacher=arguments.teacher)
    missing = models.missing(need for metric in select(arguments.metrics) for need in metric.needs)
    insisted_on = {need for metric in insisted(arguments.metrics) for need in metric.needs}
    for name, reason in missing.items():
        if name not in insisted_on:  # those are the error that follows
            print(f"missing: {name}: {reason}", file=sys.stderr)
    if arguments.offline and not missing:
        print("nothing is missing", file=sys.stderr)
    path = evaluate_manifest(
        arguments.manifest,
        arguments.output,
        arguments.metrics,
        workers=arguments.jobs or os.cpu_count() or 1,
        models=models,
        progress=Progress(),
        fresh=arguments.fresh,
    )
    print(f"metrics in {path}{_failures(path)}")


class Progress:
    """`7 of 96 videos, about 3 min left`: one line that overwrites itself on a terminal, one now and then in a log."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done - 1  # what an earlier run had measured says nothing about the speed of this one
        left = (total - done) * (now - self._began) / (done - self._first)
        text = f"{done} of {total} videos" + (f", about {spoken(left)} left" if done < total else "")
        if sys.stderr.isatty():
            print(f"\r{text:<60}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done == total or now - self._said > 30:
            self._said = now
            print(text, file=sys.stderr, flush=True)


def spoken(seconds: float) -> str:
    """A duration in the largest unit that fits: 40 s, 3 min, 2.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _failures(path: Path) -> str:
    """How many videos have no number at all, and why the first one has none."""
    count, first = 0, ""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if not any(entry["valid"] for entry in row["metrics"].values()):
                count, first = count + 1, first or f"{row['path']}: {next(iter(row['metrics'].values()))['reason']}"
    return f"; {count} without any number, such as {first}" if count else ""
