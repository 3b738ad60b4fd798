"""Which units exist and when an image has enough of them: pure functions of the spec (and of the errors
reached), never of the cluster (the partition law).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mcrise_ray.spec import ExplainSpec

_UNITS_WANTED = 32  # enough to feed several actors with one image
_FEWEST_WANTED = 8  # with very many fills, whose sums take longer to send and add
_MULTIPLE = 64  # whole batches of the usual sizes
_LARGEST = 4096  # a retried unit should not cost minutes
_LARGEST_BETWEEN_LOOKS = 512  # where a relative error is asked for: N is a multiple of it
_PILOT = 16384  # masks; with more, predictions become no better, and their scores are kept
_FIRST_LOOK = 1024  # masks
_OPENING = 512  # masks that a guide first learns from, at most
_OPENING_PER_FILL = 384  # with one fill there is less to learn: 6 % less variance at N = 2048 than with 512
MOST_LEARNT = 2048  # masks: learning from more takes seconds, and they tell little more
_WORTH_LEARNING = 1 / 8  # masks to come for each learnt from, at least: a better guide saves a sixth of these
_MOST_GUIDED = 8  # targets: odds that suit many of them suit none
_BETWEEN_LOOKS = 2**0.5  # ratio of N from one look to the next


@dataclass(frozen=True)
class Unit:
    """Mask indices `start` to `stop - 1` of one image; `index` is its place in the reduction."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def unit_size(spec: ExplainSpec) -> int:
    """Masks per unit; the last unit may have fewer."""
    wanted = -(-spec.masks // max(_FEWEST_WANTED, min(_UNITS_WANTED, 512 // spec.K)))
    largest = _LARGEST if spec.relative_error is None else _LARGEST_BETWEEN_LOOKS
    return min(-(-wanted // _MULTIPLE) * _MULTIPLE, largest)


def unit_count(spec: ExplainSpec) -> int:
    """Number of units of one image."""
    return -(-spec.masks // unit_size(spec))


def unit(spec: ExplainSpec, index: int) -> Unit:
    """The unit with the given index."""
    size = unit_size(spec)
    return Unit(index, index * size, min((index + 1) * size, spec.masks))


def pilot_count(spec: ExplainSpec, units: int) -> int:
    """How many of the first so many units come back as scores, which are few, to be summed in one go.

    Predictions of scores are fitted to them; those of all later units are predicted by that same fit.
    Without predictions it is all units or none: nobody should wait for sums that the next units do not need.
    """
    most = _PILOT // unit_size(spec)
    if spec.estimator == "paper":
        return units if units <= most and spec.relative_error is None else 0
    return min(units, most)


def looks(spec: ExplainSpec) -> Iterator[int]:
    """After how many units the error is looked at: the last look is at all of them.

    Looks are few, and further and further apart, so that the error found at the one that ends it is hardly
    luckier than that of a number of masks fixed in advance.
    """
    last = unit_count(spec)
    if spec.relative_error is not None:
        wanted, units = float(_FIRST_LOOK), 0
        while wanted < spec.masks:
            if (rounded := -(-int(wanted) // unit_size(spec))) not in {units, last}:
                units = rounded
                yield units
            wanted *= _BETWEEN_LOOKS
    yield last


def stages(spec: ExplainSpec, targets: int) -> tuple[int, ...]:
    """After how many units sums are brought together, and a guide of the next units may learn.

    Every look is among them. The first stage is the opening, whose masks no guide has picked; the number of
    masks doubles from one stage to the next until a guide has learnt from `MOST_LEARNT`, or few are to come.

    Returns:
        Nothing where masks are not picked at all: by other estimators, with few masks, or many targets.
    """
    size, units = unit_size(spec), unit_count(spec)
    opening = -(-min(_OPENING, _OPENING_PER_FILL * spec.K) // size)
    if spec.estimator != "importance" or targets > _MOST_GUIDED or units < 2 * opening:
        return ()
    ends = {opening, max(opening, pilot_count(spec, units)), *looks(spec)}
    learnt = opening
    while learnt * size < MOST_LEARNT:
        learnt *= 2
        if spec.masks - learnt * size >= learnt * size * _WORTH_LEARNING:
            ends.add(learnt)
    return tuple(sorted(end for end in ends if end >= opening))


def enough(spec: ExplainSpec, relative_error: Iterable[float], masks: int) -> bool:
    """Whether an image can stop at a look, after so many masks, at which its targets have these errors.

    An error that is no number is that of a score that no mask has changed yet. Few masks would have missed
    what one in a thousand does.
    """
    wanted, errors = spec.relative_error, list(relative_error)
    if wanted is None or any(error > wanted for error in errors):
        return False
    return masks >= _PILOT or not any(math.isnan(error) for error in errors)
