"""Which groups remain for a budget (section 3.5). Pure: tensors and numbers in, masks out."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..options import part_of


@torch.no_grad()
def select_groups(
    scores: Sequence[Tensor], costs: Sequence[int], caps: Sequence[int], budget: int, multiple_of: int = 1
) -> list[Tensor]:
    """
    Keep the groups that are worth most for what they cost, as many as the budget allows.

    The matrices share one budget. With `costs` of 1 this is the paper's choice of the `budget` best groups. With
    `costs` of `out_features + in_features` and `caps` of `out_features * in_features`, groups are ranked by score per
    parameter, and a matrix whose groups have cost as much as its dense form keeps all its further groups for nothing.

    Equal ranks are broken by the order of the matrices, then by that of the groups, so that every process decides
    alike.

    Args:
        scores: for each matrix the scores `(groups,)` of its remaining groups.
        costs: for each matrix what one group costs.
        caps: for each matrix the most that its groups together can cost.
        budget: the most that all kept groups together may cost.
        multiple_of: of which the number of groups that a matrix keeps is a multiple. So many groups of like worth then
            stay or go together.

    Returns:
        For each matrix a mask `(groups,)` of the groups to keep. What is left of the budget is less than the cost of
        any group (or so many of them) that was not kept.
    """
    if multiple_of > 1:
        return _select_blocks(scores, costs, caps, budget, multiple_of)
    cpu = torch.device("cpu")
    counts = [len(values) for values in scores]
    matrix = torch.repeat_interleave(torch.tensor(counts, device=cpu))
    worth = torch.cat([values.cpu().double() / cost for values, cost in zip(scores, costs, strict=True)])
    order = worth.argsort(descending=True, stable=True)
    matrix_by_worth = matrix[order]
    price = _marginal_costs(matrix_by_worth, counts, costs, caps)

    kept = torch.zeros_like(order, dtype=torch.bool)
    candidates = torch.arange(len(order), device=cpu)
    while len(candidates):
        spent = price[candidates].cumsum(0)
        fitting = int(torch.searchsorted(spent, budget, right=True))
        kept[candidates[:fitting]] = True
        budget -= int(spent[fitting - 1]) if fitting else 0
        candidates = candidates[fitting:]
        # A matrix whose next group does not fit is closed: its other groups cost as much and are worth less.
        next_of = torch.full((len(counts),), len(order), device=cpu)
        next_of.scatter_reduce_(0, matrix_by_worth[candidates], candidates, "amin")
        fits = price[next_of.clamp(max=len(order) - 1)] <= budget
        candidates = candidates[fits[matrix_by_worth[candidates]]]

    mask = torch.zeros_like(kept)
    mask[order[kept]] = True
    return [part.to(values.device) for part, values in zip(torch.split(mask, counts), scores, strict=True)]


def with_floor(
    scores: Sequence[Tensor],
    costs: Sequence[int],
    caps: Sequence[int],
    budget: int,
    blocks: Iterable[Sequence[int]],
    floor: float,
    multiple_of: int = 1,
) -> list[Tensor]:
    """
    The scores with which [`select_groups`] keeps in each block at least a part of what it would have if all blocks
    kept the same part of their groups: the best of the block, which are then worth more than all others.

    Args:
        scores: as for [`select_groups`].
        costs: likewise.
        caps: likewise.
        budget: likewise.
        blocks: the numbers of the matrices that stand in each block; a matrix outside of any has no floor.
        floor: the part, in [0, 1].
        multiple_of: as for [`select_groups`].

    Returns:
        For each matrix the scores `(groups,)`, infinite where the floor keeps a group.
    """
    raised = list(scores)
    whole = sum(caps)
    for block in blocks if floor else ():
        least = math.floor(part_of(floor, budget * sum(caps[i] for i in block)) / whole)
        of_block = ([scores[i] for i in block], [costs[i] for i in block], [caps[i] for i in block])
        for i, kept in zip(block, select_groups(*of_block, least, multiple_of), strict=True):
            raised[i] = torch.where(kept, math.inf, scores[i])
    return raised


def _select_blocks(
    scores: Sequence[Tensor], costs: Sequence[int], caps: Sequence[int], budget: int, size: int
) -> list[Tensor]:
    orders = [values.argsort(descending=True, stable=True) for values in scores]
    blocks = [
        values[order][: len(values) // size * size].double().reshape(-1, size).sum(dim=1)
        for values, order in zip(scores, orders, strict=True)
    ]
    masks = [torch.zeros_like(values, dtype=torch.bool) for values in scores]
    # The blocks of a matrix are sorted, so that those which are kept are its first.
    for mask, order, kept in zip(
        masks, orders, select_groups(blocks, [c * size for c in costs], caps, budget), strict=True
    ):
        mask[order[: int(kept.sum()) * size]] = True
    return masks


def _marginal_costs(matrix: Tensor, counts: list[int], costs: Sequence[int], caps: Sequence[int]) -> Tensor:
    """What each group adds to the cost, when the groups of a matrix are taken in the order in which they stand."""
    cpu = torch.device("cpu")
    starts = torch.tensor([0, *counts], device=cpu).cumsum(0)[:-1]
    by_matrix = matrix.argsort(stable=True)
    position = torch.empty_like(by_matrix)
    position[by_matrix] = torch.arange(len(matrix), device=cpu) - starts[matrix[by_matrix]]
    cost = torch.tensor(costs, device=cpu)[matrix]
    left = torch.tensor(caps, device=cpu)[matrix] - position * cost
    return left.clamp_(min=torch.zeros_like(cost), max=cost)
