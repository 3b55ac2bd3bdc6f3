"""The command line from outside: fast help, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

import vggrpo
from vggrpo import cli, commands
from vggrpo.errors import UserError

HEAVY = ("torch", "numpy", "diffusers", "transformers", "cv2", "av", "pydantic", "plotly")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["world", "sample", "--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom vggrpo.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("HEAVY []")


def test_help_takes_less_than_a_second():
    before = os.times()
    result = subprocess.run([sys.executable, "-m", "vggrpo.cli", "--help"], capture_output=True, text=True, timeout=60)
    # Processor time, not wall time: a busy machine must not fail this test.
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert result.returncode == 0 and seconds < 1.0
    for command in ("demo", "train", "generate", "evaluate", "compare", "audit-reward", "world", "doctor"):
        assert command in result.stdout


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"vggrpo {vggrpo.__version__}"


def fake_command(run):
    class Command:
        @staticmethod
        def add_parser(subparsers):
            subparsers.add_parser("fake").set_defaults(run=run, resume="run the same command again")

    return Command


def raising(error: BaseException):
    def run(arguments: argparse.Namespace) -> None:
        raise error

    return run


def test_user_errors_are_one_line_and_code_2(monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", (fake_command(raising(UserError("the file\n  is missing; make it"))),))
    assert cli.main(["fake"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err == "vggrpo: error: the file is missing; make it\n"


def test_interrupt_says_how_to_go_on_and_code_130(monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", (fake_command(raising(KeyboardInterrupt())),))
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err.strip() == "vggrpo: interrupted; run the same command again"


def test_a_full_disk_is_one_line_and_code_2(monkeypatch, capsys):
    for error in (OSError(errno.ENOSPC, "any"), SafetensorError("I/O error: No space left on device (os error 28)")):
        monkeypatch.setattr(cli, "COMMANDS", (fake_command(raising(error)),))
        assert cli.main(["fake"]) == 2
        said = capsys.readouterr().err
        assert (
            said
            == "vggrpo: error: cannot write (No space left on device); free space, then run the same command again\n"
        )


def test_unexpected_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", (fake_command(raising(ZeroDivisionError("a bug"))),))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["fake"])


def test_every_command_has_help_a_run_and_a_resume(capsys):
    parser = cli.build_parser()
    for command in commands.COMMANDS:
        name = command.__name__.rsplit(".", 1)[-1].replace("_", "-")
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([name, "--help"])
        assert stop.value.code == 0
    assert "usage: vggrpo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice"),
        (["world"], "ACTION"),
        (["world", "sample"], "--output"),
        (["world", "sample", "--output", "x", "--count", "0"], "0 is not at least 1"),
        (["world", "sample", "--output", "x", "--count", "many"], "'many' is not a whole number"),
        (["world", "sample", "--output", "x", "--count", "99999999999"], "is more than 1000000"),
        (["world", "sample", "--output", "x", "--size", "1x2x3"], "HEIGHTxWIDTH"),
        (["world", "sample", "--output", "x", "--size", "wide"], "HEIGHTxWIDTH"),
        (["generate", "--prompts", "x", "--output", "x", "--fps", "0"], "0 is not a number from 0.01 to 1000"),
        (["generate", "--prompts", "x", "--output", "x", "--guidance-scale", "nan"], "nan is not a number"),
        (["generate", "--prompts", "x", "--output", "x", "--guidance", "hard"], "'hard' is not a number"),
        (["generate", "--prompts", "x", "--output", "x", "--guidance", "-1"], "-1 is not a number from 0"),
        (["world", "sample", "--output", "x", "--frames", "1"], "1 is not at least 2"),
        (["world", "sample", "--output", "x", "--seed", "-1"], "-1 is not at least 0"),
    ],
)
def test_bad_arguments_exit_with_2_and_name_the_argument(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "--help`" in error
