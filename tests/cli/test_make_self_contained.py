import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from support.damage import fingerprint
from support.self_contained import is_self_contained
from support.training_runs import Folders
from transformers import BertForSequenceClassification

from rankdyna_trainer import make_self_contained
from rankdyna_trainer.report.card import model_card, write_card
from rankdyna_trainer.report.generated import is_unchanged


def test_it_is_as_if_the_model_had_been_saved_so(
    rankdyna: Callable[..., str], document: Callable[..., Any], folders: Folders, tmp_path: Path
) -> None:
    saved = make_self_contained(BertForSequenceClassification.from_pretrained(folders.compacted))
    saved.save_pretrained(tmp_path / "saved")
    folder = Path(shutil.copytree(folders.compacted, tmp_path / "copied"))
    found = document("make-self-contained", folder)
    assert found == {"folder": str(folder), "file": str(folder / "modeling_rankdyna.py")}
    assert is_self_contained(folder)
    assert (folder / "config.json").read_text() == (tmp_path / "saved" / "config.json").read_text()
    before = fingerprint(folder)
    rankdyna("make-self-contained", folder)
    assert fingerprint(folder) == before


def test_its_card_says_how_to_load_it_unless_a_person_changed_it(
    rankdyna: Callable[..., str], folders: Folders, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders.compacted, tmp_path / "copied"))
    model = BertForSequenceClassification.from_pretrained(folder)
    write_card(model_card(model, "mine", model_id="alice/small", file_bytes=4), folder)
    before = (folder / "README.md").read_text()
    (folder / "changed.md").write_text(before + "By hand.")
    rankdyna("make-self-contained", folder)
    expected = model_card(make_self_contained(model), "mine", model_id="alice/small", file_bytes=4)
    assert 'AutoModelForSequenceClassification.from_pretrained("alice/small", trust_remote_code=True)' in expected.text
    assert ModelCard.load(folder / "README.md").text.strip() == expected.text.strip()
    assert "trust_remote_code" not in before and is_unchanged(folder / "README.md")
    (folder / "changed.md").rename(folder / "README.md")
    rankdyna("make-self-contained", folder)
    assert (folder / "README.md").read_text() == before + "By hand."


def test_other_folders_are_refused(refusal: Callable[..., str], folders: Folders, tmp_path: Path) -> None:
    command = "make-self-contained"
    before = fingerprint(folders.training) | fingerprint(folders.dense)
    assert "makes a model of it first" in refusal(1, command, folders.training)
    assert "holds no compressed model" in refusal(1, command, folders.dense)
    assert "There is no folder alice/small" in refusal(1, command, "alice/small")
    assert fingerprint(folders.training) | fingerprint(folders.dense) == before
