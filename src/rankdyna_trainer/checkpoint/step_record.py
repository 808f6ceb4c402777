"""A small file in each checkpoint of a run, by which its other files are known to be of the same step."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .run_state import TRAINER_STATE_NAME
from .training import weight_files

RECORD_NAME = "rankdyna_step.json"
WEIGHTS = "the weights"
# Files of states, by the beginnings of their names; the random numbers of other processes may not be written yet.
OF_STATES = ("optimizer", "scheduler", "scaler", "rng_state.pth", "pytorch_model")
# How much of a file is looked at, and how often: each step changes all of it.
PIECE, PIECES = 2**16, 16


def write_record(checkpoint: str | Path, step: int, processes: int) -> None:
    """
    Note what the files of a checkpoint are.

    Args:
        checkpoint: the folder, which is complete, or was deleted to keep within `save_total_limit`.
        step: at which it was written.
        processes: that train the model.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return
    record = {"step": step, "processes": processes, "files": _digests(folder)}
    written = folder / f"{RECORD_NAME}.part"  # one that is there is whole
    written.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    written.replace(folder / RECORD_NAME)


def check_record(checkpoint: str | Path, processes: int) -> bool:
    """
    Check that the files of a checkpoint are those that were written at its step.

    Args:
        checkpoint: the folder.
        processes: that are to train the model.

    Returns:
        Whether there is a record: a run that is killed in this moment leaves none.

    Raises:
        ValueError: a file is another, or damaged; or other processes wrote them.
    """
    folder = Path(checkpoint)
    if not (folder / RECORD_NAME).is_file():
        return False
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        step, was, files = int(record["step"]), int(record["processes"]), dict(record["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / RECORD_NAME} is damaged: {error!r}. Copy the whole folder again.") from error
    if was != processes:
        raise ValueError(
            f"{folder} was written by a run of {was} processes, and has no random numbers for {processes}: an exact "
            "resume needs as many. Start as many, or start anew."
        )
    try:
        now = _digests(folder)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The weights in {folder} are damaged: {error}. Copy the whole folder again.") from error
    others = [name for name in files if name in now and now[name] != files[name]]
    if _step_of(folder) != step:
        others.append(TRAINER_STATE_NAME)
    if others:
        raise ValueError(
            f"{folder} has files of different steps, or damaged ones: {', '.join(others)} as written at step {step} "
            "would be others. Copy the whole folder again, resume from another checkpoint, or start anew."
        )
    if lost := [name for name in files if name not in now and name.startswith("scaler")]:
        raise ValueError(
            f"{folder} is incomplete, and the run cannot go on from it as if it had not been stopped: it lacks "
            f"{', '.join(lost)}. Copy the whole folder again, resume from another checkpoint, or start anew."
        )
    return True


def _step_of(folder: Path) -> int | None:
    try:
        state: Any = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _digests(folder: Path) -> dict[str, str]:
    """Of the states by the names of their files, and of the weights, whatever number of files they are in."""
    found = {}
    if any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        found[WEIGHTS] = _digest(_rows(folder))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.startswith(OF_STATES):
            found[name] = _digest(_pieces(path))
    return found


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _rows(folder: Path) -> Iterator[bytes]:
    """The name and the shape of each tensor, with its first and its middle row."""
    rows: dict[str, bytes] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_slice(name)
                shape = tensor.get_shape()
                places = {0, shape[0] // 2} if shape and shape[0] else set()
                parts = [tensor[place : place + 1] for place in sorted(places)] or [opened.get_tensor(name)]
                rows[name] = f"{name} {shape}".encode() + b"".join(_bytes_of(part) for part in parts)
    yield from (rows[name] for name in sorted(rows))


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _pieces(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield str(size).encode()
    with path.open("rb") as file:
        for number in range(PIECES):
            file.seek(max(size - PIECE, 0) * number // (PIECES - 1))
            yield file.read(PIECE)
