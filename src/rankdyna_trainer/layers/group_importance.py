"""The scores with which the groups of compacted layers came out of a run, kept with the layers."""

import torch
from torch import Tensor, nn

from .dense import kept_dense_rank
from .low_rank import LowRankLinear
from .rank_record import saved_name

# No buffer: it would be cast with the model, and is no part of what the model computes.
_IMPORTANCE = "_rankdyna_importance"


def compacted_rank(layer: nn.Module) -> int | None:
    """The rank of a layer that [`compact`] has made, low-rank or kept dense; `None` for any other module."""
    return layer.rank if isinstance(layer, LowRankLinear) else kept_dense_rank(layer)


@torch.no_grad()
def note_importance(layer: nn.Module, importance: Tensor) -> None:
    """
    Keep the scores of its groups with a layer.

    Args:
        layer: compacted.
        importance: `(rank,)`, in the order of the columns of P. Those of a layer that is kept dense belong to no
            columns.
    """
    setattr(layer, _IMPORTANCE, importance.detach().to("cpu", torch.float32))


def noted_importance(model: nn.Module) -> dict[str, Tensor]:
    """
    The scores of all compacted layers of a model.

    Returns:
        `(rank,)` in float32 by name, as `config.json` has it; empty if a layer has none, or all are zero: no step has
        scored the groups.
    """
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if (rank := compacted_rank(layer)) is not None:
            scores = getattr(layer, _IMPORTANCE, None)
            if not isinstance(scores, Tensor) or len(scores) != rank:
                return {}
            found[saved_name(name)] = scores
    return found if any(scores.any() for scores in found.values()) else {}
