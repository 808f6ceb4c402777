"""The form of a layer in training: a sum of singular groups."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .distributed import whole
from .group_product import group_product
from .low_rank import CompressedLayer
from .weight_decay import decay_once

# On a GPU the fast kernels for half precision want sizes that are multiples of this.
_ROUND_ON_GPU = 8
# On a GPU a product with some rows of zeros is cheaper than taking the others out for each one, down to this part.
_TAKEN_OUT_ON_GPU = 0.75
# A tensor of one row would be copied into one of more rows, such as a user's average of it, without an error.
_LEAST_ROWS = 2


class SingularGroupLinear(CompressedLayer):
    """
    A linear layer whose weight is the sum of singular groups `sigma_k u_k v_k^T` (eq. 5).

    Removed groups are rows of zeros: a group of which `u_k`, `sigma_k` and `v_k` are zero adds nothing to the output
    and gets no gradient, whatever the loss. [`leave_out_removed`] takes them out of the computation,
    [`~rankdyna_trainer.method.removal.cut_groups`] out of the tensors.

    Args:
        u: `(rank, out_features)`.
        sigma: `(rank,)`.
        v: `(rank, in_features)`.
        bias: `(out_features,)`, or `None`.
        original_class: the class of the layer that this one stands for, `nn.Linear` or `Conv1D`.

    Buffers:
        importance `(rank,)`: the smoothed scores of eq. 11, in float32.
        remaining `(rank,)`: false where a group was removed.

    Attributes:
        initial_rank: how many groups the layer began with: fewer than `full_rank` if it was compacted before.
        is_copy: whether it is a copy of another layer, made by `copy.deepcopy` or `pickle`.
    """

    bias: nn.Parameter | None
    importance: Tensor
    remaining: Tensor

    def __init__(
        self,
        u: Tensor,
        sigma: Tensor,
        v: Tensor,
        bias: nn.Parameter | None = None,
        original_class: type[nn.Module] = nn.Linear,
    ) -> None:
        super().__init__(v.shape[1], u.shape[1], original_class, u.dtype)
        self.weight = self.weight.to(u.device)
        self.u = nn.Parameter(u)
        self.sigma = nn.Parameter(sigma)
        self.v = nn.Parameter(v)
        self.register_parameter("bias", bias)
        self.register_buffer("importance", torch.zeros(len(sigma), dtype=torch.float32, device=u.device))
        self.register_buffer("remaining", torch.ones(len(sigma), dtype=torch.bool, device=u.device))
        self.leaves_out_removed = False
        self.initial_rank = len(sigma)
        self.is_copy = False
        self._rank: int | None = len(sigma)
        self._remaining_on_cpu: Tensor | None = None
        # No buffer: one that is `None` at times would shift those that an average of the model goes through in pairs.
        self._computed: Tensor | None = None
        self._known = self._mask_now()
        decay_once(self)

    @property
    def rank(self) -> int:
        """How many groups remain."""
        self._follow_mask()
        if self._rank is None:
            self._rank = int(self.remaining_on_cpu.sum())
        return self._rank

    @property
    def remaining_on_cpu(self) -> Tensor:
        """`remaining` on the CPU: a GPU is waited for only if the mask was changed there."""
        self._follow_mask()
        if self._remaining_on_cpu is None:
            self._remaining_on_cpu = self.remaining.cpu()
        return self._remaining_on_cpu

    @property
    def computed(self) -> Tensor | None:
        """`(at most width,)`: the numbers of the rows that the forward pass uses, or `None` for all."""
        if not torch.compiler.is_compiling():
            self._follow_mask()
        return self._computed

    @property
    def width(self) -> int:
        """How many rows the tensors have: the remaining groups, and the removed ones that were not cut yet."""
        return len(self.sigma)

    @property
    def width_when_cut(self) -> int:
        """How many rows the tensors need: at least two, and on a GPU a multiple of 8 where there are so many."""
        multiple = 1 if self.remaining.device.type == "cpu" else _ROUND_ON_GPU
        return min(self.width, -(-max(self.rank, _LEAST_ROWS) // multiple) * multiple)

    def rows_when_cut(self) -> Tensor:
        """The numbers of these rows, in their order and on the CPU: all remaining groups, then the first removed."""
        remaining = self.remaining_on_cpu
        filling = (~remaining).nonzero().squeeze(1)[: self.width_when_cut - self.rank]
        return torch.cat([remaining.nonzero().squeeze(1), filling]).sort().values

    @property
    def parameters_when_compacted(self) -> int:
        """How many numbers the weight will hold in P and Q, or in one dense matrix if that is smaller."""
        return min(self.rank * self.group_parameters, self.dense_parameters)

    @property
    def is_cheaper_dense(self) -> bool:
        """Whether P and Q would hold more numbers than the dense weight."""
        return self.rank * self.group_parameters > self.dense_parameters

    def factors(self) -> dict[str, nn.Parameter]:
        """`u`, `sigma` and `v` by name: dimension 0 counts the groups in each."""
        return {"u": self.u, "sigma": self.sigma, "v": self.v}

    def undecayed_factors(self) -> Iterable[Tensor]:
        """`sigma` and `v`, unless they alone are trained."""
        return [self.sigma, self.v] if self.u.requires_grad else []

    def set_remaining(self, remaining: Tensor) -> None:
        """Take over a new mask `(width,)` of the remaining groups; one on the CPU spares waiting for a GPU."""
        self.remaining = remaining.to(self.remaining.device, non_blocking=True)
        self._renew(remaining if remaining.device.type == "cpu" else None)

    def leave_out_removed(self) -> None:
        """Compute with the remaining groups alone from now on: the output and all gradients stay what they are."""
        self.leaves_out_removed = True
        self._renew()

    def _mask_now(self) -> tuple[Tensor, int | None]:
        """
        The mask, and how often it was written to, where that may be by others: into the layers of an average the masks
        of the model are copied. On a GPU, DDP writes into those of the model itself in each step, what they are.
        """
        watched = self.is_copy or self.remaining.device.type == "cpu"
        return self.remaining, self.remaining._version if watched and not self.remaining.is_inference() else None

    def _follow_mask(self) -> None:
        mask, version = self._mask_now()
        if mask is not self._known[0] or version != self._known[1]:
            self._renew()

    def _renew(self, remaining_on_cpu: Tensor | None = None) -> None:
        self._known = self._mask_now()
        self._rank, self._remaining_on_cpu, self._computed = None, remaining_on_cpu, None
        if not self.leaves_out_removed or self.rank == self.width:
            return
        if self.remaining.device.type == "cpu":
            self._computed = self.remaining_on_cpu.nonzero().squeeze(1)
        elif self.width_when_cut <= _TAKEN_OUT_ON_GPU * self.width:
            self._computed = self.rows_when_cut().to(self.remaining.device, non_blocking=True)

    def to_dense_weight(self) -> Tensor:
        """`sum_k sigma_k u_k v_k^T`, `(out_features, in_features)`, in float32 or better and rounded once."""
        p, q = self.to_factors(torch.promote_types(self.u.dtype, torch.float32))
        return (p @ q).to(self.u.dtype)

    def to_factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """`P` `(out_features, rank)` and `Q` `(rank, in_features)` of the remaining groups (eq. 5)."""
        exact = torch.promote_types(self.u.dtype, torch.float32)
        dtype = dtype or self.u.dtype
        u, sigma, v = (whole(factor)[self.remaining] for factor in self.factors().values())
        return (u.t().to(exact) * sigma.to(exact)).to(dtype), v.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`, through factors or rebuilt weight: the cheaper."""
        u, sigma, v = cast(list[Tensor], list(self.factors().values()))
        if (computed := self.computed) is not None:
            u, sigma, v = (factor.index_select(0, computed) for factor in (u, sigma, v))
        tokens = x.numel() // self.in_features if self.in_features else 0
        through_factors = tokens * len(sigma) * self.group_parameters
        through_weight = self.dense_parameters * (len(sigma) + tokens)
        return group_product(x, u, sigma, v, self.bias, through_weight < through_factors)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.is_copy = True
        self._known = self._mask_now()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SingularGroupLinear":
        # A cast of the model to half precision would round small scores to zero.
        importance = self.importance
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.importance.dtype != importance.dtype:
            self.importance = importance.to(self.importance.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of a running compression has the width of its step: take that width over before it is filled.
        # Of a checkpoint in several files, each may hold other tensors of the layer.
        names = ("u", "sigma", "v", "importance", "remaining")
        saved = [state_dict[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in state_dict]
        widths = {len(tensor) for tensor in saved if tensor.ndim} - {self.width}
        if len(widths) == 1 and (width := widths.pop()) <= self.full_rank:
            for factor in self.factors().values():  # resized in place, since an optimizer may hold them already
                factor.data, factor.grad = factor.new_zeros(width, *factor.shape[1:]), None
            self.importance = self.importance.new_zeros(width)
            self.remaining = self.remaining.new_zeros(width)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._renew()


def singular_group_layers(model: nn.Module) -> dict[str, SingularGroupLinear]:
    """All of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SingularGroupLinear)}
