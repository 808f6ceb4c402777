"""Groups in the metric of the inputs: the same matrix, and the best truncation for what the layer computes."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rankdyna_trainer.layers import whitening
from rankdyna_trainer.layers.factorization import factorize
from rankdyna_trainer.layers.whitening import EPSILON, metric_root, metric_roots, observed_roots, whitened_factors

sizes = st.integers(1, 12)


def inputs(seed: int, rows: int, features: int) -> Tensor:
    """Some directions are longer than others, and all lean towards each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return torch.randn(rows, features, generator=generator, dtype=torch.float64) @ mixing


def metric(moment: Tensor) -> Tensor:
    return moment / moment.diagonal().mean() + EPSILON * torch.eye(len(moment), dtype=moment.dtype)


@given(sizes, sizes, st.integers(1, 30), st.integers(0, 100))
def test_the_groups_add_up_to_the_weight(out: int, into: int, rows: int, seed: int) -> None:
    x = inputs(seed, rows, into)
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    root = metric_root(x.T @ x)
    assert root is not None
    u, sigma, v = whitened_factors(None, weight, root)
    assert u.shape == (min(out, into), out) and v.shape == (min(out, into), into)
    torch.testing.assert_close((u.T * sigma) @ v, weight, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(len(v), dtype=torch.float64))
    torch.testing.assert_close(u @ u.T, torch.eye(len(u), dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(("out", "into"), [(12, 16), (16, 12), (16, 40), (40, 16)])
def test_groups_of_a_weight_without_full_rank_are_finite(out: int, into: int, rank: int, dtype: torch.dtype) -> None:
    # The singular values of equal rows fall to 1e-200 and below, whose squares are zero.
    weight = torch.cat([torch.full((rank // 2, into), 0.3), torch.full((out - rank // 2, into), 0.1 * (rank > 0))])
    x = inputs(0, 30, into)
    root = metric_root(x.T @ x)
    assert root is not None
    for left in (None, torch.eye(out)):
        u, sigma, v = whitened_factors(left, weight.to(dtype), root)
        assert all(factor.isfinite().all() for factor in (u, sigma, v))
        torch.testing.assert_close(v.double().norm(dim=1), torch.ones(len(v)).double(), atol=1e-2, rtol=0)
        torch.testing.assert_close((u.T * sigma) @ v, weight.to(dtype), atol=1e-2, rtol=0)


@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 100), st.data())
def test_no_other_groups_lose_less_of_the_outputs(out: int, into: int, seed: int, data: st.DataObject) -> None:
    x = inputs(seed, 3 * into, into)
    moment = x.T @ x
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rank = data.draw(st.integers(1, min(out, into) - 1))
    root = metric_root(moment)
    assert root is not None
    u, sigma, v = whitened_factors(None, weight, root)
    lost = weight - (u[:rank].T * sigma[:rank]) @ v[:rank]
    # The least that any matrix of this rank can lose, by another root than the one that is used.
    values, vectors = torch.linalg.eigh(metric(moment))
    symmetric = (vectors * values.sqrt()) @ vectors.T
    least = torch.linalg.svdvals(weight @ symmetric)[rank:].square().sum()
    torch.testing.assert_close((lost @ metric(moment) @ lost.T).trace(), least, atol=1e-9, rtol=1e-6)


def test_less_of_the_outputs_is_lost_than_by_svd() -> None:
    x, fresh = inputs(1, 800, 24).split(400)
    weight = torch.randn(16, 24, dtype=torch.float64)
    root = metric_root(x.T @ x)
    assert root is not None
    errors = []
    for u, sigma, v in (whitened_factors(None, weight, root), factorize(weight)):
        lost = weight - (u[:6].T * sigma[:6]) @ v[:6]
        errors.append((fresh @ lost.T).norm())
    assert errors[0] < 0.9 * errors[1]


def test_a_product_is_never_made() -> None:
    x = inputs(1, 50, 9)
    root = metric_root(x.T @ x)
    assert root is not None
    p, q = torch.randn(12, 4, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    u, sigma, v = whitened_factors(p, q, root)
    assert len(sigma) == 4
    torch.testing.assert_close((u.T * sigma) @ v, p @ q)
    whole_u, whole_sigma, _ = whitened_factors(None, p @ q, root)
    torch.testing.assert_close(sigma, whole_sigma[:4])
    torch.testing.assert_close((u * whole_u[:4]).sum(dim=1).abs(), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("moment", [torch.zeros(3, 3), torch.full((3, 3), torch.inf), torch.full((3, 3), torch.nan)])
def test_a_moment_that_tells_nothing_has_no_root(moment: Tensor) -> None:
    assert metric_root(moment) is None
    assert metric_roots({"a": moment, "b": torch.eye(3)}).keys() == {"b"}


def test_layers_that_nothing_is_known_of_are_named(caplog: pytest.LogCaptureFixture) -> None:
    layers = {name: nn.Linear(3, 3) for name in ("seen", "unseen", "infinite")}
    moments = {"seen": torch.eye(3), "infinite": torch.full((3, 3), torch.inf)}
    assert observed_roots(layers, lambda asked: {name: moments[name] for name in asked if name in moments}).keys() == {
        "seen"
    }
    assert "No input of 2 layers was seen, or it was not finite (unseen, ...)" in caplog.text
    caplog.clear()
    assert observed_roots(layers, lambda asked: dict.fromkeys(asked, torch.eye(3))).keys() == layers.keys()
    assert not caplog.text


def test_rounding_in_the_moment_is_survived() -> None:
    """One direction is a thousand times longer than the others, and float32 products leave it slightly negative."""
    moment = torch.diag(torch.tensor([1e6, 1.0, 1.0], dtype=torch.float64))
    moment[1, 2] = moment[2, 1] = -1e4
    assert torch.linalg.eigvalsh(metric(moment)).min() < 0
    root = metric_root(moment)
    assert root is not None and torch.isfinite(root).all()
    weight = torch.randn(4, 3, dtype=torch.float64)
    u, sigma, v = whitened_factors(None, weight, root)
    torch.testing.assert_close((u.T * sigma) @ v, weight)


def test_a_moment_is_gone_when_the_root_of_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = {str(number): torch.eye(4) for number in range(3)}
    moments["shared"] = moments["1"]
    alive, left = [weakref.ref(moments[name]) for name in "012"], []

    def counting(moment: Tensor) -> Tensor | None:
        left.append(sum(moment() is not None for moment in alive))
        return metric_root(moment)

    monkeypatch.setattr(whitening, "metric_root", counting)
    assert metric_roots(moments).keys() == {"0", "1", "2", "shared"}
    assert left == [3, 2, 1] and not moments


def test_roots_are_shared_by_layers_that_share_a_moment() -> None:
    moment = torch.eye(4)
    roots = metric_roots({"query": moment, "key": moment, "other": torch.eye(4)})
    assert roots["query"] is roots["key"] and roots["query"] is not roots["other"]
