"""The paper's figures from the cells of a scale: what each needs is run, and its numbers are written beside it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from rankdyna_trainer import RankDynaConfig

from .cells import DENSE, GLOBAL, LOCAL, Grid
from .figures import bins_of, figure1, figure2_loss, figure2_scores, figure3, figure4, portions
from .markdown import table
from .studies import importance_positions, kept_groups
from .study_data import kept, request_of_cell, run_of_request, training_batches

FIGURES = ("figure1", "figure2", "figure3", "figure4", "figure6", "figure7", "figure8")
TITLES = {"cola": "CoLA", "conll2003": "CoNLL-2003", "mnli": "MNLI", "mrpc": "MRPC", "qnli": "QNLI", "qqp": "QQP"}
TITLES |= {"rte": "RTE", "sst2": "SST-2", "stsb": "STS-B", "wnut17": "WNUT-17"}
TITLES |= {"ptb": "PTB", "samsum": "SAMSum", "wikitext2": "WikiText-2"}
METRICS = {
    "pearson": "Pearson",
    "spearmanr": "Spearman correlation (mean)",
    "matthews_correlation": "Matthews correlation",
}
SCOPES = {"global": GLOBAL, "local": LOCAL}
BINS = 14
AFTER_REMOVAL = 5  # steps, in which the scores forget half of what was before

Drawn = tuple[dict[str, Figure], str]


def make_figure(name: str, grid: Grid, output: Path) -> list[Path]:
    """
    Make a figure of the paper, and run what it needs and is not there yet.

    Args:
        name: one of [`FIGURES`].
        grid: the cells. What figures 1 and 4 look at is kept in its folder too, under `studies`.
        output: the folder for the files.

    Returns:
        `<name>.png` and `<name>.svg` (of figure 2 `figure2a` and `figure2b`), and `<name>.md` with the numbers.
    """
    makers: dict[str, Callable[[Grid], Drawn]] = {"figure1": _figure1, "figure2": _figure2, "figure4": _figure4}
    figures, text = makers[name](grid) if name in makers else _heatmaps(name, grid)
    paths = save_figures(name, figures, output)
    paths.append(output / f"{name}.md")
    paths[-1].write_text(text, encoding="utf-8")
    return paths


def save_figures(name: str, figures: dict[str, Figure], output: Path) -> list[Path]:
    """Write figures, by the stem of their files, as PNG and SVG: the same data give the same files."""
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context({"svg.hashsalt": name}):  # no date in it, and no random names
        for stem, figure in figures.items():
            for suffix, options in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
                paths.append(output / f"{stem}{suffix}")
                figure.savefig(paths[-1], **options)
    return paths


def _figure1(grid: Grid) -> Drawn:
    task, seed, scale = grid.scale.ablation, grid.scale.seeds[0], grid.scale
    grid.cell(task, DENSE, seed=seed)
    request, studies = request_of_cell(grid, task, DENSE, 1.0, seed), grid.folder / "studies"

    def positions(removal_step: int | None) -> dict[str, Any]:
        run = run_of_request(request, studies, grid.cell_folder(task, DENSE, 1.0, seed))
        batches, rate = training_batches(run, seed), run.training.learning_rate
        return importance_positions(run.model, batches, scale.study_steps, removal_step, learning_rate=rate)

    found = {}
    for part, step in (("with", scale.removal_step), ("without", None)):
        path = studies / f"figure1-{task}-seed{seed}-{part}-removal.json"
        chosen = {"request": request, "steps": scale.study_steps, "removal_step": step}
        found[part] = kept(path, chosen, lambda step=step: positions(step))  # type: ignore[misc]
    title = (
        f"Figure 1: importance of singular groups in further fine-tuning on {TITLES[task]} ({found['with']['block']})"
    )
    step, rows = scale.removal_step, []
    for part, run in found.items():
        for kind, matrix in run["matrices"].items():
            # The first movement is that of step 2, and step + 1 is the first after the removal.
            moves, after = matrix["movement"], step - 1
            spans = (moves[:after], moves[after : after + AFTER_REMOVAL], moves[after + AFTER_REMOVAL :])
            means = [f"{100 * fmean(span):.2f}" if span else "" for span in spans]
            ends = ", ".join(f"{group}: {100 * path[-1]:.0f}" for group, path in matrix["positions"].items())
            rows.append([kind, part, *means, ends])
    header = ["matrix", "removal", f"steps 2 to {step}", f"the next {AFTER_REMOVAL}", "later", "places at the end"]
    removed = found["with"]["removed"]
    text = (
        f"# {title}\n\nHow far a group's place by importance moves in a step, in percent of all places, on average "
        f"over all groups of the matrix; and where the chosen groups end (group: place in percent). After step {step}"
        f", {sum(removed.values())} groups of {len(removed)} matrices are removed.\n\n"
    )
    return {"figure1": figure1(found["with"], found["without"], title)}, text + table(header, rows)


def _figure2(grid: Grid) -> Drawn:
    task, scale = grid.scale.ablation, grid.scale
    smallest = min(scale.ratios)
    scores, history = [], []
    for seed in scale.seeds:
        for ratio in scale.ratios:
            for scope, method in SCOPES.items():
                run = grid.cell(task, method, ratio, seed)
                parameters = run["target_parameter_ratio"]
                scores.append([scope, ratio, seed, parameters, grid.score(task, run)])
                if ratio == smallest:
                    logged = [entry for entry in run["history"] if "loss" in entry and "rank_budget" in entry]
                    history += [[scope, seed, entry["step"], entry["loss"], entry["rank_budget"]] for entry in logged]
    runs = pd.DataFrame(scores, columns=["scope", "ratio", "seed", "parameters", "score"])
    losses = pd.DataFrame(history, columns=["scope", "seed", "step", "loss", "rank_budget"])
    metrics = " and ".join(METRICS.get(metric, metric) for metric in scale.tasks[task].metrics)
    a, b = (
        f"Figure 2a: global and local rank allocation on {TITLES[task]}",
        f"Figure 2b: training loss on {TITLES[task]}",
    )
    b += f" at rank ratio {smallest:g} (mean of {len(scale.seeds)} seeds)" if len(scale.seeds) > 1 else ""
    figures = {"figure2a": figure2_scores(runs, a, f"{metrics}, %"), "figure2b": figure2_loss(losses, b)}

    rows = []
    for key, group in runs.groupby(["ratio", "scope"]):
        spread = f"{group['score'].std():.1f}" if len(group) > 1 else ""
        each = ", ".join(f"{value:.1f}" for value in group["score"])
        means = [f"{group['score'].mean():.1f}", spread, f"{group['parameters'].mean():.3f}"]
        rows.append([*map(str, key), *means, each])
    header = ["rank ratio", "scope", f"{metrics}, %", "standard deviation", "part of the parameters", "of each seed"]
    text = f"# {a}\n\n{table(header, rows)}\n# {b}\n\nThe mean of the logged training losses.\n\n"
    rows = []
    for scope_name, group in losses.groupby("scope"):
        final = group["rank_budget"] == group["rank_budget"].min()
        rows.append([str(scope_name), *(f"{group[part]['loss'].mean():.4f}" for part in (~final, final))])
    return figures, text + table(["scope", "before the final budget", "at the final budget"], rows)


def _heatmaps(name: str, grid: Grid) -> Drawn:
    task, seed = grid.scale.heatmaps[name], grid.scale.seeds[0]
    reports, rows = {}, []
    for ratio in grid.scale.heatmap_ratios:
        run = grid.cell(task, GLOBAL, ratio, seed)
        report = pd.DataFrame.from_dict(run["layers"], orient="index")
        reports[f"rank ratio {ratio:g}: {run['target_parameter_ratio']:.0%} of the linear parameters"] = report
        for layer, rank, full in zip(report.index, report["rank"], report["full_rank"], strict=True):
            rows.append([f"{ratio:g}", str(layer), str(rank), str(full), f"{ratio * full:.0f}"])
    title = f"Figure {name.removeprefix('figure')}: the rank that RankDyna leaves to each matrix on {TITLES[task]}"
    header = ["rank ratio", "layer", "rank", "full rank", "rank if all had the same part"]
    return {name: figure3(reports, title)}, f"# {title}\n\n{table(header, rows)}"


def _figure4(grid: Grid) -> Drawn:
    task, ratio, seed = grid.scale.selection, grid.scale.ratio, grid.scale.seeds[0]
    cell = grid.cell(task, GLOBAL, ratio, seed)
    request, studies = request_of_cell(grid, task, GLOBAL, ratio, seed), grid.folder / "studies"
    steps: int = cell["steps"]["final"]

    def groups() -> dict[str, Any]:
        run = run_of_request(request, studies)
        config = cast(RankDynaConfig, run.rankdyna)
        if run.final_step is not None:
            config = dataclasses.replace(config, rank_cooldown_steps=float(steps - run.final_step))
        batches, rate = training_batches(run, seed), run.training.learning_rate
        return kept_groups(run.model, batches, config, steps, learning_rate=rate)

    path = studies / f"figure4-{task}-{ratio:g}-seed{seed}.json"
    found = kept(path, {"request": request, "steps": steps}, groups)
    # The paper looks at the last block. Its value matrix may have lost every group, which would be nothing to look at.
    layers: dict[str, Any] = found["layers"]
    name = next((layer for layer in reversed(layers) if layers[layer]["kept"]), list(layers)[-1])
    values, chosen = layers[name]["singular_values"], layers[name]["kept"]
    title = f"Figure 4: which groups remain of {name} on {TITLES[task]} (rank ratio {ratio:g})"
    rows = []
    members = bins_of(len(values), BINS)
    for part, svd, own in zip(members, portions(range(len(chosen)), members), portions(chosen, members), strict=True):
        size = f"{fmean(values[i] for i in part):.4g}"
        rows.append([f"{part[0] + 1} to {part[-1] + 1}", size, f"{svd:.2f}", f"{own:.2f}"])
    header = ["groups by singular value", "mean singular value", "kept by SVD", "kept by RankDyna"]
    kept_of_all = [[layer, str(len(layers[layer]["kept"])), _shared(layers[layer]["kept"])] for layer in layers]
    text = (
        f"# {title}\n\n{table(header, rows)}\nAll value matrices, and how many of the groups that RankDyna keeps are "
        "among as many with the largest singular values:\n\n"
    )
    return {"figure4": figure4(values, chosen, title, BINS)}, text + table(["layer", "kept", "shared"], kept_of_all)


def _shared(chosen: Sequence[int]) -> str:
    return str(sum(group < len(chosen) for group in chosen))
