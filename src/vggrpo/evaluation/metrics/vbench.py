"""VBench's dimensions (Huang et al. 2024) through its own package, in its own Python.

`vbench` pins versions of numpy and transformers that nothing else here can live with, so it is called in another
environment: the interpreter that VGGRPO_VBENCH_PYTHON names, or this one when the variable is not set. Its weights must
lie in its cache (VBENCH_CACHE_DIR, or ~/.cache/vbench); nothing is downloaded.

The seven dimensions are those that VBench computes for any prompt. Still videos win most of them: read them beside
`motion_flow`. One process a clip loads its networks anew, so this is slow. Tested against a stand-in with VBench's
interface, not yet with its real weights.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vggrpo.errors import UserError
from vggrpo.evaluation.metrics.base import Clip, Measurement

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels

PYTHON = "VGGRPO_VBENCH_PYTHON"
# Dimension -> files of the cache that VBench reads for it.
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "subject_consistency": ("dino_model/facebookresearch_dino_main", "dino_model/dino_vitbase16_pretrain.pth"),
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "temporal_flickering": (),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
}
_CALL = """
import sys
from vbench import VBench
video, prompt, output, device, *dimensions = sys.argv[1:]
VBench(device, "", output).evaluate(
    videos_path=video, name="clip", prompt_list=[prompt], dimension_list=dimensions, local=True, mode="custom_input"
)
"""


def vbench(clip: Clip, models: EvaluationModels) -> dict[str, Measurement]:
    """`vbench_DIMENSION` of one clip; higher is better."""
    from vggrpo.io.video import write_video

    missing = vbench_missing()
    if missing is not None:
        raise UserError(missing)
    with tempfile.TemporaryDirectory() as folder:
        video, output = write_video(Path(folder) / "clip.mp4", clip.frames, clip.fps), Path(folder) / "results"
        command = [_python(), "-c", _CALL, str(video), clip.prompt, str(output), models.device, *DIMENSIONS]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        results = output / "clip_eval_results.json"
        if done.returncode or not results.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"VBench ended with code {done.returncode}: {last[:200]}")
        scores = json.loads(results.read_text(encoding="utf-8"))
    # Each entry: the score of all videos, of which there is one, and a list of the videos'.
    return {f"vbench_{name}": Measurement.of(float(scores[name][0])) for name in DIMENSIONS}


def vbench_missing() -> str | None:
    """What is not there, and what to do about it, in one line; None when all is."""
    if not _has_vbench(_python()):
        return (
            f"vbench is not installed for {_python()}: it needs an environment of its own (python -m venv vbench-env; "
            f"vbench-env/bin/pip install vbench), whose interpreter {PYTHON} names"
        )
    cache = Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")
    absent = [file for files in DIMENSIONS.values() for file in files if not (cache / file).exists()]
    if absent:
        return f"{cache} lacks weights of VBench: {', '.join(absent)}; copy them there or let `vbench` download them"
    return None


def _python() -> str:
    return os.environ.get(PYTHON) or sys.executable


@functools.cache
def _has_vbench(python: str) -> bool:
    call = "import importlib.util as u, sys; sys.exit(u.find_spec('vbench') is None)"
    try:
        return subprocess.run([python, "-c", call], capture_output=True).returncode == 0
    except OSError as error:
        raise UserError(f"{PYTHON} is {python!r}, which cannot run ({error.strerror}); name a Python") from error
