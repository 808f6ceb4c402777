"""The plugin: the events of a `Trainer` become calls of the algorithm."""

import inspect
import logging
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from .algorithm import RankDyna
from .checkpoint import save_compacted
from .compaction import compact
from .config import RankDynaConfig
from .injection import inject_singular_groups
from .layers import SingularGroupLinear
from .report import compression_summary, summary_table

logger = logging.getLogger(__name__)


class RankDynaCallback(TrainerCallback):
    """
    Compresses the model of a `Trainer` while it is fine-tuned (Hua et al., Findings of EMNLP 2023, Algorithm 1).

    Give it to the `Trainer`'s constructor. It replaces the linear layers by singular groups when the `Trainer` is
    made, scores and removes groups in training, and at the end makes the model a compacted one and saves it into
    `args.output_dir`. At each logging step it adds `rank_budget` (in groups, or in parameters with `param_ratio`),
    `remaining_groups` and `remaining_parameters` (of the target layers' weights) to the logs.

    Args:
        config: the choices.

    Raises:
        TypeError: `config` is no [`RankDynaConfig`].
        ValueError: from the `Trainer`'s constructor, or at the start of `train()`, when the model, the optimizer or
            the schedule cannot be used; see [`inject_singular_groups`] and [`RankDyna`].

    Example:

    ```python
    trainer = Trainer(model, args, train_dataset=train, callbacks=[RankDynaCallback(RankDynaConfig(rank_ratio=0.2))])
    trainer.train()
    ```
    """

    def __init__(self, config: RankDynaConfig) -> None:
        if not isinstance(config, RankDynaConfig):
            raise TypeError(
                f"RankDynaCallback takes a RankDynaConfig, such as RankDynaConfig(rank_ratio=0.2): got {config!r}."
            )
        self.config = config
        self._rankdyna: RankDyna | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Replace the target layers, before any optimizer exists or a checkpoint is loaded."""
        if args.deepspeed_plugin is not None:
            raise ValueError(
                "RankDyna cannot run under DeepSpeed, which steps inside of backward, where no callback sees the "
                "gradients. Use DDP or FSDP: remove the deepspeed argument, or run accelerate config anew."
            )
        if not any(isinstance(module, SingularGroupLinear) for module in model.modules()):
            inject_singular_groups(model, self.config)
        _log_before_trackers(self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Check all that is known only now, and begin."""
        self._rankdyna = RankDyna(model, self.config, optimizer, state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Score the groups: the gradients are unscaled and clipped, the values those that they were taken at."""
        self._running.update_importance()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Optimizer, **_: Any
    ) -> None:
        """Enforce the budget on the updated weights, unless a loss scaler skipped the update."""
        if not getattr(optimizer, "step_was_skipped", False):
            self._running.enforce_budget(state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Add the budget and what remains to the logs of a training step, and to the history, which has a copy."""
        if self._rankdyna is None or "loss" not in logs:
            return
        sizes = {
            "rank_budget": self._rankdyna.budget(state.global_step),
            "remaining_groups": self._rankdyna.remaining_groups,
            "remaining_parameters": self._rankdyna.remaining_parameters,
        }
        logs.update(sizes)
        state.log_history[-1].update(sizes)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Compact the model, save it, and show what was gained."""
        rankdyna = self._running
        rankdyna.enforce_budget(state.global_step)
        final_step = rankdyna.schedule.final_step
        if state.global_step < final_step:
            logger.warning(
                "Training stopped at step %d, before the final budget is reached at step %d: the model is compacted "
                "to the budget of that step, %d (final: %d).",
                state.global_step,
                final_step,
                rankdyna.budget(state.global_step),
                rankdyna.budget(final_step),
            )
        self._rankdyna = None
        compact(model)
        if not args.should_save:
            return
        if processing_class is None:
            processing_class = getattr(getattr(train_dataloader, "collate_fn", None), "tokenizer", None)
        file_bytes = save_compacted(model, args.output_dir, processing_class)
        if state.is_world_process_zero:
            print(summary_table(compression_summary(model), file_bytes))

    @property
    def _running(self) -> RankDyna:
        if self._rankdyna is None:
            raise RuntimeError(
                "The RankDynaCallback was added while training runs. Give it to the Trainer's constructor: "
                "Trainer(..., callbacks=[RankDynaCallback(config)])."
            )
        return self._rankdyna


def _log_before_trackers(callback: RankDynaCallback) -> None:
    """
    Move the callback to the front of the `Trainer`'s list, so that its numbers are in the logs when the trackers of
    `report_to`, which stand before all callbacks of a user, read them. A callback is given neither the `Trainer` nor
    the list: they are found in the frame that calls it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back
