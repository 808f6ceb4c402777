"""A run that ends with the smallest of its sizes that keeps a part of the dense model's score."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from transformers import PreTrainedModel, TrainerControl, TrainerState

from ..config import RankDynaConfig
from ..layers.notices import AboveProgressBars
from ..method.algorithm import RankDyna
from .card import TrainerCard

if TYPE_CHECKING:
    from transformers import Trainer

logger = AboveProgressBars(logging.getLogger(__name__))


class TriedSize(NamedTuple):
    """
    A size that was reached, and evaluated before it was left.

    Attributes:
        ratio: of the config's.
        score: the last one, or the best where the best model counts.
        kept: the part of the dense model's score; of a loss, of which less is better, the part that it is of this one.
    """

    ratio: float
    score: float
    kept: float


def check_keep_score(trainer: Trainer | None, config: RankDynaConfig, model: nn.Module) -> None:
    """
    Check before training that the score of each size can be had, and beside that of the dense model.

    Raises:
        ValueError: there is no evaluation set, no metric, or no step for the dense model; or it is no model that
            `from_pretrained` loads.
    """
    if config.keep_score is None:
        return
    asked = f"keep_score={config.keep_score} compares the score of each size with that of the dense model"
    if trainer is None or trainer.eval_dataset is None or trainer.args.metric_for_best_model is None:
        missing = "eval_dataset" if trainer is None or trainer.eval_dataset is None else "metric_for_best_model"
        raise ValueError(f"{asked}: give the Trainer an eval_dataset, and metric_for_best_model (no {missing} found).")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{asked}, and loads the smallest that held: a {type(model).__name__} has no from_pretrained for that. "
            f"Leave keep_score out: each size is saved in the output_dir."
        )


class KeptScore:
    """
    Compares the score of each size with that of the dense model.

    Args:
        rankdyna: of the run.
        trainer: of the run, with an evaluation set and a metric.
        card: which knows the scores of the dense model.

    Raises:
        ValueError: the dense model's score is not known, and will not be: there is no warm-up in which it could be
            had, the model was compressed before, `start_ratio` leaves groups out, or only other scores of the dense
            model are known.
    """

    def __init__(self, rankdyna: RankDyna, trainer: Trainer, card: TrainerCard) -> None:
        self._rankdyna, self._trainer, self._card = rankdyna, trainer, card
        self._keep = rankdyna.config.keep_score or 0.0
        name = str(trainer.args.metric_for_best_model)
        self.metric = name if name.startswith("eval_") else f"eval_{name}"
        if self.dense is not None:
            return
        budget, others = rankdyna.rank_budget, sorted(card.dense_scores()[0])
        if others:
            reason = f"only {', '.join(others)} is known of it"
        elif budget.initial < sum(budget.caps):
            start_ratio = rankdyna.config.start_ratio
            reason = "the model was compressed before"
            if start_ratio is not None:
                reason = f"start_ratio={start_ratio} leaves groups out before it could be measured"
        elif not rankdyna.schedule.warmup_steps:
            reason = "rank_warmup_steps=0 leaves no step to measure it"
        else:
            return
        raise ValueError(
            f"keep_score needs the dense model's {self.metric}, and {reason}: give it as dense_scores of the "
            "RankDynaCallback (--dense_score)."
        )

    @property
    def dense(self) -> float | None:
        """The score of the dense model, if it is known by now."""
        return self._card.dense_scores()[0].get(self.metric)

    def end_step(self, state: TrainerState, control: TrainerControl) -> None:
        """Ask for an evaluation of the dense model at the end of the warm-up, and of the last size."""
        at_the_end = state.global_step >= self._rankdyna.schedule.total_steps
        if at_the_end or (self.dense is None and state.global_step == self._rankdyna.schedule.warmup_steps):
            control.should_evaluate = True

    def stops(self, state: TrainerState) -> bool:
        """Whether the size that is left with this step has fallen below."""
        stations, tried = self._rankdyna.schedule.stations, self.tried(state)
        is_left = any(station.left == state.global_step for station in stations)
        if not is_left or not tried or tried[-1].kept >= self._keep:
            return False
        last = tried[-1]
        logger.warning(
            "At %s=%g %s is %.4g, %.1f %% of the dense model's %.4g, less than keep_score=%g: the run ends with %s.",
            self._rankdyna.config.ratio_name,
            last.ratio,
            self.metric,
            last.score,
            100 * last.kept,
            self.dense,
            self._keep,
            "this, the largest of its sizes, since none held" if len(tried) == 1 else "the size before",
        )
        return True

    def tried(self, state: TrainerState) -> list[TriedSize]:
        """The sizes that were evaluated so far, the largest first."""
        if (dense := self.dense) is None:
            return []
        ratios, args = self._rankdyna.config.ratios, self._trainer.args
        found: list[TriedSize] = []
        for ratio, station in zip(ratios, self._rankdyna.schedule.stations, strict=True):
            steps = range(station.reached, station.left + 1)
            rows = [row for row in state.log_history if row.get("step") in steps and self.metric in row]
            if not rows:
                break
            scores = [float(row[self.metric]) for row in rows]
            best = max(scores) if args.greater_is_better is not False else min(scores)
            score = best if args.load_best_model_at_end else scores[-1]
            numbers = (score, dense) if args.greater_is_better is not False else (dense, score)
            found.append(TriedSize(ratio, score, numbers[0] / numbers[1] if numbers[1] else 1.0))
        return found

    def in_words(self, state: TrainerState) -> str:
        """What was compared, in a sentence for the cards."""
        kept = [f"{size.ratio:g} kept {size.kept:.1%} ({size.score:.4g})" for size in self.tried(state)]
        dense = "" if self.dense is None else f" of the dense model's {self.dense:.4g}"
        return f"The run was to keep {self._keep:.1%} of {self.metric}{dense}: {', '.join(kept)}."

    def held(self, state: TrainerState) -> int | None:
        """The number of the smallest size that held, if the run has gone on from it; else `None`."""
        tried = self.tried(state)
        number = next((number for number, size in enumerate(tried) if size.kept < self._keep), len(tried)) - 1
        return number if 0 <= number < len(self._rankdyna.config.ratios) - 1 else None
