"""Files that are written whole or not at all: first into a folder beside the place that they are for."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGING_PREFIX = "_rankdyna-"


@contextmanager
def staging_folder(directory: Path) -> Iterator[Path]:
    """
    A folder on the same disk, from which finished files can be moved in at once. It is gone afterwards.

    Args:
        directory: which exists, and for which the files are meant.
    """
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=directory))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_stale_staging(directory: Path) -> None:
    """Remove what a process left that was killed while it wrote."""
    for stale in directory.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(stale, ignore_errors=True)
