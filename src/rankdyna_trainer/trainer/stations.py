"""A run of several sizes: the model of each is saved when the run leaves it, and the budget falls on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.run_state import RUN_KEY, WARMUP
from ..checkpoint.taking_over import take_over
from ..config import RankDynaConfig
from ..layers.compaction import compacted_copy
from ..layers.distributed import is_sharded
from ..layers.notices import AboveProgressBars
from ..method.algorithm import RankDyna
from ..report.curve import LAST
from .calling_trainer import calling_trainer, output_dir
from .card import card_of
from .ending import save_and_show
from .kept_score import KeptScore, check_keep_score
from .shown_curve import show_curve

logger = AboveProgressBars(logging.getLogger(__name__))


def station_folder(config: RankDynaConfig, ratio: float) -> str:
    """The name of the folder, in the `output_dir`, of the model of one of several sizes: `"param_ratio-0.5"`."""
    return f"{config.ratio_name}-{ratio:g}"


def check_stations(config: RankDynaConfig, model: nn.Module, args: TrainingArguments) -> None:
    """
    Check before training that each size of a run can be saved.

    Raises:
        NotADirectoryError: a file stands in the place of the folder of one.
        ValueError: FSDP shards the model, of which no copy is made then; or as [`check_keep_score`].
    """
    check_keep_score(calling_trainer(), config, model)
    *earlier, _ = config.ratios
    if earlier and any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"Under FSDP a run has one size: give {config.ratio_name} one number (got {list(config.ratios)}), and "
            "train once for each."
        )
    for ratio in earlier:
        place = Path(output_dir(args)) / station_folder(config, ratio)
        if os.path.lexists(place) and not place.is_dir():
            raise NotADirectoryError(f"{place} is a file, where the model of this size is to be saved: move it.")


class RunStations:
    """
    Conducts a run of several sizes.

    Args:
        rankdyna: of the run.
        args: of the `Trainer`.
        processing_class: as [`save_and_show`] takes it.
        dataloader: likewise.
    """

    def __init__(self, rankdyna: RankDyna, args: TrainingArguments, processing_class: Any, dataloader: Any) -> None:
        self._rankdyna, self._args = rankdyna, args
        self._processing_class, self._dataloader = processing_class, dataloader
        self._kept_score: KeptScore | None = None
        self._is_over = False
        if (trainer := calling_trainer()) is None or len(rankdyna.config.ratios) == 1:
            return
        trainer.remove_callback(AfterOthers)  # of an earlier run
        trainer.add_callback(AfterOthers(self.note_evaluation))
        if rankdyna.config.keep_score is not None and (card := card_of(trainer)) is not None:
            self._kept_score = KeptScore(rankdyna, trainer, card)

    def end_step(self, state: TrainerState, control: TrainerControl) -> None:
        """Ask for an evaluation, and where the best model counts a checkpoint, of each size that the run leaves."""
        if self._kept_score is not None:
            self._kept_score.end_step(state, control)
        trainer = calling_trainer()
        if trainer is None or trainer.eval_dataset is None or self._left(state.global_step) is None:
            return
        control.should_evaluate = True
        control.should_save |= bool(self._args.load_best_model_at_end)

    def begin_step(self, state: TrainerState) -> None:
        """Save the model of the size that the run leaves now, if there is no better one of that size."""
        number = self._left(state.global_step)
        if number is not None and not self._has_best(state):
            self._save(state, number)

    def note_checkpoint(self, state: TrainerState) -> None:
        """Save the model of which a checkpoint was written, if it is the best one of its size so far."""
        number = self._earlier(state.global_step)
        if number is not None and self._has_best(state) and state.best_global_step == state.global_step:
            self._save(state, number)

    def note_evaluation(self, state: TrainerState, control: TrainerControl) -> None:
        """
        Go on to the next size where an evaluation stopped the run at one before the last, and stop where a size has
        lost too much of the score. All other callbacks have seen the evaluation.
        """
        if self._is_over:  # what is evaluated now is the compacted model
            return
        step = state.global_step
        if control.should_training_stop and self._earlier(step) is not None:
            self._rankdyna.leave_station(step)
            state.stateful_callbacks[RUN_KEY][WARMUP] = self._rankdyna.state_dict()
            control.should_training_stop = False
        if self._kept_score is not None and self._kept_score.stops(state):
            control.should_training_stop = True

    def end(self, state: TrainerState) -> bool:
        """Let the model become the smallest of the sizes that held, and save it, if the run has gone on from that."""
        self._is_over = True
        model, config, args = self._rankdyna.model, self._rankdyna.config, self._args
        number = None if self._kept_score is None else self._kept_score.held(state)
        if number is None or not isinstance(model, PreTrainedModel):
            return False
        step = self._rankdyna.schedule.stations[number].left
        take_over(model, Path(output_dir(args)) / station_folder(config, config.ratios[number]))
        told = self._told(replace(state, global_step=step), number)
        card = card_of(calling_trainer())
        save_and_show(model, args, told, card, self._processing_class, self._dataloader, station=number)
        self.show(state)
        return True

    def show(self, state: TrainerState) -> None:
        """Show the sizes that were saved so far side by side: of a run that has ended with the last one."""
        trainer, config = calling_trainer(), self._rankdyna.config
        if trainer is None or not self._args.should_save or len(config.ratios) == 1:
            return
        step = state.global_step - self._is_over  # a size that is left with the run is in the output_dir, if it held
        stations = zip(config.ratios, self._rankdyna.schedule.stations, strict=True)
        names = {station_folder(config, ratio) for ratio, station in stations if station.left <= step}
        note = "" if self._kept_score is None else self._kept_score.in_words(state)
        show_curve(trainer, state, Path(output_dir(self._args)), names | ({LAST} if self._is_over else set()), note)

    def _earlier(self, step: int) -> int | None:
        """The number of the station at which the run is, if that is not the last one."""
        number = self._rankdyna.station_at(step)
        return None if number == len(self._rankdyna.config.ratios) - 1 else number

    def _left(self, step: int) -> int | None:
        """The number of the station that the run leaves with this step, if it leaves one and goes on."""
        number = self._earlier(step)
        return number if number is not None and self._rankdyna.schedule.stations[number].left == step else None

    def _has_best(self, state: TrainerState) -> bool:
        return bool(self._args.load_best_model_at_end and state.best_global_step)

    def _save(self, state: TrainerState, number: int) -> None:
        model, config, args = self._rankdyna.model, self._rankdyna.config, self._args
        directory = Path(output_dir(args)) / station_folder(config, config.ratios[number])
        try:
            copied = compacted_copy(model) if args.should_save else model
            told, card = self._told(state, number), card_of(calling_trainer())
            save_and_show(
                copied, args, told, card, self._processing_class, self._dataloader, directory, station=number
            )
        except OSError as error:
            logger.error("The model of %s could not be saved, and the run goes on: %s", directory.name, error)
        else:
            self.show(state)

    def _told(self, state: TrainerState, number: int) -> TrainerState:
        """The state of a run of this size alone, which ends with this step."""
        config, step = self._rankdyna.config, state.global_step
        schedule = self._rankdyna.schedule.until(number, step)
        chosen = {config.ratio_name: config.ratios[number], "keep_score": None, "total steps": schedule.total_steps}
        chosen |= {"rank_warmup_steps": schedule.warmup_steps, "rank_cooldown_steps": schedule.cooldown_steps}
        runs = state.stateful_callbacks | {RUN_KEY: state.stateful_callbacks[RUN_KEY] | chosen}
        history = [row for row in state.log_history if row.get("step", 0) <= step]
        return replace(state, max_steps=schedule.total_steps, stateful_callbacks=runs, log_history=history)


class AfterOthers(TrainerCallback):
    """
    Comes after all other callbacks, whose decisions it may change.

    Args:
        note_evaluation: called when they have seen an evaluation.
    """

    def __init__(self, note_evaluation: Callable[[TrainerState, TrainerControl], object]) -> None:
        self._note_evaluation = note_evaluation

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the last word."""
        self._note_evaluation(state, control)
