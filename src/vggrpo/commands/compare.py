"""`vggrpo compare`: paired statistics of two arms, and their report."""

from __future__ import annotations

import argparse
from pathlib import Path

from vggrpo.commands.arguments import START_AGAIN, Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add `compare`."""
    parser = subparsers.add_parser(
        "compare",
        help="paired statistics of two arms, and a report",
        description=(
            "Pair the videos of two arms by prompt and seed and compare every metric: difference with a 95 %% interval "
            "over prompts, win rate, Holm correction, failures. Where the two lie in RUN/eval/base and RUN/eval/tuned "
            "beside their videos in RUN/base and RUN/tuned, RUN/report/index.html is written as well."
        ),
    )
    parser.add_argument("base", type=Path, help="metrics.jsonl of the base model, or its directory")
    parser.add_argument("tuned", type=Path, help="metrics.jsonl of the tuned model, or its directory")
    parser.add_argument("--output", type=Path, help="directory for comparison.json and comparison.md")
    parser.set_defaults(run=run, resume=START_AGAIN)


def run(arguments: argparse.Namespace) -> None:
    """Compare, print the table, write what was asked for."""
    from vggrpo.evaluation import build_report, compare_files
    from vggrpo.io.atomic import atomic_write

    comparison = compare_files(arguments.base, arguments.tuned)
    print(comparison.to_markdown())
    if arguments.output:
        atomic_write(arguments.output / "comparison.json", comparison.to_json() + "\n")
        print(f"numbers in {atomic_write(arguments.output / 'comparison.md', comparison.to_markdown()).parent}")
    run_directory = _run_directory(arguments.base, arguments.tuned)
    if run_directory is not None:
        print(f"report in {build_report(run_directory)}")


def _run_directory(base: Path, tuned: Path) -> Path | None:
    """RUN when the arms lie in RUN/eval/base and RUN/eval/tuned and their videos beside them."""
    folders = [(path if path.is_dir() else path.parent).resolve() for path in (base, tuned)]
    run_directory = folders[0].parent.parent
    expected = [run_directory / "eval" / arm for arm in ("base", "tuned")]
    has_videos = all((run_directory / arm / "manifest.jsonl").is_file() for arm in ("base", "tuned"))
    return run_directory if folders == expected and has_videos else None
