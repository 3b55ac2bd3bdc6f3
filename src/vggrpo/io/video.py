"""Video files through PyAV (FFmpeg's libraries in a wheel): H.264 in MP4 out, anything FFmpeg decodes in.

H.264 with 4:2:0 chroma needs even sizes; an odd last row or column is repeated once, so that every player opens the
file. Reading undoes nothing: the caller sees what the file holds.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import av.error
import numpy as np
from jaxtyping import UInt8

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


def read_video(path: Path | str, max_frames: int | None = None) -> tuple[UInt8[np.ndarray, "T H W 3"], float]:
    """Decode a video file.

    Args:
        path: any file with a video stream; alpha is dropped, all else is converted to RGB.
        max_frames: stop after this many frames (memory of a long clip: T * H * W * 3 bytes).

    Returns:
        Frames (T, H, W, 3) uint8 and the average frame rate in frames per second.

    Raises:
        UserError: when the file is missing, has no video stream, is truncated or corrupt, or holds no frame.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"video {file} does not exist or is not a file")
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise UserError(f"{file} holds no video stream")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            frames: list[np.ndarray] = []
            packets = 0
            for packet in container.demux(stream):
                packets += packet.size > 0
                frames.extend(frame.to_ndarray(format="rgb24") for frame in packet.decode())
                if max_frames is not None and len(frames) >= max_frames:
                    break
            else:
                # Packets, not frames: an edit list may hide frames of a sound file. Some files announce no count (0).
                if packets < stream.frames:
                    raise UserError(f"video {file} is truncated: {packets} of {stream.frames} packets are there")
    except (av.error.FFmpegError, EOFError) as error:
        raise UserError(f"video {file} cannot be decoded ({error}); it may be truncated or no video") from error
    if not frames:
        raise UserError(f"video {file} holds no frame")
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"video {file} changes its resolution within the stream; re-encode it at one size")
    if not rate:
        raise UserError(f"video {file} states no frame rate; re-encode it with one")
    return np.stack(frames[:max_frames]), float(rate)
