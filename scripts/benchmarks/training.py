"""The subcommands of `benchmark.py` that train: whole runs, and their memory."""

import argparse
import copy
import math
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from rankdyna_trainer import RankDynaConfig, inject_singular_groups, rank_report
from rankdyna_trainer.method.schedule import RankBudgetSchedule
from rankdyna_trainer.report.timing import now, timed

from .measuring import Results, Rows, median_ratio, product_seconds, spread, started
from .memory import forget_peak, peak_memory
from .models import load_model, random_batch
from .operations import count_operations
from .sides import SIDES, Run, Side
from .turns import run_in_turns


def train(options: argparse.Namespace) -> Results:
    """Time whole runs of several ways to fine-tune and compress a model, step by step in turns."""
    run = run_of(options)
    model = load_model(options.model, options.seed)
    work = count_operations(model, run.config, random_batch(model, options.batch, options.length))
    count = math.ceil(512 / options.batch)
    run = replace(run, rows=[random_batch(model, options.batch, options.length) for _ in range(count)])
    names = [name for name in SIDES if name == "dense" or name in options.sides]
    injected = copy.deepcopy(model)
    injection = 0.0
    if any(SIDES[name].takes_groups for name in names):
        injection = timed(partial(inject_singular_groups, injected, run.config))
    sides: dict[str, Side] = {}
    details: dict[str, dict[str, Any]] = {}
    for name in names:
        takes_groups = SIDES[name].takes_groups
        own_model = copy.deepcopy(injected if takes_groups else model)
        start = now()
        sides[name] = SIDES[name](own_model, run)
        details[name] = {"once": now() - start + takes_groups * injection}
    del injected  # each side has its own copy
    for side in sides.values():
        side.warm_up(random_batch(model, options.batch, options.length))
    products = product_seconds(lambda: sides["dense"].warm_up(random_batch(model, options.batch, options.length)))
    noted = run_in_turns(sides, options.steps, 1, work, partial(random_batch, model, options.batch, options.length))
    for name, side in sides.items():
        details[name]["multiply_adds"] = noted[name]["multiply_adds"]
        details[name]["once"] += timed(side.finish)
        details[name] |= {"seconds": side.seconds, "own_seconds": side.own_seconds, "ranks": {}, "kept": [1.0, 1.0]}
        if side.compresses:
            report = rank_report(side.model)
            details[name]["ranks"] = report["rank"].to_dict()
            kept, whole = report[["rank", "parameters"]].sum(), report[["full_rank", "dense_parameters"]].sum()
            details[name]["kept"] = (kept.to_numpy() / whole.to_numpy()).tolist()
    schedule = RankBudgetSchedule.of(run.config, options.steps)
    share = products / float(np.median(details["dense"]["seconds"]))
    tables = {"runs": run_rows(details, share), "phases": phase_rows(details, schedule, share)}
    return {"tables": tables, "sides": details, "share of matrix products": share}


def run_rows(details: dict[str, dict[str, Any]], share: float) -> Rows:
    """A row a side: the whole run. The share is that of matrix products in a dense step."""
    rows: Rows = []
    of_dense = {key: sum(details["dense"][key]) for key in ("seconds", "multiply_adds")}
    for name, side in details.items():
        total = {key: sum(side[key]) + (name == "two-round") * before for key, before in of_dense.items()}
        row = {
            "side": name,
            "groups kept": side["kept"][0],
            "parameters kept": side["kept"][1],
            "steps, s": total["seconds"],
            "/ dense": total["seconds"] / of_dense["seconds"],
            "promised": (promised := total["multiply_adds"] / of_dense["multiply_adds"]),
            "promised with the rest": share * promised + (1 - share) * (2 if name == "two-round" else 1),
            "once, s": side["once"],
            "with once / dense": (total["seconds"] + side["once"]) / of_dense["seconds"],
            "own share": sum(side["own_seconds"]) / total["seconds"],
        }
        rows.append(row)
    return rows


def phase_rows(details: dict[str, dict[str, Any]], schedule: RankBudgetSchedule, share: float) -> Rows:
    """A row a side and phase: one step. Of the two-round pipeline, one of the second round."""
    phases = {
        "warm-up": slice(0, schedule.warmup_steps),
        "adjusting": slice(schedule.warmup_steps, schedule.final_step),
        "cool-down": slice(schedule.final_step, schedule.total_steps),
    }
    dense = details["dense"]
    return [
        {
            "side": name,
            "phase": phase,
            "steps": len(side["seconds"][part]),
            "step, ms": spread(side["seconds"][part]),
            "/ dense": median_ratio(side["seconds"][part], dense["seconds"][part]),
            "promised": (promised := sum(side["multiply_adds"][part]) / sum(dense["multiply_adds"][part])),
            "promised with the rest": share * promised + 1 - share,
        }
        for name, side in details.items()
        for phase, part in phases.items()
        if side["seconds"][part]
    ]


def memory(options: argparse.Namespace) -> Results:
    """Peak memory of each part of a run, each side in a process of its own, beside what theory says."""
    children = {name: started(memory_of_side, options, name) for name in ("dense", *options.sides)}
    sides: dict[str, dict[str, Any]] = {}
    for name, child in children.items():
        child.send("start")
        sides[name] = child.recv()
    stages = ["before the model", "model", "injection", "step 1", "step 2", f"step {options.steps}", "finish"]
    rows = [
        {"peak": stage} | {f"{name}, MB": side["peaks"].get(stage, "") for name, side in sides.items()}
        for stage in dict.fromkeys(stages)
    ]
    # The interpreter and its libraries are no part of what is compared.
    highest = {name: max(side["peaks"].values()) - side["peaks"]["before the model"] for name, side in sides.items()}
    compared = {"highest, less that before the model": highest}
    for step in ("first", "last"):
        compared[f"in theory, {step} step"] = {name: side["in_theory"][step] for name, side in sides.items()}
    for label, sizes in compared.items():
        row = {"peak": label} | {f"{name}, MB": size for name, size in sizes.items()}
        rows.append(row | {f"{name} / dense": sizes[name] / sizes["dense"] for name in options.sides})
    return {"tables": {"memory": rows}, "sides": sides}


def memory_of_side(options: argparse.Namespace, name: str, connection: Connection) -> None:
    """Run one side, and send its peaks in MB: of each part, where the system can begin anew, else so far."""
    connection.recv()  # one side after the other
    if options.threads:
        torch.set_num_threads(options.threads)
    peaks: dict[str, float] = {}

    def note(part: str) -> None:
        peaks[part] = peak_memory() / 1e6
        forget_peak()

    note("before the model")
    run = run_of(options)
    model = load_model(options.model, options.seed)
    if name == "dense-first":
        # What the metric takes does not depend on how many rows it is of.
        run = replace(run, rows=[random_batch(model, options.batch, options.length) for _ in range(2)])
    note("model")
    if SIDES[name].takes_groups:
        inject_singular_groups(model, run.config)
        note("injection")
    side = SIDES[name](model, run)
    in_theory = {"first": side.bytes_held() / 1e6}
    for number in range(1, options.steps + 1):
        side.step(number, random_batch(model, options.batch, options.length))
        note(f"step {number}")
    in_theory["last"] = side.bytes_held() / 1e6
    side.finish()
    note("finish")
    connection.send({"peaks": peaks, "in_theory": in_theory})


def run_of(options: argparse.Namespace) -> Run:
    """The run that the options describe."""
    schedule = {"rank_warmup_steps": options.warmup, "rank_cooldown_steps": options.cooldown}
    config = RankDynaConfig(
        rank_ratio=options.rank_ratio,
        param_ratio=options.param_ratio,
        start_ratio=options.start_ratio,
        block_floor=0.0,
        **schedule,
    )
    return Run(config, options.steps, options.dtype == "bf16")
