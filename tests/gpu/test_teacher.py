"""A teacher on the device of its student."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from support.on_gpu import logged
from support.teaching import other_weights
from transformers import BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig


@pytest.mark.parametrize("basis", [None, "weights"])
def test_the_parts_of_the_loss_are_logged(
    make_trainer: Callable[..., Trainer],
    check_compressed: Callable[[Trainer], None],
    tiny_bert: BertForSequenceClassification,
    basis: Any,
) -> None:
    """They are there from the first step on, before a part of the model is removed."""
    config = RankDynaConfig(rank_ratio=0.2, group_basis=basis, rank_warmup_steps=8, rank_cooldown_steps=6)
    teacher = other_weights(tiny_bert)
    trainer = make_trainer(tiny_bert, RankDynaCallback(config, teacher=teacher), bf16=True)
    trainer.train()
    for name in ("task_loss", "teacher_logits_loss", "teacher_hidden_loss"):
        values = logged(trainer, name)
        assert len(values) == 20 and all(math.isfinite(value) and value > 0 for value in values), f"{name}: {values}"
    hidden = logged(trainer, "teacher_hidden_loss")
    assert hidden[7] < hidden[0], f"teacher_hidden_loss: {hidden}"
    check_compressed(trainer)
