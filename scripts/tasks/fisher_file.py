"""A file with the Fisher information of a fine-tuned model, which serves each method and ratio that needs it."""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankdyna_trainer.layers.dense import DenseLayer, dense_weight

logger = logging.getLogger("fisher_file")


def fisher_from_file(
    path: Path, layers: dict[str, DenseLayer], rows: Dataset, estimate: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """
    What is in the file, or, if there is none, what `estimate` gives, which is then written to it. Who comes while
    another process is at that waits for it.

    Args:
        path: of the file.
        layers: the layers whose Fisher information it is, by name.
        rows: on which it is estimated.
        estimate: makes it.

    Raises:
        ValueError: the file is not readable, or it was made for other weights or rows.
    """
    made_for = _digest(layers, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        return _read(path, made_for) if path.exists() else _write(path, made_for, estimate())


def _read(path: Path, made_for: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("made_for")
            fisher = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--fisher_file {path} cannot be read: {error}. Delete it, or name another one.") from error
    if found != made_for:
        raise ValueError(
            f"--fisher_file {path} was made for other weights, or for other training rows, than those of this run: "
            "delete it, or name another one."
        )
    logger.info("The Fisher information is read from %s.", path)
    return fisher


def _write(path: Path, made_for: str, fisher: dict[str, Tensor]) -> dict[str, Tensor]:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    save_file({name: values.cpu().contiguous() for name, values in fisher.items()}, unfinished, {"made_for": made_for})
    os.replace(unfinished, path)
    return fisher


def _digest(layers: dict[str, DenseLayer], rows: Dataset) -> str:
    digest = hashlib.sha256()
    for batch in rows.iter(100):
        for column, values in batch.items():
            for value in map(np.asarray, values):
                digest.update(f"{column} {value.dtype} {value.shape}".encode() + value.tobytes())
    for name, layer in layers.items():
        digest.update(name.encode())
        digest.update(dense_weight(layer).detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
