"""
The steps before the first removal. In their first part the model learns its task, dense where it can be; then groups
in the metric of the inputs are made, and in the second part they gather their scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers.architecture import head_was_trained
from ..layers.distributed import is_distributed, sum_of_processes
from ..layers.hooks import Hook
from ..layers.injection import refactor_groups
from ..layers.notices import AboveProgressBars
from ..layers.singular_group import singular_group_layers
from ..options import AUTO
from .dense_phase import DensePhase, Observe
from .loss_plateau import LossPlateau
from .model_outputs import loss_of
from .removal import forget_state
from .schedule import RankBudgetSchedule, scoring_steps
from .warnings import LossWatch

if TYPE_CHECKING:
    from ..config import RankDynaConfig

logger = AboveProgressBars(logging.getLogger(__name__))


class Warmup:
    """
    The warm-up of a run, from its first step or from the one at which it is resumed.

    Args:
        model: in training, with singular groups, or dense if `observe` is given.
        config: the choices.
        optimizer: which holds the model's parameters.
        total_steps: of the whole run.
        finished_steps: of them.
        warns: whether to tell if the loss has not fallen; a compiled model is not slowed down for that.
        observe: from layers by name to the second moments of their inputs, by which groups are to be made.
        before_factoring: called once, when the first part ends, before any layer is changed.

    Attributes:
        schedule: of the run; with `rank_warmup_steps="auto"` that of the longest warm-up, until its end is found.
        learning: whether the first part is under way.
        dense: the target layers, while they are not factored.
        factored: called once these are in groups, with the number of finished optimizer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RankDynaConfig,
        optimizer: Optimizer,
        total_steps: int,
        finished_steps: int = 0,
        warns: bool = True,
        observe: Observe | None = None,
        before_factoring: Callable[[], object] | None = None,
    ) -> None:
        self._config, self._optimizer, self._before_factoring = config, optimizer, before_factoring
        self.factored: Callable[[int], object] | None = None
        self._model = model
        self._makes_groups = observe is not None
        has_groups = bool(singular_group_layers(model))
        self.dense = None if has_groups or observe is None else DensePhase(model, config, optimizer, observe)
        self._distributed = is_distributed()
        self._refactor = partial(refactor_groups, model, observe) if self._distributed and observe else None
        self.schedule = RankBudgetSchedule.of(config, total_steps)
        self.learning = finished_steps < self._learning_steps or not finished_steps
        self._watch = LossWatch() if warns and not finished_steps else None
        self._plateau: LossPlateau | None = None
        if config.rank_warmup_steps == AUTO:
            self._plateau = LossPlateau(total_steps, head_was_trained(model))
        self._losses: list[Tensor] = []  # of the batches of one step
        self._computed: list[Tensor] = []  # those that the model did not return
        watches = self.learning and (self._watch is not None or self._plateau is not None)
        self._handle = model.register_forward_hook(Hook(self._note)) if watches else None

    @property
    def _learning_steps(self) -> int:
        return self.schedule.warmup_steps - self._scoring_steps(self.schedule.warmup_steps)

    def _scoring_steps(self, warmup_steps: int) -> int:
        return scoring_steps(self._config.importance_beta, warmup_steps) if self._makes_groups else 0

    def finish_step(self, step: int) -> bool:
        """
        Take note of a finished step, and end the first part if it is over.

        Args:
            step: the number of finished optimizer steps.

        Returns:
            Whether the groups are new.
        """
        if not self.learning:
            return False
        if not self._losses and self._computed:
            self._losses = self._computed
            if self._watch is not None:
                for loss in self._losses:
                    self._watch.note(loss)
        if self._plateau is not None and not self._losses and step == 1:
            logger.warning(
                'The model returns no loss that rank_warmup_steps="auto" could wait for: the warm-up takes %d steps. '
                "Give a number of steps, or a part of all steps, such as 0.2.",
                self.schedule.warmup_steps,
            )
        if self._plateau is not None and self._losses and self._plateau.add(self._loss_of_step()):
            found = step + self._scoring_steps(2 * step)  # the last ones of the warm-up
            self.schedule = RankBudgetSchedule.of(self._config, self.schedule.total_steps, found)
        self._losses, self._computed = [], []
        return step >= self._learning_steps and self.end_learning(step)

    def note_loss(self, loss: Tensor) -> None:
        """
        Take note of the loss of a batch, which counts if the model returns none.

        Args:
            loss: one number.
        """
        if self.learning and (self._watch is not None or self._plateau is not None):
            self._computed.append(loss.detach().float().reshape(()))

    def end_learning(self, step: int) -> bool:
        """
        End the first part now, if it is under way: make the groups that are to be made.

        Args:
            step: the number of finished optimizer steps.

        Returns:
            Whether the groups are new.
        """
        if not self.learning:
            return False
        self.learning = False
        if self._handle is not None:
            self._handle.remove()
        if self._watch is not None:
            self._watch.warn_if_flat(step, self.schedule.warmup_steps)
        if self._before_factoring is not None:
            self._before_factoring()
        if self.dense is not None:
            self.dense.end()
            self.dense = None
            if self.factored is not None:
                self.factored(step)
            return True
        layers = singular_group_layers(self._model).values()
        # A run that was given up has left fewer groups: they are gone on with as they are.
        if self._refactor is None or any(layer.rank < layer.initial_rank for layer in layers):
            return False
        self._refactor()
        forget_state([factor for layer in layers for factor in layer.factors().values()], self._optimizer)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What [`load_state_dict`] needs to go on, in plain JSON values."""
        state: dict[str, Any] = {"learning": self.learning, "warmup_steps": self.schedule.warmup_steps}
        if self.schedule.left_early:
            state["left_early"] = [*self.schedule.left_early]
        return state | ({} if self._plateau is None else self._plateau.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a [`state_dict`]."""
        self.learning = state["learning"]
        schedule = RankBudgetSchedule.of(self._config, self.schedule.total_steps, state["warmup_steps"])
        self.schedule = replace(schedule, left_early=tuple(state.get("left_early", ())))
        if self._plateau is not None:
            self._plateau.load_state_dict(state)
        if self._handle is not None and not self.learning:
            self._handle.remove()

    def _note(self, model: nn.Module, inputs: Any, output: Any) -> None:
        loss = loss_of(output) if model.training else None
        if loss is None or not self.learning:  # a compiled model does not see that the hook is gone
            return
        loss = loss.detach().float().reshape(())
        self._losses.append(loss)
        if self._watch is not None:
            self._watch.note(loss)

    def _loss_of_step(self) -> float:
        """The mean over the batches of a step, the same in all processes."""
        loss = torch.stack([loss.to(self._losses[0].device) for loss in self._losses]).mean()
        if self._distributed:
            loss, processes = sum_of_processes([loss, torch.ones_like(loss)])
            loss = loss / processes
        return loss.item()
