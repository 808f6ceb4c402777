"""The decomposition that a GPU takes, tried on the CPU: against LAPACK's singular values, and against the matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdyna_trainer.layers import decomposition
from rankdyna_trainer.layers.decomposition import singular_groups


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition, "_by_svd", decomposition._by_eigenvalues)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 24), st.integers(1, 24), st.floats(0, 5), st.integers(0, 1000))
def test_groups_by_eigenvalues_are_singular(rows: int, columns: int, decades: float, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tall = (matrix * torch.logspace(0, -decades, columns, dtype=torch.float64)) if columns <= rows else matrix.t()
    u, sigma, v = decomposition._by_eigenvalues(tall)
    torch.testing.assert_close(u.t() * sigma @ v, tall, rtol=0, atol=1e-13 * float(tall.abs().max()) * len(tall))
    torch.testing.assert_close(sigma, torch.linalg.svdvals(tall), rtol=1e-6, atol=0)
    for vectors in (u, v):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones_like(sigma))
        torch.testing.assert_close(
            vectors @ vectors.t(), torch.eye(len(sigma), dtype=torch.float64), rtol=0, atol=1e-2
        )
    torch.testing.assert_close(v @ v.t(), torch.eye(len(sigma), dtype=torch.float64))


@pytest.mark.parametrize("matrix", [torch.zeros(6, 4), torch.ones(4, 6), torch.eye(5)[:, :3] @ torch.randn(3, 4)])
def test_matrix_of_lower_rank_is_decomposed_as_on_a_cpu(matrix: torch.Tensor) -> None:
    tall = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.t().double()
    for found, expected in zip(decomposition._by_eigenvalues(tall), decomposition._by_svd(tall), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_groups_by_eigenvalues_have_the_shapes_of_a_weight(shape: tuple[int, int], as_on_a_gpu: None) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    u, sigma, v = singular_groups(matrix)
    assert (u.shape, sigma.shape, v.shape) == ((min(shape), shape[0]), (min(shape),), (min(shape), shape[1]))
    torch.testing.assert_close(u.t() * sigma @ v, matrix)
