from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rankdyna_trainer import LowRankLinear, RankDynaConfig, rank_report
from rankdyna_trainer.baselines import svd

WIDE, SQUARE, TALL = (12, 40), (30, 30), (40, 12)


def blocks(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A stack of layers with these weights `(out, in)`."""
    return nn.Sequential(nn.ModuleList(nn.Sequential(nn.Linear(i, o)) for o, i in shapes)).to(dtype)


@pytest.mark.parametrize("shape", [WIDE, SQUARE, TALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_singular_values_are_kept(shape: tuple[int, int], dtype: torch.dtype) -> None:
    model = blocks(shape, dtype=dtype)
    weight, bias = (tensor.detach().double().numpy() for tensor in model[0][0][0].parameters())
    assert svd(model, RankDynaConfig(rank_ratio=0.2)) is model
    layer = model[0][0][0]
    assert isinstance(layer, LowRankLinear)
    rank = -(-min(shape) // 5)
    u, sigma, vt = np.linalg.svd(weight, full_matrices=False)
    tolerance = 1e-6 if dtype is torch.float32 else 1e-12
    product = layer.p.weight.detach().double().numpy() @ layer.q.weight.detach().double().numpy()
    np.testing.assert_allclose(product, (u[:, :rank] * sigma[:rank]) @ vt[:rank], atol=tolerance)
    np.testing.assert_allclose(((weight - product) ** 2).sum(), (sigma[rank:] ** 2).sum(), rtol=1e-5)
    # Eq. 5: P is U S, Q is V^T.
    np.testing.assert_allclose(np.linalg.norm(layer.p.weight.detach().double(), axis=0), sigma[:rank], rtol=1e-5)
    np.testing.assert_allclose((layer.q.weight @ layer.q.weight.t()).detach(), np.eye(rank), atol=1e-6)
    assert np.array_equal(layer.bias.detach().double().numpy(), bias)


def test_half_precision_is_rounded_once() -> None:
    model = blocks(SQUARE, dtype=torch.bfloat16)
    weight = model[0][0][0].weight.detach().double()
    svd(model, RankDynaConfig(rank_ratio=0.3))
    layer = model[0][0][0]
    assert layer.p.weight.dtype == layer.q.weight.dtype == torch.bfloat16
    u, sigma, v = torch.linalg.svd(weight)
    best = (u[:, :9] * sigma[:9]) @ v[:9]
    product = layer.p.weight.detach().double() @ layer.q.weight.detach().double()
    assert (product - best).norm() < 2 * torch.finfo(torch.bfloat16).eps * best.norm()


def test_each_matrix_is_brought_to_the_same_ratio() -> None:
    report = rank_report(svd(blocks(WIDE, SQUARE, TALL), RankDynaConfig(rank_ratio=0.25)))
    assert list(report["rank"]) == [3, 8, 3]


def test_cache_of_decompositions_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RankDynaConfig(rank_ratio=0.25, factorization_cache=str(tmp_path))
    torch.manual_seed(1)
    first = svd(blocks(WIDE, SQUARE), config)
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("decomposed again"))
    torch.manual_seed(1)
    second = svd(blocks(WIDE, SQUARE), config)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
