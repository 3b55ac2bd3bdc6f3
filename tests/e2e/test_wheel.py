"""The wheel, installed elsewhere, finds its models, recipes and templates."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CHECK = """
import json, sys
import vggrpo
from vggrpo import assets, config
print(json.dumps({
    "package": vggrpo.__file__,
    "models": {name: str(assets.path(name)) for name in assets.NAMES},
    "recipe": str(config.recipe_path("tiny")),
    "version": vggrpo.__version__,
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the wheel is built with hatchling from the `dev` extra")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run(
        [*build, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return next(folder.glob("vggrpo-*.whl"))


@pytest.mark.e2e
def test_wheel_holds_what_the_checkout_has(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "vggrpo"
    tracked = subprocess.run(["git", "ls-files", "src/vggrpo", "configs"], cwd=ROOT, capture_output=True, text=True)
    files = [Path(line) for line in tracked.stdout.splitlines()]
    if not files:
        files = [path.relative_to(ROOT) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    for file in files:
        inside = Path("vggrpo") / file if file.parts[0] == "configs" else file.relative_to("src")
        assert inside.as_posix() in names, f"{file} is not in the wheel"
    assert "vggrpo/py.typed" in names
    assert not any(name.startswith("tests/") for name in names)
    # Hub and package index both get slow beyond this; the issue of the models says 40 MB.
    assert wheel.stat().st_size < 45e6


@pytest.mark.e2e
def test_installed_elsewhere_it_finds_models_recipes_and_templates(wheel, tmp_path):
    import json

    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    assert subprocess.run(install, capture_output=True, text=True, timeout=300).returncode == 0
    environment = {**os.environ, "PYTHONPATH": str(target)}
    result = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for path in (found["package"], found["recipe"], *found["models"].values()):
        assert Path(path).is_relative_to(target), f"{path} is not in the installed package"
    assert (target / "vggrpo" / "evaluation" / "templates" / "report.html").is_file()
    help_text = subprocess.run(
        [sys.executable, "-m", "vggrpo.cli", "--help"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert "usage: vggrpo" in help_text.stdout
