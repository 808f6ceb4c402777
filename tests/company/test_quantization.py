"""P and Q in int8."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from rankdyna_trainer import LowRankLinear


def weights_only(model: nn.Module) -> nn.Module:
    quantize_(model, Int8WeightOnlyConfig())
    return model


def activations_too(model: nn.Module) -> nn.Module:
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def dynamically(model: nn.Module) -> nn.Module:
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def file_bytes(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def is_quantized(linear: nn.Module) -> bool:
    return type(linear) is not nn.Linear or type(linear.weight.data) is not torch.Tensor


@pytest.mark.parametrize("kind", ["classifier", "gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    ("tool", "quantized_by"),
    [("torchao", weights_only), ("torchao", activations_too), ("torch", dynamically)],
    ids=["torchao weights", "torchao dynamic", "torch dynamic"],
)
@torch.no_grad()
def test_int8(
    tool: str,
    quantized_by: Callable[[nn.Module], nn.Module],
    kind: str,
    make_compacted: Any,
    inputs_of: Any,
    assert_differs_less: Any,
) -> None:
    model = make_compacted(kind)
    inputs = inputs_of(model)
    expected = model(**inputs).logits
    quantized = quantized_by(copy.deepcopy(model))
    layers = [module for module in quantized.modules() if isinstance(module, LowRankLinear)]
    for layer in layers:
        if layer.rank:
            assert is_quantized(layer.p) and is_quantized(layer.q)
        else:
            assert isinstance(layer.p, nn.Linear) and layer.p.weight.numel() == 0
    assert not [
        name for name, tensor in quantized.state_dict().items() if isinstance(tensor, Tensor) and 0 in tensor.shape
    ]
    assert {layer.rank for layer in layers} == {0, 3, 5}
    assert_differs_less(tool, quantized(**inputs).logits, expected, 0.03 * expected.abs().max().item())
    if kind != "gpt2":  # what stays dense there is a Conv1D, which these tools do not quantize
        assert file_bytes(quantized) < file_bytes(model)
