"""What compression costs the loss, a layer at a time: measured on rows, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..baselines.fisher import checked_examples, returned_loss
from ..baselines.replacement import dense_targets, exchanged_for_a_while, ranks_to_factor, truncated
from ..baselines.whitened import whitened_groups
from ..config import RankDynaConfig
from ..layers.dense import DenseLayer, dense_weight

if TYPE_CHECKING:
    import pandas as pd

PARAM_RATIOS = (0.5, 0.3, 0.15)
COLUMNS = ["rank", "dense_parameters", "parameters", "loss", "increase", "standard_error"]
# In the place of a layer's name.
ALL_LAYERS, ALL_OTHERS = "all layers", "all layers but those that stand out"
# A layer stands out if it costs so many times what the median layer does, so many standard errors, and such a part of
# the dense model's loss.
MEDIANS, STANDARD_ERRORS, PART_OF_LOSS = 3, 3, 0.01

Pair = tuple[Tensor, Tensor]
Modules = Sequence[str] | str | None


@torch.no_grad()
def layer_sensitivity(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    param_ratios: Iterable[float] = PARAM_RATIOS,
    target_modules: Modules = None,
    exclude_modules: Modules = None,
) -> pd.DataFrame:
    """
    How much the loss rises when layers are truncated: each alone with all others dense, and all of them together.

    A layer becomes what [`~rankdyna_trainer.baselines.whitened.whitened_svd`] makes of it alone on the same rows: also
    where all of them are truncated, each is fitted to its inputs in the dense model. The loss is that which the model
    itself returns, in evaluation mode. The model is left as it was, to the last bit.
    Beside it, P and Q of the largest ratio are held. It is run once for each layer and ratio.

    Args:
        model: dense and fine-tuned, best in float32: half precision rounds the differences away.
        dataloader: gives two batches or more as a data collator of `transformers` does, with labels; a few hundred
            rows are enough. They are kept, and read again for each run.
        param_ratios: the parts of each layer's parameters to keep.
        target_modules: which layers, as in [`RankDynaConfig`].
        exclude_modules: likewise.

    Returns:
        By `layer` and `param_ratio`, the largest first. Behind the layers, in the model's order, come the rows
        `"all layers"`, and, at the middle ratio and if there are such, `"all layers but those that stand out"`; see
        [`standing_out`]. The columns: `rank` (of these rows the sum), `dense_parameters` and `parameters` (numbers in
        the weights before and after), `loss` (mean of the batches' losses, each counted by its rows), `increase` (over
        that of the dense model) and `standard_error` (of the increase, by its spread over the batches).

    Raises:
        TypeError: a batch is no mapping, or a ratio no number.
        ValueError: a ratio is not in (0, 1], there is none, or fewer than two batches; the model returns no finite
            loss; or as [`~rankdyna_trainer.baselines.whitened.whitened_svd`].

    Example:

    ```python
    from rankdyna_trainer.report.sensitivity import layer_sensitivity, standing_out

    costs = layer_sensitivity(model, batches, param_ratios=[0.5, 0.2])
    print(costs["increase"].unstack(), standing_out(costs))
    ```
    """
    modules: dict[str, Any] = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    configs = {ratio: RankDynaConfig(param_ratio=ratio, **modules) for ratio in param_ratios}
    if not configs:
        raise ValueError("param_ratios is empty: give at least one, such as 0.3.")
    configs = dict(sorted(configs.items(), reverse=True))
    targets = dense_targets(model, next(iter(configs.values())))
    batches = _kept(dataloader)
    with _evaluating(model):
        return _Measuring(model, targets, batches).at_ratios(
            {ratio: ranks_to_factor(targets, config) for ratio, config in configs.items()}
        )


def middle_ratio(costs: pd.DataFrame) -> float:
    """The ratio at which layers are compared: the middle one, of an even number the smaller of the middle two."""
    ratios = sorted(costs.index.unique("param_ratio"))
    return float(ratios[(len(ratios) - 1) // 2])


def each_alone(costs: pd.DataFrame) -> pd.DataFrame:
    """The rows of [`layer_sensitivity`] that are of one layer."""
    return costs[~costs.index.get_level_values("layer").isin([ALL_LAYERS, ALL_OTHERS])]


def alone_at(costs: pd.DataFrame, ratio: float) -> pd.DataFrame:
    """Those of one ratio, by the name of the layer."""
    alone = each_alone(costs)
    return alone[alone.index.get_level_values("param_ratio") == ratio].droplevel("param_ratio")


def standing_out(costs: pd.DataFrame) -> list[str]:
    """
    The layers that it would pay to exclude, the dearest first.

    At the middle ratio such a layer costs, alone and for each parameter that it saves, more than 3 times the median
    layer (or anything at all, if the median is no cost); and it costs more than 3 standard errors, and more than a
    hundredth of the dense model's loss.

    Args:
        costs: from [`layer_sensitivity`].
    """
    alone = alone_at(costs, middle_ratio(costs))
    price = cost_of_saving(alone).dropna()
    limit = MEDIANS * max(price.median(), 0.0)
    certain = alone["increase"] > STANDARD_ERRORS * alone["standard_error"]
    matters = alone["increase"] > PART_OF_LOSS * (alone["loss"] - alone["increase"])
    dear = price[(price > limit) & (certain & matters).loc[price.index]]
    return [str(name) for name in dear.sort_values(ascending=False).index]


def cost_of_saving(costs: pd.DataFrame) -> pd.Series[float]:
    """For each row of [`layer_sensitivity`] the loss that a million saved parameters cost; nan where none is saved."""
    saved = costs["dense_parameters"] - costs["parameters"]
    return 1e6 * costs["increase"] / saved.where(saved > 0)


def unique_endings(names: Sequence[str], among: Iterable[str]) -> list[str]:
    """
    The shortest ending of each name that no other name has, for `exclude_modules`.

    Args:
        names: of layers.
        among: the names of all layers.
    """
    dotted = [f".{name}" for name in among]
    endings = []
    for name in names:
        parts = name.split(".")
        tails = (".".join(parts[start:]) for start in reversed(range(len(parts))))
        endings.append(next(tail for tail in tails if sum(other.endswith(f".{tail}") for other in dotted) == 1))
    return endings


def _kept(dataloader: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    batches = [
        example
        for number, batch in enumerate(dataloader, start=1)
        for example in checked_examples(batch, number, per_example=False)
    ]
    if len(batches) < 2:
        raise ValueError(
            f"The dataloader gave {len(batches)} batches with rows, and how far chance moves the loss is told by two "
            "or more: give more rows, or smaller batches."
        )
    return batches


class _Losses(NamedTuple):
    """Of each batch."""

    values: list[float]
    rows: list[int]

    @property
    def mean(self) -> float:
        return math.fsum(value * rows for value, rows in zip(self.values, self.rows, strict=True)) / sum(self.rows)

    def standard_error(self, dense: _Losses) -> float:
        """Of the mean difference: a batch of `n` rows differs from it by a part of the variance of a row, 1 / n."""
        mean = self.mean - dense.mean
        apart = [own - other - mean for own, other in zip(self.values, dense.values, strict=True)]
        of_a_row = math.fsum(rows * value**2 for value, rows in zip(apart, self.rows, strict=True)) / (len(apart) - 1)
        return math.sqrt(of_a_row / sum(self.rows))


class _Measuring:
    """A dense model, run with some of its layers truncated."""

    def __init__(self, model: nn.Module, targets: dict[str, DenseLayer], batches: list[dict[str, Any]]) -> None:
        self._model, self._targets, self._batches = model, targets, batches
        self._rows = [next(len(value) for value in batch.values() if isinstance(value, Tensor)) for batch in batches]

    def at_ratios(self, ranks: dict[float, dict[str, int]]) -> pd.DataFrame:
        import pandas as pd

        dense = self._losses({}, {})
        factors = self._factors(ranks)
        runs = [(name, ratio, [name]) for name in self._targets for ratio in ranks]
        runs += [(ALL_LAYERS, ratio, [*self._targets]) for ratio in ranks]
        rows: dict[tuple[str, float], list[float]] = {}

        def table() -> pd.DataFrame:
            index = pd.MultiIndex.from_tuples(rows, names=["layer", "param_ratio"])
            return pd.DataFrame([*rows.values()], index, COLUMNS).astype(dict.fromkeys(COLUMNS[:3], int))

        for key, ratio, names in tqdm(runs, "Measuring the loss", unit="run"):
            rows[key, ratio] = self._row(names, ranks[ratio], factors, dense)
        costs = table()
        if out := standing_out(costs):
            ratio, others = middle_ratio(costs), [name for name in self._targets if name not in out]
            rows[ALL_OTHERS, ratio] = self._row(others, ranks[ratio], factors, dense)
        return table()

    def _factors(self, ranks: dict[float, dict[str, int]]) -> dict[str, Pair]:
        """P and Q of the largest ratio, of which the first columns and rows are those of the others."""
        most: dict[str, int] = {}
        for at_ratio in ranks.values():
            for name, rank in at_ratio.items():
                most[name] = max(rank, most.get(name, 0))
        factors: dict[str, Pair] = {}
        layers = {name: self._targets[name] for name in most}
        with closing(whitened_groups(self._model, self._batches, layers)) as groups:
            for name, (u, sigma, v) in tqdm(groups, "Factorizing", total=len(most), unit="layer", delay=10):
                rank = most[name]
                factors[name] = (u[:rank].t() * sigma[:rank], v[:rank].clone())
        return factors

    def _row(self, names: list[str], ranks: dict[str, int], factors: dict[str, Pair], dense: _Losses) -> list[float]:
        losses = dense
        if any(name in ranks for name in names):
            losses = self._losses({name: ranks[name] for name in names if name in ranks}, factors)
        total_rank = before = after = 0
        for name in names:
            shape = dense_weight(self._targets[name]).shape
            rank = ranks.get(name, min(shape))
            total_rank, before = total_rank + rank, before + shape.numel()
            after += rank * sum(shape) if name in ranks else shape.numel()
        increase = losses.mean - dense.mean
        return [total_rank, before, after, losses.mean, increase, losses.standard_error(dense)]

    def _losses(self, ranks: dict[str, int], factors: dict[str, Pair]) -> _Losses:
        """Of each batch, with these layers at these ranks and all others dense."""
        smaller = {
            self._targets[name]: truncated(self._targets[name], *factors[name], rank) for name, rank in ranks.items()
        }
        with exchanged_for_a_while(self._model) as exchange:
            for layer, module in smaller.items():
                exchange(layer, module)
            values = [
                returned_loss(self._model, batch, f"batch {number}").item()
                for number, batch in enumerate(self._batches, start=1)
            ]
        return _Losses(values, self._rows)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
