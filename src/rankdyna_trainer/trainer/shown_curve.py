"""What a run of several sizes shows of them while it goes on: in the cards of all, and to the trackers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerState

from ..report.card import curve_image
from ..report.card_sections import put_section
from ..report.curve import HEADING, LAST, curve_section, score_names
from ..report.generated import CARD, is_unchanged, never_fatal
from .curve import read_curve, station_folders
from .trackers import CURVE, send_picture

if TYPE_CHECKING:
    from transformers import Trainer


def show_curve(trainer: Trainer, state: TrainerState, directory: Path, names: Collection[str], note: str = "") -> None:
    """
    Write the sizes and scores so far into the cards of the models, and send their picture to the trackers.

    Args:
        trainer: of the run.
        state: of the `Trainer`.
        directory: the run's `output_dir`.
        names: of the folders of the models that the run has saved, and of [`LAST`] at its end.
        note: how one of them was chosen, in a sentence.
    """
    with never_fatal("show the sizes of its run", directory):
        if {*names} == {LAST}:  # of a run that did not go on from its first size
            if note and is_unchanged(directory / CARD):
                put_section(directory, f"{HEADING}\n\n{note}")
            return
        curve = read_curve(directory, names=names)
        metric = trainer.args.metric_for_best_model
        metric = metric if metric and {metric, f"eval_{metric}"} & {*score_names(curve)} else None
        for name, folder in station_folders(directory).items():
            if name in curve.index and is_unchanged(folder / CARD):
                put_section(folder, curve_section(curve, name, metric, note))
        if score_names(curve) and len(curve) > 1 and (image := curve_image(curve, metric)) is not None:
            send_picture(CURVE, image, trainer.callback_handler.callbacks, state.global_step)
