"""FWSVD (Hsu et al., ICLR 2022): an SVD in which the important rows of a weight count for more."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..config import RankDynaConfig
from ..layers.decomposition import in_float64
from ..layers.factorization import factorize
from ..options import shown
from .replacement import factor_by_fisher

Side = Literal["output", "input"]

# The least importance of a row, as a part of the largest. A row without Fisher information, as of a neuron that never
# fires, then chooses among the groups that the others leave, instead of none.
LEAST_IMPORTANCE = 1e-12


def fwsvd(
    model: nn.Module,
    config: RankDynaConfig,
    dataloader: Iterable[Mapping[str, Any]] | Mapping[str, Tensor],
    per_example: bool = True,
    side: Side = "output",
) -> nn.Module:
    """
    Factor each target layer into P and Q by an SVD whose rows are weighted with Fisher information, in place.

    With `F` the empirical Fisher information of the weight (eq. 13) and `r_i = sum_j F_ij` the importance of row `i`,
    P and Q come from the SVD of `diag(sqrt(r)) W`, and the weighting is undone in P. Of all pairs of this rank they
    have the least `sum_i r_i sum_j (W_ij - (P Q)_ij)^2`.

    Which side carries the weights: the paper of FWSVD writes a layer as `X W`, so that a row belongs to an input
    feature; `nn.Linear` computes `x W^T`, and a row of its weight belongs to an output feature. The default weights
    the rows of W as `nn.Linear` and the paper of RankDyna (eq. 2) write it: one importance for each output feature,
    undone in P. `side="input"` weights the input features by the column sums of F, undone in Q. Measured on MiniLM-L6,
    fine-tuned on SST-2, at rank ratio 0.3 and before any further training (`F` of 1,024 examples; the error is
    `sum F_ij (W_ij - (P Q)_ij)^2`, as a part of that of plain SVD, averaged over the 36 layers):

    | | error | lower in | accuracy |
    | --- | --- | --- | --- |
    | dense | | | 0.839 |
    | SVD | 1 | | 0.609 |
    | `"output"` | 0.608 | 24 layers | 0.783 |
    | `"input"` | 0.692 | 12 layers | 0.744 |

    A row without Fisher information counts 1e-12 of the most important one; where all are without, it is plain SVD.

    Args:
        model: dense and fine-tuned.
        config: chooses the layers, and the ratio, as for [`svd`].
        dataloader: gives batches with labels; see [`~rankdyna_trainer.baselines.fisher.fisher_information`];
            or what that has returned, so that one estimate serves several ratios.
        per_example: as there.
        side: which features have an importance each.

    Returns:
        The same model, compacted: `save_pretrained` makes a checkpoint that `from_pretrained` can load.

    Raises:
        TypeError: `model` is no module, `config` no [`RankDynaConfig`], or the dataloader gives no batches.
        ValueError: `side` is neither, or as [`svd`] and
            [`~rankdyna_trainer.baselines.fisher.fisher_information`]. The model is then left as it was.
    """
    if side not in get_args(Side):
        raise ValueError(f"side must be one of {', '.join(get_args(Side))}: got {shown(side)}.")
    return factor_by_fisher(model, config, dataloader, per_example, partial(fwsvd_factors, side=side))


@torch.no_grad()
def fwsvd_factors(weight: Tensor, fisher: Tensor, rank: int, side: Side = "output") -> tuple[Tensor, Tensor]:
    """
    P `(out_features, rank)` and Q `(rank, in_features)` of one weight, computed in float64 and rounded to its dtype.

    Args:
        weight: `(out_features, in_features)`, finite.
        fisher: likewise, not negative.
        rank: how many groups are kept.
        side: which features have an importance each.
    """
    exact, importance = in_float64(weight), in_float64(fisher)
    if side == "output":
        p, q = _row_weighted_factors(exact, importance.sum(dim=1), rank)
    else:
        q, p = (factor.t() for factor in _row_weighted_factors(exact.t(), importance.sum(dim=0), rank))
    return p.to(weight).contiguous(), q.to(weight).contiguous()


def _row_weighted_factors(weight: Tensor, importance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    largest = importance.max()
    roots = (importance / largest).clamp(min=LEAST_IMPORTANCE).sqrt() if largest > 0 else torch.ones_like(importance)
    _, _, v = factorize(roots.unsqueeze(1) * weight)
    q = v[:rank]
    # diag(roots)^-1 U S is W V: the weighting is undone without a division.
    return weight @ q.t(), q
