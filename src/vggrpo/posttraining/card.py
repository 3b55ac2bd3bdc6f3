"""The model card that lies beside an exported LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from vggrpo import __version__, assets
from vggrpo.config import EMBEDDED, TrainConfig, dump_config
from vggrpo.lgm.model import geometry_licence
from vggrpo.models.licences import licence_of

_USE_LORA = """from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("the base pipeline")
pipe.load_lora_weights("this directory")"""
_USE_FULL = """from diffusers import {pipeline}, {transformer}

transformer = {transformer}.from_pretrained("this directory")
pipe = {pipeline}.from_pretrained("the base pipeline", transformer=transformer)"""
_SHOWN = ("loss", "preference_accuracy", "reward/", "kl", "ratio", "clip_fraction", "camera_travel", "dynamic_share")


def lora_card(
    config: TrainConfig,
    updates: int,
    last: Mapping[str, Any],
    validations: Sequence[Mapping[str, Any]] = (),
    *,
    pipeline: str = "WanPipeline",
    transformer: str = "WanTransformer3DModel",
) -> str:
    """Markdown with the front matter that model hubs read; of a LoRA, or of whole weights.

    Args:
        updates: how many were done.
        last: the newest row of the training log.
        validations: rows of fixed prompts, oldest first; the first is the base model's where it is of update 0.
        pipeline, transformer: names of the diffusers classes that read the result.
    """
    base = "the embedded pipeline of vggrpo" if config.model.path == EMBEDDED else config.model.path
    full = config.model.tune == "full"
    lgm = assets.path("lgm") if config.lgm.path == EMBEDDED else config.lgm.path
    numbers = "\n".join(
        f"| {name} | {value:.5g} |"
        for name, value in last.items()
        if isinstance(value, int | float) and name.startswith(_SHOWN)
    )
    return f"""---
{_front_matter(config)}
---

# {"Transformer" if full else "LoRA"} for world consistency

Made with vggrpo {__version__} on {base}: {config.algorithm}, {updates} of {config.updates} updates, seed {config.seed}.
{_source(config)}

```python
{(_USE_FULL if full else _USE_LORA).format(pipeline=pipeline, transformer=transformer)}
```

or `vggrpo generate --pipeline BASE --lora THIS_DIRECTORY --prompts FILE --output DIR`.

## Licences of what it was made with

- base pipeline: {licence_of(config.model.path, "wan")}
- geometry model behind the rewards: {geometry_licence(lgm)}

## Last update

What the reward said while training. Whether the videos became better is for metrics that training never saw:
`vggrpo evaluate` and `vggrpo compare` on videos of both models.

| quantity | value |
|---|---|
{numbers}

{_validation_table(validations)}## Settings

```yaml
{dump_config(config).strip()}
```
"""


def _front_matter(config: TrainConfig) -> str:
    """What model hubs read."""
    kind = "transformer" if config.model.tune == "full" else "lora"
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "tags": [kind, "text-to-video", "vggrpo", config.algorithm],
    }
    if config.model.path != EMBEDDED:
        front["base_model"] = config.model.path
    return yaml.safe_dump(front, sort_keys=False).strip()


def _validation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """First and last validation side by side; nothing without two."""
    if len(rows) < 2:
        return ""
    first, last = rows[0], rows[-1]
    lines = "\n".join(
        f"| {name} | {first[name]:.5g} | {last[name]:.5g} |"
        for name in last
        if name.startswith(_SHOWN) and first.get(name) is not None and last[name] is not None
    )
    return f"""## Fixed prompts

| quantity | after {first["update"]} updates | after {last["update"]} |
|---|---|---|
{lines}

"""


def _source(config: TrainConfig) -> str:
    """Where the training signal came from."""
    reader = f"a latent geometry model ({config.lgm.path})"
    if config.reward.space == "rgb":
        reader = f"a geometry model ({config.reward.geometry}) that sees decoded frames"
    if config.algorithm == "dpo" and config.dpo.pairs == "epipolar":
        return "Its preference pairs come from the Sampson error of matched points in decoded frames."
    if config.algorithm == "dpo" and config.dpo.pairs == "geometry":
        return f"Its preference pairs come from reprojection by a geometry model ({config.reward.geometry})."
    use = {"sft": "Its clips were filtered by rewards", "dpo": "Its preference pairs come from rewards"}
    rewards = "\n".join(f"- `{name}`, weight {term.weight:g}" for name, term in config.rewards.items())
    return f"{use.get(config.algorithm, 'Its rewards are read')} by {reader}:\n\n{rewards}".replace(
        "rewards by", "rewards, read by"
    )
