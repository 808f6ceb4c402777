"""`generate` with a compacted model, and a cache of fixed size."""

from typing import Any

import pytest
import torch
from support.damage import compacted
from support.on_gpu import random_tokens
from transformers import LlamaConfig, LlamaForCausalLM

from rankdyna_trainer import rank_report


def language_model(device: torch.device) -> LlamaForCausalLM:
    """With ranks of every form, 0 among them."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, max_position_embeddings=64, initializer_range=0.2, **sizes)
    model: Any = compacted(LlamaForCausalLM(config)).to(device).eval()
    assert 0 in rank_report(model)["rank"].tolist()
    return model


@pytest.mark.parametrize("compiled", [False, True])
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(
    device: torch.device, fresh_dynamo: None, compiled: bool
) -> None:
    """transformers compiles the model by itself for such a cache, unless it is told not to."""
    model = language_model(device)
    tokens = random_tokens(64, 2, 8, device)
    settings: dict[str, Any] = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12, "pad_token_id": 0}
    settings |= {"attention_mask": torch.ones_like(tokens), "return_dict_in_generate": True, "output_logits": True}
    dynamic = model.generate(tokens, **settings)
    static = model.generate(tokens, **settings, cache_implementation="static", disable_compile=not compiled)
    logits, expected = torch.stack(static.logits), torch.stack(dynamic.logits)
    difference = float((logits - expected).abs().max())
    assert torch.equal(static.sequences, dynamic.sequences), f"other tokens; the logits differ by {difference}"
    assert difference < 1e-4, f"the logits differ by {difference}"
