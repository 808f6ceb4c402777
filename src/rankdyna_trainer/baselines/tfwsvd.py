"""TFWSVD (Hua et al., EMNLP 2022): P and Q for the Fisher information of each single number of a weight."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RankDynaConfig
from ..layers.decomposition import in_float64
from ..layers.factorization import factorize_product
from .fwsvd import fwsvd_factors
from .replacement import factor_by_fisher

STEPS = 400
STEPS_BETWEEN_CHECKS = 50
LEAST_PROGRESS = 1e-4
# Of the root mean square of the factor's numbers. Measured on weights of MiniLM-L6: 0.3 comes as low, 0.03 less so.
LEARNING_RATE = 0.1


def tfwsvd(
    model: nn.Module, config: RankDynaConfig, dataloader: Iterable[Mapping[str, Any]], per_example: bool = True
) -> nn.Module:
    """
    Factor each target layer into the P and Q that least change what matters to the loss, in place.

    With `F` the empirical Fisher information of the weight (eq. 13), `sum_ij F_ij (W_ij - (P Q)_ij)^2` is minimized
    over P and Q. No SVD does that when F is not of rank 1. The solver starts from the better of [`fwsvd`]'s two sides
    and follows the exact gradient with Adam, at a rate that falls to zero over 400 steps along a cosine. It stops
    earlier if 50 steps lower the error by less than 1e-4 of it. The best iterate is kept, and if it is not better than
    the start in the weight's own precision, the start is: the error is never above that of FWSVD. Numbers without
    Fisher information do not count; where all are without, the result is plain SVD.

    A step costs three products of `out_features * in_features * rank` multiply-adds, and four matrices of the size
    of the weight are held, in float32 or better. The alternative, alternating weighted least squares (a system of
    `rank` unknowns for each row, then for each column), needs `rank / 1.5` times as many a sweep. Measured on
    MiniLM-L6, fine-tuned on SST-2, on one core, rank 77, error as a part of FWSVD's:

    | | 384 x 384 | 1536 x 384 |
    | --- | --- | --- |
    | least squares, 4 sweeps | 0.827 in 0.8 s | 0.706 in 2.6 s |
    | least squares, 12 sweeps | 0.824 in 2.0 s | 0.699 in 7.8 s |
    | Adam, as it stops | 0.823 in 0.4 s | 0.698 in 1.7 s |

    In the measurement that [`fwsvd`] tells of, the error is 0.401 and the accuracy 0.786; the 36 layers take 34 s.

    Args:
        model: dense and fine-tuned.
        config: chooses the layers, and the ratio, as for [`svd`].
        dataloader: gives batches with labels; see [`~rankdyna_trainer.baselines.fisher.fisher_information`];
            or what that has returned, so that one estimate serves several ratios.
        per_example: as there.

    Returns:
        The same model, compacted: `save_pretrained` makes a checkpoint that `from_pretrained` can load.

    Raises:
        TypeError: as [`fwsvd`].
        ValueError: as [`fwsvd`]. The model is then left as it was.
    """
    return factor_by_fisher(model, config, dataloader, per_example, tfwsvd_factors)


@torch.no_grad()
def tfwsvd_factors(weight: Tensor, fisher: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """
    P `(out_features, rank)` and Q `(rank, in_features)` of one weight, rounded to its dtype.

    Args:
        weight: `(out_features, in_features)`, finite.
        fisher: likewise, not negative.
        rank: how many groups are kept.
    """

    def error(factors: tuple[Tensor, Tensor]) -> float:
        return weighted_error(weight, fisher, *factors)

    start = min((fwsvd_factors(weight, fisher, rank, side) for side in ("output", "input")), key=error)
    if rank == 0 or error(start) == 0:
        return start
    return min(start, _descend(weight, fisher, *start), key=error)


def weighted_error(weight: Tensor, fisher: Tensor, p: Tensor, q: Tensor) -> float:
    """
    `sum_ij F_ij (W_ij - (P Q)_ij)^2`, in float64.

    Args:
        weight: `(out_features, in_features)`.
        fisher: likewise.
        p: `(out_features, rank)`.
        q: `(rank, in_features)`.
    """
    weight, fisher, p, q = (in_float64(tensor) for tensor in (weight, fisher, p, q))
    return float((fisher * (weight - p @ q).square()).sum())


def _descend(weight: Tensor, fisher: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    start = p, q
    dtype = torch.promote_types(weight.dtype, torch.float32)
    u, sigma, v = factorize_product(in_float64(p), in_float64(q))
    # Of the order of 1: the squares of weights times their Fisher information may be below what float32 can hold.
    size = float(weight.abs().max())
    importance = (fisher / in_float64(fisher).mean().item()).to(dtype)
    scaled = weight.to(dtype) / size
    roots = (sigma / size).sqrt()
    factors = [(u.t() * roots).to(scaled), (roots.unsqueeze(1) * v).to(scaled)]
    groups = [{"params": [f], "lr": LEARNING_RATE * float(f.square().mean().sqrt())} for f in factors]
    optimizer = torch.optim.Adam(groups, eps=1e-15)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best, best_at_check, kept, best_step = math.inf, math.inf, factors, 0
    for step in range(STEPS):
        p, q = factors
        difference = p @ q - scaled
        slope = importance * difference
        if (error := float((slope * difference).sum())) < best:
            best, kept, best_step = error, [p.clone(), q.clone()], step
        if step % STEPS_BETWEEN_CHECKS == 0:
            if not best < (1 - LEAST_PROGRESS) * best_at_check:
                break
            best_at_check = best
        p.grad, q.grad = slope @ q.t(), p.t() @ slope
        optimizer.step()
        schedule.step()
    if not best_step:  # nothing better was found; factored anew, the start would differ in its last bits
        return start
    u, sigma, v = factorize_product(*(in_float64(factor) for factor in kept))
    return (u.t() * sigma * size).to(weight), v.to(weight)
