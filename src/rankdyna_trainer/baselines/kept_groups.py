"""Which groups remain where a budget is met in one step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import RankDynaConfig
from ..layers.architecture import names_by_block
from ..method.allocation import select_groups, with_floor
from ..method.budget import RankBudget
from ..method.schedule import RankBudgetSchedule

# All of the budget's fall in its only step.
AT_ONCE = RankBudgetSchedule(warmup_steps=0, cooldown_steps=0, total_steps=1)


def kept_groups(
    model: nn.Module,
    config: RankDynaConfig,
    budget: RankBudget,
    scores: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """
    Which groups remain if a model is brought to its final budget at once.

    Args:
        model: whose blocks keep their `block_floor`, where all layers compete.
        config: which has that, and `rank_multiple_of`.
        budget: of the layers, in the order of the scores.
        scores: by name `(groups,)` for each layer.

    Returns:
        By name a mask `(groups,)`, on the CPU.
    """
    names = list(scores)
    numbers = {name: number for number, name in enumerate(names)}
    blocks = [[numbers[name] for name in block] for block in names_by_block(model, names).values()]
    kept = [torch.ones(len(scores[name]), dtype=torch.bool) for name in names]
    for pool, most in budget.excess([len(mask) for mask in kept], AT_ONCE.total_steps):
        costs, caps = ([sizes[i] for i in pool] for sizes in (budget.costs, budget.caps))
        of_pool = [scores[names[i]].cpu() for i in pool]
        of_blocks: Sequence[Sequence[int]] = blocks if len(pool) > 1 else []
        multiple = config.rank_multiple_of
        raised = with_floor(of_pool, costs, caps, most, of_blocks, config.block_floor, multiple)
        for i, mask in zip(pool, select_groups(raised, costs, caps, most, multiple), strict=True):
            kept[i] = mask
    return dict(zip(names, kept, strict=True))
