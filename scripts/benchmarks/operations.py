"""How many multiply-adds a forward pass takes: counted in the dense model, and promised at lower ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.layers.targets import find_targets

from .models import Batch

Cost: TypeAlias = Callable[[int, int, int, int], int]


def in_factors(rank: int, rows: int, out: int, into: int) -> int:
    """Multiply-adds of a layer on so many vectors, through P and Q."""
    return rows * rank * (out + into)


def in_training(rank: int, rows: int, out: int, into: int) -> int:
    """Likewise, or through the rebuilt weight where that is cheaper."""
    return min(in_factors(rank, rows, out, into), (rank + rows) * out * into)


def compacted(rank: int, rows: int, out: int, into: int) -> int:
    """Likewise, or through the dense weight that a compacted layer keeps where that is smaller."""
    return rows * min(rank * (out + into), out * into)


@dataclass(frozen=True)
class Workload:
    """
    Multiply-adds of a forward pass on a batch, embeddings aside.

    Args:
        layers: of each target layer how many vectors it gets, and its output and input size.
        rest: multiply-adds of all other products, attention included.
    """

    layers: list[tuple[int, int, int]]
    rest: int

    @property
    def dense(self) -> int:
        """Of the dense target layers."""
        return sum(rows * out * into for rows, out, into in self.layers)

    def of_targets(self, cost: Cost, ranks: Iterable[int]) -> int:
        """Of the target layers at these ranks."""
        return sum(cost(rank, *layer) for rank, layer in zip(ranks, self.layers, strict=True))


@torch.no_grad()
def count_operations(model: PreTrainedModel, config: RankDynaConfig, batch: Batch) -> Workload:
    """Of the dense model, by running it once."""
    calls: dict[nn.Module, tuple[int, int, int]] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        into = inputs[0].shape[-1]
        before = calls[layer][0] if layer in calls else 0
        calls[layer] = (before + inputs[0].numel() // into, output.shape[-1], into)

    targets = list(find_targets(model, config).values())
    hooks = [layer.register_forward_hook(note) for layer in targets]
    # The fused attention of a CPU is not among the operations that torch counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)
    for hook in hooks:
        hook.remove()
    layers = [calls[layer] for layer in targets]
    return Workload(layers, counter.get_total_flops() // 2 - Workload(layers, 0).dense)
