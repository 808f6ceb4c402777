"""The card that a real Trainer leaves behind, and what becomes of it when the Trainer writes its own."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, create_repo
from support.cards import evaluations, scores, table
from support.hub_server import HubServer
from torch import nn
from transformers import BertForSequenceClassification, Trainer, dynamic_module_utils

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.report.continuations import Continuation, add_continuations
from rankdyna_trainer.report.speed import add_speed

MakeTrainer = Callable[..., Trainer]
pytestmark = pytest.mark.heatmap
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)
TOKEN = "hf_thisIsSecretAndStaysHere"


def test_the_card_tells_what_was_gained_and_loads_the_model(
    make_scored: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_bert.config._name_or_path = "google/tiny"
    tiny_bert.config.architectures = ["BertForSequenceClassification"]  # so that its head is no untrained one
    trainer = make_scored(tiny_bert, eval_strategy="steps", eval_steps=10, eval_on_start=True)
    trainer.train()
    output = tmp_path / "output"
    card = ModelCard.load(output / "README.md")

    found = evaluations(trainer)
    assert card.data.to_dict() == {
        "base_model": "google/tiny",
        "base_model_relation": "finetune",
        "datasets": ["stanfordnlp/sst2"],
        "library_name": "transformers",
        "metrics": ["accuracy"],
        "pipeline_tag": "text-classification",
        "tags": ["rankdyna", "low-rank"],
        "model-index": [
            {
                "name": "output",
                "results": [
                    {
                        "task": {"type": "text-classification"},
                        "dataset": {"name": "stanfordnlp/sst2", "type": "stanfordnlp/sst2"},
                        "metrics": [
                            {"type": "accuracy", "name": "eval_accuracy", "value": found[20]["eval_accuracy"]}
                        ],
                    }
                ],
            }
        ],
    }
    assert scores(card) == {
        "metric": ["at full rank, at step 0", "after, at step 20"],
        "eval_accuracy": [f"{found[step]['eval_accuracy']:.4g}" for step in (0, 20)],
        "eval_loss": [f"{found[step]['eval_loss']:.4g}" for step in (0, 20)],
    }
    assert found[0]["eval_loss"] != found[20]["eval_loss"]
    assert f" {(output / 'model.safetensors').stat().st_size:,} |" in card.text
    assert "| warm-up | 2 | 384 |" in card.text and "| cool-down | 8 | 77 |" in card.text
    assert (output / "ranks.png").read_bytes().startswith(b"\x89PNG") and "](ranks.png)" in card.text
    assert "pipeline(" not in card.text, "there is no tokenizer beside the model"

    (config,) = re.findall(r"```json\n(.*?)```", card.text, re.DOTALL)
    assert RankDynaConfig(**json.loads(config)) == CONFIG
    ways = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert ["trust_remote_code=True" in code for code in ways] == [True, False]
    assert ["import rankdyna_trainer" in code for code in ways] == [False, True]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for code in ways:
        names: dict[str, Any] = {}
        exec(code, names)
        with torch.no_grad():
            assert torch.equal(names["model"].eval()(**batch).logits, trainer.model.eval()(**batch).logits)


def test_the_trainers_own_card_keeps_ours_and_the_users_arguments(
    make_scored: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_scored(tiny_bert, eval_strategy="steps", eval_steps=10, hub_token=TOKEN)
    trainer.train()
    trainer.model.classifier.weight.data.zero_()  # scores that differ from those in training
    trainer.model.classifier.bias.data = torch.tensor([5.0, -5.0])
    after = trainer.evaluate()
    arguments: dict[str, Any] = {
        "language": "en",
        "license": "apache-2.0",
        "model_name": "my model",
        "finetuned_from": "google/tiny",
        "tasks": "text-classification",
        "dataset_tags": "glue",
        "dataset": "GLUE SST2",
        "dataset_args": "sst2",
    }
    trainer.create_model_card(tags=["mine"], **arguments)
    readme = tmp_path / "output" / "README.md"
    card = ModelCard.load(readme)

    assert card.data.language == ["en"] and card.data.license == "apache-2.0"
    assert card.data.base_model == "google/tiny" and card.data.base_model_relation == "finetune"
    assert sorted(card.data.tags) == ["generated_from_trainer", "low-rank", "mine", "rankdyna"]
    assert card.data.datasets == ["glue"] and card.data.model_name == "my model"
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name) == ("text-classification", "glue", "GLUE SST2")
    assert (result.dataset_args, result.metric_type) == ("sst2", "accuracy")
    assert result.metric_value == after["eval_accuracy"]
    assert scores(card)["eval_loss"] == [f"{after['eval_loss']:.4g}"]
    assert card.text.startswith("\n<!-- This model card has been generated automatically")
    assert re.findall(r"^# .*", card.text, re.MULTILINE) == ["# my model"]
    assert "More information needed" not in card.text
    for part in ("- learning_rate: 0.001", "| Validation Loss | Accuracy", "### Framework versions", "## Ranks"):
        assert card.text.count(part) == 1
    assert str(tmp_path) not in str(card) and TOKEN not in str(card)

    before = readme.read_bytes()
    trainer.create_model_card(tags=["mine"], **arguments)
    assert readme.read_bytes() == before
    add_speed(readme.parent, [(1, 0.25, 0.125)], "As measured.")
    add_continuations(readme.parent, [Continuation("a good", "film", "day")], "Greedily.")
    measured = readme.read_bytes()
    assert measured != before and b"| 1 | 250 | 125 | 0.5 |\n\nAs measured.\n\n## Text\n" in measured
    assert b"| a good | film | day |\n\nGreedily.\n\n## Ranks\n" in measured
    trainer.create_model_card(tags=["mine"], **arguments)
    assert readme.read_bytes() == measured, "the Trainer's card of the same model forgets what was measured"

    readme.unlink()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not readme.exists()


def test_pushing_keeps_the_card(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, hub: HubServer
) -> None:
    trainer = make_scored(tiny_bert)
    trainer.train()
    create_repo("alice/small")
    trainer.hub_model_id = "alice/small"
    trainer.push_to_hub(tags="mine")
    card = ModelCard(hub.files("alice/small")["README.md"].decode())
    assert {"mine", "rankdyna", "low-rank"} <= {*card.data.tags}
    assert table(card, "How it was compressed") | {
        "learning rate": "0.001, linear",
        "batch": "8",
        "epochs": "2.5 (20 steps)",
        "seed": "42",
        "precision": "float32",
    } == table(card, "How it was compressed")
    assert 'from_pretrained("alice/small")' in card.text and "### Training hyperparameters" in card.text


def test_a_base_model_that_was_a_folder_never_shows(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    """The Trainer takes the name of a folder that is gone for that of a model on the Hub."""
    tiny_bert.config._name_or_path = str(tmp_path / "gone")
    trainer = make_scored(tiny_bert)
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert "base_model" not in card.data.to_dict() and str(tmp_path) not in str(card)


class Plain(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        output = self.encoder(input_ids=input_ids, labels=labels)
        return {"loss": output.loss, "logits": output.logits}


def test_a_module_that_is_no_pretrained_model(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    make_scored(Plain(tiny_bert)).train()
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert "library_name" not in card.data.to_dict() and "pipeline_tag" not in card.data.to_dict()
    assert "`Plain`" in card.text and "from_pretrained" not in card.text


def test_what_a_person_wrote_stays(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    readme = tmp_path / "output" / "README.md"
    readme.parent.mkdir()
    readme.write_text("# By hand\n")
    make_scored(tiny_bert).train()
    assert readme.read_text() == "# By hand\n"


def test_before_training_the_trainers_card_is_as_ever(
    make_scored: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    make_scored(tiny_bert).create_model_card()
    assert ModelCard.load(tmp_path / "output" / "README.md").data.tags == ["generated_from_trainer"]


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_the_printed_line_shows_what_remains(
    make_scored: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    disable_tqdm: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = make_scored(tiny_bert, disable_tqdm=disable_tqdm, logging_steps=10)
    trainer.train()
    printed = "".join(capsys.readouterr())
    for row in trainer.state.log_history:
        if "loss" in row:
            line = ", ".join(rf"'{name}': '?({row[name]:.4g}|{row[name]})'?" for name in ("kept", "kept_of_all"))
            assert re.search(line, printed), printed
    assert "'kept': " in printed and "remaining" not in printed and "rank_budget" not in printed
