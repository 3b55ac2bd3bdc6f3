"""The caption grammar of the embedded world: attributes -> sentence -> attributes, and the prompt splits.

A caption names the camera move, the room, every object with its colour, and what moves. It never says whether the
footage is hand-held: as on the web, nobody writes that down, so a generator should learn both, for a reward to choose.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
SHAPES = ("ball", "box", "cylinder")
ROOMS = ("wooden", "stone", "tiled", "brick", "plain")
MOTIONS = {"ball": ("rolls", "swings"), "box": ("slides", "swings"), "cylinder": ("slides", "swings")}
MOTION_VERBS = ("rolls", "slides", "swings")

CAMERA_PHRASES = {
    "fixed": ("stays still", "is fixed"),
    "orbit_left": ("orbits to the left", "circles left"),
    "orbit_right": ("orbits to the right", "circles right"),
    "dolly_in": ("dollies in", "moves forward"),
    "dolly_out": ("dollies out", "moves backward"),
    "truck_left": ("trucks left", "glides left"),
    "truck_right": ("trucks right", "glides right"),
    "pedestal_up": ("rises", "pedestals up"),
    "pedestal_down": ("sinks", "pedestals down"),
    "pan_left": ("pans left", "turns left"),
    "pan_right": ("pans right", "turns right"),
    "tilt_up": ("tilts up", "looks up"),
    "tilt_down": ("tilts down", "looks down"),
}
CAMERA_MOVES = tuple(CAMERA_PHRASES)
_TRANSLATIONS = ("dolly_in", "dolly_out", "truck_left", "truck_right", "pedestal_up", "pedestal_down")
_ROTATIONS = ("pan_left", "pan_right", "tilt_up", "tilt_down")
_TEMPLATES = (
    "The camera {camera} in a {room} room with {objects}.{motion}",
    "A {room} room with {objects}. The camera {camera}.{motion}",
    "Inside a {room} room, the camera {camera}. There is {objects}.{motion}",
)
SPLITS = ("train", "heldout", "demo")


def sample_attributes(rng: np.random.Generator, split: str | None = None, camera: str | None = None) -> dict:
    """Draw attributes: `camera` (one or two moves), `room`, and `objects` with `colour`, `shape`, `motion`.

    Args:
        split: keep drawing until `split_of` agrees; None takes the first draw.
        camera: force one move, or two joined by "+".
    """
    while True:
        attributes = {
            "camera": camera.split("+") if camera else _sample_camera(rng),
            "room": str(rng.choice(ROOMS)),
            "objects": _sample_objects(rng),
        }
        if split is None or split_of(attributes) == split:
            return attributes


def _sample_camera(rng: np.random.Generator) -> list[str]:
    if rng.random() < 0.15:
        return [str(rng.choice(_TRANSLATIONS)), str(rng.choice(_ROTATIONS))]
    weights = np.array([0.5 if move == "fixed" else 1.0 for move in CAMERA_MOVES])
    return [str(rng.choice(CAMERA_MOVES, p=weights / weights.sum()))]


def _sample_objects(rng: np.random.Generator) -> list[dict]:
    count = int(rng.choice([1, 2, 3], p=[0.35, 0.4, 0.25]))
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    chosen = rng.choice(len(pairs), size=count, replace=False)
    moves = rng.random() < 0.5  # half of all scenes are static
    objects = []
    for k, index in enumerate(chosen):
        colour, shape = pairs[index]
        motion = str(rng.choice(MOTIONS[shape])) if moves and (k == 0 or rng.random() < 0.3) else None
        objects.append({"colour": colour, "shape": shape, "motion": motion})
    return objects


def split_of(attributes: dict) -> str:
    """Which split a prompt belongs to, from what it says and not from how: 1 in 20 `demo`, 1 in 20 `heldout`."""
    objects = sorted(f"{o['colour']}{o['shape']}{o['motion']}" for o in attributes["objects"])
    key = "|".join([*sorted(attributes["camera"]), attributes["room"], *objects])
    bucket = hashlib.sha256(key.encode()).digest()[0] % 20
    return {0: "demo", 1: "heldout"}.get(bucket, "train")


def caption(attributes: dict, rng: np.random.Generator) -> str:
    """One sentence or three that say the attributes; wording drawn from `rng`."""
    camera = " and ".join(str(rng.choice(CAMERA_PHRASES[move])) for move in attributes["camera"])
    names = [f"a {o['colour']} {o['shape']}".replace("a orange", "an orange") for o in attributes["objects"]]
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    motion = "".join(f" The {o['colour']} {o['shape']} {o['motion']}." for o in attributes["objects"] if o["motion"])
    text = str(rng.choice(_TEMPLATES))
    return text.format(camera=camera, room=attributes["room"], objects=listed, motion=motion)


def caption_to_attributes(text: str) -> dict | None:
    """The attributes that a caption of this grammar names, or None when the text is not of the grammar."""
    words = text.lower()
    camera = [move for move, phrases in CAMERA_PHRASES.items() if any(re.search(rf"\b{p}\b", words) for p in phrases)]
    room = [room for room in ROOMS if re.search(rf"\b{room} room\b", words)]
    pair = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    named = list(dict.fromkeys(re.findall(rf"\ban? {pair}\b", words)))
    moving = {(c, s): verb for c, s, verb in re.findall(rf"\bthe {pair} ({'|'.join(MOTION_VERBS)})\b", words)}
    if not camera or len(room) != 1 or not named:
        return None
    objects = [{"colour": c, "shape": s, "motion": moving.get((c, s))} for c, s in named]
    return {"camera": camera, "room": room[0], "objects": objects}


def sample_prompts(n: int, seed: int, split: str = "train") -> list[str]:
    """`n` different prompts of one split ("train", "heldout", "demo"); half of the scenes move."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        prompts[caption(sample_attributes(rng, split), rng)] = None
    return list(prompts)
