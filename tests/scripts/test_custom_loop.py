"""The loop of `scripts/custom_loop.py` beside the Trainer."""

import copy
from collections.abc import Callable

import custom_loop
import pytest
import torch
from support.paper import PAPER
from support.training_runs import SequentialTrainer
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_custom_loop_reaches_the_ranks_of_the_trainer(
    scope: str,
    make_trainer: Callable[..., Trainer],
    still_bert: BertForSequenceClassification,
    rows: list[dict[str, torch.Tensor]],
) -> None:
    config = RankDynaConfig(rank_ratio=0.2, rank_scope=scope, rank_warmup_steps=0.1, **PAPER)
    custom = copy.deepcopy(still_bert)
    trainer = make_trainer(
        still_bert,
        RankDynaCallback(config),
        trainer_class=SequentialTrainer,
        max_steps=24,
        lr_scheduler_type="constant",
    )
    trainer.train()
    custom_loop.train(custom, config, DataLoader(rows, batch_size=8), learning_rate=1e-3, epochs=3)
    assert rank_report(custom).equals(rank_report(trainer.model))
