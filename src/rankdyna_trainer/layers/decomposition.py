"""The singular value decomposition of one matrix, in float64."""

import torch
from torch import Tensor

from .factor_cache import Factors


def singular_groups(matrix: Tensor) -> Factors:
    """
    The singular groups of a matrix `(out, in)` in float64, largest first: `u` `(rank, out)`, `sigma` `(rank,)` and
    `v` `(rank, in)` with `rank = min(out, in)`.
    """
    if matrix.shape[0] < matrix.shape[1]:
        # LAPACK takes half the time for a tall matrix that it takes for the same one lying down.
        v, sigma, u = torch.linalg.svd(matrix.t(), full_matrices=False)
        return u, sigma, v.t()
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    return u.t(), sigma, v


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU if it is on one of Apple's GPUs, which have none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
