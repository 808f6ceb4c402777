"""Averages of the model, reference models that follow it, and lists of its parameters, in the user's own callbacks."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paper import PAPER
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, SingularGroupLinear, compact, rank_report
from rankdyna_trainer import inject_singular_groups as inject

MakeTrainer = Callable[..., Trainer]
Check = Callable[..., None]
Row = dict[str, Tensor]
SHORT = {"rank_ratio": 0.2, "rank_warmup_steps": 0.1, "rank_cooldown_steps": 0.4}
CONFIG, FIXED = RankDynaConfig(**SHORT), RankDynaConfig(**SHORT, fixed_shapes=True)
DECAY = 0.8


class Average(TrainerCallback):
    """An average that is made when training begins, and compacted and saved when it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, model: nn.Module) -> None:
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def update(self, model: nn.Module) -> None:
        self.average.update_parameters(model)

    def whole(self) -> nn.Module:
        return self.average.module

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.make(model)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.update(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        compact(self.whole()).save_pretrained(self.folder)


class Swa(Average):
    """Of equal weights, as torch's default."""

    def make(self, model: nn.Module) -> None:
        self.average = AveragedModel(model)


class OwnEma(Average):
    """As many programs write it: parameters are averaged, buffers copied."""

    def make(self, model: nn.Module) -> None:
        self.average = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for mean, now in zip(self.average.parameters(), model.parameters(), strict=True):
            mean.lerp_(now, 1 - DECAY)
        for buffer, now in zip(self.average.buffers(), model.buffers(), strict=True):
            buffer.copy_(now)

    def whole(self) -> nn.Module:
        return self.average


class Reference(TrainerCallback):
    """Each step's parameters in float64, before the model is compacted, and which groups remained."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def note(self, model: nn.Module) -> None:
        self.steps.append({name: p.detach().double().clone() for name, p in model.named_parameters()})
        layers = {name: m for name, m in model.named_modules() if isinstance(m, SingularGroupLinear)}
        self.remaining = {name: layer.remaining.clone() for name, layer in layers.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.note(model)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.note(model)

    def mean(self, kind: type[Average]) -> dict[str, Tensor]:
        start, *steps = self.steps
        mean = steps[0] if kind is not OwnEma else start
        for number, step in enumerate(steps, start=1):
            part = 1 / number if kind is Swa else 1 - DECAY
            mean = {name: value + part * (step[name] - value) for name, value in mean.items()}
        return mean

    def weight(self, mean: dict[str, Tensor], layer: str) -> Tensor:
        u, sigma, v = (mean[f"{layer}.{name}"][self.remaining[layer]] for name in ("u", "sigma", "v"))
        return (u.T * sigma) @ v


@pytest.mark.parametrize("kind", [Average, Swa, OwnEma])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_an_average_is_compacted_to_the_groups_that_remain(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    batch: Row,
    tmp_path: Path,
    kind: type[Average],
    optim: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    average, reference = kind(tmp_path / "average"), Reference()
    trainer = make_trainer(tiny_bert, RankDynaCallback(FIXED), average, reference, optim=optim)
    trainer.train()
    assert "full ranks" not in caplog.text and "stopped at step" not in caplog.text
    report, of_model = rank_report(average.whole()), rank_report(trainer.model)
    assert report.equals(of_model) and report["rank"].sum() == math.ceil(0.2 * 384)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "average").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, average.whole().eval()(**batch).logits)
    mean = reference.mean(kind)
    for name, module in loaded.named_modules():
        if name in reference.remaining:
            weight = module.to_dense_weight() if hasattr(module, "p") else module.weight
            torch.testing.assert_close(weight.double(), reference.weight(mean, name), rtol=1e-5, atol=1e-6)
    head = loaded.classifier.weight.double()
    torch.testing.assert_close(head, mean["classifier.weight"], rtol=1e-5, atol=1e-6)
    assert not torch.equal(loaded.classifier.weight, trainer.model.classifier.weight)


def test_the_shapes_stay_from_the_constructor_to_the_end(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    check_compressed: Check,
    batch: Row,
) -> None:
    class Kept(TrainerCallback):
        """A list for clipping, kept from the beginning."""

        def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            now = list(model.parameters())
            assert all(one is other for one, other in zip(self.parameters, now, strict=True))

    kept = Kept()
    trainer = make_trainer(tiny_bert, RankDynaCallback(FIXED), kept)
    kept.parameters = list(trainer.model.parameters())
    shapes = {name: parameter.shape for name, parameter in trainer.model.named_parameters()}
    assert shapes["bert.encoder.layer.0.output.dense.u"] == (32, 32)
    trainer.train()
    check_compressed(trainer, batch)


def test_an_average_as_the_model_that_is_saved(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, batch: Row, tmp_path: Path
) -> None:
    """Put into the model after the last step, it is what the run compacts and saves."""

    class Last(Average):
        @torch.no_grad()
        def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            self.update(model)
            if state.global_step == state.max_steps:
                for parameter, mean in zip(model.parameters(), self.whole().parameters(), strict=True):
                    parameter.copy_(mean)

    average = Last(tmp_path / "average")
    make_trainer(tiny_bert, RankDynaCallback(FIXED), average).train()
    saved, compacted = (
        BertForSequenceClassification.from_pretrained(tmp_path / folder).eval() for folder in ("output", "average")
    )
    with torch.no_grad():
        assert torch.equal(saved(**batch).logits, compacted(**batch).logits)


class Early(Average):
    """Made of what the Trainer was given."""

    def __init__(self, average: nn.Module) -> None:
        self.average = average

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        pass

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        pass


class Late(Average):
    """Made after some steps."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        pass

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        if state.global_step == 1:
            self.make(model)


class Clipped(TrainerCallback):
    """The target parameters, by name."""

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.parameters = dict(model.named_parameters())


@pytest.mark.parametrize("basis", [{}, PAPER])
@pytest.mark.parametrize("kind", ["torch", "own", "late", "list", "before the Trainer"])
def test_an_average_without_fixed_shapes_is_refused_before_anything_changes(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    basis: dict[str, Any],
    kind: str,
) -> None:
    callback: TrainerCallback = {
        "torch": Average(tmp_path),
        "own": OwnEma(tmp_path),
        "late": Late(tmp_path),
        "list": Clipped(),
        "before the Trainer": Early(AveragedModel(tiny_bert)),
    }[kind]
    said = "keeps parameters of layers" if kind == "list" else "is a copy of the model that is compressed"
    trainer = make_trainer(tiny_bert, RankDynaCallback(RankDynaConfig(**SHORT, **basis)), callback)
    with pytest.raises(ValueError, match=rf"{type(callback).__name__}\.\w+ {said}.*Set fixed_shapes=True"):
        trainer.train()
    assert trainer.state.global_step == (kind == "late")


def test_an_average_of_the_dense_model_is_refused_with_fixed_shapes_too(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(FIXED), Early(AveragedModel(tiny_bert)))
    with pytest.raises(ValueError, match=r"Early\.average has other tensors than the model.* in on_train_begin"):
        trainer.train()


def test_a_model_of_the_same_class_is_warned_of(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a reference, or an average that breaks."""

    class Compares(TrainerCallback):
        def __init__(self, reference: nn.Module) -> None:
            self.reference = reference

    make_trainer(tiny_bert, RankDynaCallback(CONFIG), Compares(copy.deepcopy(tiny_bert))).train()
    assert caplog.text.count("Compares.reference is another BertForSequenceClassification. If it is an average") == 1


def test_other_groups_are_refused(make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification) -> None:
    with pytest.raises(ValueError, match=r"fixed_shapes=True a Trainer begins with the groups of the weights"):
        make_trainer(
            tiny_bert, RankDynaCallback(RankDynaConfig(**SHORT, fixed_shapes=True, group_basis="activations"))
        )


def test_groups_of_the_inputs_are_fixed_when_they_are_injected_before(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    check_compressed: Check,
    batch: Row,
    tmp_path: Path,
) -> None:
    config = RankDynaConfig(**SHORT, fixed_shapes=True, group_basis="activations")
    inject(tiny_bert, config, [batch])
    before = tiny_bert.bert.encoder.layer[0].output.dense.u
    average = Average(tmp_path / "average")
    trainer = make_trainer(tiny_bert, RankDynaCallback(config), average, watch := Reference())
    assert trainer.model.bert.encoder.layer[0].output.dense.u is before
    trainer.train()
    assert len(watch.steps) == 21
    check_compressed(trainer, batch)
    assert rank_report(average.whole()).equals(rank_report(trainer.model))


def test_an_average_that_does_not_know_what_was_removed_is_told_of(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class ParametersOnly(OwnEma):
        @torch.no_grad()
        def update(self, model: nn.Module) -> None:
            for mean, now in zip(self.average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - DECAY)

    make_trainer(tiny_bert, RankDynaCallback(FIXED), ParametersOnly(tmp_path / "average")).train()
    assert "This copy of a model has all of its singular groups" in caplog.text
