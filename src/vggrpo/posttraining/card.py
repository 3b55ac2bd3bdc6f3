"""The model card that lies beside an exported LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from vggrpo import __version__, assets
from vggrpo.config import EMBEDDED, TrainConfig, dump_config
from vggrpo.lgm.model import geometry_licence
from vggrpo.models.licences import licence_of

_SHOWN = ("reward/", "kl", "ratio", "clip_fraction", "camera_travel", "dynamic_share")


def lora_card(config: TrainConfig, updates: int, last: Mapping[str, Any]) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        updates: how many were done.
        last: the newest row of the training log.
    """
    base = "the embedded pipeline of vggrpo" if config.model.path == EMBEDDED else config.model.path
    front = {"library_name": "diffusers", "tags": ["lora", "text-to-video", "vggrpo", config.algorithm]}
    if config.model.path != EMBEDDED:
        front["base_model"] = config.model.path
    lgm = assets.path("lgm") if config.lgm.path == EMBEDDED else config.lgm.path
    rewards = "\n".join(f"- `{name}`, weight {term.weight:g}" for name, term in config.rewards.items())
    numbers = "\n".join(
        f"| {name} | {value:.5g} |"
        for name, value in last.items()
        if isinstance(value, int | float) and name.startswith(_SHOWN)
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# LoRA for world consistency

Made with vggrpo {__version__} on {base}: {config.algorithm}, {updates} of {config.updates} updates, seed {config.seed}.
It asks a latent geometry model ({config.lgm.path}) for its rewards:

{rewards}

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("the base pipeline")
pipe.load_lora_weights("this directory")
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

## Settings

```yaml
{dump_config(config).strip()}
```
"""
