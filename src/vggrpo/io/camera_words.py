"""Which camera moves a prompt names: the one parser of camera words, for rewards that ask whether a camera obeyed and
for prompt sets that tag what their prompts ask for.

It reads everyday wording ("the camera slowly pans left", "push in", "orbits clockwise", "static shot"), the lists of
World-R1 and VBench, and the captions of the embedded world, clause by clause. Words that mean a camera wherever they
stand ("zoom in", "pan left", "dolly out") count anywhere; words that things do too ("moves forward", "rises", "turns
left") count only after the word "camera" (or "shot", "view") in the same clause, so that "the car moves forward" moves
no camera.

Not understood, and so not named: tracking shots without a direction, hand-held shake, roll, and other languages than
English.
"""

from __future__ import annotations

import re

FIXED = "fixed"
ORBIT = "orbit"  # around something, the direction is not said
MOVES = (
    "truck_left", "truck_right", "pedestal_up", "pedestal_down", "dolly_in", "dolly_out", "tilt_up", "tilt_down",
    "pan_left", "pan_right", "orbit_left", "orbit_right", ORBIT, "zoom_in", "zoom_out", FIXED,
)  # fmt: skip

_ADVERB = r"(?:\s+(?:\w+ly|then|straight|back|a little|a bit|around|away|the camera))?"
_TO = r"(?:\s+(?:to|toward|towards|from))?(?:\s+the)?"
_LEFT = rf"{_ADVERB}{_TO}\s+(?:left|leftward|leftwards)\b"
_RIGHT = rf"{_ADVERB}{_TO}\s+(?:right|rightward|rightwards)\b"
_UP = rf"{_ADVERB}\s+(?:up|upward|upwards)\b"
_DOWN = rf"{_ADVERB}\s+(?:down|downward|downwards)\b"
_IN = rf"{_ADVERB}\s+(?:in|into|forward|forwards|closer|toward|towards)\b"
_OUT = rf"{_ADVERB}\s+(?:out|back|backward|backwards|away)\b"


def _verb(*stems: str) -> str:
    return rf"\b(?:{'|'.join(stems)})"


_PAN = r"(?<!\bthe )(?<!\ba )" + _verb(r"pans?", r"panning")  # no kitchenware
_TILT = _verb(r"tilts?", r"tilting")
_ORBIT = _verb(r"orbits?", r"orbiting", r"arcs?", r"arcing", r"circles?", r"circling", r"revolves?", r"revolving")
_DOLLY, _ZOOM = _verb(r"doll(?:y|ies|ying)"), _verb(r"zooms?", r"zooming")
_PUSH = _verb(r"push(?:es|ing)?", r"pull(?:s|ing)?")
_TRUCK, _PEDESTAL = _verb(r"trucks?", r"trucking"), _verb(r"pedestals?", r"pedestalling", r"booms?", r"cranes?")
_GOES = _verb(r"(?:tracking|crane) shot", r"moves?", r"moving", r"glides?", r"gliding", r"slides?", r"sliding",
              r"travels?", r"travelling", r"tracks?", r"tracking", r"drifts?", r"drifting", r"advances?", r"flies",
              r"flying")  # fmt: skip
_TURNS = _verb(r"turns?", r"turning", r"rotates?", r"rotating", r"swivels?", r"looks?", r"looking")

# Words of the trade: they mean the camera wherever they stand.
_ANYWHERE: tuple[tuple[str, str], ...] = (
    (_PAN + _LEFT, "pan_left"),
    (_PAN + _RIGHT, "pan_right"),
    (_TILT + _UP, "tilt_up"),
    (_TILT + _DOWN, "tilt_down"),
    (_DOLLY + _IN, "dolly_in"),
    (_DOLLY + _OUT, "dolly_out"),
    (_ZOOM + _IN, "zoom_in"),
    (_ZOOM + _OUT, "zoom_out"),
    (_TRUCK + _LEFT, "truck_left"),
    (_TRUCK + _RIGHT, "truck_right"),
    (_PEDESTAL + _UP, "pedestal_up"),
    (_PEDESTAL + _DOWN, "pedestal_down"),
    (r"\b(?:static|fixed|stationary|locked[- ]off|still)\s+(?:shot|camera|view|viewpoint|frame|tripod)\b", FIXED),
    (r"\bcamera\s+(?:static|fixed|stationary|still)\b", FIXED),
)
# Words that things do as well: only after the camera is named.
_OF_A_CAMERA: tuple[tuple[str, str], ...] = (
    (_ORBIT + _LEFT, "orbit_left"),
    (_ORBIT + _RIGHT, "orbit_right"),
    # Seen from above, a clockwise path keeps its centre to the right: the camera goes left and turns right.
    (_ORBIT + r"[^,]*\b(?<!-)(?<!counter)(?<!anti)clockwise\b", "orbit_left"),
    (_ORBIT + r"[^,]*\b(?:counter|anti)-?\s?clockwise\b", "orbit_right"),
    (_ORBIT + r"\s+(?:\w+ly\s+)?around\b", ORBIT),
    (_PUSH + _IN, "dolly_in"),
    (_PUSH + _OUT, "dolly_out"),
    (_GOES + _LEFT, "truck_left"),
    (_GOES + _RIGHT, "truck_right"),
    (_GOES + _UP, "pedestal_up"),
    (_GOES + _DOWN, "pedestal_down"),
    (_GOES + _IN, "dolly_in"),
    (_GOES + _OUT, "dolly_out"),
    (_TURNS + _LEFT, "pan_left"),
    (_TURNS + _RIGHT, "pan_right"),
    (_TURNS + _UP, "tilt_up"),
    (_TURNS + _DOWN, "tilt_down"),
    (r"\b(?:rises?|rising|ascends?|ascending|lifts?)\b(?!\s+from)", "pedestal_up"),
    (r"\b(?:sinks?|sinking|descends?|descending|lowers?)\b", "pedestal_down"),
    (r"\b(?:approach(?:es|ing)?|closes in)\b", "dolly_in"),
    (r"\b(?:retreats?|retreating|recedes?|withdraws?)\b", "dolly_out"),
    (r"\b(?:stays?|remains?|is|holds?|kept)\s+(?:\w+ly\s+)?(?:still|fixed|static|stationary|motionless)\b", FIXED),
    (r"\b(?:does not|doesn't|do not|don't|never|without|no)\s+(?:mov\w+|camera mov\w+)\b", FIXED),
    (r"\bmovement is static\b", FIXED),
)
_SUBJECT = re.compile(r"\b(?:camera|(?:tracking |crane )?shot|viewpoint|viewer|lens|slow (?:pan|tilt|orbit))\b")
_CLAUSE = re.compile(r"[^.;!?\n]+")


def camera_moves(prompt: str) -> tuple[str, ...]:
    """Names of `MOVES` in a prompt, each once, in the order in which it names them; empty when it names none.

    "fixed" is dropped where another move is named as well ("holds still, then pans left"), and so is an orbit without a
    direction where the direction is said elsewhere.
    """
    first: dict[str, int] = {}
    for clause in _CLAUSE.finditer(prompt.lower()):
        subject = _SUBJECT.search(clause[0])
        spoken = [(_ANYWHERE, 0)] + ([(_OF_A_CAMERA, subject.start())] if subject else [])
        for patterns, start in spoken:
            for pattern, move in patterns:
                found = re.search(pattern, clause[0][start:])
                if found:
                    place = clause.start() + start + found.start()
                    first[move] = min(first.get(move, place), place)
    if len(first) > 1:
        first.pop(FIXED, None)
    if "orbit_left" in first or "orbit_right" in first:
        first.pop(ORBIT, None)
    return tuple(sorted(first, key=first.__getitem__))
