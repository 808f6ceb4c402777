import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Optimizer, RMSprop
from transformers.optimization import Adafactor as TransformersAdafactor

from rankdyna_trainer import SingularGroupLinear
from rankdyna_trainer.method.removal import clear_removed_groups, cut_groups, remove_groups, state_without_groups

RANK = 5
REMAINING = torch.tensor([True, False, True, True, False])
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda parameters: AdamW(parameters, lr=0.01, amsgrad=True),
    "sgd": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=0.01, momentum=0.9),
    "adagrad": lambda parameters: Adagrad(parameters, lr=0.01),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Model(nn.Module):
    """Two layers with singular groups and one without, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SingularGroupLinear(
            torch.randn(RANK, 6), torch.rand(RANK) + 0.5, torch.randn(RANK, 5), nn.Parameter(torch.randn(6))
        )
        self.second = SingularGroupLinear(torch.randn(RANK, 5), torch.rand(RANK) + 0.5, torch.randn(RANK, 6))
        self.head = nn.Linear(5, 2)
        self.double()
        for layer in (self.first, self.second):
            layer.importance.uniform_(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))).tanh())


def train(model: Model, optimizer: Optimizer, steps: int = 3, clear: bool = True) -> None:
    """Steps on the same batches in each call; the gradients of the last one may stay."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 5, generator=generator, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    if clear:
        optimizer.zero_grad()


def values_of(model: Model, optimizer: Optimizer) -> dict[str, Tensor]:
    """A copy of all tensors: parameters, gradients, buffers and the optimizer's state."""
    values = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        values[f"{name}.grad"] = parameter.grad
        values |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return {key: value.clone() for key, value in values.items() if isinstance(value, Tensor)}


@every_optimizer
def test_removal_zeroes_the_rows_of_one_layer_and_nothing_else(make: Callable[[Any], Optimizer]) -> None:
    model = Model()
    optimizer = make(model.parameters())
    train(model, optimizer, clear=False)
    before = values_of(model, optimizer)
    remove_groups(model.first, REMAINING, optimizer)
    after = values_of(model, optimizer)

    assert torch.equal(after.pop("first.remaining"), REMAINING)
    rows = 0
    for key, value in after.items():
        old = before[key]
        if key.startswith("first.") and len(value.shape) and len(value) == RANK:
            assert old[~REMAINING].any()
            assert not value[~REMAINING].any()
            value, old = value[REMAINING], old[REMAINING]
            rows += 1
        assert torch.equal(value, old), key
    states = len([v for v in optimizer.state[model.first.u].values() if isinstance(v, Tensor) and v.ndim])
    assert rows == 3 * (1 + 1 + states) + 1  # values, gradients and states of three factors, and the importance
    assert (model.first.rank, model.first.width, model.second.rank) == (3, RANK, RANK)


def test_removal_is_final() -> None:
    model = Model()
    optimizer = AdamW(model.parameters())
    remove_groups(model.first, REMAINING, optimizer)
    remove_groups(model.first, torch.tensor([True, True, False, True, True]), optimizer)
    assert model.first.remaining.tolist() == [True, False, False, True, False]
    assert model.first.rank == 2


def test_removal_before_the_first_step() -> None:
    model = Model()
    remove_groups(model.first, REMAINING, SGD(model.parameters(), lr=0.1))
    assert not model.first.u[~REMAINING].any() and model.first.u[REMAINING].all()


@every_optimizer
def test_removed_groups_stay_zero_in_training(make: Callable[[Any], Optimizer]) -> None:
    model = Model()
    optimizer = make(model.parameters())
    train(model, optimizer)
    remove_groups(model.first, REMAINING, optimizer)
    kept = model.first.u[REMAINING].clone()
    train(model, optimizer, steps=5, clear=False)
    for factor in model.first.factors().values():
        assert not factor[~REMAINING].any() and not factor.grad[~REMAINING].any()
    assert (model.first.u[REMAINING] != kept).all()


def test_clear_removed_groups() -> None:
    layer = Model().first
    layer.set_remaining(REMAINING)
    before = {name: factor.clone() for name, factor in layer.factors().items()}
    clear_removed_groups(layer)
    for name, factor in layer.factors().items():
        assert not factor[~REMAINING].any()
        assert torch.equal(factor[REMAINING], before[name][REMAINING])


@every_optimizer
def test_cut_keeps_what_remains(make: Callable[[Any], Optimizer]) -> None:
    model = Model()
    optimizer = make(model.parameters())
    train(model, optimizer)
    remove_groups(model.first, REMAINING, optimizer)
    remove_groups(model.second, torch.zeros(RANK, dtype=torch.bool), optimizer)
    before = values_of(model, optimizer)
    cut_groups([model.first, model.second], optimizer)
    after = values_of(model, optimizer)

    kept = {"first.": REMAINING, "second.": torch.arange(RANK) < 2}
    assert after.keys() == before.keys()
    for key, value in after.items():
        old = before[key]
        for prefix, mask in kept.items():
            if key.startswith(prefix) and old.ndim and len(old) == RANK:
                old = old[mask]
        assert torch.equal(value, old), key
    assert (model.first.rank, model.first.width) == (3, 3)
    assert (model.second.rank, model.second.width) == (0, 2)
    assert model.first.remaining.all() and not model.second.remaining.any()


@every_optimizer
def test_training_goes_on_as_without_the_cut(make: Callable[[Any], Optimizer]) -> None:
    model = Model()
    optimizer = make(model.parameters())
    train(model, optimizer)
    remove_groups(model.first, REMAINING, optimizer)
    remove_groups(model.second, torch.zeros(RANK, dtype=torch.bool), optimizer)
    cut_model, cut_optimizer = copy.deepcopy((model, optimizer))
    cut_groups([cut_model.first, cut_model.second], cut_optimizer)
    for trained in ((model, optimizer), (cut_model, cut_optimizer)):
        train(*trained, steps=4)

    for layer, cut in ((model.first, cut_model.first), (model.second, cut_model.second)):
        for name, factor in layer.factors().items():
            assert not cut.factors()[name][~cut.remaining].any()
            kept = cut.factors()[name][cut.remaining]
            torch.testing.assert_close(kept, factor[layer.remaining], rtol=1e-12, atol=1e-12)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(cut_model(x), model(x), rtol=1e-12, atol=1e-12)


def test_cut_keeps_the_options_of_each_group_of_parameters() -> None:
    model = Model()
    first, others = list(model.first.parameters()), [*model.second.parameters(), *model.head.parameters()]
    optimizer = AdamW([{"params": first, "lr": 0.5, "weight_decay": 0.25}, {"params": others}], lr=0.125)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, steps=1)
    groups = list(optimizer.param_groups)
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    remove_groups(model.first, REMAINING, optimizer)
    cut_groups([model.first], optimizer)

    assert all(new is old for new, old in zip(optimizer.param_groups, groups, strict=True))
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == options
    layer = model.first
    held = [[id(parameter) for parameter in group["params"]] for group in groups]
    # The order of the parameters is what a saved state of the optimizer refers to.
    assert held == [[id(p) for p in (layer.u, layer.sigma, layer.v, layer.bias)], [id(p) for p in others]]
    assert set(optimizer.state) == set(model.parameters())
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.0625]


def test_cut_optimizer_can_be_saved_and_loaded() -> None:
    model = Model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    remove_groups(model.first, REMAINING, optimizer)
    cut_groups([model.first], optimizer)
    resumed = Model()
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = AdamW(resumed.parameters(), lr=0.01)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained in ((model, optimizer), (resumed, resumed_optimizer)):
        train(*trained, steps=2)
    for parameter, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_cut_survives_a_kept_loss() -> None:
    """A parameter that is resized in place stops the next backward pass, as long as the old graph is alive."""
    model = Model()
    optimizer = AdamW(model.parameters())
    kept_loss = model(torch.randn(3, 5, dtype=torch.float64)).sum()
    kept_loss.backward()
    optimizer.step()
    remove_groups(model.first, REMAINING, optimizer)
    cut_groups([model.first], optimizer)
    optimizer.zero_grad()
    model(torch.randn(3, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert kept_loss.grad_fn is not None
    assert model.first.u.grad.shape == model.first.u.shape == (3, 6)


def test_cut_keeps_frozen_factors_frozen() -> None:
    model = Model()
    model.first.sigma.requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1)
    remove_groups(model.first, REMAINING, optimizer)
    cut_groups([model.first], optimizer)
    assert not model.first.sigma.requires_grad
    assert model.first.u.requires_grad


@every_optimizer
def test_an_optimizer_that_has_state_for_each_number_can_be_cut(make: Callable[[Any], Optimizer]) -> None:
    model = Model()
    optimizer = make(model.parameters())
    assert state_without_groups([model.first], optimizer) is None
    train(model, optimizer, steps=1)
    assert state_without_groups([model.first], optimizer) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: Adafactor(parameters, lr=0.01),
        lambda parameters: TransformersAdafactor(parameters, lr=0.01, scale_parameter=False, relative_step=False),
    ],
    ids=["torch", "transformers"],
)
def test_an_optimizer_whose_state_is_factored_cannot_be_cut(make: Callable[[Any], Optimizer]) -> None:
    model = Model()
    optimizer = make(model.parameters())
    train(model, optimizer, steps=2)
    assert state_without_groups([model.first], optimizer) in ("row_var", "exp_avg_sq_row")
    before = {key: value.clone() for key, value in optimizer.state[model.first.u].items() if isinstance(value, Tensor)}
    remove_groups(model.first, REMAINING, optimizer)
    for key, value in before.items():
        assert torch.equal(optimizer.state[model.first.u][key], value)

    train(model, optimizer, steps=3)
    clear_removed_groups(model.first)
    assert not any(factor[~REMAINING].any() for factor in model.first.factors().values())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("value", [torch.zeros(RANK, 1), [torch.zeros(RANK)], {"a": 1}, torch.zeros(7)])
def test_one_state_without_groups_is_found(value: object) -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, steps=1)
    optimizer.state[model.second.v]["preconditioner"] = value
    assert state_without_groups([model.first], optimizer) is None
    assert state_without_groups([model.first, model.second], optimizer) == "preconditioner"


def test_a_quantized_state_cannot_be_cut() -> None:
    class Quantized(Tensor):
        pass

    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.state[model.first.u]["state"] = torch.zeros_like(model.first.u).as_subclass(Quantized)
    assert state_without_groups([model.first], optimizer) == "state"


@pytest.mark.parametrize("rank", [0, 1])
def test_layers_of_rank_zero_and_one_can_be_cut(rank: int) -> None:
    model = Model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    remaining = torch.arange(RANK) < rank
    for _ in range(2):  # the second time there is nothing left to cut
        remove_groups(model.first, remaining, optimizer)
        assert state_without_groups([model.first], optimizer) is None
        cut_groups([model.first], optimizer)
        assert (model.first.width, model.first.rank) == (2, rank)
        remaining = model.first.remaining
        train(model, optimizer)
