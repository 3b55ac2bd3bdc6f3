"""`vggrpo analyze-lgm` as a whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from lgm_material import SIZE, write_videos
from test_lgm_analysis import lgm

from vggrpo.cli import main
from vggrpo.models.vae import ImageVAE

pytestmark = pytest.mark.e2e


def test_the_command_on_real_files(tmp_path, capsys):
    """Videos from disk through an image autoencoder's files and an LGM's directory, all of random weights."""
    torch.manual_seed(0)
    vae = ImageVAE(4)
    (tmp_path / "vae").mkdir()
    for part in ("encoder", "decoder"):
        torch.save(getattr(vae, part).state_dict(), tmp_path / "vae" / f"tiny_{part}.pth")
    model = lgm(vae="image", latent_channels=4, temporal_stride=1)
    model.geometry.save_pretrained(tmp_path / "vggt")
    model.save_pretrained(tmp_path / "lgm")
    write_videos(tmp_path / "videos", 2, length=5)
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video")
    arguments = ["analyze-lgm", "--lgm", str(tmp_path / "lgm"), "--video-model", str(tmp_path / "vae")]
    arguments += ["--videos", str(tmp_path / "videos"), "--frames", "5", "--size", f"{SIZE[0]}x{SIZE[1]}"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert result["accuracy"]["clips"] == 2 and result["reference"] == "the RGB model on clean frames"
    assert len(result["noise"]["lgm"]["abs_rel"]) == len(result["noise"]["levels"])
    assert list(result["cost"]["5x32x48, this LGM"]) == ["rgb", "lgm_latent", "rewards"]
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert "Accuracy on 2 clips" in page and f"<td>{result['accuracy']['lgm_against_rgb']['abs_rel']:.4f}</td>" in page
    assert "TFLOP" in page and "plotly" in page
    assert "Accuracy on 2 clips" in capsys.readouterr().out
    for extra, words in (
        (["--video-model", "embedded"], "not of this video model's (channels: 4 instead of"),
        (["--device", "fpga"], "use auto, cpu or cuda"),
        (["--parts", "acuracy"], "no part called 'acuracy'"),
        (["--size", "30"], "multiple of"),
        (["--videos", str(tmp_path / "videos" / "bad.mp4")], "cannot be decoded"),
    ):
        assert main([*arguments, *extra, "--output", str(tmp_path / "not")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "not").exists()
