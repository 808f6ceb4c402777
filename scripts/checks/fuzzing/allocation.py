"""Budget and choice of groups a second time, in plain numbers, against which a run is held."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

Scores = list[list[float]]
Shapes = Sequence[tuple[int, int]]


def cost(ranks: Sequence[int], shapes: Shapes, by_parameters: bool) -> int:
    """What matrices `(out, in)` of these ranks hold: in groups, or in numbers of P and Q, or of W if that is less."""
    if not by_parameters:
        return sum(ranks)
    return sum(min(r * (out + into), out * into) for r, (out, into) in zip(ranks, shapes, strict=True))


def budget(
    step: int, phases: tuple[int, int, int], initial_ranks: Sequence[int], shapes: Shapes, unit: tuple[str, float]
) -> int:
    """
    R(t), eq. 12.

    Args:
        step: t.
        phases: t0, t1, T.
        initial_ranks: of the matrices that share the budget.
        shapes: of these.
        unit: `rank_ratio` or `param_ratio`, and its value.
    """
    warmup, cooldown, total = phases
    ratio, by_parameters = Fraction(str(unit[1])), unit[0] == "param_ratio"
    dense = cost([min(shape) for shape in shapes], shapes, by_parameters)
    dense = sum(out * into for out, into in shapes) if by_parameters else dense
    first = cost(initial_ranks, shapes, by_parameters)
    last = min(first, math.floor(ratio * dense) if by_parameters else math.ceil(ratio * dense))
    if step >= total - cooldown:
        return last
    if step <= warmup:
        return first
    return last + math.ceil((first - last) * (1 - Fraction(step - warmup, total - warmup - cooldown)) ** 3)


def chosen(scores: Scores, shapes: Shapes, by_parameters: bool, most: int, multiple: int) -> list[set[int]]:
    """
    Of each matrix the groups that stay: the best first, in pieces of `multiple`, each with which the total fits.
    """
    pieces = []
    for matrix, values in enumerate(scores):
        best = sorted(range(len(values)), key=lambda k: (-values[k], k))
        price = multiple * (sum(shapes[matrix]) if by_parameters else 1)
        for start in range(0, len(best) - multiple + 1, multiple):
            piece = best[start : start + multiple]
            worth = torch.tensor([[values[k] for k in piece]], dtype=torch.float64).sum(dim=1).item() / price
            pieces.append((-worth, matrix, start if multiple > 1 else piece[0], piece))
    kept: list[set[int]] = [set() for _ in scores]
    for _, matrix, _, piece in sorted(pieces):
        ranks = [len(groups) + multiple * (i == matrix) for i, groups in enumerate(kept)]
        if cost(ranks, shapes, by_parameters) <= most:
            kept[matrix].update(piece)
    return kept


def raised(
    scores: Scores,
    shapes: Shapes,
    by_parameters: bool,
    most: int,
    multiple: int,
    blocks: Sequence[Sequence[int]],
    floor: float,
) -> Scores:
    """The scores, infinite where the floor of a block keeps a group."""
    sizes = [out * into if by_parameters else min(out, into) for out, into in shapes]
    new = [list(values) for values in scores]
    for block in blocks if floor else ():
        least = math.floor(Fraction(str(floor)) * most * sum(sizes[i] for i in block) / sum(sizes))
        inside = chosen([scores[i] for i in block], [shapes[i] for i in block], by_parameters, least, multiple)
        for i, groups in zip(block, inside, strict=True):
            for k in groups:
                new[i][k] = math.inf
    return new
