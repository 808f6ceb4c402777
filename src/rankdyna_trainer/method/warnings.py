"""What a run should be told while there is time to stop it: that it removes groups too early, or a whole block."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..layers.architecture import names_by_block
from ..layers.notices import AboveProgressBars
from ..layers.singular_group import SingularGroupLinear
from .budget import RankBudget

# A loss that fell by less than this part of itself is where it began: batches alone differ by as much.
FALL = 0.05
# How many batches tell where a loss is.
BATCHES = 10

logger = AboveProgressBars(logging.getLogger(__name__))


class LossWatch:
    """Remembers where the training loss of a run began, and where it is."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    def note(self, loss: Tensor) -> None:
        """Note the loss of the next batch, `()`."""
        self._losses.append(loss)
        del self._losses[BATCHES:-BATCHES]

    def warn_if_flat(self, step: int, warmup_steps: int) -> None:
        """
        Warn if the loss has not fallen, before the first groups are removed.

        Args:
            step: the number of finished optimizer steps.
            warmup_steps: after how many the first groups are removed.
        """
        if len(self._losses) < 2 * BATCHES:  # too short a run to tell
            return
        first, last = (
            torch.stack([loss.cpu() for loss in losses]).mean().item()
            for losses in (self._losses[:BATCHES], self._losses[BATCHES:])
        )
        if last > (1 - FALL) * first:
            logger.warning(
                "From step %d on singular groups are removed, but at step %d the training loss is %.4g, and it began "
                "at %.4g: what is not learnt yet is hard to learn in a smaller model. Set a longer rank_warmup_steps, "
                "train for more steps, start from a fine-tuned model, or give a teacher.",
                warmup_steps,
                step,
                last,
                first,
            )


def warn_if_little_is_left(budget: RankBudget, ranks: Sequence[int]) -> None:
    """
    Warn if a run ends with less than half of what its budget allows, since larger pieces did not fit into the rest.

    Args:
        budget: of the run.
        ranks: of the layers at its end.
    """
    if (kept := budget.cost(ranks)) < budget.final / 2:
        logger.warning(
            "Only %d of the %d that the budget allows are left: the groups of other layers, or so many of them as "
            "rank_multiple_of asks for, are larger than the rest. Give a larger ratio, or a smaller rank_multiple_of.",
            kept,
            budget.final,
        )


class BlockWatch:
    """
    Tells when the last group of a whole block is removed.

    Args:
        model: whose blocks are watched.
        layers: its layers of singular groups, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SingularGroupLinear]) -> None:
        found = {block: [layers[name] for name in names] for block, names in names_by_block(model, layers).items()}
        self._blocks = {block: inside for block, inside in found.items() if any(layer.rank for layer in inside)}

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
