import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random weights are the same in each run, and in each test by itself."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_bert(seed: None) -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)).eval()
