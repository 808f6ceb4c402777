"""What is refused before the first step, since it cannot end well."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.reference_network import build_dense

from rankdyna_trainer import RankDyna, RankDynaConfig, inject_singular_groups
from rankdyna_trainer.method.allocation import select_groups
from rankdyna_trainer.method.budget import RankBudget
from rankdyna_trainer.method.schedule import RankBudgetSchedule


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (
            {"param_ratio": 0.001},
            r"param_ratio=0\.001 would leave at most 0 of the 1 parameters that are asked for, in 8",
        ),
        (
            {"rank_ratio": 0.3, "rank_multiple_of": 64},
            r"rank_ratio=0\.3 and rank_multiple_of=64 would leave at most 0 of",
        ),
        (
            {"rank_ratio": 0.2, "rank_multiple_of": 8, "rank_scope": "local"},
            r"and rank_scope=.local. would leave at most 0 of .*or a smaller rank_multiple_of, or rank_scope=.global.",
        ),
    ],
)
def test_a_run_that_would_empty_the_model_is_refused(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config = RankDynaConfig(**choices, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)
        model = inject_singular_groups(build_dense(0), config)
        RankDyna(model, config, torch.optim.AdamW(model.parameters()), total_steps=30)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(1, 6),
    st.sampled_from(["global", "local"]),
    st.sampled_from(["rank_ratio", "param_ratio"]),
    st.floats(0.05, 0.9),
    st.integers(0, 99),
)
def test_no_choice_keeps_more_than_is_usable_and_none_keeps_nothing_unless_it_must(
    shapes: list[tuple[int, int]], multiple: int, scope: str, ratio: str, value: float, seed: int
) -> None:
    config = RankDynaConfig(**{ratio: value}, rank_multiple_of=multiple, rank_scope=scope)
    ranks = [min(shape) for shape in shapes]
    budget = RankBudget(config, RankBudgetSchedule(0, 0, 1), shapes, ranks)
    usable = budget.usable(ranks, multiple)
    generator = torch.Generator().manual_seed(seed)
    kept = 0
    for pool, allowed in budget.excess(ranks, 1):
        costs, caps = ([sizes[i] for i in pool] for sizes in (budget.costs, budget.caps))
        masks = select_groups(
            [torch.rand(ranks[i], generator=generator) for i in pool], costs, caps, allowed, multiple
        )
        kept += sum(min(int(mask.sum()) * c, cap) for mask, c, cap in zip(masks, costs, caps, strict=True))
    untouched = set(range(len(shapes))) - {i for pool, _ in budget.excess(ranks, 1) for i in pool}
    kept += sum(budget.caps[i] for i in untouched)
    assert kept <= usable and (kept == 0) == (usable == 0)
