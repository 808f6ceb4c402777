"""A save leaves what is not its own, and a folder that it cannot write as it was."""

import socket
from pathlib import Path

import pytest
import torch
from support.damage import compacted
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from rankdyna_trainer.checkpoint.saving import save_compacted
from rankdyna_trainer.report.staging import OWNER, staging_folder


def test_saving_replaces_what_was_there_and_keeps_the_rest(
    tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    tiny_bert.save_pretrained(output, max_shard_size="20KB")
    model = compacted(tiny_bert)
    (output / "checkpoint-5").mkdir()
    (output / "model_of_mine.safetensors").write_text("mine")
    (output / "_rankdyna-abc").mkdir()  # a process was killed while it saved
    (output / "_rankdyna-abc" / "model.safetensors").write_text("half")
    (output / "_rankdyna-abc" / OWNER).write_text(f"{socket.gethostname()} {2**22 + 1}")
    (output / "_rankdyna-mine").mkdir()
    (output / "_rankdyna-mine" / "notes.txt").write_text("a folder of the user's")
    with staging_folder(output) as of_another_run:  # a second one saves into the same folder just now
        size = save_compacted(model, output)
        assert of_another_run.exists()
    assert sorted(path.name for path in output.iterdir()) == [
        "_rankdyna-mine",
        "checkpoint-5",
        "config.json",
        "model.safetensors",
        "model_of_mine.safetensors",
    ]
    assert size == (output / "model.safetensors").stat().st_size
    loaded = AutoModelForSequenceClassification.from_pretrained(output).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_failed_save_leaves_the_folder_as_it_was(
    tiny_bert: BertForSequenceClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    tiny_bert.save_pretrained(output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    model = compacted(tiny_bert)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        save_compacted(model, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_named_and_nothing_is_deleted(
    name: str, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    tiny_bert.save_pretrained(output)
    (output / name).unlink()
    (output / name).mkdir()
    (output / name / "mine.txt").write_text("mine")
    before = sorted(path.relative_to(output) for path in output.rglob("*"))
    with pytest.raises(IsADirectoryError, match=rf"{name} is a folder, and the compacted model needs a file"):
        save_compacted(compacted(tiny_bert), output)
    assert sorted(path.relative_to(output) for path in output.rglob("*")) == before
