"""`torch_compile=True`: the kernels that inductor makes, against those of eager mode."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.on_gpu import groups_elsewhere, logged, ranks_of
from transformers import BertConfig, BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig


def test_torch_compile_ends_at_the_same_ranks(
    make_trainer: Callable[..., Trainer],
    check_compressed: Callable[[Trainer], None],
    fresh_dynamo: None,
) -> None:
    """Of 39 groups one may be in another layer: those of like worth are told apart by rounding."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes, **still))
    model.config.problem_type = "single_label_classification"  # else BERT sets it, and step 2 recompiles

    def run(**arguments: Any) -> Trainer:
        config = RankDynaConfig(rank_ratio=0.2, group_basis="weights", rank_warmup_steps=2, rank_cooldown_steps=3)
        trainer = make_trainer(copy.deepcopy(model), RankDynaCallback(config), max_steps=8, **arguments)
        trainer.train()
        check_compressed(trainer)
        return trainer

    # Compiled, a Trainer would round float32 to TF32, which decides between more groups than one.
    plain, compiled = run(), run(torch_compile=True, tf32=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    ranks, others = ranks_of(compiled.model), ranks_of(plain.model)
    assert groups_elsewhere(ranks, others) <= 1, f"{ranks} compiled, {others} in eager mode"
    assert logged(compiled, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-3)
