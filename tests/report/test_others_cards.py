"""What a card takes over from others: licence and language of the base model, sections of the Trainer's card."""

from pathlib import Path
from typing import Any

import pytest
from transformers import BertForSequenceClassification

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.baselines import svd
from rankdyna_trainer.report.card import model_card
from rankdyna_trainer.report.others_cards import around_introduction, passed_on

CARD = """---
license: other
license_name: mine
license_link: LICENSE
language: [en, de]
tags: [bert]
---
# Base
"""
EXPECTED = {"license": "other", "license_name": "mine", "license_link": "LICENSE", "language": ["en", "de"]}


@pytest.mark.parametrize(
    ("text", "expected"), [(CARD, EXPECTED), ("# no metadata", {}), ("---\n- a: [\n---\n", {}), (None, {})]
)
def test_of_a_folder(
    tiny_bert: BertForSequenceClassification, tmp_path: Path, text: str | None, expected: dict[str, Any]
) -> None:
    tiny_bert.config._name_or_path = str(tmp_path)
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert passed_on(tiny_bert) == expected


def test_of_the_cache_of_the_hub(
    tiny_bert: BertForSequenceClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--alice--base" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(CARD)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    tiny_bert.config._name_or_path = "alice/base"
    assert passed_on(tiny_bert) == EXPECTED
    for name in ("alice/other", "no name at all", ""):
        tiny_bert.config._name_or_path = name
        assert passed_on(tiny_bert) == {}


def test_they_are_on_the_card_unless_it_has_its_own(tiny_bert: BertForSequenceClassification, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    tiny_bert.config._name_or_path = str(tmp_path)
    model = svd(tiny_bert, RankDynaConfig(rank_ratio=0.5))
    data = model_card(model, "small").data.to_dict()
    assert EXPECTED.items() <= data.items() and "bert" not in data["tags"]
    data = model_card(model, "small", trainer_card="---\nlicense: mit\n---\n# small\n").data.to_dict()
    assert data["license"] == "mit" and data["language"] == ["en", "de"]


def test_sections_that_say_nothing_are_left_out() -> None:
    empty, said = "## Model description\n\nMore information needed\n\n", "## Training\n\n### Numbers\n\n1"
    assert around_introduction(f"# t\n\nIntroduction.\n\n{empty}{said}\n") == ("", said)
    assert around_introduction("text") == ("", "")
