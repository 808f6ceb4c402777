"""The same run on a GPU and in main memory: the same groups remain, and the weights are the same."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.on_gpu import groups_elsewhere, largest_difference, logged, ranks_of, whole_weights
from support.paper import PAPER
from support.reference_network import build_dense, make_batches, run_reference
from support.training_runs import SequentialTrainer
from torch import nn
from transformers import BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def run(make_trainer: MakeTrainer, still_bert: BertForSequenceClassification) -> Callable[..., Trainer]:
    """A finished run without dropout, over the rows in their order."""

    def trained(basis: Any, dtype: torch.dtype, **arguments: Any) -> Trainer:
        config = RankDynaConfig(rank_ratio=0.2, group_basis=basis, rank_warmup_steps=4, rank_cooldown_steps=8)
        trainer = make_trainer(
            copy.deepcopy(still_bert).to(dtype),
            RankDynaCallback(config),
            trainer_class=SequentialTrainer,
            optim="adamw_torch",
            **arguments,
        )
        trainer.train()
        return trainer

    return trained


# The moments of the inputs are sums of float32 products, and their rounding turns the groups.
@pytest.mark.parametrize(("basis", "limit"), [("weights", 1e-9), (None, 1e-5)])
def test_in_float64_as_on_the_cpu(run: Callable[..., Trainer], device: torch.device, basis: Any, limit: float) -> None:
    expected, found = run(basis, torch.float64, use_cpu=True), run(basis, torch.float64)
    assert next(expected.model.parameters()).device.type == "cpu"
    assert next(found.model.parameters()).device.type == device.type
    for name in ("rank_budget", "remaining_groups"):
        assert logged(found, name) == logged(expected, name)
    assert ranks_of(found.model) == ranks_of(expected.model)
    difference = largest_difference(whole_weights(found.model), whole_weights(expected.model))
    assert difference < limit, f"the weights differ by {difference}"


@pytest.mark.parametrize("basis", ["weights", None])
def test_in_float32_nearly_as_in_float64_on_the_cpu(run: Callable[..., Trainer], basis: Any) -> None:
    """Rounding decides only between groups that are worth the same: two of 77 may be in another layer."""
    expected, found = run(basis, torch.float64, use_cpu=True), run(basis, torch.float32)
    ranks, others = ranks_of(found.model), ranks_of(expected.model)
    assert sum(ranks) == sum(others) == 77
    assert groups_elsewhere(ranks, others) <= 2, f"{ranks} on the GPU, {others} in float64"
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-3)


def test_as_the_equations(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Algorithm 1 written a second time, in float64 on the CPU."""
    batches = make_batches(1, 40, 16)
    settings: dict[str, Any] = {"optimizer": "adamw", "lr": 0.005, "max_grad_norm": 1.0}
    expected = run_reference(build_dense(0), batches, kind="rank", c=0.2, scope="global", t0=5, t1=10, **settings)
    config = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=5, rank_cooldown_steps=10, **PAPER)
    model = build_dense(0)
    trainer = make_trainer(
        model,
        RankDynaCallback(config),
        trainer_class=SequentialTrainer,
        trainer_arguments={
            "train_dataset": [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(16)]
        },
        max_steps=40,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",
        learning_rate=0.005,
        optim="adamw_torch",
    )
    trainer.train()
    assert ranks_of(model) == list(expected.ranks[-1])
    assert logged(trainer, "rank_budget") == expected.budgets
    for name, weight in expected.weights.items():
        layer = model.get_submodule(name)
        found = (layer.weight if isinstance(layer, nn.Linear) else layer.to_dense_weight()).detach().cpu()
        difference = float((found - weight).abs().max())
        assert difference < 1e-9, f"{name} differs by {difference}"
