"""How much memory is free, how much this process took at most, and how it keeps what it frees."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Final

import torch

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_NEVER = 2**31 - 1

ONE_HEAP: Final = {"MALLOC_ARENA_MAX": "1"}
"""Environment of a process in which `keep_freed` is for all threads: by default all but the main one have
heaps of their own, which hold no block above 64 MiB, and go back to the kernel when nothing is in them.
"""

_CPU = torch.device("cpu")


def free_memory(device: torch.device = _CPU) -> int:
    """Bytes of the device that nobody uses: on the CPU, within the limit of this container."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    free = [_free_of_machine()]
    limit, used = (_number_in(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free.append(max(0, limit - used))
    return min(free)


def peak_memory(device: torch.device = _CPU) -> int:
    """Bytes that this process took at most since `forget_peak`, or ever where nothing forgets."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        return _kibibytes(_STATUS, "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device = _CPU) -> None:
    """Start anew with what is taken now; only Linux and CUDA can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(_CLEAR, os.W_OK):
        _CLEAR.write_text("5")


def keep_freed() -> bool:
    """Let this process keep the memory that it frees, for its next batch; glibc alone can, others say False.
    It is for the main thread alone, unless the process began with `ONE_HEAP`.

    The kernel clears every page that it hands out, and by default glibc returns large blocks at once: on a
    CPU that is a tenth of the time of a ResNet-50, and a third of that of a MobileNetV2.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def _free_of_machine() -> int:
    if _MEMINFO.exists():
        return _kibibytes(_MEMINFO, "MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _kibibytes(path: Path, field: str) -> int:
    """A line `field: number kB` of a file of the kernel, in bytes."""
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _number_in(path: Path) -> int | None:
    """The number in a file of the kernel; None where there is no file, or no limit."""
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None
