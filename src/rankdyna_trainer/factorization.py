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
    # Apple's GPUs have no float64.
    exact = (weight.cpu() if weight.device.type == "mps" else weight).double()
    left, sigma, v = torch.linalg.svd(exact, full_matrices=False)
    return left.t().to(weight).contiguous(), sigma.to(weight), v.to(weight).contiguous()
