import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.training_runs import STEPS, STOP, stopped_run
from tasks import tiny_tasks
from transformers import T5ForConditionalGeneration, TrainerState

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.checkpoint.run_state import read_run_state, write_run_state
from rankdyna_trainer.checkpoint.training import outline_training_checkpoint


def test_budgets_are_those_that_the_run_logged(tmp_path: Path) -> None:
    config = RankDynaConfig(param_ratio=0.13, rank_scope="local", rank_warmup_steps=1, rank_cooldown_steps=3)
    checkpoint, run = stopped_run(tiny_tasks.model("t5"), tmp_path, config)
    state = read_run_state(checkpoint)
    assert (state.step, state.total_steps, state.config) == (STOP, STEPS, config)
    assert [entry["step"] for entry in state.log_history] == list(range(1, STOP + 1))
    budget = state.budget(outline_training_checkpoint(checkpoint))
    assert budget.at(STOP) == state.log_history[-1]["rank_budget"] > budget.final
    ended = read_run_state(run)  # beside the compacted model
    assert "train_runtime" in ended.log_history[-1]
    assert replace(ended, log_history=ended.log_history[:-1]) == state
    assert ended.budget(T5ForConditionalGeneration.from_pretrained(run)).at(STOP) == budget.at(STOP)
    shutil.rmtree(checkpoint)
    assert read_run_state(run) == ended
    (run / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError):
        read_run_state(run)


@pytest.mark.parametrize("teacher", [None, "alice/teacher", "folder"])
def test_what_is_left_beside_a_model_tells_of_no_other_place(tmp_path: Path, teacher: str | None) -> None:
    given = str(tmp_path) if teacher == "folder" else teacher
    run = RankDynaConfig(rank_ratio=0.2, teacher=given).to_dict() | {"initial ranks": [4]}
    best = str(tmp_path / "checkpoint-5")
    write_run_state(TrainerState(stateful_callbacks={"RankDyna": run}, best_model_checkpoint=best), tmp_path)
    state = read_run_state(tmp_path)
    assert state.config == RankDynaConfig(rank_ratio=0.2, teacher=None if teacher == "folder" else teacher)
    assert str(tmp_path) not in (tmp_path / "trainer_state.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["trainer_state.json"]


def test_the_newest_checkpoint_of_a_run(tmp_path: Path) -> None:
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        saved = {"global_step": step, "max_steps": 20, "log_history": []}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(saved))
    state = read_run_state(tmp_path)
    assert state.step == 10
    assert state.config is None
    with pytest.raises(ValueError, match="without a RankDynaCallback"):
        state.budget(tiny_tasks.model("bert"))


def test_there_is_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"has no trainer_state\.json"):
            read_run_state(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"global_step": "x", "max_steps": 1, "log_history": []}'])
def test_damaged(content: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"trainer_state\.json is damaged"):
        read_run_state(tmp_path)
