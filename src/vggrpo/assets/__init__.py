"""Where the embedded models live: `path("lgm")` is a directory that `from_pretrained` accepts."""

from __future__ import annotations

from pathlib import Path

from vggrpo.errors import UserError

NAMES = ("pipeline", "geometry", "lgm", "judge", "attributes")


def path(name: str) -> Path:
    """Directory of one shipped model of the embedded world.

    Raises:
        UserError: when `name` is unknown or its weights are not in this installation.
    """
    if name not in NAMES:
        raise UserError(f"no embedded model called {name!r}; there are {', '.join(NAMES)}")
    directory = Path(__file__).parent / "tiny" / name
    if not directory.is_dir():
        raise UserError(
            f"the embedded model {name!r} is missing from {directory}; "
            f"reinstall vggrpo or run `vggrpo world pretrain {name}`"
        )
    return directory
