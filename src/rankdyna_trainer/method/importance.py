"""How much each singular group matters to the loss: eq. 9, 10, 13 and 11."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..layers.distributed import is_sharded, local_part, sums_over_groups, true_in_all_processes
from ..layers.singular_group import SingularGroupLinear
from .group_fisher import GroupFisher
from .hessian import HessianDiagonal

# Measured: fewer start too many kernels, more leave the caches of a processor.
NUMBERS_AT_ONCE = 2**19


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
        return [group_scores(layer, h) for layer, h in zip(layers, curvature.take(), strict=True)]
    scores = [group_scores(layer) for layer in layers]
    if curvature is None:
        return scores
    # An overflow of a whole gradient need not show in the examples.
    return [torch.where(a.isfinite(), b, torch.nan) for a, b in zip(scores, curvature.take(), strict=True)]


@torch.no_grad()
def group_scores(layer: SingularGroupLinear, diagonal: Mapping[str, Tensor] | None = None) -> Tensor:
    """
    Eq. 9 with eq. 10 from the gradients that a layer holds now.

    Args:
        layer: with gradients.
        diagonal: of the Hessian for `u`, `sigma` and `v`, in their shapes; without it only eq. 10's first term counts.

    Returns:
        `(width,)` in float32; zeros when the layer took no part in the step.
    """
    parts = [
        _row_sums(factor, factor.grad, None if diagonal is None else diagonal[name], layer.dense_parameters // 2)
        for name, factor in layer.factors().items()
        if factor.grad is not None
    ]
    return torch.stack(parts).sum(dim=0) if parts else torch.zeros_like(layer.importance)


def _row_sums(factor: Tensor, gradient: Tensor, diagonal: Tensor | None, numbers_at_once: int) -> Tensor:
    """The scores of a factor's numbers, summed over each group, a few at a time, which stay in a cache."""
    theta, gradient = (local_part(tensor).unsqueeze(-1).flatten(1) for tensor in (factor, gradient))
    if diagonal is not None:
        diagonal = diagonal.unsqueeze(-1).flatten(1)
    rows = max(1, min(numbers_at_once, NUMBERS_AT_ONCE) // max(1, theta.shape[1]))
    block = theta.new_empty(min(rows, len(theta)), theta.shape[1], dtype=torch.float32)
    sums = theta.new_empty(len(theta), dtype=torch.float32)
    for start in range(0, len(theta), rows):
        part = slice(start, start + rows)
        values = theta[part].float()
        scores = torch.mul(values, gradient[part].float(), out=block[: len(values)])
        if diagonal is not None:
            scores.addcmul_(values.square(), diagonal[part].float(), value=0.5)
        torch.sum(scores.abs_(), dim=1, out=sums[part])
    return sums_over_groups(sums, factor)


@torch.no_grad()
def smooth_importance(layer: SingularGroupLinear, scores: Tensor, beta: float, valid: Tensor) -> None:
    """
    Eq. 11, in place: `importance = beta * importance + (1 - beta) * scores`.

    The smoothing is linear, so one number per group is smoothed, not one per parameter.

    Args:
        layer: whose `importance` `(width,)` is updated.
        scores: `(width,)`.
        beta: the weight of the past.
        valid: one boolean; where it is false, nothing changes. A tensor, so that no device has to be waited for.
    """
    smoothed = beta * layer.importance + (1 - beta) * scores
    layer.importance.copy_(torch.where(valid.to(scores.device), smoothed, layer.importance))


@torch.no_grad()
def gradients_are_finite(model: nn.Module, scores: list[Tensor]) -> Tensor:
    """
    Whether no gradient of the model is inf or nan, as one boolean tensor: they are after an overflow of a loss scaler.

    Args:
        model: whose parameters hold gradients.
        scores: the scores of all its singular groups, which already tell for the factors.
    """
    factors = {id(f) for m in model.modules() if isinstance(m, SingularGroupLinear) for f in m.factors().values()}
    others = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in factors]
    dense = [local_part(gradient.coalesce().values() if gradient.is_sparse else gradient) for gradient in others]
    # No norm: in float16 a sum overflows where no gradient does, and the largest magnitude is many times slower.
    bounds = [bound for gradient in dense if gradient.numel() for bound in torch.aminmax(gradient)]
    extremes = [values.max() for values in scores if len(values)] + bounds
    # Zero stands for a model with no gradient at all: each group removed, all else frozen.
    zero = scores[0].new_zeros(())
    finite = torch.stack([torch.isfinite(extreme).to(zero.device) for extreme in (zero, *extremes)]).all()
    sharded = any(is_sharded(gradient) for gradient in others)
    return true_in_all_processes(finite) if sharded else finite
