"""torchao's Adam with states of 8 bits, as a training argument, together with what else saves memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torchao.optim.subclass_8bit import OptimState8bit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report
from rankdyna_trainer.layers.singular_group import singular_group_layers

# Large enough for states of 8 bits, which come in blocks of 256 numbers from 4,096 on.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}


class Watch(TrainerCallback):
    """What the factors are, and which states they have, at each step."""

    def __init__(self) -> None:
        self.states: list[set[type]] = []
        self.removed = 0

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any) -> None:
        layers = singular_group_layers(model).values()
        states = [optimizer.state[factor] for layer in layers for factor in (layer.u, layer.v)]
        self.states.append({type(value) for of_factor in states for value in of_factor.values() if value.ndim})
        for layer in layers:
            self.removed += int((~layer.remaining).sum())
            for factor in layer.factors().values():
                assert not factor[~layer.remaining].any(), "a removed group has weight again"


def test_states_of_8_bits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.compile", lambda function, **_: function)  # of its step, which takes a minute
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64, max_position_embeddings=32))
    tokens = torch.arange(64 * 16).reshape(64, 16) % 60
    rows = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens])
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        optim="adamw_torch_8bit",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    config = RankDynaConfig(
        param_ratio=0.5, start_ratio=1.0, rank_multiple_of=8, group_basis="weights", rank_warmup_steps=0.2
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[RankDynaCallback(config), watch := Watch()])
    trainer.train()
    assert set().union(*watch.states) == {OptimState8bit}
    assert watch.removed > 0
    assert "keeps a state (exp_avg) that cannot be cut by groups" in caplog.text
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    report = rank_report(model)
    assert (
        0.45 * report["dense_parameters"].sum() < report["parameters"].sum() <= 0.5 * report["dense_parameters"].sum()
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert rank_report(loaded).equals(report)
