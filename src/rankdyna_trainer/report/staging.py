"""Files that are written whole or not at all: first into a folder beside the place that they are for."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

STAGING_PREFIX = "_rankdyna-"
# A file in each such folder that says whose it is: a folder of the user's may have the same name.
OWNER = ".rankdyna-staging"
# After so long, what another machine began to write into a shared folder is no longer waited for.
_STALE_SECONDS = 24 * 3600

_in_use: set[Path] = set()


@contextmanager
def staging_folder(directory: Path) -> Iterator[Path]:
    """
    A folder on the same disk, from which finished files can be moved in at once. It is gone afterwards.

    Args:
        directory: which exists, and for which the files are meant.
    """
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=directory))
    in_use = staging.resolve()  # from Python 3.12 on mkdtemp makes the path absolute, and a glob does not
    _in_use.add(in_use)
    try:
        (staging / OWNER).write_text(f"{socket.gethostname()} {os.getpid()}", encoding="utf-8")
        yield staging
    finally:
        _in_use.discard(in_use)
        shutil.rmtree(staging, ignore_errors=True)


def stale_staging(directory: Path) -> list[Path]:
    """What processes left that were killed while they wrote: not what another one writes now, or a user's own."""
    return [path for path in directory.glob(f"{STAGING_PREFIX}*") if path.resolve() not in _in_use and _is_left(path)]


def _is_left(folder: Path) -> bool:
    with suppress(OSError, ValueError):
        machine, process = (folder / OWNER).read_text(encoding="utf-8").split()
        if machine != socket.gethostname():
            return (folder / OWNER).stat().st_mtime < time.time() - _STALE_SECONDS
        return int(process) == os.getpid() or not psutil.pid_exists(int(process))
    return False
