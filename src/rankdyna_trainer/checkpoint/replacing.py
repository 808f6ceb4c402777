"""
A new model takes the place of an old one, so that one of the two is whole wherever the process dies.

The new one is written beside, in a folder that loads by itself. Then the files of the old one are moved away, its
configuration first, and those of the new one are linked in, its configuration last: a folder that has one is complete.
Whoever saves next finishes what a process that was killed had begun.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..layers.auto_map import MODULE
from ..report.staging import stale_staging
from .output_folder import IMPORTANCE_FILE, WEIGHTS_PATTERNS, check_free

# In a staging folder: the new model, the old one, and the sign that the first is complete and not yet in its place.
NEW, OLD, READY = "new", "old", "ready"

logger = logging.getLogger(__name__)


def put_in_place(staging: Path, target: Path) -> None:
    """
    Replace the model in a folder by the one in `staging/new`.

    Args:
        staging: a folder on the same disk.
        target: the folder, which may hold other things.

    Raises:
        OSError: a file cannot be replaced. The old model is where it was.
    """
    new, old = staging / NEW, staging / OLD
    files = _files(new)
    check_free(target, files)
    (staging / READY).touch()
    moved: list[Path] = []
    linked: list[Path] = []
    try:
        for file in _replaced(target, files):
            (old / file).parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(old / file):  # by the process that was killed: what is here is of the new model
                (target / file).unlink()
            else:
                os.replace(target / file, old / file)
            moved.append(file)
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            linked.append(file)
            _link(new / file, target / file)
    except BaseException:
        for file in linked:
            (target / file).unlink(missing_ok=True)
        for file in reversed(moved):  # the configuration last
            os.replace(old / file, target / file)
        raise
    finally:
        (staging / READY).unlink()


def finish_interrupted(target: Path) -> None:
    """Put a model in its place that a killed process had written, and remove what such processes left."""
    for staging in stale_staging(target):
        files = _files(staging / NEW)
        if files and (staging / READY).is_file() and not (target / files[-1]).is_file():
            put_in_place(staging, target)
            logger.warning("A process was killed while it saved a model in %s: what it began is finished now.", target)
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Wait for other processes that replace the model in a folder, where the system can tell of them."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # of file systems of a network that have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    """All files below a folder, relative to it, the configuration last."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(files, key=lambda file: file == Path("config.json"))


def _replaced(target: Path, files: list[Path]) -> list[Path]:
    """What is there of an old model, the configuration first."""
    weights = [path.relative_to(target) for pattern in WEIGHTS_PATTERNS for path in target.glob(pattern)]
    names = dict.fromkeys([Path("config.json"), *weights, Path(IMPORTANCE_FILE), Path(f"{MODULE}.py"), *files])
    return [name for name in names if os.path.lexists(target / name) and not (target / name).is_dir()]


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # a file system without links
        shutil.copyfile(source, place)
