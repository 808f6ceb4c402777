"""What stands in the way of the compacted model is said before training; what comes later costs no model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paper import PAPER
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report

MakeTrainer = Callable[..., Trainer]
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)


class At(TrainerCallback):
    """Does something once, at the end of a step."""

    def __init__(self, step: int, act: Callable[[torch.nn.Module], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: torch.nn.Module, **_: Any) -> None:
        if state.global_step == self.step:
            self.act(model)


def fill(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("mine")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "ranks.png"])
def test_a_folder_in_the_place_of_a_file_is_named_before_training(
    name: str, make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    fill(tmp_path / "output" / name)
    with pytest.raises(IsADirectoryError, match=rf"{name} is a folder, and the compacted model needs a file of this"):
        trainer.train()
    assert trainer.state.global_step == 0 and (tmp_path / "output" / name / "mine.txt").exists()


def test_a_link_to_nowhere_is_named_before_training(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    (tmp_path / "output").rename(tmp_path / "away")
    (tmp_path / "output").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"No model can be saved in .*output .*give another one"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("relative", [False, True])
def test_what_appears_while_training_runs_costs_no_model(
    relative: bool,
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    obstacle = tmp_path / "output" / "model.safetensors"
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path / "output")
    place = "." if relative else str(tmp_path / "output")
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), At(15, lambda _: fill(obstacle)), output_dir=place)
    trainer.train()
    beside = tmp_path / "output-compacted"
    assert f"it is in {beside}" in caplog.text and (obstacle / "mine.txt").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(beside)
    assert rank_report(loaded)["rank"].sum() == math.ceil(0.2 * 384)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["classifier.bias", "bert.embeddings.word_embeddings.weight"])
def test_weights_that_are_not_finite_stop_the_run_at_the_next_logging_step(
    name: str, make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    def break_it(model: torch.nn.Module) -> None:
        model.get_parameter(name).data.view(-1)[-1] = math.nan

    trainer = make_trainer(tiny_bert, At(7, break_it), RankDynaCallback(CONFIG), logging_steps=4)
    with pytest.raises(ValueError, match=r"Training diverged: at step 8 the model's weights have inf or nan"):
        trainer.train()
    assert not (tmp_path / "output" / "config.json").exists()
