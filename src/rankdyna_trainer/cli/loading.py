"""Models with their weights, in the class that their configuration names."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint.empty_model import model_class, read_config
from ..checkpoint.integrity import read_headers
from ..checkpoint.training import advice_on_variants, is_training_checkpoint, weight_files
from ..layers.rank_record import record_of


def quantization_method(config: Any) -> str | None:
    """By which method the weights of a saved model are quantized, if they are."""
    record = getattr(config, "quantization_config", None)
    return None if record is None else str(dict(record).get("quant_method"))


def refuse_compressed(source: str | Path, config: Any, variant: str | None = None) -> None:
    """
    Check that a model can still be compressed.

    Raises:
        ValueError: it is compacted, in training, or quantized.
    """
    if record_of(config) is not None:
        raise ValueError(
            f"{source} is compacted already: `rankdyna report {source}` tells of it, and `rankdyna merge {source} -o "
            "DIR` makes it dense again."
        )
    if (method := quantization_method(config)) is not None:
        raise ValueError(f"{source} is quantized ({method}): take the model that it was made from.")
    try:
        headers = read_headers([str(file) for file in weight_files(source, variant)])
    except FileNotFoundError:  # on the Hub, in another format, or a configuration alone
        return
    if is_training_checkpoint(headers):
        raise ValueError(
            f"{source} is a checkpoint of a running compression: `rankdyna report {source}` tells of it, and "
            f"`rankdyna compact {source} -o DIR` cuts it off at its present ranks."
        )


def load_dense(
    folder: Path, variant: str | None = None, trust_remote_code: bool = False, **placed: Any
) -> PreTrainedModel:
    """
    A model that is to be compressed, in its own precision; `placed` is `device_map` and the like.

    Raises:
        ValueError: it is compressed or quantized already, or has tensors that would be lost.
    """
    config = read_config(folder, trust_remote_code)
    refuse_compressed(folder, config, variant)
    return _load(folder, config, None, variant, trust_remote_code, **placed)


def load_compacted(
    folder: Path, dtype: torch.dtype | None = None, variant: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """
    A compacted model, in its own precision or another.

    Raises:
        ValueError: it is no compacted one, or has tensors that would be lost.
    """
    config = read_config(folder, trust_remote_code)
    if record_of(config) is None:
        raise ValueError(
            f"{folder} holds no compacted model: `rankdyna compact` makes one of a checkpoint-N of a running "
            "compression, and `rankdyna compress` of a dense model."
        )
    read_headers([str(file) for file in weight_files(folder, variant)])  # names the file that is damaged, if one is
    return _load(folder, config, dtype, variant, trust_remote_code)


def _load(
    folder: Path, config: Any, dtype: torch.dtype | None, variant: str | None, trust_remote_code: bool, **placed: Any
) -> PreTrainedModel:
    chosen = model_class(config, trust_remote_code)
    options: Any = {"trust_remote_code": trust_remote_code, "variant": variant, "dtype": dtype or "auto", **placed}
    try:
        model, found = chosen.from_pretrained(folder, output_loading_info=True, **options)
    except OSError as error:
        raise OSError(f"{error}{advice_on_variants(folder)}") from error
    if lost := sorted(found["unexpected_keys"]):
        named = getattr(config, "architectures", None)
        raise ValueError(
            f"{folder} has {len(lost)} tensors without a place in a {type(model).__name__}, which its config.json "
            f"{'names' if named else 'stands for, since it has no architectures'} ({lost[0]}, ...): what is written "
            "would lack them. Load the model with the class that it was trained as and save it, so that config.json "
            "names that; or save it once as it is loaded here, if they are of no use."
        )
    return model
