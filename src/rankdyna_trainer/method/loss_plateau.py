"""When a training loss has fallen and flattened, so that there is something to keep. Pure: numbers in, numbers out."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

# How many windows of like length a run has; the loss is averaged over each.
WINDOWS = 40
# The loss has fallen when it is below this part of what it was in the second window: in the first one it only learns
# the mean of the labels, and batches of like lengths, one after the other, differ by a tenth or more.
FALLEN = 0.75
# It has flattened when two windows lose less than this part of what was lost so far, or of what it has to lose.
FLAT = 0.1


class LossPlateau:
    """
    Follows the training loss from the first step of a run.

    Args:
        total_steps: of the run.
        learnt: whether the model may have learnt its task before: then the loss need not fall, only be flat.
    """

    def __init__(self, total_steps: int, learnt: bool = False) -> None:
        self._learnt = learnt
        self._window = math.ceil(total_steps / WINDOWS)
        self._means: list[float] = []
        self._losses: list[float] = []

    def add(self, loss: float) -> bool:
        """
        Note the loss of the next step.

        Returns:
            Whether it has fallen, unless it need not, and flattened.
        """
        self._losses.append(loss)
        if len(self._losses) < self._window:
            return False
        self._means.append(fmean(self._losses))
        self._losses = []
        if len(self._means) < 5:
            return False
        begin, before, now = self._means[1], fmean(self._means[-4:-2]), fmean(self._means[-2:])
        has_fallen = now < FALLEN * begin
        lost = max(begin - now, (1 - FALLEN) * begin)
        return (has_fallen or self._learnt) and before - now < FLAT * lost

    def state_dict(self) -> dict[str, Any]:
        """What [`load_state_dict`] needs to go on, in plain JSON values."""
        return {"means": [*self._means], "losses": [*self._losses], "learnt": self._learnt}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a [`state_dict`]."""
        self._means, self._losses = list(state["means"]), list(state["losses"])
        self._learnt = state["learnt"]
