"""What videos are conditioned on: text embeddings and given first frames, encoded once and kept on disk.

Wan's text encoder has four times the parameters of its smallest transformer. Every prompt is encoded before training,
alone (so that its embedding does not depend on its neighbours), and read back from `data.cache` when it is needed; the
encoders can then leave the memory. A file's name is a digest of the prompt (or the image's bytes), the pipeline and the
number format, so a cache may be shared by runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vggrpo import assets
from vggrpo.config import EMBEDDED, TrainConfig
from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_path, ensure_directory
from vggrpo.io.images import read_image, read_image_list
from vggrpo.io.prompts import read_prompts
from vggrpo.models.base import VideoModel


class Conditions:
    """Embeddings of prompts and latents of first frames, by name, from disk.

    Args:
        config: of the run.
        prompts: all training prompts.
        others: further prompts that will be asked for; the empty prompt always is.
    """

    def __init__(self, config: TrainConfig, prompts: Sequence[str], others: Sequence[str] = ()) -> None:
        self.folder = ensure_directory(config.data.cache or Path(config.output) / "cache")
        self.size = (config.data.height, config.data.width)
        self._mark = _pipeline_mark(config)
        self._prompts = list(dict.fromkeys([*prompts, *others, ""]))
        self._images: dict[str, Path] = {}
        if config.data.first_frames is not None:
            self._add_images("data", config.data.first_frames, prompts, len(prompts))
        if config.validation.first_frames is not None and others:
            listed = config.validation.prompts  # of which the first ones are used
            count = len(others) if listed is None else len(read_prompts(listed))
            self._add_images("validation", config.validation.first_frames, others, count)

    def _add_images(self, section: str, listed: str, prompts: Sequence[str], count: int) -> None:
        """The first images of a list of `count`, one a prompt."""
        for prompt, file in zip(prompts, read_image_list(listed, count), strict=False):
            if self._images.setdefault(prompt, file) != file:
                raise UserError(
                    f"{section}.prompts repeats the prompt {prompt[:40]!r}, so {listed} is ambiguous; make every "
                    "prompt unique"
                )

    @property
    def has_first_frames(self) -> bool:
        """Whether videos start from given images."""
        return bool(self._images)

    def missing_prompts(self) -> list[str]:
        """Prompts whose embedding is not on disk."""
        return [prompt for prompt in self._prompts if not self._text_file(prompt).is_file()]

    def missing_images(self) -> list[Path]:
        """Images whose latents are not on disk."""
        return [image for image in self._images.values() if not self._image_file(image).is_file()]

    @torch.no_grad()
    def encode(self, model: VideoModel, processes: Processes) -> None:
        """Encode what is missing, each process a part, and wait for all."""
        # The parts are of all prompts: what is missing changes while other processes write.
        for prompt in self._prompts[processes.rank :: processes.size]:
            if self._text_file(prompt).is_file():
                continue
            embedding = model.encode_prompt([prompt])[0]  # (L, D), zero after the end of the text
            used = int(embedding.ne(0).any(dim=1).nonzero().max()) + 1 if bool(embedding.ne(0).any()) else 0
            _save(self._text_file(prompt), embedding[:used], len(embedding))
        for image in list(self._images.values())[processes.rank :: processes.size]:
            if self._image_file(image).is_file():
                continue
            pixels = read_image(image, self.size)
            _save(self._image_file(image), model.encode_video(pixels[None, :, None])[0], 0)
        processes.barrier()

    def text(self, prompts: Sequence[str], device: torch.device) -> Float[Tensor, "B L D"]:
        """Embeddings of prompts; each distinct one is read once."""
        distinct = {prompt: _load(self._text_file(prompt)) for prompt in dict.fromkeys(prompts)}
        padded = {
            prompt: torch.cat([tensors["x"], tensors["x"].new_zeros(int(tensors["length"]) - len(tensors["x"]),
                                                                   tensors["x"].shape[1])])
            for prompt, tensors in distinct.items()
        }  # fmt: skip
        return torch.stack([padded[prompt] for prompt in prompts]).to(device)

    def first_frames(self, prompts: Sequence[str], device: torch.device) -> Float[Tensor, "B C 1 H W"] | None:
        """Latents of the prompts' first frames; None where none are given."""
        if not self._images:
            return None
        files = {prompt: _load(self._image_file(self._images[prompt]))["x"] for prompt in dict.fromkeys(prompts)}
        return torch.stack([files[prompt] for prompt in prompts]).to(device)

    def _text_file(self, prompt: str) -> Path:
        return self.folder / f"text-{_digest(self._mark, prompt)}.safetensors"

    def _image_file(self, image: Path) -> Path:
        content = hashlib.sha256(image.read_bytes()).hexdigest()
        return self.folder / f"image-{_digest(self._mark, content, str(self.size))}.safetensors"


def load_prompts(config: TrainConfig) -> list[str]:
    """The training prompts: a file's lines, captions of the embedded world, or (`sft.videos`) those of the videos."""
    if config.algorithm == "sft" and config.sft.videos is not None:
        from vggrpo.posttraining.clips import manifest_rows

        return list(dict.fromkeys(row.prompt for row in manifest_rows(config.sft.videos)[0]))
    if config.data.prompts == EMBEDDED:
        from vggrpo.world import sample_prompts

        return sample_prompts(config.data.num_prompts, config.seed, split="train")
    return read_prompts(config.data.prompts)


def _pipeline_mark(config: TrainConfig) -> str:
    """What the embeddings depend on beside the prompt: of a local pipeline also its files' sizes and times."""
    path = config.model.path
    folder = assets.path("pipeline") if path == EMBEDDED else Path(path)
    stats = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for part in ("text_encoder", "tokenizer", "vae")
        for file in sorted((folder / part).glob("*"))
        if file.is_file()
    ]
    return f"{path} {config.model.dtype} {stats}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _save(path: Path, tensor: Tensor, length: int) -> None:
    with atomic_path(path) as temporary:
        save_file({"x": tensor.cpu().contiguous(), "length": torch.tensor(length)}, str(temporary))


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged; delete it, and it is made anew") from error
