"""scripts/tasks/strided.py against a computation of one token after another, in NumPy."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tasks import strided, tiny_tasks
from tasks.strided import Window, measure, windows


def slow(model: Any, reference: Any, ids: list[int], length: int, stride: int) -> tuple[float, ...]:
    """Each token from the context that it has in the first window that holds it, by the definitions."""
    losses: list[list[float]] = [[], []]
    alike, divergences = [], []
    for token in range(1, len(ids)):
        begin = 0
        while begin + length <= token:
            begin += stride
        if begin == token:
            continue
        probabilities = []
        for each, found in zip((model, reference), losses, strict=True):
            with torch.no_grad():
                logits = each(input_ids=torch.tensor([ids[begin:token]])).logits[0, -1].double().numpy()
            probabilities.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
            found.append(-math.log(probabilities[-1][ids[token]]))
        ours, theirs = probabilities
        alike.append(np.argmax(ours) == np.argmax(theirs))
        divergences.append(sum(p * math.log(p / q) for p, q in zip(theirs, ours, strict=True)))
    means = [sum(found) / len(found) for found in losses]
    return len(alike), math.exp(means[0]), math.exp(means[1]), sum(alike) / len(alike), np.mean(divergences)


@torch.no_grad()
def shake(model: Any, by: float, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("tokens", "length", "stride"), [(31, 8, 3), (31, 8, 8), (33, 8, 8), (16, 8, 4), (5, 8, 4)])
def test_one_token_after_another(
    kind: str, tokens: int, length: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strided, "POSITIONS_AT_ONCE", 3)
    model, generator = tiny_tasks.model(kind).eval(), torch.Generator().manual_seed(tokens)
    shake(model, 0.3, generator)
    reference = copy.deepcopy(model)
    shake(reference, 0.07, generator)
    ids = torch.randint(4, len(tiny_tasks.WORDS), (tokens,), generator=generator)
    expected = slow(model, reference, ids.tolist(), length, stride)
    found = measure(model, ids, length, stride, reference)
    assert found == pytest.approx(expected, rel=1e-4)
    assert measure(model, ids, length, stride) == (*found[:2], None, None, None)
    if tokens > length:
        assert 0 < found.agreement < 1 and found.divergence > 0.01


def test_a_model_beside_itself() -> None:
    model = tiny_tasks.model("gpt2").eval()
    found = measure(model, torch.arange(20), 8, 4, model)
    assert found.agreement == 1 and found.divergence == 0 and found.perplexity == found.reference_perplexity
    assert found.tokens == 19


def test_each_token_is_predicted_once_from_enough_of_them() -> None:
    for tokens in range(2, 30):
        for length in range(2, 9):
            for stride in range(1, length + 1):
                read = [*windows(tokens, length, stride)]
                predicted = [token for window in read for token in range(window.first, window.end)]
                begins = {*range(0, tokens, stride)} if stride == length else {0}
                assert predicted == [token for token in range(tokens) if token not in begins]
                for window in read:
                    assert window.end - window.begin <= length
                    assert window.begin == 0 or window.first - window.begin >= max(length - stride, 1)
    assert [*windows(10, 4, 3)] == [Window(0, 4, 1), Window(3, 7, 4), Window(6, 10, 7)]


def test_a_loss_beyond_all_numbers() -> None:
    hopeless = torch.zeros(1, 4, 3)
    hopeless[..., 0] = 1e4
    found = measure(lambda input_ids: SimpleNamespace(logits=hopeless), torch.tensor([0, 1, 2, 1]), 4, 2)
    assert found.perplexity == math.inf
