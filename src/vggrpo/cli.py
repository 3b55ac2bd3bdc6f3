"""The `vggrpo` command: parses arguments, calls one library function, and turns its errors into one line.

`vggrpo --help` imports no torch (a test holds it): each command's parser lives in `vggrpo.commands`, and what does the
work is imported when the command runs. Exit codes: 0 done, 1 an unexpected error (with its traceback, which a bug
report needs), 2 something the user can mend, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vggrpo import __version__
from vggrpo.commands import COMMANDS
from vggrpo.errors import UserError
from vggrpo.io.atomic import disk_full


class _Parser(argparse.ArgumentParser):
    """Bad usage is one line too, without argparse's pages of usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands; each sets `run`, and `resume` to what a user does after an interruption."""
    parser = _Parser(
        prog="vggrpo",
        description="Post-train video diffusion models for world consistency with 4D rewards read from their latents.",
        epilog="Start with `vggrpo demo`: offline, on a CPU, in minutes.",
    )
    parser.add_argument("--version", action="version", version=f"vggrpo {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"vggrpo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nvggrpo: interrupted; {arguments.resume}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`vggrpo doctor | head`): stop without a word, as other tools do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (reason := disk_full(error)) is None:
            raise
        print(f"vggrpo: error: cannot write ({reason}); free space, then {arguments.resume}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
