"""One module a command: `add_parser` describes its arguments, `run` calls the library. No module here imports torch."""

from __future__ import annotations

from vggrpo.commands import compare, doctor, evaluate, train, world

COMMANDS = (train, evaluate, compare, world, doctor)
