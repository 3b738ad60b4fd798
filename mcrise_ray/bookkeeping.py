"""What the engine asks of a ledger, whatever work it keeps account of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from mcrise_ray.images import ImageRef
from mcrise_ray.tasks import Call, Ended, Failure, Outcome, Saved


class Bookkeeping(Protocol):
    """What is to be done, and what has been.

    Attributes:
        batch_size: of new calls.
    """

    batch_size: int

    @property
    def finished(self) -> bool:
        """Nothing is left to hand out or to wait for."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether some worker can be given something now."""
        ...

    @property
    def seconds_per_unit(self) -> float:
        """Recent pace; 0 before anything came back."""
        ...

    @property
    def kept(self) -> int:
        """Masks that earlier runs had scored of images that this one goes on with."""
        ...

    @property
    def embedded(self) -> int:
        """Images of queries and gallery that this run has embedded, or found that they cannot be."""
        ...

    def successor(self) -> Bookkeeping | None:
        """What the same actors do when this is finished; None where that is all."""
        ...

    def next_call(self, worker: int) -> Call | None:
        """The next piece of work for a worker."""
        ...

    def returned(self, call: Call, outcomes: Iterable[Outcome]) -> list[Ended]:
        """Take in what became of a call."""
        ...

    def requeue(self, call: Call, *, strike: bool, halve: bool = False) -> None:
        """Hand the tasks of a lost call out again."""
        ...

    def attempts(self, call: Call) -> int:
        """How often the first task of a call has been struck before."""
        ...

    def give_up(self, call: Call, failure: Failure) -> list[Ended]:
        """The first task of a call fails for good."""
        ...

    def forget(self, worker: int) -> None:
        """A worker has ended."""
        ...

    def unfinished(self) -> Iterator[tuple[ImageRef, Saved]]:
        """Sums of images in work."""
        ...
