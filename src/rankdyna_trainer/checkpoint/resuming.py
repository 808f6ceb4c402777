"""Whether a checkpoint has all that an exact resume needs."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..layers.injection import OF_GROUPS
from ..layers.low_rank import STANDS_FOR_WEIGHT
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
    missing += [f"the tensor {name}" for name in missing_tensors(folder, model)]
    if missing:
        raise ValueError(
            f"{folder} is incomplete, and the run cannot go on from it as if it had not been stopped: it lacks "
            f"{', '.join(missing)}. Copy the whole folder again, resume from another checkpoint, or start anew."
        )


def check_same_model(checkpoint: str | Path, model: nn.Module) -> None:
    """
    Check, before anything is loaded, that a checkpoint is of a model of the same layers and sizes.

    Args:
        checkpoint: the folder.
        model: into which it is to be loaded, dense or with singular groups, as those of the checkpoint may be.

    Raises:
        ValueError: it is not; or a file is damaged.
    """
    folder = Path(checkpoint)
    if not any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return
    headers = read_headers([str(file) for file in weight_files(folder)])
    tensors = model.state_dict(keep_vars=True)
    if not headers.keys() & tensors.keys():
        return  # a model that is saved under names of its own
    left_out: Any = getattr(model, "_keys_to_ignore_on_save", None) or []
    owners: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        owners.setdefault(id(tensor), set()).add(_owner(name))
    saved, here = {_owner(name) for name in headers}, {name for names in owners.values() for name in names}
    ignored = {_owner(name) for name in tensors if any(re.search(pattern, name) for pattern in left_out)}
    misfits = {
        "of another shape there": [
            name for name, header in headers.items() if not _fits(header.shape, name, tensors.get(name))
        ],
        "in layers that this model lacks": [name for name in headers if _owner(name) not in here],
        "in layers that the checkpoint lacks": [
            name for name, tensor in tensors.items() if not owners[id(tensor)] & (saved | ignored)
        ],
    }
    found = [f"{len(names)} {what} ({names[0]:.200}, ...)" for what, names in misfits.items() if names]
    if found:
        raise ValueError(
            f"{folder} is of a model of other sizes or layers than the {type(model).__name__} that is to be trained. "
            f"Of the tensors are {'; '.join(found)}. Resume with the model that the run began with, or start anew."
        )


def _owner(name: str) -> str:
    """The layer that a tensor belongs to: in its place may stand one of another form."""
    layer, _, tensor = name.rpartition(".")
    return layer.removesuffix(".p").removesuffix(".q") if tensor in ("weight", "bias") else layer


def _fits(saved: tuple[int, ...], name: str, tensor: Tensor | None) -> bool:
    """Whether a saved tensor has the shape of that of the model, but for the number of groups."""
    if tensor is None:
        return True
    here = tuple(tensor.shape)
    if STANDS_FOR_WEIGHT in (saved, here) and max(len(saved), len(here)) > 1:
        return True
    of_groups = name.endswith(OF_GROUPS)
    return saved[of_groups:] == here[of_groups:]


def missing_tensors(checkpoint: str | Path, model: nn.Module) -> list[str]:
    """
    The tensors of a model that a checkpoint lacks, by name.

    Args:
        checkpoint: the folder.
        model: which was loaded from it.
    """
    folder = Path(checkpoint)
    if not any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return []
    headers = read_headers([str(file) for file in weight_files(folder)])
    expected: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        expected.setdefault(id(tensor), []).append(name)  # a tied tensor is saved under one of its names
    if not any(name in headers for names in expected.values() for name in names):
        return []  # a model that is saved under names of its own
    left_out: Any = getattr(model, "_keys_to_ignore_on_save", None) or []
    return [
        names[0]
        for names in expected.values()
        if not any(name in headers or any(re.search(pattern, name) for pattern in left_out) for name in names)
    ]
