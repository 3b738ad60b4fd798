"""How many masked images to ask for at once: the fastest batch among those that fit into memory, by trial."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from mcrise_ray.plan import unit_size
from mcrise_ray.spec import ExplainSpec

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)

_SMALLEST, _LARGEST = 8, 1024
_GAIN = 1.03  # a larger batch must be worth its memory
_PATIENCE = 2  # larger batches in a row that gain nothing
_REPEATS = 3
_HOPELESS = 0.6  # of the other's speed: no further repeats are needed

_CGROUP = Path("/sys/fs/cgroup")


def candidates(spec: ExplainSpec) -> list[int]:
    """Batch sizes that divide a unit, each at least half as large again as the one before it."""
    whole = min(unit_size(spec), spec.masks)
    sizes: list[int] = []
    for size in range(min(_SMALLEST, whole), min(_LARGEST, whole) + 1):
        if whole % size == 0 and (not sizes or size >= 1.5 * sizes[-1]):
            sizes.append(size)
    return sizes or [whole]


def fastest(
    ask: Callable[[int], object], sizes: Sequence[int], device: torch.device, share: float
) -> tuple[int, str]:
    """The batch size with the most images per second, and why it is that one.

    Args:
        ask: scores a batch of the given size and waits for the scores.
        sizes: in ascending order; the first one is taken to fit.
        device: whose memory is bounded.
        share: of the memory that is free now, which the batches may take.
    """
    limit = share * free_memory(device)
    before = _peak_memory(device)
    ask(sizes[0])
    best, tried, without_gain = sizes[0], sizes[0], 0
    for size in sizes[1:]:
        # Grows with the batch; what the first batch took includes what any batch takes.
        need = (_peak_memory(device) - before) * size / tried
        if need > limit:
            return best, f"{size} images might take {need / 2**30:.1f} GiB, more than {limit / 2**30:.1f} GiB"
        try:
            gain = speed_ratio(partial(ask, best), partial(ask, size), _REPEATS) * size / best
        except OUT_OF_MEMORY:
            return best, f"{size} images do not fit into memory"
        tried = size
        best, without_gain = (size, 0) if gain >= _GAIN else (best, without_gain + 1)
        if without_gain == _PATIENCE:
            return best, f"{size} images at once are no faster"
    return best, f"the fastest up to {tried}"


def speed_ratio(base: Callable[[], object], trial: Callable[[], object], repeats: int) -> float:
    """How many times as fast `trial` is: the median over runs of both in turn, each after a first one."""
    base()
    trial()
    ratios: list[float] = []
    while len(ratios) < repeats:
        began = time.perf_counter()
        base()
        between = time.perf_counter()
        trial()
        ratios.append((between - began) / (time.perf_counter() - between))
        if ratios[0] < _HOPELESS:
            break
    return statistics.median(ratios)


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a run, after a first one."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def free_memory(device: torch.device) -> int:
    """Bytes of the device that nobody uses: on the CPU, within the limit of this container."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    free = [_free_of_machine()]
    limit, used = (_number_in(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free.append(max(0, limit - used))
    return min(free)


def _free_of_machine() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _number_in(path: Path) -> int | None:
    """The number in a file of the kernel; None where there is no file, or no limit."""
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None


def _peak_memory(device: torch.device) -> int:
    """Bytes that this process ever took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
