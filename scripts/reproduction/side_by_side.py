"""Cells of a table that run at once, in some processes, one after another: on one GPU, or on the cores of a CPU."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

# What takes seconds to import, and is the same in each process.
PRELOADED = [
    "rankdyna_trainer",
    "datasets",
    "evaluate",
    "peft",
    "sklearn.metrics",
    "scipy.stats",
    "transformers.trainer",
]


class Cell(NamedTuple):
    """A run that a table will ask for, under a name that is a path."""

    name: str
    run: Callable[[], object]


def run_side_by_side(cells: Sequence[Cell], jobs: int, logs: Path) -> None:
    """
    Run cells, in their order, several at once. A cell that fails keeps no other from running.

    Args:
        cells: of which one may need another: who comes second waits for it.
        jobs: how many processes there are at once.
        logs: a folder, into which each cell writes `NAME.log`.

    Raises:
        RuntimeError: a cell failed, after all others are finished.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        # A library that looks for a GPU while it is imported must not open it in the process that is forked.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        context.set_forkserver_preload(PRELOADED)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    failed: list[str] = []
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        names = {pool.submit(_run, cell, logs / f"{cell.name}.log"): cell.name for cell in cells}
        for number, future in enumerate(as_completed(names), start=1):
            name, error = names[future], future.exception()
            if error is not None:
                failed.append(f"{name}: {error!r} ({logs / name}.log)")
            print(f"{number}/{len(names)} {name}{'' if error is None else f': {error!r}'}", flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(names)} cells failed:\n" + "\n".join(failed))


def _run(cell: Cell, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    try:
        cell.run()
    finally:
        gc.collect()
        torch.cuda.empty_cache()
