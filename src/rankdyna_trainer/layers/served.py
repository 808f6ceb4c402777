"""The factors of a layer in a server, where layers with one input are joined: query, key and value; gate and up."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from .low_rank import STANDS_FOR_WEIGHT

# The ends of the names that a saved layer's tensors have.
WEIGHT, P, Q = "weight", "p.weight", "q.weight"


class ServedFactors(nn.Module):
    """
    The weights of layers that have one input and whose outputs stand side by side: each low-rank, of rank 0, or dense.

    An input is multiplied by all `Q` at once, and each part of the product by the `P` that belongs to it: one product
    with all `P` would multiply zeros, which stand wherever a group belongs to another part.

    Args:
        sizes: how many outputs each part has, in this process.
        ranks: the rank of each part; `None` if it is dense.
        in_features: how many inputs there are, in this process.
        dtype: of the weights, which are not initialized.
        shard: which part of a layer this process has, if several share it.
        shards: how many processes share a layer.

    Shapes:
        `q` `(sum of the ranks, in_features)`; `outer[i]` `(sizes[i], ranks[i])`, or `(sizes[i], in_features)`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        ranks: Sequence[int | None],
        in_features: int,
        dtype: torch.dtype,
        shard: int = 0,
        shards: int = 1,
    ) -> None:
        super().__init__()
        self.ranks, self.shard, self.shards = tuple(ranks), shard, shards
        self.groups = [rank or 0 for rank in ranks]
        self.q = _uninitialized(sum(self.groups), in_features, dtype)
        self.outer = nn.ParameterList(
            _uninitialized(size, in_features if rank is None else rank, dtype)
            for size, rank in zip(sizes, ranks, strict=True)
        )
        self._missing = {(part, end) for part, rank in enumerate(ranks) for end in _saved_with(rank)}

    def missing(self) -> list[tuple[int, str]]:
        """Which tensors were not loaded: of which part, and the end of their name."""
        return sorted(self._missing)

    def load(self, end: str, part: int, saved: Tensor) -> None:
        """
        Take a saved tensor, or what this process needs of it.

        Args:
            end: of its name: `WEIGHT`, `P` or `Q`.
            part: to which it belongs.
            saved: the whole of it.

        Raises:
            ValueError: it is none that a layer of this rank has, or not of its shape.
        """
        rank = self.ranks[part]
        if rank is not None and end == WEIGHT and saved.shape == STANDS_FOR_WEIGHT:
            return
        if end not in _saved_with(rank):
            raise ValueError(f"there is no {end} of shape {tuple(saved.shape)} in a layer of {_rank_in_words(rank)}")
        if end != WEIGHT:
            saved = _upright(saved, self.groups[part], 1 if end == P else 0)
        first = sum(self.groups[:part])
        place = self.q.data[first : first + self.groups[part]] if end == Q else self.outer[part].data
        own = saved
        if end != Q:  # the outputs may be shared out
            own = self._own(own, 0, place.shape[0])
        if end != P:  # the inputs may be
            own = self._own(own, 1, place.shape[1])
        if own.shape != place.shape:
            raise ValueError(
                f"the {end} of shape {tuple(saved.shape)} does not give {tuple(place.shape)}, "
                f"as {_rank_in_words(rank)} wants it"
            )
        place.copy_(own)
        self._missing.discard((part, end))

    def _own(self, saved: Tensor, dimension: int, size: int) -> Tensor:
        """This process's part; where there are fewer of them than processes, as of keys and values, some have one."""
        if saved.dim() != 2 or not size or saved.shape[dimension] % size:
            return saved
        pieces = saved.shape[dimension] // size
        if not pieces or self.shards % pieces:
            return saved
        return saved.narrow(dimension, self.shard * pieces // self.shards * size, size)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., sum of the sizes)`, without a bias."""
        projected = functional.linear(x, self.q) if sum(self.groups) else x[..., :0]
        outputs = []
        for rank, outer, end in zip(self.ranks, self.outer, accumulate(self.groups), strict=True):
            if rank == 0:
                outputs.append(x.new_zeros(*x.shape[:-1], outer.shape[0]))
            else:
                given = x if rank is None else projected[..., end - rank : end]
                outputs.append(functional.linear(given, outer))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _saved_with(rank: int | None) -> tuple[str, ...]:
    if rank is None:
        return (WEIGHT,)
    return (P, Q) if rank else ()


def _upright(saved: Tensor, rank: int, of_groups: int) -> Tensor:
    """
    P or Q with its groups in this dimension. A server that transposes the matrices of a model as it reads it, as those
    of GPT-2, does so with P and Q too; neither is ever square, since a layer of such a rank would be dense.
    """
    is_transposed = saved.dim() == 2 and saved.shape[of_groups] != rank == saved.shape[1 - of_groups]
    return saved.t() if is_transposed else saved


def _rank_in_words(rank: int | None) -> str:
    return "full rank" if rank is None else f"rank {rank}"


def _uninitialized(rows: int, columns: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns, dtype=dtype), requires_grad=False)
