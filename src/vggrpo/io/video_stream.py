"""Video frames one by one, with their times: for clips that need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from jaxtyping import UInt8

from vggrpo.errors import UserError


class StreamedFrame(NamedTuple):
    """One decoded frame."""

    image: UInt8[np.ndarray, "H W 3"]
    seconds: float
    """Since the file's first frame, also where the rate varies."""
    rate: float
    """Average frames per second of the file."""


def stream_video(path: Path | str) -> Iterator[StreamedFrame]:
    """The frames of a video file one by one, so that memory does not grow with its length.

    Args:
        path: any file with a video stream; alpha is dropped, all else is converted to RGB.

    Raises:
        UserError: when the file is missing, has no video stream, is corrupt, changes its size, or holds no frame, and,
            after the last frame, when it is truncated.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"video {file} does not exist or is not a file")
    try:
        with av.open(str(file)) as container:
            yield from _decode(container, file)
    except (av.error.FFmpegError, EOFError) as error:
        raise UserError(f"video {file} cannot be decoded ({error}); it may be truncated or no video") from error


def _decode(container: Any, file: Path) -> Iterator[StreamedFrame]:
    if not container.streams.video:
        raise UserError(f"{file} holds no video stream")
    stream = container.streams.video[0]
    rate = stream.average_rate or stream.guessed_rate
    packets = count = 0
    shape, start = None, 0.0
    for packet in container.demux(stream):
        packets += packet.size > 0
        for frame in packet.decode():
            image = frame.to_ndarray(format="rgb24")
            if shape not in (None, image.shape):
                raise UserError(f"video {file} changes its resolution within the stream; re-encode it at one size")
            if not rate:
                raise UserError(f"video {file} states no frame rate; re-encode it with one")
            seconds = count / float(rate) if frame.time is None else frame.time
            start = start if count else seconds
            shape, count = image.shape, count + 1
            yield StreamedFrame(image, seconds - start, float(rate))
    # Packets, not frames: an edit list may hide frames of a sound file. Some files announce no count (0).
    if packets < stream.frames:
        raise UserError(f"video {file} is truncated: {packets} of {stream.frames} packets are there")
    if not count:
        raise UserError(f"video {file} holds no frame")
