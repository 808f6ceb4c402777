"""`rankdyna plot`: figures of a compressed model, or of the run that made it."""

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.outline import outline
from ..checkpoint.run_state import read_run_state
from ..report.tables import rank_report
from .console import (
    PICTURE_FORMATS,
    AsJson,
    Checkpoint,
    TrustRemoteCode,
    Variant,
    check_picture,
    local_folder,
    print_json,
    write_picture,
)


def plot(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("-o", "--output", help=f"The file to write: {', '.join(PICTURE_FORMATS)}.")],
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
    place = check_picture(output)
    from ..report import plots  # needs matplotlib, as no other command does

    if history:
        state = read_run_state(checkpoint)
        figure = plots.history_figure(state.log_history)
    else:
        figure = plots.rank_heatmap(
            rank_report(outline(local_folder(checkpoint, trust_remote_code), variant, trust_remote_code).model)
        )
    write_picture(figure, output, place)
    if as_json:
        print_json({"checkpoint": checkpoint, "output": str(output), "bytes": output.stat().st_size})
    else:
        print(f"Wrote {output}.")
