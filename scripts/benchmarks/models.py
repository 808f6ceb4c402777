"""The models that are timed: dense, in singular groups, or cut to a ratio; and random batches for them."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, compact
from rankdyna_trainer.method.budget import uniform_rank

Batch = dict[str, Tensor]

# Layers, hidden size, size of the feed-forward layer, heads.
SHAPES = {"minilm": (6, 384, 1536, 12), "bert-base": (12, 768, 3072, 12), "tiny": (2, 32, 64, 4)}
# Likewise, and the size of the vocabulary.
DECODERS = {"llama-1b": (16, 2048, 5632, 16, 32000), "tiny-llama": (2, 32, 64, 4, 96)}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(name: str, seed: int) -> PreTrainedModel:
    """A classifier, or of a decoder the language model; of a shape, with random weights."""
    torch.manual_seed(seed)
    shape = tuple(map(int, name.split("x"))) if re.fullmatch(r"\d+(x\d+){3}", name) else SHAPES.get(name)
    if shape is not None:
        layers, hidden, feed_forward, heads = shape
        config = BertConfig(
            num_hidden_layers=layers, hidden_size=hidden, intermediate_size=feed_forward, num_attention_heads=heads
        )
        config.problem_type = "single_label_classification"  # else BERT sets it, and is compiled once more
        if name == "tiny":
            config.vocab_size = 96
        with DEVICE:
            return BertForSequenceClassification(config)
    if name in DECODERS:
        layers, hidden, feed_forward, heads, words = DECODERS[name]
        config = LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=feed_forward,
            num_attention_heads=heads,
            vocab_size=words,
        )
        with DEVICE:
            return LlamaForCausalLM(config)
    architectures = AutoConfig.from_pretrained(name).architectures or []
    decoder = any(each.endswith(("ForCausalLM", "LMHeadModel")) for each in architectures)
    auto: Any = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
    model: PreTrainedModel = auto.from_pretrained(name, dtype=torch.float32).to(DEVICE)
    for tensor in (*model.parameters(), *model.buffers()):
        # Else pages of the file would count as memory, those of layers that are long replaced too.
        tensor.data = tensor.data.clone()
    return model


def random_batch(model: PreTrainedModel, size: int, length: int) -> Batch:
    """Random tokens, with random labels of the kind that the model learns."""
    tokens = torch.randint(model.config.get_text_config().vocab_size, (size, length), device=DEVICE)
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    return {"input_ids": tokens, "labels": torch.randint(2, (size,), device=DEVICE) if classifies else tokens}


def truncate(model: nn.Module, config: RankDynaConfig) -> nn.Module:
    """Plain SVD: compact an injected model to the same ratio in each layer, by the singular values."""
    for layer in singular_group_layers(model):
        kept = uniform_rank(config, layer.out_features, layer.in_features)
        layer.set_remaining(torch.arange(layer.width, device=layer.remaining.device) < kept)
    return compact(model)


def singular_group_layers(model: nn.Module) -> list[SingularGroupLinear]:
    """In the model's order, which is that of the target layers."""
    return [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
