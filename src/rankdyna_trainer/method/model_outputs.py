"""What a model of `transformers` returns and is given, as far as a teacher's loss needs it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output, or `None`."""
    found = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
    return found if isinstance(found, Tensor) and found.numel() == 1 and found.requires_grad else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """The output with another loss."""
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output


def logits_of(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """All logits in a model's output: a question's answer has two, of its start and of its end."""
    return {name: value for name, value in output.items() if name.endswith("logits") and isinstance(value, Tensor)}


def same_logits(output: Any, taught: Mapping[str, Any]) -> dict[str, Tensor]:
    """
    The logits of a model's output by the names that its teacher's have.

    Args:
        output: with a loss; a tuple has no names, but the order of the teacher's.
        taught: the teacher's output, with or without a loss.
    """
    if isinstance(output, tuple):
        output = dict(zip(["loss", *(name for name in taught if name != "loss")], output, strict=False))
    return {name: output[name] for name in logits_of(taught)}


def first_tensor(output: Any) -> Tensor:
    """The hidden state that a block returns, alone or before others."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def rows_with_labels(named: Mapping[str, Any], of_next_token: bool) -> Tensor | None:
    """
    Where a model's own loss counts a row of its logits: labels are -100 elsewhere.

    Args:
        named: the arguments that the model was called with.
        of_next_token: whether a row of the logits is for the label that stands after it.

    Returns:
        Of the shape of the labels; `None` where each row counts.
    """
    shifted, labels = named.get("shift_labels"), named.get("labels")
    if isinstance(shifted, Tensor):
        return shifted.ne(-100)
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    rows = labels.ne(-100)
    if of_next_token and rows.ndim == 2:
        rows = torch.cat([rows[:, 1:], torch.zeros_like(rows[:, :1])], dim=1)
    return rows


def rows_without_padding(named: Mapping[str, Any], state: Tensor, in_decoder: bool) -> Tensor | None:
    """
    Which tokens of a hidden state are no padding.

    Args:
        named: the arguments that the model was called with.
        state: `(..., features)`.
        in_decoder: whether it is one of the decoder of an encoder-decoder, of which the labels tell the tokens.

    Returns:
        Of the shape of the state without features; `None` where nothing tells, or all are tokens.
    """
    mask = named.get("decoder_attention_mask" if in_decoder else "attention_mask")
    if in_decoder and mask is None and isinstance(labels := named.get("labels"), Tensor):
        mask = labels.ne(-100)
    if not isinstance(mask, Tensor):
        return None
    mask = mask.flatten(0, -2) if mask.ndim > state.ndim - 1 else mask  # several answers to one question
    return mask.bool() if mask.shape == state.shape[:-1] else None
