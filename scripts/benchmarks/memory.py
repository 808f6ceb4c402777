"""The most memory that was taken."""

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path

import torch

from .models import DEVICE


def peak_memory() -> int:
    """Bytes: on a GPU those allocated there, else those resident."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # On Linux, ru_maxrss begins with what the process that started this one took.
    if sys.platform == "linux":
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Begin anew, where that is possible."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it: freed memory goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux alone has this file
        Path("/proc/self/clear_refs").write_text("5")
