"""The group of commands: each is imported when it is called, and what goes wrong is said in one line."""

import ast
import inspect
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from ..options import check_source

# The module that has the function of each command, in the order in which they are shown.
COMMANDS = {
    "inspect": "inspect",
    "sensitivity": "sensitivity",
    "report": "report",
    "plot": "plot",
    "curve": "curve",
    "compress": "compress",
    "shrink": "shrink",
    "compact": "convert",
    "merge": "convert",
    "make-self-contained": "make_self_contained",
    "benchmark": "benchmark",
}
LONGEST_MESSAGE = 1000


class Commands(TyperGroup):
    """
    Imports the command that is called, and no other. What is wrong it says in one line: with exit code 2 for a wrong
    command line, and 1 for all else.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # What is shown of each in the list of all.
        self.commands = {
            name: TyperCommand(name, help=_first_paragraph(name), rich_markup_mode="rich") for name in COMMANDS
        }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, whose module is imported now."""
        name, command, rest = super().resolve_command(ctx, args)
        if rest and not rest[0].startswith("-"):
            check_source(rest[0])  # before an import that takes seconds
        return name, command and _loaded(str(command.name)), rest

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run the command that the command line asks for, and exit."""
        options["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **options) or 0)
        except typer.TyperException as error:
            if message := error.format_message():  # none of a command line without a command: the help is shown
                _complain(message)
            sys.exit(error.exit_code)
        except typer.Abort:
            _complain("interrupted")
            sys.exit(1)
        except Exception as error:
            from huggingface_hub import constants

            if constants.HF_DEBUG:
                raise
            expected = isinstance(error, (ValueError, OSError, ImportError)) and str(error)
            _complain(str(error) if expected else f"{type(error).__name__}: {error}")
            sys.exit(1)


def _loaded(name: str) -> Any:
    app = typer.Typer(rich_markup_mode="rich", add_completion=False)
    app.command(name)(getattr(import_module(f"{__package__}.{COMMANDS[name]}"), _function_name(name)))
    return get_command(app)


def _function_name(command: str) -> str:
    return command.replace("-", "_")


def _first_paragraph(name: str) -> str:
    """What the function of a command says of itself, read without an import of what it needs."""
    tree = ast.parse((Path(__file__).parent / f"{COMMANDS[name]}.py").read_text(encoding="utf-8"))
    function = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == _function_name(name)
    )
    return inspect.cleandoc(ast.get_docstring(function) or "").partition("\n\n")[0]


def _complain(message: str) -> None:
    print(f"Error: {textwrap.shorten(message, LONGEST_MESSAGE, placeholder=' ...')}", file=sys.stderr)
