"""Camera words: everyday wording, the captions of the embedded world, and published lists of prompts."""

from __future__ import annotations

import pytest

from vggrpo.io.camera_words import MOVES, camera_moves
from vggrpo.world import CAMERA_MOVES, sample_prompts
from vggrpo.world.captions import CAMERA_PHRASES, caption_to_attributes


@pytest.mark.parametrize("move", CAMERA_MOVES)
def test_every_phrase_of_the_embedded_grammar_is_read(move):
    for phrase in CAMERA_PHRASES[move]:
        for text in (f"The camera {phrase} in a stone room with a red ball.", f"A brick room. The camera {phrase}."):
            assert camera_moves(text) == (move,)


def test_whole_captions_name_what_their_attributes_say():
    for prompt in sample_prompts(200, 5):
        attributes = caption_to_attributes(prompt)
        assert sorted(camera_moves(prompt)) == sorted(attributes["camera"]), prompt


@pytest.mark.parametrize(
    ("text", "moves"),
    [
        ("Garden, zoom in.", ("zoom_in",)),
        ("Camera move right, pull out, then pan right. A desert canyon.", ("truck_right", "dolly_out", "pan_right")),
        ("Camera push in, then pan left. Deep canyon walls.", ("dolly_in", "pan_left")),
        ("The camera orbits around in a clockwise direction. Garden.", ("orbit_left",)),
        ("The camera orbits around. Castle, the camera circles around.", ("orbit",)),
        ("the camera circles the statue counter-clockwise", ("orbit_right",)),
        ("Camera slowly pans to the left over a bay", ("pan_left",)),
        ("The camera pulls back and rises.", ("dolly_out", "pedestal_up")),
        ("A tracking shot to the left along a fence", ("truck_left",)),
        ("A crane shot straight up. A pond.", ("pedestal_up",)),
        ("a shark is swimming in the ocean, tilt down", ("tilt_down",)),
        ("Vase, static shot, the camera is fixed.", ("fixed",)),
        ("The camera movement is static. Garden, static shot, the camera is fixed.", ("fixed",)),
        ("Camera fixed. Snow falling.", ("fixed",)),
        ("The camera does not move", ("fixed",)),
        ("The camera holds still, then tilts up", ("tilt_up",)),
        ("A car moves forward while a balloon rises. A truck turns left.", ()),
        ("A train pulls out of a station and turns left. The pan left on the stove rises.", ()),
        ("A man pulls out a knife and pushes into the crowd", ()),
        ("A dog on a beach", ()),
        ("漢字 und Ünïcode", ()),
        ("", ()),
    ],
)
def test_everyday_wording(text, moves):
    assert camera_moves(text) == moves
    assert set(moves) <= set(MOVES)


def test_published_camera_prompts_are_read(shared_dir):
    file = shared_dir / "data" / "prompts" / "vbench2_camera_motion.txt"
    if not file.is_file():
        pytest.skip(f"{file.name} is absent")
    told = {"zoom in": "zoom_in", "zoom out": "zoom_out", "static shot": "fixed", "clockwise": "orbit_left"}
    told |= {f"{verb} {way}": f"{verb}_{way}" for verb, ways in
             (("tilt", ("up", "down")), ("pan", ("left", "right"))) for way in ways}  # fmt: skip
    for prompt in file.read_text(encoding="utf-8").splitlines():
        expected = tuple(move for words, move in told.items() if words in prompt)
        assert camera_moves(prompt) == expected or "dolly movement" in prompt, prompt
