"""`vggrpo compare`: paired statistics of two arms, and their report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vggrpo.commands.arguments import START_AGAIN, Subparsers
from vggrpo.errors import UserError

if TYPE_CHECKING:
    from vggrpo.evaluation import Comparison, KernelComparison

WIDE = 200  # characters


def add_parser(subparsers: Subparsers) -> None:
    """Add `compare`."""
    parser = subparsers.add_parser(
        "compare",
        help="paired statistics of two arms, and a report",
        description=(
            "Pair the videos of two arms by prompt and seed and compare every metric: difference with a 95 %% interval "
            "over prompts, win rate, Holm correction, failures; and the kernel distance of both arms to rendered "
            "clips, where `evaluate` kept the classifier's features. Where the two lie in RUN/eval/base and "
            "RUN/eval/tuned beside their videos in RUN/base and RUN/tuned, RUN/report/index.html is written as well."
        ),
    )
    parser.add_argument("base", type=Path, help="metrics.jsonl of the base model, or its directory")
    parser.add_argument("tuned", type=Path, help="metrics.jsonl of the tuned model, or its directory")
    parser.add_argument("--output", type=Path, help="directory for comparison.json and comparison.md")
    parser.add_argument(
        "--attributes", metavar="DIR", help="the classifier that `evaluate` was given (default: embedded)"
    )
    parser.set_defaults(run=run, resume=START_AGAIN)


def run(arguments: argparse.Namespace) -> None:
    """Compare, print the tables, write what was asked for."""
    from vggrpo.evaluation import build_report, compare_files, verdict
    from vggrpo.io.atomic import atomic_write

    comparison = compare_files(arguments.base, arguments.tuned)
    comparison = replace(comparison, kernel=_kernel_distance(arguments))
    checks = verdict(comparison).checks
    _print(comparison, checks)
    if arguments.output:
        lines = [f"- {'yes' if ok else 'unknown' if ok is None else 'no'}: {name}: {text}"
                 for name, (ok, text) in checks.items()]  # fmt: skip
        text = comparison.to_markdown() + "\nDoes the improvement count?\n\n" + "\n".join(lines) + "\n"
        atomic_write(arguments.output / "comparison.json", comparison.to_json() + "\n")
        print(f"numbers in {atomic_write(arguments.output / 'comparison.md', text).parent}")
    run_directory = _run_directory(arguments.base, arguments.tuned)
    if run_directory is not None:
        print(f"report in {build_report(run_directory, kernel=comparison.kernel)}")


def _kernel_distance(arguments: argparse.Namespace) -> KernelComparison | None:
    """The kernel distance, or None after saying why there is none."""
    from vggrpo.evaluation import EvaluationModels, compare_recorded_quality

    models = EvaluationModels(attributes=arguments.attributes)
    try:
        return compare_recorded_quality(arguments.base, arguments.tuned, models)
    except UserError as error:
        print(f"no kernel distance: {error}", file=sys.stderr)
        return None


def _print(comparison: Comparison, checks: dict[str, tuple[bool | None, str]]) -> None:
    """Tables for the terminal; where there is none, wide enough for their cells."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vggrpo.evaluation.compare import COLUMNS

    console = Console() if sys.stdout.isatty() else Console(width=WIDE)

    def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(*head)
        for row in rows:
            table.add_row(*map(Text, row))  # Text: an interval's brackets are no markup
        console.print(table)

    show(COLUMNS, comparison.table())
    if comparison.tags:
        show(["difference by tag", *comparison.tags], comparison.tag_table())
    for remark in comparison.remarks():
        console.print(Text(remark))
    marks = {True: "yes", False: "no", None: "unknown"}
    show(["does the improvement count?", "", ""], [[name, marks[ok], text] for name, (ok, text) in checks.items()])


def _run_directory(base: Path, tuned: Path) -> Path | None:
    """RUN when the arms lie in RUN/eval/base and RUN/eval/tuned and their videos beside them."""
    folders = [(path if path.is_dir() else path.parent).resolve() for path in (base, tuned)]
    run_directory = folders[0].parent.parent
    expected = [run_directory / "eval" / arm for arm in ("base", "tuned")]
    has_videos = all((run_directory / arm / "manifest.jsonl").is_file() for arm in ("base", "tuned"))
    return run_directory if folders == expected and has_videos else None
