from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankdyna_trainer import RankDynaConfig, inject_singular_groups
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_gives_the_same_factors_without_computing_them(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(12, 8).to(dtype)
    first = factorize(weight, tmp_path / "cache")
    monkeypatch.setattr(torch.linalg, "svd", None)
    for one, other in zip(first, factorize(weight, tmp_path / "cache"), strict=True):
        assert one.dtype == dtype and torch.equal(one, other)
    with pytest.raises(TypeError):
        factorize(weight + 1, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "other tensors"])
def test_a_cache_file_that_cannot_be_used_is_replaced(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = torch.randn(12, 8)
    expected = factorize(weight, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[:-20])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other tensors":
        save_file({"weight": torch.zeros(2)}, file)
    else:
        u, sigma, v = factorize(torch.randn(12, 8))
        save_file({"u": u, "sigma": sigma, "v": v}, file)
    for one, other in zip(expected, factorize(weight, tmp_path), strict=True):
        assert torch.equal(one, other)
    assert "made anew" in caplog.text
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [whole]


def test_injection_uses_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RankDynaConfig(rank_ratio=0.5, factorization_cache=str(tmp_path))
    one, other = (nn.Sequential(*(nn.Sequential(nn.Linear(6, 4)) for _ in range(2))) for _ in range(2))
    other.load_state_dict(one.state_dict())
    inject_singular_groups(one, config)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(torch.linalg, "svd", None)
    inject_singular_groups(other, config)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
