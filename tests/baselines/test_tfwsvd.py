import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.baselines import tfwsvd
from rankdyna_trainer.baselines.fisher import fisher_information
from rankdyna_trainer.baselines.fwsvd import fwsvd_factors
from rankdyna_trainer.baselines.tfwsvd import tfwsvd_factors, weighted_error
from rankdyna_trainer.layers.dense import dense_weight
from rankdyna_trainer.layers.targets import find_targets

SHAPES = [(16, 48), (30, 30), (48, 16)]
Batch = dict[str, Tensor]


def brute_force_error(weight: Tensor, fisher: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    p, q = (factor.tolist() for factor in factors)
    return sum(
        fisher[i, j].item() * (weight[i, j].item() - sum(p[i][k] * q[k][j] for k in range(len(q)))) ** 2
        for i in range(weight.shape[0])
        for j in range(weight.shape[1])
    )


def fwsvd_error(weight: Tensor, fisher: Tensor, rank: int) -> float:
    """Of the better side."""
    return min(
        weighted_error(weight, fisher, *fwsvd_factors(weight, fisher, rank, side)) for side in ("output", "input")
    )


def svd_error(weight: Tensor, fisher: Tensor, rank: int) -> float:
    return weighted_error(weight, fisher, *fwsvd_factors(weight, torch.ones_like(fisher), rank))


def uneven(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fisher information of very different sizes: of most numbers a small part of that of the largest."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).mul(2).exp()


def test_weighted_error_is_the_sum_over_all_numbers() -> None:
    weight, fisher, p, q = (torch.rand(shape) for shape in ((5, 7), (5, 7), (5, 2), (2, 7)))
    assert weighted_error(weight, fisher, p, q) == pytest.approx(brute_force_error(weight, fisher, (p, q)), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    out_features=st.integers(3, 24), in_features=st.integers(3, 24), part=st.floats(0, 1), seed=st.integers(0, 10**6)
)
def test_error_is_never_above_those_of_fwsvd_and_svd(
    out_features: int, in_features: int, part: float, seed: int
) -> None:
    shape = (out_features, in_features)
    weight, fisher = torch.randn(shape, generator=torch.Generator().manual_seed(seed)), uneven(shape, seed + 1)
    largest = (out_features * in_features) // (out_features + in_features)
    rank = round(part * largest)
    factors = tfwsvd_factors(weight, fisher, rank)
    error = brute_force_error(weight, fisher, factors)
    of_fwsvd = fwsvd_error(weight, fisher, rank)
    assert weighted_error(weight, fisher, *factors) <= of_fwsvd
    assert error <= svd_error(weight, fisher, rank) * (1 + 1e-9)
    if rank:
        assert error < 0.95 * of_fwsvd  # the Fisher information is far from rank 1


@pytest.mark.parametrize("shape", SHAPES)
def test_no_small_step_lowers_the_error(shape: tuple[int, int]) -> None:
    """At a minimum the gradient of the error by P and by Q is zero."""
    weight, fisher = torch.randn(shape, dtype=torch.float64), uneven(shape, 0, torch.float64)
    factors = [factor.requires_grad_() for factor in tfwsvd_factors(weight, fisher, 4)]
    start = [factor.requires_grad_() for factor in fwsvd_factors(weight, fisher, 4)]
    slopes = []
    for p, q in (start, factors):
        (fisher * (weight - p @ q) ** 2).sum().backward()
        slopes.append(torch.cat([p.grad.flatten(), q.grad.flatten()]).norm().item())
    assert slopes[1] < 0.05 * slopes[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_importance_of_rank_one_has_a_known_optimum(shape: tuple[int, int]) -> None:
    """With `F = r c^T` it is the SVD of `diag(sqrt(r)) W diag(sqrt(c))`, with the weighting undone on both sides."""
    weight = torch.randn(shape, dtype=torch.float64)
    rows, columns = (torch.rand(size, dtype=torch.float64) ** 2 + 0.01 for size in shape)
    weighted = rows.sqrt().unsqueeze(1) * weight * columns.sqrt()
    optimum = (torch.linalg.svdvals(weighted)[5:] ** 2).sum().item()
    fisher = rows.unsqueeze(1) * columns
    error = weighted_error(weight, fisher, *tfwsvd_factors(weight, fisher, 5))
    assert optimum * (1 - 1e-9) <= error < 1.01 * optimum
    assert fwsvd_error(weight, fisher, 5) > 1.02 * optimum


def test_missing_numbers_are_filled_in() -> None:
    """A weight of rank 2 is found from two thirds of its numbers: FWSVD cannot leave the others out."""
    weight = torch.randn(30, 2) @ torch.randn(2, 40)
    fisher = (torch.rand(30, 40) < 0.67).float()
    damaged = torch.where(fisher > 0, weight, 10 * torch.randn(30, 40))
    p, q = tfwsvd_factors(damaged, fisher, 2)
    assert (p @ q - weight).norm() < 0.01 * weight.norm()


def test_equal_importance_is_plain_svd() -> None:
    weight, fisher = torch.randn(12, 20), torch.full((12, 20), 3.0)
    p, q = tfwsvd_factors(weight, fisher, 5)
    assert weighted_error(weight, fisher, p, q) == pytest.approx(svd_error(weight, fisher, 5), rel=1e-6)


def test_no_fisher_information_is_plain_svd() -> None:
    weight, fisher = torch.randn(12, 20), torch.zeros(12, 20)
    p, q = tfwsvd_factors(weight, fisher, 5)
    u, sigma, v = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(p @ q, ((u[:, :5] * sigma[:5]) @ v[:5]).float())


def test_rows_and_columns_without_fisher_information() -> None:
    weight, fisher = torch.randn(20, 30), uneven((20, 30), 3)
    fisher[:15], fisher[:, 4] = 0, 0
    p, q = tfwsvd_factors(weight, fisher, 6)
    assert torch.isfinite(p).all() and torch.isfinite(q).all()
    assert weighted_error(weight, fisher, p, q) < 1e-8 * (fisher * weight.square()).sum()  # 5 rows fit into 6 groups


def test_weight_of_zeros() -> None:
    p, q = tfwsvd_factors(torch.zeros(8, 8), torch.rand(8, 8), 2)
    assert not (p @ q).any()


def test_weight_that_fits_into_the_rank_stays_what_it_is() -> None:
    weight, fisher = torch.randn(30, 3) @ torch.randn(3, 20), uneven((30, 20), 1)
    p, q = tfwsvd_factors(weight, fisher, 4)
    assert (p @ q - weight).norm() < 1e-5 * weight.norm()
    assert weighted_error(weight, fisher, p, q) <= fwsvd_error(weight, fisher, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_have_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight, fisher = torch.randn(20, 30).to(dtype), uneven((20, 30), 2)
    p, q = tfwsvd_factors(weight, fisher, 6)
    assert p.dtype == q.dtype == dtype
    assert weighted_error(weight, fisher, p, q) < 0.9 * fwsvd_error(weight, fisher, 6)


@pytest.mark.parametrize("size_of_weight", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("size_of_fisher", [1e-30, 1e-12, 1e15])
def test_sizes_do_not_matter(size_of_weight: float, size_of_fisher: float) -> None:
    weight, fisher = torch.randn(20, 30), uneven((20, 30), 4)
    expected = weighted_error(weight, fisher, *tfwsvd_factors(weight, fisher, 6))
    weight, fisher = weight * size_of_weight, fisher * size_of_fisher
    error = weighted_error(weight, fisher, *tfwsvd_factors(weight, fisher, 6))
    assert error / size_of_weight**2 / size_of_fisher == pytest.approx(expected, rel=1e-2)


def test_factors_have_the_form_of_singular_groups() -> None:
    """Eq. 5: P is U S, Q is V^T, the largest first, so that both are of a size to train on."""
    p, q = tfwsvd_factors(torch.randn(20, 30), uneven((20, 30), 5), 6)
    torch.testing.assert_close(q @ q.t(), torch.eye(6), atol=1e-5, rtol=0)
    sigma = p.norm(dim=0)
    torch.testing.assert_close(p.t() @ p, sigma.square().diag(), atol=1e-4, rtol=0)
    assert torch.equal(sigma, sigma.sort(descending=True).values)


def test_start_is_kept_if_nothing_better_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fisher = torch.randn(20, 30), uneven((20, 30), 6)
    module = sys.modules["rankdyna_trainer.baselines.tfwsvd"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "LEARNING_RATE", 1e6)
    assert weighted_error(weight, fisher, *tfwsvd_factors(weight, fisher, 6)) == fwsvd_error(weight, fisher, 6)


def test_descent_stops_when_it_makes_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["rankdyna_trainer.baselines.tfwsvd"]
    steps: list[int] = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (steps.append(1), step(self)))
    weight = torch.randn(20, 30)
    tfwsvd_factors(weight, torch.ones(20, 30), 6)  # where the start is the optimum
    assert len(steps) == 50
    steps.clear()
    monkeypatch.setattr(module, "LEAST_PROGRESS", -1.0)
    tfwsvd_factors(weight, uneven((20, 30), 7), 6)
    assert len(steps) == 400


@pytest.mark.parametrize("per_example", [True, False])
def test_layers_of_a_model(model: nn.Module, batches: list[Batch], per_example: bool) -> None:
    config = RankDynaConfig(rank_ratio=0.2)
    targets = find_targets(model, config)
    weights = {name: dense_weight(layer).detach().clone() for name, layer in targets.items()}
    fisher = fisher_information(model, targets, batches, per_example)
    assert tfwsvd(model, config, batches, per_example=per_example) is model
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert layer.rank == 7
        p, q = tfwsvd_factors(weight, fisher[name], 7)
        assert torch.equal(layer.p.weight, p) and torch.equal(layer.q.weight, q)
