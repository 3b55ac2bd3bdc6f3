"""Recipe of the attribute classifier: binary cross-entropy on rendered clips."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vggrpo.models.attributes import AttributeClassifier, label_vector
from vggrpo.pretraining.data import Shards
from vggrpo.pretraining.generator import mirrored_attributes
from vggrpo.pretraining.loop import Logs, Schedule, Watch, fit, half_precision
from vggrpo.world import CAMERA_MOVES, COLOURS, MOTION_VERBS, ROOMS, SHAPES

SCHEDULE = Schedule(steps=2500, lr=2e-3, ema=0.998, seed=2)
BATCH = 24
LABELS = (
    [f"camera:{m}" for m in CAMERA_MOVES]
    + [f"object:{c} {s}" for c in COLOURS for s in SHAPES]
    + [f"motion:{m}" for m in MOTION_VERBS]
    + [f"room:{r}" for r in ROOMS]
)


def train_attributes(
    data: Shards,
    folder: Path,
    schedule: Schedule = SCHEDULE,
    bf16: bool = True,
    start: AttributeClassifier | None = None,
    watch: Watch | None = None,
) -> AttributeClassifier:
    """Train from scratch, or on from `start`, on clips and their mirror images, on the clips' device.

    With light noise, so that VAE artefacts do not matter.
    """
    device, batch = data.device, BATCH * schedule.batch_scale
    labels = torch.stack(
        [
            torch.stack([label_vector(LABELS, a) for a in (t["attributes"], mirrored_attributes(t["attributes"]))])
            for t in data.texts
        ]
    ).to(device)
    torch.manual_seed(schedule.seed)

    def loss(model: AttributeClassifier, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        index = torch.randint(len(data), (batch,), generator=generator)
        mirrored = torch.randint(2, (batch,), generator=generator)
        video = data.video(index)
        video = torch.where((mirrored == 1).view(-1, 1, 1, 1, 1).to(device), video.flip(-1), video)
        video = video + 0.03 * torch.randn(video.shape, generator=generator).to(device)
        with half_precision(device, bf16):
            logits = model(video)
        return F.binary_cross_entropy_with_logits(logits.float(), labels[index, mirrored]), {}

    classifier = AttributeClassifier(LABELS)
    if start is not None:
        classifier.load_state_dict(start.state_dict())
    return fit(classifier.to(device), loss, schedule, folder, watch)


@torch.no_grad()
def measure_attributes(model: AttributeClassifier, data: Shards, clips: int = 256) -> dict[str, float]:
    """Held-out recall (adherence of real clips), precision, and recall against shuffled captions (chance)."""
    index = torch.arange(min(clips, len(data)))
    asked = torch.stack([label_vector(model.labels, data.texts[i]["attributes"]) for i in index]) > 0
    shown = torch.cat([model(data.video(part)) for part in index.split(16)]).cpu() > 0
    both = (asked & shown).sum().item()
    chance = (asked.roll(1, 0) & shown).sum().item()
    return {
        "recall": both / asked.sum().item(),
        "precision": both / shown.sum().item(),
        "recall_of_shuffled": chance / asked.sum().item(),
    }
