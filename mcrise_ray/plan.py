"""Which units exist: a pure function of the spec, never of the cluster (the partition law)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mcrise_ray.spec import ExplainSpec

_UNITS_WANTED = 32  # enough to estimate a variance between units, and to feed several actors with one image
_MULTIPLE = 64  # whole batches of the usual sizes
_LARGEST = 4096  # a retried unit should not cost minutes


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
    wanted = -(-spec.masks // _UNITS_WANTED)
    return min(-(-wanted // _MULTIPLE) * _MULTIPLE, _LARGEST)


def unit_count(spec: ExplainSpec) -> int:
    """Number of units of one image."""
    return -(-spec.masks // unit_size(spec))


def unit(spec: ExplainSpec, index: int) -> Unit:
    """The unit with the given index."""
    size = unit_size(spec)
    return Unit(index, index * size, min((index + 1) * size, spec.masks))


def units(spec: ExplainSpec) -> Iterator[Unit]:
    """All units of one image in index order, lazily: there may be hundreds of thousands."""
    return (unit(spec, index) for index in range(unit_count(spec)))
