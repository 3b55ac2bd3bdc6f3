"""Argument types that commands share; a bad value ends with a one-line message and exit code 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Protocol

GO_ON = "run the same command again to go on where it stopped"
START_AGAIN = "run the same command again; nothing half-written is left"
MOST = 1_000_000  # of anything that is counted: beyond it is a slip of the finger, and memory would end first


class Subparsers(Protocol):
    """What `ArgumentParser.add_subparsers` returns; its own class is private to argparse."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        """Add one command."""
        ...


def at_least(minimum: int, most: int = MOST) -> Callable[[str], int]:
    """A parser of whole numbers from `minimum` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is not at least {minimum}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is more than {most}")
        return value

    return parse


seed = at_least(0, most=2**63 - 1)


def number(minimum: float, most: float = 1e6) -> Callable[[str], float]:
    """A parser of numbers from `minimum` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not minimum <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {minimum:.10g} to {most:.10g}")
        return value

    return parse


frame_rate = number(0.01, 1000)
guidance_scale = number(1)


def image_size(text: str) -> tuple[int, int]:
    """`64` or `HEIGHTxWIDTH` in pixels -> (height, width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().lstrip("-").isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor HEIGHTxWIDTH, such as 64 or 480x832")
    height, width = at_least(1)(parts[0]), at_least(1)(parts[-1])
    return height, width


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
