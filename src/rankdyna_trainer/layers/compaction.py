"""From singular groups to P and Q (eq. 5), and from P and Q back to a dense matrix."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architecture import module_places
from .auto_map import forget_self_contained
from .dense import EXPECTS_GROUPS, dense_weight, expects_groups, kept_dense_rank, mark_kept_dense, new_dense_layer
from .distributed import is_sharded, whole
from .group_importance import note_importance
from .hooks import release
from .interruption import interrupt_held_back
from .low_rank import LowRankLinear
from .notices import AboveProgressBars
from .offloaded import place_like
from .quantized import undo_quantization
from .rank_record import config_owners, forget_ranks, record_ranks
from .singular_group import SingularGroupLinear

logger = AboveProgressBars(logging.getLogger(__name__))

# Under which attribute a model in training says what it lacks.
UNFINISHED = "_rankdyna_unfinished"


class Unfinished(str):
    """What a model in training lacks, which is not told of its copies: an average goes on, and ends with the run."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, object]) -> str:
        return ""


def compact(model: nn.Module) -> nn.Module:
    """
    Replace each [`SingularGroupLinear`] by a [`LowRankLinear`] of its remaining groups, in place.

    A layer of which P and Q would hold more numbers than the weight becomes a dense layer again. The ranks are written
    into the configuration of the pre-trained model that holds the layers, so that `save_pretrained` makes a checkpoint
    which `from_pretrained` can load, and the model gets the tags that `push_to_hub` writes into its card. If training
    did not come to the final budget, a warning says which it reached.

    Args:
        model: with singular groups, or of a run that was stopped before it had any. If FSDP2 shards it, all processes
            have to call this, and each gets whole layers.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no singular groups.
    """
    _warn_of_whole_copy(model)
    compact_and_tell(model, lambda layer, replacement: None)
    return model


def compact_and_tell(model: nn.Module, replaced: Callable[[SingularGroupLinear, Any], None]) -> None:
    """
    [`compact`] for those who hold parameters of the model: they may drop each before the next layer is handled.

    Args:
        model: with singular groups.
        replaced: called with each layer and the one that took its place.

    Raises:
        ValueError: the model has no singular groups.
    """
    dense = [module for module in model.modules() if expects_groups(module)]  # of a run that was stopped early
    if not dense:
        _require(
            model, SingularGroupLinear, "singular groups to compact: call inject_singular_groups(model, config) first"
        )
    with interrupt_held_back():
        release(model)
        for layer in dense:
            del layer.__dict__[EXPECTS_GROUPS]
            if isinstance(layer, (nn.Linear, Conv1D)):
                mark_kept_dense(layer, min(dense_weight(layer).shape))
        _record(model)
        _replace(model, SingularGroupLinear, _compacted, replaced)
    if unfinished := model.__dict__.pop(UNFINISHED, None):
        logger.warning(unfinished)


def compacted_copy(model: nn.Module) -> nn.Module:
    """
    The compacted model beside the one that is trained on, to be saved: all that is no target layer, they share.

    Args:
        model: with singular groups, not sharded.
    """
    layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
    replacements = {id(layer): _compacted(layer).train(layer.training) for layer in layers}
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, {**shared, **replacements})
    release(copied)
    copied.__dict__.pop(UNFINISHED, None)
    _record(copied)
    return copied


def _record(model: nn.Module) -> None:
    """Let the configurations in a model, which is compacted or will be now, tell its ranks."""
    for owner in config_owners(model):
        record_ranks(owner)
        if "_rankdyna_weight_conversions" in owner.__dict__:
            owner._weight_conversions = owner.__dict__.pop("_rankdyna_weight_conversions")


def _warn_of_whole_copy(model: nn.Module) -> None:
    layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
    if layers and all(layer.is_copy and layer.rank == layer.initial_rank for layer in layers):
        logger.warning(
            "This copy of a model has all of its singular groups, so it is compacted to full ranks. An average of a "
            "model has to take over the buffers too, which tell the groups that were removed: copy them before "
            "compact, for buffer, now in zip(average.buffers(), model.buffers())."
        )


def merge(model: nn.Module) -> nn.Module:
    """
    Replace each [`LowRankLinear`] by a dense layer of its original class with the weight `P Q`, in place.

    What `save_pretrained` then writes is a stock checkpoint, which needs nothing of this library, nor of torchao if
    that has quantized the model.

    Args:
        model: compacted. Of layers that `device_map` has offloaded, the new ones wait on the CPU.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no low-rank layers, or another library than torchao has quantized them.
    """
    kept_dense = [module for module in model.modules() if kept_dense_rank(module) is not None]
    if not kept_dense:
        _require(model, LowRankLinear, "low-rank layers to merge: call compact(model) first")
    undo_quantization(model)
    _replace(model, LowRankLinear, _merged, lambda layer, replacement: place_like(layer.p, replacement))
    for layer in kept_dense:
        mark_kept_dense(layer, None)
    forget_ranks(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            forget_self_contained(part)
    return model


def is_compacted(model: nn.Module) -> bool:
    """Whether the model has target layers, and all of them are compacted."""
    return has_compacted_layers(model) and not any(isinstance(m, SingularGroupLinear) for m in model.modules())


def has_compacted_layers(model: nn.Module) -> bool:
    """Whether the model, or a part of it, has been compacted."""
    return any(isinstance(m, LowRankLinear) or kept_dense_rank(m) is not None for m in model.modules())


@torch.no_grad()
def _compacted(layer: SingularGroupLinear) -> nn.Module:
    if layer.is_cheaper_dense:
        dense = new_dense_layer(layer.original_class, layer.to_dense_weight(), _whole_bias(layer))
        mark_kept_dense(dense, layer.rank)
        note_importance(dense, layer.importance[layer.remaining])
        return dense
    p, q = layer.to_factors()
    low_rank = LowRankLinear(
        layer.in_features,
        layer.out_features,
        layer.rank,
        bias=layer.bias is not None,
        original_class=layer.original_class,
        device=torch.device("meta"),
        dtype=p.dtype,
    )
    low_rank.weight = layer.weight
    if layer.rank:
        low_rank.p.weight, low_rank.q.weight = nn.Parameter(p.contiguous()), nn.Parameter(q.contiguous())
    low_rank.settle()
    if (bias := _whole_bias(layer)) is not None:
        low_rank.p.bias = bias
    note_importance(low_rank, layer.importance[layer.remaining])
    return low_rank


def _whole_bias(layer: SingularGroupLinear) -> nn.Parameter | None:
    bias = layer.bias
    return nn.Parameter(whole(bias), bias.requires_grad) if bias is not None and is_sharded(bias) else bias


@torch.no_grad()
def _merged(layer: LowRankLinear) -> nn.Module:
    with align_module_device(layer.p), align_module_device(layer.q):
        return new_dense_layer(layer.original_class, layer.to_dense_weight(), layer.bias)


def _replace(
    model: nn.Module,
    layer_class: type[nn.Module],
    replacement_of: Callable[[Any], nn.Module],
    replaced: Callable[[Any, nn.Module], None],
) -> None:
    """Layer by layer: nothing here holds a layer any more when the next one is replaced."""
    places = module_places(model)
    while places:
        layer, of_layer = places.popitem()
        if isinstance(layer, layer_class):
            replacement = replacement_of(layer).train(layer.training)
            for parent, attribute in of_layer:
                setattr(parent, attribute, replacement)
            replaced(layer, replacement)


def _require(model: nn.Module, layer_class: type[nn.Module], what: str) -> None:
    if not any(isinstance(module, layer_class) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} has no {what}.")
