"""Time on the device: by events of a GPU, which nobody has to wait for, or by the clock where there is none."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from .models import DEVICE

WARM_UP = 3


def wait() -> None:
    """Until all that was asked of the GPU, if there is one, is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Mark:
    """A moment: on a GPU the one at which it comes to this place in its queue, else now."""

    def __init__(self) -> None:
        self._time = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if DEVICE.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def seconds_since(self, earlier: "Mark") -> float:
        """Of two marks that the device has passed: call [`wait`] before."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return float(earlier._event.elapsed_time(self._event)) / 1000


def marked(work: Callable[[], object], calls: int = 1) -> tuple[Mark, Mark]:
    """Before and after some calls of it, on a device that had nothing else to do."""
    wait()
    start = Mark()
    for _ in range(calls):
        work()
    return start, Mark()


def seconds_in_turns(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    calls: int = 1,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """
    The seconds of a call of each work, `repeats` times, in turns, the order reversed each time.

    Args:
        works: by name. Each is called a few times before.
        repeats: how many numbers are wanted of each.
        calls: one after another for each number, which is their mean.
        before: called before each of them, and not timed.
    """
    marks: dict[str, list[tuple[Mark, Mark]]] = {label: [] for label in works}
    for number in range(-WARM_UP, repeats):
        for label in list(works) if number % 2 else reversed(list(works)):
            before()
            both = marked(works[label], calls)
            if number >= 0:
                marks[label].append(both)
    wait()
    return {label: [end.seconds_since(start) / calls for start, end in pairs] for label, pairs in marks.items()}


def median_seconds(work: Callable[[], object], repeats: int, calls: int = 1) -> float:
    """Of a call."""
    return statistics.median(seconds_in_turns({"": work}, repeats, calls)[""])


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """What starts all kernels of a call at once, as a CUDA graph: on the same tensors each time."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
