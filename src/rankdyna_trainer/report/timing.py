"""
Wall-clock time of models, measured so that they can be compared on a machine that does other things too.

`torch.utils.benchmark` times one side for a block of seconds, and then the other, on which something else may fall.
In turns, by `timeit(1)`, it would run each work three times for one that it tells, since it warms up each time.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layers.rank_record import set_record

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


def forward_pass(model: Any, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    """A forward pass without gradients, as a work to be timed."""
    return torch.inference_mode()(partial(model, **inputs))


def dense_like(compacted: PreTrainedModel, config: Any) -> PreTrainedModel:
    """
    A dense model with random weights, which takes the time that the one takes for which a compacted one stands.

    Args:
        compacted: of which it has the class and the precision.
        config: of the compacted model, as it was read from its folder.
    """
    config = copy.deepcopy(config)
    set_record(config, None)
    return type(compacted)._from_config(config, dtype=compacted.dtype)


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile; of a single measurement that, three times."""
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [*seconds] * 3
    return low, median, high


def device_in_words(device: torch.device) -> str:
    """The name of a GPU, or on how many threads a CPU computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"
