"""When a training loss has fallen and flattened."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from rankdyna_trainer.method.loss_plateau import WINDOWS, LossPlateau

STEPS = 10 * WINDOWS  # windows of 10 steps


def found(losses: list[float], total: int = STEPS, learnt: bool = False) -> int | None:
    """After how many steps the loss is flat."""
    plateau = LossPlateau(total, learnt)
    return next((step for step, loss in enumerate(losses, start=1) if plateau.add(loss)), None)


def test_a_loss_that_falls_and_flattens() -> None:
    """At first it only learns the mean of the labels, which is no task; then from 2 to 1 in steps 80 to 120."""
    trivial = [6.0] * 10 + [2.0] * 70
    falling = [2.0 - 0.025 * step for step in range(40)]
    step = found(trivial + falling + [1.0] * 280)
    assert step is not None and 120 <= step <= 160


def test_a_loss_that_only_learns_the_mean_of_the_labels_has_not_fallen() -> None:
    assert found([6.0] * 10 + [2.0] * 390) is None
    assert found([0.69] * 400) is None
    assert found([6.0] * 10 + [2.0, 1.9, 2.1, 2.0] * 97) is None


def test_a_loss_that_is_still_falling_is_not_flat() -> None:
    steady = [2.0 - 0.004 * step for step in range(200)]
    assert found(steady) is None
    step = found(steady + [1.2] * 200)
    assert step is not None and 200 < step <= 230


def test_where_the_task_was_learnt_before_the_loss_need_not_fall_but_be_flat() -> None:
    assert found([0.3] * 400, learnt=True) == 50
    assert found([0.3 + 0.1 * (-1) ** step for step in range(400)], learnt=True) == 50
    rising = [0.3 + 0.01 * step for step in range(400)]  # at a learning rate that first does harm
    assert found(rising, learnt=True) == 50
    # One that falls, as that of a language model on other text, is waited for: by a sixth in steps 10 to 110.
    adapting = [3.0] * 10 + [3.0 - 0.005 * step for step in range(100)] + [2.5] * 290
    step = found(adapting, learnt=True)
    assert step is not None and 110 < step <= 140
    assert found(adapting) is None


def test_short_runs() -> None:
    assert found([3.0, 3.0, 2.9, 1.0, 1.0, 1.0, 1.0], total=8) == 7
    assert found([1.0] * 8, total=8) is None


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.floats(0.1, 9.0), min_size=30, max_size=90),
    total=st.integers(1, 120),
    stop=st.integers(1, 90),
    learnt=st.booleans(),
)
def test_it_goes_on_from_its_state(losses: list[float], total: int, stop: int, learnt: bool) -> None:
    whole, first, second = LossPlateau(total, learnt), LossPlateau(total, learnt), LossPlateau(total)
    expected = [whole.add(loss) for loss in losses]
    got = [first.add(loss) for loss in losses[:stop]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert got + [second.add(loss) for loss in losses[stop:]] == expected


@settings(max_examples=60, deadline=None)
@given(losses=st.lists(st.floats(0.1, 9.0), min_size=5, max_size=90), scale=st.sampled_from([0.5, 2.0, 64.0]))
def test_the_unit_of_the_loss_does_not_matter(losses: list[float], scale: float) -> None:
    assert found(losses, total=40) == found([loss * scale for loss in losses], total=40)
