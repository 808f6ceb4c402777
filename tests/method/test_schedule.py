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
    steps, (initial, final) = range(schedule.total_steps + 1), limits
    falling = [schedule.budget(step, initial, [final]) for step in steps]
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
    assert {schedule.budget(step, initial, [final]) for step in range(schedule.warmup_steps + 1)} == {initial}
    assert {schedule.budget(step, initial, [final]) for step in range(last, schedule.total_steps + 5)} == {final}
    if initial - final >= schedule.adjusting_steps**3:
        assert schedule.budget(schedule.warmup_steps + 1, initial, [final]) < initial
        assert schedule.budget(last - 1, initial, [final]) > final


def test_budgets_worked_out_by_hand() -> None:
    schedule = RankBudgetSchedule(warmup_steps=2, cooldown_steps=4, total_steps=10)
    # 2 + ceil(8 * 27/64), 2 + ceil(8 * 8/64), 2 + ceil(8 * 1/64) between both ends
    assert [schedule.budget(step, 10, [2]) for step in range(11)] == [10, 10, 10, 6, 3, 3, 2, 2, 2, 2, 2]


@st.composite
def runs_of_several_sizes(draw: st.DrawFn) -> tuple[RankBudgetSchedule, int, list[int]]:
    finals = sorted(draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True)), reverse=True)
    warmup, cooldown, adjusting = draw(STEPS), draw(STEPS), draw(st.integers(len(finals), 90))
    schedule = RankBudgetSchedule(warmup, cooldown, warmup + adjusting + cooldown, len(finals))
    for _ in finals[1:]:  # each station but the last may be left before its time
        if draw(st.booleans()):
            number = draw(st.integers(len(schedule.left_early), len(finals) - 2))
            station = schedule.stations[number]
            schedule = schedule.leave_early(draw(st.integers(station.reached, station.left)))
        if len(schedule.left_early) == len(finals) - 1:
            break
    return schedule, draw(st.integers(finals[0], 10**7)), finals


@settings(max_examples=200, deadline=None)
@given(runs_of_several_sizes())
def test_each_size_is_fallen_to_as_a_run_of_its_own_and_kept_until_it_is_left(
    run: tuple[RankBudgetSchedule, int, list[int]],
) -> None:
    schedule, initial, finals = run
    budgets = [schedule.budget(step, initial, finals) for step in range(schedule.total_steps + 1)]
    assert budgets == sorted(budgets, reverse=True)
    before, begin = initial, schedule.warmup_steps
    for number, (station, final) in enumerate(zip(schedule.stations, finals, strict=True)):
        assert station.begin == begin < station.reached <= station.left
        alone = RankBudgetSchedule(station.begin, station.left - station.reached, station.left)
        for step in range(station.begin, station.left + 1):
            assert budgets[step] == alone.budget(step, before, [final])
        assert {schedule.station_at(step) for step in range(station.reached, station.left + 1)} <= {number - 1, number}
        assert schedule.station_at(station.left) == number
        before, begin = final, station.left
    assert begin == schedule.total_steps


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
