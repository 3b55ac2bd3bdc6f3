"""Prompt sets: counts, balance, no two alike; camera words of other benchmarks become tags."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from vggrpo.errors import UserError
from vggrpo.evaluation.benchmarks import SHIPPED, WORLD, load_prompt_set, load_prompt_sets
from vggrpo.io.camera_words import camera_moves
from vggrpo.io.prompts import read_prompts
from vggrpo.world import CAMERA_MOVES
from vggrpo.world.captions import caption_to_attributes, split_of


def tags(prompts, prefix: str) -> list[tuple[str, ...]]:
    return [tuple(tag for tag in prompt.tags if tag.startswith(prefix)) for prompt in prompts]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_are_large_and_balanced(name):
    prompts = load_prompt_set(name)
    moves, scenes = tags(prompts, "camera:"), tags(prompts, "scene:")
    assert len(prompts) >= 100 and all(name in prompt.tags for prompt in prompts)
    assert all(len(found) == 1 for found in (*moves, *scenes))
    expected = {f"camera:{move}" for move in CAMERA_MOVES} - ({"camera:fixed"} if name == "static" else set())
    assert {move for (move,) in moves} == expected
    # Crossed: each kind of scene meets each camera move once.
    assert set(Counter(zip(scenes, moves, strict=True)).values()) == {1}
    assert len(Counter(scenes)) == 10 and len(prompts) == 10 * len(expected)
    before = sum(bool(camera_moves(prompt.text.split(". ")[0] + ".")) for prompt in prompts)
    assert before == len(prompts) / 2  # the camera is named first in half of them


def test_no_two_shipped_prompts_are_alike():
    words = [frozenset(prompt.text.lower().rstrip(".").split()) for prompt in load_prompt_sets(SHIPPED)]
    assert len(set(words)) == len(words) == 250
    alike = max(len(a & b) / len(a | b) for i, a in enumerate(words) for b in words[:i])
    assert alike < 0.6


def test_shipped_prompts_are_in_no_list_of_other_benchmarks(shared_dir):
    known = {line.lower().strip(" .") for file in (shared_dir / "data" / "prompts").glob("*.txt") for line in
             file.read_text(encoding="utf-8").splitlines()}  # fmt: skip
    scenes = {part.lower().strip(" .") for prompt in load_prompt_sets(SHIPPED) for part in prompt.text.split(". ")}
    assert known and not {scene for scene in scenes & known if not camera_moves(scene + ".")}


@pytest.mark.parametrize("name", WORLD)
def test_world_sets_are_held_out(name):
    prompts = load_prompt_set(name)
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 96
    for prompt in prompts:
        attributes = caption_to_attributes(prompt.text)
        assert split_of(attributes) == "heldout"
        assert sorted(tags([prompt], "camera:")[0]) == sorted(f"camera:{move}" for move in attributes["camera"])
        assert any(thing["motion"] for thing in attributes["objects"]) == (prompt.tags[0] == "dynamic")


def test_lists_of_other_benchmarks(shared_dir):
    folder = shared_dir / "data" / "prompts"
    for name in ("world_r1_train.txt", "world_r1_dynamic.txt", "world_r1_test.txt"):
        prompts = load_prompt_set(str(folder / name))
        spoken = [p for p in prompts if p.text.startswith("Camera ")]
        assert len(spoken) > 10 and all(tags([p], "camera:")[0] for p in spoken)
    motion = load_prompt_set(str(folder / "vbench2_camera_motion.txt"))
    named = Counter(found for found in tags(motion, "camera:"))
    assert named["camera:zoom_in",] == named["camera:fixed",] == named["camera:pan_left",] == 12
    everything = str(folder / "vbench_all_dimension.txt")
    assert len(load_prompt_sets([everything])) == len(set(read_prompts(everything)))


def test_json_of_vbench_and_merging(tmp_path: Path):
    file = tmp_path / "VBench_full_info.json"
    rows = [{"prompt_en": "a cat, pan left", "dimension": ["camera_motion"]}, {"prompt_en": "a dog"}] * 2
    file.write_text(json.dumps(rows))
    (tmp_path / "own.txt").write_text("# tags: static\na dog\n\n# tags: dynamic mine\na bird\n")
    found = {p.text: p.tags for p in load_prompt_sets([str(file), str(tmp_path / "own.txt")])}
    assert found == {
        "a cat, pan left": ("dimension:camera_motion", "camera:pan_left"), "a dog": ("static",),
        "a bird": ("dynamic", "mine"),
    }  # fmt: skip
    part = load_prompt_sets(SHIPPED, limit=24)
    assert len(part) == 48 and len({scene for scene in tags(part, "scene:")}) == 20


def test_missing_and_broken_sets_are_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="static, dynamic, world-static"):
        load_prompt_set("statik")
    (tmp_path / "empty.txt").write_text("# tags: a\n")
    with pytest.raises(UserError, match="no prompt"):
        load_prompt_set(str(tmp_path / "empty.txt"))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="prompt_en"):
        load_prompt_set(str(tmp_path / "x.json"))
