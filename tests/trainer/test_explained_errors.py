"""Errors of torch and of the system name the layer, the checkpoint, and what to do."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from support.paper import PAPER
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig
from rankdyna_trainer.layers.singular_group import singular_group_layers

MakeTrainer = Callable[..., Trainer]
CONFIG = RankDynaConfig(rank_ratio=0.3, rank_scope="local", rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)


def times(x: Tensor, layer: Any) -> Tensor:
    return F.linear(x, layer.weight)


def times_in_two_lines(x: Tensor, layer: Any) -> Tensor:
    weight = layer.weight
    return x @ weight.view(6, 6)


def times_by_name(x: Tensor, layer: Any) -> Tensor:
    weight = getattr(layer, "weight").t()  # noqa: B009
    return x @ weight


# What is chosen while the model runs stands in no source.
HELPERS = {"line": times, "two lines": times_in_two_lines, "name": times_by_name}


class Reading(nn.Module):
    def __init__(self, helper: str | None = None) -> None:
        super().__init__()
        self.helper = helper
        self.proj, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.other(x)
        return x + (self.proj(x) if self.helper is None else HELPERS[self.helper](x, self.proj))


class Network(nn.Module):
    def __init__(self, helper: str | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 6)
        self.blocks = nn.ModuleList([Reading(), Reading(helper)])
        self.head = nn.Linear(6, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids).mean(1)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("helper", HELPERS)
@pytest.mark.parametrize("basis", ["weights", "activations"])
def test_a_weight_that_is_read_names_the_layer(helper: str, basis: Any, make_trainer: MakeTrainer) -> None:
    config = RankDynaConfig(rank_ratio=0.5, group_basis=basis, rank_warmup_steps=0.5, rank_cooldown_steps=0.2)
    place = rf"{HELPERS[helper].__name__} in .*test_explained_errors\.py, line \d+"
    message = rf"blocks\.1\.proj is compressed, but its weight.* is read by {place}.*: name the layer in exclude_mod"
    with pytest.raises(ValueError, match=message):
        make_trainer(Network(helper), RankDynaCallback(config)).train()
    named = RankDynaConfig(rank_ratio=0.5, exclude_modules=["blocks.1.proj"], rank_warmup_steps=0.1, **PAPER)
    make_trainer(Network(helper), RankDynaCallback(named)).train()


def test_a_weight_that_is_read_of_a_compacted_model(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(Network(), RankDynaCallback(CONFIG))
    trainer.train()
    trainer.model.blocks[1].helper = "line"
    with pytest.raises(ValueError, match=r"blocks\.1\.proj is compressed, but its weight"):
        trainer.evaluate()


def test_other_errors_stay_as_they_are(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(Network(), RankDynaCallback(CONFIG))
    next(iter(singular_group_layers(trainer.model).values())).v.data = torch.zeros(6, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer.train()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_says_which_one_is_whole(
    error: Exception,
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), save_strategy="steps", save_steps=5)
    save = type(trainer)._save_optimizer_and_scheduler

    def full(self: Trainer, folder: str) -> None:
        if self.state.global_step == self.state.max_steps // 2:
            raise error
        save(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    safe = tmp_path / "output" / "checkpoint-5"
    with pytest.raises(
        OSError, match=r"The checkpoint of step 10 could not be written in .*\. The newest whole"
    ) as said:
        trainer.train()
    assert f"trainer.train(resume_from_checkpoint={str(safe)!r}), once there is room" in str(said.value)
    monkeypatch.undo()
    again = make_trainer(
        tiny_bert.__class__(tiny_bert.config), RankDynaCallback(CONFIG), save_strategy="steps", save_steps=5
    )
    again.train(resume_from_checkpoint=str(safe))
    assert again.state.global_step == 20


@pytest.mark.parametrize("kind", ["file", "link to nowhere"])
def test_a_file_in_the_place_of_a_checkpoint_is_named_before_training(
    kind: str, make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), save_strategy="steps", save_steps=5)
    (tmp_path / "output").mkdir(exist_ok=True)
    place = tmp_path / "output" / "checkpoint-10"
    place.touch() if kind == "file" else place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="checkpoint-10 is no folder, and checkpoints are written into"):
        trainer.train()
    assert trainer.state.global_step == 0
