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
    from transformers import Trainer


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
