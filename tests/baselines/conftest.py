import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

Batch = dict[str, Tensor]


@pytest.fixture
def batches() -> list[Batch]:
    """10 examples in batches of 4, 4 and 2, some of them padded, for two classes."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in (4, 4, 2):
        mask = torch.ones(size, 9, dtype=torch.long)
        mask[0, 6:] = 0
        made.append(
            {
                "input_ids": torch.randint(1, 64, (size, 9), generator=generator) * mask,
                "attention_mask": mask,
                "labels": torch.randint(2, (size,), generator=generator),
            }
        )
    return made


@pytest.fixture
def tiny_gpt2(seed: None) -> GPT2ForSequenceClassification:
    """Its layers are `Conv1D`."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, pad_token_id=0)
    return GPT2ForSequenceClassification(config).eval()


@pytest.fixture(params=["tiny_bert", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> BertForSequenceClassification | GPT2ForSequenceClassification:
    return request.getfixturevalue(request.param)
