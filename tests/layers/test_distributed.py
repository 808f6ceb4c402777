"""Sharded tensors in a group of one process; tests/trainer/test_processes.py has several."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

from rankdyna_trainer.layers.distributed import (
    is_distributed,
    is_sharded,
    local_part,
    of_first_process,
    of_local_groups,
    sums_over_groups,
    true_in_all_processes,
    unsharded_copy,
    whole,
)


@pytest.fixture(scope="module")  # one for all: torch 2.7 sometimes waits forever when it destroys a group
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_plain_tensor_stays_what_it_is() -> None:
    assert not is_distributed()
    tensor, mask = torch.arange(6.0).reshape(3, 2), torch.tensor([True, False, True])
    assert whole(tensor) is tensor and local_part(tensor) is tensor and of_local_groups(mask, tensor) is mask


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_a_sharded_tensor_is_changed_through_its_local_part(mesh: DeviceMesh, placement: Shard | Replicate) -> None:
    assert is_distributed()
    tensor, mask = torch.arange(1.0, 7.0).reshape(3, 2), torch.tensor([True, False, True])
    sharded = distribute_tensor(tensor.clone(), mesh, [placement])
    assert torch.equal(whole(sharded), tensor)
    local_part(sharded)[of_local_groups(mask, sharded)] = 0
    assert torch.equal(whole(sharded), tensor * torch.tensor([[0.0], [1.0], [0.0]]))


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_sums_over_what_a_process_holds(mesh: DeviceMesh, placement: Shard | Replicate) -> None:
    factor = torch.arange(6.0).reshape(3, 2)
    assert sums_over_groups(factor.sum(dim=1), factor).tolist() == [1, 5, 9]
    sharded = distribute_tensor(factor, mesh, [placement])
    assert torch.equal(sums_over_groups(local_part(sharded).sum(dim=1), sharded), torch.tensor([1.0, 5.0, 9.0]))


def test_decisions_are_shared(mesh: DeviceMesh) -> None:
    assert bool(true_in_all_processes(torch.tensor(True))) and not bool(true_in_all_processes(torch.tensor(False)))
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([]), torch.tensor([3.0])]
    assert all(torch.equal(one, other) for one, other in zip(of_first_process(tensors), tensors, strict=True))


def test_a_copy_of_a_sharded_model_is_whole_and_its_own(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 4)))
    x, expected = torch.randn(3, 4), copy.deepcopy(model)
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    whole_one = unsharded_copy(model)
    assert type(whole_one) is type(whole_one[1]) is nn.Sequential
    assert not any(is_sharded(parameter) for parameter in whole_one.parameters())
    assert torch.equal(whole_one(x), expected(x))
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(whole_one(x), expected(x))
