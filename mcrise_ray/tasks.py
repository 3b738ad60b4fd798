"""What travels between the driver and its workers: tasks, what became of them, and how an image ends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float32

from mcrise_ray.embed import GalleryRow
from mcrise_ray.explanations import Explanation
from mcrise_ray.faults import Fault
from mcrise_ray.guide import Guide
from mcrise_ray.images import ImageRef
from mcrise_ray.reduction import Conclude, State, Work, WorkResult
from mcrise_ray.rows import ErrorRow


@dataclass(frozen=True, eq=False)
class GalleryMatch:
    """A gallery image that a query is explained against.

    Attributes:
        image_id, uri, pid, camid: see `GalleryRow`.
        role, rank: see `mcrise_ray.matching.Match`.
        embedding: `f_match`, `(D,)`.
    """

    image_id: str
    uri: str
    pid: int | None
    camid: int | None
    role: str
    rank: int
    embedding: Float32[np.ndarray, " D"]


@dataclass(frozen=True)
class Query(ImageRef):
    """An image to explain against its matches, which travel with it: no worker holds a gallery."""

    matches: tuple[GalleryMatch, ...] = field(default=(), compare=False)

    def has(self, targets: tuple[Target, ...]) -> bool:
        """Whether these are its matches, in the same order."""
        mine = [(match.image_id, match.role) for match in self.matches]
        return mine == [(target.name, target.role) for target in targets]


@dataclass(frozen=True)
class Target:
    """One score to explain: that of a class, or the similarity to a match.

    Attributes:
        index: of the class; the place of the match among those of its query.
        name: where known; of a match, its `image_id`.
        role: why it was chosen.
        score: unmasked.
        distance, d0: of a match: to the unmasked query, and the scale of equation 21.
    """

    index: int
    name: str | None
    role: str
    score: float
    distance: float | None = None
    d0: float | None = None


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
class Done:
    """What a piece of work returned, and the time it took."""

    result: WorkResult
    seconds: float


@dataclass(frozen=True, eq=False)
class Embedded:
    """What became of the images of an `EmbedTask`: each has a row of either kind."""

    rows: list[GalleryRow]
    errors: list[ErrorRow]
    seconds: float


@dataclass(frozen=True)
class InspectTask:
    """Ask a worker for the `Inspection` of an image."""

    image: ImageRef


@dataclass(frozen=True)
class WorkTask:
    """Ask a worker for one piece of work of an inspected image."""

    image: ImageRef
    targets: tuple[int, ...]
    work: Work

    @property
    def masks(self) -> int:
        """That it asks the model about."""
        return 0 if isinstance(self.work, Conclude) else len(self.work.unit)


@dataclass(frozen=True, eq=False)
class EmbedTask:
    """Ask a worker to embed images, which begin at a place of their chunk."""

    chunk: str
    place: int
    refs: tuple[ImageRef, ...]

    @property
    def image(self) -> ImageRef:
        """The first of them, for messages."""
        return self.refs[0]


Task = InspectTask | WorkTask | EmbedTask
Outcome = Inspection | Done | Embedded | Failure


@dataclass(frozen=True)
class Call:
    """Tasks that one worker does in one go.

    Attributes:
        tasks: of one image, or one `EmbedTask`.
        batch_size: masked images per call of the model.
        upcoming: the image that the worker is given after this one, to be read in the meantime.
    """

    tasks: tuple[Task, ...]
    batch_size: int
    upcoming: ImageRef | None = None

    @cached_property  # asked for again and again while the call is out
    def masks(self) -> int:
        """That the tasks will score."""
        return sum(task.masks for task in self.tasks if isinstance(task, WorkTask))

    @cached_property
    def concludes(self) -> bool:
        """Whether it brings together what is there, which needs neither the image nor the model."""
        task = self.tasks[0]
        return isinstance(task, WorkTask) and isinstance(task.work, Conclude)

    @property
    def guide(self) -> Guide | None:
        """Of all its tasks; by far the largest part of a call, and the same for many."""
        task = self.tasks[0]
        return task.work.guide if isinstance(task, WorkTask) else None

    def with_guide(self, guide: Guide | None) -> Call:
        """The same call with this one, or without any."""
        tasks = (
            replace(task, work=replace(task.work, guide=guide)) if isinstance(task, WorkTask) else task
            for task in self.tasks
        )
        return replace(self, tasks=tuple(tasks))

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
    """An image with its maps, ready to be committed."""

    image: ImageRef
    inspection: Inspection
    explanation: Explanation
    seconds: float


@dataclass(frozen=True)
class Failed:
    """An image that gets an error row."""

    image: ImageRef
    failure: Failure


Ended = Finished | Failed


@dataclass(frozen=True)
class Saved:
    """How far an image is, from where a later run goes on; `seconds` were spent on it."""

    inspection: Inspection
    state: State
    seconds: float
