"""Bookkeeping of one job, without Ray: what to hand out next, what came back, which image is finished.

An image is first inspected (decoded and scored unmasked, which settles its targets), then its units are
handed out. Partial sums are combined in the order of their indices whatever order they arrive in, so the
result does not depend on how many workers there were (the partition law).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from mcrise_ray.images import ImageRef
from mcrise_ray.plan import Unit, unit, unit_count
from mcrise_ray.saliency import Partial
from mcrise_ray.spec import ExplainSpec


@dataclass(frozen=True)
class Target:
    """One class to explain: its index, its name where known, why it was chosen, its unmasked score."""

    index: int
    name: str | None
    role: str
    score: float


@dataclass(frozen=True)
class Inspection:
    """What a worker found out about an image before any mask; sizes are (height, width).

    Attributes:
        targets: what to explain.
        size: of the model's input, and of the maps.
        seconds: it took.
        original_size: of the image as it was decoded.
    """

    targets: tuple[Target, ...]
    size: tuple[int, int]
    seconds: float
    original_size: tuple[int, int]


@dataclass(frozen=True)
class Failure:
    """Why an image cannot be explained: the stage it failed at and the message of its error row."""

    stage: str
    message: str


@dataclass(frozen=True)
class UnitResult:
    """The sums of one unit and the time they took."""

    partial: Partial
    seconds: float


@dataclass(frozen=True)
class InspectTask:
    """Ask a worker for the `Inspection` of an image."""

    image: ImageRef


@dataclass(frozen=True)
class UnitTask:
    """Ask a worker for the `UnitResult` of one unit of an inspected image."""

    image: ImageRef
    targets: tuple[int, ...]
    unit: Unit


Task = InspectTask | UnitTask


@dataclass(frozen=True)
class Finished:
    """An image with all its sums, ready to be finalized and committed."""

    image: ImageRef
    inspection: Inspection
    total: Partial
    seconds: float


@dataclass(frozen=True)
class Failed:
    """An image that gets an error row."""

    image: ImageRef
    failure: Failure


@dataclass
class _Progress:
    """One inspected image: units handed out, and sums that wait for those before them."""

    inspection: Inspection
    total: Partial
    handed_out: int = 0
    combined: int = 0
    early: dict[int, Partial] = field(default_factory=dict)
    seconds: float = 0.0


class Ledger:
    """The state of a job's images.

    Args:
        images: listed lazily; at most `lookahead` images beyond the one being explained are in memory.
        lookahead: images inspected in advance, so that no worker waits at the end of an image.
    """

    def __init__(self, images: Iterable[ImageRef], spec: ExplainSpec, lookahead: int) -> None:
        self._images: Iterator[ImageRef] = iter(images)
        self._spec = spec
        self._units = unit_count(spec)
        self._lookahead = max(1, lookahead)
        self._inspecting: set[ImageRef] = set()
        self._waiting: deque[ImageRef] = deque()  # inspected, with units to hand out, in the order to do so
        self._open: dict[ImageRef, _Progress] = {}

    @property
    def finished(self) -> bool:
        """Nothing is left to hand out or to wait for (true only after `next_task` has returned None)."""
        return not self._inspecting and not self._open

    def next_task(self) -> Task | None:
        """The next piece of work, or None where everything is handed out (or waits for an inspection)."""
        if len(self._inspecting) + len(self._waiting) <= self._lookahead:
            image = next(self._images, None)
            if image is not None:
                self._inspecting.add(image)
                return InspectTask(image)
        if not self._waiting:
            return None
        image = self._waiting[0]
        progress = self._open[image]
        targets = tuple(target.index for target in progress.inspection.targets)
        task = UnitTask(image, targets, unit(self._spec, progress.handed_out))
        progress.handed_out += 1
        if progress.handed_out == self._units:
            self._waiting.popleft()
        return task

    def inspected(self, image: ImageRef, outcome: Inspection | Failure) -> Failed | None:
        """Take in what became of an `InspectTask`."""
        self._inspecting.discard(image)
        if isinstance(outcome, Failure):
            return Failed(image, outcome)
        zero = Partial.zero(self._spec, len(outcome.targets), outcome.size)
        self._open[image] = _Progress(outcome, zero, seconds=outcome.seconds)
        self._waiting.append(image)
        return None

    def returned(self, task: UnitTask, outcome: UnitResult | Failure) -> Finished | Failed | None:
        """Take in what became of a `UnitTask`; results of an image that failed meanwhile are dropped."""
        progress = self._open.get(task.image)
        if progress is None:
            return None
        if isinstance(outcome, Failure):
            self._close(task.image)
            return Failed(task.image, outcome)
        progress.seconds += outcome.seconds
        progress.early[task.unit.index] = outcome.partial
        while progress.combined in progress.early:
            progress.total = progress.total.combine(progress.early.pop(progress.combined))
            progress.combined += 1
        if progress.combined < self._units:
            return None
        self._close(task.image)
        return Finished(task.image, progress.inspection, progress.total, progress.seconds)

    def _close(self, image: ImageRef) -> None:
        del self._open[image]
        if image in self._waiting:
            self._waiting.remove(image)


@runtime_checkable
class Answers(Protocol):
    """What can do tasks: a `Worker`."""

    def inspect(self, image: ImageRef) -> Inspection | Failure:
        """Do an `InspectTask`."""
        ...

    def run(self, image: ImageRef, targets: tuple[int, ...], unit: Unit) -> UnitResult | Failure:
        """Do a `UnitTask`."""
        ...


def run_serially(
    ledger: Ledger, worker: Answers, on_unit: Callable[[int], None]
) -> Iterator[Finished | Failed]:
    """One task after the other in this process: the oracle of the distributed loop."""
    while (task := ledger.next_task()) is not None:
        if isinstance(task, InspectTask):
            ended: Finished | Failed | None = ledger.inspected(task.image, worker.inspect(task.image))
        else:
            ended = ledger.returned(task, worker.run(task.image, task.targets, task.unit))
            on_unit(len(task.unit))
        if ended is not None:
            yield ended
