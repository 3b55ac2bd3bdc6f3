"""Point clouds as PLY (binary little endian), which MeshLab, Blender, CloudCompare and browsers open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write

_POSITION = [("x", "<f4"), ("y", "<f4"), ("z", "<f4")]
_COLOUR = [("red", "u1"), ("green", "u1"), ("blue", "u1")]
_PLY_TYPES = {"<f4": "float", "u1": "uchar"}


def write_ply(path: Path | str, points: np.ndarray, colours: np.ndarray | None = None) -> Path:
    """Write points, atomically; points that are not finite are left out (a viewer would draw them anywhere).

    Args:
        path: target file.
        points: (N, 3) in scene units.
        colours: (N, 3) uint8, or float in [0, 1].
    """
    cloud = np.asarray(points, dtype=np.float32)
    if cloud.ndim != 2 or cloud.shape[1] != 3:
        raise ValueError(f"expected points of shape (N, 3), got {cloud.shape}")
    fields = list(_POSITION)
    if colours is not None:
        colours = np.asarray(colours)
        if colours.shape != cloud.shape:
            raise ValueError(f"expected colours of shape {cloud.shape}, as the points, got {colours.shape}")
        if np.issubdtype(colours.dtype, np.floating):
            colours = np.rint(np.clip(np.nan_to_num(colours), 0.0, 1.0) * 255.0)
        fields += _COLOUR
    keep = np.isfinite(cloud).all(axis=1)
    table = np.empty(int(keep.sum()), dtype=fields)
    for axis, (name, _) in enumerate(_POSITION):
        table[name] = cloud[keep, axis]
    if colours is not None:
        for axis, (name, _) in enumerate(_COLOUR):
            table[name] = colours[keep, axis]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property {_PLY_TYPES[kind]} {name}" for name, kind in fields]
    return atomic_write(path, ("\n".join([*header, "end_header"]) + "\n").encode("ascii") + table.tobytes())


def read_ply(path: Path | str) -> tuple[Float[np.ndarray, "N 3"], UInt8[np.ndarray, "N 3"] | None]:
    """Read a PLY as `write_ply` makes it.

    Returns:
        points (N, 3) float32 and colours (N, 3) uint8, or None where the file has none.

    Raises:
        UserError: when the file is missing, of another layout, or shorter than its header says.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"point cloud {file} does not exist or is not a file")
    header, mark, body = file.read_bytes().partition(b"end_header\n")
    lines = header.decode("ascii", errors="replace").split("\n")
    layouts = {
        tuple(f"property {_PLY_TYPES[kind]} {name}" for name, kind in fields): fields
        for fields in (_POSITION, _POSITION + _COLOUR)
    }
    fields = layouts.get(tuple(line for line in lines if line.startswith("property")))
    count = next((line.split()[-1] for line in lines if line.startswith("element vertex ")), "")
    if not mark or "format binary_little_endian 1.0" not in lines or fields is None or not count.isdigit():
        raise UserError(f"{file} is not a binary little-endian PLY with x y z (and red green blue)")
    size = int(count) * np.dtype(fields).itemsize
    if len(body) < size:
        raise UserError(f"point cloud {file} is truncated: {len(body)} of {size} bytes")
    table = np.frombuffer(body[:size], dtype=fields)
    points = np.stack([table[name] for name, _ in _POSITION], axis=1)
    colours = np.stack([table[name] for name, _ in _COLOUR], axis=1) if len(fields) > 3 else None
    return points, colours
