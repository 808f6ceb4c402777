import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.method.budget import RankBudget
from rankdyna_trainer.method.schedule import RankBudgetSchedule

SCHEDULE = RankBudgetSchedule(warmup_steps=2, cooldown_steps=3, total_steps=10)
SHAPES = [(6, 4), (8, 8), (3, 9)]
shapes_with_ranks = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 20)).flatmap(
        lambda shape: st.tuples(st.just(shape), st.integers(0, min(shape)))
    ),
    min_size=1,
    max_size=5,
)


def budget(initial_ranks: list[int] | None = None, **choices: object) -> RankBudget:
    return RankBudget(RankDynaConfig(**choices), SCHEDULE, SHAPES, initial_ranks or [min(shape) for shape in SHAPES])


def test_groups_of_a_dense_model() -> None:
    by_rank = budget(rank_ratio=0.3)
    assert (by_rank.initial, by_rank.final) == (15, 5)
    falling = [5 + math.ceil(10 * (1 - Fraction(step - 2, 5)) ** 3) for step in range(2, 8)]
    assert [by_rank.at(step) for step in range(11)] == [15, 15, *falling, 5, 5, 5]


def test_local_rounds_each_matrix_up() -> None:
    local = budget(rank_ratio=0.3, rank_scope="local")
    assert local.final == math.ceil(0.3 * 4) + math.ceil(0.3 * 8) + math.ceil(0.3 * 3) == 6
    assert local.excess([2, 3, 1], 10) == []
    assert [(list(pool), most) for pool, most in local.excess([3, 3, 0], 10)] == [([0], 2)]


def test_a_matrix_costs_no_more_than_its_dense_form() -> None:
    by_parameters = budget(param_ratio=0.5)
    dense = 6 * 4 + 8 * 8 + 3 * 9
    assert (by_parameters.initial, by_parameters.final) == (dense, dense // 2)
    # All groups of the second matrix are its dense form of 64 numbers; three of the first and one of the last would
    # cost more than their dense forms, or 12.
    assert by_parameters.excess([0, 8, 0], 10) and by_parameters.excess([0, 3, 0], 10) == []


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("ratio", ["rank_ratio", "param_ratio"])
@given(data=shapes_with_ranks, part=st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]))
def test_laws(scope: str, ratio: str, data: list[tuple[tuple[int, int], int]], part: float) -> None:
    """It never rises, begins with what is there, and ends at the part of the dense model, or at what was there."""
    shapes, ranks = [shape for shape, _ in data], [rank for _, rank in data]
    config = RankDynaConfig(**{ratio: part}, rank_scope=scope)
    found = RankBudget(config, SCHEDULE, shapes, ranks)
    budgets = [found.at(step) for step in range(11)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == found.initial and budgets[-1] == budgets[7] == found.final
    if ratio == "rank_ratio":
        held, dense = [float(rank) for rank in ranks], [min(shape) for shape in shapes]
    else:
        held = [min(rank * sum(shape), math.prod(shape)) for shape, rank in data]
        dense = [math.prod(shape) for shape in shapes]
    assert found.initial == sum(held)
    if scope == "global":
        held, dense = [sum(held)], [sum(dense)]
    exact = [Fraction(str(part)) * whole for whole in dense]
    ends = [math.ceil(end) if ratio == "rank_ratio" else math.floor(end) for end in exact]
    assert found.final == sum(min(now, end) for now, end in zip(held, ends, strict=True))
    assert found.excess(ranks, 0) == []
