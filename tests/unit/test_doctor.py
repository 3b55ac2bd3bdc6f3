"""The doctor's estimates against known answers, and its report."""

from __future__ import annotations

import pytest

from vggrpo import doctor
from vggrpo.cli import main


def test_parameters_of_known_models():
    assert doctor.SHAPES["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].parameters == pytest.approx(1.39e9, rel=0.01)
    assert doctor.SHAPES["Wan-AI/Wan2.2-TI2V-5B-Diffusers"].parameters == pytest.approx(4.91e9, rel=0.01)


def test_parameters_agree_with_diffusers():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=64, num_layers=3, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16,
    )  # fmt: skip
    matrices = sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2)
    assert doctor.TransformerShape(dim=24, ffn_dim=64, layers=3).parameters == matrices


def test_tokens_of_the_papers_resolution():
    assert doctor.video_tokens(81, 480, 832, spatial_stride=8) == 21 * 30 * 52
    assert doctor.video_tokens(1, 64, 64, spatial_stride=8) == 16


def test_memory_grows_with_each_part_and_starts_at_the_weights():
    shape = doctor.SHAPES["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    weights = 2 * shape.parameters / 1024**3
    assert doctor.training_memory(shape, tokens=0, rank=0) == pytest.approx(weights)
    base = doctor.training_memory(shape, tokens=1000, rank=32)
    assert base > weights
    assert doctor.training_memory(shape, tokens=2000, rank=32) > base
    assert doctor.training_memory(shape, tokens=1000, rank=64) > base
    double = doctor.training_memory(shape, tokens=1000, rank=32, batch=2)
    assert double == pytest.approx(doctor.training_memory(shape, tokens=2000, rank=32))


def test_cache_is_looked_at_without_network(tmp_path, monkeypatch):
    assert not doctor.is_cached("owner/name", tmp_path)
    (tmp_path / "models--owner--name" / "snapshots").mkdir(parents=True)
    assert not doctor.is_cached("owner/name", tmp_path)
    (tmp_path / "models--owner--name" / "snapshots" / "abc").mkdir()
    assert doctor.is_cached("owner/name", tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert doctor.is_cached("owner/name")


def test_absent_packages_are_named():
    versions = doctor.package_versions(("torch", "surely-not-a-package"))
    assert versions["torch"][0].isdigit() and versions["surely-not-a-package"] == "not installed"


def test_report_names_devices_models_and_licences(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for word in ("torch", "cpu", "GiB", "pipeline", "judge", "Apache-2.0", "non-commercial", "not stated"):
        assert word in output
    for weights in doctor.WEIGHTS:
        assert weights.repository in output
