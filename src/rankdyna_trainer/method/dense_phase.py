"""
The first steps of a run whose groups are those of the inputs: the target layers are dense, train as they would without
compression, and cost as much. Near the end of the warm-up their weights are factored in the metric of what enters them
then.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import RankDynaConfig
from ..layers.dense import EXPECTS_GROUPS
from ..layers.injection import inject_targets
from ..layers.input_moments import BYTES_AT_ONCE
from ..layers.low_rank import LowRankLinear
from ..layers.singular_group import SingularGroupLinear
from ..layers.start import start_ranks
from ..layers.targets import TargetLayer, check_values, checked_targets, dense_shape
from .optimizer_entries import hand_over

# From layers by name to the second moments of their inputs.
Observe = Callable[[Mapping[str, nn.Module]], dict[str, Tensor]]


class DensePhase:
    """
    Target layers that are not factored yet.

    Args:
        model: without singular groups.
        config: the choices.
        optimizer: which has to hold the weights of the target layers.
        observe: from layers by name to the second moments of their inputs.

    Attributes:
        shapes: `(out_features, in_features)` of each target layer.
        ranks: how many groups each weight has now.
        initial_ranks: how many of them it will begin with.

    Raises:
        ValueError: as [`inject_singular_groups`], or the optimizer does not hold the weights.
    """

    def __init__(self, model: nn.Module, config: RankDynaConfig, optimizer: Optimizer, observe: Observe) -> None:
        self._model, self._config, self._optimizer, self._observe = model, config, optimizer, observe
        targets = checked_targets(model, config)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, layer in targets.items() if not all(id(w) in held for w in _weights(layer))]
        if missing:
            raise ValueError(
                f"The optimizer does not hold the weights of {len(missing)} target layers ({missing[0]}, ...): make "
                "it from this model's parameters, all of them, or name these layers in exclude_modules."
            )
        for layer in set(model.modules()) - set(targets.values()):
            layer.__dict__.pop(EXPECTS_GROUPS, None)  # one that was frozen since then is left alone
        self._names = list(targets)
        self.shapes = [dense_shape(layer) for layer in targets.values()]
        self.ranks = [
            layer.rank if isinstance(layer, LowRankLinear) else min(shape)
            for layer, shape in zip(targets.values(), self.shapes, strict=True)
        ]
        self.initial_ranks = [*start_ranks(config, targets).values()]

    def end(self) -> None:
        """
        Factor the target layers, and let the optimizer go on with their groups.

        Raises:
            ValueError: a weight has inf or nan.
        """
        targets = {name: cast(TargetLayer, self._model.get_submodule(name)) for name in self._names}
        check_values(targets)
        room = 0
        for weight in [weight for layer in targets.values() for weight in _weights(layer)]:
            if weight.requires_grad:
                room += weight.nbytes
                weight.grad = None  # which the optimizer has used: second moments take the place of gradients
        inject_targets(
            self._model,
            self._config,
            targets,
            self._observe,
            partial(hand_over_to_groups, self._optimizer),
            max(room, BYTES_AT_ONCE) if self._config.start_ratio is None else room,
        )


def hand_over_to_groups(optimizer: Optimizer, layer: TargetLayer, groups: SingularGroupLinear) -> None:
    """
    Let an optimizer go on with the groups in the place of the weights.

    Args:
        optimizer: which holds the weights.
        layer: with the weights.
        groups: which took its place in the model.
    """
    if not (weights := _weights(layer)):  # at rank 0
        return
    first, *others = weights
    factors: list[nn.Parameter] = [groups.u, groups.sigma, groups.v]
    hand_over(optimizer, layer, groups, {first: factors} | {other: [] for other in others})


def _weights(layer: TargetLayer) -> list[nn.Parameter]:
    return layer.factors() if isinstance(layer, LowRankLinear) else [cast(nn.Parameter, layer.weight)]
