"""Against the gradients of each example by itself, in float64."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from support.reference_network import build_dense, make_batches
from torch import Tensor, nn
from torch.optim import AdamW

from rankdyna_trainer import RankDyna, RankDynaConfig, compact, inject_singular_groups
from rankdyna_trainer.layers.hooks import release
from rankdyna_trainer.layers.singular_group import SingularGroupLinear
from rankdyna_trainer.method import group_fisher
from rankdyna_trainer.method.group_fisher import GroupFisher, squared_gradients

STEPS = 15
CONFIG = RankDynaConfig(rank_ratio=0.2, importance_score="fisher", rank_warmup_steps=0.1, rank_cooldown_steps=0.4)


def layers_of(model: nn.Module) -> list[SingularGroupLinear]:
    return [module for module in model.modules() if isinstance(module, SingularGroupLinear)]


def brute_force(model: nn.Module, losses: Callable[[nn.Module], list[Tensor]]) -> list[Tensor]:
    """Eq. 13 and 9: `losses` gives each example's own loss."""
    model = copy.deepcopy(model)
    layers = layers_of(model)
    sums = [torch.zeros(layer.width, dtype=torch.float64) for layer in layers]
    each = losses(model)
    for loss in each:
        for total, layer in zip(sums, layers, strict=True):
            for factor in layer.factors().values():
                (gradient,) = torch.autograd.grad(loss, factor, retain_graph=True, materialize_grads=True)
                total += gradient.double().square().unsqueeze(-1).flatten(1).sum(1) / len(each)
    return sums


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other.float())


class Sequences(nn.Module):
    """Two layers over the tokens of `x (examples, tokens, 8)`, and a loss of each example."""

    def __init__(self, inner: int = 12) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, inner).double(), nn.Linear(inner, 6).double()

    def losses(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x)))).square().sum(2).cumsum(1).mean(1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.losses(x).mean()}


def sequences(inner: int = 12) -> Sequences:
    model = Sequences(inner)
    inject_singular_groups(model, RankDynaConfig(rank_ratio=1.0, target_modules="all-linear"))
    return model


@pytest.mark.parametrize("block", [1, 500, 2**21])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("inner", [2, 12])
def test_mean_over_the_examples_of_their_squared_gradients(
    inner: int, tokens: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_fisher, "NUMBERS_AT_ONCE", block)
    model = sequences(inner)
    fisher = GroupFisher(layers_of(model))
    x = torch.randn(5, tokens, 8, dtype=torch.float64)
    model(x)["loss"].backward()
    assert_close(fisher.take(), brute_force(model, lambda copy: list(copy.losses(x))))
    assert all(not scores.any() for scores in fisher.take())


def test_more_dimensions_and_a_single_vector() -> None:
    u, sigma, v = (torch.randn(4, *size, dtype=torch.float64) for size in ((5,), (), (6,)))
    for shape in ((3, 2, 4), (3, 1), (3,), ()):
        x, gradient = (torch.randn(*shape, size, dtype=torch.float64) for size in (6, 5))
        layer = SingularGroupLinear(u.clone(), sigma.clone(), v.clone())
        expected = torch.zeros(4, dtype=torch.float64)
        for one, direction in zip(x, gradient, strict=True) if shape else [(x, gradient)]:
            layer.zero_grad()
            (layer(one) * direction).sum().backward()
            expected += sum(f.grad.square().unsqueeze(-1).flatten(1).sum(1) for f in layer.factors().values())
        torch.testing.assert_close(squared_gradients(u, sigma, v, x, gradient), expected)


def test_nothing_to_add() -> None:
    u, sigma, v, x, gradient = (torch.randn(*size) for size in ((4, 5), (4,), (4, 6), (3, 2, 6), (3, 2, 5)))
    assert torch.equal(squared_gradients(u, sigma, v, x[:0], gradient[:0]), torch.zeros(4))
    assert squared_gradients(u[:0], sigma[:0], v[:0], x, gradient).shape == (0,)


def test_accumulation_is_one_batch() -> None:
    model = sequences()
    fisher = GroupFisher(layers_of(model))
    x = torch.randn(12, 3, 8, dtype=torch.float64)
    for part in x.split(4):
        (model(part)["loss"] / 3).backward()
    assert_close(fisher.take(), brute_force(model, lambda copy: list(copy.losses(x))))


def test_only_training_forwards_with_a_backward_pass_count() -> None:
    model = sequences()
    fisher = GroupFisher(layers_of(model))
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    model(x)["loss"].backward()
    model(x)
    with torch.no_grad():
        model(x)
    model.eval()(x)["loss"].backward()
    assert_close(fisher.take(), brute_force(model, lambda copy: list(copy.losses(x))))


def test_an_output_that_is_changed_in_place() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(inplace=True), nn.Linear(12, 6)).double()
    inject_singular_groups(model, RankDynaConfig(rank_ratio=1.0, target_modules="all-linear"))
    fisher = GroupFisher(layers_of(model))
    x = torch.randn(5, 8, dtype=torch.float64)
    model(x).square().mean().backward()
    assert_close(fisher.take(), brute_force(model, lambda copy: [copy(row).square().mean() for row in x]))


@pytest.mark.parametrize("cut", [True, pytest.param(False, marks=pytest.mark.long)])
def test_through_a_run_with_removals(cut: bool) -> None:
    """The smoothed scores of the remaining groups, at each step, beside a model without hooks."""
    model = inject_singular_groups(build_dense(0), CONFIG)
    rankdyna = RankDyna(model, CONFIG, AdamW(model.parameters(), lr=0.005), STEPS)
    if not cut:
        rankdyna._cutting._state_has_groups = False  # as under DDP
    widths = set()
    for step, batch in enumerate(make_batches(1, STEPS), start=1):
        before = [layer.importance.clone() for layer in rankdyna.layers]

        def losses(copy: nn.Module, batch: dict[str, Tensor] = batch) -> list[Tensor]:
            return list(nn.functional.cross_entropy(copy(batch["x"])["logits"], batch["labels"], reduction="none"))

        expected = brute_force(model, losses)
        model(**batch)["loss"].backward()
        rankdyna.update_importance()
        for layer, old, scores in zip(rankdyna.layers, before, expected, strict=True):
            torch.testing.assert_close(layer.importance, 0.85 * old + 0.15 * scores.float())
            assert not layer.importance[~layer.remaining].any()
        rankdyna.optimizer.step()
        rankdyna.enforce_budget(step)
        rankdyna.optimizer.zero_grad()
        widths.add(sum(layer.width for layer in rankdyna.layers))
    assert (len(widths) > 1) == cut and rankdyna.meets_final_budget


def test_gradients_are_those_without_it() -> None:
    model = sequences()
    plain = copy.deepcopy(model)
    GroupFisher(layers_of(model))
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    for each in (model, plain):
        each(x)["loss"].backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_no_trace_is_left() -> None:
    model = inject_singular_groups(build_dense(0), CONFIG)
    optimizer = AdamW(model.parameters())
    first = RankDyna(model, CONFIG, optimizer, STEPS)
    second = RankDyna(model, CONFIG, optimizer, STEPS)
    batch = make_batches(1, 1)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(**batch)["loss"].backward()
        assert not any(scores.any() for scores in second._curvature.take())
    model(**batch)["loss"].backward()
    assert not any(scores.any() for scores in first._curvature.take())
    assert all(len(layer._forward_hooks) == 1 for layer in layers_of(model))
    second.finish(STEPS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    model = inject_singular_groups(build_dense(0), CONFIG)
    RankDyna(model, CONFIG, AdamW(model.parameters()), STEPS)
    kept = layers_of(model)[0].register_forward_hook(lambda *_: None)
    release(model)
    assert list(layers_of(model)[0]._forward_hooks) == [kept.id]
    compact(model)


def test_a_compiled_model_is_refused() -> None:
    model = inject_singular_groups(build_dense(0), CONFIG)
    with pytest.raises(ValueError, match=r'importance_score="fisher" cannot be used with torch\.compile'):
        RankDyna(model, CONFIG, AdamW(model.parameters()), STEPS, compiled=True)
