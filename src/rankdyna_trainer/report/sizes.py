"""How large a model will be at a ratio, told by its shapes before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..config import RankDynaConfig
from ..layers.dense import DenseLayer, dense_weight
from ..method.budget import uniform_rank
from ..method.schedule import final_parameter_budget, final_rank_budget

Shapes = Sequence[tuple[int, int]]  # (out_features, in_features) of each target layer


@dataclass(frozen=True)
class ModelSize:
    """
    The size of a model.

    Attributes:
        target_parameters: numbers in the weights of the target layers.
        all_parameters: numbers in the whole model, those of shared weights once.
        file_bytes: of the weights on disk, in the model's own precision.
    """

    target_parameters: int
    all_parameters: int
    file_bytes: int


@dataclass(frozen=True)
class SizesAtRatio:
    """
    What a ratio leads to.

    Attributes:
        groups: `R(T)`, the groups that remain; with `param_ratio` it is known only after training, and `None`.
        local: the size with `rank_scope="local"`, which the baselines have too: exact.
        least: with `rank_scope="global"`, which chooses the groups in training, the size is not below this one,
        most: and not above this one.
    """

    groups: int | None
    local: ModelSize
    least: ModelSize
    most: ModelSize


def dense_size(model: nn.Module, targets: Mapping[str, DenseLayer]) -> ModelSize:
    """The size of a model as it is; its parameters may be without values."""
    return ModelSize(
        sum(layer.weight.numel() for layer in targets.values()),
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.nbytes for parameter in model.parameters()),
    )


def sizes_at_ratio(model: nn.Module, targets: Mapping[str, DenseLayer], config: RankDynaConfig) -> SizesAtRatio:
    """
    The sizes that a dense model will have, compacted at the end of training.

    Args:
        model: dense; its parameters may be without values.
        targets: its layers that are to be compressed, from [`find_targets`].
        config: of which the ratio counts; for others than the default of `rank_multiple_of` the bounds do not hold.
    """
    shapes = [(int(out), int(into)) for out, into in (dense_weight(layer).shape for layer in targets.values())]
    dense = dense_size(model, targets)
    target_bytes = sum(layer.weight.nbytes for layer in targets.values())

    def size(parameters: int) -> ModelSize:
        return ModelSize(
            parameters,
            dense.all_parameters - dense.target_parameters + parameters,
            dense.file_bytes - target_bytes + round(target_bytes * parameters / dense.target_parameters),
        )

    local = sum(_compacted(uniform_rank(config, *shape), *shape) for shape in shapes)
    if config.param_ratio is not None:
        budget = final_parameter_budget(config.ratios[-1], dense.target_parameters)
        # What is left of the budget is less than a group that was removed would cost.
        dearest = max(out + into for out, into in shapes)
        least = budget if budget == dense.target_parameters else max(0, budget - dearest + 1)
        return SizesAtRatio(None, size(local), size(least), size(budget))
    groups = final_rank_budget(config.ratios[-1], sum(map(min, shapes)))
    return SizesAtRatio(
        groups, size(local), size(least_parameters(shapes, groups)), size(most_parameters(shapes, groups))
    )


def least_parameters(shapes: Shapes, groups: int) -> int:
    """
    A number of parameters that no choice of so many groups can go below.

    Whole matrices are the cheapest, since they stay dense: `max(out, in)` numbers a group. A part of a matrix costs
    more, and is counted here as if it did not.
    """
    total = 0
    for out, into in sorted(shapes, key=max):
        taken = min(groups, min(out, into))
        total, groups = total + taken * max(out, into), groups - taken
    return total


def most_parameters(shapes: Shapes, groups: int) -> int:
    """The most parameters that so many groups can hold: dear ones, of matrices that are not worth to be kept dense."""
    prices: dict[int, int] = {}
    for out, into in shapes:
        in_full, rest = divmod(out * into, out + into)
        prices[out + into] = prices.get(out + into, 0) + in_full
        prices[rest] = prices.get(rest, 0) + 1  # after this group the matrix is dense, and all others cost nothing
    total = 0
    for price, count in sorted(prices.items(), reverse=True):
        taken = min(groups, count)
        total, groups = total + taken * price, groups - taken
    return total


def _compacted(rank: int, out_features: int, in_features: int) -> int:
    return min(rank * (out_features + in_features), out_features * in_features)
