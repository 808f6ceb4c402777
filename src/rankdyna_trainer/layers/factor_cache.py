"""A folder that keeps factorizations for the next task, and for other processes (paper, section 1)."""

import hashlib
import logging
import math
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

SIZE_VARIABLE = "RANKDYNA_CACHE_SIZE_GB"
DEFAULT_SIZE_GB = 20.0
# Nothing of other names is ever deleted: the folder may be one in which the user keeps more.
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_UNFINISHED = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{32}\.tmp")
_STALE_SECONDS = 3600

Factors = tuple[Tensor, Tensor, Tensor]

logger = logging.getLogger(__name__)


class FactorizationCache:
    """
    Keeps the singular groups of weights in a folder, one safetensors file for each, named by the weight's bytes.

    Any number of processes and threads may use one folder at once, without locks: a file is written beside and
    renamed, two that write the same one write the same, and what another process has deleted is not found. A file
    that is not what was written is made anew, with a warning. If the folder or a file in it cannot be written, one
    warning says why, and the run goes on without.

    The folder holds `RANKDYNA_CACHE_SIZE_GB` (an environment variable, in 10^9 bytes, 20 if it is not set). To make
    room for a new file, those that were not used for longest are deleted, but none that this object used: of a model
    that is larger than the limit, the layers that fit are kept.

    Args:
        folder: made if it is missing.

    Raises:
        ValueError: `RANKDYNA_CACHE_SIZE_GB` is no number of at least 0.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._max_bytes = _max_bytes()
        self._used: set[Path] = set()
        self._lock = Lock()
        self._readable = self._writable = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._delete_stale()
        except OSError as error:
            self._readable = False
            self._stop_writing(f"cannot be used ({error})")

    def key(self, weight: Tensor) -> str:
        """The name under which the groups of this very weight are kept."""
        return _digest(weight)

    def find(self, key: str, device: torch.device) -> Factors | None:
        """
        The groups that are kept under this name, or `None`.

        Args:
            key: from [`key`].
            device: on which the groups are wanted.
        """
        if not self._readable:
            return None
        file = self._file(key)
        try:
            with safe_open(file, "pt") as stored:
                u, sigma, v = (stored.get_tensor(name) for name in ("u", "sigma", "v"))
                expected = (stored.metadata() or {}).get("digest")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read (%s): it is made anew.", file, error)
            return None
        if expected != _digest(u, sigma, v, of=key):
            logger.warning("%s does not hold the factorization of its weight: it is made anew.", file)
            return None
        self._used.add(file)
        with suppress(OSError):  # of another user, or read-only
            os.utime(file)
        # A copy, since the tensors are the file itself, mapped into memory.
        return u.to(device, copy=True), sigma.to(device, copy=True), v.to(device, copy=True)

    def keep(self, key: str, factors: Factors) -> None:
        """
        Write the groups of a weight, if there is room.

        Args:
            key: of the weight, from [`key`].
            factors: `u`, `sigma` and `v`.
        """
        if not self._writable:
            return
        u, sigma, v = (factor.cpu() for factor in factors)
        content = save({"u": u, "sigma": sigma, "v": v}, {"digest": _digest(u, sigma, v, of=key)})
        file = self._file(key)
        beside = self._folder / f"{key}.{uuid4().hex}.tmp"
        with self._lock:
            if not self._writable:
                return
            try:
                if not self._make_room(file, len(content)):
                    self._stop_writing(f"is full of what this run uses (raise {SIZE_VARIABLE}?)")
                    return
                beside.write_bytes(content)
                os.replace(beside, file)
            except OSError as error:
                self._stop_writing(f"cannot be written ({error})")
                with suppress(OSError):
                    beside.unlink()
            else:
                self._used.add(file)

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _stop_writing(self, reason: str) -> None:
        self._writable = False
        logger.warning(
            "The factorization cache %s %s: what is not in it yet is computed, and not kept.", self._folder, reason
        )

    def _make_room(self, file: Path, size: int) -> bool:
        kept = self._files(_ENTRY)
        kept.pop(file, None)  # about to be replaced
        excess = sum(status.st_size for status in kept.values()) + size - self._max_bytes
        unused = sorted(kept.keys() - self._used, key=lambda path: kept[path].st_mtime)
        if excess > sum(kept[path].st_size for path in unused):
            return False
        for path in unused:
            if excess <= 0:
                break
            with suppress(OSError):  # open in another process, on Windows, or of another user
                path.unlink(missing_ok=True)
                excess -= kept[path].st_size
        return excess <= 0

    def _delete_stale(self) -> None:
        """What processes left that were killed while they wrote. One that lives needs seconds for it."""
        for path, status in self._files(_UNFINISHED).items():
            if status.st_mtime < time.time() - _STALE_SECONDS:
                with suppress(OSError):
                    path.unlink()

    def _files(self, name: re.Pattern[str]) -> dict[Path, os.stat_result]:
        found = {}
        for path in self._folder.iterdir():
            if name.fullmatch(path.name):
                with suppress(FileNotFoundError):  # another process deleted it
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode):
                        found[path] = status
        return found


def _max_bytes() -> float:
    value = os.environ.get(SIZE_VARIABLE, DEFAULT_SIZE_GB)
    try:
        size = float(value)
    except ValueError:
        size = math.nan
    if not size >= 0:
        raise ValueError(f"The environment variable {SIZE_VARIABLE} must be a number of at least 0: got {value!r}.")
    return size * 1e9


def _digest(*tensors: Tensor, of: str = "") -> str:
    digest = hashlib.sha256(of.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
