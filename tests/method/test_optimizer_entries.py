"""Whatever an optimizer, or one that it wraps, keeps of parameters follows when the layers change their form."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_optimizer
import torch
from support.networks import Block, Network, layers_of, small_bert
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, SGD, Adagrad, AdamW, Optimizer, Rprop

from rankdyna_trainer import LowRankLinear, RankDyna, RankDynaConfig, inject_singular_groups
from rankdyna_trainer.baselines import svd

STEPS = 16
CONFIG = RankDynaConfig(
    rank_ratio=0.3, rank_warmup_steps=3, rank_cooldown_steps=5, rank_update_interval=1, block_floor=0
)
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda model: AdamW(model.named_parameters(), lr=1e-2),
    "Rprop": lambda model: Rprop(model.named_parameters(), lr=1e-2),
    "ASGD": lambda model: ASGD(model.named_parameters(), lr=1e-2),
    "Adagrad, with a state from the start": lambda model: Adagrad(model.named_parameters(), lr=1e-2),
    "LBFGS": lambda model: LBFGS(model.parameters(), lr=0.1, max_iter=5),
    "Lookahead": lambda model: pytorch_optimizer.Lookahead(AdamW(model.named_parameters(), lr=1e-2), k=2),
    "Lookahead of momentum": lambda model: pytorch_optimizer.Lookahead(
        SGD(model.parameters(), lr=1e-2, momentum=0.9), k=2, pullback_momentum="pullback"
    ),
    "SAM": lambda model: pytorch_optimizer.SAM(model.named_parameters(), AdamW, lr=1e-2),
}


def states(optimizer: Any) -> Iterator[dict[Tensor, Any]]:
    while optimizer is not None:
        yield optimizer.state
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "base_optimizer", None)


def lists_of(optimizer: Any) -> Iterator[list[nn.Parameter]]:
    for group in optimizer.param_groups:
        yield group["params"]
    for inner in (getattr(optimizer, "optimizer", None), getattr(optimizer, "base_optimizer", None)):
        if inner is not None:
            yield from lists_of(inner)
    if isinstance(optimizer, LBFGS):
        yield optimizer._params


def assert_holds_the_model(optimizer: Optimizer, model: nn.Module) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for held in lists_of(optimizer):
        assert sorted(map(id, held)) == sorted(names)
    for state in states(optimizer):
        assert {id(parameter) for parameter in state} <= names.keys()
    for group in optimizer.param_groups:
        if "param_names" in group:
            assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize("dense_first", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_holds_is_the_model_at_each_step(name: str, dense_first: bool) -> None:
    model = Network(*(Block() for _ in range(3)))
    data = [torch.randn(16, 6) for _ in range(4)]
    if not dense_first:
        inject_singular_groups(model, CONFIG)
    optimizer = OPTIMIZERS[name](model)
    rows = [{"x": batch} for batch in data]
    rankdyna = RankDyna(model, CONFIG, optimizer, STEPS, batches=rows if dense_first else None)

    def step(number: int) -> None:
        x = data[number % 4]

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (model(x) - x[:, :2].sin()).square().mean()
            value.backward()
            return value.detach()

        loss()
        if number <= STEPS:
            rankdyna.update_importance()
        optimizer.step(loss) if name in ("LBFGS", "SAM") else optimizer.step()

    for number in range(1, STEPS + 1):
        step(number)
        rankdyna.enforce_budget(number)
        assert_holds_the_model(optimizer, model)
        for layer in layers_of(model):
            removed = [factor[~layer.remaining] for factor in layer.factors().values()]
            assert not any(rows.any() for rows in removed), "a removed group has weight again"
    rankdyna.finish(STEPS)
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == 3
    assert_holds_the_model(optimizer, model)
    before = [parameter.clone() for parameter in model.parameters()]
    for number in range(STEPS + 1, STEPS + 3):
        step(number)
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert all(changed), "it trains on with all of them"


def test_names_of_a_model_that_was_compacted_before() -> None:
    model = svd(small_bert(), RankDynaConfig(rank_ratio=0.5))
    names = [f"module.{name}" for name, _ in model.named_parameters()]
    optimizer = AdamW(list(zip(names, model.parameters(), strict=True)))
    rows = [{"input_ids": torch.arange(8).unsqueeze(0), "labels": torch.tensor([0])}]
    config = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=1, rank_cooldown_steps=1)
    rankdyna = RankDyna(model, config, optimizer, 4, batches=rows)
    for step in range(1, 5):
        model(**rows[0]).loss.backward()
        rankdyna.update_importance()
        optimizer.step()
        rankdyna.enforce_budget(step)
        expected = {id(parameter): f"module.{name}" for name, parameter in model.named_parameters()}
        group = optimizer.param_groups[0]
        assert group["param_names"] == [expected[id(parameter)] for parameter in group["params"]]
    rankdyna.finish(4)
    expected = {id(parameter): f"module.{name}" for name, parameter in model.named_parameters()}
    assert group["param_names"] == [expected[id(parameter)] for parameter in group["params"]]
    assert len(group["params"]) == len(expected)
