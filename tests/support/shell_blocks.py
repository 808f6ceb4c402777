"""The commands of the documentation: those on the tiny MODEL are run, of the others the options are parsed."""

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement
from sybil import Example
from torch.distributed.run import get_args_parser
from transformers import HfArgumentParser

ROOT = Path(__file__).parents[2]
RUN = {"run_glue.py", "run_ner.py", "run_summarization.py", "run_clm.py", "custom_loop.py"}


class Parsed(Exception):
    """The options are those of the program, which goes no further."""


def evaluate_shell(example: Example) -> None:
    """Each command of a block, in this process. A program that nothing is known of is an error."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
            words.pop(0)  # a variable of the shell
        if words:
            _command(words)


def _command(words: list[str]) -> None:
    match words:
        case ["python", script, *arguments]:
            _script(script, arguments, run=Path(script).name in RUN and "MODEL" in arguments)
        case ["accelerate", "launch", *arguments]:
            launch = launch_command_parser().parse_args(arguments)
            _script(launch.training_script, launch.training_script_args, run=False)
        case ["torchrun", *arguments]:
            launch = get_args_parser().parse_args(arguments)
            _script(launch.training_script, launch.training_script_args, run=False)
        case ["rankdyna", *arguments]:
            with patch.object(sys, "argv", ["rankdyna", *arguments]):
                _ends_well(resolve_name(_project()["scripts"]["rankdyna"]))
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            for target in targets:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"The Makefile has no {target}."
        case ["pip", "install", *arguments]:
            for requirement in arguments:
                _check_requirement(requirement)
        case _:
            raise AssertionError(f"This test does not know how to check {words[0]!r}: {shlex.join(words)}")


def _script(path: str, arguments: list[str], run: bool) -> None:
    """Run a script, or let it parse its options."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", [path, *arguments]))
        if not run:
            stack.enter_context(pytest.raises(Parsed))
            for parser, method in (
                (argparse.ArgumentParser, "parse_args"),
                (HfArgumentParser, "parse_args_into_dataclasses"),
            ):
                stack.enter_context(patch.object(parser, method, _and_stop(getattr(parser, method))))
        runpy.run_path(str(ROOT / path), run_name="__main__")


def _and_stop(parse: Callable[..., Any]) -> Callable[..., Any]:
    def stop(*arguments: Any, **options: Any) -> NoReturn:
        parse(*arguments, **options)
        raise Parsed

    return stop


def _ends_well(program: Any) -> None:
    try:
        assert not program()
    except SystemExit as end:
        assert not end.code, end.code


def _check_requirement(requirement: str) -> None:
    """Options and names of other packages pass; of this one the extras have to be there."""
    requirement = re.sub(r"^\.(?=\[|$)", "rankdyna-trainer", requirement)
    if requirement.startswith("rankdyna-trainer"):
        unknown = Requirement(requirement).extras - _project()["optional-dependencies"].keys()
        assert not unknown, f"There are no extras {unknown}."


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
