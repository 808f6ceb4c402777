"""Errors of a run that come from the system or from torch, with what a user can do about them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint.run_state import TRAINER_STATE_NAME
from ..layers.weight_reads import advice_on_read
from .calling_trainer import output_dir

if TYPE_CHECKING:
    from transformers import Trainer

# What torch.save says of a file that it could not write.
OF_TORCH_SAVE = ("PytorchStreamWriter", "inline_container")


def explain_errors(trainer: Trainer) -> None:
    """
    Let the errors of a `Trainer` say more: of a checkpoint that cannot be written, which one is whole; of a compressed
    layer whose weight is read by other code, which one it is.

    Args:
        trainer: of which `_save_checkpoint`, `training_step` and `prediction_step` are replaced.
    """
    trainer._save_checkpoint = _explaining(trainer._save_checkpoint, lambda error: _unwritten(trainer, error))
    for step in ("training_step", "prediction_step"):
        setattr(trainer, step, _explaining(getattr(trainer, step), lambda error: _misread(trainer, error)))


def check_checkpoint_places(directory: str | Path) -> None:
    """
    Check that no file has the name of a folder that a `Trainer` will write a checkpoint into.

    Raises:
        NotADirectoryError: one has.
    """
    for place in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if place.name.rpartition("-")[2].isdecimal() and not place.is_dir():
            raise NotADirectoryError(
                f"{place} is no folder, and checkpoints are written into folders of such names: move it away, or give "
                "another output_dir."
            )


def _explaining(call: Callable[..., Any], explanation: Callable[[Exception], Exception | None]) -> Callable[..., Any]:
    @functools.wraps(call)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if (explained_error := explanation(error)) is None:
                raise
            raise explained_error from error

    return explained


def _misread(trainer: Trainer, error: Exception) -> Exception | None:
    advice = advice_on_read(trainer.model, error)
    return None if advice is None else ValueError(f"{advice} The error was: {error}")


def _unwritten(trainer: Trainer, error: Exception) -> Exception | None:
    of_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in OF_TORCH_SAVE)
    if not of_torch and not isinstance(error, (OSError, SafetensorError)):
        return None
    step, folder = trainer.state.global_step, Path(output_dir(trainer.args))
    whole = [number for number in _whole_checkpoints(folder) if number != step]
    if whole:
        newest = os.fspath(folder / f"{PREFIX_CHECKPOINT_DIR}-{max(whole)}")
        safe = f"The newest whole one is {newest}: go on with trainer.train(resume_from_checkpoint={newest!r})"
    else:
        safe = "No other is whole: start anew"
    return OSError(
        f"The checkpoint of step {step} could not be written in {folder} ({error}). {safe}, once there is room and "
        "the folder can be written."
    )


def _whole_checkpoints(folder: Path) -> list[int]:
    """Their steps. The `Trainer` writes its state last."""
    states = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    steps = [state.parent.name.rpartition("-")[2] for state in states]
    return [int(step) for step in steps if step.isdecimal()]
