"""`model.compile`: the blocks go through torch.compile and train the same."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))


@pytest.mark.e2e
def test_compiled_blocks_train(tiny_wan_dir, tmp_path, monkeypatch):
    """With the backend that only traces: what the compiler makes of the graph is its own business."""
    from test_posttraining_trainer import rows
    from test_posttraining_trainer import train as run

    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    run(tiny_wan_dir, tmp_path / "compiled", ["model.compile=true"], updates=1)
    run(tiny_wan_dir, tmp_path / "plain", updates=1)
    ours, theirs = rows(tmp_path / "compiled")[0], rows(tmp_path / "plain")[0]
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor makes its kernels with a C++ compiler")
def test_compiled_kernels_give_the_same_gradient(tiny_wan_dir, tmp_path, monkeypatch):
    """With the compiler itself, and one video: every further shape would be compiled anew."""
    from test_posttraining_memory import grpo_of

    torch.compiler.reset()  # of one function so many versions are compiled, and others may have used them up
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    gradients = []
    for compiled in ("true", "false"):
        policy = grpo_of(tiny_wan_dir, tmp_path / compiled, f"model.compile={compiled}").policy
        torch.manual_seed(0)
        latents, text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 512, 16)
        policy.model.predict_velocity(latents, torch.tensor([0.5]), text).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters]))
    assert any((tmp_path / "kernels").rglob("*.cpp"))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()
