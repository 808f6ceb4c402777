"""The singular value decomposition of a weight."""

import torch
from torch import Tensor


@torch.no_grad()
def factorize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    The singular groups of a weight, largest `sigma` first, computed in float64 and given in the weight's dtype.

    Args:
        weight: `(out_features, in_features)`, finite.

    Returns:
        `u` `(rank, out_features)`, `sigma` `(rank,)` and `v` `(rank, in_features)` with
        `rank = min(out_features, in_features)`, so that `weight = (u.T * sigma) @ v` (eq. 5).
    """
    left, sigma, v = torch.linalg.svd(weight.double(), full_matrices=False)
    u = left.t()
    return u.to(weight.dtype).contiguous(), sigma.to(weight.dtype), v.to(weight.dtype).contiguous()
