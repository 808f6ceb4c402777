"""The losses of a student beside its teacher, against their definitions and the laws that they obey."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from rankdyna_trainer.method.distillation import Target, hidden_loss, logits_loss

TARGETS: list[Target] = ["classes", "labels", "numbers"]
temperatures = st.floats(0.25, 8.0)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def definition(student: Tensor, teacher: Tensor, temperature: float, target: Target) -> Tensor:
    """Of rows that all count, in float64."""
    student, teacher = student.double(), teacher.double()
    if target == "numbers":
        return (student - teacher).square().mean()
    made = Categorical if target == "classes" else Bernoulli
    soft, softened = (made(logits=logits / temperature) for logits in (teacher, student))
    return temperature**2 * kl_divergence(soft, softened).mean()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 7), (6, 1)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_definition(target: Target, shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = 3 * drawn(1, *shape), 3 * drawn(2, *shape)
    loss = logits_loss(student, teacher, temperature, torch.ones(shape[:-1], dtype=torch.bool), target)
    expected = definition(student, teacher, temperature, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


def test_two_classes_by_hand() -> None:
    """The teacher says 3 : 1, the student 1 : 1."""
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    all_of_them = torch.tensor([True])
    assert logits_loss(student, teacher, 1.0, all_of_them, "classes").item() == pytest.approx(expected, rel=1e-5)
    # At temperature 2 logits that are twice as large say the same.
    assert logits_loss(student, 2 * teacher, 2.0, all_of_them, "classes").item() == pytest.approx(4 * expected)


def test_the_square_of_the_temperature_keeps_the_size_of_gradients() -> None:
    """At a high temperature the gradient is the difference of the centred logits over the number of classes."""
    student, teacher = drawn(1, 4, 5).requires_grad_(), drawn(2, 4, 5)
    logits_loss(student, teacher, 1e3, torch.ones(4, dtype=torch.bool), "classes").backward()
    difference = (student - teacher).detach()
    expected = (difference - difference.mean(dim=1, keepdim=True)) / 5 / 4
    torch.testing.assert_close(student.grad, expected, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_that_do_not_count_change_nothing(target: Target) -> None:
    student, teacher = drawn(1, 3, 6, 4), drawn(2, 3, 6, 4)
    valid = torch.arange(6) < torch.tensor([2, 6, 0])[:, None]
    loss = logits_loss(student, teacher, 2.0, valid, target)
    torch.testing.assert_close(loss.double(), definition(student[valid], teacher[valid], 2.0, target))
    student[~valid] = torch.nan
    assert logits_loss(student, teacher, 2.0, valid, target) == loss


@pytest.mark.parametrize("target", TARGETS)
def test_no_row_that_counts_is_no_loss(target: Target) -> None:
    student = drawn(1, 3, 4).requires_grad_()
    loss = logits_loss(student, drawn(2, 3, 4), 2.0, torch.zeros(3, dtype=torch.bool), target)
    loss.backward()
    assert loss == 0 and not student.grad.any()


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 6), temperatures, st.sampled_from(TARGETS))
def test_zero_if_equal_and_never_negative(
    seed: int, rows: int, classes: int, temperature: float, target: Target
) -> None:
    student, teacher = 4 * drawn(seed, rows, classes), 4 * drawn(seed + 1, rows, classes)
    valid = torch.ones(rows, dtype=torch.bool)
    rounding = 1e-5 * temperature**2
    assert logits_loss(student, teacher, temperature, valid, target) >= -rounding
    assert abs(logits_loss(teacher, teacher, temperature, valid, target)) <= rounding
    equal = student.clone().requires_grad_()
    logits_loss(equal, student, temperature, valid, target).backward()
    assert equal.grad.abs().max() <= 1e-5 * temperature


@given(st.integers(0, 1000), st.integers(2, 6), st.floats(1.0, 8.0))
def test_above_zero_where_they_differ(seed: int, classes: int, temperature: float) -> None:
    teacher = drawn(seed, 1, classes)
    student = teacher.clone()
    student[0, 0] += 1.0
    for target in TARGETS:
        assert logits_loss(student, teacher, temperature, torch.tensor([True]), target) > 1e-4


@given(st.integers(0, 1000), st.floats(-5, 5))
def test_classes_do_not_depend_on_what_all_logits_have_in_common(seed: int, shift: float) -> None:
    student, teacher, valid = drawn(seed, 3, 4), drawn(seed + 1, 3, 4), torch.ones(3, dtype=torch.bool)
    loss = logits_loss(student, teacher, 2.0, valid, "classes")
    torch.testing.assert_close(
        logits_loss(student + shift, teacher, 2.0, valid, "classes"), loss, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = drawn(1, 8, 100).to(dtype), drawn(2, 8, 100).to(dtype)
    loss = logits_loss(student, teacher, 2.0, torch.ones(8, dtype=torch.bool), "classes")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), definition(student, teacher, 2.0, "classes"), rtol=1e-5, atol=0)
    hidden = hidden_loss(200 * student, 200 * teacher, None)  # of which the sum of squares overflows float16
    expected = (200 * student - 200 * teacher).double().square().sum() / (200 * teacher).double().square().sum()
    torch.testing.assert_close(hidden.double(), expected, rtol=1e-2, atol=0)


def test_hidden_states_are_relative_to_the_teacher() -> None:
    teacher = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    student = torch.tensor([[[3.0, 0.0], [3.0, 5.0]]])
    assert hidden_loss(student, teacher, None).item() == pytest.approx((16 + 9) / 50)
    assert hidden_loss(student, teacher, torch.tensor([[True, False]])).item() == pytest.approx(16 / 25)
    assert hidden_loss(10 * student, 10 * teacher, None).item() == pytest.approx(0.5)
    assert hidden_loss(torch.zeros_like(teacher), teacher, None) == 1


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 5))
def test_hidden_states_are_zero_if_equal_and_never_negative(seed: int, tokens: int, features: int) -> None:
    student, teacher = drawn(seed, 2, tokens, features), drawn(seed + 1, 2, tokens, features)
    assert hidden_loss(student, teacher, None) > 0
    assert hidden_loss(teacher, teacher, None) == 0


def test_hidden_states_of_zeros_are_no_division_by_zero() -> None:
    assert hidden_loss(torch.zeros(2, 3), torch.zeros(2, 3), None) == 0
    none = torch.zeros(2, dtype=torch.bool)
    assert hidden_loss(torch.ones(2, 3), torch.ones(2, 3), none) == 0


def test_padding_with_nan_is_left_out_of_hidden_states() -> None:
    student, teacher = drawn(1, 2, 3, 4), drawn(2, 2, 3, 4)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    expected = (student[valid] - teacher[valid]).square().sum() / teacher[valid].square().sum()
    student[~valid] = torch.nan
    torch.testing.assert_close(hidden_loss(student, teacher, valid), expected)
