"""Figures of what a compressed model holds, and of how it came there, with matplotlib: the extra named `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from ..options import how_to_install
from .generated import picture_metadata
from .sensitivity import ALL_LAYERS, alone_at, middle_ratio, standing_out

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
except ImportError as error:
    raise ImportError(f"Figures need matplotlib: {how_to_install('plots')}.") from error

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

DENSE_EDGE = "tab:red"


def rank_heatmap(report: pd.DataFrame) -> Figure:
    """
    Draw what [`rank_report`] found: a column for each block, a row for each matrix type, the rank in a cell.

    The colour is the rank as a part of the full rank. Layers that stay one dense matrix have a red frame.

    Example:

    ```python
    >>> rank_heatmap(rank_report(model)).savefig("ranks.png")
    ```
    """
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    image = draw_ranks(axes, report)
    rows, columns = image.get_size()
    figure.set_size_inches(4 + 0.42 * columns, 1.6 + 0.34 * rows)
    figure.colorbar(image, ax=axes, label="rank / full rank", pad=0.01)
    axes.set_title("Rank of each layer")
    if axes.patches:
        figure.legend(handles=[dense_patch()], loc="outside lower right", frameon=False)
    return figure


def history_figure(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """
    Draw a training over its steps: the budget and what remained of the groups and of the parameters, and the loss.

    Args:
        log_history: of the `Trainer`'s state, or of the file `trainer_state.json` in a checkpoint.

    Raises:
        ValueError: no row tells a budget.

    Example:

    ```python
    >>> history_figure(trainer.state.log_history).savefig("history.png")
    ```
    """
    rows = [row for row in log_history if "rank_budget" in row]
    if not rows:
        raise ValueError(
            "The log history names no rank_budget, so there is nothing to draw: was the model trained with the "
            "RankDynaCallback, and logging_steps smaller than all steps?"
        )
    steps, budget = [row["step"] for row in rows], np.array([row["rank_budget"] for row in rows])
    remaining = {
        unit: np.array([row[f"remaining_{unit}"] for row in rows], dtype=float) for unit in ("groups", "parameters")
    }
    # The budget is in the unit that follows it.
    unit_of_budget = min(remaining, key=lambda unit: float(np.abs(remaining[unit] - budget).sum()))

    figure = Figure(figsize=(7, 7.5), layout="constrained")
    panels = figure.subplots(3, sharex=True)
    for axes, unit in zip(panels, remaining, strict=False):
        if unit == unit_of_budget:
            axes.plot(steps, budget, "--", color="black", label="budget")
        axes.plot(steps, remaining[unit], marker=".", label=f"remaining {unit}")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
    losses = {"loss": "training"} | _evaluation_losses(log_history)
    for name, label in losses.items():
        points = [(row["step"], row[name]) for row in log_history if name in row]
        panels[-1].plot(*zip(*points, strict=True), marker=".", label=label)
    panels[-1].set_ylabel("loss")
    panels[-1].set_xlabel("optimizer step")
    for axes in panels:
        axes.legend(frameon=False)
    return figure


def as_png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    png = BytesIO()
    figure.savefig(png, format="png", metadata=picture_metadata("png"))
    return png.getvalue()


def draw_ranks(axes: Axes, report: pd.DataFrame, largest_share: float = 1.0) -> AxesImage:
    """
    Draw the cells of [`rank_heatmap`].

    Args:
        axes: empty.
        report: from [`rank_report`].
        largest_share: the part of the full rank that has the darkest colour.
    """
    if report.empty:
        raise ValueError("The report names no layer, so there is nothing to draw: was the model compressed?")
    grid = _Grid([str(name) for name in report.index])
    axes.set_facecolor("lightgrey")
    shares = np.full(grid.shape, np.nan)
    for (y, x), rank, full_rank, form in zip(
        grid.places, report["rank"], report["full_rank"], report["form"], strict=True
    ):
        shares[y, x] = rank / full_rank
        ink = "white" if shares[y, x] > 0.55 * largest_share else "black"
        axes.text(x, y, str(rank), ha="center", va="center", fontsize=8, color=ink)
        if form == "dense":
            axes.add_patch(_frame(x, y))

    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=largest_share, aspect="auto")
    grid.label(axes)
    return image


def sensitivity_heatmap(costs: pd.DataFrame) -> Figure:
    """
    Draw what [`layer_sensitivity`] measured: a panel for each ratio, with a column for each block and a row for each
    matrix type. A cell says how much the loss rises if this layer alone is truncated.

    The colour goes from no rise to the largest of the panel. Layers that stand out have a red frame.
    """
    out = standing_out(costs)
    names = [str(name) for name in alone_at(costs, middle_ratio(costs)).index]
    ratios = [float(ratio) for ratio in costs.index.unique("param_ratio")]
    grid = _Grid(names)
    height, width = grid.shape
    figure = Figure(figsize=(4 + 0.5 * width, len(ratios) * (1.2 + 0.34 * height)), layout="constrained")
    for axes, ratio in zip(np.atleast_1d(figure.subplots(len(ratios))), ratios, strict=True):
        rises = alone_at(costs, ratio)["increase"]
        highest = max(float(rises.max()), np.finfo(float).tiny)
        values = np.full(grid.shape, np.nan)
        axes.set_facecolor("lightgrey")
        for (y, x), name in zip(grid.places, names, strict=True):
            values[y, x] = rises[name]
            ink = "white" if values[y, x] > 0.55 * highest else "black"
            axes.text(x, y, f"{rises[name]:z.3f}", ha="center", va="center", fontsize=7, color=ink)
            if name in out:
                axes.add_patch(_frame(x, y))
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
        grid.label(axes)
        together = float(costs["increase"][ALL_LAYERS, ratio])
        axes.set_title(f"{ratio:g} of a layer's parameters kept (all layers together: {together:+.3f})", fontsize=9)
        figure.colorbar(image, ax=axes, label="rise of the loss", pad=0.01)
    if out:
        framed = Patch(facecolor="none", edgecolor=DENSE_EDGE, label=f"stands out at {middle_ratio(costs):g}")
        figure.legend(handles=[framed], loc="outside lower right", frameon=False)
    return figure


def dense_patch() -> Patch:
    """For a legend: the frame of a layer that stays one dense matrix."""
    return Patch(facecolor="none", edgecolor=DENSE_EDGE, label="one dense matrix")


class _Grid:
    """Where the layers of these names are drawn: a row for each matrix type, a column for each block."""

    def __init__(self, names: list[str]) -> None:
        cells = _cells(names)
        self._rows = list(dict.fromkeys(row for row, _ in cells))
        # Layers outside the numbered blocks share one column, behind the blocks.
        self._columns = sorted({block for _, block in cells}, key=lambda block: (block is None, block))
        self.shape = len(self._rows), len(self._columns)
        self.places = [(self._rows.index(row), self._columns.index(block)) for row, block in cells]

    def label(self, axes: Axes) -> None:
        axes.set_xticks(
            range(len(self._columns)), ["none" if block is None else str(block) for block in self._columns]
        )
        axes.set_yticks(range(len(self._rows)), _without_common_prefix(self._rows))
        axes.set_xlabel("block")
        axes.set_ylabel("matrix")


def _frame(x: int, y: int) -> Rectangle:
    return Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, edgecolor=DENSE_EDGE)


def _cells(names: list[str]) -> list[tuple[str, int | None]]:
    """For each module name its matrix type, `*` in the place of the block number, and that number."""
    families: dict[str, list[list[str]]] = {}
    for name in names:
        families.setdefault(_family(name), []).append(name.split("."))

    cells: list[tuple[str, int | None]] = []
    for name in names:
        parts, relatives = name.split("."), families[_family(name)]
        numbered = [i for i, part in enumerate(parts) if part.isdecimal()]
        # Names may hold more numbers (T5's sub-layers, experts): the outermost that varies counts the blocks.
        varying = [i for i in numbered if len({relative[i] for relative in relatives}) > 1]
        if not numbered:
            cells.append((name, None))
            continue
        i = (varying or numbered)[0]
        cells.append((".".join([*parts[:i], "*", *parts[i + 1 :]]), int(parts[i])))
    return cells


def _family(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _without_common_prefix(rows: list[str]) -> list[str]:
    split = [row.split(".") for row in rows]
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    return [".".join(parts[shared:]) for parts in split]


def _evaluation_losses(log_history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    names = dict.fromkeys(name for row in log_history for name in row)
    return {name: name.removesuffix("_loss") for name in names if name.startswith("eval_") and name.endswith("_loss")}
