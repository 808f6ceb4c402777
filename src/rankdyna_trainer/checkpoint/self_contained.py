"""Checkpoints that load where this library is not installed: each has a copy of `modeling_rankdyna.py`."""

import json
import os
import shutil
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME

from ..layers.auto_map import MODULE, forget_self_contained, own_entries, stock_class
from ..layers.rank_record import config_owners
from ..layers.stock_refusal import ENTRY, SELF_CONTAINED
from ..report.staging import staging_folder
from . import modeling_rankdyna


def make_self_contained(model: PreTrainedModel) -> PreTrainedModel:
    """
    Let a model be saved with the code that loads it, in place: in training or before, or once it is compacted.

    From now on `save_pretrained`, `push_to_hub` and the `Trainer` write one small file, `modeling_rankdyna.py`, beside
    the weights, and name it under `auto_map` in `config.json`. A compacted model so saved is loaded with
    `AutoModel....from_pretrained(folder, trust_remote_code=True)` where this library is not installed, and without
    `trust_remote_code` where it is imported. The [`RankDynaCallback`] does it by itself, unless its config has
    `self_contained=False`.

    Args:
        model: of a class of `transformers`.

    Returns:
        The same model.

    Raises:
        TypeError: the model is no `PreTrainedModel`, but for instance one that peft wraps.
        ValueError: its class is not one of `transformers`, so that one file could not load it elsewhere.

    Example:

    ```python
    make_self_contained(model).save_pretrained("small")
    ```
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"make_self_contained takes a transformers model, got a {type(model).__name__}: give it the model inside, "
            "and merge adapters into it first."
        )
    stock = stock_class(model)
    if stock is None:
        raise ValueError(
            f"{type(model).__name__} is no class of transformers, so that its code would be missing where the "
            "checkpoint is loaded. Use merge(model) instead, and save it dense; with FSDP, make the model "
            "self-contained before it is trained."
        )
    classes = _auto_classes(model)
    if stock not in classes.values():
        classes["AutoModel"] = stock
    model.__class__ = getattr(modeling_rankdyna, stock.__name__)
    model.register_for_auto_class(next(name for name, loaded in classes.items() if loaded is stock))
    ours = {name: f"{MODULE}.{loaded.__name__}" for name, loaded in classes.items()}
    model.config.auto_map = (getattr(model.config, "auto_map", None) or {}) | ours
    return model


def choose_self_contained(model: nn.Module, wanted: bool) -> None:
    """
    [`make_self_contained`], or its opposite, for each model that is saved with a configuration of its own.

    Args:
        model: such a model, or a container of some. What is of no class of `transformers` is left as it is.
        wanted: whether it is to be self-contained.
    """
    for owner in config_owners(model):
        if isinstance(owner, PreTrainedModel) and stock_class(owner) is not None:
            (make_self_contained if wanted else forget_self_contained)(owner)


def bring_code(model: PreTrainedModel, folder: Path) -> None:
    """
    [`make_self_contained`] for a checkpoint on disk, of which only `config.json` changes.

    Args:
        model: as that describes it; its parameters may be without values.
        folder: of the checkpoint.

    Raises:
        ValueError: its class is not one of `transformers`.
        OSError: the folder cannot be written.
    """
    make_self_contained(model)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config |= {ENTRY: SELF_CONTAINED, "auto_map": model.config.auto_map}
    with staging_folder(folder) as staging:
        code = shutil.copyfile(modeling_rankdyna.__file__, staging / f"{MODULE}.py")
        os.replace(code, folder / code.name)
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(staging / CONFIG_NAME, folder / CONFIG_NAME)


def keep_self_contained(model: PreTrainedModel) -> None:
    """[`make_self_contained`] for a model that was just loaded, if its checkpoint was so."""
    if type(model) is stock_class(model) and own_entries(model):
        make_self_contained(model)


def _auto_classes(model: PreTrainedModel) -> dict[str, type[PreTrainedModel]]:
    """The Auto classes that load models of this configuration, and the class that each makes of it."""
    classes: dict[str, type[PreTrainedModel]] = {}
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(model.config) in mapping:
            loaded = mapping[type(model.config)]
            several = loaded if isinstance(loaded, (tuple, list)) else (loaded,)
            classes[name] = next((one for one in several if one.__name__ == type(model).__name__), several[0])
    return classes
