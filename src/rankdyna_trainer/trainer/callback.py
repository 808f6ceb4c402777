"""The plugin: the events of a `Trainer` become calls of the algorithm."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import is_compiled_module
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint.run_state import INITIAL_RANKS, RUN_KEY, WARMUP
from ..checkpoint.saving import check_saving
from ..checkpoint.step_record import write_record
from ..config import RankDynaConfig
from ..layers.compaction import is_compacted
from ..method.algorithm import RankDyna
from ..method.checks import check_weights
from ..options import AUTO
from ..report.printed import print_outline
from ..report.tables import kept_shares, remaining_counts
from .access_token import protect_token
from .averages import check_averages, check_reference_model, warn_of_other_models
from .calling_trainer import calling_trainer, output_dir
from .card import card_of, prepare_card
from .checks import (
    check_backend,
    check_best_model,
    check_further_training,
    check_module,
    check_resumed,
    check_single,
    warn_of_little_hope,
)
from .ending import collator_tokenizer, is_shown, save_and_show
from .explained_errors import check_checkpoint_places, explain_errors
from .observed_loss import observe_loss
from .progress_bar import show_kept
from .scores import checked_scores, saved_scores
from .setup import check_before_loading, config_of_trial, move_to_front, prepare_in_model_init, prepare_model
from .stations import RunStations, check_stations
from .teacher import RunTeacher
from .training_rows import observed_rows


class RankDynaCallback(TrainerCallback):
    """
    Compresses the model of a `Trainer` while it is fine-tuned (Hua et al., Findings of EMNLP 2023, Algorithm 1).

    Give it to the `Trainer`'s constructor. It replaces the linear layers by singular groups when the `Trainer` is
    made, scores and removes groups in training, and at the end makes the model a compacted one and saves it, with a
    model card, into `args.output_dir`. The card that `trainer.push_to_hub()` writes later has the same contents.

    At each logging step it adds `kept` (the part of the target layers' parameters that is left) and `kept_of_all` (of
    the whole model's) to the logs. TensorBoard, Weights & Biases and trackio get them with the others, and at the end
    a heatmap of the ranks. `trainer.state.log_history` has the counts as well: `rank_budget` (in groups, or in
    parameters with `param_ratio`), `remaining_groups` and `remaining_parameters` (of the target layers' weights).

    Args:
        config: the choices.
        teacher: a model of the same architecture and sizes, fine-tuned on the same task, instead of `config.teacher`.
        dense_scores: of a dense model on the same task, such as `{"eval_accuracy": 0.86}`, for the card. If left out,
            those that the teacher's folder has, or of an evaluation before the first removal.

    Raises:
        TypeError: `config` is no [`RankDynaConfig`], or `dense_scores` no dict of numbers.
        ValueError: from the `Trainer`'s constructor, or at the start of `train()`, when the model, the optimizer or
            the schedule cannot be used; see [`inject_singular_groups`] and [`RankDyna`].

    Example:

    ```python
    trainer = Trainer(model, args, train_dataset=train, callbacks=[RankDynaCallback(RankDynaConfig(rank_ratio=0.2))])
    trainer.train()
    ```
    """

    def __init__(
        self,
        config: RankDynaConfig,
        teacher: nn.Module | None = None,
        dense_scores: Mapping[str, float] | None = None,
    ) -> None:
        if not isinstance(config, RankDynaConfig):
            raise TypeError(
                f"RankDynaCallback takes a RankDynaConfig, such as RankDynaConfig(rank_ratio=0.2): got {config!r}."
            )
        self.config = self._given_config = config
        self._teacher = RunTeacher(config, teacher)
        self._dense_scores = checked_scores(dense_scores)
        self._training_began = False
        self._rankdyna: RankDyna | None = None  # none as well while a compacted model is trained on

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Replace the target layers, before any optimizer exists or a checkpoint is loaded."""
        check_module(model, trainer := calling_trainer())
        check_backend(args)
        check_reference_model(args, self.config)
        protect_token(args)
        if trainer is not None:
            check_single(trainer, type(self))
            check_best_model(trainer, model)
        self._teacher.check(model, trainer)
        prepare_model(model, self.config, args, None if trainer is None else trainer.optimizer)
        if trainer is not None:
            prepare_in_model_init(trainer, self._choose)
            check_before_loading(trainer)
            move_to_front(self, trainer)
            prepare_card(trainer, self._dense_scores)
            explain_errors(trainer)
            observe_loss(trainer, lambda: self._rankdyna)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Check all that is known only now, and begin."""
        if self._training_began and is_compacted(model):
            check_further_training(model, optimizer)
            self._rankdyna = None
            if (card := card_of(calling_trainer())) is not None:
                card.train_on()
            return
        if args.should_save:
            if args.save_strategy != "no":
                check_checkpoint_places(output_dir(args))
            check_saving(model, output_dir(args), processing_class or collator_tokenizer(train_dataloader))
        check_stations(self.config, model, args)
        self._rankdyna = RankDyna(
            model,
            self.config,
            optimizer,
            state.max_steps,
            finished_steps=state.global_step,
            compiled=args.torch_compile or is_compiled_module(model),
            before_factoring=self._teacher.end_warmup,
            **observed_rows(model, self.config, train_dataloader),
        )
        self._training_began = True
        saved = state.stateful_callbacks.get(RUN_KEY)
        run = {"total steps": state.max_steps, INITIAL_RANKS: self._rankdyna.initial_ranks} | self.config.to_dict()
        check_resumed(state, args, model, run)
        if saved and (warmup := saved.get(WARMUP)) is not None:
            self._rankdyna.load_state_dict(warmup)
        self._note_schedule(state)
        if (card := card_of(calling_trainer())) is not None:
            card.begin(self._rankdyna, state, self._teacher.name, saved_scores(self._teacher.folder))
        self._stations = RunStations(self._rankdyna, args, processing_class, train_dataloader)
        self._teacher.begin(model, args, self._rankdyna)
        if (trainer := calling_trainer()) is not None:
            check_averages(trainer, model, self.config)
            warn_of_other_models(trainer, model)
        warn_of_little_hope(model, state)
        if is_shown(args, state):
            print_outline(self._rankdyna, self._teacher.name)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Save the size that is left now; look at what other callbacks hold, as long as tensors may change."""
        if self._rankdyna is None:
            return
        self._stations.begin_step(state)
        if self._rankdyna.meets_final_budget:
            return
        if (trainer := calling_trainer()) is not None:
            check_averages(trainer, model, self.config)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Any = None, **_: Any
    ) -> None:
        """Score the groups: the gradients are unscaled and clipped, the values those that they were taken at."""
        if not self._training_began:
            raise RuntimeError(
                "The RankDynaCallback was added while training runs. Give it to the Trainer's constructor: "
                "Trainer(..., callbacks=[RankDynaCallback(config)])."
            )
        if self._rankdyna is None:
            return
        self._teacher.check_learnt_from()
        if state.global_step >= state.max_steps:
            # A Trainer that resumes from its last step takes one too many; without gradients nothing changes in it.
            self._rankdyna.model.zero_grad()
        else:
            if (scaler := getattr(optimizer, "scaler", None)) is not None and not args.max_grad_norm:
                # Older versions of transformers unscale only what they clip; in newer ones it is done by now.
                with contextlib.suppress(RuntimeError):
                    scaler.unscale_(optimizer.optimizer)
            self._rankdyna.update_importance()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Optimizer, **_: Any
    ) -> None:
        """Enforce the budget on the updated weights, unless a loss scaler skipped the update."""
        if self._rankdyna is None:
            return
        if not self._rankdyna.meets_final_budget and self._rankdyna.station_at(state.global_step + 1) is None:
            # A larger model is no match for those at a budget that is kept: it neither is the best nor hides theirs.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if not getattr(optimizer, "step_was_skipped", False):
            self._rankdyna.enforce_budget(state.global_step + 1)
            self._note_schedule(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have each of several sizes evaluated, before it is left, and show what is left."""
        if self._rankdyna is not None:
            self._stations.end_step(state, control)
            show_kept(self._rankdyna)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Add what is kept to the logs of a training step, and to the history, which has the counts as well."""
        if self._rankdyna is None or "loss" not in logs:
            return
        check_weights(self._rankdyna.model, state.global_step)
        shown = kept_shares(self._rankdyna)
        if self.config.rank_warmup_steps == AUTO and not self._rankdyna.learning:
            shown["rank_warmup_steps"] = self._rankdyna.schedule.warmup_steps
        shown |= self._teacher.take_parts()
        logs.update(shown)
        state.log_history[-1].update(shown | remaining_counts(self._rankdyna, state.global_step))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete the checkpoint that was just written."""
        self._teacher.save(state.global_step)
        if self._rankdyna is None:
            return
        if args.should_save:
            checkpoint = Path(output_dir(args)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_record(checkpoint, state.global_step, args.world_size)
        self._stations.note_checkpoint(state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: Mapping[str, Any],
        **_: Any,
    ) -> None:
        """Note what is known of the model before training, for its card."""
        if (card := card_of(calling_trainer())) is not None:
            card.note_evaluation(state, metrics)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Compact the model, save it, and show what was gained."""
        best_was_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if hasattr(optimizer, "eval") and not best_was_loaded:
            optimizer.eval()  # a schedule-free optimizer trains at other weights than those that it found
        self._teacher.end()
        if (rankdyna := self._rankdyna) is not None:
            self._rankdyna = None
            if self._stations.end(state):
                return
            rankdyna.finish(state.global_step)
        save_and_show(model, args, state, card_of(calling_trainer()), processing_class, train_dataloader)
        if rankdyna is not None:
            self._stations.show(state)

    def _choose(self, chosen: Mapping[str, Any]) -> RankDynaConfig:
        """Take over what a trial of a hyperparameter search chooses."""
        self.config = self._teacher.config = config_of_trial(self._given_config, chosen)
        return self.config

    def _note_schedule(self, state: TrainerState) -> None:
        """Leave what a run knows only now of its schedule where the next checkpoint has it."""
        changes = self.config.rank_warmup_steps == AUTO or len(self.config.ratios) > 1
        if self._rankdyna is not None and changes:
            state.stateful_callbacks[RUN_KEY][WARMUP] = self._rankdyna.state_dict()
