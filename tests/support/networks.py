"""Small networks of blocks, and what is asked of them."""

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
)

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear
from rankdyna_trainer.layers.targets import find_targets

BERT_MATRICES = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]


class Block(nn.Module):
    def __init__(self, proj: nn.Module | None = None) -> None:
        super().__init__()
        self.proj = proj or nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.proj(x))


class Network(nn.Module):
    """A stack of blocks, and a head that is in none."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class FalconLinear(nn.Linear):
    """The function of `nn.Linear` in other words, as in transformers' Falcon."""

    def forward(self, input: Tensor) -> Tensor:
        hidden_states = input @ self.weight.T
        return hidden_states if self.bias is None else hidden_states + self.bias


def targets(model: nn.Module, **choices: object) -> list[str]:
    return list(find_targets(model, RankDynaConfig(rank_ratio=0.5, **choices)))  # type: ignore[arg-type]


def singular_groups(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SingularGroupLinear)]


def relative_change(before: Tensor, after: Tensor) -> float:
    return ((after - before).norm() / before.norm()).item()


def make_albert() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    return AlbertForSequenceClassification(AlbertConfig(vocab_size=64, num_attention_heads=2, **sizes)).eval()


def make_gpt2(**options: object) -> GPT2Config:
    return GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)


def damaged(value: float) -> Network:
    model = Network(Block(), Block(), Block())
    model.blocks[1].proj.weight.data[3, 4] = value
    return model


def model_of(**parts: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def names(model: nn.Module, modules: set[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if module in modules}


def layers_of(model: nn.Module) -> list[SingularGroupLinear]:
    return [module for module in model.modules() if isinstance(module, SingularGroupLinear)]


def small_bert() -> BertForSequenceClassification:
    torch.manual_seed(1)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
    )
