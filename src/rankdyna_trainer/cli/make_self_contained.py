"""`rankdyna make-self-contained`: a compacted checkpoint gets the code that loads it."""

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.outline import outline
from ..checkpoint.self_contained import bring_code
from ..layers.auto_map import MODULE
from ..report.generated import never_fatal
from ..report.renewed_card import renew_loading
from .console import AsJson, print_json

Folder = Annotated[Path, typer.Argument(help="The folder of a compacted model.")]


def make_self_contained(folder: Folder, as_json: AsJson = False) -> None:
    """
    Let a compacted model load where this package is not installed.

    One small file is written beside the weights, and named in config.json:
    from then on trust_remote_code=True is all that is needed. The weights
    stay as they are; a card that was generated says how to load it now.

    Examples:

    \b
      rankdyna make-self-contained ./small
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give one that holds a compacted model.")
    outlined = outline(folder)
    if outlined.in_training:
        raise ValueError(
            f"{folder} is a checkpoint of a running compression: `rankdyna compact {folder} -o DIR` makes a model of "
            "it first."
        )
    bring_code(outlined.model, folder)
    with never_fatal("write into its card how it is loaded", folder):
        renew_loading(outlined.model, folder)
    if as_json:
        print_json({"folder": str(folder), "file": str(folder / f"{MODULE}.py")})
    else:
        print(f"{folder} loads with trust_remote_code=True now, where this package is not installed.")
