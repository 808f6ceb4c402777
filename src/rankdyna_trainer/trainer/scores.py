"""The scores of a run: of the model that was saved, and of a dense one to compare it with."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..method.budget import RankBudget
from ..options import number

# What an evaluation measures beside the scores.
SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
# Where `Trainer.save_metrics` leaves what an evaluation found.
RESULTS = ("all_results.json", "eval_results.json")


def checked_scores(scores: Mapping[str, float] | None) -> dict[str, float]:
    """
    The scores of a dense model that a user gives, by the names that the `Trainer`'s evaluation has for them.

    Raises:
        TypeError, ValueError: they are no mapping, or one of them is no finite number.
    """
    if not isinstance(scores, Mapping | None):
        raise TypeError(f'dense_scores must be a dict such as {{"eval_accuracy": 0.86}}: got {scores!r}.')
    given = {name: number(f"dense_scores[{name!r}]", score) for name, score in (scores or {}).items()}
    return {name if name.startswith("eval") else f"eval_{name}": score for name, score in given.items()}


def saved_scores(folder: str | None) -> dict[str, float]:
    """The scores that `Trainer.save_metrics` left in the folder of a model; none if it is no folder, or has none."""
    for file in (Path(folder or "") / name for name in RESULTS):
        with suppress(OSError, ValueError, AttributeError):
            results = json.loads(file.read_text(encoding="utf-8"))
            if folder and (scores := evaluated_scores([results])):
                return scores
    return {}


def scores_at_full_rank(
    log_history: Sequence[Mapping[str, Any]], budget: RankBudget, at_the_start: Mapping[str, float]
) -> tuple[dict[str, float], int | None]:
    """
    The last evaluation before the first group was removed, and its step.

    Args:
        log_history: of the `Trainer`'s state.
        budget: of the run, with the warm-up as it was.
        at_the_start: of the model that training began with; empty if it was not evaluated, or had an untrained head.

    Returns:
        No scores and `None` if there is none, or the model was compressed already when the run began.
    """
    if budget.initial < sum(budget.caps):
        return {}, None
    steps = [row["step"] for row in log_history if 0 < row.get("step", 0) <= budget.schedule.warmup_steps]
    for step in sorted(steps, reverse=True):
        if scores := evaluated_scores(log_history, step):
            return scores, step
    return dict(at_the_start), 0 if at_the_start else None


def evaluated_scores(log_history: Sequence[Mapping[str, Any]], step: int | None = None) -> dict[str, float]:
    """
    The scores of the evaluations among some rows of `state.log_history`, by name.

    Args:
        log_history: rows, of which the last one counts for each score.
        step: only the rows of this step.
    """
    scores: dict[str, float] = {}
    for row in log_history:
        # Each evaluation, whatever the prefix of its scores, measures its time.
        prefixes = {name.removesuffix("_runtime") for name in row if name.endswith("_runtime")} - {"train"}
        if prefixes and step in (None, row.get("step")):
            others = {f"{prefix}_{speed}" for prefix in prefixes for speed in SPEEDS}
            starts = tuple(f"{prefix}_" for prefix in prefixes)
            scores |= {
                name: value
                for name, value in row.items()
                if name.startswith(starts) and name not in others and isinstance(value, (int, float))
            }
    return scores


def scores_of_saved_model(
    log_history: Sequence[Mapping[str, Any]], settled_step: int, left_step: int, best_step: int | None = None
) -> tuple[dict[str, float], int | None]:
    """
    The last evaluation of the model that was saved, and its step: after training if there was one, else at the step
    whose model was loaded as the best one, else the last in training.

    Args:
        log_history: of the `Trainer`'s state.
        settled_step: from which step on the ranks are those of the saved model. An earlier evaluation was of a
            larger model, and says nothing.
        left_step: until which step: a later evaluation in training was of a smaller one.
        best_step: the step of the checkpoint that was loaded at the end, if any.

    Returns:
        No scores and `None` if the saved model was not evaluated.
    """
    ended = max((i for i, row in enumerate(log_history) if "train_runtime" in row), default=len(log_history))
    during = [row for row in log_history[:ended] if settled_step <= row.get("step", 0) <= left_step]
    if best_step is not None:
        during = [row for row in during if row.get("step") == best_step]
    for rows in (log_history[ended:], during):
        evaluations = [row for row in rows if evaluated_scores([row])]
        if evaluations:
            step = evaluations[-1].get("step")
            return evaluated_scores(evaluations, step), step
    return {}, None
