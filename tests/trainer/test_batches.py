"""The Trainer's ways to change what a model sees of a batch together with the plugin."""

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from support.probe import Probe
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

OPTIONS = {option.name for option in fields(TrainingArguments)}
MakeTrainer = Callable[..., Trainer]
Check = Callable[..., None]
Row = dict[str, torch.Tensor]
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)


def test_label_smoothing(
    make_trainer: MakeTrainer, still_bert: BertForSequenceClassification, check_compressed: Check, batch: Row
) -> None:
    with torch.no_grad():
        still_bert.classifier.bias[0] = 1.0
        log_p = F.log_softmax(still_bert(batch["input_ids"]).logits, dim=-1)
    truth = -log_p.gather(1, batch["labels"].unsqueeze(1)).mean()
    smoothed = 0.9 * truth - 0.1 * log_p.mean()
    assert abs(float(smoothed - truth)) > 0.005
    trainer = make_trainer(
        still_bert, RankDynaCallback(CONFIG), label_smoothing_factor=0.1, per_device_train_batch_size=64
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(smoothed), abs=1e-5)
    check_compressed(trainer, batch)


def test_batches_of_like_lengths(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    check_compressed: Check,
    rows: list[Row],
    batch: Row,
) -> None:
    ragged = [
        {"input_ids": row["input_ids"][: 2 + i % 8].tolist(), "labels": int(row["labels"])}
        for i, row in enumerate(rows)
    ]

    def padding(strategy: str) -> int:
        probe = Probe()
        new, by_length = "train_sampling_strategy" in OPTIONS, strategy == "group_by_length"
        sampling: dict[str, Any] = {"train_sampling_strategy": strategy} if new else {"group_by_length": by_length}
        trainer = make_trainer(
            copy.deepcopy(tiny_bert),
            RankDynaCallback(CONFIG),
            probe,
            **sampling,
            trainer_arguments={"train_dataset": ragged, "data_collator": DataCollatorWithPadding(tokenizer)},
        )
        trainer.train()
        assert len({inputs["input_ids"].shape for [inputs] in probe.batches}) > 1
        check_compressed(trainer, batch)
        return sum(int((inputs["attention_mask"] == 0).sum()) for [inputs] in probe.batches)

    assert 0 < padding("group_by_length") < 0.6 * padding("random")


def test_noise_on_the_embeddings(
    make_trainer: MakeTrainer, still_bert: BertForSequenceClassification, check_compressed: Check, batch: Row
) -> None:
    class Hooked(TrainerCallback):
        steps = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            hooks = model.get_input_embeddings()._forward_hooks.values()
            self.steps += any(getattr(hook, "__name__", "") == "neftune_post_forward_hook" for hook in hooks)

    def run(*callbacks: TrainerCallback, **arguments: Any) -> nn.Module:
        trainer = make_trainer(copy.deepcopy(still_bert), RankDynaCallback(CONFIG), *callbacks, **arguments)
        trainer.train()
        assert not trainer.model.get_input_embeddings()._forward_hooks
        check_compressed(trainer, batch)
        return trainer.model.eval()

    noisy, plain = run(hooked := Hooked(), neftune_noise_alpha=5), run()
    assert hooked.steps == 20
    with torch.no_grad():
        assert not torch.allclose(noisy(**batch).logits, plain(**batch).logits, atol=1e-4)
