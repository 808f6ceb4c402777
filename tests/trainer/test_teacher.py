"""A teacher in a real Trainer: as with a `compute_loss` that is written out, and refused where it cannot be."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.damage import TRANSFORMERS_4
from support.paper import PAPER
from support.teaching import other_weights, tiny_gpt2, tiny_llama, without_dropout, written_out
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report

MakeTrainer = Callable[..., Trainer]
Row = dict[str, torch.Tensor]
WHEN: dict[str, Any] = {"rank_warmup_steps": 0.3, "rank_cooldown_steps": 0.3}
CONFIG = RankDynaConfig(rank_ratio=0.2, **WHEN)
OPTIONS = {option.name for option in fields(TrainingArguments)}
# transformers has renamed the option.
CHECKPOINTING = next(
    f"{word}_checkpointing" for word in ("activation", "gradient") if f"{word}_checkpointing" in OPTIONS
)
CHECKPOINTED: dict[str, Any] = {CHECKPOINTING: True}
if TRANSFORMERS_4:  # where the reentrant kind, which is refused, is the default
    CHECKPOINTED |= {f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
PARTS = ("task_loss", "teacher_logits_loss", "teacher_hidden_loss")


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Of all weights; different ranks are different shapes, and fail here."""
    values, others = one.state_dict(), other.state_dict()
    assert {key: value.shape for key, value in values.items()} == {key: value.shape for key, value in others.items()}
    return max(float((value - others[key]).abs().max()) for key, value in values.items() if value.numel())


@pytest.fixture
def padded_rows(rows: list[Row]) -> list[Row]:
    return [row | {"attention_mask": (torch.arange(10) < 4 + i % 7).long()} for i, row in enumerate(rows)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "basis"),
    [
        ({}, "activations"),
        ({"gradient_accumulation_steps": 2}, "weights"),
        ({"bf16": True}, "activations"),
        (CHECKPOINTED, "weights"),
        pytest.param({}, "weights", marks=pytest.mark.long),
        pytest.param({"gradient_accumulation_steps": 2}, "activations", marks=pytest.mark.long),
        pytest.param({"bf16": True}, "weights", marks=pytest.mark.long),
        pytest.param(CHECKPOINTED, "activations", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_as_with_a_loss_that_is_written_out(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    padded_rows: list[Row],
    basis: str,
    arguments: dict[str, Any],
) -> None:
    """With dropout: equal but for the rounding of sums, which 20 steps of AdamW have made larger."""
    teacher = other_weights(tiny_bert)

    class WrittenOut(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):  # type: ignore[no-untyped-def]
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs)
            return written_out(model, teacher, inputs, (0.5, 1.0), 2.0)

    def run(trainer_class: type[Trainer], given: nn.Module | None) -> Trainer:
        config = RankDynaConfig(rank_ratio=0.2, group_basis=basis, **WHEN)
        extra = {"train_dataset": padded_rows}
        callback = RankDynaCallback(config, teacher=given)
        trainer = make_trainer(
            copy.deepcopy(tiny_bert), callback, trainer_class=trainer_class, trainer_arguments=extra, **arguments
        )
        trainer.train()
        return trainer

    expected, found = run(WrittenOut, None), run(Trainer, copy.deepcopy(teacher))
    assert logged(found) == pytest.approx(logged(expected), rel=1e-2 if "bf16" in arguments else 1e-4)
    if "bf16" in arguments:
        return
    assert largest_difference(found.model, expected.model) < 1e-4
    # Of a step's batches transformers 4 logs the mean, 5 the sum where the loss is not the model's own.
    steps = 1 if TRANSFORMERS_4 else arguments.get("gradient_accumulation_steps", 1)
    for i, loss in enumerate(logged(found)):
        task, logits, hidden = (logged(found, name)[i] for name in PARTS)
        assert loss == pytest.approx(steps * (0.5 * task + 0.5 * logits + hidden), rel=1e-4)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_accumulated_small_batches_of_tokens_are_one_large_batch(
    make_trainer: MakeTrainer, make: Callable[[], nn.Module]
) -> None:
    """Rows have 2 to 11 labels, so that means over small batches are not the mean over all."""
    model = without_dropout(make()).double()
    teacher = other_weights(model)
    tokens = torch.randint(64, (64, 12))
    rows = [{"input_ids": t, "labels": t.where(torch.arange(12) < 3 + i % 10, -100)} for i, t in enumerate(tokens)]
    config = RankDynaConfig(rank_ratio=0.2, teacher_weight=0.7, hidden_weight=0.0, **PAPER, **WHEN)

    def run(size: int, steps: int) -> Trainer:
        trainer = make_trainer(
            copy.deepcopy(model),
            RankDynaCallback(config, teacher=copy.deepcopy(teacher)),
            trainer_arguments={"train_dataset": rows},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        return trainer

    large, small = run(8, 1), run(2, 4)
    assert logged(small, "remaining_groups") == logged(large, "remaining_groups")
    assert largest_difference(small.model, large.model) < 1e-8
    if len(logged(small)) == len(logged(large)):
        assert logged(small) == pytest.approx(logged(large), rel=1e-4)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize("basis", [pytest.param("weights", marks=pytest.mark.long), "activations"])
def test_torch_compile_changes_nothing(
    make_trainer: MakeTrainer, still_bert: BertForSequenceClassification, fresh_dynamo: None, basis: str
) -> None:
    still_bert.config.problem_type = "single_label_classification"  # else BERT sets it, and step 2 recompiles
    teacher = other_weights(still_bert)

    def run(**arguments: Any) -> Trainer:
        config = RankDynaConfig(rank_ratio=0.2, group_basis=basis, **WHEN)
        callback = RankDynaCallback(config, teacher=copy.deepcopy(teacher))
        trainer = make_trainer(copy.deepcopy(still_bert), callback, max_steps=10, **arguments)
        trainer.train()
        return trainer

    plain, compiled = run(), run(torch_compile_backend="aot_eager")
    for name in ("loss", *PARTS):
        assert logged(compiled, name) == pytest.approx(logged(plain, name), rel=1e-4)
    assert rank_report(compiled.model)["rank"].sum() == 77
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_logs_hold_the_parts_and_evaluation_has_no_teacher(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, batch: Row
) -> None:
    trainer = make_trainer(
        tiny_bert, RankDynaCallback(CONFIG, teacher=other_weights(tiny_bert)), eval_strategy="steps", eval_steps=10
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(tiny_bert.eval()(**batch).loss.item(), rel=1e-5)
    trainer.train()
    for name in PARTS:
        values = logged(trainer, name)
        assert len(values) == 20 and all(math.isfinite(value) and value > 0 for value in values)
    with torch.no_grad():
        assert logged(trainer, "eval_loss")[-1] == pytest.approx(tiny_bert.eval()(**batch).loss.item(), rel=1e-4)
    assert not any(name in entry for entry in trainer.state.log_history if "eval_loss" in entry for name in PARTS)
    plain = make_trainer(BertForSequenceClassification(tiny_bert.config.__class__(**SIZES)), RankDynaCallback(CONFIG))
    plain.train()
    assert not any(logged(plain, name) for name in PARTS)


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.slow
def test_the_teacher_is_neither_saved_nor_trained(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    class Held(TrainerCallback):
        parameters = 0

        def on_step_end(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            self.parameters += sum(id(parameter) in held for parameter in teacher.parameters())

    teacher = other_weights(tiny_bert)
    before, own = copy.deepcopy(teacher.state_dict()), tiny_bert.loss_function
    saving = {"save_strategy": "steps", "save_steps": 10}
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG, teacher=teacher), held := Held(), **saving)
    trainer.train()
    assert held.parameters == 0
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    plain = BertForSequenceClassification(BertConfig(**SIZES))
    run = make_trainer(plain, RankDynaCallback(CONFIG), output_dir=str(tmp_path / "plain"), **saving)
    run.train()
    for folder in ("checkpoint-10", "checkpoint-20"):
        saved, expected = (load_file(tmp_path / out / folder / "model.safetensors") for out in ("output", "plain"))
        assert saved.keys() == expected.keys()
    # Nothing of it is left on the model, and nothing of the model on it.
    assert tiny_bert.loss_function is own and "_loss_function" not in vars(tiny_bert)
    for module in (*tiny_bert.modules(), *teacher.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_the_best_model_is_loaded_at_the_end(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    scores = iter([0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.3, 0.8, 0.4, 0.5])  # at step 2, 4, ...: at the budget from 14 on
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(CONFIG, teacher=other_weights(tiny_bert)),
        **{f"{what}_strategy": "steps" for what in ("eval", "save")},
        **{f"{what}_steps": 2 for what in ("eval", "save")},
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        trainer_arguments={"compute_metrics": lambda _: {"score": next(scores)}},
    )
    trainer.train()
    saved = load_file(tmp_path / "output" / "checkpoint-16" / "model.safetensors")
    assert torch.equal(trainer.model.classifier.weight, saved["classifier.weight"])


def test_a_teacher_from_a_folder(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    teacher = other_weights(tiny_bert)
    teacher.save_pretrained(tmp_path / "teacher")

    def run(callback: RankDynaCallback) -> nn.Module:
        trainer = make_trainer(copy.deepcopy(tiny_bert), callback)
        trainer.train()
        return trainer.model

    named = run(RankDynaCallback(RankDynaConfig(rank_ratio=0.2, teacher=str(tmp_path / "teacher"), **WHEN)))
    assert largest_difference(named, run(RankDynaCallback(CONFIG, teacher=teacher))) == 0


def test_teachers_that_are_refused_before_training(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    def refused(message: str, teacher: nn.Module | None = None, name: str | None = None, **arguments: Any) -> None:
        config = RankDynaConfig(rank_ratio=0.2, teacher=name, **WHEN)
        with pytest.raises(ValueError, match=message):
            make_trainer(copy.deepcopy(tiny_bert), RankDynaCallback(config, teacher=teacher), **arguments)

    good = other_weights(tiny_bert)
    BertModel(tiny_bert.config).save_pretrained(tmp_path / "headless")
    refused(r"has no classifier\.bias, and could only teach what is random", name=str(tmp_path / "headless"))
    other = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
    refused("labels: 2 and 3, of the model and the teacher", other)
    other.save_pretrained(tmp_path / "other")
    refused("labels: 2 and 3, of the model and the teacher", name=str(tmp_path / "other"))
    refused("Give one teacher", good, name=str(tmp_path / "other"))
    refused(r"label_smoothing_factor=0\.1 lets the Trainer compute the loss", good, label_smoothing_factor=0.1)
    func = {"compute_loss_func": lambda outputs, labels, **_: F.cross_entropy(outputs.logits, labels)}
    refused("compute_loss_func lets the Trainer compute the loss", good, trainer_arguments=func)
    with pytest.raises(ValueError, match="The teacher is the model itself"):
        make_trainer(tiny_bert, RankDynaCallback(CONFIG, teacher=tiny_bert))


def test_a_loss_that_a_trainer_computes_by_itself_is_refused_at_the_first_step(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
            labels = inputs.pop("labels")
            return F.cross_entropy(model(**inputs).logits, labels)

    callback = RankDynaCallback(CONFIG, teacher=other_weights(tiny_bert))
    with pytest.raises(ValueError, match="BertForSequenceClassification returned no loss to which the teacher's"):
        make_trainer(tiny_bert, callback, trainer_class=Own).train()
