"""A saved model as `report`, `plot` and `curve` look at it: without its weights."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from ..layers.rank_record import record_of
from .empty_model import empty_model, read_config
from .integrity import read_headers
from .loader import with_ranks
from .training import is_training_checkpoint, outline_training_checkpoint, weight_files


class Outline(NamedTuple):
    """A compressed model with the shapes of its layers and no weights; how it was saved; the size of its files."""

    model: PreTrainedModel
    in_training: bool
    file_bytes: int


def outline(folder: Path, variant: str | None = None, trust_remote_code: bool = False) -> Outline:
    """
    What a folder holds, told by its `config.json` and the headers of its files.

    Raises:
        ValueError: it holds neither a compacted checkpoint nor one of a running compression, or is damaged.
    """
    config = read_config(folder, trust_remote_code)
    files = weight_files(folder, variant)
    headers = read_headers([str(file) for file in files])
    file_bytes = sum(file.stat().st_size for file in files)
    if is_training_checkpoint(headers):
        return Outline(outline_training_checkpoint(folder, trust_remote_code), True, file_bytes)
    if (record := record_of(config)) is None:
        raise ValueError(
            f"{folder} holds no compressed model: see `rankdyna inspect {folder}` for what a compression would do."
        )
    model = empty_model(config, trust_remote_code)
    with_ranks(None, record).preprocess_model(model, checkpoint_files=[str(file) for file in files])
    return Outline(model, False, file_bytes)
