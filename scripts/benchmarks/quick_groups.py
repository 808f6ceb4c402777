"""Groups that take less time than a singular value decomposition, where only the time of what follows counts."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from rankdyna_trainer.layers import decomposition

Decompose: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@contextmanager
def groups_from(decompose: Decompose) -> Iterator[None]:
    """Meanwhile the library takes the groups of a matrix from this function."""
    original = decomposition.singular_groups
    modules = [module for name, module in sys.modules.items() if name.startswith("rankdyna_trainer.")]
    users = [vars(module) for module in modules if vars(module).get("singular_groups") is original]
    for names in users:
        names["singular_groups"] = decompose
    try:
        yield
    finally:
        for names in users:
            names["singular_groups"] = original


def gram_groups(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular groups from the eigenvectors of `W^T W` or `W W^T`: the smallest are less exact."""
    if matrix.shape[0] < matrix.shape[1]:
        v, sigma, u = gram_groups(matrix.t())
        return u, sigma, v
    values, vectors = torch.linalg.eigh(matrix.t() @ matrix)
    sigma = values.flip(0).clamp(min=torch.finfo(matrix.dtype).tiny).sqrt()
    v = vectors.flip(1)
    return ((matrix @ v) / sigma).t(), sigma, v.t()


def random_groups(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As many and as long as the matrix has, in random directions: the model's function is lost."""
    out, into = matrix.shape
    rank = min(out, into)
    u, v = (torch.randn(rank, size, dtype=matrix.dtype, device=matrix.device) / size**0.5 for size in (out, into))
    return u, (matrix.norm() / rank**0.5).expand(rank).clone(), v
