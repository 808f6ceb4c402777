"""Algorithm 1 in a loop of one's own; tests/trainer/test_reference.py holds it against the equations."""

import copy
import itertools
import math
import re
import weakref
from collections.abc import Callable

import pytest
import torch
from support.reference_network import build_dense, make_batches
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from rankdyna_trainer import RankDyna, RankDynaConfig, compact, inject_singular_groups, rank_report
from rankdyna_trainer.layers.singular_group import SingularGroupLinear

STEPS = 30
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)
OptimizerOf = Callable[[nn.Module], Optimizer]


def start(config: RankDynaConfig, optimizer_of: OptimizerOf) -> tuple[nn.Module, RankDyna]:
    model = inject_singular_groups(build_dense(0), config)
    return model, RankDyna(model, config, optimizer_of(model), STEPS)


def run(model: nn.Module, rankdyna: RankDyna, first: int = 1, last: int = STEPS) -> None:
    batches = make_batches(1, STEPS)
    for step in range(first, last + 1):
        model(**batches[step - 1])["loss"].backward()
        rankdyna.update_importance()
        rankdyna.optimizer.step()
        rankdyna.enforce_budget(step)
        rankdyna.optimizer.zero_grad()


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.005, weight_decay=0.01)


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("optimizer_of", [adamw, momentum])
def test_cutting_groups_out_follows_the_path_of_masking_them(optimizer_of: OptimizerOf) -> None:
    cut, cutting = start(CONFIG, optimizer_of)
    masked, masking = start(CONFIG, optimizer_of)
    masking._cutting._state_has_groups = False  # as under DDP, whose buckets hold the parameters as they are
    for step in range(1, STEPS + 1):
        run(cut, cutting, step, step)
        run(masked, masking, step, step)
        assert [layer.rank for layer in cutting.layers] == [layer.rank for layer in masking.layers]
        assert cutting.remaining_groups <= cutting.budget(step)
    assert all(layer.width == layer.full_rank for layer in masking.layers)
    assert all(layer.width == max(layer.rank, 2) for layer in cutting.layers)
    for one, other in zip(cutting.layers, masking.layers, strict=True):
        torch.testing.assert_close(one.to_dense_weight(), other.to_dense_weight(), rtol=0, atol=1e-10)
        torch.testing.assert_close(one.importance[one.remaining], other.importance[other.remaining])


def test_an_optimizer_with_state_that_cannot_be_cut_keeps_removed_groups_at_zero() -> None:
    model, rankdyna = start(CONFIG, lambda model: Adafactor(model.parameters(), lr=0.01))
    run(model, rankdyna)
    assert rankdyna.remaining_groups == rankdyna.budget(STEPS) == 15
    assert any(layer.rank < layer.width for layer in rankdyna.layers)
    for layer in rankdyna.layers:
        for factor in layer.factors().values():
            assert not factor[~layer.remaining].any()


def test_removal_is_final() -> None:
    model, rankdyna = start(RankDynaConfig(param_ratio=0.3, rank_warmup_steps=0.1, rank_cooldown_steps=0.4), adamw)
    rankdyna._cutting._state_has_groups = False
    removed = [torch.zeros(layer.full_rank, dtype=torch.bool) for layer in rankdyna.layers]
    for step in range(1, STEPS + 1):
        run(model, rankdyna, step, step)
        for before, layer in zip(removed, rankdyna.layers, strict=True):
            assert not (layer.remaining & before).any()
        removed = [~layer.remaining for layer in rankdyna.layers]
    assert any(mask.any() for mask in removed)
    assert rankdyna.remaining_parameters <= rankdyna.budget(STEPS)


def test_the_same_groups_whatever_the_scale_of_the_loss() -> None:
    """The choice is relative: a loss in other units removes the same groups, as long as the path is the same."""

    def ranks(scale: float) -> list[int]:
        model, rankdyna = start(CONFIG, lambda model: SGD(model.parameters(), lr=0.05 / scale))
        for step, batch in enumerate(make_batches(1, STEPS), start=1):
            (scale * model(**batch)["loss"]).backward()
            rankdyna.update_importance()
            rankdyna.optimizer.step()
            rankdyna.enforce_budget(step)
            rankdyna.optimizer.zero_grad()
        return [layer.rank for layer in rankdyna.layers]

    assert ranks(1.0) == ranks(1024.0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_change_no_score(bad: float) -> None:
    model, rankdyna = start(CONFIG, adamw)
    run(model, rankdyna, 1, 2)
    before = [layer.importance.clone() for layer in rankdyna.layers]
    model(**make_batches(1, 1)[0])["loss"].backward()
    model.classifier.bias.grad[0] = bad
    rankdyna.update_importance()
    for importance, layer in zip(before, rankdyna.layers, strict=True):
        assert torch.equal(importance, layer.importance)


def test_the_local_scope_gives_each_matrix_the_same_ratio() -> None:
    model, rankdyna = start(
        RankDynaConfig(rank_ratio=0.5, rank_scope="local", rank_warmup_steps=0.1, rank_cooldown_steps=0.4), adamw
    )
    run(model, rankdyna)
    assert [layer.rank for layer in rankdyna.layers] == [-(-layer.full_rank // 2) for layer in rankdyna.layers]


@pytest.mark.parametrize("score", ["first_order", "second_order", "fisher"])
def test_every_score_meets_the_budget(score: str) -> None:
    model, rankdyna = start(
        RankDynaConfig(rank_ratio=0.2, importance_score=score, rank_warmup_steps=0.1, rank_cooldown_steps=0.4), adamw
    )
    run(model, rankdyna)
    assert rankdyna.remaining_groups == 15


def test_wrong_use() -> None:
    dense = build_dense(0)
    with pytest.raises(ValueError, match="has no singular groups"):
        RankDyna(dense, CONFIG, adamw(dense), STEPS)
    before = adamw(dense)
    model = inject_singular_groups(dense, CONFIG)
    with pytest.raises(ValueError, match=r"does not hold 24 factors of the model \(blocks\.0\.up\.u, "):
        RankDyna(model, CONFIG, before, STEPS)
    with pytest.raises(ValueError, match="The rank budget has no step to fall in"):
        RankDyna(model, RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=20, rank_cooldown_steps=10), adamw(model), 30)
    for layer in model.modules():
        if isinstance(layer, SingularGroupLinear):
            layer.set_remaining(torch.arange(layer.width) < 1)
    compacted = compact(copy.deepcopy(model))
    with pytest.raises(ValueError, match="has no singular groups"):
        RankDyna(compacted, CONFIG, adamw(compacted), STEPS)


def test_a_budget_never_rises() -> None:
    _, rankdyna = start(RankDynaConfig(param_ratio=0.3, rank_warmup_steps=0.1, rank_cooldown_steps=0.4), adamw)
    budgets = [rankdyna.budget(step) for step in range(STEPS + 1)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(budgets))
    assert budgets[0] == rankdyna.remaining_parameters == 1028


def layers_of(model: nn.Module) -> list[SingularGroupLinear]:
    return [layer for layer in model.modules() if isinstance(layer, SingularGroupLinear)]


def test_finish_enforces_the_budget_between_two_updates() -> None:
    model, rankdyna = start(
        RankDynaConfig(rank_ratio=0.2, rank_update_interval=10, rank_warmup_steps=0.1, rank_cooldown_steps=0.4), adamw
    )
    run(model, rankdyna, last=13)
    assert rankdyna.remaining_groups == rankdyna.budget(10) > rankdyna.budget(13)
    rankdyna.finish(13)
    assert rank_report(model)["rank"].sum() == rankdyna.budget(13)


def test_gradients_that_are_not_finite_remove_nothing_until_a_later_step() -> None:
    model, rankdyna = start(CONFIG, adamw)
    run(model, rankdyna, last=10)
    before = rankdyna.remaining_groups
    rankdyna.layers[0].u.grad = torch.full_like(rankdyna.layers[0].u, math.inf)
    rankdyna.update_importance()
    rankdyna.enforce_budget(11)
    assert rankdyna.remaining_groups == before > rankdyna.budget(11)
    rankdyna.layers[0].u.grad = None
    run(model, rankdyna, 12, 12)
    assert rankdyna.remaining_groups == rankdyna.budget(12)


@pytest.mark.parametrize("optimizer_of", [adamw, momentum])
def test_the_optimizer_goes_on_with_p_and_q(optimizer_of: OptimizerOf) -> None:
    model, rankdyna = start(CONFIG, optimizer_of)
    run(model, rankdyna)
    rankdyna.finish(STEPS)
    held = {id(parameter) for group in rankdyna.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in held for parameter in rankdyna.optimizer.state)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(**make_batches(1, 1)[0])["loss"].backward()
    rankdyna.optimizer.step()
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any(name.endswith(".p.weight") for name in changed) and any(name.endswith(".q.weight") for name in changed)


def test_a_compiled_model_is_cut_only_at_the_final_budget() -> None:
    model = inject_singular_groups(build_dense(0), CONFIG)
    rankdyna = RankDyna(model, CONFIG, adamw(model), STEPS, compiled=True)
    for step in range(1, STEPS + 1):
        run(model, rankdyna, step, step)
        final = step >= rankdyna.schedule.final_step
        widths = [max(layer.rank, 2) if final else layer.full_rank for layer in rankdyna.layers]
        assert [layer.width for layer in rankdyna.layers] == widths


def test_compact_says_which_budget_an_interrupted_loop_has_reached(caplog: pytest.LogCaptureFixture) -> None:
    for ratio, unit in (({"rank_ratio": 0.2}, "singular groups"), ({"param_ratio": 0.2}, "parameters")):
        model, rankdyna = start(RankDynaConfig(**ratio, rank_warmup_steps=0.1, rank_cooldown_steps=0.4), adamw)
        run(model, rankdyna, last=9)
        compact(model)
        said = (
            f"stopped at step 9, before .* step 18: .* {rankdyna.budget(9)} {unit} \\(final: {rankdyna.budget(18)}\\)"
        )
        assert re.search(said, caplog.text)
        caplog.clear()
        model, rankdyna = start(RankDynaConfig(**ratio, rank_warmup_steps=0.1, rank_cooldown_steps=0.4), adamw)
        run(model, rankdyna, last=18)
        compact(model)
        assert not caplog.text


def test_finish_frees_the_factors_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model, the optimizer with its state, and this object all let go of a layer before the next is compacted."""
    model, rankdyna = start(CONFIG, adamw)
    run(model, rankdyna)
    old = [weakref.ref(factor) for layer in rankdyna.layers for factor in layer.factors().values()]
    old += [weakref.ref(rankdyna.optimizer.state[factor()]["exp_avg"]) for factor in old]
    layers = len(rankdyna.layers)
    to_factors = SingularGroupLinear.to_factors
    surplus: list[int] = []

    def watched(layer: SingularGroupLinear, *args: torch.dtype) -> tuple[Tensor, Tensor]:
        waiting = sum(isinstance(module, SingularGroupLinear) for module in model.modules())
        surplus.append(sum(reference() is not None for reference in old) - 6 * waiting)
        return to_factors(layer, *args)

    monkeypatch.setattr(SingularGroupLinear, "to_factors", watched)
    rankdyna.finish(STEPS)
    assert surplus == [0] * layers
    assert not any(reference() is not None for reference in old)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("last", [STEPS, 9])
def test_ranks_end_at_a_multiple_within_the_budget(scope: str, last: int) -> None:
    config = RankDynaConfig(
        rank_ratio=0.5, rank_multiple_of=4, rank_scope=scope, rank_warmup_steps=0.1, rank_cooldown_steps=0.4
    )
    model, rankdyna = start(config, adamw)
    run(model, rankdyna, last=last)
    assert rankdyna.meets_final_budget == (last == STEPS)
    rankdyna.finish(last)
    ranks = rank_report(model)["rank"]
    assert (ranks % 4 == 0).all() and 0 < ranks.sum() <= rankdyna.budget(last)
    assert ranks.sum() > rankdyna.budget(last) - 4 * (1 if scope == "global" else len(ranks))
