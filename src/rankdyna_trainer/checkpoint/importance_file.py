"""The scores of the groups of a compacted model, in a file beside its weights that no loader reads."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..layers.group_importance import noted_importance
from ..report.staging import staging_folder
from .output_folder import IMPORTANCE_FILE


def write_importance(model: nn.Module, directory: str | Path) -> None:
    """
    Write what [`~rankdyna_trainer.layers.group_importance.noted_importance`] knows of a model beside its weights, or
    remove the scores of another model that had the same folder.

    Args:
        model: compacted.
        directory: in which it was saved.

    Raises:
        OSError: the file cannot be written.
    """
    folder = Path(directory)
    importance = noted_importance(model)
    if not importance:
        (folder / IMPORTANCE_FILE).unlink(missing_ok=True)
        return
    with staging_folder(folder) as staging:
        save_file({name: scores.contiguous() for name, scores in importance.items()}, staging / IMPORTANCE_FILE)
        os.replace(staging / IMPORTANCE_FILE, folder / IMPORTANCE_FILE)


def read_importance(directory: str | Path, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """
    The scores beside a compacted model.

    Args:
        directory: of the model.
        ranks: of its compacted layers, by name.

    Returns:
        `(rank,)` for each of these layers, by name.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is damaged, or of another model.
    """
    path = Path(directory) / IMPORTANCE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no {IMPORTANCE_FILE}, the scores that the end of a run leaves beside its model: give "
            "rows to score the groups on, with --train_file, or in Python to shrink_on_data."
        )
    try:
        importance = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}. Copy or download it again.") from error
    misfits = [name for name, rank in ranks.items() if name not in importance or importance[name].shape != (rank,)]
    if misfits or importance.keys() - ranks.keys():
        raise ValueError(
            f"{path} has not one score for each group of {misfits[0] if misfits else 'the layers'}, as config.json "
            "lists them: it is of another model. Copy the whole folder again."
        )
    return importance
