"""Which camera moves a prompt names: a small parser for everyday wording ("the camera slowly pans left", "push in",
"orbits clockwise", "static shot") and for the captions of the embedded world.

It reads clause by clause. Words that mean a camera wherever they stand ("zoom in", "pan left", "dolly out") count
anywhere; words that things do too ("moves forward", "rises", "turns left") count only after the word "camera" (or
"shot", "view") in the same clause, so that "the car moves forward" moves no camera.

Not understood, and so not named: tracking shots without a direction, hand-held shake, roll, and other languages than
English. A zoom counts as a dolly: generators draw it as one, and the two differ only in parallax.
"""

from __future__ import annotations

import re

# Move -> what the camera does, in the order (x right, y down, z forward, tilt up, pan right).
DIRECTIONS: dict[str, tuple[float, float, float, float, float]] = {
    "truck_left": (-1, 0, 0, 0, 0),
    "truck_right": (1, 0, 0, 0, 0),
    "pedestal_up": (0, -1, 0, 0, 0),
    "pedestal_down": (0, 1, 0, 0, 0),
    "dolly_in": (0, 0, 1, 0, 0),
    "dolly_out": (0, 0, -1, 0, 0),
    "tilt_up": (0, 0, 0, 1, 0),
    "tilt_down": (0, 0, 0, -1, 0),
    "pan_left": (0, 0, 0, 0, -1),
    "pan_right": (0, 0, 0, 0, 1),
    # Sideways around a point ahead, at about the median depth, and turning back to it.
    "orbit_left": (-1, 0, 0, 0, 1),
    "orbit_right": (1, 0, 0, 0, -1),
}
FIXED = "fixed"
MOVES = (*DIRECTIONS, FIXED)

_ADVERB = r"(?:\s+(?:\w+ly|then|back|a little|a bit|around|away|the camera))?"
_TO = r"(?:\s+(?:to|toward|towards|from))?(?:\s+the)?"
_LEFT = rf"{_ADVERB}{_TO}\s+(?:left|leftward|leftwards)\b"
_RIGHT = rf"{_ADVERB}{_TO}\s+(?:right|rightward|rightwards)\b"
_UP = rf"{_ADVERB}\s+(?:up|upward|upwards)\b"
_DOWN = rf"{_ADVERB}\s+(?:down|downward|downwards)\b"
_IN = rf"{_ADVERB}\s+(?:in|into|forward|forwards|closer|toward|towards)\b"
_OUT = rf"{_ADVERB}\s+(?:out|back|backward|backwards|away)\b"


def _verb(*stems: str) -> str:
    return rf"\b(?:{'|'.join(stems)})"


_PAN, _TILT = _verb(r"pans?", r"panning"), _verb(r"tilts?", r"tilting")
_ORBIT = _verb(r"orbits?", r"orbiting", r"arcs?", r"arcing", r"circles?", r"circling", r"revolves?", r"revolving")
_DOLLY = _verb(r"doll(?:y|ies|ying)", r"zooms?", r"zooming")
_PUSH = _verb(r"push(?:es|ing)?", r"pull(?:s|ing)?")
_TRUCK, _PEDESTAL = _verb(r"trucks?", r"trucking"), _verb(r"pedestals?", r"pedestalling", r"booms?", r"cranes?")
_GOES = _verb(r"moves?", r"moving", r"glides?", r"gliding", r"slides?", r"sliding", r"travels?", r"travelling",
              r"tracks?", r"tracking", r"drifts?", r"drifting", r"advances?", r"flies", r"flying")  # fmt: skip
_TURNS = _verb(r"turns?", r"turning", r"rotates?", r"rotating", r"swivels?", r"looks?", r"looking")

# Words of the trade: they mean the camera wherever they stand.
_ANYWHERE: tuple[tuple[str, str], ...] = (
    (_PAN + _LEFT, "pan_left"),
    (_PAN + _RIGHT, "pan_right"),
    (_TILT + _UP, "tilt_up"),
    (_TILT + _DOWN, "tilt_down"),
    (_DOLLY + _IN, "dolly_in"),
    (_DOLLY + _OUT, "dolly_out"),
    (_TRUCK + _LEFT, "truck_left"),
    (_TRUCK + _RIGHT, "truck_right"),
    (_PEDESTAL + _UP, "pedestal_up"),
    (_PEDESTAL + _DOWN, "pedestal_down"),
    (r"\b(?:static|fixed|stationary|locked[- ]off|still)\s+(?:shot|camera|view|viewpoint|frame|tripod)\b", FIXED),
)
# Words that things do as well: only after the camera is named.
_OF_A_CAMERA: tuple[tuple[str, str], ...] = (
    (_ORBIT + _LEFT, "orbit_left"),
    (_ORBIT + _RIGHT, "orbit_right"),
    # Seen from above, a clockwise path keeps its centre to the right: the camera goes left and turns right.
    (_ORBIT + r"[^,]*\b(?<!-)(?<!counter)(?<!anti)clockwise\b", "orbit_left"),
    (_ORBIT + r"[^,]*\b(?:counter|anti)-?\s?clockwise\b", "orbit_right"),
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
_SUBJECT = re.compile(r"\b(?:camera|shot|viewpoint|viewer|lens)\b")
_CLAUSES = re.compile(r"[.;!?\n]+")


def camera_moves(prompt: str) -> list[str]:
    """Names of `MOVES` in a prompt, each once, in the order of `MOVES`; empty when none is named.

    "fixed" is dropped where another move is named as well ("holds still, then pans left").
    """
    found: set[str] = set()
    for clause in _CLAUSES.split(prompt.lower()):
        found |= {move for pattern, move in _ANYWHERE if re.search(pattern, clause)}
        subject = _SUBJECT.search(clause)
        if subject:
            rest = clause[subject.start() :]
            found |= {move for pattern, move in _OF_A_CAMERA if re.search(pattern, rest)}
    if len(found) > 1:
        found.discard(FIXED)
    return [move for move in MOVES if move in found]
