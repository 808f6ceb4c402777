"""A model without weights, made from its configuration alone."""

from functools import partial
from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME

from ..options import check_source

ADVICE_ON_CODE = (
    "Read it, and if you trust it: give --trust_remote_code on the command line, or load the model in Python with "
    "from_pretrained(..., trust_remote_code=True)."
)


def read_config(source: str | Path, trust_remote_code: bool = False) -> Any:
    """
    The configuration of a model.

    Args:
        source: a folder with a `config.json`, or the name of a Hub repository, of which only that file is read.
        trust_remote_code: run the code that lies beside the model, if its configuration names some.

    Raises:
        FileNotFoundError: there is no such folder (and no repository can have this name), or it has no `config.json`.
        OSError: the repository has no configuration, or cannot be reached; the configuration is no JSON.
        ValueError: the configuration needs code of its own, which is not run.
    """
    path = Path(source)
    check_source(str(source))
    if path.is_file():
        raise NotADirectoryError(f"{source} is a file: give the folder of a model, or the name of a Hub repository.")
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{source} has no {CONFIG_NAME}: it holds no saved model.{newest_inside(path)}")
    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except OSError as error:
        if path.is_dir():
            raise
        raise OSError(f"There is no folder {source}, and it cannot be had from the Hub: {error}") from error
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{source} needs custom code that lies beside it, which is not run. {ADVICE_ON_CODE}"
        ) from error


def newest_inside(folder: Path) -> str:
    """A sentence that names the newest `checkpoint-N` of a run's folder; empty if there is none."""
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return f" The newest checkpoint of the run is {newest}." if newest else ""


def model_class(config: Any, trust_remote_code: bool = False) -> Any:
    """
    The class that a configuration names: of a model in `transformers`, or `AutoModel` if it names none. For a class
    whose code lies beside the model and is trusted, it is the Auto class that loads it.

    Raises:
        ValueError: `transformers` has no such class.
    """
    architectures = getattr(config, "architectures", None)
    if not architectures:
        return AutoModel
    name = architectures[0]
    codes = getattr(config, "auto_map", None) or {}
    by_code = [auto for auto, code in codes.items() if auto.startswith("AutoModel") and _class_of(code) == name]
    if trust_remote_code and by_code:
        return getattr(transformers, by_code[0])
    found = getattr(transformers, str(name), None)
    if found is None and by_code:
        raise ValueError(f"The architecture {name!s:.200} needs custom code that is not run. {ADVICE_ON_CODE}")
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"config.json names the architecture {name!s:.200}, which transformers {transformers.__version__} does "
            "not have: it needs code of its own, or another version."
        )
    return found


def _class_of(code: object) -> str:
    return str(code).rpartition(".")[2]


def empty_model(config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """
    The model of a configuration, its parameters without values (device meta) and its buffers with theirs.

    Args:
        config: from [`read_config`].
        trust_remote_code: as there.
    """
    chosen = model_class(config, trust_remote_code)
    make = getattr(chosen, "_from_config", None) or partial(chosen.from_config, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model = make(config)
    model.tie_weights()  # the exchange of each parameter for an empty one has parted them
    return model
