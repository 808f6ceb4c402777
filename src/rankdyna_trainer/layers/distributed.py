"""Several processes: factors that FSDP2 shards by groups, and decisions that all processes share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, distributed, nn

# Imported only where a tensor is sharded: a run in one process does without.
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

# What FSDP2 notes on a module, by the beginnings of the names.
_OF_FSDP2 = ("__composable_api", "_fsdp_", "_is_fsdp_")


def is_distributed() -> bool:
    """Whether a wrapper may hold the model's parameters to join this process with others, be it the only one."""
    return distributed.is_available() and distributed.is_initialized()


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether FSDP2, or a plan for tensor parallelism, splits the tensor between processes."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or, if it is sharded, all of it: then every process has to ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def unsharded_copy(model: nn.Module) -> nn.Module:
    """A copy with whole parameters that FSDP2 knows nothing of, and without hooks: every process has to ask for it."""
    copies: dict[int, Any] = {
        id(p): nn.Parameter(whole(p.detach()).clone(), p.requires_grad) for p in model.parameters()
    }
    shells = {module: object.__new__(_class_before_sharding(module)) for module in model.modules()}
    copies |= {id(module): shell for module, shell in shells.items()}
    without_hooks = {name: value for name, value in vars(nn.Module()).items() if "_hooks" in name}
    for module, shell in shells.items():
        own = {k: v for k, v in vars(module).items() if "_hooks" not in k and not k.startswith(_OF_FSDP2)}
        shell.__dict__ = copy.deepcopy(own, copies) | copy.deepcopy(without_hooks)
    return shells[model]


def _class_before_sharding(module: nn.Module) -> type[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    return next(cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and not issubclass(cls, FSDPModule))


def local_part(tensor: Tensor) -> Tensor:
    """The tensor itself, or, if it is sharded, what this process holds of it; writing to it changes the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def of_local_groups(values: Tensor, factor: Tensor) -> Tensor:
    """
    Of one value per group those of the groups that this process holds.

    Args:
        values: `(rank,)`, the same in every process.
        factor: `(rank, ...)`, plain or sharded: FSDP2 splits dimension 0, and so between groups, never in one.
    """
    if not is_sharded(factor):
        return values
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [part if part.is_shard(dim=0) else Replicate() for part in factor.placements]
    # Nothing is sent: each process takes its own part.
    return distribute_tensor(values, factor.device_mesh, placements, src_data_rank=None).to_local()


def sums_over_groups(sums: Tensor, factor: Tensor) -> Tensor:
    """
    One sum for each group of a factor, from the sums over what this process holds of it: every process has to ask.

    Args:
        sums: one for each row of the factor's [`local_part`].
        factor: `(rank, ...)`, plain or sharded.
    """
    if not is_sharded(factor):
        return sums
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements: list[Placement] = [
        part if part.is_shard(dim=0) else Partial() if part.is_shard() else Replicate() for part in factor.placements
    ]
    shape = torch.Size([len(factor)])
    parts = DTensor.from_local(sums, factor.device_mesh, placements, run_check=False, shape=shape, stride=(1,))
    return parts.full_tensor()


def true_in_all_processes(value: Tensor) -> Tensor:
    """One boolean tensor: whether it is true everywhere."""
    agreed = value.int()
    distributed.all_reduce(agreed, distributed.ReduceOp.MIN)
    return agreed.bool()


def of_first_process(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors of process 0, so that no last bit can make two processes decide differently."""
    values = torch.cat(tensors)
    distributed.broadcast(values, src=0)
    return list(torch.split(values, [len(tensor) for tensor in tensors]))


def reshard(model: nn.Module) -> None:
    """
    Give a model that FSDP2 shards its sharded parameters back: after a forward pass without a backward pass the
    outermost ones stay whole, and gradients of the sharded ones would not be set to zero.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sum_of_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over all processes, which all have to ask: they are sent at once."""
    flat = torch.cat([tensor.flatten().to(tensors[0].device) for tensor in tensors])
    distributed.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.device) for part, tensor in zip(parts, tensors, strict=True)]
