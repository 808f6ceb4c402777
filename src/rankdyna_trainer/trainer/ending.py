"""The end of a run: the compacted model is saved, and what was gained is shown."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import TrainerState, TrainingArguments

from ..checkpoint.empty_model import newest_inside
from ..checkpoint.run_state import write_run_state
from ..checkpoint.saving import save_compacted, whole_state_dict
from ..layers.notices import AboveProgressBars
from ..report.card import ranks_image
from ..report.generated import never_fatal
from ..report.printed import print_place, print_summary
from ..report.tables import peak_memory
from .calling_trainer import calling_trainer, output_dir
from .card import TrainerCard
from .trackers import send_heatmap

logger = AboveProgressBars(logging.getLogger(__name__))


def save_and_show(
    model: nn.Module,
    args: TrainingArguments,
    state: TrainerState,
    card: TrainerCard | None,
    processing_class: Any = None,
    train_dataloader: Any = None,
    directory: Path | None = None,
    station: int = -1,
) -> None:
    """
    Save a compacted model with its card; print the sizes, and send the heatmap to the trackers. All processes have to
    call it.

    Args:
        model: compacted, in the processes that save.
        args: of the `Trainer`.
        state: of the `Trainer`.
        card: of the `Trainer`, or `None` if there is none to write.
        processing_class: the tokenizer or processor to save with the model; if left out, that of the data collator.
        train_dataloader: which has the data collator.
        directory: where; by default `args.output_dir`, or in a hyperparameter search the trial's folder in it.
        station: whose size the model has, of those of the run.
    """
    whole = whole_state_dict(model)
    directory = directory or Path(output_dir(args))
    if (trainer := calling_trainer()) is not None:
        trainer._finish_current_push()  # it reads the files that are replaced now
    if args.should_save:
        processing_class = processing_class or collator_tokenizer(train_dataloader)
        directory, file_bytes = _saved(model, directory, processing_class, whole)
        if card is not None:
            card.settle(state, station)
        with never_fatal("note its run", directory):
            write_run_state(state, directory)
        if is_shown(args, state):
            with never_fatal("show its sizes", directory):
                print_summary(model, file_bytes, peak_memory(args.device))
                print_place(model, directory)
        if card is not None:
            _show(model, directory, state, card)
    PartialState().wait_for_everyone()  # nobody loads what is not yet written


def is_shown(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a run prints its tables: once, and not where `log_level` leaves nothing but errors."""
    return state.is_world_process_zero and args.get_process_log_level() <= logging.WARNING


def collator_tokenizer(train_dataloader: Any) -> Any:
    """The tokenizer of the data collator, if it has one."""
    return getattr(getattr(train_dataloader, "collate_fn", None), "tokenizer", None)


def _saved(model: nn.Module, directory: Path, processing_class: Any, whole: dict[str, Any] | None) -> tuple[Path, int]:
    """Where the model was saved, and how many bytes its weights have: what was trained must not be lost at the end."""
    try:
        return directory, save_compacted(model, directory, processing_class, whole)
    except Exception as error:
        return _saved_elsewhere(model, directory, processing_class, whole, error)


def _saved_elsewhere(
    model: nn.Module, directory: Path, processing_class: Any, whole: dict[str, Any] | None, error: Exception
) -> tuple[Path, int]:
    beside = Path(f"{directory.absolute()}-compacted")
    failures = [f"{directory}: {error}"]
    for place in (beside, Path(tempfile.gettempdir(), beside.name)):
        place = _empty_place(place)
        try:
            file_bytes = save_compacted(model, place, processing_class, whole)
        except Exception as failure:
            failures.append(f"{place}: {failure}")
            with suppress(OSError):
                place.rmdir()
        else:
            logger.error("The compacted model could not be saved in %s (%s): it is in %s.", directory, error, place)
            return place, file_bytes
    raise OSError(
        f"The compacted model could be saved nowhere ({'; '.join(failures)}). It is in trainer.model as long as this "
        f"process lives: save it with trainer.model.save_pretrained(folder).{newest_inside(directory)}"
    ) from error


def _empty_place(place: Path) -> Path:
    """The folder, or one beside it with a number, that is not there: what lies in another is the user's."""
    numbered = (Path(f"{place}-{number}") for number in count(2))
    return next(folder for folder in chain((place,), numbered) if not os.path.lexists(folder))


def _show(model: nn.Module, directory: Path, state: TrainerState, card: TrainerCard) -> None:
    image = None
    with never_fatal("draw its ranks", directory):
        image = ranks_image(model)
    with never_fatal("write its card", directory):
        card.end(model, directory, image)
    if image is not None and state.is_world_process_zero:
        with never_fatal("send the picture of its ranks to the trackers", directory):
            send_heatmap(image, card.trainer.callback_handler.callbacks, state.global_step)
