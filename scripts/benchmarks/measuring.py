"""Times: how they are measured, in this or in a new process, and how they are shown."""

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry

from .device_time import wait
from .models import DEVICE

Rows = list[dict[str, Any]]
Results = dict[str, Any]  # the tables, as lists of rows by name under "tables", and what else is kept


def product_seconds(work: Callable[[], object]) -> float:
    """How long the device is busy with matrix products meanwhile, which operation counts speak of: a median of 3."""
    on_gpu = DEVICE.type == "cuda"
    # Without those of the CPU the kernels would not be told by the operators that they belong to.
    activities = [ProfilerActivity.CPU] + on_gpu * [ProfilerActivity.CUDA]
    products = {f"aten::{operator.__name__}" for operator in flop_registry}
    seconds = []
    for _ in range(3):
        with profile(activities=activities) as profiler:
            work()
            wait()
        events = [event for event in profiler.key_averages() if event.key in products]
        seconds.append(sum(e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events) / 1e6)
    return statistics.median(seconds)


def spread(seconds: Sequence[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, median, high = (shown(value) for value in np.percentile(np.array(seconds) * 1000, [25, 50, 75]))
    return f"{median} [{low}, {high}]"


def shown(number: float) -> str:
    """To four digits."""
    return np.format_float_positional(number, precision=4, fractional=False, trim="-")


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Of the two medians."""
    return float(np.median(seconds) / np.median(others))


def started(target: Callable[..., None], *arguments: Any) -> Connection:
    """The connection to a new process, whose function gets the other end as its last argument."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=target, args=(*arguments, there), daemon=True).start()
    there.close()  # so that a process that dies is noticed here
    return here
