"""What a run is told while there is time: the loss has not fallen, or a whole block is empty."""

import logging

import pytest
import torch
from support.reference_network import build_dense

from rankdyna_trainer import RankDynaConfig, inject_singular_groups
from rankdyna_trainer.layers.singular_group import singular_group_layers
from rankdyna_trainer.method.budget import RankBudget
from rankdyna_trainer.method.schedule import RankBudgetSchedule
from rankdyna_trainer.method.warnings import BATCHES, BlockWatch, LossWatch, warn_if_little_is_left


@pytest.mark.parametrize(("last", "warned"), [(2.0, True), (1.95, True), (1.85, False), (0.1, False)])
def test_a_loss_that_has_not_fallen_is_told_with_both_values(
    caplog: pytest.LogCaptureFixture, last: float, warned: bool
) -> None:
    watch = LossWatch()
    for loss in [2.0] * BATCHES + [7.0] * 5 + [last] * BATCHES:
        watch.note(torch.tensor(loss))
    watch.warn_if_flat(25, 32)
    assert [f"the training loss is {last:.4g}, and it began at 2" in r.getMessage() for r in caplog.records] == (
        [True] if warned else []
    )
    assert all("From step 32 on" in r.getMessage() and "at step 25" in r.getMessage() for r in caplog.records)


def test_too_few_batches_tell_nothing(caplog: pytest.LogCaptureFixture) -> None:
    watch = LossWatch()
    for _ in range(2 * BATCHES - 1):
        watch.note(torch.tensor(2.0))
    watch.warn_if_flat(3, 3)
    assert not caplog.records


def test_a_block_that_is_emptied_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = inject_singular_groups(build_dense(0), RankDynaConfig(rank_ratio=0.5))
    layers = singular_group_layers(model)
    watch = BlockWatch(model, layers)
    for name, layer in layers.items():
        if name.startswith("blocks.1."):
            watch.warn_of_empty(4)  # some layers of the block have groups yet
            layer.set_remaining(torch.zeros_like(layer.remaining))
    with caplog.at_level(logging.WARNING):
        assert not caplog.records
        watch.warn_of_empty(5)
        watch.warn_of_empty(6)
    (record,) = caplog.records
    assert "At step 5 no singular group is left in blocks.1:" in record.getMessage()


def test_a_run_that_ends_with_less_than_half_of_its_budget_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """The cheap group came first, and the other does not fit into what it left."""
    config = RankDynaConfig(param_ratio=0.75)
    budget = RankBudget(config, RankBudgetSchedule(0, 0, 1), [(1, 1), (1, 3)], [1, 1])
    warn_if_little_is_left(budget, [0, 1])
    assert not caplog.records
    warn_if_little_is_left(budget, [1, 0])
    assert "Only 1 of the 3 that the budget allows are left" in caplog.text
