"""The compacted models that a run with several ratios has left in its folder, as one table."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils import CONFIG_NAME

from ..checkpoint.outline import outline
from ..checkpoint.run_state import TRAINER_STATE_NAME, RunState, read_run_state
from ..config import RankDynaConfig
from ..report.curve import DENSE, LAST
from ..report.operations import linear_operations
from ..report.tables import CompressionSummary, compression_summary
from .scores import saved_scores, scores_of_saved_model

if TYPE_CHECKING:
    import pandas as pd

_STATION = re.compile(r"(rank|param)_ratio-\d.*")


def station_folders(directory: str | Path) -> dict[str, Path]:
    """
    Where the compacted models of a run are, by the names that [`read_curve`] has for them.

    Args:
        directory: the run's `output_dir`.

    Raises:
        FileNotFoundError: it is no folder, or has no `param_ratio-...` or `rank_ratio-...` folder with a model.
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {directory}: give the output_dir of a run with several ratios.")
    inside = sorted(path for path in root.iterdir() if _STATION.fullmatch(path.name))
    folders = {path.name: path for path in inside if (path / CONFIG_NAME).is_file()}
    if not folders:
        raise FileNotFoundError(
            f"{directory} has no folder such as param_ratio-0.5 or rank_ratio-0.5 with a model: give the output_dir "
            f"of a run with several ratios. Of one model `rankdyna report {directory}` tells."
        )
    return folders | ({LAST: root} if (root / CONFIG_NAME).is_file() else {})


def read_curve(
    directory: str | Path, trust_remote_code: bool = False, names: Collection[str] | None = None
) -> pd.DataFrame:
    """
    The sizes and scores of the models that a run has left; weights are not loaded.

    Args:
        directory: the run's `output_dir`, with a folder for each ratio but the last, and the last model in itself,
            if the run has come so far.
        trust_remote_code: run the code that lies beside the models, if their configurations name some.
        names: of the models; by default all that there are.

    Returns:
        A row a model, the largest first: `"dense"`, the names of the folders, and `"last"`. The columns are
        `target_ratio` and `all_ratio` (parts of the target layers' and of all parameters that are kept),
        `target_parameters`, `all_parameters`, `file_bytes` (computed for the dense model), `multiply_adds` (of one
        vector through all linear layers), `step` (none for the dense model), and each score by its name, such as
        `eval_accuracy`, from `trainer_state.json` or what `Trainer.save_metrics` left; NaN where a model has none.

    Raises:
        FileNotFoundError: as [`station_folders`].
        ValueError: a model or its state is damaged, or they are not of the same run (as their states tell, if they
            have some).
    """
    import pandas as pd

    rows: dict[str, dict[str, Any]] = {}
    dense: dict[str, Any] = {}
    models, runs = dict[object, str](), dict[object, str]()
    for name, folder in station_folders(directory).items():
        if names is not None and name not in names:
            continue
        found = outline(folder, trust_remote_code=trust_remote_code)
        if found.in_training:
            raise ValueError(f"{folder} is a checkpoint of a running compression, where a compacted model should be.")
        state = read_run_state(folder) if (folder / TRAINER_STATE_NAME).is_file() else None
        summary, operations = compression_summary(found.model), linear_operations(found.model)
        rows[name] = _sizes(summary, found.file_bytes, operations.linear) | {"step": state and state.step}
        rows[name] |= _scores(name, folder, state, found.model)
        sizes = summary.dense_target_parameters, summary.dense_all_parameters
        models.setdefault((type(found.model).__name__, *sizes), name)
        if state is not None:
            runs.setdefault(str(_choices(state.config)), name)
        dense |= _dense_sizes(summary, found.file_bytes, operations.dense_linear)
        # Those of the last model win, since only the end of a run notes them.
        dense |= state.dense_scores if state else {}
    for kind, first_of in (("model", models), ("run", runs)):
        if len(first_of) > 1:
            raise ValueError(
                f"{' and '.join(first_of.values())} in {directory} are not of the same {kind}: move away what another "
                "run has left."
            )
    largest_first = sorted(rows, key=lambda name: -rows[name]["target_parameters"])
    curve = pd.DataFrame.from_dict({DENSE: dense} | {name: rows[name] for name in largest_first}, orient="index")
    return curve.astype({"step": "Int64"}).rename_axis("model")


def _sizes(summary: CompressionSummary, file_bytes: int, multiply_adds: int) -> dict[str, Any]:
    """The columns of a compacted model."""
    return {
        "target_ratio": summary.target_ratio,
        "all_ratio": summary.all_ratio,
        "target_parameters": summary.target_parameters,
        "all_parameters": summary.all_parameters,
        "file_bytes": file_bytes,
        "multiply_adds": multiply_adds,
    }


def _choices(config: RankDynaConfig | None) -> dict[str, Any]:
    """What the models of a run have in common: the state of each tells of its own size and steps."""
    own = ("rank_ratio", "param_ratio", "keep_score", "rank_warmup_steps", "rank_cooldown_steps")
    return {} if config is None else {name: value for name, value in config.to_dict().items() if name not in own}


def _dense_sizes(summary: CompressionSummary, file_bytes: int, multiply_adds: int) -> dict[str, Any]:
    """The columns of the dense model for which a compacted one stands."""
    return {
        "target_ratio": 1.0,
        "all_ratio": 1.0,
        "target_parameters": summary.dense_target_parameters,
        "all_parameters": summary.dense_all_parameters,
        "file_bytes": summary.dense_bytes(file_bytes),
        "multiply_adds": multiply_adds,
    }


def _scores(name: str, folder: Path, state: RunState | None, model: nn.Module) -> dict[str, float]:
    """The scores of a model: an evaluation before its ranks were reached was of a larger one."""
    if state is None:
        return saved_scores(str(folder))
    settled = state.step
    if name == LAST and state.config is not None:
        settled = min(state.budget(model).schedule.final_step, state.step)
    scores, _ = scores_of_saved_model(state.log_history, settled, state.step)
    return scores or saved_scores(str(folder))
