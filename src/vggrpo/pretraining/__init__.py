"""Recipes that make the shipped models from rendered clips; `pretrain(name, output)` runs one with all that it needs.

    OUTPUT/data       rendered shards, some of them re-drawn by the generator, and the generator's less steady footage
    OUTPUT/latents    latents of that footage
    OUTPUT/work/NAME  checkpoints and logs
    OUTPUT/NAME       the finished model, as shipped

Every stage resumes from its last checkpoint and skips what is finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write_json, ensure_directory, without_nan

if TYPE_CHECKING:
    from vggrpo.pretraining.data import Shards

SHARDS, STITCH_SHARDS, HELDOUT_SHARDS = 40, 4, 1  # `lgm.stitch` reads 768 + 128 clips of 4 x 256
REDRAWN_SHARDS = 16  # of the rendered ones; the judge reads them beside all of those


@dataclass(frozen=True)
class Job:
    """One run of a recipe: what `pretrain` was asked for.

    Attributes:
        output: directory of all recipes.
        clips, heldout: shards to train and to measure on.
        device: where everything is computed.
        start: directory of the model to go on from, or None.
        steps: instead of the recipe's, or None.
        batch_scale: clips a step, as a multiple of the recipe's.
    """

    output: Path
    clips: list[Path]
    heldout: list[Path]
    device: torch.device
    start: Path | None = None
    steps: int | None = None
    batch_scale: int = 1

    def schedule(self, recipe: Any) -> Any:
        """The recipe's `Schedule` with this run's numbers."""
        return replace(recipe, steps=self.steps or recipe.steps, batch_scale=self.batch_scale)

    def load(self, paths: list[Path], **columns: bool) -> Shards:
        """Clips for this run's device; see `Shards.load`."""
        from vggrpo.pretraining.data import Shards

        return Shards.load(paths, device=self.device, **columns)


def pretrain(
    name: str,
    output: str | Path,
    *,
    shards: int | None = None,
    steps: int | None = None,
    start: str | Path | None = None,
    device: str = "cpu",
    batch_scale: int = 1,
) -> Path:
    """Train one of the shipped models and measure it on held-out clips.

    All random draws are made on the CPU: a run differs from device to device by rounding alone.

    Args:
        name: "pipeline", "geometry", "lgm", "judge" or "attributes". The LGM needs pipeline and geometry in `output`.
        output: directory of all recipes; rendered clips are shared.
        shards: training clips, in shards of 256; default 40, and 4 for a closed-form stitch.
        steps: optimizer steps; default as in the recipe. An LGM is a closed-form stitch, and trained only if these or
            `start` are given.
        start: directory of models to go on from (one a name, as this writes them) instead of from random weights, or
            for an LGM from a closed-form stitch.
        device: "auto", "cpu", "cuda", ...
        batch_scale: clips a step, as a multiple of the recipe's, which are few: they were chosen on a CPU.

    Returns:
        The finished model's directory, with its held-out numbers in `card.json`.

    Raises:
        UserError: unknown name or device, nothing to start from, or what an LGM needs is missing.
    """
    from vggrpo.models.loading import pick_device

    makers: dict[str, Callable[[Job], dict[str, Any]]] = {
        "pipeline": _pipeline, "geometry": _geometry, "judge": _judge, "attributes": _attributes, "lgm": _lgm
    }  # fmt: skip
    if name not in makers:
        raise UserError(f"no recipe called {name!r}; there are {', '.join(makers)}")
    place = pick_device(device)
    output = ensure_directory(output)
    before = None if start is None else Path(start) / name
    if before is not None and not before.is_dir():
        raise UserError(f"there is no model to start from in {before}; name a directory that holds {name}/")
    torch.manual_seed(0)
    wanted = STITCH_SHARDS if name == "lgm" and _only_stitched(before, steps) else SHARDS
    clips, heldout = render(output, shards or wanted, place)
    card = without_nan(makers[name](Job(output, clips, heldout, place, before, steps, batch_scale)))
    atomic_write_json(output / name / "card.json", card)
    print(json.dumps(card))
    return output / name


def _only_stitched(start: Path | None, steps: int | None) -> bool:
    """Whether an LGM is a closed form: it is trained only from a start, or for a number of steps."""
    return start is None and steps is None


def render(output: Path, shards: int, device: torch.device) -> tuple[list[Path], list[Path]]:
    """Render what is missing of the training and the held-out clips."""
    from vggrpo.pretraining.data import HELDOUT_SEED, render_shard, scene_drawer

    train, heldout = output / "data" / "train", output / "data" / "heldout"
    with scene_drawer(device) as draw:
        return (
            [render_shard(train, i, device=device, draw=draw) for i in range(shards)],
            [
                render_shard(heldout, i, split=None, first_seed=HELDOUT_SEED, device=device, draw=draw)
                for i in range(HELDOUT_SHARDS)
            ],
        )


def footage(output: Path, shards: int, device: torch.device) -> list[Path]:
    """Render what is missing of the clips that the generator learns from: as many, less steady (`scene.SHAKE`)."""
    from vggrpo.pretraining.data import render_shard, scene_drawer

    with scene_drawer(device) as draw:
        return [
            render_shard(output / "data" / "footage", i, shake="footage", device=device, draw=draw)
            for i in range(shards)
        ]


def _pipeline(job: Job) -> dict[str, Any]:
    from diffusers import WanPipeline

    from vggrpo.pretraining import generator, vae
    from vggrpo.pretraining.data import Shards

    output = job.output
    before = None if job.start is None else WanPipeline.from_pretrained(job.start)
    first_vae = None if before is None else before.vae
    made = vae.train_vae(
        job.load(job.clips, truth=False),
        output / "work" / "vae",
        job.schedule(vae.ENCODER_SCHEDULE),
        job.schedule(vae.DECODER_SCHEDULE),
        start=first_vae,
    )
    clips = footage(output, len(job.clips), job.device)
    latents = [generator.encode_latents(made, path, output / "latents" / path.parent.name) for path in clips]
    texts = Shards.load(clips, video=False, truth=False).texts
    model = generator.train_generator(
        latents,
        texts,
        output / "work" / "generator",
        job.schedule(generator.SCHEDULE),
        start=before,
        device=job.device,
    )
    card = vae.measure_vae(made, job.load(job.heldout, truth=False))
    generator.save_pipeline(model, made, output / "pipeline")
    return card


def _geometry(job: Job) -> dict[str, Any]:
    from vggrpo.pretraining import geometry

    return _geometry_network(job, "geometry", geometry.TEACHER, geometry.TEACHER_SCHEDULE)


def _judge(job: Job) -> dict[str, Any]:
    from vggrpo.pretraining import geometry

    clips = [*job.clips, *redrawn_clips(job.output, job.clips[:REDRAWN_SHARDS], job.device)]
    return _geometry_network(replace(job, clips=clips), "judge", geometry.JUDGE, geometry.JUDGE_SCHEDULE)


def redrawn_clips(output: Path, clips: list[Path], device: torch.device) -> list[Path]:
    """Re-draw what is missing of these shards, by the pipeline in OUTPUT or the shipped one."""
    from vggrpo import assets
    from vggrpo.models.wan import WanVideoModel
    from vggrpo.pretraining.redraw import redraw_shard

    own, folder = output / "pipeline", output / "data" / "redrawn"
    video_model = WanVideoModel.from_pretrained(own if own.is_dir() else assets.path("pipeline"), device)
    return [redraw_shard(path, folder, video_model) for path in clips]


def _geometry_network(job: Job, name: str, config: Any, schedule: Any) -> dict[str, Any]:
    from vggrpo.models.vggt import VGGT
    from vggrpo.pretraining.geometry import measure_geometry, train_geometry

    before = None if job.start is None else VGGT.from_pretrained(job.start)
    work = job.output / "work" / name
    model = train_geometry(job.load(job.clips), work, config, job.schedule(schedule), start=before)
    model.save_pretrained(job.output / name, torch.float16)
    return measure_geometry(model, job.load(job.heldout))


def _attributes(job: Job) -> dict[str, Any]:
    from vggrpo.models.attributes import AttributeClassifier
    from vggrpo.pretraining import attributes

    before = None if job.start is None else AttributeClassifier.from_pretrained(job.start)
    model = attributes.train_attributes(
        job.load(job.clips, truth=False),
        job.output / "work" / "attributes",
        job.schedule(attributes.SCHEDULE),
        start=before,
    )
    model.save_pretrained(job.output / "attributes")
    return attributes.measure_attributes(model, job.load(job.heldout, truth=False))


def _lgm(job: Job) -> dict[str, Any]:
    from vggrpo.config import load_config
    from vggrpo.evaluation.audit import audit_reward
    from vggrpo.models.vggt import VGGT
    from vggrpo.models.wan import WanVideoModel
    from vggrpo.pretraining import lgm
    from vggrpo.rewards.registry import audited_options

    output, device = job.output, job.device
    for needed in ("pipeline", "geometry"):
        if not (output / needed).is_dir():
            raise UserError(
                f"the LGM needs {output / needed}; run `vggrpo world pretrain {needed} --output {output}` first"
            )
    teacher = VGGT.from_pretrained(output / "geometry").requires_grad_(False).to(device)
    video_model = WanVideoModel.from_pretrained(output / "pipeline", device)
    data = lgm.EncodedClips(job.load(job.clips), video_model)
    if _only_stitched(job.start, job.steps):
        model = lgm.closed_form(teacher, data)
    else:
        first = lgm.stitch(teacher, data)[0] if job.start is None else lgm.parts_of(job.start)
        config = lgm.config_for(first.layer, video_model, teacher)
        generated = lgm.generated_clips(output / "pipeline", output / "work" / "generated.safetensors", device=device)
        work, schedule = output / "work" / "lgm", job.schedule(lgm.SCHEDULE)
        model = lgm.compressed(lgm.train_lgm(teacher, data, first, config, work, schedule, generated), teacher)
    model.save_pretrained(output / "lgm", torch.float16)
    if (output / "judge").is_dir():  # training asks for an audit beside the LGM
        options = audited_options(load_config("tiny").rewards)  # of the recipe that trains on this LGM
        audit_reward(
            output / "lgm", output / "lgm", clips=lgm.AUDIT_CLIPS, models=output, options=options, device=device
        )
    return lgm.measure_lgm(model, teacher, lgm.EncodedClips(job.load(job.heldout), video_model))
