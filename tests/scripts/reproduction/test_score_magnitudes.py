"""Against the whole Hessian, and the gradients of each example, of a tiny BERT in float64."""

import copy
from typing import Any

import pytest
import torch
from reproduction.score_magnitudes import score_magnitudes
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification

from rankdyna_trainer import RankDynaConfig, inject_singular_groups
from rankdyna_trainer.method.hessian import random_signs

NAMES = ("first_order", "second_order", "fisher")


def make(dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=8,
        initializer_range=0.5,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config).double()


def make_batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(16, (5, 6), generator=generator), "labels": torch.tensor([0, 1, 1, 0, 1])}
        for _ in range(count)
    ]


def brute_force(model: Any, batch: dict[str, Tensor], step: int) -> list[float]:
    factors = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("u", "sigma", "v")}
    theta = torch.cat([factor.detach().flatten() for factor in factors.values()])
    signs = torch.cat([part.flatten() for part in random_signs(factors.values(), step)])

    def loss(flat: Tensor, rows: slice = slice(None)) -> Tensor:
        parts = flat.split([factor.numel() for factor in factors.values()])
        given = {name: part.view_as(f) for part, (name, f) in zip(parts, factors.items(), strict=True)}
        inputs = {name: tensor[rows] for name, tensor in batch.items()}
        return functional_call(model, given, kwargs=inputs).loss

    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.functional.jacobian(loss, theta)
        hessian = torch.autograd.functional.hessian(loss, theta)
        examples = [
            torch.autograd.functional.jacobian(lambda flat, i=i: loss(flat, slice(i, i + 1)), theta) for i in range(5)
        ]
    diagonal = signs * (hessian @ signs)
    values = (theta * gradient).abs(), (theta**2 * diagonal / 2).abs(), torch.stack(examples).square().mean(0)
    return [float(value.mean()) for value in values]


def test_means_over_numbers_and_batches() -> None:
    model, batches = make(), make_batches(4)
    plain = inject_singular_groups(copy.deepcopy(model), RankDynaConfig(rank_ratio=1.0)).train()
    found = score_magnitudes(model, iter(batches), 3, learning_rate=0)
    expected = torch.tensor([brute_force(plain, batch, step) for step, batch in enumerate(batches[:3])])
    assert (expected > 1e-8).all()
    assert list(found) == [*NAMES, *(f"{name}_std" for name in NAMES)]
    torch.testing.assert_close(torch.tensor([found[name] for name in NAMES]), expected.mean(0))
    deviations = torch.tensor([found[f"{name}_std"] for name in NAMES])
    torch.testing.assert_close(deviations, expected.std(0, correction=0), rtol=1e-4, atol=0)
    assert all(torch.equal(p, other) for p, other in zip(model.parameters(), plain.parameters(), strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_training_goes_on_in_training_mode() -> None:
    model, batches = make(dropout=0.1).eval(), make_batches(2)
    before = copy.deepcopy(model.state_dict())
    score_magnitudes(model, batches, 2)
    assert model.training
    changes = (model.state_dict()["classifier.weight"] - before["classifier.weight"]).abs()
    assert 1e-5 < changes.max() < 2.1e-4


def test_too_few_batches() -> None:
    with pytest.raises(ValueError, match=r"Table 4 is over 3 batches, and there are 2\."):
        score_magnitudes(make(), make_batches(2), 3)
