"""The scores on the card that a real Trainer leaves behind: of which model they are, and beside which others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.cards import evaluations, scores
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import rank_report

MakeTrainer = Callable[..., Trainer]
pytestmark = pytest.mark.heatmap


def test_the_score_is_that_of_the_best_model(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    values = iter([0.9, 0.9, 0.3, 0.8, 0.4])  # at every fourth step: the last three are at the final budget
    every = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = make_scored(
        tiny_bert,
        **every,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        more={"compute_metrics": lambda prediction: {"accuracy": next(values)}},
    )
    trainer.train()
    assert trainer.state.best_global_step == 16
    trainer.create_model_card(tasks="text-classification", dataset_tags="glue")
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert scores(card)["metric"] == ["after, at step 16"]
    assert scores(card)["eval_accuracy"] == ["0.8"]
    assert card.data.eval_results[0].metric_value == 0.8


def test_evaluated_before_training_by_the_user(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    trainer = make_scored(tiny_bert)
    before = trainer.evaluate()
    trainer.train()
    assert scores(ModelCard.load(tmp_path / "output" / "README.md")) == {}  # nothing to compare it with
    after = trainer.evaluate()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert scores(card)["eval_loss"] == [f"{before['eval_loss']:.4g}", f"{after['eval_loss']:.4g}"]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_a_run_that_was_stopped_says_so(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    make_scored(tiny_bert, StopAt(5), eval_strategy="steps", eval_steps=5).train()
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert "The run ended at step 5 of 20, before the final budget was due" in card.text
    assert scores(card)["metric"] == ["after, at step 5"]
    assert f"| {rank_report(tiny_bert)['rank'].sum()} |" in card.text


def test_trained_on_after_compaction(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    trainer = make_scored(tiny_bert, StopAt(15), eval_strategy="steps", eval_steps=5)
    trainer.train()
    trainer.pop_callback(StopAt)
    trainer.args.max_steps = 5
    trainer.train()
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert "The run ended at step 15 of 20.\n" in card.text
    assert scores(card)["eval_loss"] == [f"{evaluations(trainer)[5]['eval_loss']:.4g}"]
