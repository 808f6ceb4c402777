"""The dense layers that can be compressed: `nn.Linear` and GPT-2's `Conv1D`."""

from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

DenseLayer: TypeAlias = nn.Linear | Conv1D

# Noted on a target layer that is to be in singular groups later in its training: with how many it begins.
EXPECTS_GROUPS = "_rankdyna_expects_groups"


def dense_weight(layer: DenseLayer) -> Tensor:
    """The weight as `(out_features, in_features)`, a view of the parameter: `Conv1D` keeps it the other way round."""
    return layer.weight.t() if isinstance(layer, Conv1D) else layer.weight


def in_features(layer: nn.Module) -> int:
    """The size of the input of a linear layer in any of its forms."""
    return int(layer.nx if isinstance(layer, Conv1D) else layer.in_features)  # type: ignore[arg-type]


def out_features(layer: nn.Module) -> int:
    """The size of the output of a linear layer in any of its forms."""
    return int(layer.nf if isinstance(layer, Conv1D) else layer.out_features)  # type: ignore[arg-type]


def new_dense_layer(original_class: type[nn.Module], weight: Tensor, bias: nn.Parameter | None) -> DenseLayer:
    """
    A stock layer that holds this weight.

    Args:
        original_class: `nn.Linear` or `Conv1D`, or a class derived from one of them.
        weight: `(out_features, in_features)`.
        bias: `(out_features,)`, taken over as it is, or `None`.
    """
    out_features, in_features = weight.shape
    layer: DenseLayer
    with torch.device("meta"):
        if issubclass(original_class, Conv1D):
            layer = Conv1D(out_features, in_features)
            weight = weight.t()
        else:
            layer = nn.Linear(in_features, out_features, bias=bias is not None)
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = bias
    return layer


def expects_groups(layer: nn.Module) -> bool:
    """Whether a layer is a target that will be in singular groups later in its training."""
    return EXPECTS_GROUPS in layer.__dict__


def mark_kept_dense(layer: nn.Module, rank: int | None) -> None:
    """
    Note on a target layer that it stays dense because P and Q would hold more numbers.

    Args:
        layer: dense.
        rank: how many groups it had at the end; `None` forgets the note.
    """
    layer._rankdyna_rank = rank  # type: ignore[assignment]


def kept_dense_rank(layer: nn.Module) -> int | None:
    """The rank of a target layer that stays dense; `None` for any other layer."""
    rank = getattr(layer, "_rankdyna_rank", None)
    return rank if isinstance(rank, int) else None
