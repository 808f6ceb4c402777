"""A run of several sizes: each is saved as a run of one size would save it, and the run goes on as if it were not."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.training_runs import Interrupt
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, compact, rank_report
from rankdyna_trainer.checkpoint.run_state import read_run_state
from rankdyna_trainer.checkpoint.training import load_training_checkpoint
from rankdyna_trainer.trainer.stations import RunStations

# Of 384 groups 192, 116 and 77. Warm-up to step 2; then three steps to fall, and three to stay, three times.
SIZES = {0.5: 192, 0.3: 116, 0.2: 77}
LEFT = {0.5: 8, 0.3: 14, 0.2: 20}
CONFIG = RankDynaConfig(rank_ratio=[*SIZES], rank_warmup_steps=0.1, rank_cooldown_steps=0.45)
MakeTrainer = Callable[..., Trainer]
Row = dict[str, torch.Tensor]
BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


class Watch(TrainerCallback):
    """Keeps what the model computes at the end of some steps."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs, self.logits = inputs, dict[int, torch.Tensor]()

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        model.eval()
        with torch.no_grad():
            self.logits[state.global_step] = model(self.inputs).logits
        model.train()


def folder(output: Path, ratio: float) -> Path:
    return output if ratio == min(SIZES) else output / f"rank_ratio-{ratio:g}"


def weights(output: Path) -> dict[float, dict[str, torch.Tensor]]:
    return {ratio: load_file(folder(output, ratio) / "model.safetensors") for ratio in SIZES}


def assert_same(one: dict[float, dict[str, torch.Tensor]], other: dict[float, dict[str, torch.Tensor]]) -> None:
    for ratio, tensors in one.items():
        assert tensors.keys() == other[ratio].keys()
        assert all(torch.equal(tensor, other[ratio][name]) for name, tensor in tensors.items()), ratio


def test_each_size_is_the_model_of_the_step_at_which_it_is_left(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, rows: list[Row], tmp_path: Path
) -> None:
    inputs = torch.stack([row["input_ids"] for row in rows])
    watch = Watch(inputs)
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), watch)
    trainer.train()
    for ratio, groups in SIZES.items():
        place = folder(tmp_path / "output", ratio)
        loaded = AutoModelForSequenceClassification.from_pretrained(place).eval()
        assert rank_report(loaded)["rank"].sum() == groups
        with torch.no_grad():
            torch.testing.assert_close(loaded(inputs).logits, watch.logits[LEFT[ratio]], rtol=1e-5, atol=1e-6)
        run, card = read_run_state(place), (place / "README.md").read_text()
        assert run.step == LEFT[ratio] and f"{groups:,} | {groups / 384:.3f}" in card
        if ratio != min(SIZES):
            assert run.config is not None and run.config.ratios == (ratio,) and run.total_steps == LEFT[ratio]
            assert run.budget(loaded).final == groups == run.budget(loaded).at(run.step)
            assert run.log_history[-1]["step"] == LEFT[ratio] and "eval_loss" in run.log_history[-1]
            assert f"after, at step {LEFT[ratio]}" in card and "eval_loss" in card
            assert json.loads((place / "config.json").read_text())["rankdyna"]["ranks"]
    trainer.create_model_card()
    for ratio, name in {0.5: "rank_ratio-0.5", 0.3: "rank_ratio-0.3", 0.2: "last"}.items():
        card = (folder(tmp_path / "output", ratio) / "README.md").read_text()
        sizes = card.partition("## Sizes of the same run\n")[2].partition("\n## ")[0]
        models = [line.split(" | ")[0].strip("|* ") for line in sizes.splitlines() if " | " in line][2:]
        expected = ("dense", "rank_ratio-0.5", "rank_ratio-0.3", "last")
        assert models == [f"{row}, this model" if row == name else row for row in expected]


def test_to_save_a_size_changes_nothing_of_the_run(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = copy.deepcopy(tiny_bert)
    make_trainer(tiny_bert, RankDynaCallback(CONFIG)).train()
    saving = load_file(tmp_path / "output" / "model.safetensors")
    monkeypatch.setattr(RunStations, "_save", lambda *_: None)
    make_trainer(other, RankDynaCallback(CONFIG), output_dir=str(tmp_path / "other")).train()
    assert not (tmp_path / "other" / "rank_ratio-0.5").exists()
    alone = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(saving[name], alone[name]) for name in saving | alone)


@pytest.mark.parametrize(
    "step", [8, 15, *(pytest.param(step, marks=pytest.mark.long) for step in (1, 5, 7, 9, 14, 18))]
)
def test_a_run_that_was_interrupted_goes_on_to_the_same_models(
    make_trainer: MakeTrainer,
    train_once: Callable[..., Path],
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    step: int,
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    fresh = copy.deepcopy(tiny_bert)
    whole = make_trainer(copy.deepcopy(tiny_bert), RankDynaCallback(CONFIG), output_dir=str(tmp_path / "whole"))
    train_once(whole.train, "whole")
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tiny_bert, RankDynaCallback(CONFIG), Interrupt(step), **settings).train()
    make_trainer(fresh, RankDynaCallback(CONFIG), **settings).train(resume_from_checkpoint=step > 1 or None)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "output"))


def scored(scores: Iterator[float]) -> dict[str, Any]:
    return {"compute_metrics": lambda _: {"score": next(scores)}}


def test_the_best_model_of_each_size_is_that_of_the_size(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    best = {0.5: 6, 0.3: 14, 0.2: 18}
    scores = [0.9 if step in best.values() else 0.99 if step in (2, 10) else 0.1 for step in range(1, 21)]
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), trainer_arguments=scored(iter(scores)), **BEST)
    trainer.train()
    assert trainer.state.best_global_step == best[0.2]
    for ratio, step in best.items():
        expected = compact(load_training_checkpoint(tmp_path / "output" / f"checkpoint-{step}")).state_dict()
        saved = load_file(folder(tmp_path / "output", ratio) / "model.safetensors")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())
        assert f"after, at step {step}" in (folder(tmp_path / "output", ratio) / "README.md").read_text()


def test_early_stopping_goes_on_to_the_next_size(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    config = RankDynaConfig(rank_ratio=[0.5, 0.2], rank_warmup_steps=2, rank_cooldown_steps=12)  # 3 to fall, 6 to stay
    worse_and_worse = iter([1 - step / 100 for step in range(40)])
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(config),
        EarlyStoppingCallback(early_stopping_patience=2),
        trainer_arguments=scored(worse_and_worse),
        **BEST,
    )
    trainer.train()
    # Reached at 5, two worse ones until 7; three steps to fall to 10, and two worse ones.
    assert trainer.state.global_step == 12 and trainer.state.best_global_step == 10
    assert read_run_state(tmp_path / "output" / "rank_ratio-0.5").step == 5
    assert rank_report(trainer.model)["rank"].sum() == 77


def test_a_size_that_is_left_early_is_so_after_a_resume(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    config = RankDynaConfig(rank_ratio=[0.5, 0.2], rank_warmup_steps=2, rank_cooldown_steps=12)
    scores = [1 - step / 100 for step in range(40)]

    def trainer(model: torch.nn.Module, begun: int, *more: TrainerCallback, **arguments: Any) -> Trainer:
        patience = EarlyStoppingCallback(early_stopping_patience=2)
        arguments |= {"trainer_arguments": scored(iter(scores[begun:])), **BEST}
        return make_trainer(model, RankDynaCallback(config), patience, *more, **arguments)

    fresh = copy.deepcopy(tiny_bert)
    trainer(copy.deepcopy(tiny_bert), 0, output_dir=str(tmp_path / "whole")).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny_bert, 0, Interrupt(9)).train()
    resumed = trainer(fresh, 8)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    for place in ("", "rank_ratio-0.5"):
        one, other = (load_file(tmp_path / run / place / "model.safetensors") for run in ("whole", "output"))
        assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_what_stands_in_the_place_of_a_size_is_said_before_training(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "rank_ratio-0.3").write_text("a file of the user")
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    with pytest.raises(NotADirectoryError, match=r"rank_ratio-0.3 is a file, where the model of this size"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_run_with_too_few_steps_for_its_sizes_is_refused(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    config = RankDynaConfig(rank_ratio=[0.5, 0.4, 0.3, 0.2], rank_warmup_steps=8, rank_cooldown_steps=9)
    with pytest.raises(ValueError, match="too few steps to fall to 4 sizes: 8 warm-up and 9 cool-down steps of 20"):
        make_trainer(tiny_bert, RankDynaCallback(config)).train()
