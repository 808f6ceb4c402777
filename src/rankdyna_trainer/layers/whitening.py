"""
Singular groups in the metric of a layer's inputs, as DRONE (Chen et al., NeurIPS 2021) and SVD-LLM (Wang et al., ICLR
2025) factor weights: the groups left out last are those that matter most to what the layer computes on the data.

With `C` the mean of `x x^T` over what enters the layer, `S = C / mean(diag C) + eps I` and any root `L L^T = S`,

    W L = U diag(s) V^T        gives the groups        u_k,  sigma_k v_k = s_k L^-T V_k

with `v_k` of length 1. They add up to W, and the first `r` of them are the best that `r` groups can do for
`E |W x - P Q x|^2 + eps |W - P Q|^2`, in the order of `s`. Which root is taken makes no difference to the groups.
"""

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn

from .decomposition import in_float64, singular_groups
from .factor_cache import Factors
from .notices import AboveProgressBars

# Of the mean square of an input: so that directions which no row of the data had are kept as the weights have them.
EPSILON = 1e-3

logger = AboveProgressBars(logging.getLogger(__name__))


def metric_root(moment: Tensor) -> Tensor | None:
    """
    A root of the metric that belongs to a second moment.

    Args:
        moment: `C`, or any multiple of it, `(in_features, in_features)`.

    Returns:
        `L` `(in_features, in_features)` in float64 with `L L^T = S`; `None` if the moment is zero or not finite: then
        it tells nothing.
    """
    exact = in_float64(moment)
    scale = exact.diagonal().mean()
    if not (torch.isfinite(exact).all() and scale > 0):
        return None
    metric = (exact + exact.t()).div_(2 * scale)
    metric.diagonal().add_(EPSILON)
    root, failed = torch.linalg.cholesky_ex(metric)
    if not failed:
        return root
    # Rounding in a sum of float32 products can outweigh eps where one direction is much longer than all others.
    values, vectors = torch.linalg.eigh(metric)
    return vectors * values.clamp(min=EPSILON).sqrt()


def metric_roots(moments: MutableMapping[str, Tensor]) -> dict[str, Tensor]:
    """
    [`metric_root`] of several layers, by name, once for those that share a moment, which tells something.

    Args:
        moments: by name; empty afterwards, so that roots take no memory but that of the moments.
    """
    sharing: dict[int, list[str]] = {}
    for name, moment in moments.items():
        sharing.setdefault(id(moment), []).append(name)
    roots: dict[str, Tensor] = {}
    for names in sharing.values():
        for name in names:
            moment = moments.pop(name)
        if (root := metric_root(moment)) is not None:
            roots |= dict.fromkeys(names, root)
        del moment
    return roots


def observed_roots(
    layers: Mapping[str, nn.Module], observe: Callable[[Mapping[str, nn.Module]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """
    [`metric_roots`] of what enters layers; one log line names those that it tells nothing about.

    Args:
        layers: by name.
        observe: from layers by name to the second moments of their inputs.
    """
    roots = metric_roots(observe(layers))
    log_unseen([name for name in layers if name not in roots])
    return roots


def log_unseen(names: Sequence[str]) -> None:
    """One log line that names layers of whose inputs nothing is known, if there are such."""
    if names:
        logger.warning(
            "No input of %d layers was seen, or it was not finite (%s, ...): their groups are those of the weights "
            "alone.",
            len(names),
            names[0],
        )


@torch.no_grad()
def whitened_factors(p: Tensor | None, q: Tensor, root: Tensor) -> Factors:
    """
    The singular groups of `P Q` in the metric of its inputs, computed in float64.

    Args:
        p: `(out_features, rank)`, or `None` where `q` is the whole weight.
        q: `(rank, in_features)`, or the weight `(out_features, in_features)`.
        root: of the metric, from [`metric_root`].

    Returns:
        `u` `(rank, out_features)` and `v` `(rank, in_features)` with rows of length 1, and `sigma` `(rank,)`, in the
        dtype of `q`, so that `P Q = (u.T * sigma) @ v`. The first groups matter most; `sigma` need not fall.
    """
    left = None
    rows = in_float64(q)
    if p is not None:
        left, triangle = torch.linalg.qr(in_float64(p))
        rows = triangle @ rows
    root = root.to(rows.device)
    u, s, v = singular_groups(rows @ root)
    # The lengths are taken out before `s` is put in: the square of a singular value near zero would be none.
    v = torch.linalg.solve(root.t(), v.t()).t()
    lengths = v.norm(dim=1)
    sigma, v = s * lengths, v / lengths.unsqueeze(1)
    u = u if left is None else u @ left.t()
    return u.to(q).contiguous(), sigma.to(q), v.to(q).contiguous()


@torch.no_grad()
def group_energies(factors: Factors, root: Tensor | None) -> Tensor:
    """
    How much each group of a layer adds to `E |W x|^2`, in the metric in which the groups are those of the layer: there
    their outputs are orthogonal, so that the energy of several is the sum of theirs.

    Args:
        factors: from [`whitened_factors`], or of a plain decomposition, with `u` and `v` of length 1.
        root: of the metric, from [`metric_root`]; `None` for that of the weight's own numbers.

    Returns:
        `(rank,)` in float64: `s_k^2`.
    """
    _, sigma, v = (in_float64(factor) for factor in factors)
    lengths = 1.0 if root is None else (v @ root.to(v.device)).norm(dim=1)
    return (sigma * lengths).square()
