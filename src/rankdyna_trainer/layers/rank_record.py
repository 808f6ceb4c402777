"""The ranks in a model's configuration, by which `from_pretrained` knows what layers to expect."""

from typing import Any

from torch import nn

from .dense import kept_dense_rank
from .low_rank import LowRankLinear
from .singular_group import SingularGroupLinear

METHOD = "rankdyna"
# What a compacted model is found by on the Hub.
TAGS = [METHOD, "low-rank"]


def config_owners(model: nn.Module) -> list[Any]:
    """
    The outermost modules that `save_pretrained` would save with a configuration of their own: not a container, such as
    a `SentenceTransformer`, that passes on the one of a model in it.
    """
    if "config" in vars(model) and hasattr(model, "save_pretrained"):
        return [model]
    return [owner for child in model.children() for owner in config_owners(child)]


def record_ranks(owner: Any) -> None:
    """
    Write the ranks that the layers will have once they are compacted into the model's configuration.

    Args:
        owner: one of [`config_owners`].
    """
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
        if hasattr(owner, "add_model_tags"):
            owner.add_model_tags(TAGS)


def forget_ranks(model: nn.Module) -> None:
    """Take the ranks, and the tags, out of the model's configuration, which are no longer true of it."""
    for owner in config_owners(model):
        record = getattr(owner.config, "quantization_config", None)
        if record is not None and dict(record).get("quant_method") == METHOD:
            del owner.config.quantization_config
        if getattr(owner, "model_tags", None):
            owner.model_tags = [tag for tag in owner.model_tags if tag not in TAGS]


def _saved_name(name: str) -> str:
    """The name without torch's wrappers for compilation and checkpointing, of which saved tensors show nothing."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
