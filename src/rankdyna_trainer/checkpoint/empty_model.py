"""A model without weights, made from its configuration alone."""

from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME


def read_config(source: str | Path) -> Any:
    """
    The configuration of a model.

    Args:
        source: a folder with a `config.json`, or the name of a Hub repository, of which only that file is read.

    Raises:
        FileNotFoundError: there is no such folder (and no repository can have this name), or it has no `config.json`.
        OSError: the repository has no configuration, or cannot be reached; the configuration is no JSON.
        ValueError: the configuration needs code of its own, which is not run.
    """
    path = Path(source)
    if not path.exists() and (str(source).startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2):
        raise FileNotFoundError(f"There is no folder {source}.")
    if path.is_file():
        raise NotADirectoryError(f"{source} is a file: give the folder of a model, or the name of a Hub repository.")
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{source} has no {CONFIG_NAME}: it holds no saved model.{newest_inside(path)}")
    return AutoConfig.from_pretrained(str(source), trust_remote_code=False)


def newest_inside(folder: Path) -> str:
    """A sentence that names the newest `checkpoint-N` of a run's folder; empty if there is none."""
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return f" The newest checkpoint of the run is {newest}." if newest else ""


def model_class(config: Any) -> Any:
    """
    The class that a configuration names: of a model in `transformers`, or `AutoModel` if it names none.

    Raises:
        ValueError: `transformers` has no such class.
    """
    architectures = getattr(config, "architectures", None)
    if not architectures:
        return AutoModel
    name = architectures[0]
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"config.json names the architecture {name!s:.200}, which transformers {transformers.__version__} does "
            "not have: it needs code of its own, or another version."
        )
    return found


def empty_model(config: Any) -> PreTrainedModel:
    """
    The model of a configuration, its parameters without values (device meta) and its buffers with theirs.

    Args:
        config: from [`read_config`].
    """
    chosen = model_class(config)
    make = chosen.from_config if chosen is AutoModel else chosen._from_config
    with init_empty_weights(include_buffers=False):
        model = make(config)
    model.tie_weights()  # the exchange of each parameter for an empty one has parted them
    return model
