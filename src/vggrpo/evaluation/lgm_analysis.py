"""How good is an LGM? Its accuracy against the RGB model, and what latent noise does to both (the paper's figure 5).

The RGB model is the geometry network that the LGM was stitched from, on frames. On clips of the embedded world both are
judged by the truth; on any other videos the RGB model on the clean frames is the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.config import EMBEDDED
from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.io.atomic import ensure_directory
from vggrpo.lgm.cache import teacher_views
from vggrpo.lgm.clips import video_sources
from vggrpo.lgm.losses import geometry_errors
from vggrpo.lgm.model import LatentGeometryModel, load_teacher
from vggrpo.lgm.training import mean_errors
from vggrpo.models.base import GeometryModel
from vggrpo.models.vae import VAE
from vggrpo.sampling.seeds import derive_seed, seeded_noise

logger = logging.getLogger(__name__)
ANALYSIS_SEED = 30_000_000  # rendered clips that nothing was trained or audited on
NOISE_LEVELS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
PARTS = ("accuracy", "noise", "cost", "full-shape")
ROLLOUT_STEPS, REPLAYED = 10, (9, 4)  # the paper's training step, and that of the recipes for one GPU
SHOWN = ("abs_rel", "translation", "rotation", "fov", "flow")


@dataclass(frozen=True)
class HeldOutClip:
    """One clip: frames (3, T, H, W) in [0, 1], and its true geometry at the LGM's views where it is known."""

    video: Float[Tensor, "3 T H W"]
    truth: GeometryPrediction | None = None


def heldout_clips(
    videos: str, count: int, *, num_frames: int, size: tuple[int, int], view_stride: int
) -> list[HeldOutClip]:
    """Clips of the embedded world ("embedded") or of videos (see `vggrpo.lgm.clips`), at most `count`.

    Every video gives an even share; what some cannot give, because they are short or damaged, the others do.

    Raises:
        UserError: no video could be used; the last reason is given.
    """
    if videos == EMBEDDED:
        from vggrpo.world import sample_batch

        clips = []
        for i in range(count):
            world = sample_batch([ANALYSIS_SEED + i], num_frames=num_frames, size=size, split=None)
            clips.append(HeldOutClip(world.video[0], world.geometry(view_stride)))
        return clips
    shape: dict[str, Any] = {"num_frames": num_frames, "size": size}
    share = -(-count // sum(1 for _ in video_sources(videos, **shape)))
    found: dict[str, HeldOutClip] = {}
    reason = "it holds no clip"
    for most in sorted({share, count}):  # of one video: the second round is for what the first left open
        for source in video_sources(videos, clips_per_video=most, **shape):
            try:
                for clip in source.clips():
                    if clip.video is not None and clip.key not in found:
                        found[clip.key] = HeldOutClip(clip.video.float() / 255)
                    if len(found) == count:
                        return list(found.values())
            except UserError as error:
                reason = str(error)
    if not found:
        raise UserError(f"no clip of {videos} could be used: {reason}")
    logger.warning("%s has %d clips of %d frames, %d were asked for", videos, len(found), num_frames, count)
    return list(found.values())


class Analysis:
    """An LGM, the VAE whose latents it reads, and the RGB model beside it."""

    def __init__(self, lgm: LatentGeometryModel, vae: VAE, rgb: GeometryModel) -> None:
        lgm.check_latents_of(vae.latent_spec, vae)
        self.lgm, self.vae, self.rgb = lgm, vae, rgb
        self.view_stride = vae.latent_spec.temporal_stride if lgm.config.view_rate == "latent" else 1

    def rgb_prediction(self, video: Float[Tensor, "B 3 T H W"]) -> GeometryPrediction:
        """The RGB model on the LGM's views."""
        return self.rgb(teacher_views(video, self.rgb, self.view_stride).float() / 255)

    @torch.inference_mode()
    def accuracy(self, clips: Sequence[HeldOutClip]) -> dict[str, Any]:
        """Mean errors: `lgm_against_rgb`; with truth also `lgm`, `rgb` and their `ratio`."""
        against_rgb, lgm, rgb = [], [], []
        for video, latents, truth in self._batches(clips):
            mine, theirs = self.lgm(latents), self.rgb_prediction(video)
            against_rgb.append(geometry_errors(mine, theirs))
            if truth is not None:
                lgm.append(geometry_errors(mine, truth))
                rgb.append(geometry_errors(theirs, truth))
        result: dict[str, Any] = {"clips": len(clips), "lgm_against_rgb": mean_errors(against_rgb)}
        if lgm:
            result |= {"lgm": mean_errors(lgm), "rgb": mean_errors(rgb)}
            result["ratio"] = {k: v / max(result["rgb"][k], 1e-12) for k, v in result["lgm"].items()}
        return result

    @torch.inference_mode()
    def noise_curve(
        self, clips: Sequence[HeldOutClip], levels: Sequence[float] = NOISE_LEVELS, seed: int = 0
    ) -> dict[str, Any]:
        """Errors of LGM(z + s eps) and of RGB(decode(z + s eps)) for each s, in units of a normalised latent.

        Returns:
            `levels`; `lgm` and `decode_then_rgb` by error, one number a level; `lgm_better_from`: for each error the
            lowest level from which on the LGM is closer at every level, or None.
        """
        curves: dict[str, dict[str, list[float]]] = {"lgm": {}, "decode_then_rgb": {}}
        for level in levels:
            parts: dict[str, list[dict[str, Tensor]]] = {"lgm": [], "decode_then_rgb": []}
            for number, (video, latents, truth) in enumerate(self._batches(clips)):
                target = truth if truth is not None else self.rgb_prediction(video)
                # The same noise at every level, so that a curve shows the level and nothing else.
                noise = seeded_noise([derive_seed(seed, "noise", number)], latents.shape[1:], latents.device)
                noisy = latents + level * noise
                parts["lgm"].append(geometry_errors(self.lgm(noisy), target))
                decoded = self.rgb_prediction(self.vae.decode(noisy))
                parts["decode_then_rgb"].append(geometry_errors(decoded, target))
            for who, rows in parts.items():
                for name, value in mean_errors(rows).items():
                    curves[who].setdefault(name, []).append(value)
        better = {name: better_from(levels, curves["lgm"][name], curves["decode_then_rgb"][name])
                  for name in curves["lgm"] if name in SHOWN}  # fmt: skip
        return {"levels": list(levels), **curves, "lgm_better_from": better}

    def _batches(self, clips: Sequence[HeldOutClip]) -> Iterator[tuple[Tensor, Tensor, GeometryPrediction | None]]:
        """One clip at a time: video (1, 3, T, H, W), latents, truth."""
        device = next(self.lgm.parameters()).device
        for clip in clips:
            video = clip.video[None].to(device)
            yield video, self.vae.encode_video(video), None if clip.truth is None else clip.truth.to(device)


def better_from(levels: Sequence[float], lgm: Sequence[float], other: Sequence[float]) -> float | None:
    """The lowest level from which on `lgm` is below `other` at every level."""
    found = None
    for level, a, b in reversed(list(zip(levels, lgm, other, strict=True))):
        if not a < b:
            break
        found = level
    return found


def load_analysis(lgm: str | Path, vae: VAE, rgb: str | Path | None, device: torch.device) -> Analysis:
    """Load an LGM and its RGB model (default: the geometry model that its manifest names)."""
    from vggrpo.models.loading import load_geometry_model

    model = LatentGeometryModel.from_pretrained(lgm).to(device)
    teacher = load_teacher(lgm) if rgb is None else load_geometry_model(rgb)
    return Analysis(model, vae, teacher.to(device))  # type: ignore[attr-defined]


def analyze_lgm(
    lgm: str | Path,
    output: str | Path,
    *,
    video_model: str | Path = EMBEDDED,
    geometry: str | Path | None = None,
    videos: str = EMBEDDED,
    clips: int = 32,
    num_frames: int = 17,
    size: tuple[int, int] = (64, 64),
    parts: Sequence[str] = PARTS[:3],
    device: str = "auto",
) -> dict[str, Any]:
    """Measure an LGM; prints tables, writes `analysis.json` (which it returns) and `analysis.html`.

    Args:
        lgm: directory, or "embedded".
        video_model: whose latents it reads: a pipeline, or a directory with an image autoencoder.
        geometry: the RGB model; default: the one the LGM was stitched from.
        videos: "embedded" (rendered clips with truth), or see `vggrpo.lgm.clips.video_sources`. Give videos that the
            LGM was not trained on.
        size: (height, width) of the clips, pixels.
        parts: of `PARTS`; "full-shape" counts FLOPs at the shapes of Wan2.1 and Wan2.2 with Any4D, without weights. By
            itself it loads no model and makes no clip.
        device: where networks run.

    Raises:
        UserError: bad input, or the LGM reads another VAE's latents.
    """
    from vggrpo.evaluation.lgm_page import write_analysis
    from vggrpo.models.loading import load_vae, pick_device

    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise UserError(f"no part {f'called {unknown[0]!r}' if unknown else 'chosen'}; there are {', '.join(PARTS)}")
    result: dict[str, Any] = {"lgm": str(lgm), "reference": "no clips"}
    if set(parts) != {"full-shape"}:
        vae = load_vae(video_model, device=device)
        vae.latent_spec.latent_shape(num_frames, *size)
        analysis = load_analysis(lgm, vae, geometry, pick_device(device))
        made = heldout_clips(videos, clips, num_frames=num_frames, size=size, view_stride=analysis.view_stride)
        has_truth = made[0].truth is not None
        result |= {
            "video_model": str(video_model), "videos": videos, "num_frames": num_frames, "size": list(size),
            "reference": "truth of rendered clips" if has_truth else "the RGB model on clean frames",
        }  # fmt: skip
    ensure_directory(output)  # before the work, after all that can be refused
    if "accuracy" in parts:
        result["accuracy"] = analysis.accuracy(made)
    if "noise" in parts:
        result["noise"] = analysis.noise_curve(made)
    if "cost" in parts:
        result.setdefault("cost", {})[f"{num_frames}x{size[0]}x{size[1]}, this LGM"] = _own_cost(analysis, made[0])
    if "full-shape" in parts:
        result.setdefault("cost", {}).update(_full_shape_costs())
    return write_analysis(Path(output), result)


def _own_cost(analysis: Analysis, clip: HeldOutClip) -> dict[str, dict[str, Any]]:
    """The LGM's own view rate and the other one (its connector does not care), against its RGB model."""
    from vggrpo.evaluation.lgm_cost import cost_table, reward_paths

    lgm = analysis.lgm
    device = next(lgm.parameters()).device
    rates = ("latent", "frame") if analysis.vae.latent_spec.temporal_stride > 1 else (lgm.config.view_rate,)
    both = {}
    for rate in rates:
        other = copy(lgm)
        other.config = lgm.config.model_copy(update={"view_rate": rate})
        both[rate] = other
    with torch.inference_mode():
        latents = analysis.vae.encode_video(clip.video[None].to(device))
    return cost_table(reward_paths(both, analysis.vae, analysis.rgb, latents), device)


def _full_shape_costs() -> dict[str, dict[str, dict[str, Any]]]:
    from vggrpo.evaluation.lgm_cost import WAN_2_1, WAN_2_2, cost_table, full_shape, reward_paths, transformer_flops
    from vggrpo.models.any4d import Any4D, Any4DConfig

    tables = {}
    for model in (WAN_2_1, WAN_2_2):
        table = cost_table(reward_paths(*full_shape(model, lambda: Any4D(Any4DConfig()))), torch.device("meta"))
        rgb, latent, velocity = table["rgb"]["flops"], table["lgm_latent"]["flops"], transformer_flops(model)
        table["one velocity"] = {"flops": velocity, "flops_of_rgb": velocity / rgb}
        for replayed in REPLAYED:
            # A replayed step: forward and backward, three times a forward, and a forward of the reference for the KL.
            step = (ROLLOUT_STEPS + 4 * replayed) * velocity + latent
            table[f"training step of a clip, {replayed} of {ROLLOUT_STEPS} steps replayed"] = {
                "flops": step, "flops_of_rgb": step / rgb, "latent_share": latent / step
            }  # fmt: skip
        tables[f"{model['name']}, Any4D, no weights"] = table
    return tables
