"""A teacher for the second round of a baseline, which no RankDynaCallback accompanies."""

import copy
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.method.teaching import Teaching
from rankdyna_trainer.trainer.teacher import SELF, load_teacher


class TaughtRound(TrainerCallback):
    """
    Adds the teacher's loss, as the RankDynaCallback does.

    Args:
        model: fine-tuned and dense: with `teacher="self"` it is the teacher, as it is now.
        config: which has the teacher.
    """

    def __init__(self, model: nn.Module, config: RankDynaConfig) -> None:
        self._config = config
        self._teacher = copy.deepcopy(model) if config.teacher == SELF else load_teacher(model, config, None)
        self._teaching: Teaching | None = None

    def on_train_begin(self, args: TrainingArguments, *_: Any, model: nn.Module, **__: Any) -> None:
        """Let the teacher teach."""
        if self._teacher is not None:
            self._teaching = Teaching(model, self._teacher.to(args.device), self._config)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take it off the model, before the model is saved."""
        if self._teaching is not None:
            self._teaching.release()
