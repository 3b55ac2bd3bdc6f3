"""`reconstruct_video`: the 4D geometry of one video, through a geometry network or through an LGM, as files.

DIR/cameras.tum.txt      poses (cam2world), seconds of the video
DIR/colmap/, DIR/images/ the same cameras as a COLMAP text model, and the views that go with them
DIR/depth/*.png          16-bit z-depth, `depth/scale.json` says how much one count is; 0 = not known
DIR/geometry.npz         depth, confidence, cameras, masks as the network gave them
DIR/points.ply           what stands still; DIR/points_moving.ply what moves
DIR/mask/*.png           255 where something moves (networks that can tell)
DIR/index.html           the scene in 3D, in one file; DIR/reconstruction.json what was done
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from vggrpo import assets
from vggrpo.config import EMBEDDED
from vggrpo.errors import UserError
from vggrpo.evaluation.clip_views import Clip4D, evenly, for_latents, load_clip, resized
from vggrpo.evaluation.report import render
from vggrpo.evaluation.scenes import Cloud, cloud_of, scene_of, view_colours
from vggrpo.geometry import GeometryPrediction
from vggrpo.io.atomic import atomic_path, atomic_write, atomic_write_json, ensure_directory
from vggrpo.io.cameras import write_colmap, write_tum
from vggrpo.io.points import write_ply
from vggrpo.lgm import LatentGeometryModel
from vggrpo.models.base import VideoModel
from vggrpo.models.loading import load_geometry_model, load_video_model, pick_device

VIDEO_TOKEN = 16  # pixels: sizes that are multiples of it divide into the patches of every backend
VIEW_STEP = 4  # frames between views, as in the latents of a video VAE
PAGE_POINTS = 25_000
MARKER = "reconstruction.json"


@dataclass(frozen=True)
class Reconstruction:
    """What was seen, and by whom."""

    clip: Clip4D
    """The views, at the size of the maps."""
    prediction: GeometryPrediction
    """B = 1, on the CPU; `frame_index` counts the video's own frames."""
    cloud: Cloud
    by: str
    folder: Path

    @property
    def page(self) -> Path:
        return self.folder / "index.html"


@torch.inference_mode()
def reconstruct_video(
    video: Path | str,
    output: Path | str,
    *,
    model: str | Path = EMBEDDED,
    lgm: str | Path | None = None,
    pipeline: str | Path = EMBEDDED,
    views: int = 16,
    long_side: int = 592,
    device: str = "auto",
) -> Reconstruction:
    """Read a video, predict its geometry and write it.

    Args:
        video: any size, length and frame rate.
        output: directory; what an earlier reconstruction left there is replaced.
        model: directory or hub id of a geometry model; unused with `lgm`.
        lgm: directory of an LGM; the video goes through `pipeline`'s VAE first.
        pipeline: whose VAE encodes the video.
        views: at most this many, spread over the whole video.
        long_side: pixels; a larger video is scaled down to it.
        device: "auto", "cpu", "cuda", ...

    Raises:
        UserError: an unreadable or too short video, missing models, or an output directory with something else in it.
    """
    folder = _prepare(Path(output))
    clip = load_clip(video, long_side)
    if lgm is None:
        clip, prediction, by = _from_frames(clip, model, views, device)
    else:
        clip, prediction, by = _from_latents(clip, lgm, pipeline, views, device)
    prediction = prediction.to("cpu", torch.float32)
    prediction.frame_index = torch.tensor(clip.index)
    cloud = cloud_of(prediction, view_colours(clip.frames, prediction.size))
    if not len(cloud.points):
        raise UserError(f"{by} is sure of no pixel of {video}; nothing was written")
    found = Reconstruction(clip, prediction, cloud, by, folder)
    _write(found, Path(video))
    return found


def _from_frames(clip: Clip4D, model: str | Path, views: int, device: str) -> tuple[Clip4D, GeometryPrediction, str]:
    source = assets.path("geometry") if str(model) == EMBEDDED else model
    network: Any = load_geometry_model(source)
    network = network.to(pick_device(device))
    clip = clip.take(evenly(len(clip.index), views, VIEW_STEP))
    height, width = (max(1, round(side / VIDEO_TOKEN)) * VIDEO_TOKEN for side in clip.frames.shape[1:3])
    clip = resized(clip, network.image_size_for((height, width)))
    return clip, network(clip.tensor.to(next(network.parameters()).device)), f"the geometry model {model}"


def _from_latents(
    clip: Clip4D, lgm: str | Path, pipeline: str | Path, views: int, device: str
) -> tuple[Clip4D, GeometryPrediction, str]:
    reader = LatentGeometryModel.from_pretrained(assets.path("lgm") if str(lgm) == EMBEDDED else lgm)
    video_model: VideoModel = load_video_model(pipeline, device=device, load_text=False)
    reader = reader.to(video_model.device)
    spec, stride = video_model.latent_spec, reader.config.stride
    reader.check_latents_of(spec, video_model)
    clip = clip.take(for_latents(len(clip.index), views, spec.temporal_stride))
    cells = [spec.spatial_stride * max(patch, stride) for patch in spec.patch_size[1:]]
    height, width = (
        max(cell, round(side / cell) * cell) for side, cell in zip(clip.frames.shape[1:3], cells, strict=True)
    )
    clip = resized(clip, (height, width))
    prediction = reader(video_model.encode_video(clip.tensor.transpose(1, 2)))
    assert prediction.frame_index is not None
    clip = clip.take(prediction.frame_index.tolist())
    return resized(clip, prediction.size), prediction, f"the LGM {lgm} from latents of {pipeline}"


def _prepare(folder: Path) -> Path:
    """An empty directory, or one that holds an earlier reconstruction, which is replaced once there is a new one."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise UserError(f"{folder} is not empty and holds no reconstruction; name another --output")
    return ensure_directory(folder)


def _write(found: Reconstruction, video: Path) -> None:
    folder, clip, p = found.folder, found.clip, found.prediction
    for name in ("depth", "mask", "images", "colmap"):  # views of an earlier run with more of them
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "points_moving.ply").unlink(missing_ok=True)
    names = [f"frame_{index:05d}.png" for index in clip.index]
    cam2world, intrinsics = p.cam2world[0].numpy(), p.intrinsics[0].numpy()
    write_tum(folder / "cameras.tum.txt", cam2world, clip.seconds)
    write_colmap(folder / "colmap", cam2world, intrinsics, p.size, names)
    for name, image in zip(names, clip.frames, strict=True):
        _png(folder / "images" / name, image[..., ::-1])
    _write_depth(folder, names, p)
    if p.dynamic_mask is not None:
        for name, mask in zip(names, p.dynamic_mask[0].numpy(), strict=True):
            _png(folder / "mask" / name, mask.astype(np.uint8) * 255)
    moving = found.cloud.moving
    write_ply(folder / "points.ply", found.cloud.points[~moving], found.cloud.colours[~moving])
    if moving.any():
        write_ply(folder / "points_moving.ply", found.cloud.points[moving], found.cloud.colours[moving])
    facts = _facts(found, video)
    scene = scene_of(p, clip.frames, by=found.by, most=PAGE_POINTS)
    atomic_write(found.page, render("reconstruct", {"DATA": {"title": video.name, "facts": facts, "scene": scene}}))
    atomic_write_json(folder / MARKER, facts)


def _write_depth(folder: Path, names: list[str], p: GeometryPrediction) -> None:
    depth, conf = p.depth[0].numpy(), p.conf[0].numpy()
    known = np.isfinite(depth) & (depth > 0) & (conf > 0)
    scale = float(depth[known].max()) / 65535
    counts = np.where(known, np.rint(np.where(known, depth, 0) / scale), 0).clip(0, 65535).astype(np.uint16)
    for name, image in zip(names, counts, strict=True):
        _png(folder / "depth" / name, image)
    unit = "metres" if p.is_metric else "scene units"
    atomic_write_json(folder / "depth" / "scale.json", {"scale": scale, "unit": unit, "unknown": 0, "kind": "z-depth"})
    arrays = {"depth": depth, "conf": conf, "cam2world": p.cam2world[0].numpy(), "intrinsics": p.intrinsics[0].numpy()}
    for name in ("scene_flow", "dynamic_mask", "subject_mask"):
        value = getattr(p, name)
        arrays |= {} if value is None else {name: value[0].numpy()}
    assert p.frame_index is not None
    with atomic_path(folder / "geometry.npz") as temporary:
        np.savez_compressed(temporary, **arrays, frame_index=p.frame_index.numpy(), is_metric=np.array(p.is_metric))


def _facts(found: Reconstruction, video: Path) -> dict[str, Any]:
    clip, p = found.clip, found.prediction
    (height, width), (h, w) = clip.source_size, p.size
    return {
        "video": video.name,
        "video size": f"{width}x{height}",
        "video frames": clip.source_frames,
        "frames per second": clip.rate,
        "seen at": f"{w}x{h}",
        "views": len(clip.index),
        "frames seen": clip.index,
        "by": found.by,
        "unit": "metres" if p.is_metric else "scene units",
        "points": len(found.cloud.points),
        "points that move": int(found.cloud.moving.sum()),
        "camera path": float(np.linalg.norm(np.diff(p.cam2world[0, :, :3, 3].numpy(), axis=0), axis=1).sum()),
    }


def _png(path: Path, image: np.ndarray) -> None:
    done, data = cv2.imencode(".png", np.ascontiguousarray(image))
    assert done
    atomic_write(path, data.tobytes())
