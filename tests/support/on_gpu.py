"""What the tests on a GPU ask of a model and of a run."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from rankdyna_trainer import LowRankLinear, SingularGroupLinear, rank_report

# transformers has renamed the option.
CHECKPOINTING = next(
    f"{word}_checkpointing"
    for word in ("activation", "gradient")
    if f"{word}_checkpointing" in TrainingArguments.__dataclass_fields__
)


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def ranks_of(model: nn.Module) -> list[int]:
    return rank_report(model)["rank"].tolist()


def groups_elsewhere(ranks: Sequence[int], others: Sequence[int]) -> int:
    """How many groups of one model are in other layers than in another one of as many groups."""
    return sum(max(0, rank - other) for rank, other in zip(ranks, others, strict=True))


def layers_of(model: nn.Module) -> list[SingularGroupLinear]:
    return [module for module in model.modules() if isinstance(module, SingularGroupLinear)]


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights in main memory, those of low-rank layers as one matrix: whose groups may differ in their signs."""
    low_rank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    parts = {f"{name}.{part}.weight" for name in low_rank for part in "pq"}
    weights = {name: value for name, value in model.named_parameters() if name not in parts}
    weights |= {name: layer.to_dense_weight() for name, layer in low_rank.items()}
    return {name: value.detach().cpu() for name, value in weights.items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all tensors; infinite where their names or shapes differ, which is so for other ranks."""
    if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in other.items()}:
        return math.inf
    values = ((one[name].double().cpu(), other[name].double().cpu()) for name in one if one[name].numel())
    return max(float((value - expected).abs().max()) for value, expected in values)


def random_tokens(vocabulary: int, rows: int, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, vocabulary, (rows, length), generator=generator).to(device)
