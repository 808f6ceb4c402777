import pytest
import torch
from torch import Tensor

from rankdyna_trainer.factorization import factorize

SHAPES = [(40, 40), (25, 60), (60, 25), (1, 7), (7, 1), (1, 1)]


def relative_error(weight: Tensor) -> float:
    u, sigma, v = (factor.double() for factor in factorize(weight))
    return ((torch.einsum("k,ko,ki->oi", sigma, u, v) - weight.double()).norm() / weight.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_sum_up_to_the_weight(shape: tuple[int, int]) -> None:
    assert relative_error(torch.randn(shape)) < 1e-6
    assert relative_error(torch.randn(shape, dtype=torch.float64)) < 1e-13


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_are_orthonormal_and_the_largest_comes_first(shape: tuple[int, int]) -> None:
    u, sigma, v = factorize(torch.randn(shape))
    rank = min(shape)
    assert (u.shape, sigma.shape, v.shape) == ((rank, shape[0]), (rank,), (rank, shape[1]))
    assert torch.equal(sigma, sigma.sort(descending=True).values) and sigma[-1] > 0
    torch.testing.assert_close(u @ u.T, torch.eye(rank))
    torch.testing.assert_close(v @ v.T, torch.eye(rank))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_factors_have_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(30, 20).to(dtype)
    factors = factorize(weight)
    assert {factor.dtype for factor in factors} == {dtype}
    assert all(factor.is_contiguous() and not factor.requires_grad for factor in factors)
    assert relative_error(weight) < 10 * torch.finfo(dtype).eps


def test_a_transposed_weight_that_requires_gradients() -> None:
    weight = torch.nn.Parameter(torch.randn(20, 30)).t()
    assert relative_error(weight) < 1e-6
    assert not any(factor.requires_grad for factor in factorize(weight))


def test_float32_is_factorized_in_float64() -> None:
    """A float32 decomposition leaves an error of its own, many times that of rounding the factors."""
    weight = torch.randn(300, 300)
    u, sigma, v = torch.linalg.svd(weight.double())
    rounded = torch.einsum("k,ok,ki->oi", sigma.float().double(), u.float().double(), v.float().double())
    assert relative_error(weight) < 1.01 * ((rounded - weight).norm() / weight.double().norm()).item()


def test_rank_deficient_weight() -> None:
    weight = torch.randn(20, 3) @ torch.randn(3, 30)
    assert relative_error(weight) < 1e-6
    _, sigma, _ = factorize(weight)
    assert len(sigma) == 20
    assert sigma[2] > 1 and sigma[3:].max() < 1e-5


def test_zero_weight() -> None:
    u, sigma, v = factorize(torch.zeros(4, 6))
    assert not sigma.any()
    assert torch.isfinite(u).all() and torch.isfinite(v).all()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_very_small_and_very_large_weights(scale: float) -> None:
    assert relative_error(torch.randn(10, 15) * scale) < 1e-6
