"""From singular groups to P and Q (eq. 5), and from P and Q back to a dense matrix."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .architecture import module_places
from .dense import new_dense_layer
from .layers import LowRankLinear, SingularGroupLinear

METHOD = "rankdyna"


def compact(model: nn.Module) -> nn.Module:
    """
    Replace each [`SingularGroupLinear`] by a [`LowRankLinear`] of its remaining groups, in place.

    A layer of which P and Q would hold more numbers than the weight becomes a dense layer again. The ranks are written
    into the configuration of the pre-trained model that holds the layers, so that `save_pretrained` makes a checkpoint
    which `from_pretrained` can load.

    Args:
        model: with singular groups.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no singular groups.
    """
    _require(
        model, SingularGroupLinear, "singular groups to compact: call inject_singular_groups(model, config) first"
    )
    for owner in config_owners(model):
        ranks: dict[str, int] = {}
        dense: list[str] = []
        for name, layer in owner.named_modules():
            if isinstance(layer, SingularGroupLinear):
                if layer.rank * layer.group_parameters > layer.dense_parameters:
                    dense.append(name)
                else:
                    ranks[name] = layer.rank
        if ranks or dense:
            owner.config.quantization_config = {"quant_method": METHOD, "ranks": ranks, "dense": dense}
    _replace(model, SingularGroupLinear, _compacted)
    return model


def merge(model: nn.Module) -> nn.Module:
    """
    Replace each [`LowRankLinear`] by a dense layer of its original class with the weight `P Q`, in place.

    What `save_pretrained` then writes is a stock checkpoint, which needs nothing of this library.

    Args:
        model: compacted.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no low-rank layers.
    """
    recorded: list[Any] = [owner for owner in config_owners(model) if compaction_record(owner)]
    if not recorded:
        _require(model, LowRankLinear, "low-rank layers to merge: call compact(model) first")
    _replace(model, LowRankLinear, _merged)
    for owner in recorded:
        del owner.config.quantization_config
    return model


def compaction_record(owner: nn.Module) -> dict[str, Any]:
    """What [`compact`] wrote into a model's configuration (`ranks` by layer, names kept `dense`), or nothing."""
    record = getattr(getattr(owner, "config", None), "quantization_config", None)
    if record is not None and not isinstance(record, dict):
        record = record.to_dict()
    return record if record and record.get("quant_method") == METHOD else {}


def config_owners(model: nn.Module) -> list[Any]:
    """The outermost modules that `save_pretrained` would save with a configuration of their own."""
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        return [model]
    return [owner for child in model.children() for owner in config_owners(child)]


@torch.no_grad()
def _compacted(layer: SingularGroupLinear) -> nn.Module:
    if layer.rank * layer.group_parameters > layer.dense_parameters:
        return new_dense_layer(layer.original_class, layer.to_dense_weight(), layer.bias)
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
    low_rank.p.weight = nn.Parameter(p.contiguous())
    low_rank.q.weight = nn.Parameter(q.contiguous())
    if layer.bias is not None:
        low_rank.p.bias = layer.bias
    return low_rank


@torch.no_grad()
def _merged(layer: LowRankLinear) -> nn.Module:
    return new_dense_layer(layer.original_class, layer.to_dense_weight(), layer.bias)


def _replace(model: nn.Module, layer_class: type[nn.Module], replacement_of: Callable[[Any], nn.Module]) -> None:
    for layer, places in module_places(model).items():
        if isinstance(layer, layer_class):
            replacement = replacement_of(layer).train(layer.training)
            for parent, attribute in places:
                setattr(parent, attribute, replacement)


def _require(model: nn.Module, layer_class: type[nn.Module], what: str) -> None:
    if not any(isinstance(module, layer_class) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} has no {what}.")
