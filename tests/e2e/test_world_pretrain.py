"""All recipes of the shipped models in short: two steps each on eight clips, from rendering to the audit."""

from __future__ import annotations

import json

import pytest

from vggrpo.assets import NAMES
from vggrpo.errors import UserError
from vggrpo.pretraining import data, lgm, pretrain


def test_recipes_in_short(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_SIZE", 8)
    monkeypatch.setattr(lgm, "GENERATED_PROMPTS", 8)
    monkeypatch.setattr(lgm, "AUDIT_CLIPS", 8)
    with pytest.raises(UserError, match="needs"):
        pretrain("lgm", tmp_path, shards=2, steps=2)
    for name in ("pipeline", "geometry", "judge", "attributes", "lgm"):
        assert name in NAMES
        made = pretrain(name, tmp_path, shards=2, steps=2)
        assert json.loads((made / "card.json").read_text())
    audit = json.loads((tmp_path / "lgm" / "audit.json").read_text())
    assert {"floor", "base_value", "passed"} <= set(audit) and (tmp_path / "lgm" / "audit.html").is_file()
    (tmp_path / "lgm" / "config.json").unlink()
    made = pretrain("lgm", tmp_path, shards=2)  # without steps: the closed form
    assert json.loads((made / "config.json").read_text())["lora_rank"] == 0
    again = pretrain("judge", tmp_path / "again", shards=1, steps=1, start=tmp_path)
    assert (again / "model.safetensors").is_file()
