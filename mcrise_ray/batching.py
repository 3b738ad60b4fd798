"""How many masked images to ask for at once: the fastest batch among those that fit into memory, by trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from mcrise_ray.errors import ModelError
from mcrise_ray.memory import forget_peak, free_memory, peak_memory
from mcrise_ray.plan import unit_size
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.timing import speed_ratio

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)

_SMALLEST, _LARGEST = 8, 1024
_GAIN = 1.03  # a larger batch must be worth its memory
_PATIENCE = 2  # larger batches in a row that gain nothing
_REPEATS = 3


def largest(spec: ExplainSpec) -> int:
    """The most masked images that can be asked for at once: those of a unit."""
    return min(unit_size(spec), spec.masks)


def candidates(spec: ExplainSpec) -> list[int]:
    """Batch sizes that divide a unit, each at least half as large again as the one before it."""
    whole = largest(spec)
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
    forget_peak(device)
    before = peak_memory(device)
    ask(sizes[0])
    best, tried, without_gain = sizes[0], sizes[0], 0
    for size in sizes[1:]:
        # Grows with the batch; what the first batch took includes what any batch takes.
        need = (peak_memory(device) - before) * size / tried
        if need > limit:
            return best, f"{size} images might take {need / 2**30:.1f} GiB, more than {limit / 2**30:.1f} GiB"
        try:
            gain = speed_ratio(partial(ask, best), partial(ask, size), _REPEATS) * size / best
        except OUT_OF_MEMORY:
            return best, f"{size} images do not fit into memory"
        except ModelError as error:  # such as of tensors that are too large for its kernels
            return best, f"{size} images at once fail: {error}"
        tried = size
        best, without_gain = (size, 0) if gain >= _GAIN else (best, without_gain + 1)
        if without_gain == _PATIENCE:
            return best, f"{size} images at once are no faster"
    return best, f"the fastest up to {tried}"
