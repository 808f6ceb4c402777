"""Algorithm 1 of the paper as one object, for any training loop."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import RankDynaConfig
from ..layers.architecture import names_by_block
from ..layers.compaction import UNFINISHED, Unfinished, compact_and_tell
from ..layers.distributed import is_distributed, of_first_process
from ..layers.hooks import release
from ..layers.input_moments import input_moments
from ..layers.interruption import interrupt_held_back
from ..layers.singular_group import SingularGroupLinear, singular_group_layers
from .allocation import select_groups, with_floor
from .budget import RankBudget
from .checks import check_possible, check_something_is_left, check_something_to_remove, check_weights
from .cutting import GroupCutting
from .group_fisher import GroupFisher
from .hessian import HessianDiagonal
from .importance import gradients_are_finite, smooth_importance, step_scores
from .optimizer_entries import hand_over_compacted
from .removal import check_optimizer, clear_removed_groups, on_cpu, remove_groups
from .schedule import RankBudgetSchedule
from .warmup import Warmup
from .warnings import BlockWatch, warn_if_little_is_left


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

    Attributes:
        initial_ranks: how many groups each target layer has when the run begins.

    Args:
        model: with singular groups, from [`inject_singular_groups`].
        config: the choices.
        optimizer: which holds the model's parameters.
        total_steps: `T`, how many optimizer steps the run has.
        finished_steps: how many of them a run that is resumed has behind it.
        compiled: whether `torch.compile` compiles the model's forward pass: anew after each cut, so that removed
            groups are then cut out of the tensors only once, at the final budget.
        batches: of the training set, as for [`inject_singular_groups`]. The model may then be dense: its layers are
            factored in the warm-up, unless `group_basis="weights"` or `fixed_shapes`.
        run: what to do with a batch; by default the model is called with its entries as arguments.
        before_factoring: called once, when the layers are to be factored, before any of them is changed; with
            `group_basis="weights"` when the warm-up ends.

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
        batches: Iterable[Any] | None = None,
        run: Callable[[Any], object] | None = None,
        before_factoring: Callable[[], object] | None = None,
    ) -> None:
        layers = singular_group_layers(model)
        observe = None
        if batches is not None and config.group_basis != "weights" and not config.fixed_shapes:
            observe = partial(input_moments, model, batches=batches, run=run)
        check_possible(config, has_groups=bool(layers), has_batches=observe is not None, compiled=compiled)
        self.model = model
        self.config = config
        self.optimizer = optimizer
        self.layers: list[SingularGroupLinear] = []
        self._distributed = is_distributed()
        self._compiled = compiled
        self._cutting = GroupCutting(optimizer, self._distributed or config.fixed_shapes, compiled)
        self._gradients_finite = torch.tensor(True)
        self._enforced_step = finished_steps
        self._curvature: GroupFisher | HessianDiagonal | None = None
        self._block_watch: BlockWatch | None = None
        self._blocks: list[list[int]] = []
        release(model)  # of a run that was given up
        self._warmup = Warmup(
            model, config, optimizer, total_steps, finished_steps, not compiled, observe, before_factoring
        )
        self._warmup.factored = self._take_up
        if (dense := self._warmup.dense) is not None:
            shapes, self.initial_ranks = dense.shapes, dense.initial_ranks
        else:
            shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
            self.initial_ranks = [layer.initial_rank for layer in layers.values()]
        self.rank_budget = RankBudget(config, self._warmup.schedule, shapes, self.initial_ranks)
        check_something_to_remove(config, self.rank_budget, self.initial_ranks)
        check_something_is_left(config, self.rank_budget, self.initial_ranks)
        if layers:
            self._take_up(finished_steps)
        if not self.schedule.warmup_steps:
            self._warmup.end_learning(finished_steps)
        self._tell_progress(finished_steps)

    @property
    def remaining_groups(self) -> int:
        """How many groups of the model remain."""
        return sum(self._ranks())

    @property
    def remaining_parameters(self) -> int:
        """How many numbers the target layers' weights would hold if the model were compacted now."""
        shapes = zip(self._ranks(), self.rank_budget.shapes, strict=True)
        return sum(min(rank * (out + into), out * into) for rank, (out, into) in shapes)

    @property
    def meets_final_budget(self) -> bool:
        """Whether nothing is left to remove."""
        return not self._excess(self.schedule.final_step)

    @property
    def learning(self) -> bool:
        """Whether the model is to learn its task yet, before groups of its inputs are made, or any is removed."""
        return self._warmup.learning

    @property
    def schedule(self) -> RankBudgetSchedule:
        """The steps of each phase."""
        return self.rank_budget.schedule

    def state_dict(self) -> dict[str, Any]:
        """What a resume has to know, beside model and optimizer, of `rank_warmup_steps="auto"`: plain JSON values."""
        return self._warmup.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a [`state_dict`]."""
        self._warmup.load_state_dict(state)
        self.rank_budget.schedule = self._warmup.schedule

    def budget(self, step: int) -> int:
        """`R(t)` after `step` finished optimizer steps: in groups, or in parameters with `param_ratio`."""
        return self.rank_budget.at(step)

    def station_at(self, step: int) -> int | None:
        """The number of the station whose budget holds after `step` optimizer steps and is met now, or `None`."""
        number = self.schedule.station_at(step)
        return None if number is None or self._excess(step) else number

    def leave_station(self, step: int) -> None:
        """Let the budget fall to that of the next station from this step on, and spare the rest of the stay."""
        self._warmup.schedule = self.rank_budget.schedule = self.schedule.leave_early(step)

    def note_loss(self, loss: Tensor) -> None:
        """Tell the loss of a batch that was computed outside of the model: `"auto"` waits for it to be flat."""
        self._warmup.note_loss(loss)

    def update_importance(self) -> None:
        """
        Score all groups by the gradients that the model holds now, and smooth the scores (eq. 9 to 11).

        Call it after the gradients are unscaled and clipped, before `optimizer.step()`. Scores do not change where a
        gradient of the model is inf or nan.
        """
        if self._warmup.dense is not None:
            return
        scores = step_scores(self.layers, self._curvature)
        self._gradients_finite = gradients_are_finite(self.model, scores)
        smooth_importance(self.layers, scores, self.config.importance_beta, self._gradients_finite)

    def enforce_budget(self, step: int) -> None:
        """
        Remove the least important groups that exceed the budget `R(step)`.

        Call it after `optimizer.step()`. Nothing is removed after gradients that were inf or nan: a loss scaler skips
        such a step, and a later one makes up for it.

        Args:
            step: the number of finished optimizer steps, this one included.
        """
        with interrupt_held_back():
            new_groups = self._warmup.finish_step(step)
            self.rank_budget.schedule = self._warmup.schedule
            if new_groups:  # after a step that a loss scaler skipped the budget has fallen, but none has a score yet
                self._tell_progress(step)
                return
            if not self._cutting.state_can_be_cut(self.layers):
                for layer in self.layers:
                    clear_removed_groups(layer)
            interval = self.config.rank_update_interval or self.schedule.update_interval
            due = self.schedule.station_at(step) is not None or step % interval == 0
            # The gradients are looked at only where something is to be removed, since it waits for the device.
            if self.layers and due and (not self._excess(step) or self._gradients_finite):
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
        check_weights(self.model, step)
        self._warmup.end_learning(step)
        self._enforce(step)
        warn_if_little_is_left(self.rank_budget, self._ranks())
        self._tell_progress(step)
        self.layers, self._curvature, self._block_watch = [], None, None  # each is freed as soon as it is compacted
        compact_and_tell(self.model, partial(hand_over_compacted, self.optimizer))

    def _take_up(self, finished_steps: int) -> None:
        layers = singular_group_layers(self.model)
        check_optimizer(layers, self.optimizer)
        self.layers = list(layers.values())
        numbers = {name: number for number, name in enumerate(layers)}
        self._blocks = [[numbers[name] for name in names] for names in names_by_block(self.model, layers).values()]
        self._block_watch = BlockWatch(self.model, layers)
        if not self._compiled:
            self._leave_out_removed()
        if self.config.importance_score == "fisher":
            self._curvature = GroupFisher(self.layers)
        elif self.config.importance_score == "second_order":
            self._curvature = HessianDiagonal(self.model, self.layers, finished_steps)

    def _ranks(self) -> list[int]:
        return [layer.rank for layer in self.layers] if self._warmup.dense is None else self._warmup.dense.ranks

    def _excess(self, step: int) -> list[tuple[Sequence[int], int]]:
        return self.rank_budget.excess(self._ranks(), step)

    def _enforce(self, step: int) -> None:
        for pool, budget in self._excess(step):
            self._shrink(pool, budget)
            if self._block_watch is not None:
                self._block_watch.warn_of_empty(step)
        final = step >= self.schedule.final_step
        self._cutting.cut(self.layers, at_the_end=final)
        if final:
            self._leave_out_removed()
        self._enforced_step = step

    def _shrink(self, pool: Sequence[int], budget: int) -> None:
        layers = [self.layers[i] for i in pool]
        importance = [layer.importance for layer in layers]
        if self._distributed:
            importance = of_first_process(importance)
        scores = [values[layer.remaining_on_cpu] for layer, values in zip(layers, on_cpu(importance), strict=True)]
        costs, caps = ([sizes[i] for i in pool] for sizes in (self.rank_budget.costs, self.rank_budget.caps))
        multiple_of, blocks = self.config.rank_multiple_of, self._blocks if len(pool) > 1 else []
        scores = with_floor(scores, costs, caps, budget, blocks, self.config.block_floor, multiple_of)
        kept_groups = select_groups(scores, costs, caps, budget, multiple_of)
        for layer, kept in zip(layers, kept_groups, strict=True):
            remaining = layer.remaining_on_cpu.clone()
            remaining[layer.remaining_on_cpu] = kept
            remove_groups(layer, remaining, self.optimizer)

    def _leave_out_removed(self) -> None:
        for layer in self.layers:
            if not layer.leaves_out_removed:
                layer.leave_out_removed()

    def _tell_progress(self, step: int) -> None:
        """Leave word for [`compact`], which may be called after an interruption, when this object is out of reach."""
        if self.meets_final_budget:
            self.model.__dict__.pop(UNFINISHED, None)
            return
        unit = "parameters" if self.config.param_ratio is not None else "singular groups"
        last = self.schedule.final_step
        met = max(self.budget(self._enforced_step), self.rank_budget.cost(self._ranks()))  # more while it is dense
        self.model.__dict__[UNFINISHED] = Unfinished(
            f"Training stopped at step {step}, before the final budget is reached at step {last}: the model is "
            f"compacted to the budget that it has met, {met} {unit} "
            f"(final: {self.budget(last)})."
        )
