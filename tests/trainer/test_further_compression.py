"""A compacted model, compressed further: ratios are still those of the dense model that it stands for."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.damage import compacted
from tasks.tiny_tasks import model as tiny_model
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer
from transformers.pytorch_utils import Conv1D

from rankdyna_trainer import (
    LowRankLinear,
    RankDynaCallback,
    RankDynaConfig,
    SingularGroupLinear,
    compact,
    inject_singular_groups,
    rank_report,
)
from rankdyna_trainer.layers.dense import kept_dense_rank
from rankdyna_trainer.report.tables import compression_summary

MakeTrainer = Callable[..., Trainer]
ALL = RankDynaConfig(rank_ratio=0.1)


def callback(**choices: Any) -> RankDynaCallback:
    return RankDynaCallback(RankDynaConfig(**({"rank_warmup_steps": 4, "rank_cooldown_steps": 8} | choices)))


def cut(model: nn.Module) -> nn.Module:
    """Compacted with ranks of 0, 1, 2 ..., so that there is a layer of each kind."""
    inject_singular_groups(model, ALL)
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, SingularGroupLinear)):
        layer.set_remaining(torch.arange(layer.width) < (layer.width if i == 3 else i))
    return compact(model)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    inputs: dict[str, Tensor] = {"input_ids": torch.arange(2, 20).reshape(2, 9)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model.eval()(**inputs)[0]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "bart", "t5"])
def test_the_injected_model_computes_what_the_compacted_one_did(kind: str) -> None:
    model = cut(tiny_model(kind))
    before, report = outputs(model), rank_report(model)
    assert (report["rank"] == 0).any() and (report["form"] == "dense").any()
    classes = {
        name: module.original_class for name, module in model.named_modules() if isinstance(module, LowRankLinear)
    }
    inject_singular_groups(model, ALL)
    groups = {name: module for name, module in model.named_modules() if isinstance(module, SingularGroupLinear)}
    assert list(groups) == list(report.index)
    for name, layer in groups.items():
        dense = report.loc[name, "form"] == "dense"
        assert layer.rank == layer.initial_rank == report.loc[name, "full_rank" if dense else "rank"]
        assert dense or layer.original_class is classes[name]
    assert (Conv1D in classes.values()) == (kind == "gpt2")
    assert (outputs(model) - before).norm() < 1e-5 * before.norm()
    assert not hasattr(model.config, "rankdyna")


@pytest.mark.parametrize(
    "choices",
    [{"rank_ratio": 0.15}, {"param_ratio": 0.1}, {"rank_ratio": 0.15, "rank_scope": "local"}],
    ids=["groups", "parameters", "local"],
)
def test_a_smaller_ratio_later(
    choices: dict[str, Any],
    tiny_bert: BertForSequenceClassification,
    make_trainer: MakeTrainer,
    train_once: Callable[..., Path],
    tmp_path: Path,
) -> None:
    train_once(make_trainer(tiny_bert, callback(rank_ratio=0.4)).train, "output")
    first = BertForSequenceClassification.from_pretrained(tmp_path / "output")
    held = compression_summary(first)
    trainer = make_trainer(first, callback(**choices), output_dir=str(tmp_path / "second"))
    trainer.train()
    budgets = [entry["rank_budget"] for entry in trainer.state.log_history if "rank_budget" in entry]
    report, summary = rank_report(trainer.model), compression_summary(trainer.model)
    if "param_ratio" in choices:
        assert budgets[0] == held.target_parameters
        assert budgets[-1] == math.floor(0.1 * held.dense_target_parameters) >= summary.target_parameters > 0
    else:
        # Layers that were kept dense begin with all their groups.
        assert (
            budgets[0] >= rank_report(BertForSequenceClassification.from_pretrained(tmp_path / "output"))["rank"].sum()
        )
        assert report["rank"].sum() == budgets[-1]
        if "rank_scope" in choices:
            assert (report["rank"] <= (0.15 * report["full_rank"]).map(math.ceil)).all()
        else:
            assert budgets[-1] == math.ceil(0.15 * report["full_rank"].sum())
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "second")
    assert torch.equal(outputs(loaded), outputs(trainer.model))
    assert summary.dense_all_parameters == held.dense_all_parameters


@pytest.mark.parametrize("choices", [{"rank_ratio": 0.2}, {"rank_ratio": 0.5}, {"param_ratio": 1.0}])
def test_a_ratio_that_leaves_nothing_to_remove(
    choices: dict[str, float], tiny_bert: BertForSequenceClassification, make_trainer: MakeTrainer
) -> None:
    make_trainer(tiny_bert, callback(rank_ratio=0.2)).train()
    assert not any(kept_dense_rank(module) is not None for module in tiny_bert.modules())
    trainer = make_trainer(tiny_bert, callback(**choices))
    with pytest.raises(ValueError, match=r"compressed before, and holds no more than \w+_ratio=.*Give a smaller"):
        trainer.train()


def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    still_bert: BertForSequenceClassification, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    compacted(still_bert).save_pretrained(tmp_path / "first")

    def run(output: str, resume: bool | str = False) -> dict[str, Tensor]:
        model = BertForSequenceClassification.from_pretrained(tmp_path / "first")
        trainer = make_trainer(
            model, callback(rank_ratio=0.1), output_dir=str(tmp_path / output), save_strategy="steps", save_steps=8
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-8"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # A training checkpoint is no compacted model, and does not say that it is one.
    assert "rankdyna" not in json.loads((tmp_path / "whole/checkpoint-8/config.json").read_text())


def test_layers_that_are_no_targets_keep_their_ranks(
    tiny_bert: BertForSequenceClassification, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    model = cut(tiny_bert)
    before = rank_report(model)
    trainer = make_trainer(model, callback(rank_ratio=0.02, target_modules=["query", "key"]))
    trainer.train()
    after = rank_report(trainer.model)
    assert list(after.index) == list(before.index)
    chosen = after.index.str.endswith(("query", "key"))
    assert after[~chosen].equals(before[~chosen])
    assert after[chosen]["rank"].sum() == math.ceil(0.02 * 4 * 32) < before[chosen]["rank"].sum()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "output")
    assert rank_report(loaded).equals(after)
    assert torch.equal(outputs(loaded), outputs(trainer.model))


def test_lists_of_compacted_layers_are_no_stack_of_blocks() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
            self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    model = Heads()
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5, target_modules="all-linear"))
    for layer in model.modules():
        if isinstance(layer, SingularGroupLinear):
            layer.set_remaining(torch.arange(8) < 2)
    compact(model)
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.1))
    assert isinstance(model.blocks[1][0], SingularGroupLinear)
    assert isinstance(model.heads[1], LowRankLinear)
