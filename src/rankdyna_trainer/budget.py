"""What the matrices of a model may hold together after a step: R(t) of eq. 3, 4 and 12, over pools of matrices."""

from collections.abc import Sequence

from .config import RankDynaConfig
from .schedule import RankBudgetSchedule, final_parameter_budget, final_rank_budget


class RankBudget:
    """
    The budget of a run, in groups, or in parameters with `param_ratio`.

    With `rank_scope="global"` all matrices share it, in one pool; with `"local"` each matrix is a pool of its own.

    Args:
        config: the choices.
        schedule: the steps of each phase.
        shapes: `(out_features, in_features)` of each matrix.
        initial_ranks: how many groups each matrix begins with: fewer than `min(out_features, in_features)` in a model
            that was compacted before, of which the ratio is still a part of the dense one.

    Attributes:
        costs: what one group of each matrix costs.
        caps: the most that the groups of each matrix together can cost.
        pools: the numbers of the matrices that share a budget.
    """

    def __init__(
        self,
        config: RankDynaConfig,
        schedule: RankBudgetSchedule,
        shapes: Sequence[tuple[int, int]],
        initial_ranks: Sequence[int],
    ) -> None:
        by_parameters = config.param_ratio is not None
        self.schedule = schedule
        self.costs = [out + into if by_parameters else 1 for out, into in shapes]
        self.caps = [out * into if by_parameters else min(out, into) for out, into in shapes]
        everything = range(len(shapes))
        self.pools: list[Sequence[int]] = [everything] if config.rank_scope == "global" else [[i] for i in everything]
        self._ends = [self._ends_of(config, pool, initial_ranks) for pool in self.pools]

    @property
    def initial(self) -> int:
        """`R(0)`."""
        return sum(initial for initial, _ in self._ends)

    @property
    def final(self) -> int:
        """`R(T)`."""
        return sum(final for _, final in self._ends)

    def at(self, step: int) -> int:
        """`R(t)` after `step` finished optimizer steps."""
        return sum(self.schedule.budget(step, *ends) for ends in self._ends)

    def excess(self, ranks: Sequence[int], step: int) -> list[tuple[Sequence[int], int]]:
        """
        The pools that hold more than they may after `step` finished optimizer steps, and what each of them may hold.

        Args:
            ranks: of the matrices.
            step: the number of finished optimizer steps.
        """
        allowed = [self.schedule.budget(step, *ends) for ends in self._ends]
        return [(pool, most) for pool, most in zip(self.pools, allowed, strict=True) if self._cost(pool, ranks) > most]

    def _cost(self, pool: Sequence[int], ranks: Sequence[int]) -> int:
        return sum(min(ranks[i] * self.costs[i], self.caps[i]) for i in pool)

    def _ends_of(self, config: RankDynaConfig, pool: Sequence[int], initial_ranks: Sequence[int]) -> tuple[int, int]:
        initial, dense = self._cost(pool, initial_ranks), sum(self.caps[i] for i in pool)
        if config.param_ratio is not None:
            return initial, min(initial, final_parameter_budget(config.param_ratio, dense))
        return initial, min(initial, final_rank_budget(config.rank_ratio or 1.0, dense))
