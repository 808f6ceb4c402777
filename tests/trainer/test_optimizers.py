"""Optimizers of every kind: those whose state is cut with the groups, and those where the groups are only masked."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from lion_pytorch import Lion
from support.damage import TRANSFORMERS_4
from torch import nn
from torch.optim import Optimizer
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, SingularGroupLinear, rank_report

MakeTrainer = Callable[..., Trainer]
Check = Callable[..., None]
Row = dict[str, torch.Tensor]
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)
WARNING = "Removed groups stay in the tensors"


def logits(model: nn.Module, batch: Row) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


class LastStep(TrainerCallback):
    """What the model was before it was compacted."""

    def __init__(self, batch: Row) -> None:
        self.batch = batch
        self.masked = 0

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **_: Any) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
        for layer in self.layers:
            for factor in layer.factors().values():
                assert not factor[~layer.remaining].any(), "a removed group has weight again"
                self.masked += int((~layer.remaining).sum())
        if state.global_step == state.max_steps:
            self.logits = logits(model, self.batch)
            self.sizes = {
                value.shape[0]
                for layer in self.layers
                for value in optimizer.state[layer.v].values()
                if isinstance(value, torch.Tensor) and value.shape == layer.v.shape
            }


class MuonForMatrices:
    """Muon for the matrices of the encoder, the factors among them, and AdamW for all else."""

    def __call__(self, model: nn.Module, *, lr: float) -> Optimizer:
        encoder = {id(p) for n, p in model.named_parameters() if "encoder" in n and p.ndim == 2}
        chosen = [[p for p in model.parameters() if (id(p) in encoder) == use_muon] for use_muon in (True, False)]
        return pytorch_optimizer.Muon(
            [
                {"params": chosen[0], "lr": lr, "use_muon": True},
                {"params": chosen[1], "lr": 1e-3, "use_muon": False},
            ]
        )


ADAM = {"lr": 1e-3, "weight_decay": 0.01}
CUT: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, ADAM | {"foreach": False, "fused": False}),
    "adamw amsgrad": (torch.optim.AdamW, ADAM | {"amsgrad": True}),
    "adamw foreach": (torch.optim.AdamW, ADAM | {"foreach": True}),
    "adamw fused": (torch.optim.AdamW, ADAM | {"fused": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "lion": (Lion, {"lr": 1e-4, "weight_decay": 0.1}),
    "muon": (MuonForMatrices, {"lr": 1e-3}),
    "schedule-free": (pytorch_optimizer.ScheduleFreeAdamW, {"lr": 1e-3}),
}
MASKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
    "came": (pytorch_optimizer.CAME, {"lr": 1e-3}),
    "soap": (pytorch_optimizer.SOAP, {"lr": 1e-3, "precondition_frequency": 2}),
    "shampoo": (pytorch_optimizer.ScalableShampoo, {"lr": 1e-3, "preconditioning_compute_steps": 2}),
}


if TRANSFORMERS_4:  # it knows no optimizer factory that is called with the model
    CUT.pop("muon", None)
    MASKED.pop("muon", None)


@pytest.mark.parametrize("name", [*CUT, *MASKED])
def test_the_budget_is_met_and_removed_groups_are_inert(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    check_compressed: Check,
    batch: Row,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    optimizer_class, settings = (CUT | MASKED)[name]
    frozen = copy.deepcopy(tiny_bert)
    last = LastStep(batch)
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(CONFIG),
        last,
        trainer_arguments={"optimizer_cls_and_kwargs": (optimizer_class, settings)},
    )
    trainer.train()
    used = pytorch_optimizer.Muon if optimizer_class is MuonForMatrices else optimizer_class
    assert type(trainer.optimizer.optimizer) is used
    assert not torch.equal(tiny_bert.classifier.weight, frozen.classifier.weight)
    assert last.masked > 0
    widths, ranks = ([getattr(layer, what) for layer in last.layers] for what in ("width", "rank"))
    assert 0 in ranks, "no layer was emptied: some optimizers cannot step on an empty tensor"
    assert widths == ([max(rank, 2) for rank in ranks] if name in CUT else [32] * 12)
    assert not last.sizes or last.sizes == set(widths)
    assert caplog.text.count(WARNING) == (name in MASKED)
    check_compressed(trainer, batch)
    assert rank_report(tiny_bert)["rank"].tolist() == ranks
    if name != "schedule-free":
        torch.testing.assert_close(logits(tiny_bert, batch), last.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_optimizers_that_the_trainer_names(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    check_compressed: Check,
    batch: Row,
    caplog: pytest.LogCaptureFixture,
    optim: str,
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), last := LastStep(batch), optim=optim)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer).__name__.lower() == optim.split("_")[0]
    assert bool(optimizer.param_groups[0].get("fused")) == optim.endswith("fused")
    assert last.masked > 0
    assert caplog.text.count(WARNING) == (optim == "adafactor")
    check_compressed(trainer, batch)
    torch.testing.assert_close(logits(tiny_bert, batch), last.logits, rtol=1e-5, atol=1e-6)


class AdamWithNotes(torch.optim.AdamW):
    """AdamW, with a state of a shape that has no groups."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for state in self.state.values():
            state["notes"] = torch.zeros(3)
        return result


def test_a_state_that_cannot_be_cut_changes_no_rank(
    make_trainer: MakeTrainer,
    still_bert: BertForSequenceClassification,
    check_compressed: Check,
    batch: Row,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(optimizer_class: type[Optimizer]) -> tuple[nn.Module, list[int]]:
        model = copy.deepcopy(still_bert).double()
        trainer = make_trainer(
            model,
            RankDynaCallback(CONFIG),
            last := LastStep(batch),
            trainer_arguments={"optimizer_cls_and_kwargs": (optimizer_class, ADAM)},
        )
        trainer.train()
        check_compressed(trainer, batch)
        return model, [layer.width for layer in last.layers]

    cut, smaller = run(torch.optim.AdamW)
    assert WARNING not in caplog.text and sum(smaller) < 100
    masked, whole = run(AdamWithNotes)
    assert caplog.text.count(WARNING) == 1 and whole == [32] * 12
    assert "AdamWithNotes keeps a state (notes) that cannot be cut by groups" in caplog.text
    assert rank_report(masked).equals(rank_report(cut))
    for (key, value), other in zip(masked.state_dict().items(), cut.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-9, msg=key)


def test_a_schedule_free_optimizer_ends_at_its_averaged_weights(
    make_trainer: MakeTrainer, still_bert: BertForSequenceClassification, check_compressed: Check, batch: Row
) -> None:
    class Averaged(TrainerCallback):
        def on_step_end(
            self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **_: Any
        ) -> None:
            if state.global_step == state.max_steps:
                self.trained_at = logits(model, batch)
                optimizer.eval()
                self.averaged = logits(model, batch)
                optimizer.train()

    trainer = make_trainer(
        still_bert,
        RankDynaCallback(CONFIG),
        weights := Averaged(),
        trainer_arguments={"optimizer_cls_and_kwargs": CUT["schedule-free"]},
    )
    trainer.train()
    assert not torch.allclose(weights.trained_at, weights.averaged, atol=1e-4)
    torch.testing.assert_close(logits(still_bert, batch), weights.averaged, rtol=1e-4, atol=1e-5)
    check_compressed(trainer, batch)
    trainer.evaluate()
    check_compressed(trainer, batch)


def test_the_best_model_of_a_schedule_free_optimizer_stays_as_it_was_saved(
    make_trainer: MakeTrainer, still_bert: BertForSequenceClassification, check_compressed: Check, batch: Row
) -> None:
    class Evaluated(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            self.logits = logits(model, batch)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 18  # after the last evaluation, and in training mode

    trainer = make_trainer(
        still_bert,
        RankDynaCallback(CONFIG),
        best := Evaluated(),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=16,
        eval_steps=16,
        load_best_model_at_end=True,
        trainer_arguments={"optimizer_cls_and_kwargs": CUT["schedule-free"]},
    )
    trainer.train()
    assert trainer.state.best_global_step == 16
    torch.testing.assert_close(logits(still_bert, batch), best.logits, rtol=1e-4, atol=1e-6)
    check_compressed(trainer, batch)
