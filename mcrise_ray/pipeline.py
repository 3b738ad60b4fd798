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


def score_units(
    spec: ExplainSpec,
    blend: Callable[[Masks], Tensor],
    function: BlackBox,
    units: Iterable[Unit],
    targets: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[Unit, Float64[np.ndarray, "N L"]]]:
    """Each unit in turn with its masks' scores for the targets: all that needs the model.

    The order of the calls of `blend` and `function`, and so every bit, is that of the plain loop. The model
    works on the next unit's first batch by the time that a unit is given out.

    Raises:
        ModelError, ScoreError: see `mcrise_ray.scores`.
        TargetError: the model has no such target.
    """
    columns = list(targets)
    waiting: _Launched | None = None
    parts: list[np.ndarray] = []
    for launched in _launched(spec, blend, function, units, batch_size):
        if waiting is not None:
            parts.append(waiting.read(columns))
            if waiting.last:
                yield waiting.unit, np.concatenate(parts)
                parts = []
        waiting = launched
    if waiting is not None:
        parts.append(waiting.read(columns))
        yield waiting.unit, np.concatenate(parts)


@dataclass(frozen=True)
class _Launched:
    """A batch that the model has been asked for, and whether it is the last one of its unit."""

    unit: Unit
    last: bool
    answer: Answer

    def read(self, columns: list[int]) -> Float64[np.ndarray, "B L"]:
        scores = self.answer.read()
        check_targets(columns, scores.shape[1])
        return scores[:, columns]


def _launched(
    spec: ExplainSpec,
    blend: Callable[[Masks], Tensor],
    function: BlackBox,
    units: Iterable[Unit],
    batch_size: int,
) -> Iterator[_Launched]:
    for unit in units:
        for start in range(unit.start, unit.stop, batch_size):
            stop = min(start + batch_size, unit.stop)
            yield _Launched(unit, stop == unit.stop, launch(function, blend(draw(spec, start, stop))))
