"""How much goes through the network at once: a number from the config, or as much as fits the memory.

`auto` divides what the device has free by what one item needs (`vggrpo.models.memory`). An estimate may be wrong, so an
out-of-memory error halves the size and the work starts over; it is exact work, so nothing changes but rounding.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from vggrpo.config import TrainConfig
from vggrpo.config_algorithms import MicroBatchSize
from vggrpo.distributed import Processes
from vggrpo.models.base import VideoModel
from vggrpo.models.memory import forward_memory, free_memory, shape_of, training_memory

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
SHARE = 0.85
"""Of the free memory that `auto` counts on; the estimate is good to about a tenth."""
LATENT_COPIES = 16
"""Float32 tensors of a latent's size that a step keeps beside the network's activations."""


class MicroBatch:
    """The size of a micro-batch, found at its first use if the config does not say it.

    Args:
        setting: the config's number, or "auto".
        item_bytes: that one item more takes.
        reserve: bytes that are free now and will not be when it counts.
        processes: agree on the smallest of their sizes; with split weights (`even`) none changes its size alone, for
            the others would wait for it: running out of memory is then an error.
    """

    def __init__(
        self,
        setting: MicroBatchSize,
        item_bytes: float = 1.0,
        *,
        reserve: float = 0.0,
        processes: Processes | None = None,
    ) -> None:
        self.setting, self.item_bytes, self.reserve = setting, item_bytes, reserve
        self.processes = processes or Processes()
        self.found: int | None = None

    def run(
        self, count: int, device: torch.device, work: Callable[[int], Result], undo: Callable[[], None] | None = None
    ) -> Result:
        """`work(size)`, where `size` items go through the network at once.

        Args:
            count: items that this process has.
            device: where the network lives.
            work: raises an out-of-memory error if the size is too large, and may be called again.
            undo: forgets what a call that failed left behind.

        Raises:
            torch.OutOfMemoryError: when not even one item fits, or the size was given.
        """
        if self.setting != "auto":
            return work(self.setting)
        if self.found is None:
            self.found = self._fitting(device)
        while True:
            size = max(1, min(self.found, count))
            try:
                return work(size)
            except RuntimeError as error:
                if not is_out_of_memory(error) or size == 1 or self.processes.even:
                    raise
            # Outside of the handler, because the error's traceback holds what the failed call had made.
            if undo is not None:
                undo()
            self.found = size // 2
            _let_go(device)
            logger.warning(
                "out of memory with %d at once; going on with %d, which changes nothing else", size, self.found
            )

    def _fitting(self, device: torch.device) -> int:
        """The largest size that the memory of every process allows, at least 1."""
        free = SHARE * (free_memory(device) - self.reserve)
        return -self.processes.largest(-max(1, int(free // self.item_bytes)), device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine itself, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _let_go(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rollout_micro_batch(config: TrainConfig, model: VideoModel, processes: Processes, kept: int = 0) -> MicroBatch:
    """For videos in `rollout` (`sampling.micro_batch`); of `kept` videos the states stay for the replay."""
    setting = config.sampling.micro_batch
    if setting != "auto":
        return MicroBatch(setting)
    calls = 2 if config.sampling.guidance_scale != 1 else 1
    tokens, latent = _sizes(config, model)
    network = forward_memory(shape_of(model), tokens, batch=calls, value_bytes=_value_bytes(model)) * 1024**3
    states = 0 if config.sampling.offload else kept * (config.sampling.window + 1) * latent
    return MicroBatch(setting, network + LATENT_COPIES * latent, reserve=states, processes=processes)


def replay_micro_batch(config: TrainConfig, model: VideoModel, processes: Processes) -> MicroBatch:
    """For transitions in the replay with gradient (`grpo.micro_batch`)."""
    setting = config.grpo.micro_batch
    if setting != "auto":
        return MicroBatch(setting)
    tokens, latent = _sizes(config, model)
    shape, calls = shape_of(model), 2 if config.sampling.guidance_scale != 1 else 1
    network = 1024**3 * calls * sum(
        sign * training_memory(shape, count, rank=0, checkpointing=config.model.gradient_checkpointing,
                               value_bytes=_value_bytes(model))
        for sign, count in ((1, tokens), (-1, 0))
    )  # fmt: skip
    # Gradients and the optimizer's two moments come after the first backward pass.
    trained = sum(p.numel() for p in model.transformer.parameters() if p.requires_grad)
    if config.model.shard and config.model.tune == "full":
        trained //= processes.size
    return MicroBatch(setting, network + LATENT_COPIES * latent, reserve=12.0 * trained, processes=processes)


def _sizes(config: TrainConfig, model: VideoModel) -> tuple[int, int]:
    """Tokens of one video, and bytes of its latents in float32."""
    data = config.data
    channels, frames, height, width = model.latent_spec.latent_shape(data.num_frames, data.height, data.width)
    tokens = shape_of(model).tokens(data.num_frames, data.height, data.width)
    return tokens, 4 * channels * frames * height * width


def _value_bytes(model: VideoModel) -> int:
    """Bytes of one activation."""
    dtype = model.autocast or next(model.transformer.parameters()).dtype
    return dtype.itemsize
