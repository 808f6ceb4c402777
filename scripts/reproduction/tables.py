"""The paper's tables, in Markdown, with its own numbers beside ours."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
from tasks.presets import EPOCHS, IMPORTANCE_BETA, LEARNING_RATE, PRESETS

from . import paper_results as paper
from .cells import BASELINES, DENSE, EQUAL_PARAMETERS, GLOBAL, LOCAL, METHODS, Grid
from .markdown import table_of_records
from .score_magnitudes import score_magnitudes
from .side_by_side import Cell
from .study_data import kept, request_of_cell, run_of_request, training_batches

NAMES = {
    DENSE: "dense",
    "svd": "SVD",
    "fwsvd": "FWSVD",
    "tfwsvd": "TFWSVD",
    LOCAL: "RankDyna, local",
    GLOBAL: "RankDyna",
    EQUAL_PARAMETERS: "RankDyna, equal parameters",
}
# What is compared with what: at one rank ratio, as in the paper, and at one number of parameters.
COMPARISONS = {
    "the same rank ratio": (*BASELINES, LOCAL, GLOBAL),
    "the same number of parameters": (*BASELINES, LOCAL, EQUAL_PARAMETERS),
}
AVERAGE = "average"
# The paper's methods, and RankDyna with the parameters of the others.
AT_ONE_RATIO = (DENSE, *BASELINES, GLOBAL, EQUAL_PARAMETERS)


def table1(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """Methods, ratios and tasks, and the order of the methods, in both comparisons; then what is run only once."""
    once = [task for task in tasks if task in grid.scale.table1_once]
    parts = _at_all_ratios(grid, [task for task in tasks if task not in once], seeds)
    for task in once:
        parts += [
            f"## {task}, rank ratio {grid.scale.ratio:g}, one seed",
            table_of_records(_once(grid, task, seeds[0])),
        ]
    return "\n\n".join(parts)


def _at_all_ratios(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> list[str]:
    if not tasks:
        return []
    results = _results(grid, tasks, seeds)
    columns = [*tasks, AVERAGE] if len(tasks) > 1 else list(tasks)
    rows: list[dict[str, Any]] = []
    for (ratio, method), cells in results.groupby(["ratio", "method"], sort=False):
        sizes = {"target parameters": _parts(cells["target"]), "all parameters": _parts(cells["all"])}
        scores = {task: spread(cells[cells["task"] == task]["score"]) for task in columns}
        rows.append({"rank ratio": f"{ratio:g}", "method": NAMES[str(method)]} | sizes | scores)
        if printed := _printed(str(method), float(str(ratio)), tasks):
            rows.append(
                {"rank ratio": f"{ratio:g}", "method": f"{NAMES[str(method)]}, {paper.TABLE1_TITLE}"} | printed
            )
    parts = [
        f"Scores in percent: mean ± standard deviation of {_count(seeds)}. Parameters: what is left of the target "
        "layers' weights, and of the whole model.",
        table_of_records(rows),
    ]
    for comparison, methods in COMPARISONS.items():
        chosen = results[results["method"].isin(methods)]
        parts += [f"## Order of the methods at {comparison}", table_of_records(_order(chosen, columns))]
    return parts


def cells_of_table(name: str, grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All runs of table 1, 2 or 3, those that others need first."""
    once = grid.scale.table1_once if name == "table1" else tasks
    chosen = [
        (method, task, 1.0 if method == DENSE else ratio, seed)
        for task in tasks
        for methods, ratios, each in [
            (AT_ONE_RATIO, (grid.scale.ratio,), seeds[:1])
            if task in once
            else ((DENSE, *METHODS), grid.scale.ratios, seeds)
        ]
        for method in methods
        for ratio in ratios
        for seed in each
    ]
    order = (DENSE, *METHODS)
    return [
        Cell(
            str(grid.cell_folder(task, method, ratio, seed).relative_to(grid.folder)),
            partial(grid.cell, task, method, ratio, seed),
        )
        for method, task, ratio, seed in sorted(dict.fromkeys(chosen), key=lambda cell: order.index(cell[0]))
    ]


def table2(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """Summarization at one rank ratio: ROUGE."""
    rows = []
    for method in AT_ONE_RATIO:
        for task in tasks:
            runs = [grid.cell(task, method, grid.scale.ratio, seed) for seed in seeds]
            row = {"method": NAMES[method], "task": task} | _sizes(runs)
            for i, metric in enumerate(grid.scale.tasks[task].metrics):
                row[metric] = spread(pd.Series([100 * run["scores"]["final"][metric] for run in runs]))
                row[f"{metric}, {paper.TABLE2_TITLE}"] = str(paper.TABLE2[method][i]) if method in paper.TABLE2 else ""
            rows.append(row)
    return f"Rank ratio {grid.scale.ratio:g}; ROUGE in percent; {_count(seeds)}.\n\n{table_of_records(rows)}"


def table3(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """Language modelling at one rank ratio: perplexity."""
    rows = []
    for method in AT_ONE_RATIO:
        row = {"method": NAMES[method]}
        for task in tasks:
            runs = [grid.cell(task, method, grid.scale.ratio, seed) for seed in seeds]
            row |= _sizes(runs) | {task: spread(pd.Series([grid.score(task, run) for run in runs]))}
            row[f"{task}, {paper.TABLE3_TITLE}"] = str(paper.TABLE3.get(method, {}).get(task, ""))
        rows.append(row)
    return (
        f"Rank ratio {grid.scale.ratio:g}; perplexity, lower is better; {_count(seeds)}.\n\n{table_of_records(rows)}"
    )


def table4(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """How large the scores are on fine-tuned models, as means over the numbers of the singular groups."""
    rows = []
    for task in tasks:
        values = _magnitudes(grid, task, seeds[0])
        rows.append({"task": task} | {key: f"{value:.2e}" for key, value in values.items() if "std" not in key})
    rows.append({"task": paper.TABLE4_TITLE} | {key: f"{value:.0e}" for key, value in paper.TABLE4.items()})
    return (
        f"Mean of a score of one number of the singular groups, over the last {grid.scale.table4_steps} steps of a "
        f"fine-tuned model.\n\n{table_of_records(rows)}"
    )


def table5(*_: Any) -> str:
    """The paper's hyper-parameters, which `--preset` takes."""
    rows = [
        {"preset": name} | {name: "" if value is None else str(value) for name, value in preset._asdict().items()}
        for name, preset in PRESETS.items()
    ]
    shared = f"{EPOCHS:g} epochs, learning rate {LEARNING_RATE:g}, beta {IMPORTANCE_BETA:g}"
    return f"All: {shared}. The steps are indices; empty: not in the paper.\n\n{table_of_records(rows)}"


TABLES: dict[str, Callable[[Grid, Sequence[str], Sequence[int]], str]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
}


def spread(scores: "pd.Series[float]") -> str:
    """Mean ± standard deviation; of one score itself."""
    return f"{scores.mean():.2f} ± {scores.std():.2f}" if len(scores) > 1 else f"{scores.mean():.2f}"


def _results(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    cells = [(1.0, DENSE)] + [(ratio, method) for ratio in grid.scale.ratios for method in METHODS]
    rows = []
    for seed in seeds:
        for task in tasks:
            for ratio, method in cells:
                run = grid.cell(task, method, ratio, seed)
                sizes = {"target": run["target_parameter_ratio"], "all": run["all_parameter_ratio"]}
                place = {"ratio": ratio, "method": method, "task": task, "seed": seed}
                rows.append(place | {"score": grid.score(task, run)} | sizes)
    results = pd.DataFrame(rows)
    averages = results.groupby(["ratio", "method", "seed"], sort=False)[["score", "target", "all"]].mean()
    return pd.concat([results, averages.reset_index().assign(task=AVERAGE)], ignore_index=True)


def _order(results: pd.DataFrame, columns: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for ratio, cells in results.groupby("ratio", sort=False):
        for task in columns:
            scores = cells[cells["task"] == task].pivot(index="seed", columns="method", values="score")
            ranked = scores.mean().sort_values(ascending=False, kind="stable").index
            ours = next(method for method in ranked if method in (GLOBAL, EQUAL_PARAMETERS))
            rival = next(method for method in ranked if method in BASELINES)
            order = ", ".join(f"{NAMES[method]} {spread(scores[method])}" for method in ranked)
            lead = f"{spread(scores[ours] - scores[rival])} ({NAMES[rival]})"
            row = {"rank ratio": f"{ratio:g}", "task": task, "best first": order}
            rows.append(row | {"RankDyna less the best baseline, seed by seed": lead})
    return rows


def _once(grid: Grid, task: str, seed: int) -> list[dict[str, Any]]:
    runs = {method: grid.cell(task, method, grid.scale.ratio, seed) for method in AT_ONE_RATIO}
    return [
        {"method": NAMES[method]} | _sizes([run]) | {task: f"{grid.score(task, run):.2f}"}
        for method, run in runs.items()
    ]


def _printed(method: str, ratio: float, tasks: Sequence[str]) -> dict[str, str]:
    for row in paper.TABLE1:
        if (row.method, row.ratio) == (method, ratio):
            scores = {task: f"{row.by_task[task]:.1f}" for task in tasks if task in row.by_task}
            average = {AVERAGE: f"{row.all_average:.1f}"} if len(scores) == len(row.scores) else {}
            return {"all parameters": f"{row.parameters:g}M without embeddings"} | scores | average
    return {}


def _sizes(runs: list[dict[str, Any]]) -> dict[str, str]:
    parts = {"target parameters": "target_parameter_ratio", "all parameters": "all_parameter_ratio"}
    return {name: _parts(pd.Series([run[key] for run in runs])) for name, key in parts.items()}


def _parts(parts: "pd.Series[float]") -> str:
    low, high = f"{parts.min():.3f}", f"{parts.max():.3f}"
    return low if low == high else f"{low} to {high}"


def _count(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"


def _magnitudes(grid: Grid, task: str, seed: int) -> dict[str, float]:
    grid.cell(task, DENSE, seed=seed)
    request, studies = request_of_cell(grid, task, DENSE, 1.0, seed), grid.folder / "studies"

    def measure() -> dict[str, float]:
        run = run_of_request(request, studies, grid.cell_folder(task, DENSE, 1.0, seed))
        return score_magnitudes(run.model, training_batches(run, seed), grid.scale.table4_steps)

    settings = {"request": request, "steps": grid.scale.table4_steps}
    return kept(studies / f"table4-{task}-seed{seed}.json", settings, measure)
