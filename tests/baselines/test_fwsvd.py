import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.baselines import fwsvd
from rankdyna_trainer.baselines.fisher import fisher_information
from rankdyna_trainer.baselines.fwsvd import fwsvd_factors
from rankdyna_trainer.layers.dense import dense_weight
from rankdyna_trainer.layers.targets import find_targets

SHAPES = [(9, 30), (20, 20), (30, 9), (6, 1), (1, 6)]
Batch = dict[str, Tensor]


def product(factors: tuple[Tensor, Tensor]) -> NDArray[np.float64]:
    p, q = (factor.double().numpy() for factor in factors)
    return p @ q


def truncated(weight: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    u, sigma, vt = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def as_the_paper_does(weight: NDArray[np.float64], fisher: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    """`diag(sqrt(r))^-1 (U S V^T)` of `diag(sqrt(r)) W`."""
    roots = np.sqrt(fisher.sum(axis=1))[:, None]
    return truncated(roots * weight, rank) / roots


def row_error(weight: Tensor, fisher: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    difference = weight.double().numpy() - product(factors)
    return float((fisher.double().numpy().sum(axis=1, keepdims=True) * difference**2).sum())


def svd_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * sigma[:rank], v[:rank]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", [0, 0.3, 0.7, 1])
def test_svd_of_the_weighted_rows_with_the_weighting_undone(shape: tuple[int, int], part: float) -> None:
    weight, fisher = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64) ** 4
    rank = round(part * min(shape))
    p, q = fwsvd_factors(weight, fisher, rank)
    assert (p.shape, q.shape) == ((shape[0], rank), (rank, shape[1]))
    expected = as_the_paper_does(weight.numpy(), fisher.numpy(), rank)
    np.testing.assert_allclose(product((p, q)), expected, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_side_input_weights_the_columns(shape: tuple[int, int]) -> None:
    """The weight of the paper that introduced it, `X W`, is the transpose of that of `nn.Linear`."""
    weight, fisher = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64) ** 4
    rank = -(-min(shape) // 2)
    expected = as_the_paper_does(weight.T.numpy(), fisher.T.numpy(), rank).T
    np.testing.assert_allclose(product(fwsvd_factors(weight, fisher, rank, "input")), expected, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    out_features=st.integers(2, 24), in_features=st.integers(2, 24), part=st.floats(0, 1), seed=st.integers(0, 10**6)
)
def test_row_weighted_error_is_never_above_that_of_svd(
    out_features: int, in_features: int, part: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, dtype=torch.float64, generator=generator)
    fisher = torch.randn(out_features, in_features, dtype=torch.float64, generator=generator).mul(2).exp()
    rank = round(part * min(weight.shape))
    error = row_error(weight, fisher, fwsvd_factors(weight, fisher, rank))
    of_svd = row_error(weight, fisher, svd_factors(weight, rank))
    total = row_error(weight, fisher, svd_factors(weight, 0))
    assert error <= of_svd + 1e-12 * total
    if 0 < rank < min(weight.shape):
        assert error < of_svd * (1 - 1e-6)
        sigma = np.linalg.svd(np.sqrt(fisher.numpy().sum(axis=1))[:, None] * weight.numpy(), compute_uv=False)
        assert error == pytest.approx((sigma[rank:] ** 2).sum(), rel=1e-6)


def test_equal_importance_is_plain_svd() -> None:
    weight = torch.randn(12, 20, dtype=torch.float64)
    actual = product(fwsvd_factors(weight, torch.ones(12, 20), 5))
    np.testing.assert_allclose(actual, truncated(weight.numpy(), 5), atol=1e-9)


@pytest.mark.parametrize("side", ["output", "input"])
def test_no_fisher_information_is_plain_svd(side: str) -> None:
    weight = torch.randn(12, 20, dtype=torch.float64)
    actual = product(fwsvd_factors(weight, torch.zeros(12, 20), 5, side))
    np.testing.assert_allclose(actual, truncated(weight.numpy(), 5), atol=1e-9)


def test_rows_without_fisher_information_choose_among_what_the_others_leave() -> None:
    weight, fisher = torch.randn(12, 20, dtype=torch.float64), torch.zeros(12, 20)
    fisher[:3] = torch.rand(3, 20)
    actual = product(fwsvd_factors(weight, fisher, 5))
    exact = weight.numpy()
    np.testing.assert_allclose(actual[:3], exact[:3], atol=1e-5)  # three rows take three groups, and are exact
    basis = np.linalg.qr(exact[:3].T)[0]
    left = exact[3:] - exact[3:] @ basis @ basis.T
    np.testing.assert_allclose(((exact[3:] - actual[3:]) ** 2).sum(), ((left - truncated(left, 2)) ** 2).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20])
def test_size_of_the_fisher_information_does_not_matter(dtype: torch.dtype, scale: float) -> None:
    weight, fisher = torch.randn(12, 20).to(dtype), torch.rand(12, 20) + 0.1
    p, q = fwsvd_factors(weight, fisher * scale, 5)
    assert p.dtype == q.dtype == dtype and p.is_contiguous() and q.is_contiguous()
    expected = as_the_paper_does(weight.double().numpy(), fisher.double().numpy(), 5)
    tolerance = 4 * torch.finfo(dtype).eps if scale > 1e-38 else 1e-2
    assert np.linalg.norm(product((p, q)) - expected) < max(tolerance, 1e-6) * np.linalg.norm(expected)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("per_example", [True, False])
def test_layers_of_a_model(model: nn.Module, batches: list[Batch], side: str, per_example: bool) -> None:
    config = RankDynaConfig(rank_ratio=0.2)
    targets = find_targets(model, config)
    weights = {name: dense_weight(layer).detach().clone() for name, layer in targets.items()}
    biases = {name: layer.bias.detach().clone() for name, layer in targets.items()}
    fisher = fisher_information(model, targets, batches, per_example)
    assert fwsvd(model, config, batches, per_example=per_example, side=side) is model
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert layer.rank == 7
        expected = fwsvd_factors(weight, fisher[name], 7, side)
        assert torch.equal(layer.p.weight, expected[0]) and torch.equal(layer.q.weight, expected[1])
        assert torch.equal(layer.bias, biases[name])


def test_unknown_side(tiny_bert: nn.Module) -> None:
    with pytest.raises(ValueError, match="side must be one of output, input: got 'rows'"):
        fwsvd(tiny_bert, RankDynaConfig(rank_ratio=0.2), [], side="rows")
