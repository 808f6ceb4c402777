"""
The `Trainer` whose event a callback handles.

A callback is handed the model, the arguments and the state, but not the `Trainer`, which alone knows the other
callbacks, `model_init`, the trial of a hyperparameter search, an upload that still runs, and the card. A user would
have to hand it over in a second line, and could hand over the wrong one. It is in one of the calling frames.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def calling_trainer() -> Trainer | None:
    """The `Trainer` that called, or `None` where someone else called the event."""
    from transformers import Trainer  # with it come datasets and pandas, which loading a model does not need

    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None


def output_dir(args: TrainingArguments) -> str:
    """Where the run writes: the `output_dir`, or in a hyperparameter search the trial's folder in it."""
    trainer = calling_trainer()
    return str(args.output_dir if trainer is None else trainer._get_output_dir(trainer._trial))


def resumed_checkpoint() -> str | None:
    """The folder of the checkpoint from which the calling `Trainer` resumes, or `None`."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(found, str):
            return found
        frame = frame.f_back
    return None
