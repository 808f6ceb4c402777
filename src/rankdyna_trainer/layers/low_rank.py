"""The compacted form of a layer, P and Q, and what it shares with the form in training."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .weight_decay import decay_once

# The shape of what a compressed layer has in the place of its weight: no weight of a linear layer has one dimension,
# and a single number would be broadcast in silence by who reads it.
STANDS_FOR_WEIGHT = (2,)


class CompressedLayer(nn.Module):
    """
    What both forms of a layer share: the shape of the weight that they stand for, and two zeros named `weight`.

    A `transformers` that does not know the checkpoint's format would skip the unknown tensors and leave the layer
    random. `weight` in the file, of another shape, makes it stop with a size mismatch instead. It also answers the
    code of some models that asks a layer for `weight.dtype`.
    """

    weight: Tensor

    def __init__(
        self, in_features: int, out_features: int, original_class: type[nn.Module], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.original_class = original_class
        self.register_buffer("weight", torch.zeros(STANDS_FOR_WEIGHT, dtype=dtype))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        decay_once(self)  # a copy, or one that was read from a file

    def undecayed_factors(self) -> Iterable[Tensor]:
        """The factors that weight decay leaves alone, since it shrinks another one of the product."""
        return ()

    @property
    def dense_parameters(self) -> int:
        """How many numbers the dense weight holds."""
        return self.out_features * self.in_features

    @property
    def group_parameters(self) -> int:
        """How many numbers one group costs in P and Q."""
        return self.out_features + self.in_features

    @property
    def full_rank(self) -> int:
        """How many groups the dense weight has: `l_W` of eq. 3."""
        return min(self.out_features, self.in_features)


class EmptyLinear(NonDynamicallyQuantizableLinear):
    """
    P or Q of no groups: Q hands on how many rows there are, and P gives each of them the bias.

    No file, graph or optimizer holds its weight, a matrix without numbers: not every tool takes a tensor with a side
    of 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        given = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", given)
        self.be_like(torch.empty(0, device=device, dtype=dtype))

    def be_like(self, tensor: Tensor) -> None:
        """Take the type and device of a tensor for those of the weight."""
        self.dtype, self.device = tensor.dtype, tensor.device

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`(out_features, in_features)`, for code that asks a linear layer for its type or shape."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.device)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        if not self.out_features:
            return input[..., :0]
        # In training the zeros have gradients for the layers before, which are zero too: DDP waits for them.
        zeros = input.sum(-1, keepdim=True) if self.training else input.new_zeros(*input.shape[:-1], 1)
        device, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:  # the type of a product
            dtype = torch.get_autocast_dtype(device)
        bias = zeros.new_zeros(self.out_features) if self.bias is None else self.bias
        return zeros.to(dtype) + bias.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EmptyLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight = self.weight
        try:
            self.be_like(fn(weight))
        except NotImplementedError:  # moved from the device meta, though there are no values that it lacks
            self.be_like(fn(torch.empty_like(weight, device="cpu")))
        return self


class LowRankLinear(CompressedLayer):
    """
    A linear layer whose weight is `P Q` (eq. 2): two plain `nn.Linear` modules, `q` and then `p`, which has the bias.

    At rank 0 they are of a class that torch takes for one which is not to be quantized: there is nothing to quantize,
    and tools that do it for each `nn.Linear` stop at a weight without numbers, or compute garbage with it.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        rank: the inner size; at 0 the layer adds only its bias.
        bias: whether the layer has a bias.
        original_class: the class of the layer that this one stands for, `nn.Linear` or `Conv1D`.
        device: of the weights, which are not initialized.
        dtype: of the weights.

    Shapes:
        `p.weight` `(out_features, rank)`, `q.weight` `(rank, in_features)`; at rank 0 they are no parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        original_class: type[nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, original_class, dtype or torch.get_default_dtype())
        self.q = _uninitialized_linear(in_features, rank, False, device, dtype)
        self.p = _uninitialized_linear(rank, out_features, bias, device, dtype)
        decay_once(self)

    @property
    def rank(self) -> int:
        """How many groups the layer holds."""
        return self.q.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias `(out_features,)`, which `p` adds."""
        return self.p.bias

    def factors(self) -> list[nn.Parameter]:
        """The weights of `p` and `q`; none at rank 0."""
        weights = (self.p.weight, self.q.weight)
        return [weight for weight in weights if isinstance(weight, nn.Parameter)]

    def settle(self) -> None:
        """Say to the factors without a weight where the layer was loaded to."""
        for factor in (self.p, self.q):
            if isinstance(factor, EmptyLinear):
                factor.be_like(self.weight)

    def undecayed_factors(self) -> Iterable[Tensor]:
        """`Q`, unless it alone is trained."""
        # Adapters and quantizers put modules of their own in the place of these two.
        p, q = (getattr(factor, "weight", None) for factor in (self.p, self.q))
        return [q] if isinstance(q, Tensor) and isinstance(p, Tensor) and p.requires_grad else []

    def to_dense_weight(self) -> Tensor:
        """`P Q`, `(out_features, in_features)`, computed in float32 or better and rounded once."""
        exact = torch.promote_types(self.p.weight.dtype, torch.float32)
        return (self.p.weight.to(exact) @ self.q.weight.to(exact)).to(self.p.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return self.p(self.q(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _uninitialized_linear(
    in_features: int, out_features: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear:
    if not in_features or not out_features:
        return EmptyLinear(in_features, out_features, bias, device, dtype)
    linear = nn.Linear(1, 1, bias=bias, device="meta")  # made small, since it would be initialized
    linear.in_features, linear.out_features = in_features, out_features
    linear.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
    if bias:
        linear.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
    return linear
