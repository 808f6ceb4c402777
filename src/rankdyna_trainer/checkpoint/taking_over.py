"""A model in training becomes one that it was before, and that was saved then."""

from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedModel

from ..layers.architecture import module_places
from ..layers.compaction import UNFINISHED
from ..layers.group_importance import compacted_rank, note_importance
from ..layers.hooks import release
from ..layers.rank_record import forget_ranks, record_ranks, saved_name
from ..layers.singular_group import SingularGroupLinear
from .importance_file import read_importance


def take_over(model: PreTrainedModel, directory: str | Path) -> None:
    """
    Let a model in training become the compacted one that was saved of it, in place.

    Args:
        model: with singular groups.
        directory: of the compacted model.

    Raises:
        OSError, ValueError: the folder holds no such model.
    """
    saved = type(model).from_pretrained(directory, dtype=model.dtype).to(model.device).train(model.training)
    release(model)
    model.__dict__.pop(UNFINISHED, None)
    names = {module: name for name, module in model.named_modules()}
    for layer, places in module_places(model).items():
        if isinstance(layer, SingularGroupLinear):
            for parent, attribute in places:
                setattr(parent, attribute, saved.get_submodule(names[layer]))
    model.load_state_dict(saved.state_dict())
    forget_ranks(model)
    record_ranks(model)
    layers = {saved_name(name): module for name, module in model.named_modules()}
    ranks = {name: rank for name, layer in layers.items() if (rank := compacted_rank(layer)) is not None}
    with suppress(FileNotFoundError):
        for name, importance in read_importance(directory, ranks).items():
            note_importance(layers[name], importance)
