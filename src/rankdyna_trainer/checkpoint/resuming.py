"""Whether a checkpoint has all that an exact resume needs."""

import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .integrity import read_headers
from .training import weight_files

# A part of the name is enough: under FSDP2 the optimizer's state is a folder, and some files have other endings.
STATES = {"optimizer": "the state of the optimizer", "scheduler": "the state of the learning rate"}


def check_whole(checkpoint: str | Path, model: nn.Module, process: int | None) -> None:
    """
    Check that a checkpoint has what the run went on with when it was written: a `Trainer` goes on without in silence.

    Args:
        checkpoint: the folder.
        model: which was loaded from it.
        process: the number of this one, or `None` if it is the only one.

    Raises:
        ValueError: a file or a tensor of the model is missing.
    """
    folder = Path(checkpoint)
    random = "rng_state.pth" if process is None else f"rng_state_{process}.pth"
    found = [path.name for path in folder.iterdir()]
    missing = [what for name, what in STATES.items() if not any(file.startswith(name) for file in found)]
    if random not in found:
        missing.append(f"the random numbers of this process ({random})")
    if any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        missing += _missing_tensors(folder, model)
    if missing:
        raise ValueError(
            f"{folder} is incomplete, and the run cannot go on from it as if it had not been stopped: it lacks "
            f"{', '.join(missing)}. Copy the whole folder again, resume from another checkpoint, or start anew."
        )


def _missing_tensors(folder: Path, model: nn.Module) -> list[str]:
    headers = read_headers([str(file) for file in weight_files(folder)])
    expected: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        expected.setdefault(id(tensor), []).append(name)  # a tied tensor is saved under one of its names
    if not any(name in headers for names in expected.values() for name in names):
        return []  # a model that is saved under names of its own
    left_out: Any = getattr(model, "_keys_to_ignore_on_save", None) or []
    return [
        f"the tensor {names[0]}"
        for names in expected.values()
        if not any(name in headers or any(re.search(pattern, name) for pattern in left_out) for name in names)
    ]
