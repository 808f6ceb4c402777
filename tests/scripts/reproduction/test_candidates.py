"""What each candidate does to a run, beside the run without it and the definitions written out."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from reproduction import candidates
from reproduction.candidates import (
    FallingRates,
    OrthonormalVectors,
    ScaledUpdates,
    UncertainScores,
    make_orthonormal,
)
from reproduction.geometry import ROWS
from support.paper import PAPER
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, SingularGroupLinear
from rankdyna_trainer.layers.singular_group import singular_group_layers
from rankdyna_trainer.method import algorithm, cutting

# They are not in the library.
pytestmark = pytest.mark.long
MakeTrainer = Callable[..., Trainer]
CONFIG = RankDynaConfig(param_ratio=0.3, rank_warmup_steps=0.2, rank_cooldown_steps=0.5)


class Watch(TrainerCallback):
    """Keeps the parameters as they are before and after the first step, and calls after each of the others."""

    def __init__(self, look: Callable[[int, nn.Module], object] = lambda step, model: None) -> None:
        self.look = look
        self.seen: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self._keep(state.global_step == 0, model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self._keep(state.global_step == 0, model)
        self.look(state.global_step + 1, model)

    def _keep(self, wanted: bool, model: nn.Module) -> None:
        if wanted:
            self.seen.append({name: p.detach().clone() for name, p in model.named_parameters()})


def test_multiple_of_one_changes_no_bit_of_the_trained_model(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    models = [copy.deepcopy(tiny_bert) for _ in range(3)]
    multiples = {"u": 1.0, "sigma": 1.0, "v": 1.0}
    kinds: list[Any] = [RankDynaCallback, partial(ScaledUpdates, multiples), partial(ScaledUpdates, {"u": 2.0})]
    for model, kind in zip(models, kinds, strict=True):
        make_trainer(model, kind(CONFIG)).train()
    defaults, same, other = (model.state_dict() for model in models)
    assert defaults.keys() == same.keys() and all(torch.equal(defaults[name], same[name]) for name in defaults)
    assert not torch.equal(defaults["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize(
    ("row", "multiples"),
    [
        ("defaults", {}),
        ("sigma at 10 times the learning rate", {"sigma": 10.0}),
        ("sigma at a tenth of the learning rate", {"sigma": 0.1}),
        ("u and v at twice the learning rate", {"u": 2.0, "v": 2.0}),
        ("u and v at half the learning rate", {"u": 0.5, "v": 0.5}),
    ],
)
def test_first_update_of_a_row_is_the_multiple_that_its_name_says(
    row: str, multiples: dict[str, float], make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    config = RankDynaConfig(param_ratio=0.3, rank_warmup_steps=5, rank_cooldown_steps=5, **PAPER)
    updates = []
    for kind in (RankDynaCallback, ROWS[row].callback):
        watch = Watch()
        make_trainer(copy.deepcopy(tiny_bert), kind(config), watch).train()
        before, after = watch.seen
        updates.append({name: (before[name], after[name] - before[name]) for name in before})
    factors = 0
    for name, (start, update) in updates[0].items():
        multiple = multiples.get(name.rpartition(".")[2], 1.0)
        factors += multiple != 1.0
        assert torch.equal(start, updates[1][name][0])
        assert update.abs().max() > 0 or "embeddings" in name or "key.bias" in name
        torch.testing.assert_close(updates[1][name][1], multiple * update, rtol=0, atol=3e-7)
    assert factors == 12 * len(multiples)


def test_a_dense_model_and_groups_that_are_cut_are_followed(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    widths: list[set[int]] = []
    watch = Watch(lambda step, model: widths.append({layer.width for layer in singular_group_layers(model).values()}))
    model = copy.deepcopy(tiny_bert)
    make_trainer(model, ScaledUpdates({"u": 2.0, "sigma": 2.0, "v": 2.0}, CONFIG), watch).train()
    assert not widths[0] and widths[2] == {32} and min(widths[-1]) < 32
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def layer_of(u: Tensor, sigma: Tensor, v: Tensor) -> tuple[SingularGroupLinear, torch.optim.Adam]:
    layer = SingularGroupLinear(u.clone(), sigma.clone(), v.clone())
    return layer, torch.optim.Adam(layer.parameters())


def test_orthonormal_vectors_keep_the_product_and_the_gradients_that_adam_has_smoothed() -> None:
    layer, adam = layer_of(torch.randn(6, 9), torch.rand(6) + 0.5, torch.randn(6, 7))
    remaining = torch.tensor([True, True, False, True, True, True])
    for factor in layer.factors().values():
        factor.data[~remaining] = 0
    layer.set_remaining(remaining)
    weight = layer.to_dense_weight().detach()
    x, target = torch.randn(20, 7), torch.randn(20, 9)

    def gradients() -> list[Tensor]:
        layer.zero_grad()
        ((layer(x) - target) ** 2).mean().backward()
        return [factor.grad.clone() for factor in layer.factors().values() if factor.grad is not None]

    for factor, gradient in zip(layer.factors().values(), gradients(), strict=True):
        adam.state[factor] = {"step": torch.tensor(1.0), "exp_avg": gradient, "exp_avg_sq": gradient**2}
    make_orthonormal(layer, adam.state)

    torch.testing.assert_close(layer.to_dense_weight(), weight, rtol=1e-5, atol=1e-6)
    u, sigma, v = (factor.detach() for factor in layer.factors().values())
    for vectors in (u, v):
        torch.testing.assert_close(vectors @ vectors.t(), torch.diag(remaining.float()), rtol=0, atol=1e-6)
    torch.testing.assert_close(sigma[remaining], torch.linalg.svdvals(weight)[:5], rtol=1e-5, atol=1e-6)
    for factor, gradient in zip(layer.factors().values(), gradients(), strict=True):
        torch.testing.assert_close(adam.state[factor]["exp_avg"], gradient, rtol=1e-4, atol=1e-6)
        assert adam.state[factor]["exp_avg_sq"].min() >= 0


def test_groups_that_are_only_in_another_order_take_all_of_their_moments_along() -> None:
    u, v = (torch.linalg.qr(torch.randn(size, 3)).Q.t().contiguous() for size in (9, 7))
    layer, adam = layer_of(u, torch.tensor([1.0, 3.0, 2.0]), v)
    moments = {}
    for name, factor in layer.factors().items():
        moments[name] = {"exp_avg": torch.randn_like(factor), "exp_avg_sq": torch.rand_like(factor)}
        adam.state[factor] = {key: value.clone() for key, value in moments[name].items()}
    # Its moments of sigma are those that follow from the moments of u.
    first, second = (
        moments["u"]["exp_avg"] / layer.sigma[:, None],
        moments["u"]["exp_avg_sq"] / layer.sigma[:, None] ** 2,
    )
    moments["sigma"] = {"exp_avg": (u * first).sum(1).detach(), "exp_avg_sq": (u**2 * second).sum(1).detach()}
    make_orthonormal(layer, adam.state)
    order = torch.tensor([1, 2, 0])
    signs = (layer.u.detach() * u[order]).sum(1).sign()
    for name, factor in layer.factors().items():
        turned = signs.view(-1, *[1] * (factor.ndim - 1)) if name != "sigma" else torch.ones(3)
        torch.testing.assert_close(adam.state[factor]["exp_avg"], turned * moments[name]["exp_avg"][order])
        torch.testing.assert_close(adam.state[factor]["exp_avg_sq"], moments[name]["exp_avg_sq"][order])


def test_layer_without_moments_is_made_orthonormal_too() -> None:
    layer, adam = layer_of(torch.randn(4, 9), torch.rand(4), torch.randn(4, 7))
    weight = layer.to_dense_weight().detach()
    make_orthonormal(layer, adam.state)
    torch.testing.assert_close(layer.to_dense_weight(), weight, rtol=1e-5, atol=1e-6)
    assert not any(adam.state.values())


def test_vectors_are_made_orthonormal_in_the_cool_down_alone(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "INTERVAL", 4)
    orthonormal: dict[int, set[bool]] = {}

    def look(step: int, model: nn.Module) -> None:
        found = [layer for layer in singular_group_layers(model).values() if layer.rank]
        orthonormal[step] = {_is_orthonormal(layer.v) and _is_orthonormal(layer.u) for layer in found}

    make_trainer(tiny_bert, OrthonormalVectors(CONFIG), Watch(look)).train()
    assert {step for step, found in orthonormal.items() if found == {True}} == {12, 16, 20}
    assert orthonormal[8] == {False}


def _is_orthonormal(vectors: Tensor) -> bool:
    vectors = vectors.detach()
    vectors = vectors[vectors.norm(dim=1) > 0]
    return bool(((vectors @ vectors.t()) - torch.eye(len(vectors))).abs().max() < 1e-5)


def test_groups_are_removed_by_scores_times_their_uncertainty(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number by number, from the scores of each step: PLATON's equations 4 to 6, for groups."""
    book: dict[SingularGroupLinear, list[tuple[float, float]]] = {}
    original_scores, original_floor, original_cut = algorithm.step_scores, algorithm.with_floor, cutting.cut_groups
    compared, cuts = [], []

    def step_scores(layers: Any, curvature: Any = None) -> list[Tensor]:
        scores = original_scores(layers, curvature)
        for layer, values in zip(layers, scores, strict=True):
            numbers = []
            for score, (mean, uncertainty) in zip(
                values.tolist(), book.get(layer, [(0.0, 0.0)] * layer.width), strict=True
            ):
                mean = CONFIG.importance_beta * mean + (1 - CONFIG.importance_beta) * score
                numbers.append((mean, 0.95 * uncertainty + 0.05 * abs(score - mean)))
            book[layer] = numbers
        return scores

    def with_floor(scores: Any, *rest: Any) -> list[Tensor]:
        for (layer, numbers), values in zip(book.items(), scores, strict=True):
            products = [mean * uncertainty for mean, uncertainty in numbers]
            expected = torch.tensor(products)[layer.remaining_on_cpu]
            torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-5 * max(products))
            compared.append(len(values))
        return original_floor(scores, *rest)

    def cut_groups(layers: Any, optimizer: Any) -> None:
        for layer in layers:
            book[layer] = [book[layer][row] for row in layer.rows_when_cut().tolist()]
            cuts.append(layer)
        original_cut(layers, optimizer)

    monkeypatch.setattr(algorithm, "step_scores", step_scores)
    monkeypatch.setattr(algorithm, "with_floor", with_floor)
    monkeypatch.setattr(cutting, "cut_groups", cut_groups)
    make_trainer(tiny_bert, UncertainScores(CONFIG), max_steps=40).train()
    assert len(compared) > 12 and len(set(cuts)) == 12 and len(cuts) > 12


class RatesOfSteps(TrainerCallback):
    """Keeps the learning rate at which each optimizer step is taken, and which the scheduler would have."""

    def __init__(self) -> None:
        self.taken, self.scheduled = list[float](), list[float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        optimizer.optimizer.register_step_pre_hook(lambda own, *_: self.taken.append(own.param_groups[0]["lr"]))

    def on_step_begin(self, args: Any, state: Any, control: Any, *, lr_scheduler: Any, **_: Any) -> None:
        self.scheduled += lr_scheduler.get_last_lr()[:1]


@pytest.mark.parametrize("scheduler", ["constant", "linear"])
def test_the_learning_rate_falls_at_each_size_but_the_last(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, scheduler: str
) -> None:
    rates = RatesOfSteps()
    config = RankDynaConfig(rank_ratio=[0.5, 0.3, 0.2], rank_warmup_steps=0.1, rank_cooldown_steps=0.45)
    make_trainer(tiny_bert, FallingRates(config), rates, lr_scheduler_type=scheduler).train()
    thirds = [1, 2 / 3, 1 / 3]
    parts = [1.0] * 5 + thirds + [1] * 3 + thirds + [1] * 6
    assert rates.taken == pytest.approx([part * rate for part, rate in zip(parts, rates.scheduled, strict=True)])
    if scheduler == "constant":
        assert set(rates.scheduled) == {1e-3}
