"""Ranking of stitch points: what one reads, how often, and where layers without a number end."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.lgm.ranking import rank_downstream, write_search
from vggrpo.lgm.search import StitchFit

NAN = float("nan")


def fit(layer: int, r2: float = 0.5) -> StitchFit:
    return StitchFit(layer, torch.zeros(1), torch.zeros(1), torch.zeros(1), r2)


def geometry(clips: int = 2) -> GeometryPrediction:
    poses = torch.eye(4).repeat(clips, 2, 1, 1)
    poses[:, 1, 0, 3] = 0.1
    k = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(clips, 2, 3, 3)
    depth = 1 + torch.rand(clips, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return GeometryPrediction.from_depth(poses, k, depth)


def network(error: float):
    """Its cameras are off by `error`, and no number in the last clip if that is none."""

    def predict(latents: Tensor) -> GeometryPrediction:
        out = geometry(len(latents))
        cam2world = out.cam2world.clone()
        cam2world[-1, 1, 0, 3] += error
        return replace(out, cam2world=cam2world)

    return predict


def ranked(errors: list[float], by: str = "downstream", r2: list[float] | None = None):
    fits = [fit(layer, 0.5 if r2 is None else r2[layer]) for layer in range(len(errors))]
    # A generator: whoever reads the clips and their geometry once a layer finds nothing the second time.
    heldout = ((torch.zeros(2, 1), geometry()) for _ in range(2))
    return rank_downstream(fits, lambda f: network(errors[f.layer]), heldout, by)


def test_every_layer_is_judged_on_clips_that_are_read_once():
    found = ranked([0.3, 0.1, 0.2])
    assert [r.fit.layer for r in found] == [1, 2, 0]
    errors = [r.errors["translation"] for r in found]
    assert [error / errors[0] for error in errors] == pytest.approx([1, 2, 3], rel=1e-4)


def test_a_layer_without_a_number_is_the_worst(tmp_path):
    assert [r.fit.layer for r in ranked([NAN, 0.3, NAN, 0.1])][:2] == [3, 1]
    assert [r.fit.layer for r in ranked([0.1, 0.2, 0.3], "r2", [NAN, 0.1, 0.9])] == [2, 1, 0]
    found = ranked([NAN, 0.3])
    assert found[0].fit.layer == 1 and found[0].downstream < 10  # measured in units of layers that have a number
    write_search(tmp_path, found, 1, "downstream")
    rows = json.loads((tmp_path / "search.json").read_text())["layers"]
    assert rows[1]["downstream"] is None and rows[1]["translation"] is None and rows[0]["downstream"] is not None


def test_no_layer_with_a_number_is_an_error():
    with pytest.raises(UserError, match=r"no layer of the search gives finite geometry.*stitch\.ridge") as error:
        ranked([NAN, NAN])
    assert "\n" not in str(error.value)
