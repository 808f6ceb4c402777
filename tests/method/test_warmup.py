"""A warm-up that ends when the loss tells, in a loop of one's own."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.networks import layers_of
from support.reference_network import build_dense, make_batches
from torch import distributed, nn
from torch.optim import AdamW

from rankdyna_trainer import RankDyna, RankDynaConfig, inject_singular_groups
from rankdyna_trainer.layers.singular_group import singular_group_layers
from rankdyna_trainer.method.schedule import RankBudgetSchedule

STEPS = 40  # the loss is looked at after each
BATCHES = make_batches(1, STEPS)
# It has fallen at step 12, and is flat at step 15.
LOSSES = [3.0] * 8 + [2.5, 2.0, 1.5, 1.0] + [1.0] * 28
FLAT = 15


class Told(nn.Module):
    """A network with the loss of a list: its gradients are scaled to it."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.network = build_dense(0)
        self.losses = losses

    def forward(self, step: int, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = self.network(**batch)["loss"]
        return {"loss": loss * self.losses[step - 1] / loss.detach()}


def config(basis: str = "weights", **options: Any) -> RankDynaConfig:
    return RankDynaConfig(rank_ratio=0.2, rank_warmup_steps="auto", group_basis=basis, **options)


class FineTuned(Told):
    """The same, as `from_pretrained` gives a model that came with all of its weights."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__(losses)
        self.config = SimpleNamespace(architectures=[type(self).__name__])


class Run:
    """A run from its first step, or from that of another one."""

    def __init__(
        self, options: RankDynaConfig, losses: list[float], first: "Run | None" = None, of: type[Told] = Told
    ) -> None:
        self.model: Any = of(losses) if first is None else first.model
        self.done = 0 if first is None else first.done
        if options.group_basis == "weights" and first is None:
            inject_singular_groups(self.model, options)
        self.optimizer = AdamW(self.model.parameters(), lr=0.003) if first is None else first.optimizer
        rows = [{"step": 1} | batch for batch in make_batches(2, 4)] if options.group_basis == "activations" else None
        self.rankdyna = RankDyna(self.model, options, self.optimizer, STEPS, self.done, batches=rows)
        if first is not None:
            self.rankdyna.load_state_dict(json.loads(json.dumps(first.rankdyna.state_dict())))

    def train(self, last: int) -> list[tuple[bool, int]]:
        """Until this step: whether the run learns yet, and how many groups there are."""
        seen = []
        for step in range(self.done + 1, last + 1):
            self.model(step, **BATCHES[step - 1])["loss"].backward()
            self.rankdyna.update_importance()
            self.optimizer.step()
            self.rankdyna.enforce_budget(step)
            self.optimizer.zero_grad()
            seen.append((self.rankdyna.learning, self.rankdyna.remaining_groups))
        self.done = last
        return seen


def test_the_warm_up_ends_when_the_loss_is_flat() -> None:
    run = Run(config(), LOSSES)
    assert run.rankdyna.schedule == RankBudgetSchedule(20, 12, 40)  # as long as the loss may take
    seen = run.train(STEPS)
    assert [learning for learning, _ in seen] == [True] * (FLAT - 1) + [False] * (STEPS - FLAT + 1)
    # Of the 25 steps after it 0.6 are at the final budget.
    assert run.rankdyna.schedule == RankBudgetSchedule(FLAT, 15, 40)
    initial = sum(run.rankdyna.initial_ranks)
    assert [groups for _, groups in seen[:FLAT]] == [initial] * FLAT and seen[FLAT][1] < initial
    assert seen[25][1] == seen[-1][1] == run.rankdyna.budget(STEPS)


def test_groups_of_the_inputs_are_made_then_and_scored_before_the_first_removal() -> None:
    run = Run(config("activations", importance_beta=0.5), LOSSES)  # scores are means over 2 steps
    run.train(FLAT - 1)
    assert not layers_of(run.model)
    run.train(FLAT)
    assert layers_of(run.model) and run.rankdyna.schedule.warmup_steps == FLAT + 2
    initial = sum(run.rankdyna.initial_ranks)
    assert [groups for _, groups in run.train(FLAT + 2)] == [initial] * 2
    assert run.train(FLAT + 3)[0][1] < initial


@pytest.mark.parametrize("basis", ["weights", "activations"])
def test_a_loss_that_does_not_fall_is_waited_for_until_half_of_the_run(basis: str) -> None:
    run = Run(config(basis), [3.0] * STEPS)
    seen = run.train(STEPS)
    assert run.rankdyna.schedule == RankBudgetSchedule(20, 12, 40)
    initial = sum(run.rankdyna.initial_ranks)
    assert [groups for _, groups in seen[:20]] == [initial] * 20 and seen[20][1] < initial
    assert seen[-1][1] == run.rankdyna.budget(STEPS)


def test_a_cooldown_in_steps_is_kept() -> None:
    run = Run(config(rank_cooldown_steps=30), LOSSES)
    assert run.rankdyna.schedule == RankBudgetSchedule(9, 30, 40)
    run.train(STEPS)
    assert run.rankdyna.schedule == RankBudgetSchedule(9, 30, 40)
    with pytest.raises(ValueError, match="no step to fall in"):
        Run(config(rank_cooldown_steps=40), LOSSES)


@pytest.mark.parametrize("basis", ["weights", "activations"])
def test_a_run_goes_on_from_its_state(basis: str) -> None:
    options = config(basis, importance_beta=0.5)
    whole = Run(options, LOSSES)
    whole.train(STEPS)
    for stop in (1, 9, FLAT - 1, FLAT, FLAT + 1, FLAT + 2, 30):
        first = Run(options, LOSSES)
        first.train(stop)
        second = Run(options, LOSSES, first)
        second.train(STEPS)
        assert second.rankdyna.schedule == whole.rankdyna.schedule, stop
        expected, got = whole.model.state_dict(), second.model.state_dict()
        assert expected.keys() == got.keys() and all(torch.equal(got[name], value) for name, value in expected.items())


def test_evaluations_do_not_count() -> None:
    run = Run(config(), LOSSES)
    for last in range(1, FLAT + 1):
        run.train(last)
        run.model.eval()(5, **BATCHES[0])
        run.model.train()
    assert not run.rankdyna.learning and run.rankdyna.schedule.warmup_steps == FLAT
    assert not run.model._forward_hooks


def test_a_loss_that_is_computed_outside_of_the_model_may_be_told() -> None:
    model = inject_singular_groups(build_dense(0), config())
    optimizer = AdamW(model.parameters(), lr=0.003)
    rankdyna = RankDyna(model, config(), optimizer, STEPS)
    for step, batch in enumerate(BATCHES, start=1):
        loss = nn.functional.cross_entropy(model(batch["x"])["logits"], batch["labels"])
        loss.backward()
        for part in (0.5, 1.5):  # as of two batches, whose mean counts
            rankdyna.note_loss(loss.detach() * 0 + part * LOSSES[step - 1])
        rankdyna.update_importance()
        optimizer.step()
        rankdyna.enforce_budget(step)
        optimizer.zero_grad()
        assert rankdyna.learning == (step < FLAT)
    assert rankdyna.schedule.warmup_steps == FLAT


def test_the_loss_of_the_model_counts_where_there_is_one() -> None:
    run = Run(config(), LOSSES)
    for last in range(1, FLAT + 1):
        run.rankdyna.note_loss(torch.tensor(float(last % 2)))
        ((learning, _),) = run.train(last)
        assert learning == (last < FLAT)


def test_a_model_that_tells_no_loss_is_waited_for_and_told(caplog: pytest.LogCaptureFixture) -> None:
    model = inject_singular_groups(build_dense(0), config())
    optimizer = AdamW(model.parameters(), lr=0.003)
    rankdyna = RankDyna(model, config(), optimizer, STEPS)
    for step, batch in enumerate(BATCHES, start=1):
        nn.functional.cross_entropy(model(batch["x"])["logits"], batch["labels"]).backward()
        rankdyna.update_importance()
        optimizer.step()
        rankdyna.enforce_budget(step)
        optimizer.zero_grad()
        assert rankdyna.learning == (step < 20)
    (record,) = caplog.records
    assert "The model returns no loss that rank_warmup_steps" in record.getMessage()
    assert "the warm-up takes 20 steps" in record.getMessage()


@pytest.mark.parametrize(("ratio", "floor"), [("rank_ratio", 0.5), ("param_ratio", 0.25), ("param_ratio", 0.0)])
def test_no_block_is_emptied_by_one_that_scores_a_thousand_times_more(ratio: str, floor: float) -> None:
    options = RankDynaConfig(**{ratio: 0.4}, block_floor=floor, rank_warmup_steps=2, rank_cooldown_steps=10)
    model = inject_singular_groups(build_dense(0), options)
    rankdyna = RankDyna(model, options, AdamW(model.parameters()), STEPS)
    by_block: dict[str, list[Any]] = {}
    for name, layer in singular_group_layers(model).items():
        by_block.setdefault(name.split(".")[1], []).append(layer)
    for step in range(3, STEPS + 1):
        for block, layers in by_block.items():
            for layer in layers:
                layer.importance.copy_(layer.remaining * 1000.0 ** int(block) * torch.rand(layer.width))
        rankdyna.enforce_budget(step)
    of_ranks = ratio == "rank_ratio"
    whole = sum(cap for layers in by_block.values() for _, cap, _ in sizes(layers, of_ranks))
    for layers in by_block.values():
        held, caps, costs = (list(values) for values in zip(*sizes(layers, of_ranks), strict=True))
        assert sum(held) > floor * sum(caps) / whole * rankdyna.budget(STEPS) - max(costs)  # less than a group is left
    assert (floor == 0) == any(not any(layer.rank for layer in layers) for layers in by_block.values())


def sizes(layers: list[Any], of_ranks: bool) -> list[tuple[int, int, int]]:
    """Of each layer what its groups cost, what they may cost at most, and what one of them costs."""
    if of_ranks:
        return [(layer.rank, layer.full_rank, 1) for layer in layers]
    cost = [layer.group_parameters for layer in layers]
    return [(la.rank * c, la.in_features * la.out_features, c) for la, c in zip(layers, cost, strict=True)]


@pytest.mark.parametrize("left", [True, False])
def test_groups_of_a_run_that_was_given_up_are_not_made_anew_under_a_wrapper(left: bool) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        options = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=4)
        model = inject_singular_groups(build_dense(0), options)
        if left:
            layer = layers_of(model)[0]
            layer.set_remaining(torch.arange(layer.width) > 2)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith(".v")}
        rankdyna = RankDyna(model, options, AdamW(model.parameters()), STEPS, batches=make_batches(2, 4))
        rankdyna.enforce_budget(4)
        assert not rankdyna.learning
        kept = [torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items()]
        assert all(kept) == left
    finally:
        distributed.destroy_process_group()


def test_a_model_that_was_fine_tuned_before_is_not_waited_for() -> None:
    """Its loss is flat from the start: the warm-up has the five windows that it takes to see that."""
    flat = [0.5] * STEPS
    runs = [Run(config(), flat, of=of) for of in (FineTuned, Told)]
    for run in runs:
        run.train(STEPS)
    assert [run.rankdyna.schedule.warmup_steps for run in runs] == [5, 20]


def test_a_resumed_run_knows_what_its_model_was_when_it_began() -> None:
    """A checkpoint's config names the class of its model, whose head may have been untrained."""
    first = Run(config(), [0.5] * STEPS)
    first.train(3)
    first.model.config = SimpleNamespace(architectures=["Told"])
    second = Run(config(), [0.5] * STEPS, first)
    second.train(STEPS)
    assert second.rankdyna.schedule.warmup_steps == 20
