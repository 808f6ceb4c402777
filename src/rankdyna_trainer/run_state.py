"""How far a run was that wrote a checkpoint: read from the `trainer_state.json` of the `Trainer`."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from .config import RankDynaConfig
from .layers import SingularGroupLinear
from .schedule import RankBudgetSchedule, final_parameter_budget, final_rank_budget
from .trainer_checks import RUN_KEY


@dataclass(frozen=True)
class RunState:
    """
    The state of a run.

    Attributes:
        step: finished optimizer steps.
        total_steps: of the whole run.
        config: the choices of the run; `None` if it ran without a [`RankDynaCallback`].
        log_history: what was logged so far, as the `Trainer` keeps it.
    """

    step: int
    total_steps: int
    config: RankDynaConfig | None
    log_history: list[dict[str, Any]]

    def budgets(self, model: nn.Module) -> tuple[int, int]:
        """
        The budget after this step and the final one: in groups, or in parameters with `param_ratio`.

        Args:
            model: with the singular groups of the run.

        Raises:
            ValueError: the run had no [`RankDynaCallback`].
        """
        if self.config is None:
            raise ValueError("The run was one without a RankDynaCallback, so it has no budget.")
        layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
        by_parameters = self.config.param_ratio is not None
        sizes = [layer.dense_parameters if by_parameters else layer.full_rank for layer in layers]
        pools = [sum(sizes)] if self.config.rank_scope == "global" else sizes
        if self.config.param_ratio is not None:
            finals = [final_parameter_budget(self.config.param_ratio, pool) for pool in pools]
        else:
            finals = [final_rank_budget(self.config.rank_ratio or 1.0, pool) for pool in pools]
        schedule = RankBudgetSchedule.from_parts(
            self.config.rank_warmup_steps, self.config.rank_cooldown_steps, self.total_steps
        )
        now = sum(schedule.budget(self.step, pool, final) for pool, final in zip(pools, finals, strict=True))
        return now, sum(finals)


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
        return RunState(int(state["global_step"]), int(state["max_steps"]), config, history)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Copy it again.") from error
