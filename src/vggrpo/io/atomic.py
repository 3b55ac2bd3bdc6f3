"""All-or-nothing writes: a reader sees the old file or the whole new one, never half of it.

The new content goes to a sibling with a unique name and is renamed over the target, which POSIX makes atomic within
one file system. A crash leaves at most a stray `.NAME.*.partial` file, which no reader of this library looks at.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vggrpo.errors import UserError


def disk_full(error: BaseException) -> str | None:
    """What the system said, if a write failed because there is no room; None for every other error.

    safetensors writes by itself, and says the number in words.
    """
    if isinstance(error, OSError):
        number = error.errno
    else:
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = int(said[1]) if said else None
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


def ensure_directory(path: Path | str) -> Path:
    """Create `path` (and its parents) and prove that files can be written there.

    Raises:
        UserError: when a file is in the way or the directory is not writable.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Asking the permission bits is not enough: root passes them, and read-only mounts do not show in them.
        probe = directory / f".write-test.{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except FileExistsError as error:
        raise UserError(f"{directory} is a file, not a directory; name another output directory") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write to {directory} ({reason}); name another output directory") from error
    return directory


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any exception it is removed.

    The temporary name keeps the target's suffix, because writers choose the format by it.

    Raises:
        UserError: when the directory cannot be created or written.
    """
    target = Path(path)
    ensure_directory(target.parent)
    if target.is_dir():
        raise UserError(f"{target} is a directory, expected a file; remove it or name another file")
    temporary = target.with_name(f".{target.stem[:80]}.{uuid.uuid4().hex[:12]}.partial{target.suffix}")
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {target}")
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path | str, content: str | bytes) -> Path:
    """Write text (UTF-8) or bytes to `path` atomically and return the path."""
    with atomic_path(path) as temporary:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            temporary.write_text(content, encoding="utf-8")
    return Path(path)


def without_nan(value: Any) -> Any:
    """The same with None for NaN and infinity, which are not JSON."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def atomic_write_json(path: Path | str, value: object) -> Path:
    """Write `value` as indented JSON; NaN and infinity are refused, because they are not JSON."""
    return atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
