"""What travels between the driver and its workers: tasks, what became of them, and how an image ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mcrise_ray.faults import Fault
from mcrise_ray.images import ImageRef
from mcrise_ray.plan import Unit
from mcrise_ray.saliency import Partial


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
Outcome = Inspection | UnitResult | Failure


@dataclass(frozen=True)
class Call:
    """Tasks that one worker does in one go.

    Attributes:
        tasks: of one image.
        batch_size: masked images per call of the model.
        upcoming: the image that the worker is given after this one, to be read in the meantime.
    """

    tasks: tuple[Task, ...]
    batch_size: int
    upcoming: ImageRef | None = None

    @property
    def masks(self) -> int:
        """That the tasks will score."""
        return sum(len(task.unit) for task in self.tasks if isinstance(task, UnitTask))

    def split(self, place: int) -> tuple[Call | None, Call | None]:
        """The tasks before a place, and those from there on; None for no tasks."""
        if place == len(self.tasks):
            return self, None
        parts = self.tasks[:place], self.tasks[place:]
        first, second = (replace(self, tasks=tasks) if tasks else None for tasks in parts)
        return first, second


@dataclass(frozen=True)
class Reply:
    """What a worker returns of a call: an outcome per task, up to the first that met a fault."""

    outcomes: tuple[Outcome, ...]
    fault: Fault | None = None


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


Ended = Finished | Failed


@dataclass(frozen=True)
class Saved:
    """The sums of an image's first `units` units, from which a later run goes on.

    `seconds` were spent on them and on the inspection.
    """

    inspection: Inspection
    total: Partial
    units: int
    seconds: float
