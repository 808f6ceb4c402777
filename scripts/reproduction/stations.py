"""Several sizes from one run, beside a run for each: of the same steps in all, and of the same steps each."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple
from unittest.mock import patch

from tasks import run as task_run
from transformers.trainer import TRAINER_STATE_NAME

from rankdyna_trainer import RankDynaCallback
from rankdyna_trainer.method import schedule

from .candidates import FallingRates
from .cells import Grid, run_once
from .markdown import table_of_records
from .scales import Options
from .side_by_side import Cell

EPOCHS = 3.0
ONE_RUN, SAME_IN_ALL, SAME_EACH = (
    "one run",
    "a run for each, the same steps in all",
    "a run for each, the same steps each",
)


def _rising(steps: int, number: int, sizes: int) -> int:
    until = [steps * count * (count + 1) // (sizes * (sizes + 1)) for count in (number, number + 1)]
    return until[1] - until[0]


class Candidate(NamedTuple):
    """What else the one run could do: options of the script, and the shares of the steps that each size has."""

    options: Options
    share: Callable[[int, int, int], int] = schedule.share


# In all of them the learning rate falls at each size.
CANDIDATES = {
    "one run, the learning rate falls at each size": Candidate({}),
    "one run, it falls, a cool-down of 0.8": Candidate({"rank_cooldown_steps": 0.8}),
    "one run, it falls, more steps for smaller sizes": Candidate({}, _rising),
}
ONE_RUNS = (ONE_RUN, *CANDIDATES)
ROWS = (*ONE_RUNS, SAME_IN_ALL, SAME_EACH)


def cells_of_stations(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All runs of [`stations`]."""
    return [
        Cell(
            str(_folder(grid, task, row, seed, ratio).relative_to(grid.folder)),
            partial(_cell, grid, task, row, seed, ratio),
        )
        for row in ROWS
        for seed in seeds
        for task in tasks
        for ratio in ((None,) if row in ONE_RUNS else grid.scale.stations_ratios)
    ]


def stations(grid: Grid, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """The score at each size, with the standard deviation over the seeds, and the seconds of all runs of a row."""
    records: list[dict[str, Any]] = []
    for task in tasks:
        for row in ROWS:
            record: dict[str, Any] = {"task": task, "row": row}
            for ratio in grid.scale.stations_ratios:
                scores = [_score(grid, task, row, seed, ratio) for seed in seeds]
                spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
                record[f"{ratio:g}"] = f"{fmean(scores):.1f}{spread}"
            runs = [
                _cell(grid, task, row, seed, ratio)
                for seed in seeds
                for ratio in ((None,) if row in ONE_RUNS else grid.scale.stations_ratios)
            ]
            record["runs"] = len(runs) // len(seeds)
            record["seconds"] = round(sum(sum(run["seconds"].values()) for run in runs) / len(seeds))
            records.append(record)
    return table_of_records(records)


def _score(grid: Grid, task: str, row: str, seed: int, ratio: float) -> float:
    if row not in ONE_RUNS:
        return grid.score(task, _cell(grid, task, row, seed, ratio))
    run = _cell(grid, task, row, seed, None)
    if ratio == grid.scale.stations_ratios[-1]:
        return grid.score(task, run)
    place = _folder(grid, task, row, seed, None) / f"param_ratio-{ratio:g}" / TRAINER_STATE_NAME
    last = json.loads(place.read_text(encoding="utf-8"))["log_history"][-1]
    scores = {name.removeprefix("eval_"): score for name, score in last.items()}
    return grid.score(task, {"scores": {"final": scores}})


def _cell(grid: Grid, task: str, row: str, seed: int, ratio: float | None) -> dict[str, Any]:
    sizes, script = grid.scale.stations_ratios, grid.scale.tasks[task].script
    own: Options = {"num_train_epochs": EPOCHS / len(sizes) if row == SAME_IN_ALL else EPOCHS}
    own["param_ratio"] = [*sizes] if ratio is None else ratio
    candidate = CANDIDATES.get(row)
    options = grid.options("stations", task, seed, own | ({} if candidate is None else candidate.options))
    folder = _folder(grid, task, row, seed, ratio)
    if candidate is None:
        return run_once(script, options, folder, keep_weights=False)
    with (
        patch.object(task_run, RankDynaCallback.__name__, FallingRates),
        patch.object(schedule, "share", candidate.share),
    ):
        return run_once(script, options, folder, keep_weights=False)


def _folder(grid: Grid, task: str, row: str, seed: int, ratio: float | None) -> Path:
    name = row.replace(", ", "-").replace(" ", "_")
    return grid.folder / "stations" / task / f"seed{seed}" / (name if ratio is None else f"{name}-{ratio:g}")
