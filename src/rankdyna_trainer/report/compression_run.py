"""What is told of the training that compressed a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..config import RankDynaConfig
from ..method.schedule import RankBudgetSchedule


@dataclass(frozen=True)
class CompressionRun:
    """
    What a card tells of the training that compressed a model.

    Attributes:
        config: the choices.
        schedule: the steps of each phase.
        initial_budget: `R(0)`, in groups, or in parameters with `param_ratio`.
        final_budget: `R(T)`, in the same unit.
        finished_steps: at which optimizer step the run ended.
        scores_before: of a dense model to compare with, by name; empty if none is known.
        scored_before: which model that is, in words.
        scores_after: of the model that was saved, likewise.
        scored_step: after how many steps `scores_after` was found.
        datasets: ids on the Hub of the data that it was trained on.
        teacher: who taught it, in words; `None` if nobody did.
        training: the hyper-parameters, in words, by name.
    """

    config: RankDynaConfig
    schedule: RankBudgetSchedule
    initial_budget: int
    final_budget: int
    finished_steps: int
    scores_before: Mapping[str, float] = field(default_factory=dict)
    scored_before: str = ""
    scores_after: Mapping[str, float] = field(default_factory=dict)
    scored_step: int | None = None
    datasets: Sequence[str] = ()
    teacher: str | None = None
    training: Mapping[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What the budgets count."""
        return "groups" if self.config.param_ratio is None else "parameters"
