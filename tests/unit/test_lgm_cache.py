"""The cache of LGM training: sources of every kind, bad videos, duplicates, interruption, damage, refusals."""

from __future__ import annotations

import itertools
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lgm_material import FRAMES, SIZE, BlockVAE, frames, teacher, write_videos

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.io.manifest import ManifestRow, write_manifest
from vggrpo.io.video import write_video
from vggrpo.lgm.cache import CachedClips, CacheSettings, build_cache, encode_clips, pack_geometry, teacher_views
from vggrpo.lgm.clips import Clip, Source, fit_frame, kept_share, video_sources
from vggrpo.models.base import LatentSpec
from vggrpo.models.border import patch_image_size

SETTINGS = CacheSettings({"VAE": "a", "teacher": "b"}, view_stride=4, shard_size=2, micro_batch=2)


def sources(path, **options):
    return video_sources(str(path), num_frames=FRAMES, size=SIZE, **options)


def build(folder, path, settings=SETTINGS, max_clips=99, **options):
    build_cache(folder, sources(path, **options), BlockVAE(), teacher(), settings, max_clips=max_clips)
    return CachedClips(folder)


def test_rows_are_latents_views_and_the_teachers_word(tmp_path):
    clips = build(tmp_path / "cache", write_videos(tmp_path / "videos", 3))
    assert sorted(clips.keys) == ["v0.mp4#0", "v1.mp4#0", "v2.mp4#0"] and set(clips.kinds) == {"real"}
    rows = clips.rows([0, 2])
    assert rows["latents"].shape == (2, 3, 3, 4, 6) and rows["views"].shape == (2, 3, 3, *SIZE)
    got, want = clips.geometry(rows, 4), teacher()(rows["views"].float() / 255)
    for name in ("cam2world", "intrinsics", "depth", "points", "conf", "scene_flow"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=2e-3, atol=2e-3)
    assert got.frame_index.tolist() == [0, 4, 8] and torch.equal(got.dynamic_mask, want.dynamic_mask)
    video = rows["views"].float() / 255
    torch.testing.assert_close(
        rows["latents"].float(), BlockVAE().encode_video(video.transpose(1, 2).repeat_interleave(4, 2)[:, :, :9]),
        rtol=1e-2, atol=1e-2,
    )  # fmt: skip


def test_folders_manifests_tars_and_globs_hold_the_same_clips(tmp_path):
    folder = write_videos(tmp_path / "videos", 3, length=2 * FRAMES + 3)
    write_manifest(folder / "m.jsonl", [ManifestRow(f"v{i}.mp4", "p", i, 10, "real") for i in range(3)])
    for shard, members in (("a-0.tar", (0, 1)), ("a-1.tar", (2,))):
        with tarfile.open(tmp_path / shard, "w") as archive:
            for i in members:
                archive.add(folder / f"v{i}.mp4", arcname=f"../{i}.mp4")  # a name that would leave the folder
    wanted = [clip.video for source in sources(folder) for clip in source.clips()]
    assert len(wanted) == 6  # two whole clips of each, the rest is left
    for path in (folder / "m.jsonl", tmp_path / "a-*.tar"):
        got = [clip.video for source in sources(path) for clip in source.clips()]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert len([clip for source in sources(folder, clips_per_video=1) for clip in source.clips()]) == 3


def test_of_a_webdataset_shard_only_the_videos_are_read(tmp_path, caplog):
    """Beside a key's video lie its caption and its numbers."""
    folder = write_videos(tmp_path / "videos", 2)
    with tarfile.open(tmp_path / "a-0.tar", "w") as archive:
        for key in ("v0", "v1"):
            (folder / f"{key}.json").write_text('{"fps": 10}')
            (folder / f"{key}.txt").write_text("a caption")
            for suffix in ("json", "mp4", "txt"):
                archive.add(folder / f"{key}.{suffix}", arcname=f"{key}.{suffix}")
    clips = build(tmp_path / "cache", tmp_path / "a-0.tar")
    assert sorted(clips.keys) == ["a-0.tar/v0.mp4#0", "a-0.tar/v1.mp4#0"]
    assert not caplog.messages  # nothing was tried and passed over


@pytest.mark.parametrize("place", ["a-{:03}.tar", "{:03}/a.tar"])
def test_shards_are_numbered_in_braces(tmp_path, place):
    folder = write_videos(tmp_path / "videos", 1)
    for number in range(8, 12):
        shard = tmp_path / place.format(number)
        shard.parent.mkdir(exist_ok=True)
        with tarfile.open(shard, "w") as archive:
            archive.add(folder / "v0.mp4", arcname="v0.mp4")
    pattern = tmp_path / place.replace("{:03}", "{008..010}")
    assert [source.name for source in sources(pattern)] == [f"{place.format(n)}/v0.mp4" for n in (8, 9, 10)]
    with pytest.raises(UserError, match=r"012(/a)?\.tar does not exist"):
        list(sources(tmp_path / place.replace("{:03}", "{010..012}")))


def write_scenes(folder, count=4, length=2 * FRAMES):
    """One folder a scene, and in each a video (and a tar with one) of the same name."""
    for i in range(count):
        scene = folder / f"scene{i}"
        scene.mkdir(parents=True)
        write_video(scene / "video.mp4", frames(i, length), 10)
        write_manifest(scene / "m.jsonl", [ManifestRow("video.mp4", "p", i, 10, "real")])
        with tarfile.open(scene / "shard.tar", "w") as archive:
            archive.add(scene / "video.mp4", arcname="video.mp4")
    return folder


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*/video.mp4", "{}/video.mp4"),
        ("scene[0-9]", "{}/video.mp4"),
        ("**", "{}/video.mp4"),  # finds folders, files, manifests and tars
        ("*/m.jsonl", "{}/video.mp4"),
        ("*/shard.tar", "{}/shard.tar/video.mp4"),
    ],
)
def test_equal_file_names_in_several_folders_are_several_sources(tmp_path, pattern, name):
    found = [source.name for source in sources(write_scenes(tmp_path / "scenes") / pattern)]
    wanted = [name.format(f"scene{i}") for i in range(4)]
    assert [n for n in found if pattern != "**" or "shard.tar" not in n] == wanted and len(found) == len(set(found))


def test_a_cache_of_equal_file_names_goes_on_and_holds_out_whole_videos(tmp_path):
    pattern = write_scenes(tmp_path / "scenes") / "*/video.mp4"
    whole = build(tmp_path / "whole", pattern)
    assert len(whole) == 8 and all(len(part) in (2, 4, 6) for part in whole.split(0.5, whole.keys))
    interrupted(tmp_path / "cut", pattern, 2)
    assert len(CachedClips(tmp_path / "cut")) == 4
    assert_same_clips(contents(build(tmp_path / "cut", pattern)), contents(whole))


def test_bad_videos_are_passed_over_and_named(tmp_path, caplog):
    folder = write_videos(tmp_path / "videos", 2)
    (folder / "corrupt.mp4").write_bytes(b"no video")
    whole = (folder / "v0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    write_video(folder / "one.mp4", frames(5, 1), 10)
    write_video(folder / "portrait.mp4", frames(6, FRAMES, (96, 48)), 10)
    with caplog.at_level(logging.WARNING):
        clips = build(tmp_path / "cache", folder)
    assert sorted(clips.keys) == ["v0.mp4#0", "v1.mp4#0"]
    for name in ("corrupt.mp4", "cut.mp4"):
        assert f"{name} cannot be decoded" in caplog.text
    for words in ("one.mp4 has 1 frames", "portrait.mp4 is 48x96"):
        assert words in caplog.text
    assert "only 33% of the picture would be left" in caplog.text
    assert len(build(tmp_path / "more", folder, min_kept=0.3)) == 3


def test_places_without_videos_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.tar").write_bytes(b"no archive")
    for path, words in (("empty", "holds no video"), ("absent", "does not exist"), ("bad.tar", "no readable .tar")):
        with pytest.raises(UserError, match=words) as error:
            list(sources(tmp_path / path))
        assert "\n" not in str(error.value)


def test_the_middle_is_kept():
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255
    assert (fit_frame(picture, (20, 20)) == 255).all() and fit_frame(picture, (10, 14)).shape == (10, 14, 3)
    assert kept_share((20, 60), (20, 20)) == pytest.approx(1 / 3) and kept_share((90, 160), (480, 832)) > 0.97
    assert kept_share((832, 480), (480, 832)) == pytest.approx((480 / 832) ** 2)


def test_equal_clips_are_kept_once(tmp_path):
    folder = write_videos(tmp_path / "videos", 3)
    (folder / "again.mp4").write_bytes((folder / "v1.mp4").read_bytes())
    clips = build(tmp_path / "cache", folder)
    assert len(clips) == 3 and sum("again" in k or "v1" in k for k in clips.keys) == 1


def counting(path, opened):
    for source in sources(path):

        def clips(source=source):
            opened.append(source.name)
            return source.clips()

        yield Source(source.name, clips)


def contents(clips):
    return {key: {k: v[0] for k, v in clips.rows([i]).items()} for i, key in enumerate(clips.keys)}


def assert_same_clips(one, two):
    assert one.keys() == two.keys()
    for key in one:
        assert all(torch.equal(one[key][name], two[key][name]) for name in one[key])


def interrupted(cache, path, after):
    """Build, but for a Ctrl-C after so many sources."""

    def stopping():
        yield from itertools.islice(sources(path), after)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(cache, stopping(), BlockVAE(), teacher(), SETTINGS, max_clips=99)


def test_an_interrupted_cache_goes_on(tmp_path):
    folder = write_videos(tmp_path / "videos", 5, length=2 * FRAMES)
    whole = contents(build(tmp_path / "whole", folder))

    interrupted(tmp_path / "cut", folder, 3)
    (tmp_path / "cut" / ".clips-x.partial.safetensors").write_bytes(b"half a shard")
    assert 0 < len(CachedClips(tmp_path / "cut")) < 10
    opened = []
    build_cache(tmp_path / "cut", counting(folder, opened), BlockVAE(), teacher(), SETTINGS, max_clips=99)
    assert "v0.mp4" not in opened and "v4.mp4" in opened
    assert_same_clips(contents(CachedClips(tmp_path / "cut")), whole)
    opened.clear()
    build_cache(tmp_path / "cut", counting(folder, opened), BlockVAE(), teacher(), SETTINGS, max_clips=99)
    assert not opened  # nothing is decoded twice


def test_a_damaged_shard_is_refused_then_made_again(tmp_path):
    folder = write_videos(tmp_path / "videos", 4, length=2 * FRAMES)
    whole = contents(build(tmp_path / "cache", folder))
    shard = sorted((tmp_path / "cache").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="missing or damaged"):
        contents(CachedClips(tmp_path / "cache"))
    assert_same_clips(contents(build(tmp_path / "cache", folder)), whole)


def test_a_cache_of_another_vae_is_refused(tmp_path):
    folder = write_videos(tmp_path / "videos", 2)
    before = contents(build(tmp_path / "cache", folder))
    for name in ("VAE", "teacher"):
        other = CacheSettings({**SETTINGS.identity, name: "c"}, 4)
        with pytest.raises(UserError, match=f'made with another {name} \\("[ab]" instead of "c"\\); set cache=DIR'):
            build(tmp_path / "cache", folder, other)
    assert_same_clips(contents(CachedClips(tmp_path / "cache")), before)
    (tmp_path / "cache" / "cache.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        build(tmp_path / "cache", folder)


def test_the_number_of_clips_is_bounded_and_processes_share_them(tmp_path):
    folder = write_videos(tmp_path / "videos", 4, length=2 * FRAMES)
    assert len(build(tmp_path / "few", folder, max_clips=3)) == 3
    whole = contents(build(tmp_path / "whole", folder))

    class Of2:
        size, is_main = 2, True

        def __init__(self, rank):
            self.rank = rank

        def barrier(self):
            pass

    for rank in (0, 1):
        build_cache(
            tmp_path / "two", sources(folder), BlockVAE(), teacher(), SETTINGS, max_clips=99, processes=Of2(rank)
        )
    two = CachedClips(tmp_path / "two")
    assert_same_clips(contents(two), whole)
    assert two.keys == CachedClips(tmp_path / "whole").keys  # the same order, so the same batches


def test_held_out_clips_are_of_other_videos(tmp_path):
    clips = build(tmp_path / "cache", write_videos(tmp_path / "videos", 5, length=2 * FRAMES))
    train, heldout = clips.split(0.3, clips.keys)
    videos = [{clips.keys[i].split("#")[0] for i in part} for part in (train, heldout)]
    assert sorted(train + heldout) == list(range(10)) and all(videos) and not videos[0] & videos[1]
    for share in (1e-9, 1 - 1e-9):
        assert all(clips.split(share, clips.keys))
    few = [key for key in clips.keys if not key.startswith("v3")]
    parts = clips.split(0.3, few)
    assert sorted(clips.keys[i] for part in parts for i in part) == sorted(few)
    with pytest.raises(UserError, match="one must be held out"):
        clips.split(0.5, ["v3.mp4#0", "v3.mp4#9"])


def test_a_run_takes_the_first_clips_of_its_own_sources(tmp_path):
    clips = build(tmp_path / "cache", write_videos(tmp_path / "videos", 3, length=12 * FRAMES), clips_per_video=12)
    names = ["absent.mp4", "v2.mp4", "v0.mp4"]
    frames_of = [f"#{FRAMES * i}" for i in range(12)]  # in the order of time: #9 before #18 and #108
    assert clips.first_of(names, 13) == [*("v2.mp4" + frame for frame in frames_of), "v0.mp4#0"]
    assert len(clips.first_of(names, 99)) == 24 and clips.first_of([], 5) == []


def test_a_run_finds_its_clips_under_the_names_of_others(tmp_path):
    folder = write_videos(tmp_path / "videos", 2)
    build(tmp_path / "cache", folder)
    (folder / "v1.mp4").rename(folder / "renamed.mp4")
    clips = build(tmp_path / "cache", folder)
    assert len(clips) == 2 and clips.first_of(["renamed.mp4", "v1.mp4", "v0.mp4"], 3) == ["v1.mp4#0", "v0.mp4#0"]


def test_generated_clips_and_unknown_depth():
    latents = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    (row,) = encode_clips([Clip("g#0", latents=latents, kind="generated")], BlockVAE(), teacher(), 4)
    torch.testing.assert_close(row["latents"].float(), latents, rtol=1e-3, atol=1e-3)
    assert row["views"].shape == (3, 3, *SIZE)

    class Far(type(teacher())):
        def predict(self, frames):
            out, raw = super().predict(frames)
            out.depth[0, 0, 0, :3] = torch.tensor([torch.inf, torch.nan, 1e6])
            return out, raw | {"flow_from_first": out.points - out.points[:, :1]}

    model = teacher()
    model.__class__ = Far
    (row,) = encode_clips([Clip("g#0", latents=latents)], BlockVAE(), model, 4)
    assert row["flow_from_first"].shape == (3, *SIZE, 3)
    assert row["depth"].isfinite().all() and row["conf"][0, 0, :2].tolist() == [0, 0] and row["conf"][0, 0, 2] > 0


def test_views_come_at_the_size_the_geometry_model_wants():
    class Small(type(teacher())):
        def image_size_for(self, video_size):
            return video_size[0] * 14 // 16, video_size[1] * 14 // 16

    model = teacher()
    model.__class__ = Small
    views = teacher_views(torch.full((1, 3, 9, 32, 48), 0.5), model, 4)
    assert views.shape == (1, 3, 3, 28, 42) and views.unique().tolist() == [128]


def test_sidecars_are_json(tmp_path):
    build(tmp_path / "cache", write_videos(tmp_path / "videos", 2))
    sidecar = max((tmp_path / "cache").glob("clips-*.json"), key=lambda p: p.stat().st_size)
    row = json.loads(sidecar.read_text())
    assert len(row["clips"]) == 2 and row["sha256"] and "v0.mp4" in row["done"]
    sidecar.write_text("{")
    with pytest.raises(UserError, match="damaged; delete it"):
        CachedClips(tmp_path / "cache")


@pytest.mark.parametrize(
    "name, clip, spec", [("Wan2.1 at", (81, 480, 832), (16, 4, 8)), ("Wan2.2 at", (121, 704, 1280), (48, 4, 16))]
)
def test_the_docs_say_how_large_a_clip_is(name, clip, spec):
    """By shapes alone: Any4D sees a token of 16 pixels as 14, and gives depth, confidence, two flows and a mask."""
    latents = torch.zeros(1, *LatentSpec(*spec).latent_shape(*clip), device="meta").half()
    maps = (1, latents.shape[2], *patch_image_size(clip[1:], 14))
    cameras = torch.zeros(*maps[:2], 4, 4, device="meta"), torch.zeros(*maps[:2], 3, 3, device="meta")
    flow = torch.zeros(*maps, 3, device="meta")
    moves = torch.zeros(maps, dtype=torch.bool, device="meta")
    said = GeometryPrediction.from_depth(
        *cameras, torch.zeros(maps, device="meta"), scene_flow=flow, dynamic_mask=moves
    )
    views, first_flow = torch.zeros(*maps, 3, dtype=torch.uint8, device="meta"), flow.half()
    columns = [latents, views, first_flow, *pack_geometry(said).values()]
    megabytes = sum(column.numel() * column.element_size() for column in columns) / 1e6
    page = (Path(__file__).parents[2] / "docs" / "train_lgm.md").read_text(encoding="utf-8")
    assert f"{megabytes:.0f} MB for {name} {clip[1]}x{clip[2]}x{clip[0]}" in page
