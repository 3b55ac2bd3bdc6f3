"""Images that videos start from: one a prompt, named in a text file."""

from __future__ import annotations

from pathlib import Path

import cv2
import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.io.prompts import read_prompts


def read_image_list(path: Path | str, prompts: int) -> list[Path]:
    """Image files, one a line, relative to the list's own folder; line n belongs to prompt n.

    Raises:
        UserError: when their number is not `prompts`, or a file is missing.
    """
    files = [Path(path).parent / line for line in read_prompts(path)]
    if len(files) != prompts:
        raise UserError(f"{path} names {len(files)} images for {prompts} prompts; give one line a prompt")
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path} names {missing[0]}, which does not exist")
    return files


def read_image(path: Path | str, size: tuple[int, int]) -> Float[Tensor, "3 H W"]:
    """RGB in [0, 1], scaled until it covers (height, width) and cut in the middle.

    Raises:
        UserError: when the file is no image.
    """
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if pixels is None:
        raise UserError(f"{path} is missing or no image that OpenCV can read (use PNG or JPEG)")
    height, width = size
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    new = (max(width, round(pixels.shape[1] * scale)), max(height, round(pixels.shape[0] * scale)))
    pixels = cv2.resize(pixels, new, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    rgb = cv2.cvtColor(pixels[top : top + height, left : left + width], cv2.COLOR_BGR2RGB)
    return torch.from_numpy(rgb).permute(2, 0, 1).float() / 255
