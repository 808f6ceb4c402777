"""What a user can do when a checkpoint cannot be written in the middle of a run: which one is whole."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint.run_state import TRAINER_STATE_NAME
from .calling_trainer import output_dir

if TYPE_CHECKING:
    from transformers import Trainer


def explain_checkpoint_errors(trainer: Trainer) -> None:
    """
    Let the errors of a `Trainer` that writes a checkpoint say what is safe: a full disk is told in many words by those
    who write the weights, the optimizer and the rest.

    Args:
        trainer: of which `_save_checkpoint` is replaced.
    """
    save = trainer._save_checkpoint

    @functools.wraps(save)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return save(*args, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as error:
            step = trainer.state.global_step
            folder = Path(output_dir(trainer.args))
            raise OSError(
                f"The checkpoint of step {step} could not be written in {folder} ({error}). {_safe(folder, step)}"
            ) from error

    trainer._save_checkpoint = explained


def _safe(folder: Path, failed_step: int) -> str:
    """Which checkpoint is the newest whole one: the `Trainer` writes its state last."""
    steps = [
        path.parent.name.rpartition("-")[2] for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    ]
    whole = [int(step) for step in steps if step.isdecimal() and int(step) != failed_step]
    if not whole:
        return "No checkpoint is whole: make room, or give another output_dir, and start anew."
    newest = folder / f"{PREFIX_CHECKPOINT_DIR}-{max(whole)}"
    return f"Make room, and go on with trainer.train(resume_from_checkpoint={str(newest)!r}), which is whole."
