"""`vggrpo reconstruct`: what it writes agrees with the renderer's truth; every kind of video, and what is no video."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from vggrpo import assets
from vggrpo.cli import main
from vggrpo.errors import UserError
from vggrpo.evaluation import reconstruct
from vggrpo.evaluation.clip_views import evenly, fit, for_latents, load_clip
from vggrpo.evaluation.live_view import require_viser, start_server
from vggrpo.evaluation.reconstruct import reconstruct_video
from vggrpo.io.cameras import read_colmap, read_tum
from vggrpo.io.points import read_ply
from vggrpo.io.video import write_video
from vggrpo.models.any4d import Any4D, Any4DConfig
from vggrpo.models.dinov2 import DinoConfig
from vggrpo.world import WorldBatch, sample_batch


class TrueModel(torch.nn.Module):
    """A geometry model that happens to know the scene."""

    def __init__(self, batch: WorldBatch) -> None:
        super().__init__()
        self.batch = batch
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def image_size_for(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def forward(self, frames: torch.Tensor):
        return self.batch.geometry(every=4)


def truck_left() -> WorldBatch:
    return sample_batch([4], num_frames=17, size=(32, 48), shake="smooth", camera="truck_left", supersample=1)


@pytest.fixture(scope="module")
def batch() -> WorldBatch:
    return truck_left()


@pytest.fixture
def video(batch: WorldBatch, tmp_path: Path) -> Path:
    return write_video(tmp_path / "a clip 'ü'.mp4", batch.video[0], 8)


def test_files_hold_the_truth(batch, video, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct, "load_geometry_model", lambda source: TrueModel(batch))
    out = tmp_path / "out"
    found = reconstruct_video(video, out, model="true")
    truth = batch.geometry(every=4)
    assert found.clip.index == [0, 4, 8, 12, 16]
    poses, seconds = read_tum(out / "cameras.tum.txt")
    np.testing.assert_allclose(poses, truth.cam2world[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(seconds, [0, 0.5, 1, 1.5, 2])
    colmap, intrinsics, names = read_colmap(out / "colmap")
    np.testing.assert_allclose(colmap, poses, atol=1e-5)
    np.testing.assert_allclose(intrinsics, truth.intrinsics[0].numpy(), rtol=1e-5)
    assert all((out / "images" / name).is_file() for name in names)
    scale = json.loads((out / "depth" / "scale.json").read_text())
    counts = np.stack([cv2.imread(str(out / "depth" / name), cv2.IMREAD_UNCHANGED) for name in names])
    assert counts.dtype == np.uint16 and scale["unit"] == "metres"
    np.testing.assert_allclose(counts * scale["scale"], truth.depth[0].numpy(), atol=scale["scale"])
    masks = np.stack([cv2.imread(str(out / "mask" / name), cv2.IMREAD_GRAYSCALE) for name in names]) > 0
    assert (masks == truth.dynamic_mask[0].numpy()).all()
    points, colours = read_ply(out / "points.ply")
    assert len(points) > 1000 and colours is not None
    moved = read_ply(out / "points_moving.ply")[0] if masks.any() else []
    assert len(points) + len(moved) == len(found.cloud.points)
    with np.load(out / "geometry.npz") as arrays:
        assert arrays["depth"].shape == (5, 32, 48) and arrays["frame_index"].tolist() == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("lgm", [None, "embedded"])
def test_the_embedded_models_read_a_clip(video, tmp_path, capsys, lgm):
    arguments = ["reconstruct", str(video), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments + (["--lgm", lgm] if lgm else [])) == 0
    said = capsys.readouterr().out
    assert "17 frames of 48x32 pixels, seen as 5 views" in said and "index.html" in said
    assert main([*arguments, "--views", "2"]) == 0  # an earlier reconstruction is replaced
    assert len(list((tmp_path / "out" / "depth").glob("*.png"))) == 2


def test_a_network_of_other_patches_sees_a_size_that_it_can_divide(tmp_path, monkeypatch):
    encoder = DinoConfig(dim=32, depth=3, heads=4, position_grid=5)
    sizes = {"dim": 48, "heads": 4, "layers": 6, "hooks": (2, 3), "widths": (8, 12, 16, 20), "features": 16}
    torch.manual_seed(0)
    network = Any4D(Any4DConfig(encoder=encoder, scale_hidden=12, **sizes))
    monkeypatch.setattr(reconstruct, "load_geometry_model", lambda source: network)
    noise = np.random.default_rng(0).integers(0, 255, (6, 45, 100, 3), dtype=np.uint8)
    clip = load_clip(write_video(tmp_path / "odd.mp4", noise, 24), 592)
    seen, prediction, _ = reconstruct._from_frames(clip, "any4d", 16, "cpu")
    assert prediction.size == seen.frames.shape[1:3] == (42, 84)  # 46x100 in the file, 3x6 patches of 14
    assert seen.index == [0, 4] and clip.source_size == (46, 100)


def test_choice_of_frames():
    assert evenly(17, 16, 4) == [0, 4, 8, 12, 16]
    assert evenly(81, 16, 4) == list(range(0, 81, 6)) and len(evenly(1000, 16, 4)) <= 16
    assert evenly(2, 16, 4) == [0, 1] and evenly(4, 16, 4) == [0, 3]
    assert for_latents(17, 16, 4) == list(range(17)) and for_latents(5, 16, 4) == [0, 1, 2, 3, 4]
    for count in (6, 30, 81, 256):
        for views in (2, 5, 16):
            chosen = for_latents(count, views, 4)
            assert (len(chosen) - 1) % 4 == 0 and 5 <= len(chosen) <= 4 * views - 3 and chosen[-1] < count
    assert fit((720, 1280), 592) == (333, 592) and fit((64, 64), 592) == (64, 64)
    with pytest.raises(UserError, match="--model"):
        for_latents(4, 16, 4)


def test_long_videos_are_thinned_while_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vggrpo.evaluation.clip_views.MOST_KEPT", 16)
    video = write_video(tmp_path / "long.mp4", np.zeros((40, 16, 16, 3), np.uint8), 30)
    clip = load_clip(video, 64)
    assert clip.source_frames == 40 and clip.index == list(range(0, 40, 4)) and len(clip.frames) == 10
    assert clip.seconds[1] == pytest.approx(4 / 30)


def test_bad_videos_are_one_line(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    whole = write_video(tmp_path / "whole.mp4", noise, 8).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_video(tmp_path / "one.mp4", noise[:1], 8)
    for name, message in [
        ("cut.mp4", "truncated"), ("empty.mp4", "no video"), ("one.mp4", "at least two"), ("none.mp4", "does not exist")
    ]:  # fmt: skip
        assert main(["reconstruct", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert main(["reconstruct", str(tmp_path / "whole.mp4"), "--output", str(tmp_path / "mine")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert (
        main(["reconstruct", str(tmp_path / "whole.mp4"), "--output", str(tmp_path / "o"), "--model", "no/such/model"])
        == 2
    )
    assert capsys.readouterr().err.count("\n") == 1


def test_an_lgm_of_another_vae_is_refused(video, tmp_path, capsys):
    for name in ("lgm", "geometry"):
        shutil.copytree(assets.path(name), tmp_path / name)
    config = json.loads((tmp_path / "lgm" / "config.json").read_text())
    (tmp_path / "lgm" / "config.json").write_text(json.dumps(config | {"temporal_stride": 2}))
    (tmp_path / "p.txt").write_text("a room\n")
    for command in (["reconstruct", str(video)], ["generate", "--prompts", str(tmp_path / "p.txt"), "--best-of", "2"]):
        assert main([*command, "--output", str(tmp_path / "out"), "--lgm", str(tmp_path / "lgm")]) == 2
        assert "frames a latent frame: 2 instead of 4" in capsys.readouterr().err


def test_view_says_what_is_missing_before_the_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("vggrpo.evaluation.live_view.find_spec", lambda name: None)
    assert main(["reconstruct", str(tmp_path / "none.mp4"), "--output", str(tmp_path / "out"), "--view"]) == 2
    assert "vggrpo[view]" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_live_view_has_the_cloud_and_one_camera_a_view(batch, video, tmp_path, monkeypatch):
    pytest.importorskip("viser", reason="the extra [view] is not installed")
    require_viser()
    monkeypatch.setattr(reconstruct, "load_geometry_model", lambda source: TrueModel(batch))
    server = start_server(reconstruct_video(video, tmp_path / "out", model="true"), port=18080)
    try:
        assert server.get_host() == "127.0.0.1"
        handles = server.scene._handle_from_node_name
        assert sum(name.startswith("/cameras/") for name in handles) == 5 and "/still" in handles
    finally:
        server.stop()
