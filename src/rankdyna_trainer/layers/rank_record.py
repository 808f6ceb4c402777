"""The ranks in a model's configuration, by which `from_pretrained` knows what layers to expect."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ..options import METHOD
from .dense import kept_dense_rank
from .low_rank import LowRankLinear
from .singular_group import SingularGroupLinear

# What a compacted model is found by on the Hub.
TAGS = [METHOD, "low-rank"]
_RECORD = "quantization_config"


def config_owners(model: nn.Module) -> list[Any]:
    """
    The outermost modules that `save_pretrained` would save with a configuration of their own: not a container, such as
    a `SentenceTransformer`, that passes on the one of a model in it.
    """
    if _has_config(model):
        return [model]
    return [owner for child in model.children() for owner in config_owners(child)]


def record_ranks(model: Any) -> None:
    """
    Write the ranks that the layers will have once they are compacted into the configuration of the model, and those of
    its parts that have one of their own into theirs, from which they may be loaded alone.

    Args:
        model: one of [`config_owners`].
    """
    recorded: set[int] = set()
    for owner in filter(_has_config, model.modules()):
        # A model and its base model often have one configuration, which is that of the model.
        if id(owner.config) not in recorded:
            recorded.add(id(owner.config))
            _record(owner)
    if hasattr(model, "add_model_tags") and _is_ours(model.config):
        model.add_model_tags(TAGS)


def _record(owner: Any) -> None:
    ranks: dict[str, int] = {}
    dense: dict[str, int] = {}
    for name, part in owner.named_modules():
        if isinstance(part, SingularGroupLinear):
            (dense if part.is_cheaper_dense else ranks)[_saved_name(name)] = part.rank
        elif isinstance(part, LowRankLinear):  # compacted before, and no target this time
            ranks[_saved_name(name)] = part.rank
        elif (rank := kept_dense_rank(part)) is not None:
            dense[_saved_name(name)] = rank
    if ranks or dense:
        owner.config.quantization_config = {"quant_method": METHOD, "ranks": ranks, "dense": dense}


def forget_ranks(model: nn.Module) -> None:
    """Take the ranks, and the tags, out of all configurations in a model, of which they are no longer true."""
    for config in _configs(model):
        if _is_ours(config):
            del config.quantization_config
    for owner in config_owners(model):
        if getattr(owner, "model_tags", None):
            owner.model_tags = [tag for tag in owner.model_tags if tag not in TAGS]


@contextmanager
def recorded_as_it_is(model: nn.Module) -> Iterator[None]:
    """
    Let the configurations in a model say the ranks that its layers have, until the block ends.

    A model that was compacted may have become a part of another one since, or be a part that is saved alone; and one
    that was made by the configuration of a compacted model is dense.

    Args:
        model: that is saved in the block, with a configuration of its own.
    """
    before = [(config, config.__dict__.get(_RECORD)) for config in _configs(model)]
    forget_ranks(model)
    is_quantized = hasattr(model.config, _RECORD)  # by another method, which that is of
    # A model in training is saved without: its checkpoint says more, and is read in another way.
    if not is_quantized and not any(isinstance(module, SingularGroupLinear) for module in model.modules()):
        record_ranks(model)
    try:
        yield
    finally:
        for config, record in before:
            config.__dict__.pop(_RECORD, None)
            if record is not None:
                config.quantization_config = record


def _has_config(module: nn.Module) -> bool:
    return "config" in vars(module) and hasattr(module, "save_pretrained")


def _configs(model: nn.Module) -> list[Any]:
    """All configurations of a model's parts, and those within them, each once."""
    found: dict[int, Any] = {}
    pending: list[Any] = [module.config for module in model.modules() if _has_config(module)]
    while pending:
        config = pending.pop()
        if id(config) not in found:
            found[id(config)] = config
            pending += [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return list(found.values())


def _is_ours(config: Any) -> bool:
    record = getattr(config, _RECORD, None)
    return record is not None and dict(record).get("quant_method") == METHOD


def _saved_name(name: str) -> str:
    """The name without torch's wrappers for compilation and checkpointing, of which saved tensors show nothing."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
