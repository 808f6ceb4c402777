"""The card's contents, for models and histories that no short training would give."""

import logging
import pkgutil
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.inference._generated import types
from tasks import tiny_tasks
from transformers import BertForSequenceClassification, PreTrainedModel

from rankdyna_trainer import RankDynaConfig, compact, inject_singular_groups, rank_report
from rankdyna_trainer.method.schedule import RankBudgetSchedule
from rankdyna_trainer.report.card import curve_image, model_card, ranks_image, write_card
from rankdyna_trainer.report.compression_run import CompressionRun
from rankdyna_trainer.report.generated import unmarked
from rankdyna_trainer.report.tables import compression_summary

CONFIG = RankDynaConfig(rank_ratio=0.5, factorization_cache="/of/this/machine")
RUN = CompressionRun(CONFIG, RankBudgetSchedule(2, 6, 20), initial_budget=384, final_budget=192, finished_steps=20)
TASKS = {module.name.replace("_", "-") for module in pkgutil.iter_modules(types.__path__)}


def compressed(model: PreTrainedModel, rank: int = 3) -> PreTrainedModel:
    inject_singular_groups(model, CONFIG)
    for module in model.modules():
        if hasattr(module, "set_remaining"):
            module.set_remaining(torch.arange(module.width) < rank)
    return compact(model)


@pytest.mark.parametrize(
    ("kind", "tag"),
    [
        ("bert", None),
        ("gpt2", "text-generation"),
        ("llama", "text-generation"),
        ("bart", "text-generation"),
        ("t5", "text-generation"),
    ],
)
@pytest.mark.parametrize("rank", [0, 3, 1000])
def test_every_family_has_a_card_that_reads_back(kind: str, tag: str | None, rank: int, tmp_path: Path) -> None:
    model = compressed(tiny_tasks.model(kind), rank)
    write_card(model_card(model, "small", run=RUN), tmp_path)

    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "tags": ["rankdyna", "low-rank"],
    } | ({} if tag is None else {"pipeline_tag": tag})
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    assert tag is None or tag in TASKS
    for name, row in rank_report(model).iterrows():
        shape = f"{row['out_features']} x {row['in_features']}"
        assert f"| {name} | {shape} | {row['full_rank']} | {row['rank']} | " in card.text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_sizes_and_schedule_are_those_of_the_run(tiny_bert: BertForSequenceClassification) -> None:
    model = compressed(tiny_bert)
    summary = compression_summary(model)
    text = model_card(model, "small", run=RUN, file_bytes=1000).text
    assert f"**{summary.target_ratio:.1%} of the target layers' parameters**" in text
    assert f"**{summary.all_ratio:.1%} of all parameters**" in text
    assert f"| {summary.dense_bytes(1000):,} | 1,000 | {summary.all_ratio:.3f} |" in text
    assert "| singular groups | 384 | 36 | 0.094 |" in text
    assert "| warm-up | 2 | 384 |" in text
    assert "| adjusting | 12 | falls from 384 to 192 |" in text
    assert "| cool-down | 6 | 192 |" in text
    assert "budget (groups)" in text and "The run ended" not in text


def test_without_training_nothing_is_told_of_one(tiny_bert: BertForSequenceClassification) -> None:
    tiny_bert.config._name_or_path = "google/small"
    card = model_card(compressed(tiny_bert), "small")
    assert card.data.base_model == "google/small"
    assert "base_model_relation" not in card.data and "fine-tuned" not in card.text and "warm-up" not in card.text
    assert model_card(tiny_bert, "small", run=RUN).data["base_model_relation"] == "finetune"


@pytest.mark.parametrize("base", ["", "{folder}", "/not/on/this/machine", "./models/bert", "C:\\models\\bert"])
def test_a_path_is_no_base_model(base: str, tiny_bert: BertForSequenceClassification, tmp_path: Path) -> None:
    tiny_bert.config._name_or_path = base.format(folder=tmp_path)
    card = model_card(compressed(tiny_bert), "small", run=RUN)
    assert "base_model" not in card.data.to_dict() and "base_model_relation" not in card.data
    assert "/of/this/machine" not in str(card)
    assert not base or base.format(folder=tmp_path) not in str(card)


def test_the_image_and_the_card_are_whole_or_as_they_were(
    tiny_bert: BertForSequenceClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed(tiny_bert)
    card, image = model_card(model, "first", has_image=True), ranks_image(model)
    write_card(card, tmp_path, image)
    assert (tmp_path / "ranks.png").read_bytes() == image and image.startswith(b"\x89PNG")
    assert "](ranks.png)" in (tmp_path / "README.md").read_text()

    def full_disk(self: ModelCard, path: Path) -> None:
        path.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(ModelCard, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_card(model_card(model, "second"), tmp_path)
    assert (tmp_path / "README.md").read_text() == str(card)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "ranks.png"]


def test_without_matplotlib_a_line_says_how_to_get_the_image(
    tiny_bert: BertForSequenceClassification, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = compressed(tiny_bert)
    monkeypatch.delitem(sys.modules, "rankdyna_trainer.report.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING):
        assert ranks_image(model) is None and curve_image(pd.DataFrame()) is None
    for line in (lines := [record.message for record in caplog.records]):
        assert 'pip install ".[plots]"' in line and 'pip install "rankdyna-trainer[plots]"' in line
    assert ["heatmap of the ranks" in line for line in lines] == [True, False]
    assert "ranks.png" not in model_card(model, "small").text


def test_the_sizes_of_a_run_have_a_section_beside_that_of_the_speed(tiny_bert: BertForSequenceClassification) -> None:
    model, section = compressed(tiny_bert), "## Sizes of the same run\n\n| model |\n| :-- |\n| **last** |"
    without, text = model_card(model, "small").text, model_card(model, "small", curve=section).text
    assert text.count(f"\n\n{section}\n\n## Ranks\n") == 1
    assert unmarked(text.replace(f"{section}\n\n", "")) == unmarked(without)
    both = model_card(model, "small", curve=section, speed="## Speed\n\nfast").text
    assert f"{section}\n\n## Speed\n\nfast\n\n## Ranks\n" in both


def test_the_citation_is_whole(tiny_bert: BertForSequenceClassification) -> None:
    text = model_card(compressed(tiny_bert), "small").text
    (entry,) = re.findall(r"```bibtex\n(@inproceedings\{.*\n\})\n```\n", text, re.DOTALL)
    assert entry.count("{") == entry.count("}") == 1
