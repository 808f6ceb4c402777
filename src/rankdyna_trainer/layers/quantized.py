"""Weights that torchao has quantized."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is held in another form than as one tensor of floats."""
    return type(weight).__module__.startswith("torchao.")


@torch.no_grad()
def undo_quantization(model: nn.Module) -> None:
    """
    Replace each weight that torchao has quantized by the floats that it stands for, in place.

    Args:
        model: of which `save_pretrained` then writes nothing quantized.

    Raises:
        ValueError: another library than torchao has quantized it.
    """
    for part in model.modules():
        quantizer: Any = part.__dict__.get("hf_quantizer") if isinstance(part, PreTrainedModel) else None
        if quantizer is None:
            continue
        method = getattr(
            quantizer.quantization_config.quant_method, "value", quantizer.quantization_config.quant_method
        )
        if method != "torchao":
            raise ValueError(
                f"This {type(part).__name__} is quantized ({method}), which cannot be undone: load it without "
                "quantization_config, and give that model."
            )
        quantizer.remove_quantization_config(part)
        # What would turn the weights into those of the file again when the model is saved.
        conversions: Any = [
            conversion
            for conversion in getattr(part, "_weight_conversions", None) or ()
            if not any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
        ]
        part._weight_conversions = conversions
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if is_quantized(weight):
                setattr(module, name, nn.Parameter(weight.dequantize()))
