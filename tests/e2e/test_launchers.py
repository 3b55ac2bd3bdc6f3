"""The real launchers: torchrun on one machine, torchrun of two machines (two agents on this one), accelerate, and
mpirun where there is one. Each trains the embedded model for an update and says the same as one process; accelerate
also makes an LGM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vggrpo.cli import main

pytestmark = pytest.mark.e2e
SETTINGS = [
    "tiny", "updates=1", "data.num_prompts=4", "data.num_frames=9", "lora.rank=2", "grpo.prompts_per_update=2",
    "grpo.samples_per_prompt=3", "grpo.base_travel_samples=1", "sampling={num_steps: 3, window: 1}",
]  # fmt: skip
TRAIN = ["vggrpo.cli", "train", *SETTINGS]
TRAIN_LGM = [
    "vggrpo.cli", "train-lgm", "lgm-tiny", "updates=2", "save_every=1", "clips.max_clips=4", "clips.num_frames=5",
    "clips.generated_share=0", "stitch.layer=0", "distill.batch=2", "distill.lora_rank=2", "video.device=cpu",
]  # fmt: skip
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m"]


def accelerate(*options):
    fixed = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *fixed, "--module"]


def finish(commands, output, what=TRAIN):
    """Exit codes and what was said; nothing that was started outlives the test."""
    with_output = [[*command, *what, f"output={output}"] for command in commands]
    jobs = [
        subprocess.Popen(
            command,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command in with_output
    ]
    try:
        said = [job.communicate(timeout=1800)[0] for job in jobs]
    finally:
        left = [job for job in jobs if job.poll() is None]
        for job in left:
            job.terminate()  # a launcher ends its processes, which may be in sessions of their own
        for job in left:
            try:
                job.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
    return [job.returncode for job in jobs], "\n".join(said)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    codes, said = finish([[sys.executable, "-m"]], output)
    assert codes == [0], said
    return row(output)


def rows(output):
    lines = (Path(output) / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("seconds/")} for line in lines]


def row(output):
    (only,) = rows(output)
    return only


def same(row, alone, rounding=("loss", "ratio_deviation")):
    """All but what is zero up to `rounding`."""
    assert row.keys() == alone.keys()
    for key, value in alone.items():
        if value is None or key in rounding:
            continue
        assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def two_machines():
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port())
    return [torchrun(*meeting, "--node-rank", rank) for rank in ("0", "1")]


def mpirun():
    """Open MPI's; root may only start it when it says so, as in a container."""
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun here (Debian: openmpi-bin)")
    meeting = ("-x", "MASTER_ADDR=127.0.0.1", "-x", f"MASTER_PORT={port()}")
    return [["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", *meeting, sys.executable, "-m"]]


@pytest.mark.parametrize(
    "commands",
    [
        lambda: [torchrun("--nproc-per-node", "2", "--master-port", port())],
        two_machines,
        lambda: [accelerate("--multi_gpu", "--num_processes", "2", "--main_process_port", port())],
        mpirun,
    ],
    ids=["torchrun", "torchrun of two machines", "accelerate", "mpirun"],
)
def test_two_processes_say_what_one_says(alone, tmp_path, commands):
    commands = commands()
    codes, said = finish(commands, tmp_path)
    assert codes == [0] * len(commands), said
    assert said.count("weights in") == 1
    same(row(tmp_path), alone)


def test_accelerate_makes_one_lgm_and_goes_on(tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"

    def train():
        command = accelerate("--multi_gpu", "--num_processes", "2", "--main_process_port", port())
        codes, said = finish([command], both, TRAIN_LGM)
        assert codes == [0] and said.count("written:") == 1, said
        return load_file(both / "lgm" / "model.safetensors")

    assert main([*TRAIN_LGM[1:], f"output={alone}"]) == 0
    made = train()
    for two, one in zip(rows(both), rows(alone), strict=True):
        same(two, one, rounding=())
    first, _ = (both / "log.jsonl").read_text().splitlines()
    shutil.rmtree(both / "checkpoints" / "step-000002")  # as if it had been stopped after the first update
    shutil.rmtree(both / "lgm")
    for _ in ("stopped", "finished"):
        again = train()
        assert again.keys() == made.keys() and all(torch.equal(again[name], made[name]) for name in made)
        kept, _ = (both / "log.jsonl").read_text().splitlines()
        assert kept == first  # with its seconds: not made again


def test_accelerate_on_cpus_would_start_one_and_is_refused(tmp_path):
    codes, said = finish([accelerate("--cpu", "--num_processes", "2")], tmp_path)
    assert codes != [0] and "torchrun --nproc-per-node" in said
    assert not (tmp_path / "log.jsonl").exists()
