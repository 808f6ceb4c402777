"""A tiny model in float64 with its whole Hessian."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from rankdyna_trainer import RankDynaConfig, inject_singular_groups
from rankdyna_trainer.method import hessian


class Attention(nn.Module):
    """Two layers with attention and dropout between them; it returns the loss as the settings say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(4, 2), nn.Linear(2, 3), nn.Dropout(0.5)
        self.form = "mapping"

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(self.first(x)).unsqueeze(1)
        x = self.dropout(F.scaled_dot_product_attention(x, 2 * x, x).squeeze(1))
        loss = torch.tanh(self.second(x)).square().mean()
        return {"mapping": {"loss": loss}, "tuple": (loss, x), "tensor": loss, "none": {"logits": x}}[self.form]


def make_attention(dropout: float = 0.0) -> Attention:
    model = Attention().double()
    model.dropout.p = dropout
    inject_singular_groups(model, RankDynaConfig(rank_ratio=1.0, target_modules="all-linear"))
    return model


def factors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("u", "sigma", "v")}


def whole_hessian(model: nn.Module, **inputs: Tensor) -> tuple[list[str], Tensor]:
    """All second derivatives by the numbers of the factors `(numbers, numbers)`, by the model alone."""
    model = copy.deepcopy(model)
    factors = factors_of(model)
    sizes = [factor.numel() for factor in factors.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        given = {name: part.view_as(f) for part, (name, f) in zip(parts, factors.items(), strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional_call(model, given, kwargs=inputs)["loss"]

    flat = torch.cat([factor.detach().flatten() for factor in factors.values()])
    return list(factors), torch.autograd.functional.hessian(loss, flat)


def flatten(diagonals: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([values.flatten() for diagonal in diagonals for values in diagonal.values()])


def use_signs(monkeypatch: pytest.MonkeyPatch, flat: Tensor) -> None:
    def signs(tensors: list[Tensor], seed: int) -> list[Tensor]:
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    monkeypatch.setattr(hessian, "random_signs", signs)


def hadamard(size: int) -> Tensor:
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows[:, :size]
