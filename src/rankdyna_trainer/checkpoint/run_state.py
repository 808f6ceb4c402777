"""How far a run was that wrote a checkpoint, or a compacted model: in the `trainer_state.json` of the `Trainer`."""

import json
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from ..config import RankDynaConfig
from ..method.budget import RankBudget
from ..method.schedule import RankBudgetSchedule
from ..report.staging import staging_folder
from ..report.tables import rank_report

# Under which name the Trainer's state, and so each of its checkpoints, says which run it belongs to.
RUN_KEY = "RankDyna"
INITIAL_RANKS = "initial ranks"
DENSE_SCORES = "dense scores"
WARMUP = "warm-up"  # of RankDyna.state_dict
TRAINER_STATE_NAME = "trainer_state.json"  # transformers.trainer, which has it, is slow to import


@dataclass(frozen=True)
class RunState:
    """
    The state of a run.

    Attributes:
        step: finished optimizer steps.
        total_steps: of the whole run.
        config: the choices of the run; `None` if it ran without a [`RankDynaCallback`].
        initial_ranks: how many groups each target layer had when the run began; empty if `config` is `None`.
        log_history: what was logged so far, as the `Trainer` keeps it.
        warmup_steps: of a warm-up whose end was found by the loss, or is not found yet; `None` if the config says it.
        left_early: which of several sizes were left before their time, as [`RankBudgetSchedule`] has it.
        dense_scores: of a dense model to compare with, by name, once the run has ended; empty if none is known.
    """

    step: int
    total_steps: int
    config: RankDynaConfig | None
    initial_ranks: list[int]
    log_history: list[dict[str, Any]]
    warmup_steps: int | None = None
    left_early: tuple[int | None, ...] = ()
    dense_scores: dict[str, float] = field(default_factory=dict)

    def budget(self, model: nn.Module) -> RankBudget:
        """
        The budget of the run.

        Args:
            model: with the singular groups of the run, or as the run has compacted it.

        Raises:
            ValueError: the run had no [`RankDynaCallback`], or was one of another model.
        """
        if self.config is None:
            raise ValueError("The run was one without a RankDynaCallback, so it has no budget.")
        shapes = rank_report(model)[["out_features", "in_features"]].to_numpy().tolist()
        if len(shapes) != len(self.initial_ranks):
            raise ValueError(
                f"The run was one of a model with {len(self.initial_ranks)} target layers, and this one has "
                f"{len(shapes)}: {TRAINER_STATE_NAME} belongs to another model."
            )
        schedule = RankBudgetSchedule.of(self.config, self.total_steps, self.warmup_steps)
        schedule = replace(schedule, left_early=self.left_early)
        return RankBudget(self.config, schedule, [(out, into) for out, into in shapes], self.initial_ranks)


def write_run_state(state: TrainerState, directory: Path) -> None:
    """
    Leave the state of a run beside the model that it has compacted, where `Trainer.save_state()` would.

    It tells of no other place on this machine: a teacher's folder is left out, since the file is pushed to the Hub.

    Args:
        state: of the `Trainer`.
        directory: of the model.
    """
    runs, best = state.stateful_callbacks, state.best_model_checkpoint
    if RUN_KEY in runs and os.path.exists(runs[RUN_KEY]["teacher"] or ""):
        runs = runs | {RUN_KEY: runs[RUN_KEY] | {"teacher": None}}
    told = replace(state, stateful_callbacks=runs, best_model_checkpoint=best and Path(best).name)
    with staging_folder(directory) as staging:
        told.save_to_json(str(staging / TRAINER_STATE_NAME))
        os.replace(staging / TRAINER_STATE_NAME, directory / TRAINER_STATE_NAME)


def read_run_state(directory: str | Path) -> RunState:
    """
    The state that a checkpoint holds, the `output_dir` of a finished run, or else the newest `checkpoint-N` in it.

    Raises:
        FileNotFoundError: neither has a `trainer_state.json`.
        ValueError: the file is damaged.
    """
    path = Path(directory) / TRAINER_STATE_NAME
    if not path.is_file():
        newest = get_last_checkpoint(str(directory)) if Path(directory).is_dir() else None
        path = Path(newest or directory) / TRAINER_STATE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no {TRAINER_STATE_NAME}, and no checkpoint-N folder with one: give a checkpoint of a "
            "Trainer, or the output_dir of a run that wrote some."
        )
    known = {entry.name for entry in fields(RankDynaConfig)}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        run = state.get("stateful_callbacks", {}).get(RUN_KEY)
        config = None if run is None else RankDynaConfig(**{key: run[key] for key in run.keys() & known})
        history = [dict(entry) for entry in state["log_history"]]
        ranks = [] if run is None else [int(rank) for rank in run[INITIAL_RANKS]]
        found = {} if run is None else run.get(WARMUP, {})
        warmup = int(found["warmup_steps"]) if found else None
        early = tuple(None if step is None else int(step) for step in found.get("left_early", ()))
        dense = {} if run is None else {name: float(score) for name, score in run.get(DENSE_SCORES, {}).items()}
        return RunState(
            int(state["global_step"]), int(state["max_steps"]), config, ranks, history, warmup, early, dense
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Copy it again.") from error
