"""What is compressed in a case of the fuzz: a random model, spoilt in some way, and batches for it."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups

Batch = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class Subject(NamedTuple):
    """
    A model to compress.

    Attributes:
        kind: of its architecture.
        model: which returns its loss and logits by name.
        batch: makes a batch of random rows; only numbers that are not whole are of the model's dtype.
        notes: what was done to it.
    """

    kind: str
    model: nn.Module
    batch: Callable[[], Batch]
    notes: list[str]


def cast(subject: Subject, dtype: str) -> Subject:
    """The model, and its batches, in another dtype."""

    def batch() -> Batch:
        rows = subject.batch()
        return {k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in rows.items()}

    for parameter in subject.model.parameters():  # but no buffers, such as rotary angles, which are not saved
        parameter.data = parameter.data.to(DTYPES[dtype])
    return Subject(subject.kind, subject.model, batch, [*subject.notes, dtype])


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """All dense ones, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


@torch.no_grad()
def spoil(draw: random.Random, subject: Subject) -> None:
    """Give some layers odd weights, tie some to others, freeze some."""
    for name, layer in linear_layers(subject.model).items():
        if draw.random() < 0.2:
            spoiling = draw.choice([*SPOILINGS])
            layer.weight.copy_(SPOILINGS[spoiling](layer.weight.detach()))
            subject.notes.append(f"{name}: {spoiling}")
        elif draw.random() < 0.04:
            layer.weight.requires_grad_(False)
            subject.notes.append(f"{name}: frozen")
        elif draw.random() < 0.03 and layer.bias is not None:
            layer.bias.requires_grad_(False)
            subject.notes.append(f"{name}: frozen bias")


def _of_rank_one(weight: Tensor) -> Tensor:
    return weight[:, :1] @ weight[:1] / weight.norm().clamp(min=1e-3)


def _orthogonal(weight: Tensor) -> Tensor:
    return torch.eye(*weight.shape)


SPOILINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "rank 1": _of_rank_one,
    "equal singular values": _orthogonal,
    "constant": lambda weight: torch.full_like(weight, 0.1),
    "one row": lambda weight: torch.cat([weight[:1], torch.zeros_like(weight[1:])]),
    "repeated rows": lambda weight: weight[:1].expand_as(weight),
    "small": lambda weight: weight * 1e-4,
}


def compacted_before(draw: random.Random, subject: Subject) -> None:
    """Compact the model to random ranks, so that the run is its second."""
    inject_singular_groups(subject.model, RankDynaConfig(rank_ratio=0.5, target_modules="all-linear"))
    for module in subject.model.modules():
        if isinstance(module, SingularGroupLinear):
            rank = draw.choice([0, 1, module.full_rank // 2, module.full_rank - 1, module.full_rank])
            module.set_remaining(torch.arange(module.width) < rank)
    compact(subject.model)
    subject.notes.append("compacted before")
