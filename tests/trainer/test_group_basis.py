"""Groups in the metric of the inputs, in a real Trainer: made in the warm-up, without a trace on the run."""

import copy
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.networks import layers_of
from support.probe import Probe
from support.teaching import other_weights
from torch import nn
from torch.utils.data import IterableDataset
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import LowRankLinear, RankDynaCallback, RankDynaConfig, inject_singular_groups, rank_report

MakeTrainer = Callable[..., Trainer]
Row = dict[str, torch.Tensor]
WHEN: dict[str, Any] = {"rank_warmup_steps": 6, "rank_cooldown_steps": 6}  # of 20 steps
LEARNING = 3  # steps of the warm-up until the layers are factored
CONFIG = RankDynaConfig(rank_ratio=0.2, group_basis="activations", **WHEN)
FINAL = 77  # of 384 groups


class Random(TrainerCallback):
    """The state of torch's random numbers at the beginning of each step, and whether the layers are dense."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []
        self.dense: list[bool] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.states.append(torch.get_rng_state())
        self.dense.append(not layers_of(model))


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}])
@pytest.mark.slow
def test_the_run_sees_what_it_would_see_without(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, arguments: dict[str, Any]
) -> None:
    """With dropout: the same batches in the same order, the same random numbers, and dense training at first."""
    runs = {}
    for name, callbacks in {
        "plain": [],
        "weights": [RankDynaCallback(RankDynaConfig(rank_ratio=0.2, group_basis="weights", **WHEN))],
        "activations": [RankDynaCallback(CONFIG)],
    }.items():
        probe, numbers = Probe(), Random()
        trainer = make_trainer(copy.deepcopy(tiny_bert), *callbacks, probe, numbers, **arguments)
        trainer.train()
        runs[name] = trainer, probe, numbers
    plain, of_plain, numbers_of_plain = runs["plain"]
    for name in ("weights", "activations"):
        _, probe, numbers = runs[name]
        for batches, expected in zip(probe.batches, of_plain.batches, strict=True):
            for inputs, same in zip(batches, expected, strict=True):
                assert all(torch.equal(inputs[key], same[key]) for key in ("input_ids", "labels"))
        assert all(map(torch.equal, numbers.states, numbers_of_plain.states))
    trainer, _, numbers = runs["activations"]
    assert numbers.dense == [True] * LEARNING + [False] * (20 - LEARNING)
    assert logged(trainer)[:LEARNING] == logged(plain)[:LEARNING] != logged(runs["weights"][0])[:LEARNING]
    assert logged(trainer)[LEARNING] == pytest.approx(logged(plain)[LEARNING], rel=1e-5)
    assert logged(trainer)[LEARNING + 1 :] != logged(plain)[LEARNING + 1 :]
    assert logged(trainer, "grad_norm")[:LEARNING] == logged(plain, "grad_norm")[:LEARNING]
    assert logged(trainer, "remaining_groups")[:6] == [384] * 6 and logged(trainer, "remaining_groups")[-1] == FINAL


@pytest.mark.slow
@pytest.mark.parametrize("taught", [pytest.param(False, marks=pytest.mark.long), True])
def test_resume_is_exact_before_at_and_after_the_step_that_factors(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path, taught: bool
) -> None:
    def run(folder: str, resume: bool = False) -> Trainer:
        torch.manual_seed(0)
        teacher = other_weights(tiny_bert) if taught else None
        trainer = make_trainer(
            copy.deepcopy(tiny_bert),
            RankDynaCallback(CONFIG, teacher=teacher),
            output_dir=str(tmp_path / folder),
            save_strategy="steps",
            save_steps=1,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    for stop in (1, 2, 3, 4, 6, 10, 14, 17):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "resumed" / f"checkpoint-{stop}")
        resumed = run("resumed", resume=True)
        assert equal_weights(whole.model, resumed.model), stop
        assert rank_report(whole.model)["rank"].equals(rank_report(resumed.model)["rank"])
        assert logged(resumed) == logged(whole)
        last = Path("checkpoint-20", "model.safetensors")
        assert (tmp_path / "whole" / last).read_bytes() == (tmp_path / "resumed" / last).read_bytes()
        shutil.rmtree(tmp_path / "resumed")


def run_with_checkpoints(make_trainer: MakeTrainer, model: nn.Module, folder: Path, **arguments: Any) -> Trainer:
    settings = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 4}
    return make_trainer(copy.deepcopy(model), RankDynaCallback(CONFIG), **(settings | arguments))


def test_a_checkpoint_in_several_files(
    make_trainer: MakeTrainer, still_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    """A layer's tensors are then in different files, as are those of a model of many gigabytes."""
    whole = run_with_checkpoints(make_trainer, still_bert, tmp_path / "whole")
    whole.train()
    split = tmp_path / "split" / "checkpoint-8"
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", split)
    tensors = load_file(split / "model.safetensors")
    (split / "model.safetensors").unlink()
    held: dict[str, dict[str, torch.Tensor]] = {}
    for i, name in enumerate(sorted(tensors, reverse=True)):
        held.setdefault(f"model-{i % 7:05d}.safetensors", {})[name] = tensors[name]
    for file, part in held.items():
        save_file(part, split / file, metadata={"format": "pt"})
    index = {name: file for file, part in held.items() for name in part}
    (split / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    resumed = run_with_checkpoints(make_trainer, still_bert, tmp_path / "split")
    resumed.train(resume_from_checkpoint=True)
    assert equal_weights(whole.model, resumed.model)


@pytest.mark.parametrize("stop", [2, 8])
def test_other_runs_are_not_resumed(
    make_trainer: MakeTrainer, train_once: Callable[..., Path], tiny_bert: nn.Module, tmp_path: Path, stop: int
) -> None:
    train_once(run_with_checkpoints(make_trainer, tiny_bert, tmp_path / "run", save_steps=2).train)
    checkpoint = str(tmp_path / "run" / f"checkpoint-{stop}")
    of_weights = RankDynaCallback(RankDynaConfig(rank_ratio=0.2, group_basis="weights", **WHEN))
    message = "12 dense there" if stop == 2 else "group_basis was 'activations' and is 'weights'"
    with pytest.raises(ValueError, match=message):
        make_trainer(copy.deepcopy(tiny_bert), of_weights).train(resume_from_checkpoint=checkpoint)
    fewer = RankDynaConfig(rank_ratio=0.2, group_basis="activations", target_modules=["query"], **WHEN)
    message = "target_modules was None and is" if stop == 2 else "10 in singular groups there, but not in this model"
    with pytest.raises(ValueError, match=message):
        make_trainer(copy.deepcopy(tiny_bert), RankDynaCallback(fewer)).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_finished_run_is_not_resumed(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path, resumed: bool
) -> None:
    trainer = run_with_checkpoints(make_trainer, tiny_bert, tmp_path / "run")
    trainer.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-12")
    if resumed:
        trainer = run_with_checkpoints(make_trainer, tiny_bert, tmp_path / "again")
        trainer.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="12 in singular groups there, but not in this model"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_the_best_model_is_loaded_at_the_end(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    scores = iter([0.9, 0.1, 0.9, 0.2, 0.9, 0.9, 0.3, 0.8, 0.4, 0.5])  # at step 2, 4, ...: at the budget from 14 on
    trainer = run_with_checkpoints(
        make_trainer,
        tiny_bert,
        tmp_path / "output",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        trainer_arguments={"compute_metrics": lambda _: {"score": next(scores)}},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-16")
    saved = load_file(tmp_path / "output" / "checkpoint-16" / "model.safetensors")
    assert torch.equal(trainer.model.classifier.weight, saved["classifier.weight"])
    for name, layer in trainer.model.named_modules():
        if isinstance(layer, LowRankLinear):
            assert torch.equal(layer.q.weight, saved[f"{name}.v"][saved[f"{name}.remaining"]])
    assert rank_report(trainer.model)["rank"].sum() == FINAL


class Stream(IterableDataset):
    """A stream that notes how often it was read from its beginning, and what it gave out."""

    def __init__(self, rows: list[Row], read: Callable[["Stream"], Iterator[Row]]) -> None:
        self.rows, self.read, self.given = rows, read, 0
        self.once = iter(self._all()) if read is of_a_generator else None

    def _all(self) -> Iterator[Row]:
        while True:
            for row in self.rows:
                self.given += 1
                yield row

    def __iter__(self) -> Iterator[Row]:
        return self.read(self)


def anew(stream: Stream) -> Iterator[Row]:
    yield from stream._all()


def of_a_generator(stream: Stream) -> Iterator[Row]:
    assert stream.once is not None
    yield from stream.once


@pytest.mark.parametrize("read", [anew, of_a_generator])
def test_streams(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    rows: list[Row],
    read: Callable[[Stream], Iterator[Row]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(basis: str) -> tuple[Trainer, list[list[Row]], int]:
        probe, stream = Probe(), Stream(rows, read)
        config = RankDynaConfig(rank_ratio=0.2, group_basis=basis, **WHEN)
        extra = {"train_dataset": stream}
        trainer = make_trainer(copy.deepcopy(tiny_bert), RankDynaCallback(config), probe, trainer_arguments=extra)
        trainer.train()
        return trainer, probe.batches, stream.given

    _, expected, given = run("weights")
    with caplog.at_level(logging.WARNING):
        trainer, batches, given_as_well = run("activations")
    assert given_as_well == given
    for [inputs], [same] in zip(batches, expected, strict=True):
        assert torch.equal(inputs["input_ids"], same["input_ids"])
    assert rank_report(trainer.model)["rank"].sum() == FINAL
    said = [record.getMessage() for record in caplog.records if record.name.startswith("rankdyna_trainer")]
    once = [
        "The training set can be read only once, so that none of its rows is looked at beforehand.",
        "No input of 12 layers was seen, or it was not finite (bert.encoder.layer.0.attention.self.query, ...): their "
        "groups are those of the weights alone.",
    ]
    assert said == (once if read is of_a_generator else [])


def test_a_model_init(make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification) -> None:
    dense = Random()
    trainer = make_trainer(
        None,
        RankDynaCallback(CONFIG),
        dense,
        trainer_arguments={"model_init": lambda: copy.deepcopy(tiny_bert)},
    )
    trainer.train()
    assert dense.dense == [True] * LEARNING + [False] * (20 - LEARNING)
    assert rank_report(trainer.model)["rank"].sum() == FINAL


def test_a_model_that_was_injected_by_the_user_keeps_its_groups(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, batch: Row
) -> None:
    injected = inject_singular_groups(tiny_bert, CONFIG, [batch])
    v = layers_of(injected)[0].v.detach().clone()
    trainer = make_trainer(injected, RankDynaCallback(CONFIG))
    assert torch.equal(layers_of(trainer.model)[0].v, v)
    trainer.train()
    assert rank_report(trainer.model)["rank"].sum() == FINAL


@pytest.mark.parametrize(
    "arguments",
    [{"bf16": True}, {"gradient_checkpointing": True}, {"optim": "adafactor"}, {"max_steps": 7, "max_grad_norm": 0.0}],
    ids=lambda arguments: next(iter(arguments)),
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_features_of_the_trainer(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    arguments: dict[str, Any],
) -> None:
    config = RankDynaConfig(rank_ratio=0.2, group_basis="activations", rank_warmup_steps=0.3, rank_cooldown_steps=0.3)
    trainer = make_trainer(tiny_bert, RankDynaCallback(config), **arguments)
    trainer.train()
    assert rank_report(trainer.model)["rank"].sum() == FINAL
    loaded = BertForSequenceClassification.from_pretrained(trainer.args.output_dir)
    assert equal_weights(trainer.model, loaded)
    assert all(math.isfinite(loss) for loss in logged(trainer))
