"""
Weight decay of compressed layers: of the product, as of the dense weight that it stands for.

An optimizer shrinks each parameter by itself, so that a product of three shrinks three times as fast. Here one factor
of each layer takes the decay for all, whatever the optimizer, and whoever made it, and when.
"""

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Factored(Protocol):
    """A layer whose weight is a product."""

    def undecayed_factors(self) -> Iterable[Tensor]:
        """The factors that another one shrinks for."""


# Under this name a twin keeps what it found: the optimizer's own attributes, then its groups.
_BEFORE = "_rankdyna_before"

_layers: "weakref.WeakSet[Factored]" = weakref.WeakSet()


def decay_once(layer: Factored) -> None:
    """Let optimizers shrink the weight of a layer as if it were one matrix, for as long as the layer lives."""
    _layers.add(layer)


def _without_decay(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    Let a step be taken by a twin of the optimizer, in which some parameters are in groups without decay.

    Such groups in the optimizer itself would be in its checkpoints, where they have no place, and would have to be
    known to each scheduler; and a step that fails would leave them there.
    """
    if "param_groups" not in vars(optimizer):  # it passes on those of others, which take their own steps
        return None
    undecayed = {id(factor) for layer in _layers for factor in layer.undecayed_factors()}
    groups = list(optimizer.param_groups)
    origins: list[int] = []  # of the groups that are added
    for number, group in enumerate(optimizer.param_groups):
        without = [p for p in group["params"] if id(p) in undecayed] if group.get("weight_decay") else []
        if without:
            rest = [p for p in group["params"] if id(p) not in undecayed]
            groups[number] = group | {"params": rest}
            groups.append(group | {"params": without, "weight_decay": 0.0})
            origins.append(number)
    if not origins:
        return None
    twin = object.__new__(type(optimizer))
    before = [dict(vars(optimizer)), *map(dict, optimizer.param_groups)]
    twin.__dict__ = vars(optimizer) | {"param_groups": groups, _BEFORE: before}
    for name, value in before[0].items():
        if _is_by_group(value, len(optimizer.param_groups)):
            before[0][name] = vars(twin)[name] = value + [value[number] for number in origins]
    return (twin, *args[1:]), kwargs


def _is_by_group(value: Any, groups: int) -> bool:
    """Whether an attribute of an optimizer has a number for each group, as `base_lrs` of AdaBound."""
    return isinstance(value, list) and len(value) == groups and all(isinstance(one, (int, float)) for one in value)


def _take_over(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Take over what a step has noted on the twin: some optimizers count their steps there, or by group."""
    twin = args[0]
    if twin is optimizer:
        return
    before = vars(twin).pop(_BEFORE)
    after = [vars(twin), *twin.param_groups]
    for own, was, noted in zip([vars(optimizer), *optimizer.param_groups], before, after, strict=False):
        changed = {key: value for key, value in noted.items() if key not in was or value is not was[key]}
        own.update({key: value for key, value in changed.items() if key not in ("params", "param_groups")})


register_optimizer_step_pre_hook(_without_decay)
register_optimizer_step_post_hook(_take_over)
