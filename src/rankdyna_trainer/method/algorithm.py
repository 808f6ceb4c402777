"""Algorithm 1 of the paper as one object, for any training loop."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..config import RankDynaConfig
from ..layers.compaction import compact_and_tell
from ..layers.distributed import is_distributed, local_part, of_first_process, true_in_all_processes
from ..layers.hooks import release
from ..layers.interruption import interrupt_held_back
from ..layers.low_rank import LowRankLinear
from ..layers.singular_group import SingularGroupLinear
from .allocation import select_groups
from .budget import RankBudget
from .group_fisher import GroupFisher
from .hessian import HessianDiagonal
from .importance import gradients_are_finite, smooth_importance, step_scores
from .removal import check_optimizer, clear_removed_groups, cut_groups, hand_over, remove_groups, state_without_groups
from .schedule import RankBudgetSchedule

# Each cut makes the optimizer and the kernels start on new shapes, so it waits until it is worth it.
CUT_WHEN_REMAINING = 0.75

logger = logging.getLogger(__name__)


class RankDyna:
    """
    Scores the singular groups of a model at each step and removes those that its budget does not allow.

    [`RankDynaCallback`] calls it from the `Trainer`'s events. A loop of one's own calls the same two methods:

    ```python
    inject_singular_groups(model, config)
    optimizer = torch.optim.AdamW(model.parameters())
    rankdyna = RankDyna(model, config, optimizer, total_steps)
    for step, batch in enumerate(batches, start=1):
        model(**batch).loss.backward()
        rankdyna.update_importance()
        optimizer.step()
        rankdyna.enforce_budget(step)
        optimizer.zero_grad()
    compact(model)
    ```

    Where several processes train one model, under DDP or FSDP2, make it after the model is wrapped, and call its
    methods in all of them: they decide alike. Removed groups leave the computation there too, but the tensors only at
    the end.

    Args:
        model: with singular groups, from [`inject_singular_groups`].
        config: the choices.
        optimizer: which holds the model's parameters.
        total_steps: `T`, how many optimizer steps the run has.
        finished_steps: how many of them a run that is resumed has behind it.
        compiled: whether `torch.compile` compiles the model's forward pass: anew after each cut, so that removed
            groups are then cut out of the tensors only once, at the final budget.

    Raises:
        ValueError: the model has no singular groups, or is compacted; the optimizer does not hold them all; the
            schedule leaves no step to remove groups in; or the score cannot be had with `compiled`, or under FSDP2.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RankDynaConfig,
        optimizer: Optimizer,
        total_steps: int,
        finished_steps: int = 0,
        compiled: bool = False,
    ) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, SingularGroupLinear)}
        if not layers:
            raise ValueError(
                "The model that is being trained has no singular groups. Pass the RankDynaCallback to the Trainer's "
                "constructor (callbacks=[...]) instead of add_callback, since it must see the model before the "
                "optimizer does. A model_init must return inject_singular_groups(model, config)."
            )
        check_optimizer(layers, optimizer)
        if compiled and config.importance_score != "first_order":
            raise ValueError(
                f'importance_score="{config.importance_score}" cannot be used with torch.compile, which runs no hooks '
                'in a backward pass and gives no second derivatives. Leave it out, or use "first_order".'
            )
        self.model = model
        self.config = config
        self.optimizer = optimizer
        self.layers = list(layers.values())
        self.rank_budget = RankBudget(
            config,
            RankBudgetSchedule.from_parts(config.rank_warmup_steps, config.rank_cooldown_steps, total_steps),
            [(layer.out_features, layer.in_features) for layer in self.layers],
            [layer.initial_rank for layer in self.layers],
        )
        self._check_something_to_remove()
        self._distributed = is_distributed()
        self._cut_when_remaining = 0.0 if compiled else CUT_WHEN_REMAINING
        self._cuts: bool | None = None
        self._gradients_finite = torch.tensor(True)
        self._enforced_step = finished_steps
        if not compiled:
            self._leave_out_removed()
        release(model)  # of a run that was given up
        self._curvature: GroupFisher | HessianDiagonal | None = None
        if config.importance_score == "fisher":
            self._curvature = GroupFisher(self.layers)
        elif config.importance_score == "second_order":
            self._curvature = HessianDiagonal(model, self.layers, finished_steps)
        self._tell_progress(finished_steps)

    @property
    def remaining_groups(self) -> int:
        """How many groups of the model remain."""
        return sum(layer.rank for layer in self.layers)

    @property
    def remaining_parameters(self) -> int:
        """How many numbers the target layers' weights would hold if the model were compacted now."""
        return sum(layer.parameters_when_compacted for layer in self.layers)

    @property
    def meets_final_budget(self) -> bool:
        """Whether nothing is left to remove."""
        return not self._excess(self.schedule.final_step)

    @property
    def schedule(self) -> RankBudgetSchedule:
        """The steps of each phase."""
        return self.rank_budget.schedule

    def budget(self, step: int) -> int:
        """`R(t)` after `step` finished optimizer steps: in groups, or in parameters with `param_ratio`."""
        return self.rank_budget.at(step)

    def update_importance(self) -> None:
        """
        Score all groups by the gradients that the model holds now, and smooth the scores (eq. 9 to 11).

        Call it after the gradients are unscaled and clipped, before `optimizer.step()`. Scores do not change where a
        gradient of the model is inf or nan.
        """
        scores = step_scores(self.layers, self._curvature)
        self._gradients_finite = gradients_are_finite(self.model, scores)
        for layer, values in zip(self.layers, scores, strict=True):
            smooth_importance(layer, values, self.config.importance_beta, self._gradients_finite)

    def enforce_budget(self, step: int) -> None:
        """
        Remove the least important groups that exceed the budget `R(step)`.

        Call it after `optimizer.step()`. Nothing is removed after gradients that were inf or nan: a loss scaler skips
        such a step, and a later one makes up for it.

        Args:
            step: the number of finished optimizer steps, this one included.
        """
        with interrupt_held_back():
            if not self._state_can_be_cut():
                for layer in self.layers:
                    clear_removed_groups(layer)
            due = step >= self.schedule.final_step or step % self.config.rank_update_interval == 0
            # The gradients are looked at only where something is to be removed, since it waits for the device.
            if due and (not self._excess(step) or self._gradients_finite):
                self._enforce(step)
            self._tell_progress(step)

    def finish(self, step: int) -> None:
        """
        Enforce the budget `R(step)`, compact the model, and let the optimizer go on with its P and Q. It is the last
        call.

        Args:
            step: the number of finished optimizer steps; below the final one a warning says which budget was reached.
        """
        with interrupt_held_back():
            self._finish(step)

    def _finish(self, step: int) -> None:
        finite = torch.stack([local_part(parameter).isfinite().all().cpu() for parameter in self.model.parameters()])
        if not (true_in_all_processes(finite.all()) if self._distributed else finite.all()):
            raise ValueError(
                f"Training diverged: at step {step} the model's weights have inf or nan. It is not compacted, and "
                "nothing was saved. Resume from an earlier checkpoint, or train with a lower learning rate."
            )
        self._enforce(step)
        self._tell_progress(step)
        self.layers, self._curvature = [], None  # each is freed as soon as it is compacted
        compact_and_tell(self.model, self._hand_over)

    def _hand_over(self, layer: SingularGroupLinear, new: Any) -> None:
        p, q = (new.p, new.q.weight) if isinstance(new, LowRankLinear) else (new, None)
        successors: dict[nn.Parameter, Any] = {layer.u: p.weight, layer.v: q, layer.sigma: None}
        if layer.bias is not None:
            successors[layer.bias] = p.bias
        hand_over(self.optimizer, successors)

    def _excess(self, step: int) -> list[tuple[Sequence[int], int]]:
        return self.rank_budget.excess([layer.rank for layer in self.layers], step)

    def _enforce(self, step: int) -> None:
        for pool, budget in self._excess(step):
            self._shrink(pool, budget)
        final = step >= self.schedule.final_step
        self._cut(1.0 if final else self._cut_when_remaining)
        if final:
            self._leave_out_removed()
        self._enforced_step = step

    def _shrink(self, pool: Sequence[int], budget: int) -> None:
        layers = [self.layers[i] for i in pool]
        scores = [layer.importance[layer.remaining] for layer in layers]
        if self._distributed:
            scores = of_first_process(scores)
        costs, caps = ([sizes[i] for i in pool] for sizes in (self.rank_budget.costs, self.rank_budget.caps))
        kept_groups = select_groups(scores, costs, caps, budget, self.config.rank_multiple_of)
        for layer, kept in zip(layers, kept_groups, strict=True):
            remaining = layer.remaining.clone()
            remaining[layer.remaining] = kept
            remove_groups(layer, remaining, self.optimizer)

    def _leave_out_removed(self) -> None:
        for layer in self.layers:
            if not layer.leaves_out_removed:
                layer.leave_out_removed()

    def _cut(self, threshold: float) -> None:
        """Cut all removed groups out of the tensors, if of the groups' numbers at most this part remains."""
        held = sum(layer.width * layer.group_parameters for layer in self.layers)
        remaining = sum(max(layer.rank, 1) * layer.group_parameters for layer in self.layers)
        if remaining < held and remaining <= threshold * held and not self._distributed and self._state_can_be_cut():
            cut_groups([layer for layer in self.layers if max(layer.rank, 1) < layer.width], self.optimizer)

    def _state_can_be_cut(self) -> bool:
        if self._cuts is None and any(layer.rank < layer.width for layer in self.layers):
            obstacle = state_without_groups(self.layers, self.optimizer)
            if self.optimizer.state is not self.optimizer.state:
                obstacle = "a view of several states"
            self._cuts = obstacle is None
            if obstacle is not None:
                logger.warning(
                    "Removed groups stay in the tensors, as zeros, until the model is compacted: %s keeps a state "
                    "(%s) that cannot be cut by groups. Steps get cheaper all the same, but take no less memory.",
                    type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__,
                    obstacle,
                )
        return self._cuts is not False

    def _tell_progress(self, step: int) -> None:
        """Leave word for [`compact`], which may be called after an interruption, when this object is out of reach."""
        if self.meets_final_budget:
            self.model.__dict__.pop("_rankdyna_unfinished", None)
            return
        unit = "parameters" if self.config.param_ratio is not None else "singular groups"
        last = self.schedule.final_step
        self.model.__dict__["_rankdyna_unfinished"] = (
            f"Training stopped at step {step}, before the final budget is reached at step {last}: the model is "
            f"compacted to the budget that it has met, {self.budget(self._enforced_step)} {unit} "
            f"(final: {self.budget(last)})."
        )

    def _check_something_to_remove(self) -> None:
        was_compacted = any(layer.initial_rank < layer.full_rank for layer in self.layers)
        if was_compacted and self.rank_budget.initial == self.rank_budget.final:
            chosen = "rank_ratio" if self.config.param_ratio is None else "param_ratio"
            raise ValueError(
                f"The model was compressed before, and holds no more than {chosen}={getattr(self.config, chosen)} of "
                f"the dense one. Give a smaller {chosen}, or train it on as it is, without the RankDynaCallback."
            )
