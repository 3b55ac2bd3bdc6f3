"""Better shipped models within a time limit on one GPU.

    python benchmarks/pretrain_gpu.py --output runs/gpu --seconds 780

Goes on from the shipped models: clips are rendered, then networks are trained in turn (geometry, judge, the LGM on the
new geometry; the attribute classifier and the generator if they are given a share, the VAE never), with as many steps
as fit into a network's share of the time. OUTPUT/NAME always holds the best network so far in its final form, the
shipped one at first: it is replaced when held-out clips that are not those of the card say that it got better, so the
script may be killed at any time. The same command goes on with what is unfinished, with a new time limit. Killed before
the LGM's turn, the LGM in OUTPUT is the shipped one in front of the new geometry network.

At the end each card.json gets the numbers that `vggrpo world pretrain` writes, and the LGM its audit.

In small, on a CPU, as tests/e2e/test_pretrain_in_time.py runs it:

    python benchmarks/pretrain_gpu.py --output runs/gpu-try --seconds 20 --device cpu --clips 8 --steps 1 --generated 2

Written for CUDA and checked on the CPU and with a pretended device (tests/pretend_device.py); not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vggrpo import assets
from vggrpo.commands.arguments import at_least, number
from vggrpo.config import load_config
from vggrpo.errors import UserError
from vggrpo.evaluation.audit import audit_reward
from vggrpo.io.atomic import atomic_write_json, ensure_directory
from vggrpo.lgm import LatentGeometryModel
from vggrpo.models.attributes import AttributeClassifier
from vggrpo.models.loading import pick_device
from vggrpo.models.vggt import VGGT
from vggrpo.models.wan import WanVideoModel
from vggrpo.pretraining import attributes, data, generator, geometry, lgm
from vggrpo.pretraining.data import HELDOUT_SEED, Shards, render_shard, scene_drawer
from vggrpo.pretraining.loop import Schedule, Watch
from vggrpo.rewards.registry import audited_options

# In the order of training; the generator's clips are what the LGM learns from.
SHARES = {"attributes": 0.0, "generator": 0.0, "geometry": 0.4, "judge": 0.15, "lgm": 0.45}
RENDER_SHARE = 0.25  # of all seconds, at most
RESERVE = 0.1  # of all seconds, for cards and audit
SAVES = 12  # a network: held-out score, and its files if it is the best
# A schedule's last steps are its best: a network plans for less than its share, and may be late by some of it.
PLANNED, SLACK = 0.9, 0.1
CALIBRATION = 20  # steps
# Errors that count as one: the bars of docs/results.md.
BARS = {"abs_rel": 0.03, "translation": 0.125, "rotation": 0.125}


class TimeUpError(Exception):
    """A network's share is used up."""


@dataclass(frozen=True)
class Task:
    """How one network is trained.

    Attributes:
        schedule: the recipe's.
        run: train by a schedule, in a folder.
        network: the network in what the training loop averages.
        score: held-out card of a network, and how bad it is.
        save: write the network's files.
    """

    schedule: Schedule
    run: Callable[[Schedule, Path, Watch | None], object]
    network: Callable[[Any], nn.Module]
    score: Callable[[nn.Module, Shards], tuple[dict[str, Any], float]]
    save: Callable[[nn.Module], None]


@dataclass(frozen=True)
class Shop:
    """What all networks are made with.

    Attributes:
        clips: to train on.
        select: held-out clips that choose between a network's states.
        heldout: those of the cards.
    """

    output: Path
    device: torch.device
    clips: Shards
    select: Shards
    heldout: Shards
    generated: int
    paths: list[Path]


def geometry_task(name: str, shop: Shop) -> tuple[Task, nn.Module]:
    """The teacher or the judge, and its best state so far."""
    start = VGGT.from_pretrained(shop.output / name)
    recipe = {"geometry": geometry.TEACHER_SCHEDULE, "judge": geometry.JUDGE_SCHEDULE}[name]

    def score(model: nn.Module, clips: Shards) -> tuple[dict[str, Any], float]:
        card = geometry.measure_geometry(model, clips)
        relative = {k: card[k] / card.get(f"{k}_of_mean", 1.0) for k in BARS}
        return card, sum(relative[k] / bar for k, bar in BARS.items())

    task = Task(
        recipe,
        lambda schedule, folder, watch: geometry.train_geometry(
            shop.clips, folder, start.config, schedule, start=start, watch=watch
        ),
        lambda average: average.network,
        score,
        lambda model: model.save_pretrained(shop.output / name, torch.float16),
    )
    return task, deepcopy(start).to(shop.device).eval()


def lgm_task(shop: Shop) -> tuple[Task, nn.Module]:
    """The LGM on the geometry network that OUTPUT holds now."""
    output, device = shop.output, shop.device
    teacher = VGGT.from_pretrained(output / "geometry").requires_grad_(False).to(device).eval()
    video_model = WanVideoModel.from_pretrained(output / "pipeline", device)
    start = lgm.parts_of(output / "lgm")
    config = lgm.config_for(start.layer, video_model, teacher)
    cache = output / "work" / "generated.safetensors"
    made = lgm.generated_clips(output / "pipeline", cache, prompts=shop.generated, device=device)
    clips = lgm.EncodedClips(shop.clips, video_model)

    def score(model: nn.Module, clips: Shards) -> tuple[dict[str, Any], float]:
        card = lgm.measure_lgm(model, teacher, lgm.EncodedClips(clips, video_model))
        return card, sum(card["lgm"][k] / card["rgb"][k] for k in BARS)

    task = Task(
        lgm.SCHEDULE,
        lambda schedule, folder, watch: lgm.train_lgm(
            teacher, clips, start, config, folder, schedule, made, watch=watch
        ),
        lambda average: lgm.compressed(average[0], teacher),
        score,
        lambda model: model.save_pretrained(output / "lgm", torch.float16),
    )
    return task, LatentGeometryModel.from_pretrained(output / "lgm").to(device)


def attributes_task(shop: Shop) -> tuple[Task, nn.Module]:
    """The classifier of what a clip shows."""
    start = AttributeClassifier.from_pretrained(shop.output / "attributes")

    def score(model: nn.Module, clips: Shards) -> tuple[dict[str, Any], float]:
        card = attributes.measure_attributes(model, clips)
        return card, -card["recall"] - card["precision"]

    task = Task(
        attributes.SCHEDULE,
        lambda schedule, folder, watch: attributes.train_attributes(
            shop.clips, folder, schedule, start=start, watch=watch
        ),
        lambda average: average,
        score,
        lambda model: model.save_pretrained(shop.output / "attributes"),
    )
    return task, deepcopy(start).to(shop.device).eval()


def generator_task(shop: Shop) -> tuple[Task, None]:
    """Transformer and text encoder on the latents of the VAE as it is. No score: what is trained longer is better."""
    from diffusers import WanPipeline

    pipeline = shop.output / "pipeline"
    before = WanPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    vae, card = before.vae.to(shop.device).eval(), json.loads((pipeline / "card.json").read_text())
    latents = [generator.encode_latents(vae, path, shop.output / "latents") for path in shop.paths]

    def save(model: nn.Module) -> None:
        # Halved in place, hence the copies; a pipeline is many files, hence aside first.
        aside = shop.output / "work" / "pipeline"
        generator.save_pipeline(deepcopy(model).cpu(), deepcopy(vae).cpu(), aside)
        for file in filter(Path.is_file, aside.rglob("*")):
            file.replace(pipeline / file.relative_to(aside))

    task = Task(
        generator.SCHEDULE,
        lambda schedule, folder, watch: generator.train_generator(
            latents, shop.clips.texts, folder, schedule, start=before, device=shop.device, watch=watch
        ),
        lambda average: average,
        lambda model, clips: (card, -time.time()),
        save,
    )
    return task, None


def task_of(name: str, shop: Shop) -> tuple[Task, nn.Module | None]:
    """How the network is trained, and its best state so far where that has a score."""
    if name == "attributes":
        return attributes_task(shop)
    if name == "generator":
        return generator_task(shop)
    return lgm_task(shop) if name == "lgm" else geometry_task(name, shop)


def train(name: str, shop: Shop, seconds: float, batch_scale: int, steps: int | None) -> None:
    """Train one network for about so many seconds; OUTPUT/NAME holds its best state, then and at any time before."""
    began, plan_file = time.monotonic(), shop.output / "work" / "plan.json"
    plan = json.loads(plan_file.read_text()) if plan_file.is_file() else {}
    if plan.get(name, {}).get("finished"):
        return
    task, model = task_of(name, shop)
    recipe = replace(task.schedule, batch_scale=batch_scale)
    watched = time.monotonic()
    best = [float("inf") if model is None else task.score(model, shop.select)[1]]
    watched = time.monotonic() - watched
    say(network=name, step=0, score=best[0])
    if name not in plan:
        left = seconds - (time.monotonic() - began) - SAVES * watched
        plan[name] = {"steps": steps or steps_in(left, task, recipe, shop.output / "work" / f"{name}-calibration")}
        atomic_write_json(plan_file, plan)
    steps = plan[name]["steps"]
    last = [time.monotonic()]

    def watch(step: int, average: nn.Module) -> None:
        model = task.network(average)
        card, score = task.score(model, shop.select)
        say(network=name, step=step, of=steps, score=score, seconds=round(time.monotonic() - began, 1))
        if score < best[0]:
            best[0] = score
            task.save(model)
            write_card(shop.output, name, card)
        now = time.monotonic()
        if step < steps and now + (now - last[0]) > began + (1 + SLACK) * seconds:
            raise TimeUpError
        last[0] = now

    schedule = replace(recipe, steps=steps, save_every=-(-steps // SAVES))
    try:
        task.run(schedule, shop.output / "work" / name, watch)
        plan[name]["finished"] = True
        atomic_write_json(plan_file, plan)
    except TimeUpError:
        say(network=name, stopped="its time is used up; the same command goes on")


def steps_in(seconds: float, task: Task, recipe: Schedule, folder: Path) -> int:
    """Steps that fit, by a few that are thrown away: those of a longer run less those of a shorter one, because each
    begins and ends with work that is no step's. Before them some for the device to choose its kernels."""

    def timed(steps: int, number: int) -> float:
        began = time.monotonic()
        task.run(replace(recipe, steps=steps), folder / str(number), None)
        return time.monotonic() - began

    times = [timed(steps, number) for number, steps in enumerate((CALIBRATION, CALIBRATION, 3 * CALIBRATION))]
    shutil.rmtree(folder)
    a_step = max((times[2] - times[1]) / (2 * CALIBRATION), 1e-4)
    left = PLANNED * (seconds - sum(times))
    say(seconds_a_step=a_step, calibration=round(sum(times), 1))
    return max(1, int(left / a_step))


def write_card(output: Path, name: str, card: dict[str, Any]) -> None:
    """The card of a network; a generator's is its pipeline's."""
    atomic_write_json(output / ("pipeline" if name == "generator" else name) / "card.json", card)


def render(output: Path, clips: int, device: torch.device, deadline: float) -> tuple[list[Path], list[Path]]:
    """Shards of training clips, fewer when time is short, and two of held-out clips."""
    data.SHARD_SIZE = min(data.SHARD_SIZE, clips)
    train, heldout = output / "data" / "train", output / "data" / "heldout"
    with scene_drawer(device) as draw:
        held = [
            render_shard(heldout, i, split=None, first_seed=HELDOUT_SEED, device=device, draw=draw) for i in range(2)
        ]
        made: list[Path] = []
        for i in range(-(-clips // data.SHARD_SIZE)):
            if made and time.monotonic() > deadline:
                break
            made.append(render_shard(train, i, device=device, draw=draw))
    return made, held


def say(**what: Any) -> None:
    """One line of JSON."""
    print(json.dumps(what), flush=True)


def share(text: str) -> tuple[str, float]:
    """`lgm=0.5`."""
    name, _, value = text.partition("=")
    if name not in SHARES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SHARES)}")
    return name, number(0)(value)


def improve(arguments: argparse.Namespace) -> None:
    """Everything, in order."""
    began = time.monotonic()
    device, output = pick_device(arguments.device), ensure_directory(arguments.output)
    for name in assets.NAMES:
        if not (output / name).is_dir():
            aside = output / f"{name}.copy"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(assets.path(name), aside).rename(output / name)
    ensure_directory(output / "work")
    paths, held = render(output, arguments.clips, device, began + RENDER_SHARE * arguments.seconds)
    clips = Shards.load(paths, device=device)
    heldout, select = (Shards.load([path], device=device) for path in held)
    say(clips=len(clips), device=str(device), seconds=round(time.monotonic() - began, 1))
    shop = Shop(output, device, clips, select, heldout, arguments.generated, paths)
    shares = {name: value for name, value in (SHARES | dict(arguments.shares)).items() if value > 0}
    end = began + (1 - RESERVE) * arguments.seconds
    for i, name in enumerate(shares):
        # Of what is left now: what one network did not use goes to those after it.
        part = shares[name] / sum(list(shares.values())[i:])
        train(name, shop, part * (end - time.monotonic()), arguments.batch_scale, arguments.steps)
    for name in shares:
        if name != "generator":  # its card is the VAE's
            task, model = task_of(name, shop)
            assert model is not None
            write_card(output, name, task.score(model, shop.heldout)[0])
    if "lgm" in shares:
        options = audited_options(load_config("tiny").rewards)
        audit_reward(
            output / "lgm", output / "lgm", clips=arguments.audit, models=output, options=options, device=device
        )
    say(seconds=round(time.monotonic() - began, 1))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/pretrain-gpu"), help="default: %(default)s")
    parser.add_argument("--seconds", type=number(1), default=780.0, help="time limit (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--clips", type=at_least(2), default=10240, help="to train on, at most (default: %(default)s)")
    parser.add_argument("--generated", type=at_least(2), default=1536, help="clips for the LGM (default: %(default)s)")
    parser.add_argument("--audit", type=at_least(8), default=96, help="clips of each kind (default: %(default)s)")
    parser.add_argument("--batch-scale", type=at_least(1, most=1024), default=4, help="default: %(default)s")
    parser.add_argument("--steps", type=at_least(1), help="of each network, in place of what fits")
    parser.add_argument(
        "--shares", type=share, nargs="+", default=[], metavar="NAME=SHARE",
        help="of the time after rendering: " + ", ".join(f"{name}={value:g}" for name, value in SHARES.items()),
    )  # fmt: skip
    try:
        improve(parser.parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
