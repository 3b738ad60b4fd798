"""Masks and their scores, batch after batch, so that a GPU never waits for what the CPU does between batches.

A batch is launched before the scores of the one before it are read: while the GPU works on it, the CPU does
whatever is done with those scores, draws the next masks and queues their blending. On the CPU nothing
overlaps, nor is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from mcrise_ray.masks import Masks, draw
from mcrise_ray.plan import Unit
from mcrise_ray.scores import Answer, BlackBox, check_targets, launch
from mcrise_ray.spec import ExplainSpec

_MOST_CLASSES = 2048  # whose scores are all sent home where all are wanted: 4 MiB for 256 masks


@dataclass(frozen=True)
class Asked:
    """What the model is asked about one unit.

    Attributes:
        unit: how many masks.
        masks: which ones; None for those of its range.
        also: classes whose scores are wanted after those of the targets; None for all classes, unless there
            are very many.
    """

    unit: Unit
    masks: Masks | None
    also: tuple[int, ...] | None


def score_units(
    spec: ExplainSpec,
    blend: Callable[[Masks], Tensor],
    function: BlackBox,
    units: Iterable[Asked],
    targets: Sequence[int],
    batch_size: int,
) -> Iterator[Float64[np.ndarray, "N columns"]]:
    """The scores of each unit's masks in turn, for the targets and what else is wanted.

    The order of the calls of `blend` and `function`, and so every bit, is that of the plain loop. The model
    works on the next unit's first batch by the time that a unit is given out.

    Raises:
        ModelError, ScoreError: see `mcrise_ray.scores`.
        TargetError: the model has no such target.
    """
    waiting: _Launched | None = None
    parts: list[np.ndarray] = []
    for launched in _launched(spec, blend, function, units, batch_size):
        if waiting is not None:
            parts.append(waiting.read(targets))
            if waiting.last:
                yield np.concatenate(parts)
                parts = []
        waiting = launched
    if waiting is not None:
        parts.append(waiting.read(targets))
        yield np.concatenate(parts)


@dataclass(frozen=True)
class _Launched:
    """A batch that the model has been asked for, and whether it is the last one of its unit."""

    asked: Asked
    last: bool
    answer: Answer

    def read(self, targets: Sequence[int]) -> Float64[np.ndarray, "B columns"]:
        scores = self.answer.read()
        check_targets(targets, scores.shape[1])
        also = self.asked.also
        if also is None:
            also = tuple(range(scores.shape[1] if scores.shape[1] <= _MOST_CLASSES else 0))
        # Sums of arrays that lie otherwise have other last bits, and how they lie does not outlive being sent
        # or saved in part.
        return np.ascontiguousarray(scores[:, [*targets, *also]])


def _launched(
    spec: ExplainSpec,
    blend: Callable[[Masks], Tensor],
    function: BlackBox,
    units: Iterable[Asked],
    batch_size: int,
) -> Iterator[_Launched]:
    for asked in units:
        unit, given = asked.unit, asked.masks
        for start in range(0, len(unit), batch_size):
            stop = min(start + batch_size, len(unit))
            masks = draw(spec, unit.start + start, unit.start + stop) if given is None else given[start:stop]
            yield _Launched(asked, stop == len(unit), launch(function, blend(masks)))
