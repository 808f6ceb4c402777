"""What was kept, and where: tables of a model's compressed layers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ..layers.dense import DenseLayer, dense_weight, kept_dense_rank
from ..layers.low_rank import LowRankLinear
from ..layers.singular_group import SingularGroupLinear

# Imported where a table is made: loading a model needs none.
if TYPE_CHECKING:
    import pandas as pd

    from ..method.algorithm import RankDyna

if sys.platform != "win32":
    import resource

COLUMNS = ["out_features", "in_features", "full_rank", "rank", "dense_parameters", "parameters", "form"]


def rank_report(model: nn.Module) -> pd.DataFrame:
    """
    What each target layer holds, in training, after [`compact`], or loaded from a checkpoint.

    Args:
        model: with singular groups, or compacted.

    Returns:
        A row a layer, by name, with the columns `out_features`, `in_features`, `full_rank` (groups of the dense
        weight), `rank` (groups that remain), `dense_parameters` (numbers in the dense weight), `parameters` (numbers
        in the weight as it is or will be compacted, without the bias) and `form`: `"singular groups"`, `"low rank"`
        or `"dense"` (kept dense, since P and Q would hold more).

    Raises:
        ValueError: the model has no compressed layers.
    """
    import pandas as pd

    rows: dict[str, list[int | str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SingularGroupLinear):
            rows[name] = _row(module, module.rank, module.parameters_when_compacted, "singular groups")
        elif isinstance(module, LowRankLinear):
            rows[name] = _row(module, module.rank, module.rank * module.group_parameters, "low rank")
        elif isinstance(rank := kept_dense_rank(module), int):
            out_features, in_features = dense_weight(cast(DenseLayer, module)).shape
            full_rank, size = min(out_features, in_features), out_features * in_features
            rows[name] = [out_features, in_features, full_rank, rank, size, size, "dense"]
    if not rows:
        raise ValueError(f"This {type(model).__name__} has no compressed layers to report.")
    return pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS).rename_axis("layer")


@dataclass(frozen=True)
class CompressionSummary:
    """
    The size of a compressed model beside that of the dense model it stands for, in numbers (parameters).

    Attributes:
        target_parameters: of the weights of the target layers, in P and Q (or dense where that is smaller).
        dense_target_parameters: of the same weights before.
        all_parameters: of the whole model, compacted.
        dense_all_parameters: of the whole model before.
        layers: how many target layers there are.
        layers_at_rank_zero: of which only the bias remains.
        layers_kept_dense: for which P and Q would hold more numbers than the weight.
    """

    target_parameters: int
    dense_target_parameters: int
    all_parameters: int
    dense_all_parameters: int
    layers: int
    layers_at_rank_zero: int
    layers_kept_dense: int

    @property
    def target_ratio(self) -> float:
        """The part of the target layers' parameters that is kept."""
        return self.target_parameters / self.dense_target_parameters

    @property
    def all_ratio(self) -> float:
        """The part of all parameters that is kept."""
        return self.all_parameters / self.dense_all_parameters

    @property
    def layers_in_words(self) -> str:
        """How many layers have nothing left, and how many stayed whole."""
        return (
            f"layers at rank 0: {self.layers_at_rank_zero} of {self.layers}, "
            f"kept dense: {self.layers_kept_dense} of {self.layers}"
        )

    def dense_bytes(self, file_bytes: int) -> int:
        """What the weights of the dense model take, if those of this one take `file_bytes`."""
        return round(file_bytes * self.dense_all_parameters / self.all_parameters)


def compression_summary(model: nn.Module) -> CompressionSummary:
    """
    Sum up [`rank_report`], with all other parameters of the model.

    Raises:
        ValueError: the model has no compressed layers.
    """
    report = rank_report(model)
    target, dense_target = int(report["parameters"].sum()), int(report["dense_parameters"].sum())
    held = sum(
        sum(factor.numel() for factor in module.factors().values())
        if isinstance(module, SingularGroupLinear)
        else sum(factor.numel() for factor in module.factors())
        for module in model.modules()
        if isinstance(module, (SingularGroupLinear, LowRankLinear))
    )
    held += int(report.loc[report["form"] == "dense", "parameters"].sum())
    others = sum(parameter.numel() for parameter in model.parameters()) - held
    in_factors = report["rank"] * (report["out_features"] + report["in_features"])
    return CompressionSummary(
        target_parameters=target,
        dense_target_parameters=dense_target,
        all_parameters=target + others,
        dense_all_parameters=dense_target + others,
        layers=len(report),
        layers_at_rank_zero=int((report["rank"] == 0).sum()),
        layers_kept_dense=int((in_factors > report["dense_parameters"]).sum()),
    )


def parameters_elsewhere(rankdyna: RankDyna) -> int:
    """The numbers of a model in training that are in none of its target layers' weights."""
    dense = rankdyna.remaining_parameters  # as long as there are no groups yet
    held = sum(factor.numel() for layer in rankdyna.layers for factor in layer.factors().values()) or dense
    return sum(parameter.numel() for parameter in rankdyna.model.parameters()) - held


def kept_share(rankdyna: RankDyna) -> float:
    """Which part of the target layers' parameters is left, if the model were compacted now."""
    return rankdyna.remaining_parameters / sum(out * into for out, into in rankdyna.rank_budget.shapes)


def kept_shares(rankdyna: RankDyna) -> dict[str, float]:
    """
    How much of a model in training is left, if it were compacted now.

    Returns:
        `kept`, the part of the target layers' parameters, and `kept_of_all`, that of the whole model's. Both are parts
        of the dense model's, and fall to what the end of the run will show.
    """
    now, dense = rankdyna.remaining_parameters, sum(out * into for out, into in rankdyna.rank_budget.shapes)
    others = parameters_elsewhere(rankdyna)
    return {"kept": kept_share(rankdyna), "kept_of_all": (now + others) / (dense + others)}


def remaining_counts(rankdyna: RankDyna, step: int) -> dict[str, int]:
    """What a run holds after a step, in whole numbers: its `rank_budget`, groups and parameters."""
    return {
        "rank_budget": rankdyna.budget(step),
        "remaining_groups": rankdyna.remaining_groups,
        "remaining_parameters": rankdyna.remaining_parameters,
    }


def peak_memory(device: torch.device) -> int | None:
    """
    The most bytes that this process has held so far: on the device if it is a CUDA GPU, else in main memory.

    Returns:
        `None` on Windows, which does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _row(layer: SingularGroupLinear | LowRankLinear, rank: int, parameters: int, form: str) -> list[int | str]:
    shape = [layer.out_features, layer.in_features, layer.full_rank]
    return [*shape, rank, layer.dense_parameters, parameters, form]
