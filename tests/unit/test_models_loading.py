"""One loader for geometry models: what it recognises, what it refuses, and what it says first."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vggrpo import assets
from vggrpo.errors import UserError
from vggrpo.lgm import LatentGeometryModel
from vggrpo.lgm.model import geometry_licence
from vggrpo.models import GeometryModel, load_geometry_model
from vggrpo.models.attributes import AttributeClassifier
from vggrpo.models.licences import WEIGHTS, licence_of
from vggrpo.models.loading import pick_device
from vggrpo.models.pretrained import read_weights
from vggrpo.models.vggt import VGGT, VGGTConfig


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    VGGT(VGGTConfig(dim=32, heads=2, conv_layers=1, pairs=2, hooks=(1, 2), head_features=8)).save_pretrained(tmp_path)
    return tmp_path


def refused(source: Path | str, *words: str) -> None:
    with pytest.raises(UserError) as error:
        load_geometry_model(source)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    for word in words:
        assert word in text, text


def test_what_was_saved_is_loaded_and_satisfies_the_protocol(directory: Path) -> None:
    before = torch.get_rng_state()
    model = load_geometry_model(directory)
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing
    assert isinstance(model, VGGT) and isinstance(model, GeometryModel)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    state = load_file(directory / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_that_do_not_fit_are_counted_in_one_line(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    odd = {name.replace("frame_blocks", "pink_blocks"): value for name, value in state.items()}
    save_file(odd, directory / "model.safetensors")
    count = sum("frame_blocks" in name for name in state)
    refused(
        directory, "do not fit", f"{count} missing (frame_blocks.0.", f"{count} unexpected (pink_blocks.0.", ", ..."
    )
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"head_features": 16}))
    save_file(state, directory / "model.safetensors")
    refused(directory, "of another shape (dense_head.")
    (directory / "config.json").write_text(json.dumps(values | {"colour": "red", "dim": 0}))
    refused(directory, "colour: Extra inputs", "dim: Input should be greater")


def test_what_is_no_geometry_model_is_refused(directory: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no geometry model", "nowhere is missing")
    refused(assets.path("attributes"), "'attribute_classifier'", "vggt")
    (directory / "config.json").unlink()
    refused(directory, "no known geometry model", "no config.json")
    (directory / "model.safetensors").unlink()
    refused(directory, "model.safetensors is missing")


def test_a_training_checkpoint_is_read_without_running_what_it_holds(tmp_path: Path) -> None:
    """As map-anything and its descendants write it: arguments of any kind beside the weights."""

    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'sprung')!r}, 'w')",))

    arguments = argparse.Namespace(lr=1e-4, output=tmp_path, names=Counter(a=1), seen=defaultdict(list), trap=Trap())
    weights, momentum = {"a": torch.arange(3.0)}, {"state": {0: torch.zeros(4)}}
    torch.save({"args": arguments, "model": weights, "optimizer": momentum, "epoch": 7}, tmp_path / "model.pth")
    got = read_weights(tmp_path / "model.pth")
    assert got.keys() == {"a"} and torch.equal(got["a"], weights["a"])
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(pickle.UnpicklingError):  # the names were allowed for that one call
        torch.load(tmp_path / "model.pth", weights_only=True)
    torch.load(tmp_path / "model.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()  # so it was a trap


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __init__(self, *call: object) -> None:
            self.call = call

        def __reduce__(self):
            return self.call[0], self.call[1:]

    target = str(tmp_path / "sprung")
    for call in ((Path.touch, Path(target)), (os.mkdir, target), (exec, f"open({target!r}, 'w')")):
        torch.save({"aggregator.camera_token": Trap(*call)}, tmp_path / "model.pt")
        refused(tmp_path / "model.pt", "cannot be read")
        torch.save(
            {"aggregator.camera_token": Trap(*call)}, tmp_path / "model.pt", _use_new_zipfile_serialization=False
        )
        refused(tmp_path / "model.pt", "cannot be read", "holds more than weights", "weights_only=False)['model']")
        assert not Path(target).exists()
    torch.save({"model": {"a": torch.ones(2)}, "optimizer": {"lr": 1}}, tmp_path / "model.pt")
    assert set(read_weights(tmp_path / "model.pt")) == {"a"}
    torch.save({"a": [1, 2]}, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "something else than weights")
    (tmp_path / "model.pt").write_bytes(b"no weights")
    refused(tmp_path / "model.pt", "no weights file", "copy it again")


@pytest.mark.parametrize("name", ["meta", "fpga", "cuda:99"])
def test_a_device_that_cannot_compute_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"use auto(, cpu or cuda| or cpu)$") as error:
        pick_device(name)
    assert "\n" not in str(error.value)


def test_the_licence_is_said_before_the_hub_is_asked(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    import huggingface_hub

    def offline(name: str, **_: object) -> str:
        assert "CC BY-NC 4.0" in caplog.text and name == "facebook/VGGT-1B"
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with caplog.at_level(logging.WARNING):
        refused("facebook/VGGT-1B", "ConnectionError", "licence must be accepted")


@pytest.mark.parametrize(
    ("telltale", "kind", "words"),
    [
        ("aggregator.camera_token", "vggt", "VGGT-1B is CC BY-NC 4.0 (non-commercial)"),
        ("scene_flow_dpt_regressor_head.conv1.weight", "any4d", "Any4D's is not stated: ask its authors"),
        ("model.backbone.pretrained.camera_token", "depth_anything_3", "large and giant CC BY-NC 4.0"),
    ],
)
def test_the_licence_of_public_weights_in_a_folder_is_said(
    telltale: str, kind: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the names in the file, and before it turns out that they do not fit."""
    (tmp_path / "config.json").write_text('{"dim": 0}')
    save_file({telltale: torch.zeros(1, 1, 1)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING), pytest.raises(UserError):
        load_geometry_model(tmp_path)
    (said,) = caplog.messages
    assert f"{tmp_path} holds weights of {kind}; licence: as the publisher of" in said and words in said


def test_the_licence_of_a_copy_on_the_hub_is_said_by_its_kind(monkeypatch, tmp_path, caplog) -> None:
    import huggingface_hub

    (tmp_path / "config.json").write_text('{"dim": 0}')
    save_file({"aggregator.camera_token": torch.zeros(1, 1, 1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with caplog.at_level(logging.WARNING), pytest.raises(UserError):
        load_geometry_model("someone/VGGT-1B-copy")
    assert any("VGGT-1B is CC BY-NC 4.0 (non-commercial)" in message for message in caplog.messages)


def test_what_was_saved_here_is_loaded_without_a_word(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_geometry_model(directory)
    assert not caplog.messages


def test_every_kind_has_a_licence_and_none_is_empty() -> None:
    assert all(weights.licence for weights in WEIGHTS)
    assert licence_of("depth-anything/DA3-SMALL", "depth_anything_3") == "Apache-2.0"
    assert "VGGT-1B-Commercial" in licence_of("/data/weights", "vggt") and "/data/weights" in licence_of(
        "/data/weights", "x"
    )
    assert (
        licence_of("embedded", "vggt") == licence_of(assets.path("judge"), "vggt") == "Apache-2.0, shipped with vggrpo"
    )


def test_the_licence_behind_an_lgm_is_read_off_its_config(tmp_path: Path) -> None:
    assert geometry_licence(assets.path("lgm")).startswith("Apache-2.0")
    values = json.loads((assets.path("lgm") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"geometry": "facebook/VGGT-1B"}))
    assert "non-commercial" in geometry_licence(tmp_path)
    assert "unknown" in geometry_licence(tmp_path / "nowhere")


def test_the_other_two_say_it_the_same_way(tmp_path: Path) -> None:
    AttributeClassifier(["camera:fixed"], width=8).save_pretrained(tmp_path)
    save_file({"pink": torch.ones(1)}, tmp_path / "model.safetensors")
    for kind, words in ((AttributeClassifier, "1 unexpected"), (LatentGeometryModel, "latent geometry model")):
        with pytest.raises(UserError, match=words) as error:
            kind.from_pretrained(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_an_lgm_refuses_a_geometry_model_of_another_kind(tmp_path: Path) -> None:
    values = json.loads((assets.path("lgm") / "config.json").read_text())
    geometry = str(assets.path("geometry"))
    (tmp_path / "config.json").write_text(json.dumps(values | {"geometry": geometry, "backend": "any4d"}))
    (tmp_path / "model.safetensors").write_bytes((assets.path("lgm") / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="made for a geometry model of type 'any4d'"):
        LatentGeometryModel.from_pretrained(tmp_path)
