"""Masks and their scores, batch after batch, so that a GPU never waits for what the CPU does between batches.

A batch is launched before the scores of the one before it are read: while the GPU works on it, the CPU adds
up those scores, draws the next masks and queues their blending. On the CPU nothing overlaps, nor is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from mcrise_ray.masks import Masks, draw
from mcrise_ray.plan import Unit
from mcrise_ray.scores import Answer, BlackBox, launch
from mcrise_ray.spec import ExplainSpec


@dataclass(frozen=True)
class Batch:
    """Some masks of a unit.

    Attributes:
        unit: theirs.
        masks: B of them.
        last: there are no more in this unit.
    """

    unit: Unit
    masks: Masks
    last: bool


def scored(
    spec: ExplainSpec,
    blend: Callable[[Masks], Tensor],
    function: BlackBox,
    units: Iterable[Unit],
    batch_size: int,
) -> Iterator[tuple[Batch, Float64[np.ndarray, "B C"]]]:
    """Every batch of the units, in order, with its scores.

    The order of the calls of `blend` and `function`, and so every bit, is that of the plain loop.

    Raises:
        ModelError, ScoreError: see `mcrise_ray.scores`; one batch later than in the plain loop.
    """
    waiting: tuple[Batch, Answer] | None = None
    for batch in _batches(spec, units, batch_size):
        answer = launch(function, blend(batch.masks))
        if waiting is not None:
            yield waiting[0], waiting[1].read()
        waiting = batch, answer
    if waiting is not None:
        yield waiting[0], waiting[1].read()


def _batches(spec: ExplainSpec, units: Iterable[Unit], batch_size: int) -> Iterator[Batch]:
    for unit in units:
        for start in range(unit.start, unit.stop, batch_size):
            stop = min(start + batch_size, unit.stop)
            yield Batch(unit, draw(spec, start, stop), stop == unit.stop)
