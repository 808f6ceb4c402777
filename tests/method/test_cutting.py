"""A cut never leaves a tensor that would be averaged with that of before it, by broadcasting, without an error."""

import pytest
import torch
from support.networks import Block, Network, layers_of
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rankdyna_trainer import RankDynaConfig, inject_singular_groups
from rankdyna_trainer.method.cutting import GroupCutting
from rankdyna_trainer.method.removal import remove_groups


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("averaged_before", [False, True])
def test_an_average_of_before_a_cut_is_an_error(rank: int, averaged_before: bool) -> None:
    model = inject_singular_groups(Network(Block(), Block(), Block()), RankDynaConfig(rank_ratio=0.5))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    if averaged_before:
        average.update_parameters(model)
    optimizer = AdamW(model.parameters())
    for layer in layers_of(model):
        remove_groups(layer, torch.arange(6) < rank, optimizer)
    GroupCutting(optimizer, held=False, compiled=False).cut(layers_of(model), at_the_end=True)
    assert [layer.rank for layer in layers_of(model)] == [rank] * 3
    with pytest.raises(RuntimeError, match="size"):
        average.update_parameters(model)


def test_tensors_that_others_hold_are_never_cut() -> None:
    model = inject_singular_groups(Network(Block(), Block(), Block()), RankDynaConfig(rank_ratio=0.5))
    optimizer = AdamW(model.parameters())
    for layer in layers_of(model):
        remove_groups(layer, torch.arange(6) < 1, optimizer)
    before = list(model.parameters())
    GroupCutting(optimizer, held=True, compiled=False).cut(layers_of(model), at_the_end=True)
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
