"""H.264 round trips and files that are no video."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vggrpo.errors import UserError
from vggrpo.io.video import read_video, write_video


def gradient_clip(frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    """A smooth moving gradient (T, H, W, 3) float in [0, 1], which 4:2:0 chroma keeps well."""
    t, y, x = np.meshgrid(
        np.arange(frames) / frames, np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij"
    )
    return np.stack([x, y, 0.5 + 0.5 * np.sin(2 * np.pi * (t + 0.3 * x))], axis=-1)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a.astype(float) - b.astype(float)) ** 2) / 255**2))


def test_round_trip_keeps_frames_rate_and_picture(tmp_path):
    clip = gradient_clip()
    path = write_video(tmp_path / "new folder" / "clip ü.mp4", clip, fps=8)
    frames, fps = read_video(path)
    assert frames.shape == clip.shape and frames.dtype == np.uint8
    assert fps == pytest.approx(8)
    assert psnr(frames, clip * 255) > 38
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("layout", ["channels_first_tensor", "channels_first_array", "uint8", "bfloat16"])
def test_layouts_and_types_give_the_same_video(tmp_path, layout):
    clip = gradient_clip()
    reference, _ = read_video(write_video(tmp_path / "reference.mp4", clip, fps=8))
    channels_first = clip.transpose(3, 0, 1, 2)
    video = {
        "channels_first_tensor": torch.from_numpy(channels_first).requires_grad_(),
        "channels_first_array": channels_first,
        "uint8": np.rint(clip * 255).astype(np.uint8),
        "bfloat16": torch.from_numpy(clip).to(torch.bfloat16),
    }[layout]
    frames, _ = read_video(write_video(tmp_path / "other.mp4", video, fps=8))
    if layout == "bfloat16":
        assert psnr(frames, reference) > 38
    else:
        assert np.array_equal(frames, reference)


def test_same_video_gives_the_same_bytes(tmp_path):
    # Many tries with the heap stirred in between: an encoder that reads stale memory differs only now and then.
    rng = np.random.default_rng(0)
    contents, heap = set(), []
    for attempt in range(25):
        heap = heap[attempt % 3 :] + [rng.integers(0, 255, rng.integers(1, 200_000), dtype=np.uint8) for _ in range(3)]
        contents.add(write_video(tmp_path / "a.mp4", gradient_clip(), fps=8).read_bytes())
    assert len(contents) == 1


def test_index_comes_first_so_that_browsers_start_at_once(tmp_path):
    content = write_video(tmp_path / "a.mp4", gradient_clip(), fps=8).read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_odd_sizes_are_padded_by_one(tmp_path):
    clip = gradient_clip(height=31, width=45)
    frames, _ = read_video(write_video(tmp_path / "odd.mp4", clip, fps=29.97))
    assert frames.shape == (9, 32, 46, 3)
    assert psnr(frames[:, :31, :45], clip * 255) > 35


def test_one_frame_and_max_frames(tmp_path):
    single, _ = read_video(write_video(tmp_path / "one.mp4", gradient_clip(frames=1), fps=8))
    assert single.shape[0] == 1
    frames, _ = read_video(write_video(tmp_path / "nine.mp4", gradient_clip(), fps=8), max_frames=4)
    assert frames.shape[0] == 4


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((4, 5, 6)), "expected a video of shape"),
        (np.zeros((4, 8, 8, 4)), "expected a video of shape"),
        (np.zeros((0, 8, 8, 3)), "at least one frame"),
        (np.full((2, 8, 8, 3), np.nan), "NaN"),
        (np.zeros((2, 8, 8, 3), dtype=np.int64), "int64"),
    ],
)
def test_what_is_no_video_is_refused_and_nothing_is_written(tmp_path, video, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "no.mp4", video, fps=8)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_file(tmp_path):
    path = write_video(tmp_path / "keep.mp4", gradient_clip(), fps=8)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="fps"):
        write_video(path, gradient_clip(), fps=0)
    assert path.read_bytes() == before


def test_missing_truncated_and_foreign_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_video(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(UserError, match="cannot be decoded"):
        read_video(tmp_path / "text.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be decoded"):
        read_video(tmp_path / "empty.mp4")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.98])
def test_a_cut_off_file_is_an_error_not_a_shorter_video(tmp_path, share):
    clip = np.random.default_rng(0).random((24, 64, 64, 3))  # noise: most bytes are picture data
    content = write_video(tmp_path / "whole.mp4", clip, fps=8).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"truncated|cannot be decoded"):
        read_video(tmp_path / "cut.mp4")


def test_a_damaged_file_is_an_error_in_one_line_or_a_video(tmp_path):
    """Bytes flipped anywhere: some files name no codec then, some hold text that is none."""
    content = write_video(tmp_path / "whole.mp4", gradient_clip(), fps=8).read_bytes()
    refused = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng.integers(len(damaged), size=20)] ^= rng.integers(1, 256, size=20, dtype=np.uint8)
        (tmp_path / "damaged.mp4").write_bytes(damaged.tobytes())
        try:
            read_video(tmp_path / "damaged.mp4")
        except UserError as error:
            refused += 1
            assert "damaged.mp4" in str(error) and "\n" not in str(error)
    assert refused > 10


def test_real_footage_is_read(shared_dir):
    frames, fps = read_video(shared_dir / "data" / "videos" / "nasa_13013.mp4")
    assert frames.shape[1:] == (180, 320, 3)
    assert frames.shape[0] > 300 and 20 < fps < 60
