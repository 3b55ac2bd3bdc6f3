"""`vggrpo benchmark`: both arms generated, evaluated, compared and reported."""

from __future__ import annotations

import argparse
import sys

from vggrpo.commands.arguments import GO_ON, Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add `benchmark`."""
    parser = subparsers.add_parser(
        "benchmark",
        help="generate both arms with the same seeds, evaluate, compare, report",
        description=(
            "Compare a tuned model with its base on prompt sets: the same prompts and seeds for both, every metric, "
            "paired statistics over prompts, and OUTPUT/report/index.html. The same command goes on where it stopped."
        ),
    )
    parser.add_argument("config", help="a YAML file, or the name of a shipped recipe such as benchmark-tiny")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config fields to change, such as tuned_lora=runs/a/lora limit=12 output=runs/b",
    )
    parser.set_defaults(run=run, resume=GO_ON)


def run(arguments: argparse.Namespace) -> None:
    """Load the config first (it imports no torch, so that a typo costs nothing), then run."""
    from vggrpo.config_benchmark import load_benchmark_config

    config = load_benchmark_config(arguments.config, arguments.overrides)
    from vggrpo.evaluation.benchmark import run_benchmark

    result = run_benchmark(config, progress=_show_progress)
    print(result.comparison.to_markdown())
    for name, (outcome, text) in result.verdict.checks.items():
        print(f"{'open' if outcome is None else 'holds' if outcome else 'FAILS':5s}  {name}: {text}")
    print(f"The improvement {'counts' if result.verdict.counts else 'does not count (yet)'}.")
    print(f"report in {result.report}")


def _show_progress(done: int, total: int) -> None:
    # One line that overwrites itself on a terminal; nothing in a log file.
    if sys.stderr.isatty():
        print(f"\r{done} of {total} videos", end="\n" if done == total else "", file=sys.stderr, flush=True)
