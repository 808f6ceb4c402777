from pathlib import Path

import pytest
import torch
from support.damage import compacted
from transformers import BertForSequenceClassification

from rankdyna_trainer import make_self_contained


@pytest.fixture
def small(tiny_bert: BertForSequenceClassification) -> torch.nn.Module:
    return compacted(tiny_bert)


@pytest.fixture
def checkpoint(small: torch.nn.Module, tmp_path: Path) -> Path:
    small.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def self_contained(small: torch.nn.Module) -> torch.nn.Module:
    return make_self_contained(small)


@pytest.fixture
def saved(self_contained: torch.nn.Module, tmp_path: Path) -> Path:
    """A self-contained checkpoint."""
    self_contained.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"
