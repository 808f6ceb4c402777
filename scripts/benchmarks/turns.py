"""Training steps of several sides in turns, and tables of their phases beside the floor of each."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rankdyna_trainer.method.schedule import RankBudgetSchedule

from .device_time import wait
from .measuring import Rows, median_ratio, spread
from .models import Batch
from .operations import Workload
from .sides import RankDynaSide, Side

# Adam reads a number, its gradient and two moments, and writes all but the gradient, in float32.
BYTES_OF_ADAM = 28


def run_in_turns(
    sides: Mapping[str, Side], steps: int, turn: int, work: Workload, make_batch: Callable[[], Batch]
) -> dict[str, dict[str, list[int]]]:
    """
    Train each side, `turn` steps after each other, then the next, in the other order the next time.

    Returns:
        By side and for each step the `multiply_adds` that are promised, and the `trained_numbers`.
    """
    promised: dict[str, list[Callable[[], int]]] = {name: [] for name in sides}
    trained: dict[str, list[int]] = {name: [] for name in sides}
    for first in range(1, steps + 1, turn):
        batches = {number: make_batch() for number in range(first, min(first + turn, steps + 1))}
        for name in sides if (first - 1) // turn % 2 == 0 else reversed(list(sides)):
            wait()
            for number, batch in batches.items():
                promised[name].append(sides[name].multiply_adds(work))
                trained[name].append(sides[name].trained_numbers())
                sides[name].step(number, batch)
    wait()
    return {
        name: {"multiply_adds": [promise() for promise in promised[name]], "trained_numbers": trained[name]}
        for name in sides
    }


def details_of(side: Side, noted: Mapping[str, list[int]]) -> dict[str, Any]:
    """All numbers of a side's steps, and the step in which its layers were factored, 0 if none."""
    factored = side.first_in_groups - 1 if isinstance(side, RankDynaSide) else 0
    return {"seconds": side.seconds, "own_seconds": side.own_seconds, "factored_in_step": factored, **noted}


def whole_runs(details: Mapping[str, dict[str, Any]]) -> Rows:
    """A row a side. What is done once, factoring the layers, is shown by itself."""
    rows: Rows = []
    dense = details["dense"]
    for name, side in details.items():
        once = side["own_seconds"][side["factored_in_step"] - 1] if side["factored_in_step"] else 0.0
        steps = sum(side["seconds"]) - once
        row = {
            "side": name,
            "steps, s": steps,
            "/ dense": steps / sum(dense["seconds"]),
            "promised": sum(side["multiply_adds"]) / sum(dense["multiply_adds"]),
            "callback's share": (sum(side["own_seconds"]) - once) / steps,
            "in the factoring step, s": once,
            "slowest other step, ms": 1000 * sorted(side["seconds"])[-2 if once else -1],
        }
        rows.append(row)
    return rows


def phases(details: Mapping[str, dict[str, Any]], schedule: RankBudgetSchedule, rate: float, bandwidth: float) -> Rows:
    """
    A row a side and phase: one step.

    Args:
        details: from [`details_of`], by side.
        schedule: of all of them.
        rate: operations a second of the device.
        bandwidth: bytes a second.
    """
    rows: Rows = []
    for name, side in details.items():
        parts = {"warm-up": slice(0, schedule.warmup_steps)}
        if factored := side["factored_in_step"]:  # which step is left out
            parts = {"warm-up, dense": slice(0, factored - 1)}
            parts["warm-up, in groups"] = slice(factored, schedule.warmup_steps)
        parts["adjusting"] = slice(schedule.warmup_steps, schedule.final_step)
        parts["cool-down"] = slice(schedule.final_step, schedule.total_steps)
        rows += [
            {"side": name, "phase": phase} | _step(side, details["dense"], part, rate, bandwidth)
            for phase, part in parts.items()
            if side["seconds"][part]
        ]
    return rows


def _step(side: dict[str, Any], dense: dict[str, Any], part: slice, rate: float, bandwidth: float) -> dict[str, Any]:
    seconds = side["seconds"][part]
    by_operations = 2 * float(np.mean(side["multiply_adds"][part])) / rate
    by_bytes = BYTES_OF_ADAM * float(np.mean(side["trained_numbers"][part])) / bandwidth
    return {
        "steps": len(seconds),
        "step, ms": spread(seconds),
        "mean, ms": 1000 * float(np.mean(seconds)),
        "/ dense": median_ratio(seconds, dense["seconds"][part]),
        "promised": sum(side["multiply_adds"][part]) / sum(dense["multiply_adds"][part]),
        "callback, ms": spread(side["own_seconds"][part]),
        "operations / rate, ms": 1000 * by_operations,
        "Adam's bytes / bandwidth, ms": 1000 * by_bytes,
        "step / both": float(np.median(seconds)) / (by_operations + by_bytes),
    }
