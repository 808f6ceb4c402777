"""How a removed group leaves the model: first as zeros, then out of the parameters and the optimizer's state."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers.distributed import is_sharded, local_part, of_local_groups
from ..layers.singular_group import SingularGroupLinear
from .optimizer_entries import exchange, states_of


def check_optimizer(layers: Mapping[str, SingularGroupLinear], optimizer: Optimizer) -> None:
    """
    Check that the groups of the layers can be removed from the optimizer.

    Args:
        layers: by name.
        optimizer: which has to hold all their factors, and state of their width if it has any.

    Raises:
        ValueError: it does not.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: layer for name, layer in layers.items() if layer.initial_rank}
    factors = {f"{name}.{key}": f for name, layer in trained.items() for key, f in layer.factors().items()}
    missing = [name for name, factor in factors.items() if id(factor) not in held]
    if missing:
        frozen = [name for name in missing if not factors[name].requires_grad]
        reason = (
            "it is frozen (requires_grad=False), which exclude_modules would have left alone"
            if frozen == missing
            else "it was made before the singular groups, or its groups were chosen by names such as weight, which u, "
            "sigma and v do not have. Let the Trainer make it (optimizer_cls_and_kwargs chooses which), or call "
            "inject_singular_groups(model, config) first and build the optimizer from all parameters of that model"
        )
        raise ValueError(
            f"The optimizer does not hold {len(missing)} factors of the model ({missing[0]}, ...): {reason}."
        )
    for name, factor in factors.items():
        for key, value in optimizer.state.get(factor, {}).items():
            by_groups = factor.ndim == 2 == getattr(value, "ndim", 0) and value.shape[1] == factor.shape[1]
            if by_groups and len(value) != len(factor):
                raise ValueError(
                    f"The optimizer's {key} of {name} has {len(value)} groups, but the layer has {len(factor)}: they "
                    "are of different steps. Resume in a new process."
                )


def on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU; a GPU on which all of them are is waited for only once."""
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) > 1 or tensors[0].device.type == "cpu":
        return [tensor.cpu() for tensor in tensors]
    return list(torch.split(torch.cat(list(tensors)).cpu(), [len(tensor) for tensor in tensors]))


@torch.no_grad()
def remove_groups(layer: SingularGroupLinear, remaining: Tensor, optimizer: Optimizer) -> None:
    """
    Remove the groups of a layer that are not in the mask, for good.

    Their rows are set to zero in the factors, the gradients, the scores and the optimizer's state. With zero factors
    all gradients of a group are zero, so an optimizer whose state is zero too leaves them there.

    Args:
        layer: the layer.
        remaining: `(width,)`, the groups that remain; on the CPU, no GPU is waited for.
        optimizer: which holds the layer's factors.
    """
    remaining = layer.remaining_on_cpu & remaining.cpu()
    removed = layer.remaining_on_cpu & ~remaining
    if not removed.any():
        return
    device, states = layer.remaining.device, states_of(optimizer)
    numbers = removed.nonzero().squeeze(1).to(device, non_blocking=True)
    for factor in layer.factors().values():
        by_groups = [
            value for state in states for value in state.get(factor, {}).values() if _has_shape_of(factor, value)
        ]
        if factor.grad is not None:
            by_groups.append(factor.grad)
        for tensor in (factor, *by_groups):
            # Only these rows are written: a mask would read and write all of the tensor.
            sharded = is_sharded(tensor)
            rows = of_local_groups(removed.to(device), tensor).nonzero().squeeze(1) if sharded else numbers
            local_part(tensor).index_fill_(0, rows, 0)
    layer.importance.index_fill_(0, numbers, 0)
    layer.set_remaining(remaining)


@torch.no_grad()
def clear_removed_groups(layer: SingularGroupLinear) -> None:
    """Set the rows of removed groups to zero again, after an optimizer whose state could not be cleared."""
    for factor in layer.factors().values():
        local_part(factor)[of_local_groups(~layer.remaining, factor)] = 0


def state_without_groups(layers: Iterable[SingularGroupLinear], optimizer: Optimizer) -> str | None:
    """
    The name of a state of the optimizer that has not the groups in dimension 0, as the factors have: then none of its
    state can be cut, since a square matrix that belongs to both dimensions would look as if it could.

    Returns:
        `None` if the optimizer keeps only such tensors and single numbers.
    """
    states = states_of(optimizer)
    for layer in layers:
        for factor in layer.factors().values():
            for name, value in (entry for state in states for entry in state.get(factor, {}).items()):
                if not _is_single_number(value) and not _has_shape_of(factor, value):
                    return str(name)
    return None


@torch.no_grad()
def cut_groups(layers: Iterable[SingularGroupLinear], optimizer: Optimizer) -> None:
    """
    Take the removed groups out of the tensors: new, smaller parameters, under which the optimizer goes on.

    A parameter resized in place would keep its gradient accumulator alive in any graph that still refers to it (a loss
    that a user kept), and the next backward pass would fail on the old shape. At least two rows
    stay, of zeros if no group is left: not every optimizer can step on an empty tensor, and one row would be copied
    into each of many without an error. On a GPU as many stay as make up a multiple of 8.

    Args:
        layers: whose groups are cut.
        optimizer: which holds the layers' factors, and has no [`state_without_groups`].
    """
    smaller: dict[nn.Parameter, list[nn.Parameter]] = {}
    states = states_of(optimizer)
    for layer in layers:
        rows = layer.rows_when_cut()
        kept = rows.to(layer.remaining.device, non_blocking=True)
        for name, factor in layer.factors().items():
            new = nn.Parameter(factor[kept], requires_grad=factor.requires_grad)
            for state in states:
                if factor in state:
                    of_factor = state.pop(factor)
                    state[new] = {
                        key: value[kept] if _has_shape_of(factor, value) else value for key, value in of_factor.items()
                    }
            setattr(layer, name, new)
            smaller[factor] = [new]
        layer.importance = layer.importance[kept]
        layer.set_remaining(layer.remaining_on_cpu[rows])
    exchange(optimizer, smaller)


@torch.no_grad()
def forget_state(factors: Sequence[Tensor], optimizer: Optimizer) -> None:
    """
    Let an optimizer begin anew with factors, whose state it gathered for other groups.

    Args:
        factors: which keep their place in the optimizer.
        optimizer: which holds them.
    """
    for factor, state in ((factor, state) for state in states_of(optimizer) for factor in factors):
        if not is_sharded(factor):
            state.pop(factor, None)
            continue
        # A checkpoint of FSDP2 without a state for each of its parameters cannot be loaded.
        for value in state.get(factor, {}).values():
            if isinstance(value, Tensor):
                local_part(value).zero_()


def _is_single_number(value: object) -> bool:
    return value is None or isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() <= 1)


def _has_shape_of(factor: Tensor, value: object) -> bool:
    # The classes of quantized states have a shape too, but their rows cannot be taken out.
    is_plain = type(value) in (Tensor, nn.Parameter) or is_sharded(value)
    return is_plain and cast(Tensor, value).shape == factor.shape
