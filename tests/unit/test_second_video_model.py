"""A second video model is one file: LTX-Video's transformer (random, tiny) behind the protocol, trained by GRPO, its
LoRA read by its own diffusers pipeline. Its blocks, its tokens and its time are not Wan's."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from fake_lgm import fake_lgm

from vggrpo.config import load_config
from vggrpo.errors import UserError
from vggrpo.models.base import LatentSpec, VideoModel
from vggrpo.models.sharding import repeated_blocks
from vggrpo.posttraining import train
from vggrpo.sampling.generate import solve

TEXT = 5  # tokens of every text


class LTXVideoModel:
    """The file that a new model takes, but for loading, text encoder and VAE."""

    pipeline = "LTXPipeline"
    frame_times = False
    autocast = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
            num_layers=2, caption_channels=16,
        ).eval().requires_grad_(False)  # fmt: skip
        self.latent_spec = LatentSpec(8, temporal_stride=8, spatial_stride=32, patch_size=(1, 1, 1))

    @property
    def device(self):
        return next(self.transformer.parameters()).device

    def release_encoders(self, vae=True):
        pass

    def encode_prompt(self, prompts):
        seeds = [sum(prompt.encode()) for prompt in prompts]
        return torch.stack([torch.randn(TEXT, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def encode_video(self, video):
        raise NotImplementedError

    def decode(self, latents):
        b, _, t, h, w = latents.shape
        return torch.zeros(b, 3, 8 * t - 7, 32 * h, 32 * w)

    def predict_velocity(self, latents, t, text):
        frames, height, width = latents.shape[2:]
        output = self.transformer(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=1000 * t,
            encoder_attention_mask=torch.ones(text.shape[:2]),
            num_frames=frames,
            height=height,
            width=width,
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, (frames, height, width)).float()

    def sigmas(self, num_steps, shift=None):
        return torch.linspace(1, 0, num_steps + 1)

    def solver(self, num_steps):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(num_steps)
        return scheduler


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("ltx")
    config = load_config(
        "tiny",
        ["updates=2", f"output={output}", "model.gradient_checkpointing=true", "sampling.num_steps=3",
         "sampling.window=2", "sampling.window_last=null", "data={num_frames: 25, height: 64, width: 64}",
         "grpo.prompts_per_update=1", "grpo.samples_per_prompt=3", "grpo.base_travel_samples=1", "lora.rank=2",
         "rewards={camera_motion_smoothness: 1}", "stop={}"],
    )  # fmt: skip
    model = LTXVideoModel()
    train(config, model=model, lgm=fake_lgm, prompts=["one", "two"], progress=False)
    return model, output


def test_it_is_a_video_model():
    model = LTXVideoModel()
    assert isinstance(model, VideoModel)
    assert [type(block).__name__ for block in repeated_blocks(model.transformer)] == ["LTXVideoTransformerBlock"] * 2
    with pytest.raises(UserError, match="does not name its blocks"):
        repeated_blocks(torch.nn.Linear(2, 2))


def test_its_own_pipeline_reads_the_lora(trained):
    model, output = trained
    plain = LTXVideoModel()
    state, metadata = LTXPipeline.lora_state_dict(str(output / "lora"), return_lora_metadata=True)
    LTXPipeline.load_lora_into_transformer(state, plain.transformer, metadata=metadata)  # as load_lora_weights does
    assert any(p.any() for name, p in plain.transformer.named_parameters() if "lora_B" in name)
    options = {"shape": model.latent_spec.latent_shape(25, 64, 64), "seeds": [1], "num_steps": 3}
    tuned, loaded, base = (solve(each, ["one"], **options) for each in (model, plain, LTXVideoModel()))
    torch.testing.assert_close(loaded, tuned)
    assert not torch.allclose(base, tuned)
    assert "LTXPipeline.from_pretrained" in (output / "lora" / "README.md").read_text()
