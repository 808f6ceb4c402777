"""The paper's figures, drawn from data: nothing is run or read here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rankdyna_trainer.report.plots import dense_patch, draw_ranks

# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLACK, BLUE, GREEN, ORANGE, VERMILION = "#000000", "#0072B2", "#009E73", "#E69F00", "#D55E00"
LINES = ((BLACK, "-"), (BLUE, "--"), (ORANGE, "-"), (VERMILION, ":"))
SCOPES: dict[str, dict[str, Any]] = {
    "global": {"color": GREEN, "marker": "o", "linestyle": "-", "label": "global: groups compete in the whole model"},
    "local": {"color": BLUE, "marker": "s", "linestyle": "--", "label": "local: the same ratio in each matrix"},
}
NAMES = {f"W_{name}": f"$W_{{{name}}}$" for name in ("q", "k", "v", "o")} | {
    f"W_f{i}": f"$W_{{f_{i}}}$" for i in (1, 2)
}
SVD_COLOUR, RANKDYNA_COLOUR = GREEN, VERMILION


def figure1(removed: Mapping[str, Any], untouched: Mapping[str, Any], title: str) -> Figure:
    """
    Where a few groups stand by importance, at each step: a row with the removal and one without, a column a matrix.

    Args:
        removed: from [`importance_positions`], with a `removal_step`.
        untouched: the same run without it.
        title: of the figure.
    """
    kinds = list(removed["matrices"])
    figure = Figure(figsize=(1 + 4.6 * len(kinds), 7.2), layout="constrained")
    all_axes = figure.subplots(2, len(kinds), sharex=True, sharey=True, squeeze=False)
    step = removed["removal_step"]
    removal = f"{removed['removed_part']:.0%} of the groups of other matrices removed"
    headings = ("with the removal", "without any removal")
    for row, (run, heading) in enumerate(zip((removed, untouched), headings, strict=True)):
        for axes, kind in zip(all_axes[row], kinds, strict=True):
            matrix = run["matrices"][kind]
            steps = range(1, run["steps"] + 1)
            for (group, positions), (colour, style) in zip(matrix["positions"].items(), _styles(), strict=False):
                axes.plot(steps, positions, style, color=colour, linewidth=1.3, label=f"group {group}")
            if run["removal_step"] is not None:
                axes.axvline(step, color="grey", linestyle="-.", linewidth=1.5, label=removal)
            axes.set_title(f"{NAMES.get(kind, kind)} ({matrix['groups']} groups), {heading}", fontsize=10)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.grid(alpha=0.3)
    for axes in all_axes[-1]:
        axes.set_xlabel("optimizer step")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("place by importance\n(0 %: most important, 100 %: least)")
    matrices = [matrix for run in (removed, untouched) for matrix in run["matrices"].values()]
    lowest = max(place for matrix in matrices for places in matrix["positions"].values() for place in places)
    all_axes[0, 0].set_ylim(min(1.02, lowest + 0.05), -0.02)
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    legend_title = "groups, numbered by their importance at step 1"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), title=legend_title, frameon=False)
    figure.suptitle(title)
    return figure


def figure2_scores(runs: pd.DataFrame, title: str, score: str) -> Figure:
    """
    The score of both scopes, over the rank ratio and over the parameters that this leaves: means and spreads of seeds.

    Args:
        runs: a row a run, with the columns `scope` (`global`, `local`), `ratio`, `seed`, `parameters` (the part of the
            target layers' parameters that is kept) and `score`.
        title: of the figure.
        score: what the score is, with its unit.
    """
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for scope, style in SCOPES.items():
        groups = runs[runs["scope"] == scope].groupby("ratio")[["score", "parameters"]]
        means, spreads = groups.mean(), groups.std(ddof=1)["score"].fillna(0.0)
        for axes, places in ((left, means.index), (right, means["parameters"])):
            axes.errorbar(places, means["score"], spreads, capsize=4, **style)
    left.set_xlabel("rank ratio (part of the singular groups that remains)")
    right.set_xlabel("part of the linear layers' parameters that remains")
    left.set_ylabel(score)
    for axes, heading in ((left, "by rank budget"), (right, "the same runs, by size")):
        axes.set_title(heading, fontsize=10)
        axes.grid(alpha=0.3)
    ratios = sorted(set(runs["ratio"]))
    left.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    _legend_below(figure, [left], 2)
    seeds = runs["seed"].nunique()
    figure.suptitle(f"{title} (mean and standard deviation of {seeds} seeds)" if seeds > 1 else f"{title} (one seed)")
    return figure


def figure2_loss(history: pd.DataFrame, title: str, window: int = 5) -> Figure:
    """
    The training loss of both scopes and the rank budget, over the optimizer steps.

    Args:
        history: a row a logged step of a run, with the columns `scope`, `seed`, `step`, `loss` and `rank_budget`.
        title: of the figure.
        window: over how many logged steps each loss is averaged, after the average over the seeds.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    budget_axes = axes.twinx()
    for scope, style in SCOPES.items():
        losses = history[history["scope"] == scope].groupby("step")["loss"].mean()
        smooth = losses.rolling(window, center=True, min_periods=1).mean()
        axes.plot(smooth.index, smooth, **(style | {"marker": ""}))
    budget = history[history["scope"] == "global"].groupby("step")["rank_budget"].mean()
    budget_axes.plot(budget.index, budget, color=VERMILION, linestyle="-.", label="rank budget (right axis)")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"training loss (mean of {window} logged steps)" if window > 1 else "training loss")
    budget_axes.set_ylabel("rank budget (singular groups)")
    budget_axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    _legend_below(figure, [axes, budget_axes], 2)
    figure.suptitle(title)
    return figure


def figure3(reports: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """
    The rank of each layer, side by side for several runs, in one scale of colours.

    Args:
        reports: by heading, what [`rank_report`] says of a model.
        title: of the figure.
    """
    figure = Figure(layout="constrained")
    all_axes = figure.subplots(1, len(reports), squeeze=False)[0]
    largest = max(float((report["rank"] / report["full_rank"]).max()) for report in reports.values()) or 1.0
    image = None
    for axes, (heading, report) in zip(all_axes, reports.items(), strict=True):
        image = draw_ranks(axes, report, largest)
        axes.set_title(heading, fontsize=10)
    if image is not None:
        rows, columns = image.get_size()
        width = len(reports) * max(4.6, 2.4 + 0.42 * columns) + 1
        figure.set_size_inches(width, 2.2 + 0.36 * rows)
        figure.colorbar(image, ax=list(all_axes), label="rank / full rank", pad=0.01)
    if any(axes.patches for axes in all_axes):
        figure.legend(handles=[dense_patch()], loc="outside lower right", frameon=False)
    figure.suptitle(title)
    return figure


def figure4(singular_values: Sequence[float], kept: Sequence[int], title: str, bins: int = 14) -> Figure:
    """
    Which groups SVD keeps and which RankDyna does, as parts of bins of groups in the order of their singular values.

    Args:
        singular_values: of the matrix before the run, largest first.
        kept: the groups that RankDyna kept, by their place among these, beginning with 0.
        title: of the figure.
        bins: at most so many.
    """
    members = bins_of(len(singular_values), bins)
    figure = Figure(figsize=(2.5 + 0.65 * len(members), 6.4), layout="constrained")
    all_axes = figure.subplots(2, 1, sharex=True, sharey=True)
    choices = {
        "SVD": (range(len(kept)), SVD_COLOUR, f"SVD keeps the {len(kept)} largest singular values"),
        "RankDyna": (kept, RANKDYNA_COLOUR, f"RankDyna keeps {len(kept)} groups by their importance"),
    }
    for axes, (method, (chosen, colour, heading)) in zip(all_axes, choices.items(), strict=True):
        heights = portions(chosen, members)
        axes.bar(range(len(members)), [1.0] * len(members), color="#E6E6E6", edgecolor="grey", label="removed")
        axes.bar(range(len(members)), heights, color=colour, edgecolor="black", label=f"kept by {method}")
        axes.set_title(heading, fontsize=10)
        axes.set_ylabel("part of the bin's groups")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1)
    means = [np.mean([singular_values[i] for i in part]) for part in members]
    labels = [f"{part[0] + 1}\u2013{part[-1] + 1}\n{mean:.3g}" for part, mean in zip(members, means, strict=True)]
    all_axes[1].set_xticks(range(len(members)), labels, fontsize=8)
    all_axes[1].set_xlabel("groups by singular value before the run, largest first (below: the mean singular value)")
    _legend_below(figure, all_axes, 3)
    figure.suptitle(title)
    return figure


def bins_of(count: int, bins: int) -> list[range]:
    """So many numbers as bins of consecutive ones, at most `bins`, all but the last of one size: 55 of 768 in 14."""
    size = math.ceil(count / bins)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def portions(kept: Iterable[int], bins: Sequence[range]) -> list[float]:
    """The part of each bin that is kept."""
    chosen = set(kept)
    return [len(chosen.intersection(members)) / len(members) for members in bins]


def _styles() -> list[tuple[str, str]]:
    """More than anyone will draw: with the fifth line the colours begin again, in other strokes."""
    return [*LINES, *((colour, "-.") for colour, _ in LINES)]


def _legend_below(figure: Figure, all_axes: Iterable[Axes], columns: int) -> None:
    found: dict[str, Any] = {}
    for axes in all_axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False)


def frontier_figure(runs: pd.DataFrame, styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """
    What is kept of the dense score over what is kept of the parameters: a panel a task, a line a method, the spread of
    its seeds as a band.

    Args:
        runs: a row a run, with the columns `task`, `row`, `seed`, `ratio`, `parameters` and `kept` (in percent).
        styles: by row, how it is drawn; a row without a style is left out.
    """
    tasks = list(dict.fromkeys(runs["task"]))
    figure = Figure(figsize=(1 + 3.6 * len(tasks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for row, style in styles.items():
            sizes = runs[(runs["task"] == task) & (runs["row"] == row)].groupby("ratio")
            places, kept = sizes["parameters"].mean(), sizes["kept"]
            axes.plot(places, kept.mean(), label=row, **style)
            axes.fill_between(places, kept.min(), kept.max(), color=style["color"], alpha=0.15, linewidth=0)
        axes.axhline(100, color="grey", linewidth=0.8)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("part of the target layers' parameters")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("part of the dense score")
    panels[0].yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    return figure
