"""The section of a card that shows what a model writes, among those of its speed and its sizes."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.damage import compacted
from tasks import tiny_tasks

from rankdyna_trainer.report.card import model_card, write_card
from rankdyna_trainer.report.card_sections import put_section, section_of
from rankdyna_trainer.report.continuations import HEADING, Continuation, add_continuations
from rankdyna_trainer.report.generated import is_unchanged
from rankdyna_trainer.report.speed import add_speed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_card(model_card(compacted(tiny_tasks.model("gpt2", layers=1)), "small"), tmp_path)
    return tmp_path


def test_texts_of_any_kind_stay_in_their_cells(folder: Path) -> None:
    rows = [Continuation("alice\n## Ranks\nsees", "a | b <unk> & `c`", "$x$ *y* [z](w) ~~v~~ \\ _u_")]
    card = add_continuations(folder, rows, "Greedily.")
    lines = section_of(card, HEADING).splitlines()
    assert lines == [
        "## Text",
        "",
        "| prompt | dense | compacted |",
        "| :-- | :-- | :-- |",
        "| alice ## Ranks sees | a \\| b &lt;unk&gt; &amp; \\`c\\` | "
        "\\$x\\$ \\*y\\* \\[z\\](w) \\~\\~v\\~\\~ \\\\ \\_u\\_ |",
        "",
        "Greedily.",
    ]
    assert card == folder / "README.md" and is_unchanged(card)


def test_what_was_said_before_is_replaced(folder: Path) -> None:
    add_continuations(folder, [Continuation("alice", "sees", "likes")], "First.")
    card = add_continuations(folder, [Continuation("bob", "left", "left")], "Second.", "start")
    text = card.read_text()
    assert text.count(HEADING) == 1 and "First." not in text and "alice" not in text
    assert "| prompt | start | compacted |\n| :-- | :-- | :-- |\n| bob | left | left |\n\nSecond.\n\n## Ranks" in text


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_the_order_of_the_sections_is_that_of_the_card(order: tuple[int, ...], folder: Path) -> None:
    add = [
        lambda: put_section(folder, "## Sizes of the same run\n\none"),
        lambda: add_speed(folder, [(1, 0.25, 0.125)], "As measured."),
        lambda: add_continuations(folder, [Continuation("alice", "sees", "likes")], "Greedily."),
    ]
    for number in order:
        add[number]()
    headings = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[:5] == ["## Size", "## Sizes of the same run", "## Speed", "## Text", "## Ranks"]
    sections = {name: section_of(folder / "README.md", f"## {name}") for name in ("Speed", "Text")}
    again = model_card(
        compacted(tiny_tasks.model("gpt2", layers=1)),
        "small",
        speed=sections["Speed"],
        text=sections["Text"],
        curve=section_of(folder / "README.md", "## Sizes of the same run"),
    )
    assert again.text == ModelCard.load(folder / "README.md").text
