"""How much each singular group matters to the loss: eq. 9, 10, 13 and 11."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import ImportanceScore
from .distributed import local_part, true_in_all_processes, whole
from .layers import SingularGroupLinear


@torch.no_grad()
def group_scores(layer: SingularGroupLinear, score: ImportanceScore) -> Tensor:
    """
    `I(phi_k)` of eq. 9 from the gradients that the layer holds now: a sum over the numbers of `sigma_k`, `u_k`, `v_k`.

    Per number `theta` with gradient `g` the score `S` is

    - `first_order`: `|theta g|`, the first term of eq. 10 (section 4.5.2);
    - `second_order`: `|theta g + theta^2 h / 2|`, both terms of eq. 10, with the diagonal of the empirical Fisher
      information, `h = g^2`, for that of the Hessian;
    - `fisher`: `g^2`, eq. 13 of the batch; eq. 11 then averages it over the steps.

    Returns:
        `(width,)` in float32; zeros when the layer took no part in the step.
    """
    parts = [
        _scores(factor, factor.grad, score).unsqueeze(-1).flatten(1).sum(dim=1)
        for factor in layer.factors().values()
        if factor.grad is not None
    ]
    return whole(torch.stack(parts).sum(dim=0)) if parts else torch.zeros_like(layer.importance)


def _scores(theta: Tensor, gradient: Tensor, score: ImportanceScore) -> Tensor:
    gradient = gradient.float()
    if score == "fisher":
        return gradient.square()
    first_order = theta.float() * gradient
    if score == "second_order":
        first_order += first_order.square() / 2
    return first_order.abs_()


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
    sharded = any(isinstance(gradient, DTensor) for gradient in others)
    return true_in_all_processes(finite) if sharded else finite
