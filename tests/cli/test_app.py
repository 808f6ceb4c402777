import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import typer
from support.training_runs import Folders
from typer.main import get_command
from typer.testing import CliRunner

import rankdyna_trainer
from rankdyna_trainer.cli import app

COMMANDS = ["inspect", "sensitivity", "report", "plot", "curve", "compress", "shrink", "compact", "merge", "benchmark"]
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_whole_at_80_columns(
    command: str, rankdyna: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = rankdyna(command, "--help")
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown and not re.search("<[^>│]*│", shown), "a name that is cut off or broken"


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_can_be_pasted(
    command: str, rankdyna: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    examples = rankdyna(command, "--help").split("Examples:")[1].split("╭")[0]
    lines = [shlex.split(line) for line in examples.splitlines() if line.strip()]
    assert lines and all(line[:2] == ["rankdyna", command] for line in lines), "a line that does not stand alone"
    group = get_command(app)
    for _, *arguments in lines:
        Path(arguments[1]).mkdir(parents=True, exist_ok=True)
        _, loaded, rest = group.resolve_command(typer.Context(group), arguments)
        assert loaded.make_context(command, rest).params


def test_a_name_that_none_can_have_is_refused_before_anything_is_imported() -> None:
    program = """
import sys
from rankdyna_trainer.cli import app
try:
    app(["report", sys.argv[1]])
except SystemExit as ending:
    assert ending.code == 1
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    for name, more in (("./no/folder", "."), ("a/b/c", "."), ("two words", ", and no repository of the Hub can have")):
        run = subprocess.run([sys.executable, "-c", program, name], check=True, capture_output=True, text=True)
        assert run.stderr.startswith(f"Error: There is no folder {name}{more}") and run.stderr.count("\n") == 1


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
