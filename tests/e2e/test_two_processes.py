"""Several processes do what one does, agree with each other, and do not wait for the dead; killed runs go on."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "unit")]
pytestmark = pytest.mark.e2e
# A server that has imported everything once and runs nothing: its forks start at once and share no threads.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["training_job"])


def start(spec, tmp_path, size, by_rank=None):
    """Processes of one job, and where their standard errors go; `by_rank`: settings of a rank that differ."""
    import training_job

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    processes, errors = [], []
    for rank in range(size):
        errors.append(tmp_path / f"{Path(spec['output']).name}-{rank}.err")
        environment = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (spec | (by_rank or {}).get(rank, {}), environment, str(errors[-1]))
        processes.append(SERVER.Process(target=training_job.enter, args=arguments))
        processes[-1].start()
    return processes, errors


def finish(job):
    """Exit codes and standard errors."""
    processes, errors = job
    for process in processes:
        process.join(timeout=500)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, [file.read_text() for file in errors]


def run(spec, tmp_path, size=1):
    codes, errors = finish(start(spec, tmp_path, size))
    assert codes == [0] * size, "\n".join(errors)
    return Path(spec["output"])


@pytest.fixture(scope="module")
def one(tiny_wan_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run({"pipeline": tiny_wan_dir, "output": folder / "one", "record": folder / "gradients.pt"}, folder)
    return folder


def gradients(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("overrides", [[], ["model.shard=true"]], ids=["whole", "sharded"])
def test_two_processes_equal_one(tiny_wan_dir, one, tmp_path, overrides):
    """Same global batch: the same gradients (to rounding of another batch split) and the same kind of adapter; within
    the job, bit-equal parameters after each step."""
    from test_posttraining_trainer import rows

    spec = {"pipeline": tiny_wan_dir, "output": tmp_path / "two", "record": tmp_path / "gradients.pt"}
    run(spec | {"overrides": overrides}, tmp_path, size=2)
    ours, theirs = gradients(tmp_path / "gradients.pt"), gradients(one / "gradients.pt")
    assert len(ours) == len(theirs) == 4
    assert (ours[0] - theirs[0]).norm() < 1e-5 * theirs[0].norm()
    for mine, other in zip(ours[1:], theirs[1:], strict=True):  # Adam's first step turns rounding into signs
        assert (mine - other).norm() < 1e-2 * other.norm()
    for mine, other in zip(rows(tmp_path / "two"), rows(one / "one"), strict=True):
        for key in ("camera_travel", "camera_travel_base", "grad_norm", "kl"):
            assert mine[key] == pytest.approx(other[key], rel=1e-2, abs=1e-6), key
    first, second = (
        load_file(path / "lora" / "pytorch_lora_weights.safetensors") for path in (one / "one", spec["output"])
    )
    assert {k: (v.shape, v.dtype) for k, v in first.items()} == {k: (v.shape, v.dtype) for k, v in second.items()}


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "nft", "direct"])
def test_two_processes_equal_one_for_every_rival(tiny_wan_dir, tmp_path, algorithm):
    """The same gradients as one process to rounding, and (checked after each step in the job) parameters that are
    equal over the processes bit for bit. The shares are unequal: 3 prompts, and odd batches."""
    from test_posttraining_rivals import rows

    spec = {"pipeline": tiny_wan_dir, "algorithm": algorithm}
    if algorithm == "direct":
        spec["overrides"] = ["direct.prompts_per_update=1", "direct.samples_per_prompt=3"]
    for name, size in (("one", 1), ("two", 2)):
        run(spec | {"output": tmp_path / name, "record": tmp_path / f"{name}.pt"}, tmp_path, size)
    alone, together = gradients(tmp_path / "one.pt"), gradients(tmp_path / "two.pt")
    assert len(alone) == len(together) == (4 if algorithm == "nft" else 2)
    assert alone[0].norm() > 0 and (together[0] - alone[0]).norm() < 1e-4 * alone[0].norm()
    for mine, other in zip(together[1:], alone[1:], strict=True):  # Adam's first step turns rounding into signs
        assert (mine - other).norm() < 2e-2 * other.norm()
    for mine, other in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for key in ("loss", "grad_norm", "videos"):
            assert mine[key] == pytest.approx(other[key], rel=2e-2, abs=1e-6), key


def test_shares_need_not_be_equal(tiny_wan_dir, tmp_path):
    """Five videos a group over two processes: the same statistics as in one."""
    from test_posttraining_trainer import rows

    changes = {"grpo": {"prompts_per_update": 1, "samples_per_prompt": 5, "micro_batch": 6}, "updates": 1}
    for name, size in (("a", 1), ("b", 2)):
        run({"pipeline": tiny_wan_dir, "output": tmp_path / name, "changes": changes}, tmp_path, size)
    (alone,), (together,) = rows(tmp_path / "a"), rows(tmp_path / "b")
    for key in ("reward/camera_motion_smoothness", "group_std/camera_motion_smoothness", "grad_norm"):
        assert together[key] == pytest.approx(alone[key], rel=1e-3), key


def test_full_fine_tuning_with_split_weights_resumes_and_exports_whole_ones(tiny_wan_dir, tmp_path):
    from diffusers import WanTransformer3DModel

    overrides = ["model.tune=full", "model.shard=true", "optim.learning_rate=1e-4", "optim.ema=0.5"]
    spec = {"pipeline": tiny_wan_dir, "output": tmp_path / "parts", "overrides": overrides}
    run(spec | {"changes": {"updates": 1}}, tmp_path, size=2)
    run(spec, tmp_path, size=2)
    run(spec | {"output": tmp_path / "whole"}, tmp_path, size=2)
    states = [
        WanTransformer3DModel.from_pretrained(tmp_path / n / "transformer").state_dict() for n in ("parts", "whole")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_dead_process_ends_the_others_with_an_error(tiny_wan_dir, tmp_path):
    spec = {"pipeline": tiny_wan_dir, "output": tmp_path / "dead", "kill": {"rank": 1, "where": "replay", "number": 3}}
    codes, errors = finish(start(spec, tmp_path, 2))
    assert codes == [2, -signal.SIGKILL]
    assert "lost contact with another process" in errors[0] and "run again" in errors[0]


def test_a_signal_to_one_process_saves_and_ends_all(tiny_wan_dir, tmp_path):
    """As when a scheduler's warning reaches one machine first; the job then goes on as if it had never stopped."""
    spec = {"pipeline": tiny_wan_dir, "output": tmp_path / "told"}
    kill = {"rank": 1, "where": "replay", "number": 1, "signal": signal.SIGTERM}
    codes, errors = finish(start(spec | {"kill": kill}, tmp_path, 2))
    assert codes == [130, 130] and all("run again" in error for error in errors)
    (checkpoint,) = (tmp_path / "told" / "checkpoints").glob("step-*")
    assert checkpoint.name == "step-000001"
    run(spec, tmp_path, 2)
    run(spec | {"output": tmp_path / "whole"}, tmp_path, 2)
    adapters = [load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("told", "whole")]
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[1])


def test_machines_that_do_not_share_the_output_are_told_so(tiny_wan_dir, tmp_path):
    """One sees a checkpoint and would go on, the other none and would start afresh."""
    spec = {"pipeline": tiny_wan_dir, "output": tmp_path / "here"}
    run(spec | {"changes": {"updates": 1}}, tmp_path)
    codes, errors = finish(start(spec, tmp_path, 2, {1: {"output": tmp_path / "there"}}))
    assert codes == [2, 2]
    assert all("(step 1, none, by rank)" in error and "machines share" in error for error in errors)


@pytest.mark.parametrize(
    "kill",
    [
        {"where": "replay", "number": 8},  # two inner updates each: the second of update 3 (0 is the first)
        {"where": "write", "number": 4},
        {"where": "rename", "number": 4},
    ],
    ids=["in the update", "while the checkpoint is written", "before it gets its name"],
)
def test_six_updates_equal_three_a_kill_and_three(tiny_wan_dir, six, tmp_path, kill):
    from test_posttraining_trainer import assert_same_run

    spec = {"pipeline": tiny_wan_dir, "output": tmp_path / "killed", "changes": {"updates": 6}}
    codes, _ = finish(start(spec | {"kill": {"rank": 0} | kill}, tmp_path, 1))
    assert codes == [-signal.SIGKILL]
    saved = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*"))
    assert saved[-1] == "step-000003"
    run(spec, tmp_path)
    assert_same_run(tmp_path / "killed", six)


@pytest.fixture(scope="module")
def six(tiny_wan_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("six")
    return run({"pipeline": tiny_wan_dir, "output": folder / "six", "changes": {"updates": 6}}, folder)
