"""A card or a picture of ours is replaced by the next one; what a person wrote, or changed, is kept."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.damage import compacted
from transformers import BertForSequenceClassification

from rankdyna_trainer.report.card import model_card, ranks_image, write_card
from rankdyna_trainer.report.generated import is_unchanged, marked

BY_PERSONS = [
    "",
    "# My model\n\nWith rankdyna.\n",
    "---\ntags:\n- bert\n---\n",
    "---\n- broken: [yaml\n---\n",
    "---\ntags:\n- bert\n---\n\nWhat I tried:\n\n- rankdyna\n- generated_from_trainer\n",
    "- rankdyna\n- svd\n",
    "---\ntags:\n- generated_from_trainer\n---\n\nProofread, and completed by hand.\n",
    "---\ntags:\n  - rankdyna\n---\n",
]


@pytest.fixture
def card(tiny_bert: BertForSequenceClassification) -> ModelCard:
    return model_card(compacted(tiny_bert), "new", has_image=True)


@pytest.mark.parametrize("text", BY_PERSONS)
def test_what_a_person_wrote_is_kept(
    text: str, card: ModelCard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_text(text)
    assert write_card(card, tmp_path) == tmp_path / "README.rankdyna.md"
    assert (tmp_path / "README.md").read_text() == text
    assert "README.md was written or changed by hand, and is kept: the new one is README.rankdyna.md" in caplog.text
    write_card(card, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "README.rankdyna.md"]


def test_a_card_that_nobody_changed_is_replaced(card: ModelCard, tmp_path: Path) -> None:
    first = write_card(card, tmp_path)
    first.write_bytes(first.read_bytes().replace(b"\n", b"\r\n"))  # git on another system
    assert is_unchanged(first)
    card.text = card.text.replace("# new", "# newer")
    assert write_card(card, tmp_path) == first == tmp_path / "README.md"
    assert "# newer" in first.read_text() and [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert ModelCard.load(first).data.tags == ["rankdyna", "low-rank"]


@pytest.mark.parametrize("edit", [("# new", "# New"), ("- low-rank", "- low-rank\n- mine"), ("<!-- Written", "<!--")])
def test_a_card_that_a_person_changed_is_kept(edit: tuple[str, str], card: ModelCard, tmp_path: Path) -> None:
    first = write_card(card, tmp_path)
    changed = first.read_text().replace(*edit)
    assert changed != first.read_text()
    first.write_text(changed)
    second = write_card(card, tmp_path)
    second.write_text(second.read_text() + "\nMine as well.\n")
    assert write_card(card, tmp_path).name == "README.rankdyna-2.md"
    assert first.read_text() == changed and second.read_text().endswith("Mine as well.\n")


def test_a_mark_is_renewed() -> None:
    assert marked(marked("text")) == marked("text") != marked("texts")


@pytest.mark.parametrize("kind", ["folder", "link to nowhere", "link in a circle", "link to a file"])
@pytest.mark.parametrize("name", ["README.md", "ranks.png"])
def test_what_is_no_file_is_left_alone(
    kind: str, name: str, card: ModelCard, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    path, elsewhere = tmp_path / "saved" / name, tmp_path / "elsewhere"
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "link in a circle" else elsewhere)
    if kind == "link to a file":
        elsewhere.write_text(marked("generated"))
    image = ranks_image(compacted(tiny_bert))
    assert image is not None
    written = write_card(card, path.parent, image)
    assert path.is_dir() if kind == "folder" else path.is_symlink()
    assert elsewhere.exists() is (kind == "link to a file")
    beside = "README.rankdyna.md" if name == "README.md" else "ranks.rankdyna.png"
    assert (path.parent / beside).is_file()
    assert f"]({beside if name == 'ranks.png' else 'ranks.png'})" in written.read_text()


def test_a_picture_of_the_users_is_kept(
    card: ModelCard, tiny_bert: BertForSequenceClassification, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = ranks_image(compacted(tiny_bert))
    assert image is not None
    (tmp_path / "ranks.png").write_bytes(b"mine")
    written = write_card(card, tmp_path, image)
    assert (tmp_path / "ranks.png").read_bytes() == b"mine" and "](ranks.rankdyna.png)" in written.read_text()
    assert "ranks.png was written or changed by hand" in caplog.text
    (tmp_path / "ranks.png").unlink()
    write_card(card, tmp_path, image)
    write_card(card, tmp_path, image)
    names = ["README.md", "ranks.png", "ranks.rankdyna.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
