import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rankdyna_trainer import RankDynaConfig, inject_singular_groups
from rankdyna_trainer.layers.factor_cache import FactorizationCache
from rankdyna_trainer.layers.factorization import factorize, factorize_layers, factorize_product

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


def stack(*shapes: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(*shape)) for shape in shapes))


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
def test_several_at_once_give_the_same_numbers(threads: int) -> None:
    """Large enough that torch would use its threads within one decomposition, and end at other last bits."""
    model = stack((200, 300), (300, 200), (250, 250))
    torch.set_num_threads(1)
    expected = {name: factorize(model.get_submodule(name).weight) for name in ("0.0", "1.0", "2.0")}
    torch.set_num_threads(threads)
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5))
    assert torch.get_num_threads() == threads
    for name, factors in expected.items():
        layer = model.get_submodule(name)
        for one, other in zip(factors, layer.factors().values(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_large_weights_are_decomposed_one_after_the_other(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankdyna_trainer.layers.factorization._BYTES_AT_ONCE", 64 * 600 * 2 - 1)
    svd = torch.linalg.svd
    used: list[int] = []

    def watched(*args: object, **kwargs: object) -> object:
        used.append(torch.get_num_threads())
        assert threading.current_thread() is threading.main_thread()
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    inject_singular_groups(stack((20, 30), (2, 3), (2, 3)), RankDynaConfig(rank_ratio=0.5))
    assert used == [threads] * 3


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_an_error_in_the_middle_leaves_the_threads_as_they_were(threads: int) -> None:
    model = stack(*[(8, 8)] * 6)
    with torch.no_grad():
        model[3][0].weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"The singular values of 3\.0 exceed"):
        inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_old_weights_are_freed_on_the_way(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a decomposition starts, of the layers before it nothing is left, but for those that run beside it."""
    model = stack(*[(40, 60)] * 12)
    old = [weakref.ref(block[0]) for block in model]
    svd = torch.linalg.svd
    surplus: list[int] = []

    def watched(*args: object, **kwargs: object) -> object:
        dense = sum(isinstance(block[0], nn.Linear) for block in model)
        surplus.append(sum(layer() is not None for layer in old) - dense)
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5))
    assert len(surplus) == 12 and max(surplus) <= (0 if threads == 1 else 1)
    assert not any(layer() for layer in old)


def test_processes_of_one_machine_start_at_different_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack(*[(3, 2)] * 10)
    layers = {str(i): block[0] for i, block in enumerate(model)}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    orders = []
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        ready = factorize_layers(layers, FactorizationCache(tmp_path))
        orders.append([next(ready)[0]])
        orders[-1] += [name for name, _ in ready]
    assert [order[0] for order in orders] == ["0", "2", "5", "7"]
    assert all(sorted(order) == sorted(layers) for order in orders)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_of_a_product_are_those_of_the_multiplied_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rank = (min(shape) + 1) // 2
    p, q = torch.randn(shape[0], rank, dtype=dtype), torch.randn(rank, shape[1], dtype=dtype)
    u, sigma, v = factorize_product(p, q)
    assert (u.shape, sigma.shape, v.shape) == ((rank, shape[0]), (rank,), (rank, shape[1]))
    assert u.dtype == sigma.dtype == v.dtype == dtype
    product = p.double() @ q.double()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert ((u.double().T * sigma.double()) @ v.double() - product).norm() < tolerance * product.norm()
    torch.testing.assert_close(sigma.double(), torch.linalg.svdvals(product)[:rank], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(u @ u.T, torch.eye(rank, dtype=dtype))
    torch.testing.assert_close(v @ v.T, torch.eye(rank, dtype=dtype))
