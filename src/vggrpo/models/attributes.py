"""A classifier of what a clip of the embedded world shows: camera moves, coloured objects, motions, room.

For evaluation alone (prompt adherence, and features for distances to real clips). It is trained on rendered clips,
never on generated ones, and no reward or training loss may read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.models.pretrained import build, read_config, read_weights, reading, write_pretrained

FRAMES, SIZE = 9, 64


class AttributeClassifier(nn.Module):
    """Three-dimensional convolutions, one logit a label.

    Args:
        labels: names such as "camera:pan_left", "object:red ball", "motion:rolls", "room:stone".
    """

    def __init__(self, labels: Sequence[str], width: int = 24) -> None:
        super().__init__()
        self.labels, self.width = list(labels), width
        sizes = [3, width, 2 * width, 3 * width, 4 * width]
        strides = [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]
        self.convs = nn.ModuleList(
            nn.Conv3d(a, b, 3, s, 1) for a, b, s in zip(sizes[:-1], sizes[1:], strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in sizes[1:])
        self.mix = nn.Linear(4 * width * 16, 128)
        self.head = nn.Linear(128, len(self.labels))

    def features(self, video: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B 128"]:
        """Features of a video in [0, 1] of any length and size (it is sampled to 9 frames of 64x64)."""
        index = torch.linspace(0, video.shape[2] - 1, FRAMES, device=video.device).round().long()
        x = video[:, :, index]
        if x.shape[-2:] != (SIZE, SIZE):
            x = F.interpolate(x, size=(FRAMES, SIZE, SIZE), mode="trilinear", align_corners=False)
        x = x * 2 - 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        return F.gelu(self.mix(x.mean(2).flatten(1)))  # objects sit somewhere: keep the 4 x 4 places

    def forward(self, video: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B L"]:
        """One logit a label."""
        return self.head(self.features(video))

    @torch.no_grad()
    def adherence(self, video: Float[Tensor, "B 3 T H W"], attributes: Sequence[dict]) -> Float[Tensor, " B"]:
        """Share of the attributes that were asked for and are recognised (probability above one half)."""
        shown = self(video) > 0
        asked = torch.stack([label_vector(self.labels, a) for a in attributes]).to(shown.device) > 0
        return (shown & asked).sum(1) / asked.sum(1)

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write `config.json` and `model.safetensors`."""
        config = {"model_type": "attribute_classifier", "labels": self.labels, "width": self.width}
        write_pretrained(directory, config, self.state_dict(), dtype)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> AttributeClassifier:
        """Read what `save_pretrained` wrote.

        Raises:
            UserError: missing or damaged files.
        """
        with reading("attribute classifier", directory, "reinstall or train it again"):
            config = read_config(Path(directory))
            return build(lambda: cls(config["labels"], config["width"]), read_weights(Path(directory)))


def label_vector(labels: Sequence[str], attributes: dict) -> Float[Tensor, " L"]:
    """1 where the attributes of a caption name a label."""
    named = {f"camera:{move}" for move in attributes["camera"]} | {f"room:{attributes['room']}"}
    for item in attributes["objects"]:
        named.add(f"object:{item['colour']} {item['shape']}")
        if item["motion"]:
            named.add(f"motion:{item['motion']}")
    return torch.tensor([float(label in named) for label in labels])
