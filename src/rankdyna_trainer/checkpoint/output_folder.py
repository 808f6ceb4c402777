"""What stands in the way of a model that is to be saved at the end is said before the work begins."""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..layers.dense import expects_groups
from ..layers.singular_group import SingularGroupLinear
from ..report.staging import staging_folder

# The scores of the groups, which are no weights.
IMPORTANCE_FILE = "importance.safetensors"
# What is written in any case, or beside it.
FILES = ("config.json", "model.safetensors", IMPORTANCE_FILE, "README.md", "ranks.png")
WEIGHTS_PATTERNS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")


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
        with staging_folder(target) as staging:
            (staging / "folder").mkdir()
            (staging / "file").write_bytes(b"trial")
            os.replace(staging / "file", staging / "folder" / "file")
    except OSError as error:
        raise OSError(
            f"No model can be saved in {target} ({error}): make it a folder that can be written, or give another one."
        ) from error


def check_free(directory: Path, names: Iterable[str | Path]) -> None:
    """
    Check that files can be written: no folder stands in their place, no file in that of a folder around them.

    Args:
        directory: in which they are to be written.
        names: relative to it.

    Raises:
        IsADirectoryError: a folder stands there.
        NotADirectoryError: a file stands where a folder is needed.
        PermissionError: a file there is protected from being replaced.
    """
    for name in names:
        path = directory / name
        if path.is_dir():
            raise IsADirectoryError(
                f"{path} is a folder, and the compacted model needs a file of this name: move it away, or give "
                "another output_dir."
            )
        for parent in path.parents:
            if parent == directory:
                break
            if os.path.lexists(parent) and not parent.is_dir():
                raise NotADirectoryError(
                    f"{parent} is no folder, and the compacted model needs one of this name: move it away, or give "
                    "another output_dir."
                )
        _check_replaceable(path)


def check_room(directory: Path, needed: int) -> None:
    """
    Check that there is room for a model. An old one is deleted only when the new one is written.

    Args:
        directory: in which it is to be saved.
        needed: bytes that it has at least.

    Raises:
        OSError: there is not.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"There is no room in {directory}: the compacted model has at least {needed / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free. Make room, or give another output_dir.",
        )


def least_bytes(model: nn.Module) -> int:
    """How many bytes the file of a model has at least once it is compacted: all but the weights that will shrink."""
    shrinking = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, SingularGroupLinear) or expects_groups(layer)
        for parameter in layer.parameters()
    }
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in shrinking)


def _check_replaceable(path: Path) -> None:
    if not path.is_file():
        return
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        if error.errno == errno.EPERM:  # not EACCES: a file that may not be written may well be replaced
            raise PermissionError(
                f"{path} is protected from being replaced ({error.strerror}), and the compacted model needs a file of "
                "this name: take the protection off (chattr -i), or give another output_dir."
            ) from error
