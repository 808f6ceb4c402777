"""What a run holds on the card after the final budget."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

STEPS = 10
MEGABYTE = 2**20


class Allocated(TrainerCallback):
    """Of the last step, in bytes: what is held before the optimizer's step, and the most that is ever held."""

    held = peak = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEPS - 1:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.held = torch.cuda.memory_allocated()  # parameters, gradients and the optimizer's state

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.peak = torch.cuda.max_memory_allocated()


@pytest.fixture
def measure(
    device: torch.device, make_trainer: Callable[..., Trainer]
) -> Iterator[Callable[..., tuple[float, float]]]:
    # cuBLAS keeps a workspace from its first product on, forward and backward.
    x = torch.ones(64, 64, device=device, requires_grad=True)
    (x @ x).sum().backward()

    def megabytes(*callbacks: TrainerCallback) -> tuple[float, float]:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8}
        model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))
        allocated = Allocated()
        make_trainer(model, *callbacks, allocated, max_steps=STEPS).train()
        return (allocated.held - before) / MEGABYTE, (allocated.peak - before) / MEGABYTE

    yield megabytes
    gc.collect()
    torch.cuda.empty_cache()


def test_a_compressed_run_ends_with_less_than_half_of_the_memory(
    measure: Callable[..., tuple[float, float]],
) -> None:
    """A fifth of the target layers' parameters, and all of a small rest."""
    dense = measure()
    for basis in (None, "weights"):
        config = RankDynaConfig(param_ratio=0.2, group_basis=basis, rank_warmup_steps=3, rank_cooldown_steps=4)
        compressed = measure(RankDynaCallback(config))
        numbers = f"held and peak in MB: dense {dense}, with group_basis={basis} {compressed}"
        print(numbers)
        assert 0 < compressed[0] < 0.5 * dense[0] and 0 < compressed[1] < 0.6 * dense[1], numbers
