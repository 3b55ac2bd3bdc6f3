"""Training an LGM in less memory: activations made again, a batch in parts; the numbers stay the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import test_models_any4d
import test_models_depth_anything_3
import test_models_vggt
import torch
from torch import Tensor, nn

from vggrpo.geometry import GeometryPrediction
from vggrpo.lgm import LatentGeometryModel, LGMConfig, losses
from vggrpo.models import dpt, recompute

BACKENDS = {
    "any4d": test_models_any4d.tiny,
    "depth_anything_3": test_models_depth_anything_3.tiny,
    "vggt": test_models_vggt.public,
}


def lgm_with_lora(build: Callable[[], nn.Module]) -> LatentGeometryModel:
    geometry = build()
    torch.manual_seed(0)
    config = LGMConfig(geometry="", vae="test", latent_channels=4, stride=1, lora_rank=2, backend=geometry.model_type)
    model = LatentGeometryModel(config, geometry)
    model.add_lora()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: LatentGeometryModel, bf16: bool) -> dict[str, Tensor]:
    latents = torch.randn(2, 4, 3, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        prediction, raw = model.predict(latents)
    outputs = (prediction.depth, prediction.cam2world, prediction.intrinsics, raw["conf_logit"])
    sum(x.float().square().mean() for x in outputs).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_made_again_give_the_same_gradients(backend, bf16, monkeypatch):
    """Bit for bit, with heads that take views in chunks, in every backend; not where nothing is trained."""
    monkeypatch.setattr(dpt.in_chunks, "__defaults__", (2,))
    calls = []
    again = recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda *args, **named: calls.append(1) or again(*args, **named))
    model = lgm_with_lora(BACKENDS[backend]).train()
    kept = gradients(model, bf16)
    assert not calls and len(kept) > 20
    recompute.set_recompute(model, True)
    made = gradients(model, bf16)
    assert len(calls) > 5 and made.keys() == kept.keys()
    if bf16:  # of two equal runs on a CPU, the bfloat16 gradient of a 3D convolution's weight is not the same
        del kept["connector.conv.weight"]
    assert all(torch.equal(made[name], kept[name]) for name in kept)
    calls.clear()
    gradients(model.eval(), bf16)
    with torch.no_grad():
        model.train().predict(torch.zeros(1, 4, 2, 3, 4))
    assert not calls


def part_of(geometry: GeometryPrediction, clips: slice) -> GeometryPrediction:
    """Some clips of a prediction."""
    values = {field.name: getattr(geometry, field.name) for field in fields(geometry)}
    return replace(geometry, **{k: v[clips] for k, v in values.items() if isinstance(v, Tensor) and k != "frame_index"})


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_losses():
    """Flow too, whose moving pixels are counted over the whole batch: here more of them move from clip to clip."""
    draw = torch.Generator().manual_seed(0)
    poses = torch.eye(4, dtype=torch.float64).repeat(4, 2, 1, 1)
    poses[:, 1, 0, 3] = torch.rand(4, generator=draw, dtype=torch.float64)
    lens = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]], dtype=torch.float64).expand(4, 2, 3, 3)
    maps = 1 + torch.rand(3, 4, 2, 8, 8, generator=draw, dtype=torch.float64)
    flow = torch.rand(2, 4, 2, 8, 8, 3, generator=draw, dtype=torch.float64)
    for clip in range(4):
        flow[0, clip, :, : 7 - 2 * clip] = 0
    conf = (maps[2] > 1.2).double()
    teacher = GeometryPrediction.from_depth(poses, lens, maps[0], conf, scene_flow=flow[0])
    student = GeometryPrediction.from_depth(poses.clone(), lens, maps[1], scene_flow=flow[1])
    whole, parts = losses.distillation_loss(student, {}, teacher)
    moving = losses.moving_mask(teacher).sum()
    assert 0 < moving < 4 * 2 * 8 * 8
    total = 0.0
    for clips in (slice(0, 3), slice(3, 4)):
        share = (clips.stop - clips.start) / 4
        loss, _ = losses.distillation_loss(
            part_of(student, clips), {}, part_of(teacher, clips), moving_pixels=moving * share
        )
        total += share * loss
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    alone = losses.distillation_loss(part_of(student, slice(3, 4)), {}, part_of(teacher, slice(3, 4)))[1]
    assert alone["flow"] != parts["flow"]
