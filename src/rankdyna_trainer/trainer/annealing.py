"""The learning rate of a run that stays at several sizes: it falls at each, and begins anew for the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StationAnnealing(TrainerCallback):
    """
    Takes each optimizer step at a part of its learning rate, and leaves the rate as the scheduler set it.

    Args:
        part: of the learning rate, after a number of finished optimizer steps.
    """

    def __init__(self, part: Callable[[int], float]) -> None:
        self._part = part
        self._rates: list[Any] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Any, **_: Any
    ) -> None:
        """Lower the rates."""
        part = self._part(state.global_step)
        self._rates = [] if part == 1 else [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            if rate is not None:  # an optimizer may find it by itself
                group["lr"] = rate * part

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Any, **_: Any
    ) -> None:
        """A scheduler may reckon the next rate from this one."""
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
