"""What a step of training holds: told by shapes, beside what one with values holds."""

import pytest
import torch
from support.oldest import WITHOUT_VALUES
from tasks import tiny_tasks
from torch import nn
from transformers import PreTrainedModel

from rankdyna_trainer import RankDynaConfig, inject_singular_groups
from rankdyna_trainer.checkpoint.empty_model import empty_model
from rankdyna_trainer.layers.injection import inject_without_values
from rankdyna_trainer.report.random_inputs import random_inputs
from rankdyna_trainer.report.training_memory import checkpoint_activations, training_memory


class Network(nn.Module):
    """Two layers of which the activations are counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 100, bias=False)
        self.second = nn.Linear(100, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_network_that_is_counted_by_hand(frozen: bool) -> None:
    with torch.device("meta"):
        model, x = Network(), torch.randn(1000, 10)
    model.first.requires_grad_(not frozen)
    found = training_memory(model, {"x": x}, 2.0)
    weights, trained = 4 * (10 * 100 + 100 * 2), 4 * (100 * 2 if frozen else 10 * 100 + 100 * 2)
    assert (found.weights, found.gradients, found.optimizer) == (weights, trained, trained // 2)
    hidden, logits = 4 * 1000 * 100, 4 * 1000 * 2
    # Both what enters tanh and what leaves it are there while tanh is computed; then only the latter is kept. In the
    # backward pass, which goes to the first layer if that is trained, it is there with its gradient.
    most = 2 * hidden if frozen else 2 * hidden + hidden
    assert most <= found.step < most + 8 * logits + trained
    assert found.peak == found.weights + found.optimizer + found.step


def held_by_training(model: PreTrainedModel) -> tuple[int, int, int]:
    """Bytes of the weights, gradients and moments after a step with values."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sum(
        output.sum() for output in model(**random_inputs(model, 2, 8)).to_tuple() if isinstance(output, torch.Tensor)
    ).backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    held = [*model.parameters(), *model.buffers()]
    return tuple(sum(tensor.nbytes for tensor in tensors) for tensors in (held, gradients, moments))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["gpt2", *(pytest.param(kind, marks=WITHOUT_VALUES) for kind in ("llama", "bert"))])
@pytest.mark.parametrize("start_ratio", [None, 1.0, 0.7])
def test_groups_without_values_hold_what_those_with_values_hold(kind: str, start_ratio: float | None) -> None:
    config = RankDynaConfig(param_ratio=0.3, start_ratio=start_ratio)
    real = inject_singular_groups(tiny_tasks.model(kind), config).train()
    real.config.architectures = [type(real).__name__]
    empty = inject_without_values(empty_model(real.config), config).train()
    found = training_memory(empty, random_inputs(empty, 2, 8))
    assert (found.weights, found.gradients, found.optimizer) == held_by_training(real)  # type: ignore[arg-type]


@WITHOUT_VALUES
def test_checkpointed_blocks_keep_less_and_half_of_the_rows_half() -> None:
    def step(rows: int, checkpointing: bool = False) -> int:
        config = tiny_tasks.model("llama").config
        config.num_hidden_layers = 8
        model = empty_model(config).train()
        if checkpointing:
            checkpoint_activations(model)
        found = training_memory(model, random_inputs(model, rows, 16))
        return found.step - found.gradients

    assert step(64, checkpointing=True) < 0.6 * step(64)
    assert step(128) == pytest.approx(2 * step(64), rel=0.05)


@WITHOUT_VALUES
def test_groups_of_no_more_numbers_than_the_weights_take_no_more_memory() -> None:
    config = tiny_tasks.model("llama").config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 512, 8
    config.max_position_embeddings = 512
    dense = empty_model(config).train()
    peaks = [training_memory(dense, random_inputs(dense, 1, 512)).peak]
    for start_ratio in (1.0, None):
        groups = inject_without_values(
            empty_model(config).train(), RankDynaConfig(param_ratio=0.3, start_ratio=start_ratio)
        )
        peaks.append(training_memory(groups, random_inputs(groups, 1, 512)).peak)
    assert peaks[1] <= peaks[0] < peaks[2]
