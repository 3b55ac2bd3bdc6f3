"""Prompts, manifests and atomic writes."""

from __future__ import annotations

import json
import math
import os

import pytest

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_path, atomic_write, atomic_write_json, ensure_directory
from vggrpo.io.manifest import ManifestRow, read_jsonl, read_manifest, write_jsonl, write_manifest
from vggrpo.io.prompts import read_prompts

ROW = {"path": "a.mp4", "prompt": "a red ball", "seed": 1, "fps": 8, "arm": "base"}


def test_prompts_skip_empty_lines_and_comments_and_keep_the_rest(tmp_path):
    long = "word " * 500
    lines = ["\ufeffa red ball", "", "   ", "# a comment", "ein grüner Würfel", "一只猫在跑", "a red ball", long]
    (tmp_path / "p.txt").write_text("\r\n".join(lines), encoding="utf-8")
    expected = ["a red ball", "ein grüner Würfel", "一只猫在跑", "a red ball", long.strip()]
    assert read_prompts(tmp_path / "p.txt") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no prompt"), (b"\n\n# only this\n", "no prompt"), (b"\xff\xfe\x00a", "UTF-8"), (b"a\0b", "binary")],
)
def test_bad_prompt_files_name_the_remedy(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / "p.txt")
    assert "one prompt a line" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_prompt_file_and_directory(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="is a directory"):
        read_prompts(tmp_path)


@pytest.mark.parametrize("name", ["world_r1_train.txt", "vbench_all_dimension.txt", "vbench2_camera_motion.txt"])
def test_real_prompt_files(shared_dir, name):
    prompts = read_prompts(shared_dir / "data" / "prompts" / name)
    assert len(prompts) > 50 and all(prompt.strip() == prompt and prompt for prompt in prompts)


def test_manifest_round_trip(tmp_path):
    rows = [
        ManifestRow("a b.mp4", 'quote " and <script>', 0, 8.0, "base", ("static",)),
        ManifestRow("ü.mp4", "猫", 7, 24.5, "tuned"),
    ]
    assert read_manifest(write_manifest(tmp_path / "m.jsonl", rows)) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "1"}, "seed is '1', expected int"),
        ({"seed": True}, "seed is True, expected int"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": None}, "fps is None"),
        ({"tags": "static"}, "tags"),
        ({"prompt": 3}, "prompt is 3"),
        ({"fps": 10**400}, "fps is 1000"),
        ({"prompt": "\ud800"}, "half a letter"),
    ],
)
def test_bad_manifest_rows_name_row_and_field(tmp_path, change, message):
    (tmp_path / "m.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, **change}))
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(tmp_path / "m.jsonl")
    assert "row 2" in str(caught.value)


def test_manifest_missing_field_empty_and_not_json(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({key: value for key, value in ROW.items() if key != "arm"}))
    with pytest.raises(UserError, match="lacks the field 'arm'"):
        read_manifest(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        read_manifest(path)
    path.write_text("{}\n\n{oops")
    with pytest.raises(UserError, match=r"m\.jsonl:3 is not JSON"):
        read_jsonl(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_jsonl(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="expected JSON lines"):
        read_jsonl(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match="JSON list, expected an object"):
        read_jsonl(path)
    with pytest.raises(UserError, match="does not exist"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_prompts_with_line_separators_survive_json_lines(tmp_path):
    rows = [{"prompt": "one\u2028two\u0085three"}]
    assert read_jsonl(write_jsonl(tmp_path / "r.jsonl", rows)) == rows


def test_nan_is_not_json_and_nothing_is_overwritten(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [{"value": 1.0}])
    with pytest.raises(ValueError, match="Out of range float"):
        write_jsonl(path, [{"value": math.nan}])
    with pytest.raises(ValueError, match="Out of range float"):
        atomic_write_json(path, {"value": math.inf})
    assert read_jsonl(path) == [{"value": 1.0}]


def test_atomic_path_replaces_only_on_success(tmp_path):
    target = atomic_write(tmp_path / "deep" / "er" / "file.txt", "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == target.parent
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_path_says_when_nothing_was_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_path(tmp_path / "f.txt"):
        pass


def test_directories_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another output directory"):
        ensure_directory(tmp_path / "file")
    with pytest.raises(UserError, match="name another output directory"):
        ensure_directory(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="is a directory"):
        atomic_write(tmp_path, "text")
    if os.path.isdir("/proc/1"):  # a place where even root cannot create files
        with pytest.raises(UserError, match="cannot write to"):
            ensure_directory("/proc/1/task")


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores permission bits")
def test_read_only_directory(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="cannot write to"):
            ensure_directory(tmp_path)
    finally:
        tmp_path.chmod(0o755)
