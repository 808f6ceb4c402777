"""The singular value decomposition of one matrix, in float64."""

import torch
from torch import Tensor

from .factor_cache import Factors

# Of the largest singular value: below it, eigenvectors tell too little of a direction.
_SMALLEST_BY_EIGENVALUES = 1e-7


def singular_groups(matrix: Tensor) -> Factors:
    """
    The singular groups of a matrix `(out, in)` in float64, largest first: `u` `(rank, out)`, `sigma` `(rank,)` and
    `v` `(rank, in)` with `rank = min(out, in)`.
    """
    out, into = matrix.shape
    decompose = _by_svd if matrix.device.type == "cpu" else _by_eigenvalues
    if out < into:
        # LAPACK takes half the time for a tall matrix that it takes for the same one lying down.
        v, sigma, u = decompose(matrix.t())
        return u, sigma, v
    return decompose(matrix)


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU if it is on one of Apple's GPUs, which have none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _by_svd(tall: Tensor) -> Factors:
    u, sigma, v = torch.linalg.svd(tall, full_matrices=False)
    return u.t(), sigma, v


def _by_eigenvalues(tall: Tensor) -> Factors:
    """
    Likewise on a GPU, where a singular value decomposition takes many times longer than one of a symmetric matrix.

    The eigenvectors are orthogonal to rounding, and the other factor is the matrix's own image of them, so that the
    groups add up to the matrix to rounding. A matrix with singular values near zero is decomposed as on a CPU.
    """
    v = torch.linalg.eigh(tall.t() @ tall).eigenvectors.flip(1)
    image = tall @ v
    sigma = image.norm(dim=0)
    if not sigma.min() > _SMALLEST_BY_EIGENVALUES * sigma.max():
        return _by_svd(tall)
    sigma, order = sigma.sort(descending=True, stable=True)
    return (image[:, order] / sigma).t(), sigma, v[:, order].t()
