"""DINOv2 against its public implementation, with every parameter redrawn."""

from __future__ import annotations

import pytest
import torch
from redraw import golden, picture, redraw, shapes
from torch import nn

from vggrpo.models.dinov2 import DinoConfig, DinoV2

OPTIONS = {"dim": 32, "depth": 3, "heads": 2, "position_grid": 5}
KINDS = {"plain": {}, "registers": {"registers": 3, "antialias": True, "offset": 0.0}}


def tiny(**options: object) -> DinoV2:
    network = DinoV2(DinoConfig(**{**OPTIONS, **options})).eval()
    redraw(network)
    return network


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_are_those_of_the_public_encoder(kind: str) -> None:
    """3 x 7 patches from positions on 5 x 5: one side shrinks, the other grows."""
    network = tiny(**KINDS[kind])
    want = torch.tensor(golden("dinov2.json")[kind])
    torch.testing.assert_close(network(picture(2, 3, 42, 98))[:, ::4, ::6], want, rtol=0, atol=1e-4)
    for wrong in ({"offset": 0.1 - network.config.offset}, {"antialias": not network.config.antialias}):
        other = tiny(**{**KINDS[kind], **wrong})
        assert (other(picture(2, 3, 42, 98))[:, ::4, ::6] - want).abs().max() > 1e-3


@torch.no_grad()
def test_positions_on_the_learned_grid_are_taken_as_they_are() -> None:
    want = torch.tensor(golden("dinov2.json")["square"])
    torch.testing.assert_close(tiny()(picture(2, 3, 70, 70))[:, ::4, ::6], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_names_and_shapes_are_those_of_the_public_weights(size: str) -> None:
    with torch.device("meta"):
        state = DinoV2(DinoConfig.of_size(size, registers=4)).state_dict()
        plain = DinoV2(DinoConfig.of_size(size)).state_dict()
    want = golden("dinov2.json")[f"keys_{size}"]
    assert shapes(state) == want
    assert shapes(plain) == {key: n for key, n in want.items() if not key.startswith("register_tokens")}


def test_the_mask_token_of_public_weights_is_skipped_and_nothing_else() -> None:
    holder = nn.ModuleDict({"encoder": tiny()})
    state = holder.state_dict()
    holder.load_state_dict(state | {"encoder.mask_token": torch.zeros(1, 32)})
    with pytest.raises(RuntimeError, match="colour"):
        holder.load_state_dict(state | {"encoder.colour": torch.zeros(1)})


def test_queries_and_keys_are_normalised_from_a_block_on() -> None:
    names = {name for name in tiny(qk_norm_from=1).state_dict() if "q_norm" in name or "k_norm" in name}
    assert {name.split(".")[1] for name in names} == {"1", "2"} and len(names) == 8
