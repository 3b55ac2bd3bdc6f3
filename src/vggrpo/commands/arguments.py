"""Argument types that commands share; a bad value ends with argparse's own one-line message and exit code 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Protocol

GO_ON = "run the same command again to go on where it stopped"
START_AGAIN = "run the same command again; nothing half-written is left"


class Subparsers(Protocol):
    """What `ArgumentParser.add_subparsers` returns; its own class is private to argparse."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        """Add one command."""
        ...


def at_least(minimum: int) -> Callable[[str], int]:
    """A parser of whole numbers from `minimum` up."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is not at least {minimum}")
        return value

    return parse


def image_size(text: str) -> tuple[int, int]:
    """`64` or `HEIGHTxWIDTH` in pixels -> (height, width)."""
    parts = text.lower().split("x")
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor HEIGHTxWIDTH, such as 64 or 480x832")
    height, width = at_least(1)(parts[0]), at_least(1)(parts[-1])
    return height, width
