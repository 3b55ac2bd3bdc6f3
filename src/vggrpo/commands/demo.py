"""`vggrpo demo`: the whole story on the embedded world."""

from __future__ import annotations

import argparse
from pathlib import Path

from vggrpo.commands.arguments import GO_ON, Subparsers, at_least, seed


def add_parser(subparsers: Subparsers) -> None:
    """Add `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="the whole story on the embedded world: offline, CPU, minutes",
        description=(
            "Sample a small video model, tune it with GRPO on rewards from its latents, sample again with the same "
            "seeds, evaluate both and write a report. What is done already is not done again."
        ),
    )
    parser.add_argument("--output", type=Path, default=Path("vggrpo-demo"), help="directory (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the training run (default: %(default)s)")
    parser.add_argument("--updates", type=at_least(1), help="GRPO updates (default: as the shipped recipe)")
    parser.add_argument("--fresh", action="store_true", help="start over, even where a run lies in the directory")
    parser.set_defaults(run=run, resume=GO_ON)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo; it prints its own progress and result."""
    from vggrpo.demo import run_demo

    run_demo(arguments.output, seed=arguments.seed, updates=arguments.updates, fresh=arguments.fresh)
