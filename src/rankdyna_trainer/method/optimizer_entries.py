"""What an optimizer, and those that it wraps, hold of parameters: when some are exchanged, all of it follows."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer

from ..layers.low_rank import LowRankLinear
from ..layers.singular_group import SingularGroupLinear

State = MutableMapping[Tensor, dict[str, Any]]


def with_wrapped(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and all that it wraps, as Lookahead, SAM and accelerate do, the outermost first."""
    found = [optimizer]
    for outer in found:  # it grows
        for value in vars(outer).values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(inner, Optimizer) and inner not in found:
                    found.append(inner)
    return found


def states_of(optimizer: Optimizer) -> list[State]:
    """The states that an optimizer and those that it wraps keep, each once."""
    states = [one.state for one in with_wrapped(optimizer)]
    return list({id(state): state for state in states}.values())


def is_one_vector(optimizer: Optimizer) -> bool:
    """Whether an optimizer keeps all parameters as one vector, and so a state that belongs to none of them."""
    return any(isinstance(one, LBFGS) for one in with_wrapped(optimizer))


def exchange(
    optimizer: Optimizer,
    successors: Mapping[nn.Parameter, Sequence[nn.Parameter]],
    rename: Callable[[str, nn.Parameter, nn.Parameter], str] = lambda name, old, new: name,
) -> None:
    """
    Put other parameters in the place of some, in the lists that an optimizer made of them, with their names.

    Args:
        optimizer: whose lists are changed in place, since wrappers and LBFGS hold them too. It keeps its states.
        successors: for a parameter those that take its place, in their order; none drop it.
        rename: from a name, the parameter that had it and the one that takes its place to the new name.
    """
    groups = {id(group): group for one in with_wrapped(optimizer) for group in one.param_groups}
    for group in groups.values():
        news = [successors.get(old, (old,)) for old in group["params"]]
        if "param_names" in group:
            named = zip(group["param_names"], group["params"], news, strict=True)
            group["param_names"] = [rename(name, old, new) for name, old, after in named for new in after]
        group["params"][:] = [new for after in news for new in after]
    for one in with_wrapped(optimizer):
        if isinstance(one, LBFGS):  # its vectors are of the old parameters
            one.state.clear()
            one._numel_cache = None


def hand_over(
    optimizer: Optimizer,
    layer: nn.Module,
    replacement: nn.Module,
    successors: Mapping[nn.Parameter, Sequence[nn.Parameter]],
) -> None:
    """
    Let the optimizer go on with the parameters of another layer, whose state begins anew.

    Args:
        optimizer: of which parameters are exchanged in place.
        layer: that was replaced.
        replacement: which took its place in the model.
        successors: for a parameter of the layer those that take its place, in their order; none drop it.
    """
    before = {id(parameter): name for name, parameter in layer.named_parameters()}
    after = {id(parameter): name for name, parameter in replacement.named_parameters()}

    def rename(name: str, old: nn.Parameter, new: nn.Parameter) -> str:
        of_layer = before.get(id(old))
        if of_layer is None or not name.endswith(of_layer):
            return name
        return name.removesuffix(of_layer) + after.get(id(new), of_layer)

    exchange(optimizer, successors, rename)
    entered = [new for old, news in successors.items() for new in news if new is not old]
    left = [old for old, news in successors.items() if not any(new is old for new in news)]
    for one in with_wrapped(optimizer):
        for old in left:
            one.state.pop(old, None)
        if entered:
            _begin_early_state(one, entered)


def hand_over_compacted(optimizer: Optimizer, layer: SingularGroupLinear, new: Any) -> None:
    """[`hand_over`] from the groups of a layer to the P and Q, or the dense weight, that it became."""
    p, factors = (new.p, new.factors()) if isinstance(new, LowRankLinear) else (new, [new.weight])
    successors: dict[nn.Parameter, list[Any]] = {layer.u: factors[:1], layer.v: factors[1:], layer.sigma: []}
    if layer.bias is not None:
        successors[layer.bias] = [p.bias]
    hand_over(optimizer, layer, new, successors)


def _begin_early_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Make the state of parameters that come later, where an optimizer makes it when it is made."""
    if isinstance(optimizer, Adagrad):
        optimizer.state.update(Adagrad(parameters, **optimizer.defaults).state)
    elif hasattr(optimizer, "init_group") and len(with_wrapped(optimizer)) > 1:  # of pytorch_optimizer, as Lookahead
        optimizer.init_group({"params": parameters})
