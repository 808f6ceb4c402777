"""A decoder factored in the metric of its inputs, a block at a time, on a GPU and in main memory."""

import copy

import pytest
import torch
from support.on_gpu import groups_elsewhere, largest_difference, random_tokens, ranks_of, whole_weights
from transformers import LlamaConfig, LlamaForCausalLM

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.baselines import svd, whitened_svd
from rankdyna_trainer.config import RankScope

CONFIG = RankDynaConfig(param_ratio=0.5)


@pytest.fixture
def llama(seed: None) -> LlamaForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).double().eval()


@pytest.mark.parametrize("scope", ["local", "global"])
def test_whitened_as_on_the_cpu(llama: LlamaForCausalLM, device: torch.device, scope: RankScope) -> None:
    tokens = random_tokens(64, 32, 16, torch.device("cpu"))
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in tokens.split(8)]
    expected, found = llama, copy.deepcopy(llama).to(device)
    for model in (expected, found):
        whitened_svd(model, CONFIG, batches, scope)
    assert {parameter.device.type for parameter in found.parameters()} == {device.type}
    if scope == "local":
        # The moments of the inputs are sums of float32 products.
        difference = largest_difference(whole_weights(found), whole_weights(expected))
        assert difference < 1e-4, f"the weights differ by {difference}"
    ranks, others = ranks_of(found), ranks_of(expected)
    assert groups_elsewhere(ranks, others) <= (2 if scope == "global" else 0), f"{ranks} on the GPU, {others}"


def test_svd_as_on_the_cpu(llama: LlamaForCausalLM, device: torch.device) -> None:
    expected, found = llama, copy.deepcopy(llama).to(device)
    for model in (expected, found):
        svd(model, CONFIG)
    difference = largest_difference(whole_weights(found), whole_weights(expected))
    assert difference < 1e-9, f"the weights differ by {difference}"
