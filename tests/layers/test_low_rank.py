import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rankdyna_trainer import LowRankLinear


@pytest.mark.parametrize(("rank", "bias"), list(itertools.product([0, 1, 4], [True, False])))
def test_low_rank_linear_is_two_linear_layers(rank: int, bias: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = LowRankLinear(20, 6, rank, bias=bias)
    # At rank 0 of the class that is not quantized.
    assert type(layer.p) is type(layer.q) is (nn.Linear if rank else NonDynamicallyQuantizableLinear)
    assert (layer.q.in_features, layer.q.out_features, layer.q.bias) == (20, rank, None)
    assert (layer.p.in_features, layer.p.out_features) == (rank, 6)
    assert (layer.p.weight.shape, layer.q.weight.shape, layer.rank) == ((6, rank), (rank, 20), rank)
    assert layer.bias is layer.p.bias and (layer.bias is not None) == bias
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 20)
    weight = layer.p.weight @ layer.q.weight
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    torch.testing.assert_close(layer.to_dense_weight(), weight)


def test_low_rank_linear_takes_device_and_dtype() -> None:
    layer = LowRankLinear(20, 6, 3, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
