"""The code in the README runs as it is written."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from rankdyna_trainer import LowRankLinear

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


class LocalHub:
    """Takes a push into a folder, in the place of the Hub."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=f"user/{repo_id}")

    def upload_folder(self, *, folder_path: str, ignore_patterns: list[str], **_: Any) -> None:
        for file in Path(folder_path).iterdir():
            if file.is_file() and not any(file.match(pattern) for pattern in ignore_patterns):
                (self.folder / file.name).write_bytes(file.read_bytes())


def test_code_blocks(
    make_trainer: Callable[..., Trainer],
    tiny_bert: BertForSequenceClassification,
    rows: list[dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = tmp_path / "user" / "model"
    hub.mkdir(parents=True)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: LocalHub(hub))
    monkeypatch.chdir(tmp_path)
    args: TrainingArguments = make_trainer(tiny_bert).args
    names: dict[str, Any] = {"Trainer": Trainer, "model": tiny_bert, "args": args, "train": rows, "validation": rows}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    loaded, trained = names["model"], names["trainer"].model
    assert loaded is not trained and any(isinstance(module, LowRankLinear) for module in loaded.modules())
    inputs = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, trained.eval()(inputs).logits)
