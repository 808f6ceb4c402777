"""Layers that begin with the groups that `start_ratio` has room for, in a loop of one's own."""

import math
from typing import Any

import pytest
import torch
from support.networks import layers_of
from support.own_loop import STEPS, adamw, train
from support.reference_network import build_dense, make_batches
from torch import Tensor, nn
from torch.optim import Optimizer

from rankdyna_trainer import LowRankLinear, RankDyna, RankDynaConfig, compact, inject_singular_groups, rank_report
from rankdyna_trainer.layers import input_moments
from rankdyna_trainer.layers.injection import expect_groups
from rankdyna_trainer.method import dense_phase

WARMUP = 8
LEARNING = 4  # then the layers are factored
ROWS = make_batches(2, 4)
WHEN: dict[str, Any] = {"group_basis": "activations", "rank_warmup_steps": WARMUP, "rank_cooldown_steps": 6}
RANKS = [8, 14, 10, 10, 6, 6, 12, 9]  # of each layer at most


def start(config: RankDynaConfig, model: nn.Module | None = None) -> tuple[nn.Module, Optimizer, RankDyna]:
    model = model or build_dense(0)
    optimizer = adamw(model)
    return model, optimizer, RankDyna(model, config, optimizer, STEPS, batches=ROWS)


def compacted_before() -> nn.Module:
    """To ranks of every kind: 0, low, and so high that the layer stays dense."""
    model = inject_singular_groups(build_dense(0), RankDynaConfig(rank_ratio=0.5))
    for layer, rank in zip(layers_of(model), (0, 3, 2, 10, 4, 1, 2, 3), strict=True):
        layer.set_remaining(torch.arange(layer.width) < rank)
    compact(model)
    assert {type(model.blocks[0].up), type(model.blocks[0].gate)} == {LowRankLinear}
    return model


@pytest.mark.parametrize("ratio", [{"param_ratio": 0.3}, {"rank_ratio": 0.2}])
def test_groups_that_have_no_room_are_left_out_when_they_are_made(ratio: dict[str, float]) -> None:
    model, optimizer, rankdyna = start(RankDynaConfig(**ratio, **WHEN, start_ratio=0.7))
    shapes = rankdyna.rank_budget.shapes
    dense = sum(out * into for out, into in shapes)
    begins = [0.7 * out * into // (out + into + 1) for out, into in shapes]
    assert rankdyna.initial_ranks == begins
    plain = build_dense(0)
    expected = train(plain, adamw(plain), 1, LEARNING)
    for step in range(1, LEARNING):
        assert train(model, optimizer, step, step, rankdyna) == expected[step - 1 : step]
        assert rankdyna.remaining_parameters == dense and rankdyna.remaining_groups == sum(RANKS)
        assert not rankdyna.meets_final_budget
    assert train(model, optimizer, LEARNING, LEARNING, rankdyna) == expected[-1:]
    layers = layers_of(model)
    assert [layer.width for layer in layers] == begins
    assert sum(factor.numel() for layer in layers for factor in layer.factors().values()) <= 0.7 * dense
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    for step in range(LEARNING + 1, STEPS + 1):
        train(model, optimizer, step, step, rankdyna)
        kept = rankdyna.remaining_parameters if "param_ratio" in ratio else rankdyna.remaining_groups
        assert kept <= rankdyna.budget(step) <= rankdyna.rank_budget.initial
        if step <= WARMUP:
            assert [layer.width for layer in layers] == begins
    whole = dense if "param_ratio" in ratio else sum(RANKS)
    (part,) = ratio.values()
    assert rankdyna.budget(STEPS) == (math.floor if "param_ratio" in ratio else math.ceil)(part * whole)


def test_a_run_may_end_with_the_groups_that_it_begins_with() -> None:
    config = RankDynaConfig(param_ratio=0.5, start_ratio=0.5, **WHEN)
    model, optimizer, rankdyna = start(config)
    train(model, optimizer, 1, LEARNING - 1, rankdyna)
    assert not rankdyna.meets_final_budget and rankdyna.station_at(LEARNING - 1) is None
    train(model, optimizer, LEARNING, STEPS, rankdyna)
    assert rankdyna.meets_final_budget
    assert [layer.rank for layer in layers_of(model)] == rankdyna.initial_ranks
    rankdyna.finish(STEPS)
    assert rank_report(model)["rank"].tolist() == rankdyna.initial_ranks


def test_a_run_that_is_stopped_while_it_is_dense_says_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    config = RankDynaConfig(param_ratio=0.3, start_ratio=0.7, **WHEN)
    model, optimizer, rankdyna = start(config, expect_groups(build_dense(0), config))
    train(model, optimizer, 1, LEARNING - 1, rankdyna)
    compact(model)
    dense = sum(out * into for out, into in rankdyna.rank_budget.shapes)
    assert rank_report(model)["parameters"].sum() == dense
    assert f"the budget that it has met, {dense} parameters" in caplog.text


def test_a_model_that_was_compacted_before_begins_with_no_more_than_it_has() -> None:
    before = [layer.rank for layer in compacted_before().modules() if isinstance(layer, LowRankLinear)]
    model, optimizer, rankdyna = start(RankDynaConfig(param_ratio=0.1, start_ratio=0.3, **WHEN), compacted_before())
    shapes = rankdyna.rank_budget.shapes
    rooms = [0.3 * out * into // (out + into + 1) for out, into in shapes]
    assert all(rank <= room for rank, room in zip(rankdyna.initial_ranks, rooms, strict=True))
    assert rankdyna.initial_ranks[0] == 0 and before[0] == 0
    train(model, optimizer, 1, STEPS, rankdyna)
    assert rankdyna.meets_final_budget


def test_what_the_metric_holds_fits_where_the_gradients_were() -> None:
    """With `start_ratio` the rows are seen several times, each time for as many layers as there is room for."""
    passes: dict[float | None, list[list[str]]] = {}
    for start_ratio in (None, 1.0):
        model = build_dense(0)
        optimizer = adamw(model)
        config = RankDynaConfig(param_ratio=0.3, start_ratio=start_ratio, **WHEN)
        rankdyna = RankDyna(model, config, optimizer, STEPS, batches=ROWS)
        dense = rankdyna._warmup.dense
        assert dense is not None
        observe, seen = dense._observe, passes.setdefault(start_ratio, [])

        def noted(layers: Any, observe: Any = observe, seen: list[list[str]] = seen) -> dict[str, Tensor]:
            seen.append([*layers])
            return observe(layers)  # type: ignore[no-any-return]

        dense._observe = noted
        train(model, optimizer, 1, LEARNING, rankdyna)
    (whole,) = passes[None]
    parts = passes[1.0]
    assert len(parts) > 1 and [name for part in parts for name in part] == whole
    plain = build_dense(0)
    gradients = sum(8 * plain.get_submodule(name).weight.numel() for name in whole)  # type: ignore[union-attr, operator]
    for part in parts:
        held = sum(8 * plain.get_submodule(name).in_features ** 2 for name in part)  # type: ignore[union-attr, operator]
        assert held <= gradients or len(part) == 1


@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize(("ratio", "usual", "at_once"), [(0.9, 10**9, 2), (None, 1, 2), (None, 10**9, 9)])
def test_the_rows_are_seen_as_often_whether_gradients_are_still_there(
    ratio: float | None, usual: int, at_once: int, zeroed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `start_ratio` there is room for what is usual at least."""
    model = nn.Sequential(*(nn.Linear(32, 8, bias=False) for _ in range(9))).double()  # 2 KiB each, of moments 8 KiB
    asked: list[list[str]] = []

    def observe(layers: dict[str, nn.Module]) -> dict[str, Tensor]:
        asked.append([*layers])
        return {}

    for module in (input_moments, dense_phase):
        monkeypatch.setattr(module, "BYTES_AT_ONCE", usual)
    config = RankDynaConfig(param_ratio=0.3, start_ratio=ratio, target_modules="all-linear", exclude_modules=["8"])
    phase = dense_phase.DensePhase(model, config, adamw(model), observe)
    if not zeroed:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    phase.end()
    names = [str(number) for number in range(8)]
    assert asked == [names[i : i + at_once] for i in range(0, 8, at_once)]
    assert all(parameter.grad is None for parameter in layers_of(model)[0].parameters())
