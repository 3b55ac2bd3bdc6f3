"""LoRA on a diffusers transformer through peft: attach, switch off, save and load in diffusers' own format.

The files are what `load_lora_weights` of the model's diffusers pipeline reads: keys
`transformer.<layer>.lora_A.weight`, with rank and alpha in the header.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_path
from vggrpo.models.pretrained import one_line, quiet_diffusers

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
FULL_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
ADAPTER = "default"


def attach_lora(
    transformer: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], seed: int = 0
) -> list[nn.Parameter]:
    """Put a fresh adapter (B = 0, so nothing changes yet) on all linear layers whose names end in `targets`.

    Args:
        transformer: a diffusers model.
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
        targets: name endings, such as "to_q".
        seed: of the random A.

    Returns:
        The trainable parameters, float32, in a fixed order.

    Raises:
        UserError: when no layer matches; the message lists endings that would.
    """
    from peft import LoraConfig

    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    unmatched = [target for target in targets if not any(_ends_in(name, target) for name in linear)]
    if unmatched:
        endings = sorted({_ending(name) for name in linear})[:12]
        raise UserError(
            f"lora.targets {unmatched} match no linear layer of the model; use endings such as {', '.join(endings)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), adapter_name=ADAPTER
        )
    parameters = dict(lora_parameters(transformer))
    for name, parameter in parameters.items():
        parameter.data = parameter.data.float()
        assert "lora_B" not in name or not parameter.any(), f"{name} must start at 0"
    assert any("lora_B" in name for name in parameters)
    return list(parameters.values())


def lora_parameters(transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of the adapter, sorted by name."""
    return sorted((name, p) for name, p in transformer.named_parameters() if "lora_" in name)


@contextmanager
def lora_disabled(transformer: nn.Module) -> Iterator[None]:
    """The base model, without a second copy: the adapter is switched off inside."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def lora_state(transformer: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's tensors on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in lora_parameters(transformer)}


def set_lora_state(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `lora_state` gave."""
    parameters = dict(lora_parameters(transformer))
    if parameters.keys() != state.keys():
        raise UserError(
            "the saved adapter belongs to another model or to other lora.targets; use another output directory"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def export_lora(transformer: nn.Module, directory: Path | str, pipeline: str = "WanPipeline") -> Path:
    """Write `directory/pytorch_lora_weights.safetensors` as `load_lora_weights` of that diffusers pipeline reads it,
    atomically."""
    import diffusers
    from peft.utils import get_peft_model_state_dict

    layers = {name: value.detach().cpu().contiguous() for name, value in get_peft_model_state_dict(transformer).items()}
    metadata = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in transformer.peft_config[ADAPTER].to_dict().items()
    }
    target = Path(directory) / WEIGHTS_NAME
    with atomic_path(target) as temporary:
        getattr(diffusers, pipeline).save_lora_weights(
            str(temporary.parent),
            transformer_lora_layers=layers,
            weight_name=temporary.name,
            transformer_lora_adapter_metadata=metadata,
        )
    return target


def load_lora(transformer: nn.Module, path: Path | str, pipeline: str = "WanPipeline") -> None:
    """Load a LoRA file of that diffusers pipeline, or the directory that holds one, for sampling.

    Raises:
        UserError: when the file is missing, damaged, or fits another model.
    """
    file = Path(path)
    candidates = [file, file / WEIGHTS_NAME, file / "lora" / WEIGHTS_NAME]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(f"no LoRA at {path}; give {WEIGHTS_NAME} or the run directory that holds lora/{WEIGHTS_NAME}")
    import diffusers
    from safetensors import SafetensorError

    kind = getattr(diffusers, pipeline)
    try:
        with quiet_diffusers():
            state, metadata = kind.lora_state_dict(str(found.parent), weight_name=found.name, return_lora_metadata=True)
            kind.load_lora_into_transformer(state, transformer, adapter_name=ADAPTER, metadata=metadata)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = one_line(error)[:160]
        raise UserError(
            f"LoRA {found} does not load into this model ({reason}); it is damaged or was made for another one"
        ) from error
    if not lora_parameters(transformer):
        raise UserError(f"LoRA {found} matches no layer of this model; it was made for another one")


def load_tuned(transformer: nn.Module, path: Path | str, pipeline: str = "WanPipeline") -> None:
    """Load what training exports: a LoRA (see `load_lora`), or the directory of a whole transformer
    (`model.tune: full`).

    Raises:
        UserError: when it is missing, damaged, or fits another model.
    """
    found = Path(path) if Path(path).name == FULL_WEIGHTS_NAME else Path(path) / FULL_WEIGHTS_NAME
    if not found.is_file():
        load_lora(transformer, path, pipeline)
        return
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        transformer.load_state_dict(load_file(found))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = one_line(error)[:160]
        raise UserError(f"{found} does not load into this model ({reason}); it is damaged or of another one") from error


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _ending(name: str) -> str:
    """The last part of a layer's name, with the part before it if the last is a number ("to_out.0")."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() and len(parts) > 1 else parts[-1]
