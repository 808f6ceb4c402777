"""How a removed group leaves the model: first as zeros, then out of the parameters and the optimizer's state."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .layers import SingularGroupLinear


@torch.no_grad()
def remove_groups(layer: SingularGroupLinear, remaining: Tensor, optimizer: Optimizer) -> None:
    """
    Remove the groups of a layer that are not in the mask, for good.

    Their rows are set to zero in the factors, the gradients, the scores and the optimizer's state. With zero factors
    all gradients of a group are zero, so an optimizer whose state is zero too leaves them there.

    Args:
        layer: the layer.
        remaining: `(width,)`, the groups that remain.
        optimizer: which holds the layer's factors.
    """
    removed = layer.remaining & ~remaining
    for factor in layer.factors().values():
        factor[removed] = 0
        if factor.grad is not None:
            factor.grad[removed] = 0
        for value in _tensors_by_rows(factor, optimizer):
            value[removed] = 0
    layer.importance[removed] = 0
    layer.set_remaining(layer.remaining & remaining)


@torch.no_grad()
def clear_removed_groups(layer: SingularGroupLinear) -> None:
    """Set the rows of removed groups to zero again, after an optimizer whose state could not be cleared."""
    for factor in layer.factors().values():
        factor[~layer.remaining] = 0


def can_cut(layer: SingularGroupLinear, optimizer: Optimizer) -> bool:
    """Whether all state that the optimizer keeps for the layer has the groups in dimension 0, as its factors do."""
    return all(
        value.shape == factor.shape
        for factor in layer.factors().values()
        for value in optimizer.state.get(factor, {}).values()
        if isinstance(value, Tensor) and value.numel() > 1
    )


@torch.no_grad()
def cut_groups(layers: Iterable[SingularGroupLinear], optimizer: Optimizer) -> None:
    """
    Take the removed groups out of the tensors: new, smaller parameters, under which the optimizer goes on.

    A parameter resized in place would keep its gradient accumulator alive in any graph that still refers to it (a loss
    that a user kept), and the next backward pass would fail on the old shape.

    Args:
        layers: of which [`can_cut`] is true.
        optimizer: which holds the layers' factors.
    """
    smaller: dict[nn.Parameter, nn.Parameter] = {}
    for layer in layers:
        kept = layer.remaining.nonzero().squeeze(1)
        for name, factor in layer.factors().items():
            new = nn.Parameter(factor[kept], requires_grad=factor.requires_grad)
            if factor in optimizer.state:
                state = optimizer.state.pop(factor)
                optimizer.state[new] = {
                    key: value[kept] if isinstance(value, Tensor) and value.shape == factor.shape else value
                    for key, value in state.items()
                }
            setattr(layer, name, new)
            smaller[factor] = new
        layer.importance = layer.importance[kept]
        layer.set_remaining(layer.remaining[kept])
    for group in optimizer.param_groups:
        group["params"] = [smaller.get(parameter, parameter) for parameter in group["params"]]


def _tensors_by_rows(factor: nn.Parameter, optimizer: Optimizer) -> list[Tensor]:
    state = optimizer.state.get(factor, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == factor.shape]
