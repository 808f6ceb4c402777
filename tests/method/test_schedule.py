import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference_parameters

from rankdyna_trainer.method.schedule import RankBudgetSchedule, final_parameter_budget, final_rank_budget

STEPS = st.integers(0, 60)


@st.composite
def schedules(draw: st.DrawFn) -> RankBudgetSchedule:
    warmup, cooldown, adjusting = draw(STEPS), draw(STEPS), draw(st.integers(1, 60))
    return RankBudgetSchedule(warmup, cooldown, warmup + adjusting + cooldown)


@st.composite
def budgets(draw: st.DrawFn) -> tuple[int, int]:
    initial = draw(st.integers(0, 10**10))
    return initial, draw(st.integers(0, initial))


@settings(max_examples=100, deadline=None)
@given(schedule=schedules(), limits=budgets())
def test_follows_the_corrected_equation_and_never_rises(schedule: RankBudgetSchedule, limits: tuple[int, int]) -> None:
    steps = range(schedule.total_steps + 1)
    falling = [schedule.budget(step, *limits) for step in steps]
    parameters = (*limits, schedule.warmup_steps, schedule.cooldown_steps, schedule.total_steps)
    assert falling == [reference.R(step, *parameters) for step in steps]
    assert falling == sorted(falling, reverse=True)


@settings(max_examples=100, deadline=None)
@given(schedule=schedules(), limits=budgets())
def test_whole_budget_until_the_warmup_ends_and_the_final_one_in_the_cooldown(
    schedule: RankBudgetSchedule, limits: tuple[int, int]
) -> None:
    initial, final = limits
    last = schedule.total_steps - schedule.cooldown_steps
    assert schedule.final_step == last
    assert {schedule.budget(step, *limits) for step in range(schedule.warmup_steps + 1)} == {initial}
    assert {schedule.budget(step, *limits) for step in range(last, schedule.total_steps + 5)} == {final}
    if initial - final >= schedule.adjusting_steps**3:
        assert schedule.budget(schedule.warmup_steps + 1, *limits) < initial
        assert schedule.budget(last - 1, *limits) > final


def test_budgets_worked_out_by_hand() -> None:
    schedule = RankBudgetSchedule(warmup_steps=2, cooldown_steps=4, total_steps=10)
    # 2 + ceil(8 * 27/64), 2 + ceil(8 * 8/64), 2 + ceil(8 * 1/64) between both ends
    assert [schedule.budget(step, 10, 2) for step in range(11)] == [10, 10, 10, 6, 3, 3, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("warmup", "cooldown", "total", "steps"),
    [
        (5, 3, 20, (5, 3)),
        (5.0, 3.0, 20, (5, 3)),
        (0, 0, 1, (0, 0)),
        (0.1, 0.4, 100, (10, 40)),
        (0.1, 0.4, 25, (3, 10)),  # a part of a step is a step
        (0.05, 0.6, 4, (1, 2)),  # which would leave none between
        (0.07, 0, 100, (7, 0)),  # 0.07 * 100 > 7 in binary
        (0, 0.28, 25, (0, 7)),  # 0.28 * 25 > 7 in binary
        (4, 0.5, 12, (4, 6)),
        (1, 0.999, 2000, (1, 1998)),
    ],
)
def test_steps_and_parts_of_all_steps(warmup: float, cooldown: float, total: int, steps: tuple[int, int]) -> None:
    schedule = RankBudgetSchedule.from_parts(warmup, cooldown, total)
    assert (schedule.warmup_steps, schedule.cooldown_steps, schedule.total_steps) == (*steps, total)
    assert schedule.adjusting_steps == total - sum(steps)


@pytest.mark.parametrize(
    ("warmup", "cooldown", "total", "message"),
    [
        (0.5, 0.5, 10, "no step to fall in: 5 warm-up and 5 cool-down steps of 10 in all"),
        (500, 2500, 2880, "500 warm-up and 2500 cool-down steps of 2880 in all.*Decrease rank_warmup_steps or"),
        (0.1, 0.4, 2, "1 warm-up and 1 cool-down steps of 2"),
        (0, 0, 0, "of 0 in all"),
    ],
)
def test_no_step_to_adjust_in(warmup: float, cooldown: float, total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankBudgetSchedule.from_parts(warmup, cooldown, total)


@settings(max_examples=200, deadline=None)
@given(thousandths=st.integers(1, 1000), initial=st.integers(0, 10**10))
def test_final_budgets(thousandths: int, initial: int) -> None:
    ratio = thousandths / 1000
    assert final_rank_budget(ratio, initial) == reference.final_budget(ratio, initial)
    assert final_rank_budget(ratio, initial) == -(-initial * thousandths // 1000)
    assert final_parameter_budget(ratio, initial) == reference_parameters.final_budget(ratio, initial)
    assert final_parameter_budget(ratio, initial) == initial * thousandths // 1000


def test_final_budgets_are_exact_for_decimal_ratios() -> None:
    assert final_rank_budget(0.07, 100) == 7
    assert final_rank_budget(0.28, 25) == 7
    assert final_parameter_budget(0.29, 100) == 29
    assert final_rank_budget(1e-9, 100) == 1
    assert final_parameter_budget(1e-9, 100) == 0
    assert final_rank_budget(1, 100) == final_parameter_budget(1.0, 100) == 100


@pytest.mark.parametrize(("adjusting", "interval"), [(1, 1), (31, 1), (32, 2), (150, 9), (176, 10), (10_000, 10)])
def test_removals_are_seldom_in_long_runs_and_often_enough_in_short_ones(adjusting: int, interval: int) -> None:
    assert RankBudgetSchedule(5, 7, adjusting + 12).update_interval == interval
