"""The doctor's estimates against known answers, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vggrpo import doctor
from vggrpo.cli import main
from vggrpo.errors import UserError
from vggrpo.lgm import LatentGeometryModel, LGMConfig
from vggrpo.models import memory
from vggrpo.models.any4d import Any4D, Any4DConfig


def test_parameters_of_known_models():
    assert memory.SHAPES["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].parameters == pytest.approx(1.39e9, rel=0.01)
    assert memory.SHAPES["Wan-AI/Wan2.2-TI2V-5B-Diffusers"].parameters == pytest.approx(4.91e9, rel=0.01)


def test_parameters_agree_with_diffusers():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=64, num_layers=3, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16,
    )  # fmt: skip
    matrices = sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2)
    assert memory.TransformerShape(dim=24, ffn_dim=64, layers=3).parameters == matrices


def test_tokens_of_the_papers_resolution():
    assert memory.SHAPES["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].tokens(81, 480, 832) == 21 * 30 * 52
    assert memory.SHAPES["Wan-AI/Wan2.2-TI2V-5B-Diffusers"].tokens(81, 704, 1280) == 21 * 22 * 40
    assert memory.TransformerShape(8, 8, 1).tokens(1, 64, 64) == 16


def test_shape_of_a_directory(tmp_path):
    for part, values in (
        ("transformer", {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": 6}),
        ("vae", {"scale_factor_spatial": 16}),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(values))
    assert memory.pipeline_shape(str(tmp_path)) == memory.TransformerShape(128, 512, 6, 16)
    with pytest.raises(UserError, match="no diffusers Wan directory"):
        memory.pipeline_shape(str(tmp_path / "vae"))


def test_a_recipes_memory_follows_its_fields(tmp_path):
    recipe = tmp_path / "r.yaml"
    name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    recipe.write_text(
        f"model: {{path: {name}, dtype: bfloat16, gradient_checkpointing: true}}\nlgm: {{path: nowhere}}\n"
        "data: {num_frames: 81, height: 480, width: 832}\ngrpo: {micro_batch: 2}\nlora: {rank: 16}\n"
        "sampling: {offload: true}\n"
    )
    expected = memory.training_memory(memory.SHAPES[name], 21 * 30 * 52, rank=16, batch=2)
    expected += 4 * memory.ANY4D / 1024**3
    stages = doctor.recipe_memory(str(recipe))
    assert stages["update"] == pytest.approx(expected) and stages["encode"] > 10
    recipe.write_text(recipe.read_text().replace("offload: true", "offload: false"))
    kept = 32 * 5 * 16 * 21 * 60 * 104 * 4 / 1024**3  # videos x states x latents x float32
    assert doctor.recipe_memory(str(recipe))["update"] == pytest.approx(expected + kept)
    with pytest.raises(UserError, match="no config"):
        doctor.recipe_memory("no-such-recipe")


@pytest.mark.parametrize("recipe", [name for name in doctor.RECIPES if "1gpu" in name])
def test_one_gpu_recipes_fit_their_gpu(recipe):
    """By the estimate, with 2 GiB to spare after the first update; cards of 24 GB have 24 GiB, of 80 GB 80 GiB."""
    stages = doctor.recipe_memory(recipe)
    limit = 24 if recipe.endswith("24gb") else 80
    assert max(stages["roll-out"], stages["reward"], stages["update"]) + 2 < limit and stages["encode"] < limit


def test_parameters_of_the_geometry_model():
    with torch.device("meta"):
        geometry = Any4D(Any4DConfig())
        assert sum(parameter.numel() for parameter in geometry.parameters()) == memory.ANY4D
        config = LGMConfig(geometry="", vae="", latent_channels=16, stride=2, lora_rank=64, backend="any4d")
        lgm = LatentGeometryModel(config, geometry)
        lgm.add_lora()
    lora = sum(parameter.numel() for name, parameter in lgm.named_parameters() if "lora_" in name)
    assert lora == 64 * memory.ANY4D_LORA
    assert lgm.connector.conv.weight.numel() == 16 * memory.ANY4D_CONNECTOR


@pytest.mark.parametrize("recipe", doctor.LGM_RECIPES)
def test_lgm_recipes_fit_a_card_of_80_gb(recipe, tmp_path):
    """With a tenth to spare; and not without making activations again, nor with the batch in one piece."""
    stages = doctor.lgm_recipe_memory(recipe)
    assert 0 < max(stages.values()) < 72
    shipped = (Path(__file__).parents[2] / "configs" / f"{recipe}.yaml").read_text()
    for field, other in (("gradient_checkpointing: true", "gradient_checkpointing: false"), ("micro_batch: 1, g", "g")):
        assert field in shipped
        (tmp_path / "r.yaml").write_text(shipped.replace(field, other))
        worse = doctor.lgm_recipe_memory(str(tmp_path / "r.yaml"))
        assert worse["distill"] > 89 and worse["cache"] == stages["cache"]


def test_every_shipped_recipe_is_in_the_report():
    shipped = {file.stem for file in (Path(__file__).parents[2] / "configs").glob("*.yaml")}
    assert {name for name in shipped if not name.startswith(("lgm-", "benchmark-"))} == set(doctor.RECIPES)
    lgm = {name for name in shipped if name.startswith("lgm-")}
    assert lgm - {"lgm-tiny"} == set(doctor.LGM_RECIPES)  # the embedded one is for laptops


def test_memory_grows_with_each_part_and_starts_at_the_weights():
    shape = memory.SHAPES["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    weights = 2 * shape.parameters / 1024**3
    assert memory.training_memory(shape, tokens=0, rank=0) == pytest.approx(weights)
    base = memory.training_memory(shape, tokens=1000, rank=32)
    assert base > weights
    assert memory.training_memory(shape, tokens=2000, rank=32) > base
    assert memory.training_memory(shape, tokens=1000, rank=64) > base
    assert memory.training_memory(shape, tokens=1000, rank=32, checkpointing=False) > 5 * (base - weights)
    double = memory.training_memory(shape, tokens=1000, rank=32, batch=2)
    assert double == pytest.approx(memory.training_memory(shape, tokens=2000, rank=32))


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
    for name in (*doctor.RECIPES, *doctor.LGM_RECIPES, *(weights.repository for weights in doctor.WEIGHTS)):
        assert name in output
