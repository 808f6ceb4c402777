"""When removed groups are cut out of the tensors: seldom, since each cut makes kernels start on new shapes."""

import logging
from collections.abc import Sequence

from torch.optim import Optimizer

from ..layers.notices import AboveProgressBars
from ..layers.singular_group import SingularGroupLinear
from .optimizer_entries import is_one_vector
from .removal import cut_groups, state_without_groups

# The part of the groups' numbers that remains when a cut is worth it.
CUT_WHEN_REMAINING = 0.75

logger = AboveProgressBars(logging.getLogger(__name__))


class GroupCutting:
    """
    Cuts removed groups out of the tensors and the optimizer's state, where that can be done.

    Args:
        optimizer: which holds the factors.
        held: whether a wrapper, or the user, holds them too: then they are never cut.
        compiled: whether the forward pass is compiled, anew after each cut: then they are cut once, at the end.
    """

    def __init__(self, optimizer: Optimizer, held: bool, compiled: bool) -> None:
        self._optimizer = optimizer
        self._held = held
        self._cut_when_remaining = 0.0 if compiled else CUT_WHEN_REMAINING
        self._state_has_groups: bool | None = None

    def cut(self, layers: Sequence[SingularGroupLinear], at_the_end: bool) -> None:
        """
        Cut all removed groups out, if it is worth it.

        Args:
            layers: all of the model.
            at_the_end: no more groups are removed after this.
        """
        threshold = 1.0 if at_the_end else self._cut_when_remaining
        held = sum(layer.width * layer.group_parameters for layer in layers)
        remaining = sum(layer.width_when_cut * layer.group_parameters for layer in layers)
        worth_it = remaining < held and remaining <= threshold * held
        if worth_it and not self._held and self.state_can_be_cut(layers):
            cut_groups([layer for layer in layers if layer.width_when_cut < layer.width], self._optimizer)

    def state_can_be_cut(self, layers: Sequence[SingularGroupLinear]) -> bool:
        """Whether the optimizer's state has the groups in dimension 0; asked for as soon as a group is removed."""
        if self._state_has_groups is None and any(layer.rank < layer.width for layer in layers):
            obstacle = state_without_groups(layers, self._optimizer)
            if self._optimizer.state is not self._optimizer.state:
                obstacle = "a view of several states"
            elif is_one_vector(self._optimizer):
                obstacle = "one vector of all parameters"
            self._state_has_groups = obstacle is None
            if obstacle is not None:
                logger.warning(
                    "Removed groups stay in the tensors, as zeros, until the model is compacted: %s keeps a state "
                    "(%s) that cannot be cut by groups. Steps get cheaper all the same, but take no less memory.",
                    type(getattr(self._optimizer, "optimizer", self._optimizer)).__name__,
                    obstacle,
                )
        return self._state_has_groups is not False
