import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rankdyna_trainer import LowRankLinear
from rankdyna_trainer.checkpoint import modeling_rankdyna


@pytest.mark.parametrize(("rank", "bias"), list(itertools.product([0, 1, 4], [True, False])))
def test_low_rank_linear_is_two_linear_layers(rank: int, bias: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = LowRankLinear(20, 6, rank, bias=bias)
    # At rank 0 of a class that is not quantized.
    assert type(layer.p) is type(layer.q)
    assert isinstance(layer.p, NonDynamicallyQuantizableLinear) == (rank == 0)
    assert (layer.q.in_features, layer.q.out_features, layer.q.bias) == (20, rank, None)
    assert (layer.p.in_features, layer.p.out_features) == (rank, 6)
    assert (layer.p.weight.shape, layer.q.weight.shape, layer.rank) == ((6, rank), (rank, 20), rank)
    assert layer.bias is layer.p.bias and (layer.bias is not None) == bias
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 20)
    weight = layer.p.weight @ layer.q.weight
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), F.linear(x, weight, layer.bias))
    torch.testing.assert_close(layer.to_dense_weight(), weight)


def test_low_rank_linear_takes_device_and_dtype() -> None:
    layer = LowRankLinear(20, 6, 3, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


def own_layer(bias: bool, dtype: torch.dtype) -> nn.Module:
    return LowRankLinear(5, 3, 0, bias=bias, dtype=dtype)


def self_contained_layer(bias: bool, dtype: torch.dtype) -> nn.Module:
    return modeling_rankdyna.LowRankLinear(nn.Linear(5, 3, bias=bias, dtype=dtype), 0)


@pytest.mark.parametrize("make", [own_layer, self_contained_layer])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rank_zero_is_the_bias_without_a_product(
    make: Callable[[bool, torch.dtype], nn.Module], bias: bool, autocast: bool, dtype: torch.dtype
) -> None:
    layer = make(bias, dtype)
    if bias:
        nn.init.normal_(layer.bias)
    x = torch.full((2, 4, 5), torch.inf, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained = layer.train()(x)
        with torch.profiler.profile() as profile:
            output = layer.eval()(x)
    assert not {"aten::mm", "aten::addmm", "aten::matmul", "aten::linear"} & {e.key for e in profile.key_averages()}
    assert output.dtype == trained.dtype and output.shape == (2, 4, 3)
    assert output.is_contiguous() and torch.equal(output, trained)
    assert output.float().abs().sum() > 0 or not bias
    output.mul_(2)  # a model may write into it
    if bias:
        output.sum().backward()
        assert torch.equal(layer.bias.grad, torch.full((3,), 16, dtype=dtype))


def test_rank_zero_has_gradients_everywhere_in_training() -> None:
    # DDP waits for them.
    before, layer = nn.Linear(4, 5), LowRankLinear(5, 3, 0)
    layer.train()(before(torch.randn(2, 4))).sum().backward()
    assert all(parameter.grad is not None for parameter in (*before.parameters(), *layer.parameters()))


def test_at_rank_zero_the_factors_leave_the_device_meta() -> None:
    layer = LowRankLinear(6, 4, 0, bias=False, device="meta", dtype=torch.float32)
    for factor in (layer.p, layer.q):
        assert factor.half().weight.device.type == "meta" and factor.weight.dtype == torch.float16
        assert factor.to("cpu").weight.device.type == "cpu"
    assert (layer.p.weight.shape, layer.q.weight.shape) == ((4, 0), (0, 6))
    assert list(layer.p.parameters()) == [] and layer.factors() == []
