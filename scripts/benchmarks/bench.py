"""What the parts of a suite are given, and what they fill."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from .measuring import Results, Rows
from .sizes import Sizes


@dataclass
class Bench:
    """
    A suite that runs.

    Attributes:
        sizes: of its parts.
        seed: of all random numbers.
        ends: when its budget is used up, by `time.monotonic`.
        write: writes down what there is.
        results: of the part that runs, which fills it as it goes on: an error or an end loses only what is not there.
        rate: the operations a second that the device reaches, once they are measured.
        bandwidth: the bytes a second, likewise.
    """

    sizes: Sizes
    seed: int
    ends: float
    write: Callable[[], None]
    results: Results = field(default_factory=dict)
    rate: float = math.nan
    bandwidth: float = math.nan

    @property
    def remaining(self) -> float:
        """Seconds of the budget."""
        return self.ends - time.monotonic()

    def show(self, table: str, rows: Rows) -> None:
        """Take over the rows of a table of the part that runs, and write."""
        self.results.setdefault("tables", {})[table] = rows
        self.write()


def bytes_read(model: nn.Module) -> int:
    """Of the weights in a forward pass: of an embedding next to nothing."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return sum(p.nbytes for p in model.parameters() if id(p) not in embeddings)
