"""What enters a layer times its singular groups, with no more kept for the backward pass than a dense layer keeps."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# With fewer groups than this part of all, what the graph keeps is little beside the layer's input.
_LITTLE = 0.25


def group_product(x: Tensor, u: Tensor, sigma: Tensor, v: Tensor, bias: Tensor | None, through_weight: bool) -> Tensor:
    """
    `sum_k sigma_k u_k v_k^T x + bias`.

    A graph of these operations keeps `sigma_k u_k`, and `v_k^T x` or the rebuilt weight, until the backward pass. Of
    many groups that is as much as the weight and the input again, so that they are computed a second time there: a
    layer that holds no more numbers than its dense weight then takes no more memory in a step.

    Args:
        x: `(..., in_features)`.
        u: `(rank, out_features)`.
        sigma: `(rank,)`.
        v: `(rank, in_features)`.
        bias: `(out_features,)`, or `None`.
        through_weight: whether the weight is rebuilt, instead of going through `v` and then `u`.

    Returns:
        `(..., out_features)`.
    """
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if traced or not torch.is_grad_enabled() or len(sigma) <= _LITTLE * min(u.shape[1], v.shape[1]):
        return _product(x, u, sigma, v, bias, through_weight)
    # Of a view, autograd would refuse that the model changes it in place.
    rows: Tensor = _GroupProduct.apply(x.reshape(-1, x.shape[-1]), u, sigma, v, bias, through_weight)  # type: ignore[no-untyped-call]
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def _product(x: Tensor, u: Tensor, sigma: Tensor, v: Tensor, bias: Tensor | None, through_weight: bool) -> Tensor:
    p = (u * sigma.unsqueeze(1)).t()
    return F.linear(x, p @ v, bias) if through_weight else F.linear(F.linear(x, v), p, bias)


class _GroupProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, u: Tensor, sigma: Tensor, v: Tensor, bias: Tensor | None, through_weight: bool) -> Tensor:
        return _product(x, u, sigma, v, bias, through_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *kept, bias, ctx.through_weight = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(*kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """In the order of operations of the graph, and so to its last bit; differentiable itself."""
        x, u, sigma, v = ctx.saved_tensors
        # Of half precision under autocast, which has ended by now.
        p, q, x = (tensor.to(gradient.dtype) for tensor in ((u * sigma.unsqueeze(1)).t(), v, x))
        if ctx.through_weight:
            of_weight = gradient.t() @ x
            of_x, of_p, of_v = gradient @ (p @ q), q @ of_weight.t(), p.t() @ of_weight
        else:
            of_groups = gradient @ p
            of_x, of_p, of_v = of_groups @ q, (x @ q.t()).t() @ gradient, of_groups.t() @ x
        of_bias = gradient.sum(0) if ctx.has_bias else None
        return of_x, of_p * sigma.unsqueeze(1), (of_p * u).sum(1), of_v, of_bias, None
