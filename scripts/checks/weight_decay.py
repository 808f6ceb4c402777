"""
How much weight decay leaves of the target layers' norm, by the number of steps, where all gradients are zero: of the
dense weights, of the same model in singular groups, and compacted. Needs the extra `test`.

    python scripts/checks/weight_decay.py
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lion_pytorch import Lion
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from transformers import BertConfig, BertModel

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups

LEARNING_RATE = WEIGHT_DECAY = 0.1
SETTINGS: dict[str, Any] = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}


def muon_and_adamw(parameters: Iterable[nn.Parameter]) -> list[Optimizer]:
    """Muon takes matrices alone."""
    held = list(parameters)
    matrices, others = ([p for p in held if (p.ndim == 2) == are] for are in (True, False))
    return [torch.optim.Muon(matrices, **SETTINGS), AdamW(others, **SETTINGS)]


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], list[Optimizer]]] = {
    "AdamW": lambda parameters: [AdamW(parameters, **SETTINGS)],
    "SGD": lambda parameters: [SGD(parameters, **SETTINGS)],
    "SGD, momentum": lambda parameters: [SGD(parameters, momentum=0.9, nesterov=True, **SETTINGS)],
    "Adafactor": lambda parameters: [Adafactor(parameters, **SETTINGS)],
    "Lion": lambda parameters: [Lion(parameters, **SETTINGS)],
}
if hasattr(torch.optim, "Muon"):  # which is not in the oldest PyTorch that the library takes
    OPTIMIZERS["Muon"] = muon_and_adamw


def main() -> None:
    print(f"learning rate {LEARNING_RATE}, weight decay {WEIGHT_DECAY}")
    print(f"{'':16}{'steps':>6}{'dense':>14}{'in groups':>14}{'compacted':>14}")
    for name, make in OPTIMIZERS.items():
        left = {form: remaining_norms(model, make) for form, model in forms().items()}
        for steps in (1, 10, 100):
            print(f"{name:16}{steps:6}" + "".join(f"{norms[steps]:14.6g}" for norms in left.values()))


def forms() -> dict[str, nn.Module]:
    """One model in three forms."""
    torch.manual_seed(0)
    dense = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64))
    in_groups = inject_singular_groups(copy.deepcopy(dense), RankDynaConfig(rank_ratio=0.2))
    for layer in in_groups.modules():
        if isinstance(layer, SingularGroupLinear):
            layer.set_remaining(torch.arange(layer.width) < layer.width // 5)
    return {"dense": dense, "in groups": in_groups, "compacted": compact(copy.deepcopy(in_groups))}


def remaining_norms(
    model: nn.Module, make: Callable[[Iterable[nn.Parameter]], list[Optimizer]], steps: int = 100
) -> dict[int, float]:
    """By the number of steps, what is left of the norm of the target layers' weights."""
    optimizers = make(model.parameters())
    first, left = _norm(model), {}
    for step in range(1, steps + 1):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        left[step] = _norm(model) / first
    return left


def _norm(model: nn.Module) -> float:
    layers: list[Any] = [layer.intermediate.dense for layer in model.encoder.layer]  # type: ignore[union-attr]
    weights = [layer.weight if isinstance(layer, nn.Linear) else layer.to_dense_weight() for layer in layers]
    return torch.stack([weight.detach().double().norm() for weight in weights]).norm().item()


if __name__ == "__main__":
    main()
