"""What a run should be told while there is time to stop it: that it removes groups too early, or a whole block."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.architecture import block_prefixes
from ..layers.hooks import Hook
from ..layers.singular_group import SingularGroupLinear
from .model_outputs import loss_of

# A loss that fell by less than this part of itself is where it began: batches alone differ by as much.
FALL = 0.05
# How many batches tell where a loss is.
BATCHES = 10

logger = logging.getLogger(__name__)


class LossWatch:
    """
    Remembers where the training loss of a model began, and where it is.

    Args:
        model: in training, which returns its loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self._losses: list[Tensor] = []
        self._handle = model.register_forward_hook(Hook(self._note))

    def warn_if_flat(self, step: int) -> None:
        """
        Warn if the loss has not fallen, at the step at which the first groups are removed. It is the last call.

        Args:
            step: the number of finished optimizer steps.
        """
        self._handle.remove()
        if len(self._losses) < 2 * BATCHES:  # too short a run to tell
            return
        first, last = (
            torch.stack(losses).mean().item() for losses in (self._losses[:BATCHES], self._losses[BATCHES:])
        )
        if last > (1 - FALL) * first:
            logger.warning(
                "At step %d the first singular groups are removed, but the training loss is %.4g, and it began at "
                "%.4g: what is not learnt yet is hard to learn in a smaller model. Set a longer rank_warmup_steps, "
                "train for more steps, start from a fine-tuned model, or give a teacher.",
                step,
                last,
                first,
            )

    def _note(self, model: nn.Module, inputs: Any, output: Any) -> None:
        loss = loss_of(output) if model.training else None
        if loss is not None:
            self._losses.append(loss.detach().float().reshape(()))
            del self._losses[BATCHES:-BATCHES]


class BlockWatch:
    """
    Tells when the last group of a whole block is removed.

    Args:
        model: whose blocks are watched.
        layers: its layers of singular groups, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SingularGroupLinear]) -> None:
        self._blocks: dict[str, list[SingularGroupLinear]] = {}
        prefixes = block_prefixes(model)
        for name, layer in layers.items():
            for prefix in prefixes:
                if name.startswith(prefix):
                    block = prefix + name.removeprefix(prefix).partition(".")[0]
                    self._blocks.setdefault(block, []).append(layer)
        self._blocks = {block: inside for block, inside in self._blocks.items() if any(layer.rank for layer in inside)}

    def warn_of_empty(self, step: int) -> None:
        """
        Warn once of each block that has become empty.

        Args:
            step: the number of finished optimizer steps.
        """
        empty = [block for block, inside in self._blocks.items() if not any(layer.rank for layer in inside)]
        if empty:
            logger.warning(
                "At step %d no singular group is left in %s: what enters a block now leaves it almost unchanged. If "
                "the score is lost as well, set a longer rank_warmup_steps, give a teacher, or set "
                'rank_scope="local".',
                step,
                ", ".join(empty),
            )
        for block in empty:
            del self._blocks[block]
