"""Video files through PyAV (FFmpeg's libraries in a wheel): H.264 in MP4 out, anything FFmpeg decodes in.

H.264 with 4:2:0 chroma needs even sizes; an odd last row or column is repeated once, so that every player opens the
file. Reading undoes nothing: the caller sees what the file holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import av.error
import numpy as np
from jaxtyping import Float, UInt8

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_path

if TYPE_CHECKING:
    from torch import Tensor


def _to_frames(video: Tensor | np.ndarray) -> UInt8[np.ndarray, "T H W 3"]:
    """Bring (3,T,H,W) or (T,H,W,3), uint8 or float in [0,1], to uint8 frames.

    Three equal candidates ((3,T,H,3)) are read as channels first, the layout of the models.
    """
    if not isinstance(video, np.ndarray):  # a torch tensor, without importing torch here
        tensor: Any = video.detach().cpu()
        video = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if video.ndim != 4 or 3 not in (video.shape[0], video.shape[-1]):
        raise ValueError(f"expected a video of shape (3, T, H, W) or (T, H, W, 3), got {video.shape}")
    if video.shape[0] == 3:
        video = video.transpose(1, 2, 3, 0)  # (T, H, W, 3)
    if 0 in video.shape:
        raise ValueError(f"expected at least one frame of at least one pixel, got {video.shape}")
    if video.dtype == np.uint8:
        return np.ascontiguousarray(video)
    if not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"expected uint8 in [0, 255] or float in [0, 1], got {video.dtype}")
    if not np.isfinite(video).all():
        raise ValueError("the video holds NaN or infinite values; it was not written")
    return np.ascontiguousarray(np.rint(np.clip(video, 0.0, 1.0) * 255.0).astype(np.uint8))


def write_video(path: Path | str, video: Tensor | np.ndarray, fps: float, *, crf: int = 12) -> Path:
    """Write an MP4 (H.264, 4:2:0) that browsers play, atomically.

    Args:
        path: target file; parents are created.
        video: (3, T, H, W) or (T, H, W, 3), uint8 or float in [0, 1].
        fps: frames per second, > 0.
        crf: x264 quality, 0 (lossless) to 51; 12 keeps metrics on the file close to metrics on the tensor.

    Raises:
        UserError: when the directory is not writable.
        ValueError: when shape, type or values are not those of a video.
    """
    frames = _to_frames(video)
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps is {fps}, expected a positive number")
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        # Repeatable bytes: one thread, and no macroblock tree, whose vector code gave other files now and then
        # for the same frames (1 to 30 of 100 tries with the x264 of av 18).
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return Path(path)


@dataclass(frozen=True)
class DecodedVideo:
    """Frames (T, H, W, 3) uint8, the average rate in frames per second, and each frame's time (T,) in seconds."""

    frames: UInt8[np.ndarray, "T H W 3"]
    fps: float
    times: Float[np.ndarray, " T"]


def read_video(path: Path | str, max_frames: int | None = None) -> tuple[UInt8[np.ndarray, "T H W 3"], float]:
    """Frames and average frame rate of a video file; see `decode_video`."""
    video = decode_video(path, max_frames)
    return video.frames, video.fps


def frame_rate(path: Path | str) -> float:
    """Average frame rate that a video file states, without decoding it.

    Raises:
        UserError: as `decode_video`.
    """
    file = Path(path)
    with _opened(file) as (_, stream):
        return _rate(file, stream)


def decode_video(
    path: Path | str,
    max_frames: int | None = None,
    most_lines: Callable[[int, int, int], int | None] | None = None,
) -> DecodedVideo:
    """Decode a video file.

    Args:
        path: any file with a video stream; alpha is dropped, all else is converted to RGB.
        max_frames: stop after this many frames (memory of a long clip: T * H * W * 3 bytes).
        most_lines: given the number of frames that the file states (0: unknown), height and width, the short side to
            scale frames down to while they are decoded, or None to leave them.

    Raises:
        UserError: when the file is missing, has no video stream, is truncated or corrupt, or holds no frame.
    """
    file = Path(path)
    frames: list[np.ndarray] = []
    times: list[float] = []
    with _opened(file) as (container, stream):
        rate = _rate(file, stream)
        size = _scaled(stream, most_lines)
        packets = 0
        for packet in container.demux(stream):
            packets += packet.size > 0
            for frame in packet.decode():
                times.append(len(times) / rate if frame.time is None else float(frame.time))
                frames.append(frame.to_ndarray(format="rgb24", **size))
            if max_frames is not None and len(frames) >= max_frames:
                break
        else:
            _check_whole(file, stream, packets)
    if not frames:
        raise UserError(f"video {file} holds no frame")
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"video {file} changes its resolution within the stream; re-encode it at one size")
    return DecodedVideo(np.stack(frames[:max_frames]), rate, np.array(times[:max_frames]))


class StreamedFrame(NamedTuple):
    """One decoded frame."""

    image: UInt8[np.ndarray, "H W 3"]
    seconds: float
    """Since the file's first frame, also where the rate varies."""
    rate: float


def stream_video(path: Path | str) -> Iterator[StreamedFrame]:
    """The frames of a video file one by one, so that memory does not grow with its length.

    Args:
        path: any file with a video stream; alpha is dropped, all else is converted to RGB.

    Raises:
        UserError: when the file is missing, has no video stream, is corrupt, changes its size, or holds no frame, and,
            after the last frame, when it is truncated.
    """
    file = Path(path)
    packets = count = 0
    shape, start = None, 0.0
    with _opened(file) as (container, stream):
        rate = _rate(file, stream)
        for packet in container.demux(stream):
            packets += packet.size > 0
            for frame in packet.decode():
                image = frame.to_ndarray(format="rgb24")
                if shape not in (None, image.shape):
                    raise UserError(f"video {file} changes its resolution within the stream; re-encode it at one size")
                seconds = count / rate if frame.time is None else frame.time
                start = start if count else seconds
                shape, count = image.shape, count + 1
                yield StreamedFrame(image, seconds - start, rate)
        _check_whole(file, stream, packets)
    if not count:
        raise UserError(f"video {file} holds no frame")


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; what goes wrong while they are read is a `UserError`."""
    if not os.path.isfile(file):  # unlike Path's, it does not fail on a name that is too long
        raise UserError(f"video {file} does not exist or is not a file")
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise UserError(f"{file} holds no video stream")
            if container.streams.video[0].codec_context is None:
                raise UserError(f"video {file} is damaged: it names no known codec; copy or encode it again")
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, EOFError, UnicodeDecodeError) as error:  # the last one of a damaged header
        raise UserError(f"video {file} cannot be decoded ({error}); it may be truncated or no video") from error


def _rate(file: Path, stream: Any) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise UserError(f"video {file} states no frame rate; re-encode it with one")
    return float(rate)


def _check_whole(file: Path, stream: Any, packets: int) -> None:
    # Packets, not frames: an edit list may hide frames of a sound file. Some files announce no count (0).
    if packets < stream.frames:
        raise UserError(f"video {file} is truncated: {packets} of {stream.frames} packets are there")


def _scaled(stream: Any, most_lines: Callable[[int, int, int], int | None] | None) -> dict[str, Any]:
    """Options that make a frame smaller while it is converted; none when it is small enough."""
    height, width = stream.codec_context.height, stream.codec_context.width
    lines = most_lines(stream.frames, height, width) if most_lines is not None and min(height, width) > 0 else None
    if lines is None or lines >= min(height, width):
        return {}
    scale = lines / min(height, width)
    return {"width": round(width * scale), "height": round(height * scale), "interpolation": "AREA"}
