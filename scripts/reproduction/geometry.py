"""Candidates of geometry and steps beside the defaults: at equal steps and equal parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest.mock import patch

from tasks import run as task_run
from transformers import TrainingArguments

from rankdyna_trainer import RankDynaCallback

from .candidates import OrthonormalVectors, ScaledUpdates, UncertainScores, WithoutDropout
from .cells import Grid, run_once
from .markdown import table_of_records
from .scales import Options
from .side_by_side import Cell

PARAM_RATIO = 0.15
EPOCHS = 3

# The same in transformers 4 and 5.
WARMING_UP: Options = {"warmup_ratio" if hasattr(TrainingArguments, "warmup_ratio") else "warmup_steps": 0.1}


@dataclass(frozen=True)
class Candidate:
    """What a row changes: options of the script, or the callback that a run has."""

    options: Options = field(default_factory=dict)
    callback: Callable[..., RankDynaCallback] = RankDynaCallback


DEFAULTS = "defaults"
ROWS: dict[str, Candidate] = {
    DEFAULTS: Candidate(),
    "learning rate warms up over a tenth of the steps": Candidate(WARMING_UP),
    "sigma at 10 times the learning rate": Candidate(callback=partial(ScaledUpdates, {"sigma": 10.0})),
    "sigma at a tenth of the learning rate": Candidate(callback=partial(ScaledUpdates, {"sigma": 0.1})),
    "u and v at twice the learning rate": Candidate(callback=partial(ScaledUpdates, {"u": 2.0, "v": 2.0})),
    "u and v at half the learning rate": Candidate(callback=partial(ScaledUpdates, {"u": 0.5, "v": 0.5})),
    "vectors made orthonormal again every 50 steps": Candidate(callback=OrthonormalVectors),
    "times the uncertainty, as PLATON": Candidate(callback=UncertainScores),
    "no dropout once there are groups": Candidate(callback=WithoutDropout),
    "learning rate falls by a cosine": Candidate({"lr_scheduler_type": "cosine"}),
    "a cool-down of 0.4": Candidate({"rank_cooldown_steps": 0.4}),
    "a cool-down of 0.8": Candidate({"rank_cooldown_steps": 0.8}),
}


def cells_of_geometry(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All runs of [`geometry`], those of the defaults first."""
    return [
        Cell(str(_folder(grid, task, row, seed).relative_to(grid.folder)), partial(_cell, grid, task, row, seed))
        for row in ROWS
        for seed in seeds
        for task in tasks
    ]


def geometry(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """
    The score of every row, and how far it is ahead of the defaults of the same seed: the means over the seeds, with
    the standard deviations.
    """
    records: list[dict[str, Any]] = []
    for row in ROWS:
        record: dict[str, Any] = {"row": row}
        for task in tasks:
            runs = [_cell(grid, task, row, seed) for seed in seeds]
            scores = [grid.score(task, run) for run in runs]
            defaults = [grid.score(task, _cell(grid, task, DEFAULTS, seed)) for seed in seeds]
            ahead = [ours - theirs for ours, theirs in zip(scores, defaults, strict=True)]
            record[task] = f"{fmean(scores):.2f}{_deviation(scores)}"
            record[f"{task}, ahead by"] = "" if row == DEFAULTS else f"{fmean(ahead):+.2f}{_deviation(ahead)}"
            record["target parameters"] = f"{runs[0]['target_parameter_ratio']:.3f}"
            record[f"{task}, seconds"] = round(fmean(sum(run["seconds"].values()) for run in runs))
        records.append(record)
    return table_of_records(records)


def _deviation(values: Sequence[float]) -> str:
    return f" ± {stdev(values):.2f}" if len(values) > 1 else ""


def _cell(grid: Grid, task: str, row: str, seed: int) -> dict[str, Any]:
    own = {"num_train_epochs": EPOCHS, "param_ratio": PARAM_RATIO} | ROWS[row].options
    options = grid.options("geometry", task, seed, own)
    with patch.object(task_run, RankDynaCallback.__name__, ROWS[row].callback):
        return run_once(grid.scale.tasks[task].script, options, _folder(grid, task, row, seed), keep_weights=False)


def _folder(grid: Grid, task: str, row: str, seed: int) -> Path:
    return grid.folder / "geometry" / task / f"seed{seed}" / row.replace(", ", "-").replace(" ", "_")
