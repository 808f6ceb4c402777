"""The training arguments that mean something else on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
from support.on_gpu import CHECKPOINTING
from transformers import BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig


@pytest.mark.parametrize(
    "arguments",
    [
        {"optim": "adamw_torch_fused"},
        {"optim": "adafactor"},
        {CHECKPOINTING: True},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}, "bf16": True},
        {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_trains_and_meets_the_budget(
    make_trainer: Callable[..., Trainer],
    check_compressed: Callable[[Trainer], None],
    tiny_bert: BertForSequenceClassification,
    arguments: dict[str, Any],
) -> None:
    config = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=4, rank_cooldown_steps=4)
    trainer = make_trainer(tiny_bert, RankDynaCallback(config), max_steps=12, **arguments)
    trainer.train()
    check_compressed(trainer)


@pytest.mark.parametrize("score", ["second_order", "fisher"])
def test_each_score(
    make_trainer: Callable[..., Trainer],
    check_compressed: Callable[[Trainer], None],
    tiny_bert: BertForSequenceClassification,
    score: Any,
) -> None:
    config = RankDynaConfig(rank_ratio=0.2, importance_score=score, rank_warmup_steps=4, rank_cooldown_steps=4)
    trainer = make_trainer(tiny_bert, RankDynaCallback(config), max_steps=12, bf16=score == "fisher")
    trainer.train()
    check_compressed(trainer)
