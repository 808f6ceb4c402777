"""The budget of parameters, which the paper does not have, beside Algorithm 1 in `reference.py`: just as plain."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from reference import SingularGroups, best_first
from torch import Tensor


def parameters(ranks: Sequence[int], shapes: Sequence[tuple[int, int]]) -> int:
    """What matrices `(out, in)` of these ranks hold: P and Q, or W where that is not larger."""
    return sum(min(r * (out + in_), out * in_) for r, (out, in_) in zip(ranks, shapes, strict=True))


def initial_budget(phis: Sequence[SingularGroups]) -> int:
    """All numbers of the matrices."""
    return sum(math.prod(phi.shape) for phi in phis)


def final_budget(c: float, R_0: int) -> int:
    """floor(c R(0)): the budget is never exceeded."""
    return math.floor(Fraction(str(c)) * R_0)


def keep_best(phis: Sequence[SingularGroups], R_t: int) -> list[Tensor]:
    """
    By score per parameter, each group with which the total stays within the budget, as a mask for each W.

    So in a matrix that has reached the cost of W further groups are free, and where one group does not fit, no later
    group of that matrix does.
    """
    kept = [torch.zeros_like(phi.remain) for phi in phis]
    shapes = [phi.shape for phi in phis]
    for W, k in best_first(phis, [phi.I_bar / sum(phi.shape) for phi in phis]):
        kept[W][k] = True
        if parameters([int(mask.sum()) for mask in kept], shapes) > R_t:
            kept[W][k] = False
    return kept


PARAMETERS = (initial_budget, final_budget, keep_best)
