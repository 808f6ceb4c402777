"""The ranks in a model's configuration, by which `from_pretrained` knows what layers to expect."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ..options import METHOD
from .auto_map import own_entries
from .dense import kept_dense_rank
from .low_rank import LowRankLinear
from .singular_group import SingularGroupLinear
from .stock_refusal import COMPACTED, ENTRY, SELF_CONTAINED, UNFINISHED

# What a compacted model is found by on the Hub.
TAGS = [METHOD, "low-rank"]


def record_of(config: Any) -> Any:
    """
    What a configuration says of the ranks, `{"ranks": ..., "dense": ...}` if it is whole; `None` if it says nothing.

    Args:
        config: of any model, as it is or as it was read from a file.
    """
    return getattr(config, METHOD, None)


def set_record(config: Any, record: dict[str, dict[str, int]] | None) -> None:
    """Let a configuration say these ranks, or nothing of ranks."""
    vars(config).pop(METHOD, None)
    if record is not None:
        setattr(config, METHOD, record)


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
    for name, owner in model.named_modules():
        config = vars(owner).get("config")
        # A model and its base model often have one configuration, which is that of the model.
        if isinstance(config, PretrainedConfig) and id(config) not in recorded:
            recorded.add(id(config))
            # The inside of a part's class, as transformers 4 has it in a CLIP, is named in that class as in the whole.
            _record(owner, "" if _has_config(owner) else f"{name.rpartition('.')[2]}.")
    if hasattr(model, "add_model_tags") and record_of(model.config) is not None:
        model.add_model_tags(TAGS)


def _record(owner: Any, prefix: str) -> None:
    ranks: dict[str, int] = {}
    dense: dict[str, int] = {}
    for name, part in owner.named_modules():
        if isinstance(part, SingularGroupLinear):
            (dense if part.is_cheaper_dense else ranks)[prefix + saved_name(name)] = part.rank
        elif isinstance(part, LowRankLinear):  # compacted before, and no target this time
            ranks[prefix + saved_name(name)] = part.rank
        elif (rank := kept_dense_rank(part)) is not None:
            dense[prefix + saved_name(name)] = rank
    if ranks or dense:
        set_record(owner.config, {"ranks": ranks, "dense": dense})


def forget_ranks(model: nn.Module) -> None:
    """Take the ranks, and the tags, out of all configurations in a model, of which they are no longer true."""
    for config in _configs(model):
        set_record(config, None)
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
    before = [(config, record_of(config)) for config in _configs(model)]
    forget_ranks(model)
    refusal = UNFINISHED
    # A model in training is saved without: its checkpoint says more, and is read in another way.
    if not any(isinstance(module, SingularGroupLinear) for module in model.modules()):
        record_ranks(model)
        refusal = SELF_CONTAINED if own_entries(model) else COMPACTED
        if record_of(model.config) is None:
            refusal = ""
    if refusal:
        setattr(model.config, ENTRY, refusal)
    try:
        yield
    finally:
        for config, record in before:
            set_record(config, record)
        if refusal:
            vars(model.config).pop(ENTRY, None)


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


def saved_name(name: str) -> str:
    """A name without torch's wrappers for compilation and checkpointing, of which saved tensors show nothing."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
