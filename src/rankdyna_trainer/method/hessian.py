"""The diagonal of the Hessian, from the training's own forward passes: eq. 10."""

import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..layers.distributed import is_distributed, is_sharded, sum_of_processes
from ..layers.hooks import Hook
from ..layers.singular_group import SingularGroupLinear

_NO_SECOND_DERIVATIVES = (
    'importance_score="second_order" needs second derivatives of the loss, which this model does not give: {}. With '
    'gradient checkpointing set gradient_checkpointing_kwargs={{"use_reentrant": False}}; with attention kernels of '
    'another library load the model with attn_implementation="sdpa" or "eager"; or use '
    'importance_score="first_order" or "fisher".'
)


class HessianDiagonal:
    """
    The diagonal of the loss's Hessian, by Hutchinson's estimator, from the graphs of the training's forward passes.

    With random signs `z` the mean of `z * (H z)` is the diagonal. Each micro-batch of each process draws its own
    signs, from the numbers of the step, the micro-batch and the process: the global random state is left alone, and a
    resumed run draws the same. The product `H z` is the gradient of `z^T g`, taken when the model returns its loss: no
    second forward pass is needed, and dropout is that of the step. It enters with the weight that the loss then has in
    the backward pass, whatever that divides it by.

    The loss must be the one that the model returns, since its graph is looked at when the model has just run; terms
    that are added to it later are left out. Attention runs in its kernel that has a second derivative
    (`SDPBackend.MATH`), also where gradient checkpointing computes it again. A function whose backward pass is written
    by hand must be differentiable itself: an error tells of one marked with `once_differentiable`, but of one that
    leaves autograd without the mark the curvature is missed.

    Args:
        model: called by the training as it is, or inside of DDP.
        layers: with the singular groups of the model.
        finished_steps: how many steps a run that is resumed has behind it.

    Raises:
        ValueError: FSDP2 shards the factors.
    """

    def __init__(self, model: nn.Module, layers: Sequence[SingularGroupLinear], finished_steps: int = 0) -> None:
        if any(is_sharded(factor) for layer in layers for factor in layer.factors().values()):
            raise ValueError(
                'importance_score="second_order" cannot be used under FSDP2, which gives second derivatives of no '
                'sharded factor. Use DDP, or importance_score="first_order" or "fisher".'
            )
        self._layers = list(layers)
        self._step = finished_steps
        self._passes = 0
        self._sums: list[Tensor] = []
        self._attention: list[AbstractContextManager[None] | None] = []
        # Each part that a checkpointed computation may begin with.
        for module in model.modules():
            if module is model or (next(module.children(), None) is not None):
                module.register_forward_pre_hook(Hook(self._enter))
                module.register_forward_hook(Hook(self._leave), always_call=True)
        model.register_forward_hook(Hook(self._look))

    def take(self) -> list[dict[str, Tensor]]:
        """
        Of each layer the diagonal for `u`, `sigma` and `v`, in their shapes, and the next step begins.

        It is of the loss whose gradients the factors hold now: divided by a loss scaler's factor, and clipped, as they
        are.

        Raises:
            ValueError: no loss of the model was part of a backward pass.
        """
        if not self._sums:
            raise ValueError(
                'importance_score="second_order" found no loss of the model in the backward pass: the loss that is '
                "trained was computed outside of the model. Let the model return it (pass it the labels), or use "
                'importance_score="first_order" or "fisher".'
            )
        sums, self._sums = self._sums, []
        self._step, self._passes = self._step + 1, 0
        if is_distributed():
            sums = sum_of_processes(sums)
        diagonals, sigmas = sums[: -len(self._layers)], sums[-len(self._layers) :]
        # What was done to all gradients alike since the backward pass shows in those of the singular values.
        pairs = [
            (layer.sigma.grad.to(own.dtype), own)
            for layer, own in zip(self._layers, sigmas, strict=True)
            if layer.sigma.grad is not None
        ]
        device = sums[0].device
        held = sum((torch.dot(gradient, own).to(device) for gradient, own in pairs), sums[0].new_zeros(()))
        of_loss = sum((torch.dot(own, own).to(device) for _, own in pairs), sums[0].new_zeros(()))
        weight = torch.where(of_loss == 0, 0, held / of_loss)
        values = iter(diagonals)
        return [{name: next(values) * weight.to(f.device) for name, f in la.factors().items()} for la in self._layers]

    def _enter(self, module: nn.Module, args: Any) -> None:
        first = not self._attention and module.training and torch.is_grad_enabled()
        self._attention.append(sdpa_kernel(SDPBackend.MATH) if first else None)
        if (kernel := self._attention[-1]) is not None:
            kernel.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._attention and (kernel := self._attention.pop()) is not None:
            kernel.__exit__(None, None, None)

    def _look(self, model: nn.Module, args: Any, output: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        loss = _loss(output)
        if loss is None:
            raise ValueError(
                f'importance_score="second_order" needs the loss that {type(model).__name__} returns, and it returned '
                "none: the batch has no labels, or the Trainer keeps them from the model (label_smoothing_factor, "
                'compute_loss_func). Leave these out, or use importance_score="first_order" or "fisher".'
            )
        factors = [factor for layer in self._layers for factor in layer.factors().values()]
        process = distributed.get_rank() if is_distributed() else 0
        seed = random.Random(f"{self._step} {self._passes} {process}").getrandbits(32)
        self._passes += 1
        gradients, diagonal = hessian_diagonal(loss, factors, random_signs(factors, seed))
        found = diagonal + gradients[1::3]  # those of the singular values

        def add(weight: Tensor) -> None:
            weighted = [values * weight.to(values.device) for values in found]
            found.clear()  # a loss that a user keeps would keep it too
            for total, values in zip(self._sums, weighted, strict=False):
                total += values
            self._sums = self._sums or weighted

        loss.register_hook(add)  # type: ignore[no-untyped-call]


def random_signs(tensors: Iterable[Tensor], seed: int) -> list[Tensor]:
    """A tensor of `1` and `-1` for each tensor, like it; the same for the same seed on the same kind of device."""
    generators: dict[torch.device, torch.Generator] = {}
    signs = []
    for tensor in tensors:
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(tensor.device).manual_seed(seed)
        like: Any = {"dtype": tensor.dtype, "device": tensor.device}
        bits = torch.randint(2, tensor.shape, generator=generators[tensor.device], **like)
        signs.append(bits.mul_(2).sub_(1))
    return signs


def hessian_diagonal(
    loss: Tensor, tensors: Sequence[Tensor], signs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """
    Hutchinson's estimate of the diagonal of a loss's Hessian from one vector of signs: `z * (H z)`.

    The graph of the loss is left as it was, and no gradient is written into a tensor.

    Args:
        loss: one number.
        tensors: that the loss depends on, or not.
        signs: of `1` and `-1`, in the tensors' shapes.

    Returns:
        The gradients of the loss and the estimates, in the tensors' shapes and in float32 or better.

    Raises:
        ValueError: an operation of the model has no second derivative.
    """
    tensors = list(tensors)
    try:
        gradients = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
        slopes = [(g * z).sum().to(loss.device) for g, z in zip(gradients, signs, strict=True) if g.requires_grad]
        slope = torch.stack([loss * 0, *slopes]).sum()  # a gradient that is constant has no slope
        _check_differentiable(slope)
        products = torch.autograd.grad(slope, tensors, retain_graph=True, materialize_grads=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(_NO_SECOND_DERIVATIVES.format(error)) from error
    exact = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
    diagonal = [(z * hz).to(dtype) for z, hz, dtype in zip(signs, products, exact, strict=True)]
    return [gradient.detach().to(dtype) for gradient, dtype in zip(gradients, exact, strict=True)], diagonal


def _check_differentiable(slope: Tensor) -> None:
    """Raise for a function marked with `once_differentiable`: it ends the graph, and no error would tell."""
    seen: set[Any] = {None}
    ahead: list[Any] = [slope.grad_fn]
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            if node.name() == "torch::autograd::Error":
                raise RuntimeError("a function is marked with once_differentiable")
            ahead += [following for following, _ in node.next_functions]


def _loss(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.numel() == 1 and output.requires_grad else None
