"""Every algorithm that optimises a reward raises one whose best direction is known: the last camera's place, which is a
mean of the last latent frame. (SFT only imitates clips that were chosen by it.)"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fake_lgm import fake_lgm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from test_posttraining_rivals import PROMPTS, config_for

from vggrpo.models.lora import load_tuned
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining import train
from vggrpo.rewards import registry
from vggrpo.rewards.base import Reward
from vggrpo.sampling import ode_sample

pytestmark = pytest.mark.e2e


def to_the_right(prediction, *, context=None, **options):
    """How far the last camera is along x: 1 + the mean of the first channel of the last latent frame."""
    value = prediction.cam2world[:, -1, 0, 3]
    return Reward(value, {}, torch.ones_like(value, dtype=torch.bool))


def reward_of(pipeline, lora=None):
    """The reward of 24 clips whose noise does not depend on the weights."""
    model = WanVideoModel.from_pretrained(pipeline)
    if lora is not None:
        load_tuned(model.transformer, lora)
    with torch.no_grad():
        text = model.encode_prompt(PROMPTS * 8)
        latents = ode_sample(model, text, shape=(4, 4, 4, 4), seeds=range(24), num_steps=3)
    return to_the_right(fake_lgm(latents)).value


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("grpo", ["grpo.prompts_per_update=2", "grpo.kl=0", "grpo.clip=0.1", "sampling.window=2"]),
        ("nft", ["nft.samples_per_prompt=8", "nft.inner_updates=1", "nft.kl=0"]),
        ("direct", ["direct.samples_per_prompt=4", "direct.kl=0"]),
        ("dpo", ["dpo.candidates=4", "dpo.batch=4"]),
    ],
)  # fmt: skip
def test_a_known_reward_rises(tiny_wan_dir, tmp_path, monkeypatch, algorithm, options):
    monkeypatch.setitem(registry.REWARDS, "to_the_right", to_the_right)
    registry.get_reward.cache_clear()
    common = ["rewards={to_the_right: 1}", "optim.learning_rate=0.01", "updates=12", "save_every=12"]
    lora = train(config_for(algorithm, tiny_wan_dir, tmp_path, [*options, *common]), lgm=fake_lgm, prompts=PROMPTS,
                 progress=False)  # fmt: skip
    gain = reward_of(tiny_wan_dir, lora) - reward_of(tiny_wan_dir)
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5, (gain.mean(), gain.std())
