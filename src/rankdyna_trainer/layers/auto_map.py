"""What a model's class and `auto_map` say of the file that loads it where this library is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

# Its name, as saved checkpoints have it.
MODULE = "modeling_rankdyna"


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel] | None:
    """The class of `transformers` of which a model is, as it is or as `modeling_rankdyna.py` has it."""
    stock = getattr(transformers, type(model).__name__, None)
    is_ours = type(model).__module__.rpartition(".")[2] == MODULE
    return stock if type(model) is stock or is_ours else None


def are_of_one_class(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models are of one class, whichever of them is saved with our file."""
    stock = [stock_class(model) if isinstance(model, PreTrainedModel) else None for model in (one, other)]
    return type(one) is type(other) or (stock[0] is not None and stock[0] is stock[1])


def own_entries(model: PreTrainedModel) -> list[str]:
    """The entries of `auto_map` that name our file, here or in the repository that the model was loaded from."""
    auto_map = getattr(model.config, "auto_map", None) or {}
    # Another code's entry may be a list: of a slow and a fast tokenizer.
    return [name for name, ref in auto_map.items() if str(ref).rpartition("--")[2].startswith(f"{MODULE}.")]


def own_auto_class(model: nn.Module) -> str | None:
    """The Auto class by which our file loads a model as what it is; `None` if it is not saved with that."""
    if not isinstance(model, PreTrainedModel):
        return None
    ending = f".{type(model).__name__.removeprefix('FSDP')}"
    return next((name for name in own_entries(model) if str(model.config.auto_map[name]).endswith(ending)), None)


@contextmanager
def mapped_as_it_is(model: PreTrainedModel) -> Iterator[None]:
    """
    Let the `auto_map` of a model not name our file, until the block ends, if it would not be written with the model:
    one that was made by the configuration of another model is of a class of `transformers`.
    """
    auto_map = getattr(model.config, "auto_map", None)
    own = own_entries(model) if type(model) is stock_class(model) else []
    if own:
        _leave_out(model.config, own)
    try:
        yield
    finally:
        if own:
            model.config.auto_map = auto_map


def forget_self_contained(model: PreTrainedModel) -> None:
    """Undo [`~rankdyna_trainer.make_self_contained`], also of a model that was loaded with `trust_remote_code`."""
    if not (own := own_entries(model)):
        return
    if (stock := stock_class(model)) is not None:
        model.__class__ = stock
    _leave_out(model.config, own)


def _leave_out(config: Any, own: list[str]) -> None:
    config.auto_map = {name: ref for name, ref in config.auto_map.items() if name not in own}
    if not config.auto_map:
        del config.auto_map
