"""How far a run was that wrote a checkpoint: read from the `trainer_state.json` of the `Trainer`."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from ..config import RankDynaConfig
from ..layers.singular_group import SingularGroupLinear
from ..method.budget import RankBudget
from ..method.schedule import RankBudgetSchedule

# Under which name the Trainer's state, and so each of its checkpoints, says which run it belongs to.
RUN_KEY = "RankDyna"
INITIAL_RANKS = "initial ranks"
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
    """

    step: int
    total_steps: int
    config: RankDynaConfig | None
    initial_ranks: list[int]
    log_history: list[dict[str, Any]]
    warmup_steps: int | None = None

    def budget(self, model: nn.Module) -> RankBudget:
        """
        The budget of the run.

        Args:
            model: with the singular groups of the run.

        Raises:
            ValueError: the run had no [`RankDynaCallback`].
        """
        if self.config is None:
            raise ValueError("The run was one without a RankDynaCallback, so it has no budget.")
        layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
        return RankBudget(
            self.config,
            RankBudgetSchedule.of(self.config, self.total_steps, self.warmup_steps),
            [(layer.out_features, layer.in_features) for layer in layers],
            self.initial_ranks,
        )


def read_run_state(directory: str | Path) -> RunState:
    """
    The state that a checkpoint holds, or the newest `checkpoint-N` in the `output_dir` of a run.

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
        warmup = None if run is None or WARMUP not in run else int(run[WARMUP]["warmup_steps"])
        return RunState(int(state["global_step"]), int(state["max_steps"]), config, ranks, history, warmup)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Copy it again.") from error
