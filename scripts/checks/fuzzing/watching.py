"""What must hold of a run at each of its steps."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear
from rankdyna_trainer.layers.architecture import names_by_block
from rankdyna_trainer.layers.singular_group import singular_group_layers
from rankdyna_trainer.method.algorithm import RankDyna

from .allocation import budget, chosen, cost, raised

# Rprop's least step and Adamax's least scale: a group whose gradient is zero goes nowhere with them.
REFILLED = ("step_size", "exp_inf")


class Broken(AssertionError):
    """Something does not hold that must."""


def require(holds: object, what: str) -> None:
    """Raise [`Broken`] if it does not hold."""
    if not holds:
        raise Broken(what)


class Groups(NamedTuple):
    """The remaining groups of a layer before the budget is enforced: their scores."""

    scores: Tensor
    is_remaining: Tensor


class Watch:
    """
    Looks at a run before and after each call of its `RankDyna`.

    Args:
        model: in training.
        config: the choices.
        rankdyna: of the run.
        optimizer: of the run.
    """

    def __init__(self, model: nn.Module, config: RankDynaConfig, rankdyna: RankDyna, optimizer: Optimizer) -> None:
        self.model, self.config, self.rankdyna, self.optimizer = model, config, rankdyna, optimizer
        self.initial_ranks = list(rankdyna.initial_ranks)
        name = "param_ratio" if config.rank_ratio is None else "rank_ratio"
        self.unit: tuple[str, float] = (name, getattr(config, name))
        self.removals = 0

    @property
    def layers(self) -> dict[str, SingularGroupLinear]:
        """The layers in groups, by name."""
        return singular_group_layers(self.model)

    def update_importance(self, overflow: bool) -> None:
        """Let the run score its groups, and compute the scores of first order a second time."""
        before = {name: layer.importance.clone() for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            for key, factor in layer.factors().items():
                rows = None if factor.grad is None else factor.grad[~layer.remaining]
                require(
                    rows is None or overflow or not rows.any(), f"a removed group of {name} has a gradient in {key}"
                )
        self.rankdyna.update_importance()
        for name, layer in self.layers.items():
            if overflow:
                require(torch.equal(layer.importance, before[name]), f"inf in a gradient changed the score of {name}")
            elif self.config.importance_score == "first_order":
                beta = self.config.importance_beta
                expected = beta * before[name].double() + (1 - beta) * first_order(layer)
                close = torch.allclose(layer.importance.double(), expected, rtol=1e-4, atol=1e-12)
                require(close, f"the scores of {name} are not those of eq. 9 to 11")
            require(not layer.importance[~layer.remaining].any(), f"a removed group of {name} has a score")

    def enforce_budget(self, step: int, overflow: bool) -> None:
        """Let the run enforce its budget, and choose the groups a second time."""
        before = {
            name: Groups(layer.importance.clone(), layer.remaining.clone()) for name, layer in self.layers.items()
        }
        self.rankdyna.enforce_budget(step)
        if self.layers and not before:
            self._check_ranks([layer.rank for layer in self.layers.values()], self.initial_ranks, "after factoring")
            return
        schedule = self.rankdyna.schedule
        interval = self.config.rank_update_interval or max(1, min(10, schedule.adjusting_steps // 16))
        due = (step >= schedule.final_step or step % interval == 0) and not overflow
        self._check_choice(before, step, due)
        self.check_removed(overflow)

    def _check_choice(self, before: dict[str, Groups], step: int, due: bool) -> None:
        layers, schedule = self.layers, self.rankdyna.schedule
        names = list(layers)
        phases = (schedule.warmup_steps, schedule.cooldown_steps, schedule.total_steps)
        shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
        scores = [groups.scores[groups.is_remaining].tolist() for groups in before.values()]
        by_parameters, multiple = self.unit[0] == "param_ratio", self.config.rank_multiple_of
        kept = [set(range(len(values))) for values in scores]
        pools = [range(len(names))] if self.config.rank_scope == "global" else [[i] for i in range(len(names))]
        for pool in pools if due else ():
            of = [shapes[i] for i in pool]
            most = budget(step, phases, [self.initial_ranks[i] for i in pool], of, self.unit)
            if cost([len(scores[i]) for i in pool], of, by_parameters) <= most:
                continue
            values = [scores[i] for i in pool]
            if len(pool) > 1:
                blocks = [[names.index(name) for name in inside] for inside in self._blocks(names)]
                values = raised(values, of, by_parameters, most, multiple, blocks, self.config.block_floor)
            for i, groups in zip(pool, chosen(values, of, by_parameters, most, multiple), strict=True):
                kept[i] = groups
            ranks = [layers[names[i]].rank for i in pool]
            held = cost(ranks, of, by_parameters)
            require(held <= most, f"{held} are held at step {step}, of {most} that are allowed")
            require(not any(rank % multiple for rank in ranks), f"ranks {ranks} are no multiples of {multiple}")
            self._check_used_up(ranks, [len(scores[i]) for i in pool], of, most)
            self.removals += 1
        self._check_ranks([layer.rank for layer in layers.values()], [len(groups) for groups in kept], f"step {step}")
        for layer, values, groups, name in zip(layers.values(), scores, kept, names, strict=True):
            expected = torch.tensor([values[k] for k in sorted(groups)])
            require(torch.equal(layer.importance[layer.remaining], expected), f"other groups of {name} were kept")

    def _blocks(self, names: Sequence[str]) -> list[list[str]]:
        return list(names_by_block(self.model, names).values())

    def _check_used_up(
        self, ranks: Sequence[int], had: Sequence[int], shapes: Sequence[tuple[int, int]], most: int
    ) -> None:
        """No further group, or so many as are kept together, fits into the budget."""
        multiple = self.config.rank_multiple_of
        for i, rank in enumerate(ranks):
            more = [*ranks[:i], rank + multiple, *ranks[i + 1 :]]
            fits = cost(more, shapes, self.unit[0] == "param_ratio") <= most
            require(rank + multiple > had[i] or not fits, f"{multiple} more groups would fit into matrix {i}")

    def _check_ranks(self, ranks: Sequence[int], expected: Sequence[int], when: str) -> None:
        require(list(ranks) == list(expected), f"{when}: ranks {list(ranks)}, expected {list(expected)}")

    def check_removed(self, overflow: bool) -> None:
        """All that is left of removed groups is zero, but for gradients in a step that is skipped."""
        states = self.optimizer.state
        for name, layer in self.layers.items():
            removed = ~layer.remaining
            require(not layer.importance[removed].any(), f"a removed group of {name} has a score")
            for key, factor in layer.factors().items():
                require(not factor[removed].any(), f"a removed group of {name} is not zero in {key}")
                without = factor.grad is None or overflow or not factor.grad[removed].any()
                require(without, f"a removed group of {name} has a gradient in {key}")
        if all(has_groups(factor, states) for layer in self.layers.values() for factor in layer.factors().values()):
            for name, layer in self.layers.items():
                for key, factor in layer.factors().items():
                    for state, value in states.get(factor, {}).items():
                        of_groups = isinstance(value, Tensor) and value.shape == factor.shape and state not in REFILLED
                        rows = value[~layer.remaining] if of_groups else factor[:0]
                        require(not rows.any(), f"a removed group of {name} has the state {state} of {key}")

    def check_handed_over(self) -> None:
        """The optimizer holds the parameters of the compacted model."""
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        missing = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        require(not missing, f"the optimizer does not hold {missing}")
        own = {id(parameter) for parameter in self.model.parameters()}
        require(held <= own, f"the optimizer holds {len(held - own)} parameters that the model has not")
        require({id(p) for p in self.optimizer.state} <= own, "the optimizer has a state of a former parameter")


def has_groups(factor: Tensor, states: dict[Tensor, dict[str, object]]) -> bool:
    """Whether the state of a factor has the groups in its rows."""
    values = [value for value in states.get(factor, {}).values() if value is not None]
    tensors = [value for value in values if isinstance(value, Tensor) and value.numel() > 1]
    others = [value for value in values if not isinstance(value, (Tensor, int, float))]
    return not others and all(tensor.shape == factor.shape for tensor in tensors)


def first_order(layer: SingularGroupLinear) -> Tensor:
    """Eq. 9 with the first term of eq. 10, in float64."""
    total = torch.zeros(layer.width, dtype=torch.float64)
    for factor in layer.factors().values():
        if factor.grad is not None:
            sizes = (factor.detach().double() * factor.grad.double()).abs()
            total += sizes.reshape(layer.width, math.prod(sizes.shape[1:])).sum(dim=1)
    return total
