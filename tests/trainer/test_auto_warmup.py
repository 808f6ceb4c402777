"""`rank_warmup_steps="auto"` in a real Trainer: tests/method has the rule by which the end is found."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig
from rankdyna_trainer.checkpoint.run_state import read_run_state
from rankdyna_trainer.checkpoint.training import load_training_checkpoint
from rankdyna_trainer.method.loss_plateau import LossPlateau
from rankdyna_trainer.method.schedule import RankBudgetSchedule

MakeTrainer = Callable[..., Trainer]
STEPS = 20
# With a rule that any five losses meet, and scores that are means over two steps.
FACTORED, WARMUP, COOLDOWN = 5, 7, 7


@pytest.fixture(autouse=True)
def any_loss_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(plateau: LossPlateau, loss: float) -> bool:
        plateau._losses.append(loss)
        return len(plateau._losses) == FACTORED

    monkeypatch.setattr(LossPlateau, "add", add)


def run(make_trainer: MakeTrainer, folder: Path, resume: Path | None = None, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))
    config = RankDynaConfig(
        param_ratio=0.4, group_basis="activations", rank_warmup_steps="auto", importance_beta=0.5, teacher="self"
    )
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    trainer = make_trainer(model, RankDynaCallback(config), output_dir=str(folder), **(settings | arguments))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.slow
def test_the_end_is_logged_saved_and_resumed(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    arguments = {"gradient_accumulation_steps": 2}
    whole = run(make_trainer, tmp_path / "whole", **arguments)
    rows = [row for row in whole.state.log_history if "rank_budget" in row]
    assert [row.get("rank_warmup_steps") for row in rows] == [None] * (FACTORED - 1) + [WARMUP] * (
        STEPS - FACTORED + 1
    )
    budgets = [row["rank_budget"] for row in rows]
    assert budgets[:WARMUP] == [budgets[0]] * WARMUP and budgets[WARMUP] < budgets[0]
    assert budgets[-COOLDOWN - 2] > budgets[-COOLDOWN - 1] == budgets[-1]
    card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
    assert f"| warm-up | {WARMUP} |" in card and f"| cool-down | {COOLDOWN} |" in card
    for stop in (2, FACTORED, WARMUP + 1):
        start = tmp_path / f"from{stop}" / f"checkpoint-{stop}"
        shutil.copytree(tmp_path / "whole" / start.name, start)
        resumed = run(make_trainer, start.parent, start, **arguments)
        expected, found = whole.model.state_dict(), resumed.model.state_dict()
        assert found.keys() == expected.keys(), stop
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), stop


def test_a_checkpoint_tells_the_budget_that_was_found(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = run(make_trainer, tmp_path)
    logged = {row["step"]: row["rank_budget"] for row in trainer.state.log_history if "rank_budget" in row}
    for step in (FACTORED, WARMUP + 2, STEPS):
        checkpoint = tmp_path / f"checkpoint-{step}"
        budget = read_run_state(checkpoint).budget(load_training_checkpoint(checkpoint))
        assert budget.schedule == RankBudgetSchedule(WARMUP, COOLDOWN, STEPS) and budget.at(step) == logged[step]


@pytest.mark.slow
@pytest.mark.long
def test_torch_compile_changes_nothing(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def trained(name: str, **compiled: Any) -> tuple[list[Any], list[float]]:
        history = run(make_trainer, tmp_path / name, save_strategy="no", **compiled).state.log_history
        rows = [row for row in history if "rank_budget" in row]
        return [row.get("rank_warmup_steps") for row in rows], [row["loss"] for row in rows]

    ends, losses = trained("plain")
    compiled_ends, compiled_losses = trained("compiled", torch_compile_backend="aot_eager")
    assert compiled_ends == ends and compiled_losses == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("outside", [True, False])
def test_a_loss_that_the_trainer_computes_is_waited_for_too(
    outside: bool, make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))
    config = RankDynaConfig(param_ratio=0.4, group_basis="weights", rank_warmup_steps="auto", importance_beta=0.5)
    trainer = make_trainer(
        model, RankDynaCallback(config), output_dir=str(tmp_path), max_steps=STEPS, save_strategy="no", logging_steps=1
    )
    trainer.compute_loss_func = compute_loss if outside else None
    trainer.train()
    found = {row["rank_warmup_steps"] for row in trainer.state.log_history if "rank_warmup_steps" in row}
    assert found == {FACTORED}
    assert "returns no loss" not in caplog.text
