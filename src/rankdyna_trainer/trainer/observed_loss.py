"""The loss that a `Trainer` computes itself, where the model returns none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..method.algorithm import RankDyna

if TYPE_CHECKING:
    from transformers import Trainer


def observe_loss(trainer: Trainer, run: Callable[[], RankDyna | None]) -> None:
    """
    Tell a run the loss of each batch: that of `compute_loss_func`, label smoothing, or a `compute_loss` of its own.

    Args:
        trainer: of which `training_step` is replaced.
        run: gives the run that is under way, if one is.
    """
    step = trainer.training_step

    @functools.wraps(step)
    def observed(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        if (rankdyna := run()) is not None and isinstance(loss, Tensor) and loss.numel() == 1:
            rankdyna.note_loss(loss)
        return loss

    trainer.training_step = observed
