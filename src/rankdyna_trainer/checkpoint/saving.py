"""Compacted models on disk: written whole or not at all."""

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file, save_model
from torch import nn

from ..layers.distributed import is_sharded
from ..report.staging import remove_stale_staging, staging_folder

WEIGHTS_PATTERNS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")


def whole_state_dict(model: nn.Module) -> dict[str, Any] | None:
    """
    All tensors of a model that FSDP2 shards, on the CPU of process 0 (empty elsewhere); `None` if it is not sharded.

    All processes have to call it.
    """
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_compacted(
    model: Any, directory: str | Path, processing_class: Any = None, state_dict: dict[str, Any] | None = None
) -> int:
    """
    Save a compacted model where `from_pretrained` finds it.

    All files are written beside and then moved in, the configuration last: a folder that has one is complete.

    Args:
        model: compacted.
        directory: made if it is missing.
        processing_class: the tokenizer or processor that belongs to the model.
        state_dict: of a sharded model, from [`whole_state_dict`].

    Returns:
        The size of the weight files in bytes.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    target = Path(directory)
    if target.is_file():
        raise NotADirectoryError(f"{target} is a file: give the folder to save the compacted model in.")
    target.mkdir(parents=True, exist_ok=True)
    remove_stale_staging(target)
    with staging_folder(target) as staging:
        if hasattr(model, "save_pretrained"):
            # Models of other libraries have a save_pretrained without this argument.
            model.save_pretrained(staging, **({} if state_dict is None else {"state_dict": state_dict}))
        elif state_dict is not None:
            save_file(state_dict, staging / "model.safetensors")
        else:
            save_model(model, str(staging / "model.safetensors"))
        if processing_class is not None:
            processing_class.save_pretrained(staging)
        written = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
        (target / "config.json").unlink(missing_ok=True)
        for pattern in WEIGHTS_PATTERNS:
            for stale in target.glob(pattern):
                stale.unlink()
        size = sum(path.stat().st_size for path in staging.rglob("*.safetensors"))
        for path in written:
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                os.replace(path, target / path.name)
    return size
