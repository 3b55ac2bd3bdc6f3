"""Who this process is, as launchers say it."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from vggrpo.distributed import Processes, announced
from vggrpo.errors import UserError
from vggrpo.posttraining import trainer


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            (1, 2, 1),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, (1, 2, 0)),
        ({"RANK": "0", "WORLD_SIZE": "2", "PMI_RANK": "5", "PMI_SIZE": "8"}, (0, 2, 0)),  # torchrun inside a job step
        ({"ACCELERATE_MIXED_PRECISION": "no"}, (0, 1, 0)),  # accelerate launch of one process
    ],
)
def test_launchers(environment, expected):
    assert announced(environment) == expected


def test_one_process_where_several_were_asked_for_is_an_error():
    with pytest.raises(UserError, match=r"started one.*torchrun --nproc-per-node"):
        announced({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    with pytest.raises(UserError, match="WORLD_SIZE is set to 2 and RANK is not"):
        announced({"WORLD_SIZE": "2"})


def test_processes_need_a_place_to_meet(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        Processes.join()


def test_patient_processes_meet_apart_and_wait_for_days(monkeypatch):
    """While one searches layers or makes the last clips, the others may wait longer than `join` allows."""
    made, met = [], []
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: made.append(options) or "room")
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: met.append(group))
    patient = Processes(1, 2).patient()
    patient.barrier()
    Processes(1, 2).barrier()
    assert met == ["room", None] and (patient.rank, patient.size) == (1, 2)
    assert made[0]["timeout"] >= timedelta(days=1) and made[0]["backend"] == "gloo"
    assert Processes().patient() == Processes() and len(made) == 1


def test_all_processes_go_on_from_one_checkpoint(monkeypatch, tmp_path):
    """The other process sees none."""
    monkeypatch.setattr(Processes, "gather", lambda self, values: torch.cat([values, torch.tensor([-1])]))
    trainer._check_shared(Processes(0, 2), tmp_path, None)
    with pytest.raises(UserError, match=r"step 3, none, by rank.*machines share"):
        trainer._check_shared(Processes(0, 2), tmp_path, SimpleNamespace(step=3))
