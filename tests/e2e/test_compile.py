"""`model.compile`: the blocks go through torch.compile and train the same."""

from __future__ import annotations

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
