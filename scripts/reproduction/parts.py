"""What each part of the method brings at one size: the metric of the data, a teacher, a budget that waits."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .cells import Grid, run_once
from .markdown import table_of_records
from .scales import Options
from .side_by_side import Cell

PARAM_RATIO = 0.15
# Epochs of every row together, those of a teacher and of a first round included.
EPOCHS = 3
HALF = EPOCHS / 2

# The paper's early schedule, and one that waits until the task is learnt.
EARLY: Options = {"rank_warmup_steps": 0.05, "rank_cooldown_steps": 0.6, "rank_update_interval": 1}
WAITING: Options = EARLY | {"rank_warmup_steps": 0.2}
UNTIL_FLAT: Options = EARLY | {"rank_warmup_steps": "auto"}
METRIC: Options = {"group_basis": "activations", "block_floor": 0.0}
WEIGHTS: Options = {"group_basis": "weights", "block_floor": 0.0}
FLOOR: Options = {"block_floor": 0.25}
FLAT_METRIC_FLOOR: Options = UNTIL_FLAT | METRIC | FLOOR

# What a row's options may name: the model that was fine-tuned for half of the epochs.
FINE_TUNED = "FINE_TUNED"
FIRST_ROUND = "dense, half of the steps"
TAUGHT: Options = {"teacher": FINE_TUNED, "num_train_epochs": HALF}

ROWS: dict[str, Options] = {
    "dense": {"method": "none"},
    FIRST_ROUND: {"method": "none", "num_train_epochs": HALF},
    "as in the paper": EARLY | WEIGHTS,
    "metric": EARLY | METRIC,
    "teacher": EARLY | WEIGHTS | TAUGHT,
    "waiting": WAITING | WEIGHTS,
    "until flat, floor": UNTIL_FLAT | WEIGHTS | FLOOR,
    "waiting, metric, floor": WAITING | METRIC | FLOOR,
    "until flat, metric": UNTIL_FLAT | METRIC,
    "until flat, metric, floor": FLAT_METRIC_FLOOR,
    "until flat, metric, floor, every 10 steps": FLAT_METRIC_FLOOR | {"rank_update_interval": 10},
    "until flat, metric, floor, multiples of 8": FLAT_METRIC_FLOOR | {"rank_multiple_of": 8},
    "until flat, metric, floor, equal ranks": FLAT_METRIC_FLOOR | {"rank_scope": "local"},
    "until flat, metric, floor, teacher is itself": FLAT_METRIC_FLOOR | {"teacher": "self"},
    "until flat, metric, floor, teacher": FLAT_METRIC_FLOOR | TAUGHT,
    "teacher, metric": EARLY | METRIC | TAUGHT,
    "fine-tuned, metric": EARLY | METRIC | {"model_name_or_path": FINE_TUNED, "num_train_epochs": HALF},
    "fine-tuned, metric, teacher": EARLY | METRIC | TAUGHT | {"model_name_or_path": FINE_TUNED},
    "SVD, two rounds": {"method": "svd", "model_name_or_path": FINE_TUNED, "num_train_epochs": 0},
    "whitened, two rounds": {"method": "whitened", "model_name_or_path": FINE_TUNED, "num_train_epochs": 0},
    "SVD, two rounds, teacher": {
        "method": "svd",
        "model_name_or_path": FINE_TUNED,
        "num_train_epochs": 0,
        "teacher": FINE_TUNED,
    },
    "whitened, two rounds, teacher": {
        "method": "whitened",
        "model_name_or_path": FINE_TUNED,
        "num_train_epochs": 0,
        "teacher": FINE_TUNED,
    },
}


def cells_of_parts(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All runs of [`parts`], those that others need first."""
    needed = [name for name, options in ROWS.items() if FINE_TUNED not in options.values()]
    rows = sorted(ROWS, key=lambda name: (name != FIRST_ROUND, name not in needed))
    return [
        Cell(str(_folder(grid, task, row, seed).relative_to(grid.folder)), partial(_cell, grid, task, row, seed))
        for row in rows
        for seed in seeds
        for task in tasks
    ]


def parts(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """Scores of every row, with the spread over the seeds, and the part of the dense score that is kept."""
    records: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    for name in ROWS:
        record: dict[str, Any] = {"row": name}
        for task in tasks:
            runs = [_cell(grid, task, name, seed) for seed in seeds]
            scores = [grid.score(task, run) for run in runs]
            mean = sum(scores) / len(scores)
            dense.setdefault(task, mean)
            spread = f" ± {(max(scores) - min(scores)) / 2:.1f}" if len(scores) > 1 else ""
            record[task] = f"{mean:.1f}{spread}"
            record[f"{task}, kept"] = f"{100 * mean / dense[task]:.0f} %"
            record["target parameters"] = f"{runs[0]['target_parameter_ratio']:.3f}"
            if peaks := [peak for run in runs for peak in run["peak_bytes"].values()]:
                record[f"{task}, GB"] = f"{max(peaks) / 1e9:.2f}"
            record[f"{task}, seconds"] = round(sum(sum(run["seconds"].values()) for run in runs) / len(runs))
        records.append(record)
    return table_of_records(records)


def _cell(grid: Grid, task: str, row: str, seed: int) -> dict[str, Any]:
    own = {"num_train_epochs": EPOCHS, "param_ratio": PARAM_RATIO} | ROWS[row]
    options = grid.options("parts", task, seed, own)
    if options["method"] == "none":
        del options["param_ratio"]
    elif options["method"] != "rankdyna":
        options["second_round_epochs"] = HALF
    if FINE_TUNED in options.values():
        _cell(grid, task, FIRST_ROUND, seed)
        place = _folder(grid, task, FIRST_ROUND, seed)
        options = {key: place if value == FINE_TUNED else value for key, value in options.items()}
    return run_once(
        grid.scale.tasks[task].script,
        options,
        _folder(grid, task, row, seed),
        keep_weights=options["method"] == "none",
    )


def _folder(grid: Grid, task: str, row: str, seed: int) -> Path:
    return grid.folder / "parts" / task / f"seed{seed}" / row.replace(", ", "-").replace(" ", "_")
