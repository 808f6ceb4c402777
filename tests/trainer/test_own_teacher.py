"""`teacher="self"`: the model as it was in the warm-up teaches the rest of the run, and is in each checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.teaching import other_weights
from transformers import BertConfig, BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

MakeTrainer = Callable[..., Trainer]
STEPS, WARMUP = 12, 4


def config(basis: str) -> RankDynaConfig:
    return RankDynaConfig(
        param_ratio=0.4, group_basis=basis, teacher="self", rank_warmup_steps=WARMUP, rank_cooldown_steps=0.3
    )


def run(make_trainer: MakeTrainer, basis: str, folder: Path, resume: Path | None = None) -> Trainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))
    arguments = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    trainer = make_trainer(model, RankDynaCallback(config(basis)), output_dir=str(folder), **arguments)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("basis", [pytest.param("weights", marks=pytest.mark.long), "activations"])
def test_it_begins_when_the_warmup_ends_and_is_resumed_exactly(
    make_trainer: MakeTrainer, tmp_path: Path, basis: str
) -> None:
    begins = WARMUP // 2 if basis == "activations" else WARMUP
    whole = run(make_trainer, basis, tmp_path / "whole")
    taught = [row["step"] for row in whole.state.log_history if "teacher_hidden_loss" in row]
    assert taught == list(range(begins + 1, STEPS + 1))
    kept = [
        step
        for step in range(1, STEPS + 1)
        if (tmp_path / "whole" / f"checkpoint-{step}" / "rankdyna_teacher" / "model.safetensors").is_file()
    ]
    assert kept == list(range(begins, STEPS + 1))
    assert not (tmp_path / "whole" / "rankdyna_teacher").exists()
    for stop in (begins - 1, begins, begins + 2):
        start = tmp_path / f"from{stop}" / f"checkpoint-{stop}"
        shutil.copytree(tmp_path / "whole" / start.name, start)
        resumed = run(make_trainer, basis, start.parent, start)
        expected, found = whole.model.state_dict(), resumed.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_that_lost_its_teacher_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    run(make_trainer, "activations", tmp_path / "whole")
    start = tmp_path / "lost" / f"checkpoint-{WARMUP + 1}"
    shutil.copytree(tmp_path / "whole" / start.name, start)
    shutil.rmtree(start / "rankdyna_teacher")
    with pytest.raises(ValueError, match="its checkpoint has no folder rankdyna_teacher"):
        run(make_trainer, "activations", start.parent, start)


class OfLogits(Trainer):
    """Leaves the loss of the model alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("basis", ["weights", "activations"])
def test_a_trainer_that_ignores_the_loss_of_the_model_is_refused_before_it_learns_without_a_teacher(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, basis: str
) -> None:
    before = tiny_bert.classifier.weight.detach().clone()
    chosen = RankDynaConfig(rank_ratio=0.2, group_basis=basis, rank_warmup_steps=WARMUP, rank_cooldown_steps=0.3)
    callback = RankDynaCallback(chosen, teacher=other_weights(tiny_bert))
    trainer = make_trainer(tiny_bert, callback, trainer_class=OfLogits)
    with pytest.raises(ValueError, match="OfLogits does not train on the loss that the model returns"):
        trainer.train()
    assert torch.equal(tiny_bert.classifier.weight, before)
