"""The rank budget at a step: eq. 3, 4 and 12 in whole numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from ..options import part_of

if TYPE_CHECKING:
    from ..config import RankDynaConfig

# A warm-up whose end is found by the loss is at most this part of the run.
LONGEST_WARMUP = 0.5


class Station(NamedTuple):
    """
    A size at which a run stays, in optimizer steps.

    Attributes:
        begin: the budget falls after this step,
        reached: is at the size of the station after this one,
        left: and stays until this one.
    """

    begin: int
    reached: int
    left: int


@dataclass(frozen=True)
class RankBudgetSchedule:
    """
    When the budget falls: warm-up (`t0` steps), adjusting, cool-down (`t1` steps).

    A run of several sizes has equal shares of the adjusting steps and of the cool-down at each of its stations.

    Args:
        warmup_steps: `t0`, how many first optimizer steps keep the whole budget.
        cooldown_steps: `t1`, how many optimizer steps keep a budget that was reached: the last ones, if there is one.
        total_steps: `T`, the optimizer steps of the whole run.
        sizes: how many budgets are reached, one after the other.
        left_early: of the first stations at which steps they were left; the last one has the steps that were spared.

    Raises:
        ValueError: no step is left between warm-up and cool-down, or fewer than there are stations.
    """

    warmup_steps: int
    cooldown_steps: int
    total_steps: int
    sizes: int = 1
    left_early: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if self.adjusting_steps < self.sizes:
            missing = "no step to fall in" if self.sizes == 1 else f"too few steps to fall to {self.sizes} sizes"
            raise ValueError(
                f"The rank budget has {missing}: {self.warmup_steps} warm-up and {self.cooldown_steps} "
                f"cool-down steps of {self.total_steps} in all. Decrease rank_warmup_steps or rank_cooldown_steps, or "
                "train for more steps."
            )

    @classmethod
    def from_parts(cls, warmup: float, cooldown: float, total_steps: int, sizes: int = 1) -> RankBudgetSchedule:
        """
        A schedule from `rank_warmup_steps` and `rank_cooldown_steps`: steps, or parts of all steps in (0, 1), rounded
        up. If that alone leaves no step between them, a cool-down of several steps is rounded down.
        """
        warmup_steps, cooldown_steps = _steps(warmup, total_steps), _steps(cooldown, total_steps)
        if warmup_steps + cooldown_steps == total_steps and cooldown_steps > 1 and cooldown < 1:
            cooldown_steps = math.floor(part_of(cooldown, total_steps))
        return cls(warmup_steps, cooldown_steps, total_steps, sizes)

    @classmethod
    def of(cls, config: RankDynaConfig, total_steps: int, warmup_steps: int | None = None) -> RankBudgetSchedule:
        """
        The schedule that a config chooses.

        With `rank_warmup_steps="auto"` the warm-up is the longest possible one until its end is found, and a
        `rank_cooldown_steps` in (0, 1) is a part of the steps after it, so that what is left for removing groups
        stays in proportion.

        Args:
            config: the choices.
            total_steps: `T`.
            warmup_steps: `t0` as it was found.
        """
        warmup, cooldown = config.rank_warmup_steps, config.rank_cooldown_steps
        if isinstance(warmup, str):
            longest = math.ceil(part_of(LONGEST_WARMUP, total_steps))
            if cooldown >= 1:
                longest = min(longest, max(total_steps - int(cooldown) - 1, 0))
            warmup = longest if warmup_steps is None else warmup_steps
            if cooldown < 1:
                cooldown = math.floor(part_of(cooldown, total_steps - warmup))
        return cls.from_parts(warmup, cooldown, total_steps, len(config.ratios))

    @property
    def adjusting_steps(self) -> int:
        """`T - t0 - t1`: the optimizer steps in which the budget falls."""
        return self.total_steps - self.warmup_steps - self.cooldown_steps

    @cached_property
    def stations(self) -> tuple[Station, ...]:
        """The sizes of the run, one after the other."""
        found: list[Station] = []
        begin = self.warmup_steps
        for number in range(self.sizes):
            falling, staying = (
                share(steps, number, self.sizes) for steps in (self.adjusting_steps, self.cooldown_steps)
            )
            reached = begin + falling
            early = self.left_early[number] if number < len(self.left_early) else None
            left = reached + staying if early is None else early
            found.append(Station(begin, reached, self.total_steps if number == self.sizes - 1 else left))
            begin = left
        return tuple(found)

    @property
    def final_step(self) -> int:
        """`T - t1` of a run with one size: the first optimizer step at the final budget."""
        return self.stations[-1].reached

    @property
    def update_interval(self) -> int:
        """
        How many optimizer steps pass between two removals unless a user says so: 10, which costs less than to remove
        at each of them and keeps the same score (`scripts/reproduce.py parts`), but at most a 16th of those in which
        the budget falls to a size.
        """
        return max(1, min(10, self.adjusting_steps // self.sizes // 16))

    def station_at(self, step: int) -> int | None:
        """The number of the station at whose size the budget is after `step` finished optimizer steps, if any."""
        *earlier, last = self.stations
        if step >= last.reached:
            return len(earlier)
        return next((number for number, at in enumerate(earlier) if at.reached <= step <= at.left), None)

    def until(self, station: int, step: int) -> RankBudgetSchedule:
        """The schedule of a run that ends with this step, and has come to this station by then if it could."""
        if self.sizes == 1:
            return self
        reached = self.stations[station].reached
        return RankBudgetSchedule(self.warmup_steps, max(step - reached, 0), max(step, reached))

    def leave_early(self, step: int) -> RankBudgetSchedule:
        """The schedule of a run that leaves the station of this step, which is not the last one, with it."""
        number = self.station_at(step)
        if number is None or number == self.sizes - 1:
            raise ValueError(f"The run is at none of its first {self.sizes - 1} stations at step {step}.")
        earlier = (*self.left_early, *[None] * number)[:number]
        return replace(self, left_early=(*earlier, step))

    def budget(self, step: int, initial: int, finals: Sequence[int]) -> int:
        """
        `R(t)`, eq. 12 as design and prose of the paper mean it (as printed it starts above `R(0)` and ends above
        `R(T)`): `R(T) + ceil((R(0) - R(T)) * (1 - (t - t0) / (T - t0 - t1))^3)` between `t0` and `T - t1`, and so from
        the budget of each station to that of the next.

        Args:
            step: `t`, the number of finished optimizer steps.
            initial: `R(0)`, in groups or in parameters.
            finals: of each station the budget, in the same unit; of the last one it is `R(T)`.
        """
        for station, before, final in zip(self.stations, (initial, *finals[:-1]), finals, strict=True):
            steps = station.reached - station.begin
            if step < station.reached:
                left = min(station.reached - step, steps)
                return final - (-(before - final) * left**3 // steps**3)
        return finals[-1]


def share(steps: int, number: int, sizes: int) -> int:
    """The steps, of all that fall or stay, that the station of a number has: equal parts, to rounding."""
    return steps * (number + 1) // sizes - steps * number // sizes


def scoring_steps(beta: float, warmup_steps: int) -> int:
    """
    How many of the warm-up's last steps score the groups that are made within it, so that the first removal does not
    rest on a single batch: the `1 / (1 - beta)` steps that eq. 11 averages over, at most half of the warm-up.
    """
    return min(math.ceil(1 / (1 - part_of(beta, 1))), warmup_steps // 2)


def final_rank_budget(rank_ratio: float, initial: int) -> int:
    """`R(T) = ceil(c * R(0))`, eq. 4."""
    return math.ceil(part_of(rank_ratio, initial))


def final_parameter_budget(param_ratio: float, initial: int) -> int:
    """The parameters to keep of `initial`: rounded down, since the budget is never exceeded."""
    return math.floor(part_of(param_ratio, initial))


def _steps(steps: float, total_steps: int) -> int:
    return int(steps) if steps >= 1 else math.ceil(part_of(steps, total_steps))
