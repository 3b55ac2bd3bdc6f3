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
    lines = (line.strip() for line in text.splitlines())
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"prompt file {file} holds no prompt; write one prompt a line")
    return prompts
