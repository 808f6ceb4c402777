"""How much each singular group matters to the loss: eq. 9, 10, 13 and 11."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.distributed import is_sharded, local_part, sums_over_groups, true_in_all_processes
from ..layers.singular_group import SingularGroupLinear
from .group_fisher import GroupFisher
from .hessian import HessianDiagonal

# How many are looked at together. Measured: on a CPU more leave its caches, on a GPU fewer start too many kernels.
NUMBERS_AT_ONCE, NUMBERS_AT_ONCE_ON_GPU = 2**19, 2**23


@torch.no_grad()
def step_scores(
    layers: Sequence[SingularGroupLinear], curvature: GroupFisher | HessianDiagonal | None = None
) -> list[Tensor]:
    """
    `I(phi_k)` of eq. 9 for all groups from one step: a sum over the numbers of `sigma_k`, `u_k`, `v_k`.

    Per number `theta` with gradient `g` the score `S` is

    - `first_order`, without `curvature`: `|theta g|`, the first term of eq. 10 (section 4.5.2). It takes next to
      nothing of a step;
    - `second_order`, from a [`HessianDiagonal`]: `|theta g + theta^2 h / 2|`, both terms of eq. 10, with an estimate
      `h` of the diagonal of the Hessian. A step takes 2.5 to 3.1 times as long (`scripts/checks/score_costs.py`);
    - `fisher`, from a [`GroupFisher`]: the mean over the examples of the squared gradient of each, eq. 13; eq. 11 then
      averages it over the steps. A step takes 1.3 to 1.4 times as long.

    Args:
        layers: whose gradients are those of the step, all of the model.
        curvature: what has watched the step, of the same layers.

    Returns:
        `(width,)` in float32 for each layer; zeros for one that took no part in the step, and not finite where a
        gradient is inf or nan.

    Raises:
        ValueError: `curvature` has seen no loss of the model.
    """
    if isinstance(curvature, HessianDiagonal):
        return group_scores(layers, curvature.take())
    scores = group_scores(layers)
    if curvature is None:
        return scores
    # An overflow of a whole gradient need not show in the examples.
    return [torch.where(a.isfinite(), b, torch.nan) for a, b in zip(scores, curvature.take(), strict=True)]


@torch.no_grad()
def group_scores(
    layers: Sequence[SingularGroupLinear], diagonals: Sequence[Mapping[str, Tensor]] | None = None
) -> list[Tensor]:
    """
    Eq. 9 with eq. 10 from the gradients that layers hold now, in few kernels however many layers there are.

    Args:
        layers: with gradients.
        diagonals: of each layer that of the Hessian for `u`, `sigma` and `v`, in their shapes; without them only
            eq. 10's first term counts.

    Returns:
        `(width,)` in float32 for each layer; zeros for one that took no part in the step.
    """
    scores = [layer.importance for layer in layers]
    for numbers in _alike(scores):
        of_factors = [
            torch.cat(
                _row_sums(
                    [layers[i].factors()[name] for i in numbers],
                    None if diagonals is None else [diagonals[i][name] for i in numbers],
                )
            )
            for name in ("u", "sigma", "v")
        ]
        total = of_factors[0] + of_factors[1] + of_factors[2]
        for i, values in zip(numbers, torch.split(total, [layers[i].width for i in numbers]), strict=True):
            scores[i] = values
    return scores


def _row_sums(factors: Sequence[Tensor], diagonals: Sequence[Tensor] | None) -> list[Tensor]:
    """The scores of each factor's numbers, summed over each group; zeros for one without a gradient."""
    parts: dict[int, list[Tensor]] = {}
    memory = torch.empty(0, dtype=torch.float32, device=factors[0].device)
    for block in _blocks(factors, diagonals):
        theta, gradient, *curvature = (_joined(tensors).float() for tensors in zip(*block.values(), strict=True))
        if theta.numel() > memory.numel():
            memory = theta.new_empty(theta.numel(), dtype=torch.float32)
        scores = torch.mul(theta, gradient, out=memory[: theta.numel()].view(theta.shape))
        for h in curvature:
            scores.addcmul_(theta.square(), h, value=0.5)
        sums = scores.abs_().sum(dim=1) if scores.ndim == 2 else scores.abs()
        of_factors = torch.split(sums, [tensors[0].shape[0] for tensors in block.values()])
        for i, values in zip(block, of_factors, strict=True):
            parts.setdefault(i, []).append(values)
    return [
        sums_over_groups(_joined(parts[i]), factor)
        if i in parts
        else torch.zeros(factor.shape[0], dtype=torch.float32, device=factor.device)
        for i, factor in enumerate(factors)
    ]


def _blocks(factors: Sequence[Tensor], diagonals: Sequence[Tensor] | None) -> Iterator[dict[int, tuple[Tensor, ...]]]:
    """Rows of factors with their gradients (and diagonals), by the factor's number: so many as are joined at once."""
    alike: dict[Any, list[tuple[int, tuple[Tensor, ...]]]] = {}
    for i, factor in enumerate(factors):
        if factor.grad is not None:
            rows = (local_part(factor), local_part(factor.grad), *(() if diagonals is None else (diagonals[i],)))
            alike.setdefault((rows[0].shape[1:], factor.grad.dtype), []).append((i, rows))
    on_cpu = factors[0].device.type == "cpu"
    numbers_at_once = NUMBERS_AT_ONCE if on_cpu else NUMBERS_AT_ONCE_ON_GPU
    for (shape, _), found in alike.items():
        most = max(1, numbers_at_once // max(1, shape.numel()))
        block: dict[int, tuple[Tensor, ...]] = {}
        held = 0
        for i, rows in found:
            count = rows[0].shape[0]
            pieces = [rows] if count <= most else zip(*(torch.split(tensor, most) for tensor in rows), strict=True)
            for piece in pieces:
                # On a CPU, joining them is one more way through memory.
                if block and ((on_cpu and shape) or i in block or held + piece[0].shape[0] > most):
                    yield block
                    block, held = {}, 0
                block[i] = piece
                held += piece[0].shape[0]
        yield block


@torch.no_grad()
def smooth_importance(
    layers: Sequence[SingularGroupLinear], scores: Sequence[Tensor], beta: float, valid: Tensor
) -> None:
    """
    Eq. 11, in place: `importance = beta * importance + (1 - beta) * scores`.

    The smoothing is linear, so one number per group is smoothed, not one per parameter.

    Args:
        layers: whose `importance` `(width,)` is updated.
        scores: `(width,)` for each.
        beta: the weight of the past.
        valid: one boolean; where it is false, nothing changes. A tensor, so that no device has to be waited for.
    """
    for numbers in _alike([layer.importance for layer in layers]):
        buffers = [layers[i].importance for i in numbers]
        old, new = torch.cat(buffers), torch.cat([scores[i] for i in numbers])
        smoothed = torch.where(valid.to(old.device), beta * old + (1 - beta) * new, old)
        torch._foreach_copy_(buffers, torch.split(smoothed, [len(buffer) for buffer in buffers]))


@torch.no_grad()
def gradients_are_finite(model: nn.Module, scores: Sequence[Tensor]) -> Tensor:
    """
    Whether no gradient of the model is inf or nan, as one boolean tensor: they are after an overflow of a loss scaler.

    Args:
        model: whose parameters hold gradients.
        scores: the scores of all its singular groups, which already tell for the factors.
    """
    factors = {id(f) for m in model.modules() if isinstance(m, SingularGroupLinear) for f in m.factors().values()}
    others = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in factors]
    dense = [local_part(gradient.coalesce().values() if gradient.is_sparse else gradient) for gradient in others]
    everywhere = torch.stack([all_finite(scores), all_finite(dense).to(scores[0].device)]).all()
    sharded = any(is_sharded(gradient) for gradient in others)
    return true_in_all_processes(everywhere) if sharded else everywhere


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether no number is inf or nan, as one boolean tensor, from few kernels however many tensors there are."""
    found = [_extremes([tensors[i] for i in numbers]) for numbers in _alike(tensors)]
    return torch.stack([flag.to(found[0].device) for flag in found]).all() if found else torch.tensor(True)


def _extremes(tensors: list[Tensor]) -> Tensor:
    tensors = [tensor for tensor in tensors if tensor.numel()] or [tensors[0].new_zeros(1)]
    # No sum of squares: in float16 it overflows where no number does. On a CPU the largest magnitude is many times
    # slower than the two extremes; on a GPU it takes one kernel for all.
    if tensors[0].device.type == "cpu":
        extremes = [bound for tensor in tensors for bound in torch.aminmax(tensor)]
    else:
        extremes = list(torch._foreach_norm(tensors, torch.inf))
    return torch.stack(extremes).isfinite().all()


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of those that are on one device and of one dtype."""
    numbers: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        numbers.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(numbers.values())


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
