"""How many multiply-adds the linear layers of a compressed model cost."""

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..layers.dense import kept_dense_rank
from ..layers.low_rank import LowRankLinear
from .tables import rank_report


@dataclass(frozen=True)
class LinearOperations:
    """
    Multiply-adds of one vector (such as a token's) through each linear layer once, biases aside.

    Attributes:
        target: of the target layers, compacted.
        dense_target: of the same layers before.
        linear: of all linear layers, output layer included, with the compacted ones.
        dense_linear: of all linear layers before.
    """

    target: int
    dense_target: int
    linear: int
    dense_linear: int


def linear_operations(model: nn.Module) -> LinearOperations:
    """
    Count them by the shapes, which is one for each number of a weight; the model is not run.

    Args:
        model: with singular groups, or compacted; its parameters may be without values.

    Raises:
        ValueError: the model has no compressed layers.
    """
    report = rank_report(model)
    target, dense_target = int(report["parameters"].sum()), int(report["dense_parameters"].sum())
    factors = {part for module in model.modules() if isinstance(module, LowRankLinear) for part in module.children()}
    others = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in factors and kept_dense_rank(module) is None
    )
    return LinearOperations(target, dense_target, target + others, dense_target + others)
