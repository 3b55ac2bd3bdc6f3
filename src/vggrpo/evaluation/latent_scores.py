"""The two rewards of generated videos, read from their latents as training reads them, and the scenes that go with
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vggrpo import assets
from vggrpo.config import EMBEDDED
from vggrpo.errors import UserError
from vggrpo.evaluation.scenes import scene_of, write_scenes
from vggrpo.io.manifest import read_jsonl, read_manifest, write_jsonl
from vggrpo.io.video import read_video
from vggrpo.lgm import LatentGeometryModel
from vggrpo.models.loading import latent_spec
from vggrpo.rewards.registry import AUDITED, get_reward

REWARDS = dict(zip(("motion_reward", "geometry_reward"), AUDITED, strict=True))


@torch.inference_mode()
def score_latents(
    run_dir: Path,
    arm: str,
    lgm: str | Path = EMBEDDED,
    device: torch.device | str = "cpu",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    pipeline: str | Path = EMBEDDED,
) -> list[dict[str, Any]]:
    """Add `motion_reward` and `geometry_reward` to `eval/ARM/metrics.jsonl` and write `scenes/ARM.jsonl`.

    Args:
        run_dir: holds ARM/manifest.jsonl, the videos and their latents (`generate_videos(..., save_latents=True)`).
        lgm: directory of the LGM; "embedded" is the shipped one.
        options: keyword arguments of the two rewards by their names, as training uses them (`audited_options`).
        pipeline: whose latents they are.

    Returns:
        The rows of the arm.

    Raises:
        UserError: when latents are missing, or are not the LGM's.
    """
    manifest, metrics = run_dir / arm / "manifest.jsonl", run_dir / "eval" / arm / "metrics.jsonl"
    rows = read_jsonl(metrics)
    reader = LatentGeometryModel.from_pretrained(assets.path("lgm") if str(lgm) == EMBEDDED else lgm).to(device)
    reader.check_latents_of(latent_spec(pipeline))
    scenes = []
    for row, video in zip(rows, read_manifest(manifest), strict=True):
        file = (manifest.parent / video.path).with_suffix(".safetensors")
        if not file.is_file():
            raise UserError(f"{file} is missing: the rewards are read from latents; generate the videos with them")
        prediction = reader(load_file(file)["latents"][None].to(device))
        for name, reward in REWARDS.items():
            result = get_reward(reward)(prediction, **(options or {}).get(reward, {}))
            valid = bool(result.valid[0])
            row["metrics"][name] = {
                "value": result.value[0].item() if valid else None,
                "unit": "",
                "valid": valid,
                "reason": None if valid else "the geometry of this clip cannot be judged",
            }
        assert prediction.frame_index is not None
        frames = read_video(manifest.parent / video.path)[0][prediction.frame_index.tolist()]
        scenes.append((video.prompt, video.seed, scene_of(prediction, frames, by=f"the LGM {lgm}, from latents")))
    write_jsonl(metrics, rows)
    write_scenes(run_dir / "scenes" / f"{arm}.jsonl", scenes)
    return rows
