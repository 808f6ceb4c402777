"""What the matrices of a model may hold together after a step: R(t) of eq. 3, 4 and 12, over pools of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .schedule import RankBudgetSchedule, final_parameter_budget, final_rank_budget

if TYPE_CHECKING:
    from ..config import RankDynaConfig


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
        shapes: of each matrix, as given.
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
        self.shapes = shapes
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
        return self.finals[-1]

    @property
    def finals(self) -> list[int]:
        """The budget at each station of the run, the last of which is `R(T)`."""
        return [sum(of_pools) for of_pools in zip(*(finals for _, finals in self._ends), strict=True)]

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

    def usable(self, ranks: Sequence[int], multiple: int) -> int:
        """
        The most of the final budget that can be used if each matrix keeps a multiple of so many groups.

        Args:
            ranks: of the matrices before anything is removed.
            multiple: of the groups of a matrix.
        """
        return sum(
            self._cost(pool, ranks) if self._cost(pool, ranks) <= final else self._usable(pool, final, ranks, multiple)
            for pool, (_, (*_, final)) in zip(self.pools, self._ends, strict=True)
        )

    def _usable(self, pool: Sequence[int], final: int, ranks: Sequence[int], multiple: int) -> int:
        prices = [min(multiple * self.costs[i], self.caps[i]) for i in pool if ranks[i] >= multiple]
        if min(prices, default=final + 1) > final:
            return 0
        if len(pool) == 1:
            final -= final % prices[0]
        return min(final, self._cost(pool, [rank - rank % multiple for rank in ranks]))

    def cost(self, ranks: Sequence[int]) -> int:
        """What the matrices hold at these ranks, in the unit of the budget."""
        return sum(self._cost(pool, ranks) for pool in self.pools)

    def _cost(self, pool: Sequence[int], ranks: Sequence[int]) -> int:
        return sum(min(ranks[i] * self.costs[i], self.caps[i]) for i in pool)

    def _ends_of(
        self, config: RankDynaConfig, pool: Sequence[int], initial_ranks: Sequence[int]
    ) -> tuple[int, list[int]]:
        initial, dense = self._cost(pool, initial_ranks), sum(self.caps[i] for i in pool)
        final_budget = final_rank_budget if config.param_ratio is None else final_parameter_budget
        return initial, [min(initial, final_budget(ratio, dense)) for ratio in config.ratios]


def uniform_rank(config: RankDynaConfig, out_features: int, in_features: int) -> int:
    """
    How many groups a layer keeps, if each layer is brought to the same ratio.

    With `rank_ratio` `ceil(c * l_W)`, eq. 4 for one matrix; with `param_ratio` the most that fit into this part of the
    weight's numbers; then the multiple of `rank_multiple_of` below. If P and Q of so many groups would hold more
    numbers than the weight, fewer groups save nothing, and it is all of them, `min(out_features, in_features)`.
    """
    full_rank, dense = min(out_features, in_features), out_features * in_features
    ratio = config.ratios[-1]
    if config.param_ratio is not None:
        budget = final_parameter_budget(ratio, dense)
        rank = full_rank if budget == dense else budget // (out_features + in_features)
    else:
        rank = final_rank_budget(ratio, full_rank)
    if rank < full_rank:
        rank -= rank % config.rank_multiple_of
    return full_rank if rank * (out_features + in_features) > dense else rank
