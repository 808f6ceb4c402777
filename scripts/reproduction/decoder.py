"""What each method leaves of a small pre-trained language model by size, without training and after the same steps."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .cells import Grid, run_once
from .markdown import table_of_records
from .scales import Options
from .side_by_side import Cell

# Of every row that is trained.
EPOCHS = 1.0

DENSE, FINE_TUNED = "dense", "dense, fine-tuned"
# What a row's options may name: the model as it came.
START = "START"
BASELINES: dict[str, Options] = {
    "SVD": {"method": "svd"},
    "whitened": {"method": "whitened", "rank_scope": "local"},
    "whitened, ranks by expected loss": {"method": "whitened", "rank_scope": "global"},
}
TRAINED = "then trained"
RANKDYNA: dict[str, Options] = {
    "RankDyna": {"start_ratio": 1.0},
    "RankDyna, start_ratio none": {},
    "RankDyna, teacher": {"start_ratio": 1.0, "teacher": START},
}
ROWS: dict[str, Options] = {
    DENSE: {"method": "none", "do_train": False},
    FINE_TUNED: {"method": "none"},
    **{name: options | {"num_train_epochs": 0, "second_round_epochs": EPOCHS} for name, options in BASELINES.items()},
    **{name: options | {"method": "rankdyna"} for name, options in RANKDYNA.items()},
}
# Those that take longest come first.
ORDER = (*reversed(RANKDYNA), *reversed(BASELINES), FINE_TUNED, DENSE)


class Place(NamedTuple):
    """A run."""

    task: str
    row: str
    ratio: float
    seed: int


def cells_of_decoder(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All runs of [`decoder`]."""
    return [
        Cell(str(_folder(grid, place).relative_to(grid.folder)), partial(_cell, grid, place))
        for row in ORDER
        for ratio in _ratios(grid, row)
        for place in (Place(task, row, ratio, seeds[0]) for task in tasks)
    ]


def decoder(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """
    For each task two tables, of the first seed alone: the perplexity on blocks, and that of final models on the whole
    text in windows that overlap, by the part of the target layers' parameters that is kept. Beside the first are the
    optimizer steps of a row, the most bytes that a GPU held for one of its runs, and the seconds of factoring and
    training: of a run, the mean over the sizes, beside all that ran at once.
    """
    tables = []
    for task in tasks:
        blocks, windows = [], []
        for row in ROWS:
            runs = {ratio: _cell(grid, Place(task, row, ratio, seeds[0])) for ratio in _ratios(grid, row)}
            if row in BASELINES:
                blocks.append(_record(grid, row, runs, "factored"))
            name = f"{row}, {TRAINED}" if row in BASELINES else row
            blocks.append(_record(grid, name, runs, "final"))
            read = {ratio: _shown(run["text"]["validation"]["perplexity"]) for ratio, run in runs.items()}
            windows.append(_by_size(grid, name, read))
        run = next(iter(runs.values()))
        length, stride = run["text"]["length"], run["text"]["stride"]
        tables += [f"## {task}, blocks of {length} tokens\n", table_of_records(blocks)]
        tables += [f"## {task}, windows of {length} tokens at a stride of {stride}\n", table_of_records(windows)]
    return "\n".join(tables)


def _record(grid: Grid, name: str, runs: dict[float, dict[str, Any]], stage: str) -> dict[str, Any]:
    """A row, of the model as it was when it was factored, or of the final one."""
    record = _by_size(grid, name, {ratio: _shown(run["scores"][stage]["perplexity"]) for ratio, run in runs.items()})
    until = ("factored",) if stage == "factored" else ("factored", "final")
    steps, seconds, peaks = (
        [[run[kind][of] for of in until if of in run[kind]] for run in runs.values()]
        for kind in ("steps", "seconds", "peak_bytes")
    )
    record["steps"] = ", ".join(map(str, sorted({sum(of_run) for of_run in steps})))
    record["GB"] = f"{max(map(max, peaks)) / 1e9:.1f}" if all(peaks) else ""
    record["seconds"] = round(sum(map(sum, seconds)) / len(runs)) if all(seconds) else ""
    return record


def _by_size(grid: Grid, name: str, found: dict[float, str]) -> dict[str, Any]:
    sizes = (1.0, *grid.scale.decoder_ratios)
    return {"row": name} | {f"{ratio:g}": found.get(ratio, "") for ratio in sizes}


def _shown(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.4g}"


def _ratios(grid: Grid, row: str) -> tuple[float, ...]:
    return (1.0,) if row in (DENSE, FINE_TUNED) else grid.scale.decoder_ratios


def _cell(grid: Grid, place: Place) -> dict[str, Any]:
    start = grid.model(place.task)
    own = {"model_name_or_path": start, "num_train_epochs": EPOCHS} | ROWS[place.row]
    own["param_ratio"] = None if own["method"] == "none" else place.ratio
    options = grid.options("decoder", place.task, place.seed, own)
    options = {key: start if value == START else value for key, value in options.items()}
    return run_once(grid.scale.tasks[place.task].script, options, _folder(grid, place), keep_weights=False)


def _folder(grid: Grid, place: Place) -> Path:
    name = place.row.replace(", ", "-").replace(" ", "_")
    return grid.folder / "decoder" / place.task / f"seed{place.seed}" / f"{name}-{place.ratio:g}"
