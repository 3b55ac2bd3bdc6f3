"""Each command calls its library function with arguments that the function really takes."""

from __future__ import annotations

import importlib
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

from vggrpo.cli import main
from vggrpo.config import load_config
from vggrpo.models.loading import pick_device
from vggrpo.rewards.registry import audited_options


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str):
    """Replace a function by a recorder that refuses arguments the function does not have."""
    target = importlib.import_module(module)
    recorder = create_autospec(getattr(target, name), return_value=Path("result"))
    monkeypatch.setattr(target, name, recorder)
    return recorder


def test_demo(monkeypatch):
    call = stand_in(monkeypatch, "vggrpo.demo", "run_demo")
    assert main(["demo", "--output", "out", "--seed", "3", "--updates", "2", "--fresh"]) == 0
    call.assert_called_once_with(Path("out"), seed=3, updates=2, fresh=True)


def test_train(monkeypatch, capsys):
    call = stand_in(monkeypatch, "vggrpo.posttraining", "train")
    assert main(["train", "tiny", "updates=2", "output=runs/x"]) == 0
    (config,) = call.call_args.args
    assert config.updates == 2 and config.output == "runs/x"
    assert "result" in capsys.readouterr().out


def test_train_refuses_bad_configs_without_loading_the_trainer(tmp_path, capsys):
    for arguments, message in [
        (["no-such-recipe"], "no-such-recipe"),
        (["tiny", "updatess=3"], "'updates'"),
        (["tiny", "updates=many"], "updates"),
        (["tiny", "updates"], "key=value"),
    ]:
        assert main(["train", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_generate(monkeypatch, tmp_path):
    call = stand_in(monkeypatch, "vggrpo.sampling.generate", "generate_videos")
    (tmp_path / "p.txt").write_text("a red ball\n\nein grüner Würfel\n", encoding="utf-8")
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--output", "out", "--seeds", "2", "--seed", "5"]
    assert main(["generate", *arguments]) == 0
    assert call.call_args.args[0] == ["a red ball", "ein grüner Würfel"]
    assert list(call.call_args.kwargs["seeds"]) == [5, 6] and call.call_args.kwargs["arm"] == "base"
    assert main(["generate", *arguments, "--lora", "lora"]) == 0
    assert call.call_args.kwargs["arm"] == "tuned" and call.call_args.kwargs["lora"] == Path("lora")


def test_generate_reads_its_prompts_first(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["generate", "--prompts", str(tmp_path / "empty.txt"), "--output", str(tmp_path / "out")]) == 2
    assert "holds no prompt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_generate_refuses_a_reward_that_nothing_asks_for(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red ball\n")
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out")]
    assert main(["generate", *arguments, "--reward", "camera_motion_smoothness"]) == 2
    assert "--best-of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["demo"], ["audit-reward"], ["analyze-lgm", "--clips", "1"], ["world", "pretrain", "judge"], ["world", "sample"]],
    ids=lambda words: words[1] if words[0] == "world" else words[0],
)
def test_an_output_that_is_a_file_is_refused_before_any_work(command, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main([*command, "--output", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "is a file, not a directory" in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_world_pretrain_looks_for_its_start_before_it_renders(tmp_path, capsys):
    start = ["--start", str(tmp_path / "none")]
    assert main(["world", "pretrain", "judge", "--output", str(tmp_path / "out"), *start]) == 2
    assert "no model to start from" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_audit_reward(monkeypatch):
    call = stand_in(monkeypatch, "vggrpo.evaluation.audit", "audit_reward")
    assert main(["audit-reward", "--output", "out", "--clips", "8"]) == 0
    same = dict(clips=8, seed=0, batch=8, video_model=None, judge=None, num_frames=17, size=(64, 64), prompts=None,
                steps=10, guidance_scale=1.0, dtype="float32")  # fmt: skip
    tiny = audited_options(load_config("tiny").rewards)
    assert tiny["camera_motion_smoothness"]["eps_rotation"] > 1e-3
    call.assert_called_once_with("embedded", Path("out"), **same, options=tiny, device=pick_device("auto"))
    cpu = ["--device", "cpu"]
    assert main(["audit-reward", "--output", "out", "--clips", "8", "--recipe", "wan2.1-t2v-1.3b", *cpu]) == 0
    call.assert_called_with(
        "embedded", Path("out"), **same, options={}, device=torch.device("cpu")
    )  # that recipe keeps the defaults


def test_world_pretrain(monkeypatch):
    call = stand_in(monkeypatch, "vggrpo.pretraining", "pretrain")
    assert main(["world", "pretrain", "judge", "--output", "out"]) == 0
    same = dict(steps=None, start=None)
    call.assert_called_once_with("judge", Path("out"), **same, device="auto", batch_scale=1)
    assert main(["world", "pretrain", "judge", "--output", "out", "--device", "cpu", "--batch-scale", "8"]) == 0
    call.assert_called_with("judge", Path("out"), **same, device="cpu", batch_scale=8)


def test_world_pretrain_looks_for_its_device_before_it_renders(tmp_path, capsys):
    assert main(["world", "pretrain", "judge", "--output", str(tmp_path / "out"), "--device", "gpu"]) == 2
    error = capsys.readouterr().err
    assert "is no device" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
