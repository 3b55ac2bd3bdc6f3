"""The two networks that evaluation may load: the judge (geometry from RGB) and the attribute classifier.

Both are loaded when first needed, once per process. Neither is used by any training (that is what makes them judges).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo import assets
from vggrpo.errors import UserError
from vggrpo.evaluation.metrics.base import Clip
from vggrpo.geometry import GeometryPrediction

VIEW_STRIDE = 4  # frames: the judge sees the views of a video latent, 0, 4, 8, ...


class EvaluationModels:
    """Lazily loaded judges.

    Args:
        judge: a directory, a loaded geometry model (`forward(frames (B, S, 3, H, W)) -> GeometryPrediction`), or None
            for the embedded one.
        attributes: a directory, a loaded classifier, or None for the embedded one.
        device: where they run.
    """

    def __init__(
        self, judge: Path | str | Any | None = None, attributes: Path | str | Any | None = None, device: str = "cpu"
    ) -> None:
        self._sources: dict[str, Any] = {"judge": judge, "attributes": attributes}
        self._loaded: dict[str, Any] = {}
        self._last: tuple[Clip, GeometryPrediction] | None = None
        self.device = device

    def check(self, names: Iterable[str]) -> None:
        """Fail before a long run starts, not in the middle of it.

        Raises:
            UserError: one line that names what is missing.
        """
        missing = []
        for name in sorted(set(names)):
            try:
                self._directory(name)
            except UserError as error:
                missing.append(str(error))
        if missing:
            raise UserError("; ".join(missing) + "; or choose metrics that don't need it with --metrics")

    def source(self, name: str) -> str:
        """Where a model comes from, for the record."""
        source = self._directory(name)
        return str(source) if source is not None else type(self._sources[name]).__name__

    @property
    def judge(self) -> Any:
        return self._model("judge")

    @property
    def attributes(self) -> Any:
        return self._model("attributes")

    def judge_prediction(self, clip: Clip) -> GeometryPrediction:
        """The judge's geometry of frames 0, 4, 8, ... of one clip (B = 1); the latest clip's is kept, since several
        metrics use it.
        """
        if self._last is None or self._last[0] is not clip:
            frames = as_tensor(clip)[:, ::VIEW_STRIDE].to(self.device)  # (1, S, 3, H, W)
            with torch.inference_mode():
                self._last = (clip, self.judge(frames))
        return self._last[1]

    def _directory(self, name: str) -> Path | None:
        """Checked directory of a model, or None when a loaded model was handed in."""
        source = self._sources[name]
        if source is None:
            return assets.path(name)
        if not isinstance(source, str | Path):
            return None
        if not Path(source).is_dir():
            raise UserError(
                f"the directory of the model {name!r}, {source}, does not exist; name one that from_pretrained can read"
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
    if name == "judge":
        from vggrpo.models.loading import load_geometry_model

        return load_geometry_model(directory)
    from vggrpo.models.attributes import AttributeClassifier

    return AttributeClassifier.from_pretrained(directory)


def as_tensor(clip: Clip) -> Float[Tensor, "1 T 3 H W"]:
    """A clip as models take it, in [0, 1]."""
    return torch.from_numpy(clip.frames.copy()).permute(0, 3, 1, 2)[None].float() / 255
