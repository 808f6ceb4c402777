"""Layers whose weights accelerate keeps elsewhere, as `device_map` has it, and brings in while they compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, attach_align_device_hook
from accelerate.utils import find_tied_parameters, has_offloaded_params
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """The device that the first weight of a module, or else the first buffer, is on or is brought to."""
    parameters = ((part, weight) for part in module.modules() for weight in part.parameters(recurse=False))
    buffers = ((part, buffer) for part in module.modules() for buffer in part.buffers(recurse=False))
    part, tensor = next(chain[tuple[nn.Module, torch.Tensor]](parameters, buffers))
    hook: Any = part.__dict__.get("_hf_hook")
    return torch.device(hook.execution_device) if has_offloaded_params(part) else tensor.device


def place_like(layer: nn.Module, replacement: nn.Module) -> None:
    """
    Let a module compute where a layer does: if that is offloaded, its weights wait on the CPU to be brought in.

    Args:
        layer: of a model that may have a `device_map`.
        replacement: on the CPU if the layer is offloaded.
    """
    hook = layer.__dict__.get("_hf_hook")
    if isinstance(hook, AlignDevicesHook):
        attach_align_device_hook(replacement, torch.device(hook.execution_device), offload=hook.offload)


@contextmanager
def ties_kept(model: nn.Module) -> Iterator[None]:
    """Tied weights of an offloaded model are tied again when it is left: a run brings each of them in by itself."""
    tied = find_tied_parameters(model) if any(map(has_offloaded_params, model.modules())) else []
    try:
        yield
    finally:
        for names in tied:
            weights = [model.get_parameter(name) for name in names]
            kept = next((weight for weight in weights if not weight.is_meta), weights[0])
            for place, _, attribute in (name.rpartition(".") for name in names):
                setattr(model.get_submodule(place), attribute, kept)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module has another forward than its class has. The one by which weights are brought in is none."""
    forward = module.__dict__.get("forward")
    if isinstance(module.__dict__.get("_hf_hook"), AlignDevicesHook):
        forward = module.__dict__["_old_forward"]
        return getattr(forward, "__func__", None) is not type(module).forward
    return forward is not None


def refuse_offloaded(model: nn.Module) -> None:
    """
    Check that all weights of a model are there, and stay where they are.

    Raises:
        ValueError: `device_map` has some offloaded, or moves what enters layers from device to device.
    """
    placed = {name: module.__dict__.get("_hf_hook") for name, module in model.named_modules() if module._parameters}
    names = [name for name, hook in placed.items() if isinstance(hook, AlignDevicesHook)]
    if not names:
        return
    offloaded = [name for name in names if has_offloaded_params(model.get_submodule(name))]
    what = f"has {offloaded[0]} offloaded" if offloaded else "spreads the model over devices"
    raise ValueError(
        f'Its device_map {what}, and only svd, whitened_svd with rank_scope="local", and `rankdyna compress` by these '
        "methods take such a model. Training needs all weights in the memory of its device: load the model without "
        "device_map. If there is no room for it, make it smaller first, by one of these."
    )
