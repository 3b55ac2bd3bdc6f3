"""Checkpoints: whole or absent, newest whole one wins."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from vggrpo import checkpoint
from vggrpo.checkpoint import load_latest, random_states, save_checkpoint, seed_generators, set_random_states
from vggrpo.errors import UserError

CPU = torch.device("cpu")


def save(root, step, **options):
    return save_checkpoint(root, step, {"x": torch.full((3,), step)}, {"note": str(step)}, **options)


def test_round_trip_and_keep_last(tmp_path):
    assert load_latest(tmp_path / "none") is None
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    latest = load_latest(tmp_path)
    assert latest.step == 3 and latest.tensors["x"].tolist() == [3, 3, 3] and latest.state["note"] == "3"


@pytest.mark.parametrize("file", ["tensors.pt", "state.json", "checksums.json"])
def test_a_damaged_last_one_falls_back_and_says_so(tmp_path, caplog, file):
    save(tmp_path, 1)
    last = save(tmp_path, 2)
    (last / file).write_bytes((last / file).read_bytes()[:-7])
    assert load_latest(tmp_path).step == 1
    assert "damaged" in caplog.text


def test_all_damaged_is_an_error(tmp_path):
    (save(tmp_path, 1) / "tensors.pt").unlink()
    with pytest.raises(UserError, match="damaged"):
        load_latest(tmp_path)


def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert load_latest(tmp_path).step == 1


def test_a_write_that_fails_halfway_leaves_the_old_one(tmp_path):
    """The system itself refuses, in the middle of the file."""
    import resource

    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="older checkpoints are intact"):
            save_checkpoint(tmp_path, 2, {"x": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"] and load_latest(tmp_path).step == 1


def test_a_crash_while_writing_is_ignored(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-000002.abc.partial").mkdir()
    assert load_latest(tmp_path).step == 1


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(()).item(), np.random.normal(), np.random.rand(), random.gauss(0, 1), random.random()

    for _ in range(2):  # normal numbers come in pairs: once with one left over, once with none
        save_checkpoint(tmp_path, 1, {"random": [random_states(CPU)]}, {})
        expected = [draw() for _ in range(3)]
        set_random_states(load_latest(tmp_path).tensors["random"][0], CPU)
        assert [draw() for _ in range(3)] == expected
    seed_generators(2**40 + 1)
    seeded = draw()
    seed_generators(2**40 + 1)
    assert draw() == seeded


def test_a_checkpoint_of_torchs_random_state_alone_leaves_the_others(tmp_path):
    old = {"cpu": torch.get_rng_state()}
    expected = torch.rand(())
    before = random_states(CPU)
    set_random_states(old, CPU)
    after = random_states(CPU)
    assert torch.equal(after["numpy"], before["numpy"]) and torch.equal(after["python"], before["python"])
    assert torch.equal(torch.rand(()), expected)
