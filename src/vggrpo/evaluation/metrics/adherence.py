"""`adherence`: share of what the prompt asks for that the attribute classifier recognises in the clip.

The classifier saw rendered clips only, and knows objects, colours, camera move and motion of the embedded world's
captions; a prompt that isn't such a caption has no attributes to check and the clip is invalid, not zero. It is blind
to geometry, which is why it stands beside the geometric metrics.

The classifier's features and the clip's frames, height and width are kept among the details: `compare` takes the kernel
distance of both arms to rendered clips from them (`vggrpo.evaluation.arms`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vggrpo.evaluation.metrics.base import Clip, Measurement

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels


def adherence(clip: Clip, models: EvaluationModels) -> dict[str, Measurement]:
    """Adherence in [0, 1]; higher is better."""
    from vggrpo.evaluation.models import as_tensor
    from vggrpo.world import caption_to_attributes

    attributes = caption_to_attributes(clip.prompt)
    if attributes is None:
        return {
            "adherence": Measurement.invalid(
                "the prompt is not a caption of the embedded world, so its attributes are unknown"
            )
        }
    video = as_tensor(clip).transpose(1, 2).to(models.device)  # (1, 3, T, H, W)
    with torch.inference_mode():
        value = float(models.attributes.adherence(video, [attributes])[0])
        features = [float(f"{number:.5g}") for number in models.attributes.features(video)[0].tolist()]
    return {"adherence": Measurement.of(value, features=features, shape=[float(n) for n in clip.frames.shape[:3]])}
