"""The pages that the commands write, opened in a real browser: they draw, answer, and run nothing of a stranger's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from headless_chromium import Page, headless_page, why_not
from test_evaluation_reconstruct import TrueModel, truck_left
from test_evaluation_report import evaluated_arms

from vggrpo.evaluation import build_report, reconstruct
from vggrpo.evaluation.reconstruct import reconstruct_video
from vggrpo.io.video import write_video

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


def test_a_reconstruction_draws_and_runs_nothing_from_a_file_name(tmp_path, monkeypatch):
    batch = truck_left()
    monkeypatch.setattr(reconstruct, "load_geometry_model", lambda source: TrueModel(batch))
    video = write_video(tmp_path / "<img src=x onerror=hacked=1>.mp4", batch.video[0], 8)
    found = reconstruct_video(video, tmp_path / "out", model="true")
    with headless_page() as page:
        page.open(found.page, 380, 800, dark=True)
        page.until("document.querySelector('#scene-box canvas') !== null")
        assert page.js("document.documentElement.scrollWidth") <= 380
        assert page.js("window.hacked === undefined && document.images.length === 0")
        assert page.js("document.getElementById('title').textContent").startswith("<img")
        assert page.problems == []


@pytest.mark.parametrize("width", [380, 1280])
def test_report(tmp_path: Path, width: int) -> None:
    with headless_page() as page:
        page.open(build_report(evaluated_arms(tmp_path)), width, 900, dark=width > 600)
        assert page.js("document.documentElement.scrollWidth") <= width
        page.js("document.getElementById('videos-section').scrollIntoView({behavior: 'instant'})")
        page.until("[...document.querySelectorAll('video')].some(video => video.currentTime > 0.1)")
        order = "[...document.querySelectorAll('#video-cards .card')].map(card => card.id).join()"
        worst = page.js(order)
        page.js(
            "const s = document.getElementById('sort-order'); s.value = 'best'; s.dispatchEvent(new Event('change'))"
        )
        assert page.js(order) != worst
        if width > 600:
            hover_over_a_prompt(page)
        page.js("document.getElementById('scenes').scrollIntoView({behavior: 'instant'})")
        page.until("document.querySelectorAll('#scene-box canvas').length >= 2")
        turn_the_scene(page)
        assert page.js("window.hacked === undefined && document.images.length === 0")
        assert page.problems == []


def hover_over_a_prompt(page: Page) -> None:
    page.js("document.getElementById('plots').scrollIntoView({behavior: 'instant'})")
    page.until("document.querySelector('#pair-plots .points path') !== null")
    box = "document.querySelector('#pair-plots .points path').getBoundingClientRect()"
    x, y = page.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
    page.hover(x - 3, y)
    page.hover(x, y)
    page.until("!document.getElementById('preview').hidden")
    page.until("[...document.querySelectorAll('#preview video')].length > 0")
    page.hover(2, 300)
    page.until("document.getElementById('preview').hidden")


def turn_the_scene(page: Page) -> None:
    eye = "JSON.stringify(document.querySelector('.plot3d').layout.scene.camera.eye)"
    page.until("document.querySelector('.plot3d').layout?.scene !== undefined")
    before = page.js(eye)
    page.js("document.querySelector('.plot3d').focus()")
    page.press("ArrowLeft")
    page.until(f"{eye} !== {json.dumps(before)}")
    both = "['scene', 'scene2'].map(k => JSON.stringify(document.querySelector('.plot3d').layout[k].camera.eye))"
    first, second = page.js(both)
    assert first == second
    points = "document.querySelector('.plot3d').data[1].x"
    page.js(
        "const t = document.querySelector('#scene-box input[type=range]'); "
        "t.value = '1'; t.dispatchEvent(new Event('input'))"
    )
    page.until(f"{points}.length > 0 && document.querySelector('#scene-box output').textContent === 'frame 1'")
