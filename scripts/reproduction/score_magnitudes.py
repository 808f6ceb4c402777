"""How large the terms of the importance scores are on a fine-tuned model: the paper's table 4."""

from collections.abc import Iterable, Mapping
from itertools import islice
from statistics import fmean, pstdev

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, inject_singular_groups
from rankdyna_trainer.layers.hooks import release
from rankdyna_trainer.method.group_fisher import GroupFisher
from rankdyna_trainer.method.hessian import hessian_diagonal, random_signs


def score_magnitudes(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], steps: int, learning_rate: float = 1e-4
) -> dict[str, float]:
    """
    The means of the two terms of eq. 10 and of eq. 13, over all numbers of the singular groups and over the batches.

    The second-order term is taken with the Hessian's diagonal by Hutchinson's estimator, one vector of signs for each
    batch. Its error does not cancel in the absolute value: in the mean the result is no less than the term is.

    Args:
        model: a fine-tuned transformers model that returns a loss. It is changed in place: it is given its singular
            groups, and fine-tuning goes on in training mode while the scores are taken.
        batches: at least as many as `steps`, with labels, on the model's device.
        steps: over how many batches.
        learning_rate: of AdamW, without weight decay; 0 leaves the weights as they are.

    Returns:
        `first_order`, the mean of `|theta g|`; `second_order`, of `|theta^2 h / 2|`; `fisher`, of the mean over the
        examples of a batch of the squared gradient; and with the suffix `_std` their standard deviations over batches.

    Raises:
        ValueError: there are fewer batches than steps, or none.
    """
    inject_singular_groups(model, RankDynaConfig(rank_ratio=1.0))
    layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
    factors = [factor for layer in layers for factor in layer.factors().values()]
    numbers = sum(factor.numel() for factor in factors)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    fisher = GroupFisher(layers)
    found: dict[str, list[float]] = {"first_order": [], "second_order": [], "fisher": []}
    model.train()
    for step, batch in enumerate(islice(batches, steps)):
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(**batch).loss
            gradients, diagonal = hessian_diagonal(loss, factors, random_signs(factors, step))
        fisher.take()  # the Hessian's passes count for nothing
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            first = [(theta * g).abs().sum() for theta, g in zip(factors, gradients, strict=True)]
            second = [(theta**2 * h / 2).abs().sum() for theta, h in zip(factors, diagonal, strict=True)]
        sums = {"first_order": first, "second_order": second, "fisher": [values.sum() for values in fisher.take()]}
        for name, parts in sums.items():
            found[name].append(sum(float(part) for part in parts) / numbers)
        optimizer.step()
    release(model)
    if len(found["fisher"]) < max(steps, 1):
        raise ValueError(f"Table 4 is over {steps} batches, and there are {len(found['fisher'])}.")
    means = {name: fmean(values) for name, values in found.items()}
    return means | {f"{name}_std": pstdev(values) for name, values in found.items()}
