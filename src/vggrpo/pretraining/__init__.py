"""Recipes that make the shipped models from rendered clips; `pretrain(name, output)` runs one with all that it needs.

    OUTPUT/data       rendered shards           OUTPUT/latents    their latents
    OUTPUT/work/NAME  checkpoints and logs      OUTPUT/NAME       the finished model, as shipped

Every stage resumes from its last checkpoint and skips what is finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vggrpo.errors import UserError
from vggrpo.io.atomic import ensure_directory

SHARDS, HELDOUT_SHARDS = 40, 1


def pretrain(
    name: str, output: str | Path, *, shards: int = SHARDS, steps: int | None = None, start: str | Path | None = None
) -> Path:
    """Train one of the shipped models and measure it on held-out clips.

    Args:
        name: "pipeline", "geometry", "lgm", "judge" or "attributes". The LGM needs pipeline and geometry in `output`.
        output: directory of all recipes; rendered clips are shared.
        shards: training clips, in shards of 256.
        steps: optimizer steps; default as in the recipe.
        start: directory of models to go on from (one a name, as this writes them) instead of from random weights, or
            for an LGM from a closed-form stitch.

    Returns:
        The finished model's directory, with its held-out numbers in `card.json`.
    """
    makers: dict[str, Callable[..., dict[str, Any]]] = {
        "pipeline": _pipeline, "geometry": _geometry, "judge": _judge, "attributes": _attributes, "lgm": _lgm
    }  # fmt: skip
    if name not in makers:
        raise UserError(f"no recipe called {name!r}; there are {', '.join(makers)}")
    output = ensure_directory(output)
    before = None if start is None else Path(start) / name
    if before is not None and not before.is_dir():
        raise UserError(f"there is no model to start from in {before}; name a directory that holds {name}/")
    torch.manual_seed(0)
    clips, heldout = render(output, shards)
    card = makers[name](output, clips, heldout, steps, before)
    (output / name / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))
    return output / name


def render(output: Path, shards: int) -> tuple[list[Path], list[Path]]:
    """Render what is missing of the training and the held-out clips."""
    from vggrpo.pretraining.data import HELDOUT_SEED, render_shard

    heldout = [
        render_shard(output / "data" / "heldout", i, split=None, first_seed=HELDOUT_SEED) for i in range(HELDOUT_SHARDS)
    ]
    return [render_shard(output / "data" / "train", i) for i in range(shards)], heldout


def _pipeline(
    output: Path, clips: list[Path], heldout: list[Path], steps: int | None, start: Path | None
) -> dict[str, Any]:
    from diffusers import WanPipeline

    from vggrpo.pretraining import generator, vae
    from vggrpo.pretraining.data import Shards

    before = None if start is None else WanPipeline.from_pretrained(start)
    first_vae = None if before is None else before.vae
    made = vae.train_vae(clips, output / "work" / "vae", _with_steps(vae.SCHEDULE, steps), start=first_vae)
    latents = [generator.encode_latents(made, path, output / "latents" / path.parent.name) for path in clips]
    texts = Shards.load(clips, video=False, truth=False).texts
    model = generator.train_generator(
        latents, texts, output / "work" / "generator", _with_steps(generator.SCHEDULE, steps), start=before
    )
    card = vae.measure_vae(made, heldout)
    generator.save_pipeline(model, made, output / "pipeline")
    return card


def _geometry(
    output: Path, clips: list[Path], heldout: list[Path], steps: int | None, start: Path | None
) -> dict[str, Any]:
    from vggrpo.pretraining import geometry

    return _geometry_network(
        output, "geometry", geometry.TEACHER, geometry.TEACHER_SCHEDULE, clips, heldout, steps, start
    )


def _judge(
    output: Path, clips: list[Path], heldout: list[Path], steps: int | None, start: Path | None
) -> dict[str, Any]:
    from vggrpo.pretraining import geometry

    return _geometry_network(output, "judge", geometry.JUDGE, geometry.JUDGE_SCHEDULE, clips, heldout, steps, start)


def _geometry_network(
    output: Path,
    name: str,
    config: Any,
    schedule: Any,
    clips: list[Path],
    heldout: list[Path],
    steps: int | None,
    start: Path | None,
) -> dict[str, Any]:
    from vggrpo.models.vggt import VGGT
    from vggrpo.pretraining.geometry import measure_geometry, train_geometry

    before = None if start is None else VGGT.from_pretrained(start)
    model = train_geometry(clips, output / "work" / name, config, _with_steps(schedule, steps), start=before)
    model.save_pretrained(output / name, torch.float16)
    return measure_geometry(model, heldout)


def _attributes(
    output: Path, clips: list[Path], heldout: list[Path], steps: int | None, start: Path | None
) -> dict[str, Any]:
    from vggrpo.models.attributes import AttributeClassifier
    from vggrpo.pretraining import attributes

    before = None if start is None else AttributeClassifier.from_pretrained(start)
    model = attributes.train_attributes(
        clips, output / "work" / "attributes", _with_steps(attributes.SCHEDULE, steps), start=before
    )
    model.save_pretrained(output / "attributes")
    return attributes.measure_attributes(model, heldout)


def _lgm(output: Path, clips: list[Path], heldout: list[Path], steps: int | None, start: Path | None) -> dict[str, Any]:
    from vggrpo.config import load_config
    from vggrpo.evaluation.audit import audit_reward
    from vggrpo.lgm import LGMConfig
    from vggrpo.models.vggt import VGGT
    from vggrpo.models.wan import WanVideoModel
    from vggrpo.pretraining import lgm
    from vggrpo.rewards.registry import audited_options

    for needed in ("pipeline", "geometry"):
        if not (output / needed).is_dir():
            raise UserError(
                f"the LGM needs {output / needed}; run `vggrpo world pretrain {needed} --output {output}` first"
            )
    teacher = VGGT.from_pretrained(output / "geometry").requires_grad_(False)
    video_model = WanVideoModel.from_pretrained(output / "pipeline")
    data = lgm.EncodedClips(clips, video_model)
    first = lgm.stitch(teacher, data)[0] if start is None else lgm.parts_of(start)
    config = LGMConfig(
        geometry="../geometry",
        vae=lgm.VAE_NAME,
        latent_channels=video_model.latent_spec.channels,
        layer=first.layer,
        lora_rank=lgm.LORA_RANK,
        lora_alpha=lgm.LORA_RANK,
        spatial_stride=video_model.latent_spec.spatial_stride,
        latents_mean=list(video_model.latent_spec.mean),
        latents_std=list(video_model.latent_spec.std),
    )
    generated = lgm.generated_clips(output / "pipeline", output / "work" / "generated.safetensors")
    model = lgm.train_lgm(
        teacher,
        data,
        first,
        config,
        output / "work" / "lgm",
        _with_steps(lgm.SCHEDULE, steps),
        generated,
    )
    model = lgm.compressed(model, teacher)
    model.save_pretrained(output / "lgm", torch.float16)
    if (output / "judge").is_dir():  # training asks for an audit beside the LGM
        options = audited_options(load_config("tiny").rewards)  # of the recipe that trains on this LGM
        audit_reward(output / "lgm", output / "lgm", clips=lgm.AUDIT_CLIPS, models=output, options=options)
    return lgm.measure_lgm(model, teacher, lgm.EncodedClips(heldout, video_model))


def _with_steps(schedule: Any, steps: int | None) -> Any:
    return schedule if steps is None else replace(schedule, steps=steps)
