"""
What each importance score costs: the time of a training step over that with `first_order`, in turns on one thread.

    python scripts/checks/score_costs.py
"""

import time
from collections.abc import Callable
from statistics import median
from typing import get_args

import torch
from torch.optim import AdamW
from transformers import BertConfig, BertForSequenceClassification

from rankdyna_trainer import RankDyna, RankDynaConfig, inject_singular_groups
from rankdyna_trainer.config import ImportanceScore

RANK_RATIO = 0.2
BATCH_SIZE, TOKENS = 16, 32


def main() -> None:
    torch.set_num_threads(1)
    for at_once in (False, True):
        times = step_times(
            BertConfig(hidden_size=384, num_hidden_layers=3, num_attention_heads=6, intermediate_size=1536), at_once
        )
        ratios = {score: f"{seconds / times['first_order']:.2f}" for score, seconds in times.items()}
        print(f"rank ratio {RANK_RATIO if at_once else 1.0}: {ratios}", flush=True)


def step_times(config: BertConfig, at_once: bool, rounds: int = 12) -> dict[str, float]:
    """
    The median of a step's seconds for each score.

    Args:
        config: of the model, with random weights.
        at_once: the groups are removed before the steps that are timed, instead of after them.
        rounds: how many steps to time of each score, after four that are not.
    """
    steps = {score: training(config, score, at_once, rounds + 20) for score in get_args(ImportanceScore)}
    times: dict[str, list[float]] = {score: [] for score in steps}
    for _ in range(4 + rounds):
        for score, step in steps.items():
            start = time.perf_counter()
            step()
            times[score].append(time.perf_counter() - start)
    return {score: median(seconds[4:]) for score, seconds in times.items()}


def training(config: BertConfig, score: ImportanceScore, at_once: bool, steps: int) -> Callable[[], None]:
    """A training of so many steps, one at each call."""
    torch.manual_seed(0)
    warmup, cooldown = (1, steps - 3) if at_once else (steps - 3, 1)
    settings = RankDynaConfig(
        rank_ratio=RANK_RATIO, importance_score=score, rank_warmup_steps=warmup, rank_cooldown_steps=cooldown
    )
    model = inject_singular_groups(BertForSequenceClassification(config), settings).train()
    optimizer = AdamW(model.parameters(), lr=1e-4)
    rankdyna = RankDyna(model, settings, optimizer, steps)
    batch = {
        "input_ids": torch.randint(config.vocab_size, (BATCH_SIZE, TOKENS)),
        "labels": torch.randint(2, (BATCH_SIZE,)),
    }
    numbers = iter(range(1, steps + 1))

    def step() -> None:
        model(**batch).loss.backward()
        rankdyna.update_importance()
        optimizer.step()
        rankdyna.enforce_budget(next(numbers))
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
