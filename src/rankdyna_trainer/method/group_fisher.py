"""The Fisher information of each singular group, from the training's own backward passes: eq. 13."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..layers.distributed import is_distributed, sum_of_processes
from ..layers.hooks import Hook
from ..layers.singular_group import SingularGroupLinear

# Of the numbers per token and group that a block of examples takes.
NUMBERS_AT_ONCE = 2**21


class GroupFisher:
    """
    Eq. 13 for the singular groups of a model: hooks that see the examples of each step in the backward pass.

    For each number of `u`, `sigma` and `v` it is the mean over the step's examples of the squared gradient of that
    example's own loss, summed over each group (eq. 9). With the input `X` `(tokens, in_features)` of an example and
    the gradient `D` `(tokens, out_features)` of its output, the gradients are `du_k = sigma_k D^T (X v_k)`,
    `dv_k = sigma_k X^T (D u_k)` and `dsigma_k = (D u_k)^T (X v_k)`. No weight's gradient is made for an example: of
    the vectors only the norms are needed, either from them or from the tokens' inner products `X X^T` and `D D^T`,
    whichever is cheaper. A step keeps one number for each group, and a block of examples at a time.

    An example is an entry of dimension 0 of a layer's input. A model that flattens that dimension, such as a mixture
    of experts, makes each row one; and a layer that a step calls several times (a shared one) takes each call for
    examples of its own, so that its gradients are not added up before they are squared.

    The examples' losses are their parts of the loss that is trained, times their number: the mean is over all
    examples of all micro-batches and processes. Clipping of the gradient does not touch it. The factor of a float16
    loss scaler is in it, squared: it is the same for all groups of a step, and it changes seldom.

    Args:
        layers: of one model. They are watched until [`release`].
    """

    def __init__(self, layers: Sequence[SingularGroupLinear]) -> None:
        self._layers = list(layers)
        self._squares: dict[SingularGroupLinear, Tensor] = {}
        self._examples: dict[SingularGroupLinear, int] = {}
        for layer in self._layers:
            layer.register_forward_hook(Hook(self._watch), with_kwargs=True)

    def take(self) -> list[Tensor]:
        """The information of each layer's groups, `(width,)` in float32, since it was taken last: zeros if unused."""
        squares = [self._squares.get(layer, torch.zeros_like(layer.importance)) for layer in self._layers]
        counts: list[Any] = [self._examples.get(layer, 0) for layer in self._layers]
        self._squares, self._examples = {}, {}
        if is_distributed():
            *squares, numbers = sum_of_processes([*squares, squares[0].new_tensor(counts)])
            # The loss that is trained is the mean of the processes' losses.
            counts = list(numbers / distributed.get_world_size() ** 2)
        return [(count * values).float() for count, values in zip(counts, squares, strict=True)]

    def _watch(self, layer: SingularGroupLinear, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if not (torch.is_grad_enabled() and layer.training and output.requires_grad):
            return None
        x = args[0] if args else kwargs["x"]
        watched: Tensor = _Watched.apply(output, x.detach(), layer, self._add)  # type: ignore[no-untyped-call]
        return watched

    def _add(self, layer: SingularGroupLinear, x: Tensor, gradient: Tensor) -> None:
        u, sigma, v = (factor.detach() for factor in layer.factors().values())
        if layer.computed is not None:
            u, sigma, v = (factor.index_select(0, layer.computed) for factor in (u, sigma, v))
        squares = squared_gradients(u, sigma, v, x, gradient)
        if layer.computed is not None:
            squares = squares.new_zeros(layer.width).index_copy_(0, layer.computed, squares)
        if layer in self._squares:
            squares = self._squares[layer] + squares
        self._squares[layer] = squares
        self._examples[layer] = self._examples.get(layer, 0) + (len(x) if x.ndim > 1 else 1)


class _Watched(torch.autograd.Function):
    """The output as it is; its gradient is shown on the way back, with the layer's input."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, layer: nn.Module, add: Callable[..., None]) -> Tensor:
        ctx.layer, ctx.add = layer, add
        # Saved as autograd saves, and no reference: gradient checkpointing drops it and computes it again.
        ctx.save_for_backward(x)
        # Not a new view, which the model could not change in place.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.no_grad():
            ctx.add(ctx.layer, *ctx.saved_tensors, gradients[0].detach())
        return gradients[0], None, None, None


def squared_gradients(u: Tensor, sigma: Tensor, v: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """
    Of the numbers of each singular group the squared gradients by each example, summed over numbers and examples.

    Args:
        u: `(rank, out_features)`.
        sigma: `(rank,)`.
        v: `(rank, in_features)`.
        x: `(examples, ..., in_features)`, the layer's input; one example if it has one dimension.
        gradient: `(examples, ..., out_features)`, of the layer's output.

    Returns:
        `(rank,)`, computed in float32 or better.
    """
    exact = torch.promote_types(u.dtype, torch.float32)
    u, sigma, v = u.to(exact), sigma.to(exact), v.to(exact)
    sums = torch.zeros_like(sigma)
    if not x.numel() or not gradient.numel() or not len(sigma):
        return sums
    examples = len(x) if x.ndim > 1 else 1
    x, gradient = (tensor.reshape(examples, -1, tensor.shape[-1]) for tensor in (x, gradient))
    tokens, rank = x.shape[1], len(sigma)
    features = x.shape[2] + gradient.shape[2]
    by_tokens = tokens * (features + 2 * rank) < rank * features
    # A block holds the tokens' parts of the groups, their inner products or the gradients of the vectors.
    per_example = max(tokens * max(rank, features), 0 if by_tokens else rank * features)
    block = max(1, NUMBERS_AT_ONCE // per_example)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(x), block):
            inputs, outputs = (tensor[start : start + block].to(exact) for tensor in (x, gradient))
            by_v, by_u = inputs @ v.t(), outputs @ u.t()
            if by_tokens:
                vectors = ((outputs @ outputs.mT) @ by_v * by_v).sum((0, 1))
                vectors += ((inputs @ inputs.mT) @ by_u * by_u).sum((0, 1))
            else:
                vectors = (outputs.mT @ by_v).square().sum((0, 1)) + (inputs.mT @ by_u).square().sum((0, 1))
            sums += sigma.square() * vectors + (by_u * by_v).sum(1).square().sum(0)
    return sums
