import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankdyna_trainer.layers.dense import dense_weight, new_dense_layer


class OwnLinear(nn.Linear):
    pass


class OwnConv1D(Conv1D):
    pass


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), Conv1D(3, 5)])
def test_dense_weight_is_a_view_in_the_order_of_linear(layer: nn.Module) -> None:
    nn.init.normal_(layer.bias)
    weight = dense_weight(layer)
    assert weight.shape == (3, 5)
    x = torch.randn(2, 5)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
    with torch.no_grad():
        weight.zero_()
    assert not layer.weight.any()


@pytest.mark.parametrize(
    ("original_class", "stock_class"),
    [(nn.Linear, nn.Linear), (OwnLinear, nn.Linear), (Conv1D, Conv1D), (OwnConv1D, Conv1D)],
)
def test_new_layer_is_a_stock_layer_with_the_weight(original_class: type, stock_class: type) -> None:
    weight, bias = torch.randn(3, 5, dtype=torch.float64), nn.Parameter(torch.randn(3, dtype=torch.float64))
    before = torch.get_rng_state()
    layer = new_dense_layer(original_class, weight, bias)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(layer) is stock_class
    assert layer.bias is bias
    assert torch.equal(dense_weight(layer), weight)
    assert layer.weight.is_contiguous()
    x = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ weight.T + bias)
    assert repr(layer) == repr(stock_class(5, 3) if stock_class is nn.Linear else Conv1D(3, 5))


def test_new_layer_without_a_bias() -> None:
    layer = new_dense_layer(nn.Linear, torch.randn(3, 5), None)
    assert layer.bias is None
    assert dict(layer.named_parameters()).keys() == {"weight"}
    assert layer(torch.ones(5)).shape == (3,)
