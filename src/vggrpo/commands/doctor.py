"""`vggrpo doctor`: what this machine can run."""

from __future__ import annotations

import argparse

from vggrpo.commands.arguments import START_AGAIN, Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add `doctor`."""
    parser = subparsers.add_parser(
        "doctor", help="what this machine can run: devices, versions, memory, missing weights and their licences"
    )
    parser.set_defaults(run=run, resume=START_AGAIN)


def run(arguments: argparse.Namespace) -> None:
    """Print the report."""
    from vggrpo.doctor import report

    print(report())
