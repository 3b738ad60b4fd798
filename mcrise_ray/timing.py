"""Times as ratios: two things in turn, again and again, and the median of the ratios of neighbours.

A time alone says as much about the machine and its other users as about the program; a ratio of neighbours
does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Run = Callable[[], object]

_HOPELESS = 0.6  # of the other's speed


@dataclass(frozen=True)
class Ratio:
    """A over B, timed in turn.

    Attributes:
        name: what is compared.
        ratio: of neighbouring runs; the geometric mean of the median where A ran first and that where B did.
        low, high: smallest and largest of them.
        first, second: median seconds of A and of B.
        remark: what else there is to know.
    """

    name: str
    ratio: float
    low: float
    high: float
    first: float
    second: float
    remark: str = ""

    @staticmethod
    def of(name: str, times: Sequence[tuple[float, float]], remark: str = "") -> Ratio:
        """Out of the seconds of A and B in each pair of runs, in every other of which B ran first."""
        ratios = [a / b for a, b in times]
        first, second = (statistics.median(column) for column in zip(*times, strict=True))
        orders = [statistics.median(some) for some in (ratios[::2], ratios[1::2]) if some]
        middle = statistics.geometric_mean(orders)
        return Ratio(name, middle, min(ratios), max(ratios), first, second, remark)

    def __str__(self) -> str:
        return (
            f"{self.name:<44} {self.ratio:8.3f}  ({self.low:.3f} to {self.high:.3f})  "
            f"{self.first:9.3f} s / {self.second:.3f} s  {self.remark}"
        ).rstrip()


def alternate(name: str, first: Run, second: Run, repeats: int, remark: str = "") -> Ratio:
    """A and B in turn, after a first run of each that does not count."""
    first()
    second()
    return Ratio.of(name, in_turn(lambda: _seconds(first), lambda: _seconds(second), repeats), remark)


def in_turn(
    first: Callable[[], float], second: Callable[[], float], repeats: int
) -> list[tuple[float, float]]:
    """What A and B return, in pairs: A B, B A, A B and so on, so that a machine that grows slower, or what
    one leaves behind for the other, favours neither.
    """
    pairs: list[tuple[float, float]] = []
    for place in range(repeats):
        if place % 2:
            of_second = second()
            pairs.append((first(), of_second))
        else:
            pairs.append((first(), second()))
    return pairs


def speed_ratio(base: Run, trial: Run, repeats: int) -> float:
    """How many times as fast `trial` is; a hopeless one is not repeated."""
    base()
    trial()
    ratios: list[float] = []
    while len(ratios) < repeats and (not ratios or ratios[0] >= _HOPELESS):
        ratios.append(_seconds(base) / _seconds(trial))
    return statistics.median(ratios)


def seconds(run: Run, repeats: int) -> float:
    """Median time of a run, after a first one."""
    run()
    return statistics.median(_seconds(run) for _ in range(repeats))


def _seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
