"""Layers that stay dense until the warm-up ends, in a loop of one's own: tests/trainer has the same in a `Trainer`."""

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.networks import layers_of
from support.own_loop import STEPS, adamw, train
from support.reference_network import build_dense, make_batches
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from rankdyna_trainer import LowRankLinear, RankDyna, RankDynaConfig, compact, inject_singular_groups, rank_report
from rankdyna_trainer.layers.injection import expect_groups
from rankdyna_trainer.layers.singular_group import singular_group_layers
from rankdyna_trainer.layers.whitening import metric_root, whitened_factors
from rankdyna_trainer.method.dense_phase import DensePhase

WARMUP = 8
# Then the layers are factored, and their groups gather scores until the warm-up ends.
LEARNING = 4
ROWS = make_batches(2, 4)
CONFIG = RankDynaConfig(rank_ratio=0.2, group_basis="activations", rank_warmup_steps=WARMUP, rank_cooldown_steps=6)
RANKS = [8, 14, 10, 10, 6, 6, 12, 9]  # of each layer at most


def start(config: RankDynaConfig = CONFIG, model: nn.Module | None = None) -> tuple[nn.Module, Optimizer, RankDyna]:
    model = model or build_dense(0)
    optimizer = adamw(model)
    return model, optimizer, RankDyna(model, config, optimizer, STEPS, batches=ROWS)


def names_of(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Of the parameters that an optimizer holds, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def test_the_first_part_of_the_warm_up_is_dense_training() -> None:
    plain = build_dense(0)
    expected = train(plain, adamw(plain), 1, LEARNING)
    model, optimizer, rankdyna = start()
    assert rankdyna.initial_ranks == RANKS and rankdyna.remaining_groups == sum(RANKS)
    assert train(model, optimizer, 1, LEARNING - 1, rankdyna) == expected[:-1]
    assert not layers_of(model)
    assert train(model, optimizer, LEARNING, LEARNING, rankdyna) == expected[-1:]
    assert [layer.rank for layer in layers_of(model)] == RANKS
    for batch in ROWS:
        torch.testing.assert_close(model(**batch)["logits"], plain(**batch)["logits"], rtol=1e-5, atol=1e-9)


def test_the_groups_are_those_of_the_inputs_when_they_are_made() -> None:
    plain = build_dense(0)
    train(plain, adamw(plain), 1, LEARNING)
    inputs: dict[str, list[Tensor]] = {}
    for name, layer in plain.blocks.named_modules(prefix="blocks"):
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].detach()))
    for batch in ROWS:
        plain(**batch)
    model, optimizer, rankdyna = start()
    train(model, optimizer, 1, LEARNING, rankdyna)
    for name, seen in inputs.items():
        x = torch.cat(seen)
        root = metric_root(x.T @ x)
        assert root is not None
        _, sigma, _ = whitened_factors(None, plain.get_submodule(name).weight.detach(), root)
        torch.testing.assert_close(model.get_submodule(name).sigma.detach(), sigma, rtol=1e-3, atol=1e-5)
    assert not any(layer.importance.any() for layer in layers_of(model))


def test_the_groups_gather_scores_before_the_first_removal() -> None:
    """Over `1 / (1 - beta)` steps; a short warm-up learns in its first half all the same."""
    for warmup, beta, learning in (
        (8, 0.85, 4),
        (9, 0.85, 5),
        (13, 0.85, 7),
        (13, 0.9, 7),
        (13, 0.5, 11),
        (1, 0.5, 1),
    ):
        config = RankDynaConfig(
            rank_ratio=0.2,
            group_basis="activations",
            rank_warmup_steps=warmup,
            rank_cooldown_steps=6,
            importance_beta=beta,
        )
        model, optimizer, rankdyna = start(config)
        train(model, optimizer, 1, learning - 1, rankdyna)
        assert rankdyna.learning and not layers_of(model)
        train(model, optimizer, learning, learning, rankdyna)
        assert not rankdyna.learning and not any(layer.importance.any() for layer in layers_of(model))
        train(model, optimizer, learning + 1, warmup, rankdyna)
        assert rankdyna.remaining_groups == sum(RANKS)
        train(model, optimizer, warmup + 1, warmup + 1, rankdyna)
        assert rankdyna.remaining_groups == rankdyna.budget(warmup + 1) < sum(RANKS)


def test_the_budget_holds_afterwards() -> None:
    model, optimizer, rankdyna = start()
    totals = []
    for step in range(1, STEPS + 1):
        train(model, optimizer, step, step, rankdyna)
        assert rankdyna.remaining_groups <= rankdyna.budget(step)
        totals.append(rankdyna.remaining_groups)
    assert totals[:WARMUP] == [sum(rankdyna.initial_ranks)] * WARMUP and totals[WARMUP] < totals[0]
    assert totals[-1] == math.ceil(0.2 * totals[0])
    compact(model)
    assert rank_report(model)["rank"].sum() == totals[-1]


def test_the_optimizer_goes_on_with_the_groups_in_the_place_of_the_weights() -> None:
    model = build_dense(0)
    decayed = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
    others = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 0.01}]
    optimizer = AdamW(groups, lr=0.005)
    rankdyna = RankDyna(model, CONFIG, optimizer, STEPS, batches=ROWS)
    train(model, optimizer, 1, LEARNING, rankdyna)
    factors = [name for name, _ in model.named_parameters() if not name.endswith("bias")]
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert (
        factors[:3] == ["blocks.0.up.u", "blocks.0.up.sigma", "blocks.0.up.v"] and len(factors) == 3 * len(RANKS) + 1
    )
    assert names_of(model, optimizer) == factors + biases
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(factors), len(biases)]
    # What is known of the other parameters is kept, and of the weights nothing is.
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in optimizer.state} <= held and len(optimizer.state) == len(RANKS) + 2
    steps = {name: optimizer.state[model.get_parameter(name)]["step"].item() for name in biases}
    assert set(steps.values()) == {LEARNING}
    before = {name: model.get_parameter(name).clone() for name in factors}
    train(model, optimizer, LEARNING + 1, LEARNING + 1)
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_the_order_is_that_of_an_optimizer_made_of_the_groups() -> None:
    """So that a resumed run finds each state in its place, also of layers that were compacted before."""
    halved = compacted_before()
    for model in (build_dense(0), halved):
        model, optimizer, rankdyna = start(model=model, config=RankDynaConfig(param_ratio=0.1, **WHEN))
        train(model, optimizer, 1, LEARNING, rankdyna)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert names_of(model, optimizer) == trained
        began_empty = {name for name, layer in singular_group_layers(model).items() if not layer.initial_rank}
        assert {name for name, _ in model.named_parameters()} - set(trained) == {
            f"{name}.{factor}" for name in began_empty for factor in ("u", "sigma", "v")
        }


WHEN: dict[str, Any] = {"group_basis": "activations", "rank_warmup_steps": WARMUP, "rank_cooldown_steps": 6}


def compacted_before() -> nn.Module:
    """To ranks of every kind: 0, low, and so high that the layer stays dense."""
    model = inject_singular_groups(build_dense(0), RankDynaConfig(rank_ratio=0.5))
    for layer, rank in zip(layers_of(model), (0, 3, 2, 10, 4, 1, 2, 3), strict=True):
        layer.set_remaining(torch.arange(layer.width) < rank)
    compact(model)
    assert {type(model.blocks[0].up), type(model.blocks[0].gate)} == {LowRankLinear}
    return model


@pytest.mark.parametrize("ratio", [{"rank_ratio": 0.1}, {"param_ratio": 0.1}])
def test_a_model_that_was_compacted_before(ratio: dict[str, float]) -> None:
    model = compacted_before()
    plain = copy.deepcopy(model)
    expected = train(plain, adamw(plain), 1, LEARNING)
    model, optimizer, rankdyna = start(RankDynaConfig(**ratio, **WHEN), model)
    initial = [layer.rank for layer in plain.blocks.modules() if isinstance(layer, LowRankLinear)]
    assert rankdyna.initial_ranks[0] == 0 and set(initial) <= set(rankdyna.initial_ranks)
    assert train(model, optimizer, 1, LEARNING, rankdyna) == expected
    assert [layer.rank for layer in layers_of(model)] == rankdyna.initial_ranks
    for batch in ROWS:
        torch.testing.assert_close(model(**batch)["logits"], plain(**batch)["logits"], rtol=1e-5, atol=1e-9)
    train(model, optimizer, LEARNING + 1, STEPS, rankdyna)
    assert rankdyna.meets_final_budget
    held = rankdyna.remaining_groups if "rank_ratio" in ratio else rankdyna.remaining_parameters
    assert 0 < held <= rankdyna.budget(STEPS)


def test_a_warm_up_of_no_steps_factors_at_once() -> None:
    config = RankDynaConfig(rank_ratio=0.2, group_basis="activations", rank_warmup_steps=0, rank_cooldown_steps=6)
    model, optimizer, rankdyna = start(config)
    assert [layer.rank for layer in layers_of(model)] == RANKS
    injected = inject_singular_groups(build_dense(0), config, ROWS)
    for one, other in zip(layers_of(model), layers_of(injected), strict=True):
        assert all(torch.equal(one.factors()[name], factor) for name, factor in other.factors().items())
    train(model, optimizer, 1, STEPS, rankdyna)
    assert rankdyna.remaining_groups == rankdyna.budget(STEPS)


def test_a_run_that_ends_in_its_warm_up_keeps_the_whole_model() -> None:
    plain = build_dense(0)
    train(plain, adamw(plain), 1, 3)
    model, optimizer, rankdyna = start()
    train(model, optimizer, 1, 3, rankdyna)
    rankdyna.finish(3)
    assert rank_report(model)["rank"].sum() == sum(rankdyna.initial_ranks)
    for batch in ROWS:
        torch.testing.assert_close(model(**batch)["logits"], plain(**batch)["logits"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("score", ["first_order", "second_order", "fisher"])
@pytest.mark.parametrize("optimizer_of", [adamw, lambda model: SGD(model.parameters(), lr=0.05, momentum=0.9)])
def test_every_score_and_optimizer(score: str, optimizer_of: Callable[[nn.Module], Optimizer]) -> None:
    model = build_dense(0)
    optimizer = optimizer_of(model)
    config = RankDynaConfig(rank_ratio=0.2, importance_score=score, **WHEN)
    rankdyna = RankDyna(model, config, optimizer, STEPS, batches=ROWS)
    train(model, optimizer, 1, LEARNING + 1, rankdyna)
    assert any(layer.importance.any() for layer in layers_of(model))
    train(model, optimizer, LEARNING + 2, STEPS, rankdyna)
    assert rankdyna.remaining_groups == rankdyna.budget(STEPS)


def test_layers_that_are_watched_meanwhile_are_factored_all_the_same() -> None:
    model, optimizer, rankdyna = start()
    model.blocks[0].up.register_forward_hook(lambda *_: None)
    train(model, optimizer, 1, LEARNING, rankdyna)
    assert [layer.rank for layer in layers_of(model)] == RANKS


def test_what_is_left_alone_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build_dense(0)
    model.blocks[0].up.weight.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        model, optimizer, rankdyna = start(model=model)
        train(model, optimizer, 1, LEARNING, rankdyna)
    assert [record.getMessage() for record in caplog.records] == [
        "RankDyna leaves layers alone: 1 frozen (requires_grad=False) (blocks.0.up, ...)."
    ]


def test_a_layer_that_is_frozen_after_the_model_was_prepared_is_no_target() -> None:
    model = expect_groups(build_dense(0), CONFIG)
    model.blocks[0].up.weight.requires_grad_(False)
    model, optimizer, rankdyna = start(model=model)
    train(model, optimizer, 1, STEPS, rankdyna)
    rankdyna.finish(STEPS)
    assert "blocks.0.up" not in rank_report(model).index and len(rank_report(model)) == len(RANKS) - 1


def test_a_run_that_is_stopped_while_it_is_dense_can_be_compacted() -> None:
    model, optimizer, rankdyna = start(model=expect_groups(build_dense(0), CONFIG))
    train(model, optimizer, 1, LEARNING - 1, rankdyna)
    before = [model(**batch)["logits"] for batch in ROWS]
    assert rank_report(compact(model))["rank"].tolist() == RANKS
    assert all(torch.equal(model(**batch)["logits"], logits) for batch, logits in zip(ROWS, before, strict=True))


def test_refusals() -> None:
    model = build_dense(0)
    head = AdamW(model.classifier.parameters())
    with pytest.raises(
        ValueError, match=r"The optimizer does not hold the weights of 8 target layers \(blocks\.0\.up,"
    ):
        RankDyna(model, CONFIG, head, STEPS, batches=ROWS)
    with pytest.raises(ValueError, match="has no singular groups"):
        RankDyna(model, CONFIG, adamw(model), STEPS)
    with pytest.raises(ValueError, match="has no singular groups"):
        RankDyna(model, RankDynaConfig(rank_ratio=0.2, group_basis="weights"), adamw(model), STEPS, batches=ROWS)
    small = RankDynaConfig(rank_ratio=0.9, group_basis="activations")
    with pytest.raises(ValueError, match=r"holds no more than rank_ratio=0\.9 of the dense one"):
        start(small, compacted_before())
    with pytest.raises(ValueError, match="No layer to compress matches"):
        DensePhase(nn.Sequential(nn.Tanh()), CONFIG, head, lambda layers: {})


def test_weights_that_diverged_in_the_warm_up_are_named() -> None:
    model, optimizer, rankdyna = start()
    train(model, optimizer, 1, LEARNING - 1, rankdyna)
    model.blocks[1].down.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.down has inf or nan: .*training diverged"):
        rankdyna.enforce_budget(LEARNING)
    assert not layers_of(model)
