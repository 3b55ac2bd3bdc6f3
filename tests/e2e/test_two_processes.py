"""Data parallel training: two processes do what one does, and agree with each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[1] / "unit"
sys.path.insert(0, str(UNIT))


@pytest.mark.e2e
def test_two_processes_equal_one(tiny_wan_dir, tmp_path):
    """Same global batch: logged numbers agree to rounding (of another batch split), over two inner updates each."""
    from test_posttraining_trainer import rows, train

    train(tiny_wan_dir, tmp_path / "one")
    code = (
        f"import sys; sys.path[:0] = [{str(UNIT)!r}, {str(UNIT.parent)!r}]\n"
        "import torch, test_posttraining_trainer as t\n"
        "from vggrpo.posttraining import policy as trainer\n"
        "kept = []\n"
        "attach = trainer.attach_lora\n"
        "trainer.attach_lora = lambda *a, **k: kept.append(attach(*a, **k)) or kept[-1]\n"
        f"t.train({str(tiny_wan_dir)!r}, {str(tmp_path / 'two')!r})\n"
        "mine = torch.cat([p.detach().flatten() for p in kept[0]])\n"
        "both = [torch.empty_like(mine) for _ in range(2)]\n"
        "torch.distributed.all_gather(both, mine)\n"
        "assert torch.equal(*both), 'the processes drifted apart'\n"
    )
    port = str(20000 + os.getpid() % 20000)
    job = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=job | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for key in ("camera_travel", "grad_norm", "loss", "kl"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-2, abs=1e-6), key
