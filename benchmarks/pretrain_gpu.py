"""Better shipped models within a time limit on one GPU.

    python benchmarks/pretrain_gpu.py --output runs/gpu --seconds 560

Goes on from the shipped models: clips are rendered; then geometry network, generator and the VAE's decoder (the judge
and the attribute classifier, too, if they are asked for) are trained side by side, a process each, because networks as
small as these leave a GPU waiting for the next launch; then the LGM is stitched to what they have become, as `vggrpo
world pretrain lgm` does it. Learning rates and curricula follow the clock, so each has as many steps as time allows.
OUTPUT/NAME always holds the best network so far in its final form, the shipped one at first: it is replaced when
held-out clips that are not those of the card say that it got better, so the script may be killed at any time. The same
command goes on with what is unfinished, in the time that was left to it. Killed before its end, the LGM in OUTPUT is
the shipped one, which does not fit the new geometry network.

At the end each card.json gets the numbers that `vggrpo world pretrain` writes, and the LGM its audit.

In small, on a CPU, as tests/e2e/test_pretrain_in_time.py runs it:

    python benchmarks/pretrain_gpu.py --output runs/gpu-try --seconds 20 --device cpu --clips 8
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import nn

from vggrpo import assets
from vggrpo.commands.arguments import at_least, number
from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write_json, ensure_directory
from vggrpo.models.attributes import AttributeClassifier
from vggrpo.models.loading import pick_device
from vggrpo.models.vggt import VGGT
from vggrpo.pretraining import (
    REDRAWN_SHARDS,
    attributes,
    data,
    footage,
    generator,
    geometry,
    lgm,
    pretrain,
    redrawn_clips,
    vae,
)
from vggrpo.pretraining.data import HELDOUT_SEED, Shards, render_shard, scene_drawer
from vggrpo.pretraining.loop import Schedule, Watch

TOGETHER = ("geometry", "generator", "vae", "judge", "attributes")  # side by side; the LGM is made of the first three
NETWORKS = ("geometry", "generator", "vae", "lgm")
RENDER_SHARE = 0.25  # of all seconds, at most
RESERVE = 0.15  # of all seconds, for LGM, cards and audit
LGM_SHARDS = 4  # of clips, to stitch it
SAVES = 6  # a network: held-out score, and its files if it is the best
FOLDERS = {"generator": "pipeline", "vae": "pipeline"}  # of networks that are parts of one; others have their own
ENDING = 0.06  # of a network's time: the last score and the files
# Errors that count as one: the bars of docs/results.md.
BARS = {"abs_rel": 0.03, "translation": 0.125, "rotation": 0.125}


@dataclass(frozen=True)
class Task:
    """How one network is trained.

    Attributes:
        schedule: the recipe's.
        run: train by a schedule, in a folder.
        network: the network in what the training loop averages.
        save: write the network's files.
    """

    schedule: Schedule
    run: Callable[[Schedule, Path, Watch | None], object]
    network: Callable[[Any], nn.Module]
    save: Callable[[nn.Module], None]


@dataclass(frozen=True)
class Shop:
    """What all networks are made with.

    Attributes:
        train: files of the clips to train on.
        redrawn: files of the judge's other clips.
        footage: files of the generator's clips.
        select: held-out clips that choose between a network's states.
        heldout: those of the cards.
    """

    output: Path
    device: torch.device
    train: list[Path]
    redrawn: list[Path]
    footage: list[Path]
    select: Path
    heldout: Path

    def load(self, *paths: Path, **columns: bool) -> Shards:
        """Clips where they are trained on."""
        return Shards.load(paths, device=self.device, **columns)

    @classmethod
    def of(cls, output: Path, device: torch.device) -> Shop:
        """With what is rendered in OUTPUT."""
        train, redrawn, footage, held = (
            sorted((output / "data" / name).glob("*.safetensors"))
            for name in ("train", "redrawn", "footage", "heldout")
        )
        return cls(output, device, train, redrawn, footage, held[1], held[0])


def best_of(name: str, shop: Shop) -> nn.Module | None:
    """The network that OUTPUT holds; None for the generator, which has no score: the last is saved."""
    folder = shop.output / FOLDERS.get(name, name)
    if name == "generator":
        return None
    readers: dict[str, Callable[[Path], nn.Module]] = {
        "vae": load_vae, "attributes": AttributeClassifier.from_pretrained
    }  # fmt: skip
    return readers.get(name, VGGT.from_pretrained)(folder).to(shop.device).eval()


def load_vae(pipeline: Path) -> AutoencoderKLWan:
    """That of a pipeline, in full precision."""
    return AutoencoderKLWan.from_pretrained(pipeline / "vae", torch_dtype=torch.float32)


def measure(name: str, model: nn.Module, clips: Shards) -> tuple[dict[str, Any], float]:
    """Card of a network, and how bad it is."""
    if name == "vae":
        card = vae.measure_vae(model, clips)
        return card, -card["psnr"]
    if name == "attributes":
        card = attributes.measure_attributes(model, clips)
        return card, -card["recall"] - card["precision"]
    card = geometry.measure_geometry(model, clips)
    return card, sum(card[k] / card.get(f"{k}_of_mean", 1.0) / bar for k, bar in BARS.items())


def geometry_task(name: str, shop: Shop) -> Task:
    """The teacher or the judge."""
    start = VGGT.from_pretrained(shop.output / name)
    clips = shop.load(*shop.train, *(shop.redrawn if name == "judge" else ()))
    return Task(
        {"geometry": geometry.TEACHER_SCHEDULE, "judge": geometry.JUDGE_SCHEDULE}[name],
        lambda schedule, folder, watch: geometry.train_geometry(
            clips, folder, start.config, schedule, start=start, watch=watch
        ),
        lambda average: average.network,
        lambda model: model.save_pretrained(shop.output / name, torch.float16),
    )


def attributes_task(shop: Shop) -> Task:
    """The classifier of what a clip shows."""
    start = AttributeClassifier.from_pretrained(shop.output / "attributes")
    clips = shop.load(*shop.train, truth=False)
    return Task(
        attributes.SCHEDULE,
        lambda schedule, folder, watch: attributes.train_attributes(clips, folder, schedule, start=start, watch=watch),
        lambda average: average,
        lambda model: model.save_pretrained(shop.output / "attributes"),
    )


def vae_task(shop: Shop) -> Task:
    """The VAE's decoder; its encoder, whose latents all others are about, stays."""
    clips, pipeline = shop.load(*shop.train, truth=False), shop.output / "pipeline"
    return Task(
        vae.DECODER_SCHEDULE,
        lambda schedule, folder, watch: vae.train_decoder(
            load_vae(pipeline).to(shop.device), clips, folder, schedule, watch=watch
        ),
        lambda average: average,
        lambda model: save_parts(shop, None, model, ["vae"]),
    )


def generator_task(shop: Shop) -> Task:
    """Transformer and text encoder on the latents of the VAE as it is."""
    before = WanPipeline.from_pretrained(shop.output / "pipeline", torch_dtype=torch.float32)
    before.vae.to(shop.device).eval()
    latents = [generator.encode_latents(before.vae, path, shop.output / "latents" / "footage") for path in shop.footage]
    texts = shop.load(*shop.footage, video=False, truth=False).texts
    return Task(
        generator.SCHEDULE,
        lambda schedule, folder, watch: generator.train_generator(
            latents, texts, folder, schedule, start=before, device=shop.device, watch=watch
        ),
        lambda average: average,
        lambda model: save_parts(shop, model, before.vae, ["transformer", "text_encoder"]),
    )


def save_parts(shop: Shop, model: nn.Module | None, vae: nn.Module, parts: list[str]) -> None:
    """Replace parts of the pipeline in OUTPUT, file by file; networks that are trained beside have the others."""
    pipeline, aside = shop.output / "pipeline", shop.output / "work" / f"pipeline-{'-'.join(parts)}"
    model = generator.Generator() if model is None else deepcopy(model).cpu()  # halved in place, hence the copies
    generator.save_pipeline(model, deepcopy(vae).cpu(), aside)
    for part in parts:
        for file in (aside / part).iterdir():
            file.replace(pipeline / part / file.name)


def task_of(name: str, shop: Shop) -> Task:
    """How the network is trained."""
    tasks = {"attributes": attributes_task, "generator": generator_task, "vae": vae_task}
    return tasks[name](shop) if name in tasks else geometry_task(name, shop)


def train(name: str, shop: Shop, seconds: float, batch_scale: int) -> None:
    """Train one network for about so many seconds; OUTPUT/NAME holds its best state, then and at any time before."""
    began, work = time.monotonic(), shop.output / "work"
    finished = work / f"{name}.json"
    if finished.is_file():
        return
    select = shop.load(shop.select)
    model = best_of(name, shop)
    best = [float("inf") if model is None else measure(name, model, select)[1]]
    say(network=name, step=0, score=best[0])
    task = task_of(name, shop)
    left = (1 - ENDING) * seconds - (time.monotonic() - began)
    schedule = replace(task.schedule, batch_scale=batch_scale, seconds=max(left, 0.01))
    schedule = replace(schedule, save_every=-(-schedule.steps // SAVES))
    last = [0]

    def watch(step: int, average: nn.Module) -> None:
        model = task.network(average)
        card, score = ({}, -float(step)) if name == "generator" else measure(name, model, select)
        last[0] = step
        say(network=name, step=step, score=score, seconds=round(time.monotonic() - began, 1))
        if score < best[0]:
            best[0] = score
            task.save(model)
            write_card(shop.output, name, card)

    task.run(schedule, work / name, watch)
    atomic_write_json(finished, {"steps": last[0], "seconds": round(time.monotonic() - began, 1)})


def write_card(output: Path, name: str, card: dict[str, Any]) -> None:
    """The card of a network, if it has one; a VAE's is its pipeline's."""
    if card:
        atomic_write_json(output / FOLDERS.get(name, name) / "card.json", card)


def render(output: Path, clips: int, device: torch.device, deadline: float) -> None:
    """Shards of training clips, fewer when time is short, and two of held-out clips."""
    data.SHARD_SIZE = min(data.SHARD_SIZE, clips)
    train, heldout = output / "data" / "train", output / "data" / "heldout"
    with scene_drawer(device) as draw:
        for i in range(2):
            render_shard(heldout, i, split=None, first_seed=HELDOUT_SEED, device=device, draw=draw)
        for i in range(-(-clips // data.SHARD_SIZE)):
            if i and time.monotonic() > deadline:
                break
            render_shard(train, i, device=device, draw=draw)


def say(**what: Any) -> None:
    """One line of JSON."""
    print(json.dumps(what), flush=True)


def train_together(names: list[str], arguments: argparse.Namespace, seconds: float) -> None:
    """A process for each network."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(names)))}
    alone = [f"--output={arguments.output}", f"--seconds={max(1.0, seconds):.1f}", f"--device={arguments.device}"]
    alone.append(f"--batch-scale={arguments.batch_scale}")
    running = {
        name: subprocess.Popen([sys.executable, __file__, *alone, f"--alone={name}"], env=environment) for name in names
    }
    try:
        failed = [name for name, process in running.items() if process.wait()]
    finally:
        for process in running.values():
            process.kill()
    if failed:
        raise UserError(f"the training of {', '.join(failed)} failed, see above; the same command goes on")


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
    render(output, arguments.clips, device, began + RENDER_SHARE * arguments.seconds)
    if "judge" in arguments.networks:
        redrawn_clips(output, Shop.of(output, device).train[:REDRAWN_SHARDS], device)
    if "generator" in arguments.networks:
        footage(output, len(Shop.of(output, device).train), device)
    shop = Shop.of(output, device)
    say(shards=len(shop.train), device=str(device), seconds=round(time.monotonic() - began, 1))
    end = began + (1 - RESERVE) * arguments.seconds
    together = [name for name in TOGETHER if name in arguments.networks]
    if together:
        train_together(together, arguments, end - time.monotonic())
    heldout = shop.load(shop.heldout)
    for name in together:
        model = best_of(name, shop)
        if model is not None:
            write_card(output, name, measure(name, model, heldout)[0])
    if "lgm" in arguments.networks:
        lgm.AUDIT_CLIPS = arguments.audit
        pretrain("lgm", output, shards=min(LGM_SHARDS, len(shop.train)), device=str(device))
    say(seconds=round(time.monotonic() - began, 1))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/pretrain-gpu"), help="default: %(default)s")
    parser.add_argument("--seconds", type=number(1), default=780.0, help="time limit (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--clips", type=at_least(2), default=10240, help="to train on, at most (default: %(default)s)")
    parser.add_argument("--audit", type=at_least(8), default=96, help="clips of each kind (default: %(default)s)")
    parser.add_argument("--batch-scale", type=at_least(1, most=1024), default=4, help="default: %(default)s")
    parser.add_argument(
        "--networks", nargs="+", choices=(*TOGETHER, "lgm"), default=NETWORKS, help="default: " + ", ".join(NETWORKS)
    )
    parser.add_argument("--alone", choices=TOGETHER, help=argparse.SUPPRESS)  # one network, on what is rendered
    arguments = parser.parse_args()
    try:
        if arguments.alone is None:
            improve(arguments)
        else:
            shop = Shop.of(arguments.output, pick_device(arguments.device))
            train(arguments.alone, shop, arguments.seconds, arguments.batch_scale)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
