"""Compacted models on disk: written whole or not at all."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file, save_model
from torch import nn

from ..layers.distributed import is_sharded
from ..report.staging import remove_stale_staging, staged, staging_folder

# What is written in any case, or beside it.
FILES = ("config.json", "model.safetensors", "README.md", "ranks.png")
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


def check_writable(directory: str | Path) -> None:
    """
    Check, before the work is done, that a model can be saved into a folder, which is made if it is missing.

    Raises:
        OSError: it cannot.
    """
    target = Path(directory)
    if target.is_file():
        raise NotADirectoryError(f"{target} is a file: give the folder to save the compacted model in.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with staging_folder(target):
            pass
    except OSError as error:
        raise OSError(
            f"No model can be saved in {target} ({error}): make it a folder that can be written, or give another one."
        ) from error
    check_free(target, FILES)


def check_free(directory: Path, names: Iterable[str]) -> None:
    """
    Check that no folder stands where a file is to be written.

    Raises:
        IsADirectoryError: one does.
    """
    for name in names:
        if (directory / name).is_dir():
            raise IsADirectoryError(
                f"{directory / name} is a folder, and the compacted model needs a file of this name: move it away, or "
                "give another output_dir."
            )


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
        OSError: `directory` cannot be written, or has a folder in the place of a file. What was in it is still there.
    """
    target = Path(directory)
    check_writable(target)
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
        written = sorted(staged(staging), key=lambda path: path.name == "config.json")
        check_free(target, [path.name for path in written if path.is_file()])
        (target / "config.json").unlink(missing_ok=True)
        for pattern in WEIGHTS_PATTERNS:
            for stale in target.glob(pattern):
                if not stale.is_dir():
                    stale.unlink()
        size = sum(path.stat().st_size for path in staging.rglob("*.safetensors"))
        for path in written:
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                os.replace(path, target / path.name)
    return size
