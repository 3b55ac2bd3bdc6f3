"""The reward audit: its verdict on numbers whose answer is known, the page it draws, what training says of it."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from vggrpo.config import RewardTerm
from vggrpo.evaluation import audit
from vggrpo.posttraining import trainer


def measured(seed, noise, floor):
    """Terms of an LGM that sees the truth through `noise`, and whose floor on consistent clips is `floor`."""
    generator = torch.Generator().manual_seed(seed)

    def kind(low, high):
        truth = {t: low + (high - low) * torch.rand(16, generator=generator) for t in audit.TERMS}
        seen = {t: v + noise * (high - low) * torch.randn(16, generator=generator) for t, v in truth.items()}
        return {"truth": truth, "lgm": seen, "teacher": truth, "judge": truth}

    rendered = {"smooth": kind(0, floor), "handheld": kind(0.2, 0.6), "wobble": kind(0.0, 0.1)}
    rendered["smooth"]["lgm"]["e_geo"] = torch.full((16,), floor)
    generated = kind(0.02, 0.08)
    judge = dict.fromkeys(("judge", "judge_once", "judge_mirrored"), generated["judge"])
    return rendered, {"lgm": generated["lgm"], "teacher": generated["teacher"], **judge}


@pytest.mark.parametrize(
    "noise, floor, passed", [(0.1, 0.01, True), (0.1, 0.06, False), (5.0, 0.01, False)], ids=["good", "floor", "noise"]
)
def test_verdict_and_page(tmp_path, monkeypatch, noise, floor, passed):
    rendered, generated = measured(0, noise, floor)
    monkeypatch.setattr(audit, "_rendered_terms", lambda *_: rendered)
    monkeypatch.setattr(audit, "_generated_terms", lambda *_: generated)
    result = audit.audit_reward("embedded", tmp_path, clips=16)
    assert result["passed"] is passed
    assert set(result["teacher"]["spearman_judge"].values()) == {1.0}  # made to be the judge
    assert set(result["judge_with_itself"].values()) == {1.0}
    assert json.loads((tmp_path / "audit.json").read_text()) == result
    page = (tmp_path / "audit.html").read_text()
    assert ("NOT passed" in page) is not passed and "plotly" in page


GOOD = {
    "floor": 0.01,
    "base_value": 0.03,
    "spearman_truth": dict.fromkeys(audit.TERMS, 0.7),
    "spearman_judge": dict.fromkeys(audit.TERMS, 0.6),
}


@pytest.mark.parametrize("term", audit.TERMS)
@pytest.mark.parametrize("question", ["spearman_truth", "spearman_judge"])
def test_an_unknown_correlation_meets_no_bar(question, term):
    assert audit.missed_bars(GOOD) == []
    for value in (torch.nan, 0.1):
        assert audit.missed_bars(GOOD | {question: GOOD[question] | {term: value}})


@pytest.mark.parametrize("floor, base", [(torch.nan, 0.03), (0.01, torch.nan), (torch.nan, torch.nan), (0.0, 0.0)])
def test_an_unknown_floor_meets_no_bar(floor, base):
    assert audit.missed_bars(GOOD | {"floor": floor, "base_value": base})


def test_clips_that_do_not_err_at_all_are_no_error_of_the_audit(tmp_path, monkeypatch):
    rendered, generated = measured(0, 0.1, 0.01)
    for terms in (rendered["smooth"], generated):
        for who in ("lgm", "teacher"):
            terms[who] = terms[who] | {"e_geo": torch.zeros(16)}
    monkeypatch.setattr(audit, "_rendered_terms", lambda *_: rendered)
    monkeypatch.setattr(audit, "_generated_terms", lambda *_: generated)
    result = audit.audit_reward("embedded", tmp_path, clips=16)
    assert result["ratio"] is None and not result["passed"]


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "never audited"),
        ({"passed": False}, "does not pass"),
        ({"passed": False, "missed": ["floor 1", "the judge 2"]}, "floor 1; the judge 2"),
        ({"passed": True}, "other reward options"),
        ({"passed": True, "options": {"camera_motion_smoothness": {"eps_rotation": 0.03}}}, None),
    ],
)
def test_training_asks_for_the_audit(tmp_path, caplog, content, said):
    if content is not None:
        (tmp_path / "audit.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        trainer._warn_unaudited(
            tmp_path, {"camera_motion_smoothness": RewardTerm(options={"eps_rotation": 0.03}), "mine": RewardTerm()}
        )
    assert (said in caplog.text) if said else not caplog.text
