"""The `rankdyna` command."""

from typing import Annotated

import typer

from ..version import __version__
from .commands import Commands


def _with_underscores(name: str) -> str:
    return name.replace("-", "_")


app = typer.Typer(
    name="rankdyna",
    cls=Commands,
    help="Compress transformers by their singular groups: look at them before, while and after.",
    rich_markup_mode="rich",
    # --rank-ratio is --rank_ratio, as in the scripts.
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _with_underscores},
    no_args_is_help=True,
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
