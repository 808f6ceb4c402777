"""The `rankdyna` command."""

from typing import Annotated

import typer

from ..version import __version__
from .benchmark import benchmark
from .compress import compress
from .console import OneLineErrors
from .convert import compact, merge
from .inspect import inspect
from .plot import plot
from .report import report

app = typer.Typer(
    name="rankdyna",
    cls=OneLineErrors,
    help="Compress transformers by their singular groups: look at them before, while and after.",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"rankdyna_trainer {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for command in (inspect, report, plot, compress, compact, merge, benchmark):
    app.command()(command)
