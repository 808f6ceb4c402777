"""Half precision: no score is poisoned, and no group is removed in a step that a loss scaler skips."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.paper import PAPER
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report
from rankdyna_trainer.layers.singular_group import SingularGroupLinear

CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)
FINAL = 77
MakeTrainer = Callable[..., Trainer]


class Record(TrainerCallback):
    """What each step did to the layers: whether it was skipped, the ranks after it, and the scores."""

    def __init__(self) -> None:
        self.skipped: list[bool] = []
        self.finite: list[bool] = []
        self.ranks: list[list[int]] = []
        self.scores: list[torch.Tensor] = []
        self.dtypes: set[torch.dtype] = set()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:  # type: ignore[no-untyped-def]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.weight = model.classifier.weight.detach().clone()
        self.finite.append(all(bool(gradient.isfinite().all()) for gradient in gradients))

    def on_optimizer_step(self, args, state, control, model, **kwargs) -> None:  # type: ignore[no-untyped-def]
        layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
        # A fused optimizer skips by itself, unknown to accelerate's step_was_skipped.
        self.skipped.append(torch.equal(model.classifier.weight, self.weight))
        self.ranks.append([layer.rank for layer in layers])
        self.scores.append(torch.cat([layer.importance[layer.remaining] for layer in layers]).clone())
        self.dtypes |= {layer.importance.dtype for layer in layers}


def assert_ends_at_the_budget(trainer: Trainer, record: Record, final: int = FINAL) -> None:
    assert record.dtypes == {torch.float32}
    assert all(bool(scores.isfinite().all()) for scores in record.scores)
    assert sum(record.ranks[-1]) == rank_report(trainer.model)["rank"].sum() == final
    loaded = AutoModelForSequenceClassification.from_pretrained(trainer.args.output_dir)
    own, reloaded = trainer.model.state_dict(), loaded.state_dict()
    assert own.keys() == reloaded.keys() and all(torch.equal(own[name], reloaded[name]) for name in own)


@pytest.mark.parametrize("ratio", [{"rank_ratio": 0.2}, {"param_ratio": 0.2}])
def test_bf16_autocast(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, ratio: dict[str, float]
) -> None:
    record = Record()
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(RankDynaConfig(**ratio, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)),
        record,
        bf16=True,
    )
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    kept = rank_report(trainer.model)
    assert_ends_at_the_budget(trainer, record, kept["rank"].sum())
    if "param_ratio" in ratio:
        assert kept["parameters"].sum() <= math.floor(0.2 * kept["dense_parameters"].sum())
    else:
        assert kept["rank"].sum() == FINAL


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_bf16_weights(make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, optim: str) -> None:
    record = Record()
    trainer = make_trainer(tiny_bert.bfloat16(), RankDynaCallback(CONFIG), record, optim=optim)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
    assert_ends_at_the_budget(trainer, record)


def with_loss_scaler(trainer: Trainer, init_scale: float) -> Trainer:
    """What `fp16=True` sets up on a GPU; accelerate refuses it on a CPU, although torch has all of it there."""
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
    return trainer


@pytest.mark.parametrize(
    ("max_grad_norm", "optim"),
    [
        (1.0, "adamw_torch"),
        (0.0, "adamw_torch_fused"),
        (1.0, "adafactor"),
        (0.0, "sgd"),
        *(pytest.param(0.0, optim, marks=pytest.mark.long) for optim in ("adamw_torch", "adafactor")),
        *(pytest.param(1.0, optim, marks=pytest.mark.long) for optim in ("adamw_torch_fused", "sgd")),
    ],
)
def test_fp16_steps_that_overflow(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, max_grad_norm: float, optim: str
) -> None:
    record = Record()
    settings: dict[str, Any] = {"max_grad_norm": max_grad_norm, "max_steps": 40, "optim": optim}
    trainer = with_loss_scaler(
        make_trainer(tiny_bert, RankDynaCallback(CONFIG), record, **settings), init_scale=2.0**22
    )
    trainer.train()
    assert trainer.model.dtype == torch.float32
    skipped = [step for step, was_skipped in enumerate(record.skipped) if was_skipped]
    # Each growth of the scale overflows again, in the adjusting phase (steps 5 to 24) as well.
    assert skipped[0] == 0 and any(4 < step < 24 for step in skipped) and len(skipped) < 30
    for step, was_skipped in enumerate(record.skipped):
        assert record.finite[step] != was_skipped
        if was_skipped and step:
            assert record.ranks[step] == record.ranks[step - 1]
            assert torch.equal(record.scores[step], record.scores[step - 1])
    assert_ends_at_the_budget(trainer, record)


def test_scores_do_not_depend_on_the_loss_scale(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    def scores(init_scale: float, max_grad_norm: float) -> torch.Tensor:
        torch.manual_seed(0)
        record = Record()
        model = BertForSequenceClassification(tiny_bert.config)
        trainer = make_trainer(model, RankDynaCallback(CONFIG), record, max_steps=5, max_grad_norm=max_grad_norm)
        with_loss_scaler(trainer, init_scale).train()
        assert not record.skipped[0]
        return record.scores[0]

    for max_grad_norm in (0.0, 1.0):
        small, large = (scores(scale, max_grad_norm) for scale in (8.0, 1024.0))
        torch.testing.assert_close(large, small, rtol=0.02, atol=1e-6)


def test_the_last_step_is_skipped(make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification) -> None:
    class Overflow(TrainerCallback):
        """Gradients become infinite before they are looked at, in the last steps of the adjusting phase and after."""

        def on_step_begin(self, args, state, control, model, **kwargs: Any) -> None:  # type: ignore[no-untyped-def]
            if state.global_step >= 9:
                trainer.accelerator.scaler.update(new_scale=2.0**60)

    record = Record()
    trainer = with_loss_scaler(make_trainer(tiny_bert, RankDynaCallback(CONFIG), Overflow(), record), 8.0)
    trainer.train()
    assert record.skipped[-8:] == [True] * 8
    assert sum(record.ranks[-1]) > FINAL
    record.ranks.append(list(rank_report(trainer.model)["rank"]))
    assert_ends_at_the_budget(trainer, record)
