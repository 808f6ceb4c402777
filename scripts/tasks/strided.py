"""
Perplexity on a whole text, as the literature reports it, and how near a language model is to another one there.

The text is read in windows that overlap, and a token is predicted in the first window that has it: after the first
window from at least those tokens which two windows have in common. So each token but the first of the text is counted
once. In windows that do not overlap the first token of each has nothing before it, and is not counted.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

# Of which the probabilities of all tokens are held at once, beside the logits of a window.
POSITIONS_AT_ONCE = 128


class Window(NamedTuple):
    """The tokens from `begin` to `end`, of which a model is to predict those from `first` on."""

    begin: int
    end: int
    first: int


class Nearness(NamedTuple):
    """
    What [`measure`] found, over all tokens that were predicted.

    Attributes:
        tokens: how many they are.
        perplexity: of the model: the exponential of its mean loss.
        reference_perplexity: that of the reference.
        agreement: the part of them at which both have the same most likely token.
        divergence: the mean of KL(reference || model), in nats.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    agreement: float | None = None
    divergence: float | None = None


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """
    The windows in which a text is read.

    Args:
        tokens: of the text.
        length: tokens of a window; the last one may be shorter.
        stride: tokens from the begin of a window to that of the next one, at most `length`.
    """
    predicted = 0
    for begin in itertools.count(0, stride):
        end, first = min(begin + length, tokens), max(predicted, begin + 1)
        if first < end:
            yield Window(begin, end, first)
        predicted = end
        if end == tokens:
            return


@torch.no_grad()
def measure(model: Any, ids: Tensor, length: int, stride: int, reference: Any = None) -> Nearness:
    """
    Read a text with a causal language model, and with the one that it is compared with.

    Args:
        model: that returns logits `(1, length, vocabulary)` of `input_ids` `(1, length)`, in evaluation mode.
        ids: the tokens of the text, `(tokens,)`, at least 2, on the device of the models.
        length: tokens of a window, from 2 on.
        stride: of the windows, at most `length`.
        reference: of the same vocabulary, if there is one.

    Returns:
        Only `tokens` and `perplexity` without a reference.
    """
    models = [model] if reference is None else [model, reference]
    losses, alike, divergence, tokens = [0.0 for _ in models], 0, 0.0, 0
    for window in windows(len(ids), length, stride):
        expected = ids[window.first : window.end]
        logits = [_logits(each, ids, window) for each in models]
        tokens += len(expected)
        for start in range(0, len(expected), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            ours, *theirs = (each[part].float().log_softmax(-1) for each in logits)
            for i, each in enumerate([ours, *theirs]):
                losses[i] += nll_loss(each, expected[part], reduction="sum").item()
            for each in theirs:
                alike += int((ours.argmax(-1) == each.argmax(-1)).sum())
                divergence += kl_div(ours, each, reduction="sum", log_target=True).item()
    perplexity = _exponential(losses[0] / tokens)
    if reference is None:
        return Nearness(tokens, perplexity)
    return Nearness(tokens, perplexity, _exponential(losses[1] / tokens), alike / tokens, divergence / tokens)


def _logits(model: Any, ids: Tensor, window: Window) -> Tensor:
    """What predicts the tokens from the first one on: those of the positions before."""
    logits: Tensor = model(input_ids=ids[None, window.begin : window.end]).logits[0]
    return logits[window.first - 1 - window.begin : -1]


def _exponential(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
