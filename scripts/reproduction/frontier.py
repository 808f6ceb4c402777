"""What each method keeps of a score, by the part of the parameters that it keeps: this library beside the others."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from tasks.presets import PAPER

from .cells import Grid, run_once
from .figures import BLACK, BLUE, GREEN, ORANGE, VERMILION, frontier_figure
from .markdown import table_of_records
from .scales import Options
from .side_by_side import Cell

# Epochs of every row together, those of a teacher and of a first round included.
EPOCHS = 3.0
HALF = EPOCHS / 2
# All methods choose among the same, by the score of the scale's first seed at its middle size.
LEARNING_RATES = (1e-4, 2e-4, 4e-4)

DENSE, FIRST_ROUND = "dense", "dense, half of the steps"
# What a row's options may name: the model that was fine-tuned for half of the epochs.
FINE_TUNED = "FINE_TUNED"
# Likewise: a file that the baselines share which ask for Fisher information of that model.
FISHER = "FISHER"
# Its hidden states alone, which teach best (docs/choosing.md): the same for all rows.
TEACHER: Options = {"teacher": FINE_TUNED, "teacher_weight": 0.0}
PAPERS = "RankDyna as in the paper"
OURS, OURS_TAUGHT = "RankDyna", "RankDyna, teacher"


def _two_rounds(method: str) -> Options:
    fisher = {"fisher_file": FISHER} if method.endswith("fwsvd") else {}
    start = {"model_name_or_path": FINE_TUNED, "num_train_epochs": 0, "second_round_epochs": HALF}
    return {"method": method} | start | fisher


BASELINES = {"SVD": "svd", "FWSVD": "fwsvd", "TFWSVD": "tfwsvd", "whitened": "whitened"}
ROWS: dict[str, Options] = {
    DENSE: {"method": "none"},
    FIRST_ROUND: {"method": "none", "num_train_epochs": HALF},
    **{name: _two_rounds(method) for name, method in BASELINES.items()},
    **{f"{name}, teacher": _two_rounds(method) | TEACHER for name, method in BASELINES.items()},
    PAPERS: PAPER | {"rank_cooldown_steps": 0.6},
    OURS: {},
    # As the recipe of docs/choosing.md has it.
    OURS_TAUGHT: TEACHER
    | {
        "model_name_or_path": FINE_TUNED,
        "num_train_epochs": HALF,
        "rank_warmup_steps": 0.125,
        "rank_cooldown_steps": 0.525,
    },
}
STYLES: dict[str, dict[str, Any]] = {
    OURS_TAUGHT: {"color": VERMILION, "marker": "o"},
    OURS: {"color": VERMILION, "marker": "o", "linestyle": "--"},
    PAPERS: {"color": BLACK, "marker": "s"},
    "whitened, teacher": {"color": BLUE, "marker": "^"},
    "TFWSVD, teacher": {"color": GREEN, "marker": "v"},
    "SVD, teacher": {"color": ORANGE, "marker": "D"},
}
COMPRESSED = [name for name in ROWS if name not in (DENSE, FIRST_ROUND)]


class Place(NamedTuple):
    """A cell of the table."""

    task: str
    row: str
    ratio: float
    seed: int
    learning_rate: float | None = None  # the chosen one, unless it is tried


def cells_of_frontier(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All runs of [`frontier`], those that others need first."""
    ratio, seed = _middle(grid), grid.scale.seeds[0]
    tried = [
        Place(task, row, 1.0 if row == DENSE else ratio, seed, rate)
        for row in (DENSE, *COMPRESSED)
        for task in tasks
        for rate in LEARNING_RATES
    ]
    dense = [place for place in tried if place.row == DENSE]
    first = [Place(task, row, 1.0, seed) for row in (FIRST_ROUND, DENSE) for seed in seeds for task in tasks]
    # Whole columns one after the other: what there is no time for are seeds of the outer sizes.
    columns = sorted(_places(grid, tasks, seeds), key=lambda place: (place.ratio != ratio, place.seed))
    places = [*dense, *first, *tried[len(dense) :], *columns]
    return [
        Cell("/".join(map(str, place)).replace(" ", "_"), partial(_cell, grid, place))
        for place in dict.fromkeys(places)
    ]


def frontier(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """The scores, what they keep of the dense one, which row is ahead in each cell, and the learning rates."""
    runs = frontier_runs(grid, tasks, seeds)
    records: list[dict[str, Any]] = []
    for row, of_row in runs.groupby("row", sort=False):
        record: dict[str, Any] = {"row": row}
        for task in tasks:
            record[f"{task}, rate"] = f"{_learning_rate(grid, task, str(row)):g}"
            for ratio, cell in of_row[of_row["task"] == task].groupby("ratio", sort=False):
                spread = f" ± {(cell['score'].max() - cell['score'].min()) / 2:.1f}" if len(cell) > 1 else ""
                kept = "" if row == DENSE else f", {cell['kept'].mean():.0f} %"
                record[f"{task} {ratio:g}"] = f"{cell['score'].mean():.1f}{spread}{kept}"
        records.append(record)
    return table_of_records(records) + "\n" + table_of_records(_ahead(runs))


def frontier_runs(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """
    A row a run: `task`, `row`, `ratio`, `seed`, `parameters` (the part of the target layers' parameters that is kept),
    `score`, `kept` (in percent of the dense score, the mean over the seeds) and `seconds`.
    """
    records: list[dict[str, Any]] = []
    for place in _places(grid, tasks, seeds):
        run = _cell(grid, place)
        records.append(
            {name: getattr(place, name) for name in ("task", "row", "ratio", "seed")}
            | {"score": grid.score(place.task, run), "parameters": run.get("target_parameter_ratio", 1.0)}
            | {"seconds": sum(run["seconds"].values())}
        )
    runs = pd.DataFrame(records)
    dense = runs[runs["row"] == DENSE].groupby("task")["score"].mean()
    return runs.assign(kept=100 * runs["score"] / runs["task"].map(dense))


def draw_frontier(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> Figure:
    """The picture of [`frontier`]."""
    return frontier_figure(frontier_runs(grid, tasks, seeds), STYLES)


def _ahead(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """For each task and size, RankDyna's better row beside the best of all others."""
    records = []
    ours = runs["row"].isin([OURS, OURS_TAUGHT])
    compressed = runs["row"].isin(COMPRESSED)
    for (task, ratio), _ in runs[compressed].groupby(["task", "ratio"], sort=False):
        here = (runs["task"] == task) & (runs["ratio"] == ratio)
        best = [runs[here & of].groupby("row")["score"].mean() for of in (ours, compressed & ~ours)]
        (us, mine), (them, other) = ((scores.idxmax(), scores.max()) for scores in best)
        records.append(
            {
                "task": task,
                "size": f"{ratio:g}",
                "RankDyna": f"{mine:.1f} ({us})",
                "best other": f"{other:.1f} ({them})",
            }
            | {"ahead by": f"{mine - other:+.1f}"}
        )
    return records


def _places(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Place]:
    for row in (DENSE, *COMPRESSED):
        for ratio in (1.0,) if row == DENSE else grid.scale.frontier_ratios:
            # On a CPU there is time for several seeds at one size.
            here = seeds if row == DENSE or ratio == _middle(grid) else seeds[: grid.scale.frontier_seeds]
            yield from (Place(task, row, ratio, seed) for task in tasks for seed in here)


def _middle(grid: Grid) -> float:
    ratios = grid.scale.frontier_ratios
    return ratios[len(ratios) // 2]


def _learning_rate(grid: Grid, task: str, row: str) -> float:
    row = DENSE if row == FIRST_ROUND else row
    ratio, seed = 1.0 if row == DENSE else _middle(grid), grid.scale.seeds[0]
    scores = {rate: grid.score(task, _cell(grid, Place(task, row, ratio, seed, rate))) for rate in LEARNING_RATES}
    return max(scores, key=lambda rate: scores[rate])


def _cell(grid: Grid, place: Place) -> dict[str, Any]:
    task, row, ratio, seed, rate = place
    own = {"num_train_epochs": EPOCHS, "param_ratio": ratio} | ROWS[row]
    own["learning_rate"] = _learning_rate(grid, task, row) if rate is None else rate
    options = grid.options("frontier", task, seed, own)
    if options["method"] == "none":
        del options["param_ratio"]
    if FINE_TUNED in options.values():
        first_round = Place(task, FIRST_ROUND, 1.0, seed)
        _cell(grid, first_round)
        folder = _folder(grid, first_round)
        places = {FINE_TUNED: folder, FISHER: folder.with_name("fisher.safetensors")}
        options = {key: places.get(value, value) for key, value in options.items()}
    options |= {"learning_rate": float(options["learning_rate"])}
    folder = _folder(grid, place._replace(learning_rate=options["learning_rate"]))
    return run_once(grid.scale.tasks[task].script, options, folder, keep_weights=row == FIRST_ROUND)


def _folder(grid: Grid, place: Place) -> Path:
    rate = _learning_rate(grid, place.task, place.row) if place.learning_rate is None else place.learning_rate
    name = f"{place.row.replace(', ', '-').replace(' ', '_')}-{place.ratio:g}-{rate:g}"
    return grid.folder / "frontier" / place.task / f"seed{place.seed}" / name
