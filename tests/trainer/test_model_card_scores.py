"""The scores on the card that a real Trainer leaves behind: of which model they are, and beside which others."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.cards import evaluations, scores
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report
from rankdyna_trainer.cli.report import report

MakeTrainer = Callable[..., Trainer]
pytestmark = pytest.mark.heatmap
EVALUATED = {"eval_strategy": "steps", "eval_steps": 10, "eval_on_start": True}


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
    tiny_bert.config.architectures = ["BertForSequenceClassification"]
    trainer = make_scored(tiny_bert)
    before = trainer.evaluate()
    trainer.train()
    assert scores(ModelCard.load(tmp_path / "output" / "README.md")) == {}  # nothing to compare it with
    after = trainer.evaluate()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert scores(card)["eval_loss"] == [f"{before['eval_loss']:.4g}", f"{after['eval_loss']:.4g}"]


def test_evaluated_after_training_by_the_user(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    trainer, path = make_scored(tiny_bert), tmp_path / "output" / "README.md"
    trainer.train()
    before = path.read_text()
    after = trainer.evaluate()
    card = ModelCard.load(path)
    assert scores(card)["metric"] == ["after, at step 20"] and scores(ModelCard(before)) == {}
    assert scores(card)["eval_loss"] == [f"{after['eval_loss']:.4g}"]
    assert set(before.splitlines()[:-1]) <= set(path.read_text().splitlines()), "all else is as it was"
    path.write_text("mine")
    trainer.evaluate()
    assert path.read_text() == "mine" and not path.with_name("README.rankdyna.md").exists()


def test_an_untrained_head_is_no_reference(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    tiny_bert.config.architectures = ["BertForMaskedLM"]  # as from_pretrained leaves it
    other = copy.deepcopy(tiny_bert)
    trainer = make_scored(tiny_bert, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.train()
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert scores(card)["metric"] == ["at full rank, at step 2", "after, at step 20"]  # the warm-up has two steps
    found = [f"{evaluations(trainer)[step]['eval_loss']:.4g}" for step in (2, 20)]
    assert scores(card)["eval_loss"] == found and found[0] != found[1]
    make_scored(other, output_dir=str(tmp_path / "none"), **EVALUATED).train()
    assert scores(ModelCard.load(tmp_path / "none" / "README.md"))["metric"] == ["after, at step 20"]


def test_scores_of_a_dense_model(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    teacher, other = tmp_path / "teacher", copy.deepcopy(tiny_bert)
    tiny_bert.save_pretrained(teacher)
    (teacher / "eval_results.json").write_text('{"eval_accuracy": 0.75, "eval_runtime": 3.0, "epoch": 3.0}')
    taught = RankDynaConfig(rank_ratio=0.2, teacher=str(teacher))
    make_scored(tiny_bert, callback=RankDynaCallback(taught), output_dir=str(tmp_path / "taught"), **EVALUATED).train()
    card = ModelCard.load(tmp_path / "taught" / "README.md")
    assert scores(card)["metric"] == ["the teacher", "after, at step 20"]
    assert scores(card)["eval_accuracy"][0] == "0.75" and scores(card)["eval_loss"][0] == ""
    assert "states of a teacher: a fine-tuned model of the same sizes." in card.text
    given = RankDynaCallback(taught, dense_scores={"accuracy": 0.875})
    make_scored(other, callback=given, output_dir=str(tmp_path / "given"), **EVALUATED).train()
    card = ModelCard.load(tmp_path / "given" / "README.md")
    assert scores(card)["metric"] == ["dense, as given", "after, at step 20"]
    assert scores(card)["eval_accuracy"][0] == "0.875"


@pytest.mark.parametrize(("dense", "far"), [(0.9, True), (0.42, False)])
def test_a_run_far_below_what_its_size_should_keep_says_so(
    dense: float,
    far: bool,
    make_scored: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    callback = RankDynaCallback(RankDynaConfig(rank_ratio=0.2, block_floor=0), dense_scores={"accuracy": dense})
    measured = {"compute_metrics": lambda prediction: {"accuracy": 0.4}}
    make_scored(tiny_bert, callback=callback, more=measured, **EVALUATED).train()
    capsys.readouterr()
    report(str(tmp_path / "output"))
    for text in (capsys.readouterr().out, ModelCard.load(tmp_path / "output" / "README.md").text):
        assert ("far below what this size should keep" in text.lower()) == far
        assert ("eval_accuracy is 44% of the dense model's" in text) == far
        assert ("block_floor=0.0: the defaults lose less" in text) == far


@pytest.mark.parametrize(
    ("wrong", "error"), [(0.8, TypeError), ({"accuracy": "86"}, TypeError), ({"f1": math.nan}, ValueError)]
)
def test_scores_that_are_none(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="dense_scores"):
        RankDynaCallback(RankDynaConfig(rank_ratio=0.2), dense_scores=wrong)


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
