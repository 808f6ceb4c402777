"""What a step costs: operations that follow the remaining groups, nothing large allocated, no device waited for."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.reference_network import build_dense, make_batches
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rankdyna_trainer import RankDyna, RankDynaConfig, inject_singular_groups
from rankdyna_trainer.layers.singular_group import SingularGroupLinear
from rankdyna_trainer.method import importance
from rankdyna_trainer.method.cutting import GroupCutting

STEPS = 30
BATCH = 16


def flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch)["loss"].backward()
    model.zero_grad()
    return counter.get_total_flops()


def promised_flops(layer: SingularGroupLinear) -> int:
    """Of a forward pass on a batch, by the rank alone."""
    numbers, group = layer.dense_parameters, layer.group_parameters
    return 2 * min(BATCH * layer.rank * group, (layer.rank + BATCH) * numbers)


@pytest.mark.parametrize("make", [AdamW, Adafactor])
@pytest.mark.parametrize("cut", [True, False])
def test_removed_groups_leave_the_computation_at_once(cut: bool, make: Callable[[Any], Optimizer]) -> None:
    config = RankDynaConfig(rank_ratio=0.1, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)
    model = inject_singular_groups(build_dense(0), config)
    rankdyna = RankDyna(model, config, make(model.parameters()), STEPS)
    if not cut:
        rankdyna._cutting._state_has_groups = False  # as under DDP
    batches = make_batches(1, STEPS, BATCH)
    rest = 0
    for step, batch in enumerate(batches, start=1):
        with FlopCounterMode(display=False) as counter:
            loss = model(**batch)["loss"]
        forward = counter.get_total_flops()
        if step == 1:
            rest = forward - sum(map(promised_flops, rankdyna.layers))
        assert forward == rest + sum(map(promised_flops, rankdyna.layers))
        loss.backward()
        rankdyna.update_importance()
        rankdyna.optimizer.step()
        rankdyna.enforce_budget(step)
        rankdyna.optimizer.zero_grad()
    assert forward - rest < 0.2 * flops(inject_singular_groups(build_dense(0), config), batches[0]) / 3
    in_tensors = any(layer.width > max(layer.rank, 2) for layer in rankdyna.layers)
    assert in_tensors == (not cut or make is Adafactor)


def test_gradients_without_the_removed_groups_are_those_with_them() -> None:
    config = RankDynaConfig(rank_ratio=0.5, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)
    model = inject_singular_groups(build_dense(0), config)
    for layer in (module for module in model.modules() if isinstance(module, SingularGroupLinear)):
        remaining = torch.arange(layer.width) % 3 == 0
        for factor in layer.factors().values():
            factor.data[~remaining] = 0
        layer.set_remaining(remaining)
    all_rows = copy.deepcopy(model)
    for layer in (module for module in model.modules() if isinstance(module, SingularGroupLinear)):
        layer.leave_out_removed()
    batch = make_batches(1, 1, BATCH)[0]
    assert flops(model, batch) < flops(all_rows, batch)
    for each in (model, all_rows):
        each(**batch)["loss"].backward()
    for one, other in zip(model.parameters(), all_rows.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-14)


class Watch(TorchDispatchMode):
    """Notes each operation that waits for the device, and the largest new tensor."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.WAITING:
            self.waiting.append(func.overloadpacket.__name__)
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.numel())
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


@pytest.mark.parametrize("make", [AdamW, Adafactor])
@pytest.mark.parametrize("score", ["first_order", "second_order", "fisher"])
def test_a_step_waits_for_the_device_only_to_remove(score: str, make: Callable[[Any], Optimizer]) -> None:
    config = RankDynaConfig(
        rank_ratio=0.2, importance_score=score, rank_update_interval=4, rank_warmup_steps=0.1, rank_cooldown_steps=0.4
    )
    model = inject_singular_groups(build_dense(0), config)
    rankdyna = RankDyna(model, config, make(model.parameters()), STEPS)
    before = rankdyna.remaining_groups
    waited = []
    for step, batch in enumerate(make_batches(1, STEPS), start=1):
        with Watch() as watch:
            loss = model(**batch)["loss"]
        assert watch.waiting == []
        loss.backward()
        with Watch() as watch:
            rankdyna.update_importance()
        assert watch.waiting == []
        rankdyna.optimizer.step()
        with Watch() as watch:
            rankdyna.enforce_budget(step)
        removed, before = before - rankdyna.remaining_groups, rankdyna.remaining_groups
        if watch.waiting:
            waited.append(step)
        assert bool(watch.waiting) == (removed > 0)
        rankdyna.optimizer.zero_grad()
    assert waited == [4, 8, 12, 16, 18]


@pytest.mark.parametrize("score", ["first_order", "fisher"])
@pytest.mark.parametrize("kind", ["rank_ratio", "param_ratio"])
def test_nothing_of_the_size_of_a_weight_is_allocated(kind: str, score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "NUMBERS_AT_ONCE", 2000)
    config = RankDynaConfig(
        **{kind: 0.2},
        importance_score=score,
        target_modules="all-linear",
        rank_warmup_steps=0.1,
        rank_cooldown_steps=0.4,
    )
    model = inject_singular_groups(nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 80)), config)
    rankdyna = RankDyna(model, config, AdamW(model.parameters()), STEPS)
    largest = 0
    for step in range(1, STEPS + 1):
        model(torch.randn(4, 96)).square().mean().backward()
        with Watch() as watch:
            rankdyna.update_importance()
        largest = max(largest, watch.largest)
        rankdyna.optimizer.step()
        rankdyna._cutting._state_has_groups = False  # a cut makes new, smaller parameters
        with Watch() as watch:
            rankdyna.enforce_budget(step)
        largest = max(largest, watch.largest)
        rankdyna.optimizer.zero_grad()
    assert rankdyna.meets_final_budget
    assert largest < 64 * 80


def naive_forward(layer: SingularGroupLinear, x: Tensor) -> Tensor:
    return nn.functional.linear((x @ layer.v.t()) * layer.sigma, layer.u.t(), layer.bias)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("off", "kind"),
    [
        (["cuts"], "rank_ratio"),
        (["leaving out"], "param_ratio"),
        (["cheaper forward"], "rank_ratio"),
        (["cuts", "leaving out", "cheaper forward"], "param_ratio"),
        pytest.param(["cuts"], "param_ratio", marks=pytest.mark.long),
        pytest.param(["leaving out"], "rank_ratio", marks=pytest.mark.long),
        pytest.param(["cheaper forward"], "param_ratio", marks=pytest.mark.long),
        pytest.param(["cuts", "leaving out", "cheaper forward"], "rank_ratio", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_same_ranks_and_weights_with_each_optimization_off(
    off: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RankDynaConfig(**{kind: 0.2}, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)
    ends = []
    for naive in (False, True):
        with monkeypatch.context() as patch:
            if naive and "cuts" in off:
                patch.setattr(GroupCutting, "cut", lambda *_, **__: None)
            if naive and "leaving out" in off:
                patch.setattr(SingularGroupLinear, "leave_out_removed", lambda self: None)
            if naive and "cheaper forward" in off:
                patch.setattr(SingularGroupLinear, "forward", naive_forward)
            model = inject_singular_groups(build_dense(0).float(), config)
            rankdyna = RankDyna(model, config, AdamW(model.parameters(), lr=0.005), STEPS)
            ranks = []
            cost = 0
            for step, batch in enumerate(make_batches(1, STEPS, BATCH), start=1):
                with FlopCounterMode(display=False) as counter:
                    model(x=batch["x"].float(), labels=batch["labels"])["loss"].backward()
                cost += counter.get_total_flops()
                rankdyna.update_importance()
                rankdyna.optimizer.step()
                rankdyna.enforce_budget(step)
                rankdyna.optimizer.zero_grad()
                ranks.append([layer.rank for layer in rankdyna.layers])
            rows = sum(layer.width for layer in rankdyna.layers)
            ends.append((ranks, [layer.to_dense_weight() for layer in rankdyna.layers], (cost, rows)))
    (ranks, weights, price), (naive_ranks, naive_weights, naive_price) = ends
    assert ranks == naive_ranks and price != naive_price
    for weight, naive_weight in zip(weights, naive_weights, strict=True):
        torch.testing.assert_close(weight, naive_weight, rtol=0, atol=2e-6)
