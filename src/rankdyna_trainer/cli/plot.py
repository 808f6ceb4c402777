"""`rankdyna plot`: figures of a compressed model, or of the run that made it."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.run_state import read_run_state
from ..report.staging import staging_folder
from ..report.tables import rank_report
from .console import AsJson, Checkpoint, TrustRemoteCode, Variant, local_folder, print_json
from .outline import outline

FORMATS = ("png", "pdf", "svg")


def plot(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("-o", "--output", help=f"The file to write: {', '.join(FORMATS)}.")],
    history: Annotated[
        bool, typer.Option("--history", help="Draw the budget, the groups and the loss over the steps instead.")
    ] = False,
    variant: Variant = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Draw the rank of each layer of a compressed model, or how a run went.

    With --history CHECKPOINT is a checkpoint-N, or the output_dir of a run
    that wrote some: what was logged up to the newest is drawn.

    Examples:

    \b
      rankdyna plot ./compressed -o ranks.png
      rankdyna plot ./run/checkpoint-500 -o ranks.svg
      rankdyna plot ./run --history -o history.pdf
    """
    place_format = output.suffix.removeprefix(".").lower()
    if place_format not in FORMATS:
        raise typer.BadParameter(f"--output {output} must end in .{', .'.join(FORMATS)}.")
    place = Path(os.path.realpath(output))  # a link is followed, and kept
    if place.is_dir() or place.is_symlink() or not place.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: give a file in a folder that is there.")
    from ..report import plots  # needs matplotlib, as no other command does

    if history:
        state = read_run_state(checkpoint)
        figure = plots.history_figure(state.log_history)
    else:
        figure = plots.rank_heatmap(
            rank_report(outline(local_folder(checkpoint, trust_remote_code), variant, trust_remote_code).model)
        )
    try:
        with staging_folder(place.parent) as staging:
            figure.savefig(staging / place.name, format=place_format, dpi=150)
            os.replace(staging / place.name, place)
    except OSError as error:
        raise OSError(f"--output {output} cannot be written ({error}). What was there before is as it was.") from error
    if as_json:
        print_json({"checkpoint": checkpoint, "output": str(output), "bytes": output.stat().st_size})
    else:
        print(f"Wrote {output}.")
