"""A run that ends with the smallest of its sizes that keeps a part of the dense model's score."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.training_runs import Interrupt
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report
from rankdyna_trainer.baselines import svd
from rankdyna_trainer.checkpoint.run_state import read_run_state

# Of 384 groups 192, 116 and 77, left at step 8, 14 and 20.
SIZES = [0.5, 0.3, 0.2]
GROUPS = [192, 116, 77]
MakeTrainer = Callable[..., Trainer]
Row = dict[str, torch.Tensor]


def config(keep: float = 0.9, **choices: Any) -> RankDynaConfig:
    schedule = {"rank_warmup_steps": 0.1, "rank_cooldown_steps": 0.45}
    return RankDynaConfig(rank_ratio=SIZES, keep_score=keep, **(schedule | choices))


class Scores(TrainerCallback):
    """Gives the evaluations their scores: that of the dense model, and of each size when it is left."""

    def __init__(self, dense: float, *sizes: float) -> None:
        self.by_step = dict(zip((2, 8, 14, 20), (dense, *sizes), strict=False))
        self.step, self.asked = 0, list[int]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step

    def __call__(self, _: Any) -> dict[str, float]:
        self.asked.append(self.step)
        return {"score": self.by_step.get(self.step, 0.0)}


def scored(scores: Scores, **more: Any) -> dict[str, Any]:
    metric = {"metric_for_best_model": "score", "greater_is_better": True}
    return {"trainer_arguments": {"compute_metrics": scores}, **metric, **more}


@pytest.mark.parametrize(
    ("of_sizes", "held", "steps"),
    [
        ((0.79, 0.75, 0.73), 2, 20),  # all of them
        ((0.79, 0.75, 0.71), 1, 20),  # the last one falls below 0.72
        ((0.79, 0.71), 0, 14),
        ((0.71,), 0, 8),  # none: the largest is left
    ],
)
def test_the_smallest_that_held_is_what_the_run_ends_with(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    rows: list[Row],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    of_sizes: tuple[float, ...],
    held: int,
    steps: int,
) -> None:
    scores = Scores(0.8, *of_sizes)
    trainer = make_trainer(tiny_bert, RankDynaCallback(config()), scores, **scored(scores))
    trainer.train()
    assert trainer.state.global_step == steps
    assert scores.asked == [step for step in (2, 8, 14, 20) if step <= steps]
    assert rank_report(trainer.model)["rank"].sum() == GROUPS[held]
    output = tmp_path / "output"
    saved = load_file(output / "model.safetensors")
    state = trainer.model.state_dict()
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    inputs = torch.stack([row["input_ids"] for row in rows])
    loaded = AutoModelForSequenceClassification.from_pretrained(output).eval()
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, trainer.model.eval()(inputs).logits)
    if held < 2 and len(of_sizes) > 1:
        station = load_file(output / f"rank_ratio-{SIZES[held]}" / "model.safetensors")
        assert all(torch.equal(station[name], saved[name]) for name in station | saved)
        importance = "importance.safetensors"
        assert (output / importance).read_bytes() == (output / f"rank_ratio-{SIZES[held]}" / importance).read_bytes()
        assert read_run_state(output).step == (8, 14)[held]
    end = "this, the largest of its sizes" if held == len(of_sizes) - 1 else "the size before"
    said = f"of the dense model's 0.8, less than keep_score=0.9: the run ends with {end}"
    assert (said in caplog.text) == (of_sizes[-1] < 0.72)
    card = (output / "README.md").read_text()
    assert f"{GROUPS[held]:,} | {GROUPS[held] / 384:.3f}" in card
    assert f"after, at step {(8, 14, 20)[held]}" in card and f"{of_sizes[held]:.4g} |" in card
    assert f"to keep 90.0% of eval_score of the dense model's 0.8: 0.5 kept {of_sizes[0] / 0.8:.1%}" in card
    assert "eval_loss" in trainer.evaluate()


def test_a_loss_is_kept_if_it_grows_by_no_more(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    scores = Scores(0.8, 0.85, 0.9)  # 0.8 / 0.9 = 0.889
    arguments = scored(scores, greater_is_better=False)
    trainer = make_trainer(tiny_bert, RankDynaCallback(config()), scores, **arguments)
    trainer.train()
    assert rank_report(trainer.model)["rank"].sum() == GROUPS[0]


def test_a_score_that_was_given_is_compared_with(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    scores = Scores(0.1, 0.85, 0.8, 0.7)
    callback = RankDynaCallback(config(), dense_scores={"score": 0.9})
    trainer = make_trainer(tiny_bert, callback, scores, **scored(scores))
    trainer.train()
    assert scores.asked == [8, 14]  # the dense model is not evaluated, and 0.8 is below 0.81
    assert rank_report(trainer.model)["rank"].sum() == GROUPS[0]


@pytest.mark.parametrize("step", [14, *(pytest.param(step, marks=pytest.mark.long) for step in (6, 9, 15))])
def test_the_choice_is_the_same_after_a_resume(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path, step: int
) -> None:
    fresh = copy.deepcopy(tiny_bert)
    settings = {"save_strategy": "steps", "save_steps": 1}
    scores = Scores(0.8, 0.79, 0.75, 0.7)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(
            tiny_bert, RankDynaCallback(config()), scores, Interrupt(step), **scored(scores, **settings)
        ).train()
    scores = Scores(0.8, 0.79, 0.75, 0.7)
    resumed = make_trainer(fresh, RankDynaCallback(config()), scores, **scored(scores, **settings))
    resumed.train(resume_from_checkpoint=True)
    assert scores.asked == [at for at in (8, 14, 20) if at >= step]
    assert rank_report(resumed.model)["rank"].sum() == GROUPS[1]


@pytest.mark.parametrize(
    ("arguments", "choices", "message"),
    [
        ({"trainer_arguments": {"eval_dataset": None}, "metric_for_best_model": "score"}, {}, "no eval_dataset found"),
        ({}, {}, "no metric_for_best_model found"),
        ({"metric_for_best_model": "score"}, {"rank_warmup_steps": 0}, "rank_warmup_steps=0 leaves no step"),
    ],
)
def test_what_is_missing_is_said_before_training(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    arguments: dict[str, Any],
    choices: dict[str, Any],
    message: str,
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(config(**choices)), **arguments)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_another_score_of_the_dense_model_is_no_reference(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    scores = Scores(0.8)
    callback = RankDynaCallback(config(), dense_scores={"f1": 0.9})
    trainer = make_trainer(tiny_bert, callback, scores, **scored(scores))
    with pytest.raises(ValueError, match="eval_score, and only eval_f1 is known of it: give it as dense"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_that_was_compressed_before_shows_no_dense_score(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    model = svd(tiny_bert, RankDynaConfig(rank_ratio=0.6, target_modules=["dense"]))
    choices = {"rank_warmup_steps": 0.1, "rank_cooldown_steps": 0.45, "target_modules": ["dense"]}
    trainer = make_trainer(model, RankDynaCallback(config(**choices)), **scored(Scores(0.8)))
    with pytest.raises(ValueError, match="eval_score, and the model was compressed before"):
        trainer.train()


def test_a_start_that_leaves_groups_out_shows_no_dense_score(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    small = RankDynaConfig(param_ratio=SIZES, keep_score=0.9, start_ratio=0.7, rank_warmup_steps=2)
    trainer = make_trainer(tiny_bert, RankDynaCallback(small), **scored(Scores(0.8)))
    with pytest.raises(ValueError, match=r"eval_score, and start_ratio=0\.7 leaves groups out before it could be"):
        trainer.train()


def test_a_module_that_from_pretrained_does_not_load_is_refused(make_trainer: MakeTrainer) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), nn.Linear(16, 2))
    trainer = make_trainer(model, RankDynaCallback(config(target_modules="all-linear")), metric_for_best_model="score")
    with pytest.raises(ValueError, match="a Sequential has no from_pretrained"):
        trainer.train()
