"""Prompt files: UTF-8 text, one prompt a line."""

from __future__ import annotations

from pathlib import Path

from vggrpo.errors import UserError


def read_prompts(path: Path | str) -> list[str]:
    """Prompts of a text file, in order, repetitions kept (a repeated prompt is a second group).

    Empty lines and lines that start with `#` are left out, white space around a prompt is trimmed; length and
    language are free (the text encoder truncates, and its model card says where).

    Raises:
        UserError: when the file is missing, is a directory, is not UTF-8 text, or holds no prompt.
    """
    return [line for line in read_prompt_lines(path) if not line.startswith("#")]


def read_prompt_lines(path: Path | str) -> list[str]:
    """`read_prompts` with the comments (`# ...`) in their places."""
    file = Path(path)
    if not file.exists():
        raise UserError(f"prompt file {file} does not exist; give a UTF-8 text file with one prompt a line")
    if file.is_dir():
        raise UserError(f"{file} is a directory, expected a UTF-8 text file with one prompt a line")
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors on Windows put a byte-order mark in front
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompt file {file} is not UTF-8 text (byte {error.start}); save it as UTF-8, one prompt a line"
        ) from error
    except OSError as error:
        raise UserError(f"prompt file {file} cannot be read: {error.strerror or error}") from error
    if "\0" in text:
        raise UserError(f"prompt file {file} holds binary data; give a UTF-8 text file with one prompt a line")
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if all(line.startswith("#") for line in lines):
        raise UserError(f"prompt file {file} holds no prompt; write one prompt a line")
    return lines
