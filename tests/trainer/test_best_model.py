"""Which model a run ends with: the best one at the final budget, or what an early end has left."""

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.damage import TRANSFORMERS_4
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, compact, rank_report
from rankdyna_trainer.layers.low_rank import LowRankLinear
from rankdyna_trainer.layers.singular_group import SingularGroupLinear
from rankdyna_trainer.method import algorithm, cutting
from rankdyna_trainer.method.schedule import RankBudgetSchedule

CONFIG = RankDynaConfig(
    rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4
)  # of 384 groups 77; warm-up to step 2, adjusting to step 12 of 20
FINAL = 77
MakeTrainer = Callable[..., Trainer]
Row = dict[str, torch.Tensor]


def budget(step: int) -> int:
    return RankBudgetSchedule(2, 8, 20).budget(step, 384, [FINAL])


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, what: Callable[[Any], None]) -> None:
        self.step = step
        self.what = what

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == self.step:
            self.what(control)
        return control


def interrupt(_: Any) -> None:
    raise KeyboardInterrupt


def stop(control: Any) -> None:
    control.should_training_stop = True


def scored(scores: Iterator[float]) -> dict[str, Any]:
    return {"compute_metrics": lambda _: {"score": next(scores)}}


BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}
SCORES = [0.9, 0.8, 0.99, 0.7, 0.95, 0.3, 0.2, 0.7, 0.5, 0.6]  # at step 2, 4, ...: the best at the budget is 16's


def assert_is_the_model_of(model: torch.nn.Module, checkpoint: Path) -> None:
    saved = load_file(checkpoint / "model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, LowRankLinear):
            kept = saved[f"{name}.remaining"]
            p = (saved[f"{name}.u"].t() * saved[f"{name}.sigma"])[:, kept]
            assert torch.equal(layer.p.weight, p) and torch.equal(layer.q.weight, saved[f"{name}.v"][kept])
    head = model.get_submodule("classifier")
    assert torch.equal(head.weight, saved["classifier.weight"])


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 does not note which checkpoint save_strategy='best' wrote")
def test_only_the_best_at_the_final_budget_is_kept(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    settings = {name: value for name, value in BEST.items() if name != "save_steps"} | {"save_strategy": "best"}
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(CONFIG),
        trainer_arguments=scored(iter(SCORES)),
        save_total_limit=1,
        **settings,
    )
    trainer.train()
    best = tmp_path / "output" / "checkpoint-16"
    assert Path(trainer.state.best_model_checkpoint) == best
    assert [path.name for path in (tmp_path / "output").glob("checkpoint-*")] == ["checkpoint-16"]
    assert_is_the_model_of(trainer.model, best)


@pytest.mark.parametrize(
    ("optim", "limit"),
    [
        ("adamw_torch", None),
        ("adamw_torch", 1),
        ("adafactor", 2),
        *(pytest.param("adamw_torch", limit, marks=pytest.mark.long) for limit in (2, 3)),
        *(pytest.param("adafactor", limit, marks=pytest.mark.long) for limit in (None, 1, 3)),
    ],
)
def test_only_checkpoints_at_the_final_budget_compete(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    limit: int | None,
    optim: str,
) -> None:
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(CONFIG),
        trainer_arguments=scored(iter(SCORES)),
        save_total_limit=limit,
        optim=optim,
        **BEST,
    )
    trainer.train()
    assert trainer.state.best_metric == 0.7 and trainer.state.best_global_step == 16
    best = tmp_path / "output" / "checkpoint-16"
    assert Path(trainer.state.best_model_checkpoint) == best
    assert_is_the_model_of(trainer.model, best)
    assert rank_report(trainer.model)["rank"].sum() == FINAL
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output")
    assert torch.equal(loaded.classifier.weight, trainer.model.classifier.weight)


def test_the_best_survives_a_resume_from_a_larger_model(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    first = make_trainer(
        tiny_bert, RankDynaCallback(CONFIG), At(6, interrupt), trainer_arguments=scored(iter(SCORES)), **BEST
    )
    with pytest.raises(KeyboardInterrupt):
        first.train()
    torch.manual_seed(0)
    fresh = BertForSequenceClassification(tiny_bert.config)
    resumed = make_trainer(fresh, RankDynaCallback(CONFIG), trainer_arguments=scored(iter(SCORES[2:])), **BEST)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_global_step == 16
    assert_is_the_model_of(resumed.model, tmp_path / "output" / "checkpoint-16")


def test_early_stopping_counts_from_the_final_budget(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    worse_and_worse = iter([1 - step / 100 for step in range(20)])
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(CONFIG),
        EarlyStoppingCallback(early_stopping_patience=2),
        trainer_arguments=scored(worse_and_worse),
        **BEST,
    )
    trainer.train()
    assert trainer.state.global_step == 16 and trainer.state.best_global_step == 12
    assert_is_the_model_of(trainer.model, tmp_path / "output" / "checkpoint-12")
    assert rank_report(trainer.model)["rank"].sum() == FINAL


def test_a_run_stopped_before_the_final_budget_ends_with_its_last_model(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = make_trainer(
        tiny_bert, RankDynaCallback(CONFIG), At(6, stop), trainer_arguments=scored(iter(SCORES)), **BEST
    )
    trainer.train()
    assert f"budget that it has met, {budget(6)} singular groups (final: {FINAL})" in caplog.text
    assert rank_report(trainer.model)["rank"].sum() == budget(6)
    assert_is_the_model_of(trainer.model, tmp_path / "output" / "checkpoint-6")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "output")


class Stream(torch.utils.data.IterableDataset[Row]):
    """So many rows, once."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __iter__(self) -> Iterator[Row]:
        while self.left:
            self.left -= 1
            yield {"input_ids": torch.arange(2, 12), "labels": torch.tensor(self.left % 2)}


@pytest.mark.parametrize("end", ["the data", "max_steps"])
def test_a_run_that_ends_before_its_steps_are_done(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    class Sooner(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            state.max_steps = 7

    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(CONFIG),
        *([Sooner()] if end == "max_steps" else []),
        trainer_arguments={"train_dataset": Stream(7 * 8)} if end == "the data" else None,
        accelerator_config={"dispatch_batches": False},
    )
    trainer.train()
    assert trainer.state.global_step == 7
    assert "stopped at step 7, before the final budget is reached at step 12" in caplog.text
    assert rank_report(trainer.model)["rank"].sum() == budget(7)


@pytest.mark.parametrize("step", [1, 6, 15])
def test_after_a_keyboard_interrupt_the_model_compacts_and_says_its_budget(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    rows: list[Row],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    step: int,
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), At(step, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    inputs = torch.stack([row["input_ids"] for row in rows])
    model = trainer.model.eval()
    with torch.no_grad():
        before = model(inputs).logits
        torch.testing.assert_close(compact(model)(inputs).logits, before, rtol=1e-5, atol=1e-6)
    said = f"stopped at step {step}, before the final budget" in caplog.text
    assert said == (step < 12)
    assert rank_report(model)["rank"].sum() == budget(step)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, model(inputs).logits)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("module", "function"), [(algorithm, "remove_groups"), (cutting, "cut_groups")])
def test_an_interrupt_in_the_middle_of_a_removal_waits_for_its_end(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    function: str,
) -> None:
    original, calls = getattr(module, function), []

    def interrupted(*args: Any) -> None:
        calls.append(function)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        original(*args)

    monkeypatch.setattr(module, function, interrupted)
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    step = trainer.state.global_step + 1
    layers = [module for module in trainer.model.modules() if isinstance(module, SingularGroupLinear)]
    assert sum(layer.rank for layer in layers) == budget(step) < 384
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for layer in layers:
        assert {len(factor) for factor in layer.factors().values()} == {layer.width} == {len(layer.importance)}
        assert all(id(factor) in held for factor in layer.factors().values())
        assert not any(factor[~layer.remaining].any() for factor in layer.factors().values())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    compact(trainer.model)
    assert rank_report(trainer.model)["rank"].sum() == budget(step)


def test_a_ratio_of_one_lets_all_checkpoints_compete(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(RankDynaConfig(rank_ratio=1.0, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)),
        trainer_arguments=scored(iter(SCORES)),
        **BEST,
    )
    trainer.train()
    assert trainer.state.best_global_step == 6
    assert rank_report(trainer.model)["rank"].sum() == math.ceil(384)
