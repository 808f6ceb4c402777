"""
Wall-clock time of models, measured so that they can be compared on a machine that does other things too.

`torch.utils.benchmark` times one side for a block of seconds, and then the other, on which something else may fall.
In turns, by `timeit(1)`, it would run each work three times for one that it tells, since it warms up each time.
"""

import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 3


def now() -> float:
    """Seconds, when all that was asked of the GPU, if there is one, is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object]) -> float:
    """The seconds that it takes."""
    start = now()
    work()
    return now() - start


def timed_in_turns(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """
    The seconds of each work, `repeats` times, one after another: what else the machine does then falls on all of them.

    Each is run a few times before, and the order is reversed each time.
    """
    seconds: dict[str, list[float]] = {label: [] for label in works}
    for number in range(-WARM_UP, repeats):
        for label in list(works) if number % 2 else reversed(list(works)):
            taken = timed(works[label])
            if number >= 0:
                seconds[label].append(taken)
    return seconds
