from pathlib import Path

import pytest
import torch
from support.damage import compacted
from transformers import BertForSequenceClassification


@pytest.fixture
def small(tiny_bert: BertForSequenceClassification) -> torch.nn.Module:
    return compacted(tiny_bert)


@pytest.fixture
def checkpoint(small: torch.nn.Module, tmp_path: Path) -> Path:
    small.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"
