"""The folders that a run with several ratios leaves, made without the run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import BertForSequenceClassification, TrainerState

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.baselines import svd
from rankdyna_trainer.checkpoint.run_state import write_run_state
from rankdyna_trainer.checkpoint.saving import save_compacted

# Of each ratio the step at which the model was saved, and its scores; of the last one later evaluations too.
SCORES: dict[float, dict[int, dict[str, float]]] = {
    0.5: {20: {"eval_accuracy": 0.86, "eval_loss": 0.35}},
    0.3: {40: {"eval_accuracy": 0.84, "eval_loss": 0.4}},
    0.15: {60: {"eval_accuracy": 0.79, "eval_loss": 0.5}, 80: {"eval_accuracy": 0.8, "eval_loss": 0.45}},
}
DENSE_SCORES = {"eval_accuracy": 0.87, "eval_loss": 0.3}
LAST_RATIO, STEPS = 0.15, 80


def leave_stations(
    dense: Path, root: Path, scores: Mapping[float, dict[int, dict[str, float]]] = SCORES
) -> dict[str, Path]:
    """
    Compress a BERT to each ratio, with its state beside it, of which the rows before are those of larger models.

    Args:
        dense: the folder of the model.
        root: the run's `output_dir`.
        scores: of each ratio by step; a model without any was not evaluated.

    Returns:
        The folders by the names that `read_curve` has for them.
    """
    history: list[dict[str, Any]] = []
    folders = {}
    config = RankDynaConfig(param_ratio=LAST_RATIO, rank_warmup_steps=5, rank_cooldown_steps=20)
    for ratio, evaluations in scores.items():
        model = BertForSequenceClassification.from_pretrained(dense)
        svd(model, RankDynaConfig(param_ratio=ratio))
        last = ratio == LAST_RATIO
        name, folder = ("last", root) if last else (f"param_ratio-{ratio:g}", root / f"param_ratio-{ratio:g}")
        save_compacted(model, folder)
        folders[name] = folder
        history += [{"step": step, "eval_runtime": 0.1, **values} for step, values in evaluations.items()]
        run = (
            config.at_ratio(ratio).to_dict()
            | {"initial ranks": [32] * 12}
            | ({"dense scores": DENSE_SCORES} if last else {})
        )
        step = STEPS if last else max(evaluations, default=1)
        state = TrainerState(global_step=step, max_steps=STEPS, log_history=[*history])
        state.stateful_callbacks = {"RankDyna": run}
        write_run_state(state, folder)
    return folders


def edit_state(folder: Path, **values: Any) -> None:
    """Other values in the state of a run, of its callback's part where they are under `RankDyna`."""
    file = folder / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["RankDyna"] |= values.pop("RankDyna", {})
    file.write_text(json.dumps(state | values))
