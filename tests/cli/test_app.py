import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from support.training_runs import Folders
from typer.testing import CliRunner

import rankdyna_trainer
from rankdyna_trainer.cli import app

COMMANDS = ["inspect", "report", "plot", "compress", "compact", "merge", "benchmark"]
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_process_of_its_own(folders: Folders) -> None:
    command = [sys.executable, "-m", "rankdyna_trainer", "report", str(folders.compacted), "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert json.loads(result.stdout)["summary"]["layers"] == 12


def test_the_installed_command_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["rankdyna"].partition(":")
    assert getattr(import_module(module), name) is app


def test_version(rankdyna: Callable[..., str]) -> None:
    assert rankdyna("--version") == f"rankdyna_trainer {rankdyna_trainer.__version__}\n"


def test_help_and_version_import_no_command() -> None:
    program = """
import sys
from rankdyna_trainer.cli import app
try:
    app([sys.argv[1]])
except SystemExit as ending:
    assert not ending.code
assert not {"torch", "transformers", "pandas", "huggingface_hub"} & sys.modules.keys()
"""
    for option in ("--help", "--version"):
        subprocess.run([sys.executable, "-c", program, option], check=True, capture_output=True)


def test_a_line_without_a_command_shows_the_help() -> None:
    result = CliRunner().invoke(app, [])
    assert all(f" {command} " in result.stdout for command in COMMANDS) and "Error" not in result.output


def test_help_lists_the_commands(rankdyna: Callable[..., str]) -> None:
    shown = rankdyna("--help")
    assert all(f" {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, rankdyna: Callable[..., str]) -> None:
    shown = rankdyna(command, "-h")
    assert "Examples:" in shown
    assert f"  rankdyna {command} " in shown
    assert "--json" in shown


def test_options_may_have_dashes(rankdyna: Callable[..., str], folders: Folders) -> None:
    shown = [rankdyna("inspect", folders.dense, option, "0.5") for option in ("--rank_ratio", "--rank-ratio")]
    assert shown[0] == shown[1]


def test_wrong_commands(refusal: Callable[..., str]) -> None:
    assert "No such command 'inspct'. Did you mean 'inspect'" in refusal(2, "inspct")
    assert "Missing argument" in refusal(2, "report")


def test_a_traceback_is_shown_to_who_asks_for_it(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_DEBUG", True)
    result = CliRunner().invoke(app, ["report", str(folders.dense)])
    assert isinstance(result.exception, ValueError)
