"""
The `Trainer` whose event a callback handles.

A callback is handed the model, the arguments and the state, but not the `Trainer`, which alone knows the other
callbacks, `model_init`, the trial of a hyperparameter search, an upload that still runs, and the card. A user would
have to hand it over in a second line, and could hand over the wrong one. It is in one of the calling frames.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def calling_trainer() -> Trainer | None:
    """The `Trainer` that called, or `None` where someone else called the event."""
    from transformers import Trainer  # with it come datasets and pandas, which loading a model does not need

    callers = (names.get("self") for names in _names_of_callers())
    return next((caller for caller in callers if isinstance(caller, Trainer)), None)


def output_dir(args: TrainingArguments) -> str:
    """Where the run writes: the `output_dir`, or in a hyperparameter search the trial's folder in it."""
    trainer = calling_trainer()
    return str(args.output_dir if trainer is None else trainer._get_output_dir(trainer._trial))


def resumed_checkpoint() -> str | None:
    """The folder of the checkpoint from which the calling `Trainer` resumes, or `None`."""
    folders = (names.get("resume_from_checkpoint") for names in _names_of_callers())
    return next((folder for folder in folders if isinstance(folder, str)), None)


def _names_of_callers() -> Iterator[Mapping[str, Any]]:
    """The local names of each calling frame, the nearest first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back
