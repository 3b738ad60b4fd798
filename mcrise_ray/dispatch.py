"""Bookkeeping of one job, without Ray: what to hand out next, what came back, which image is finished.

An image is first inspected (decoded and scored unmasked, which settles its targets), then its units are
handed out. Partial sums are combined in the order of their indices whatever order they arrive in, so the
result does not depend on how many workers there were (the partition law), and each counts once (the once
law).

A worker stays with one image while that has units to hand out, because every worker has to decode an image
before its first unit; it takes the next image of the list after that, and helps with the oldest unfinished
image when the list has ended. So images finish roughly in the order given, and one image with very many units
keeps all workers busy. The next image is read during the last call but one of the current image and inspected
before the last, so that its units can follow without a pause.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mcrise_ray.explainer import DEFAULT_BATCH_SIZE
from mcrise_ray.images import ImageRef
from mcrise_ray.plan import unit, unit_count
from mcrise_ray.reduction import Reduction, State
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.tasks import (
    Call,
    Done,
    EmbedTask,
    Ended,
    Failed,
    Failure,
    Finished,
    Inspection,
    InspectTask,
    Outcome,
    Query,
    Saved,
    Task,
    WorkTask,
)

_SECONDS_PER_CALL = 0.2  # that a call lasts at least: beside it the millisecond that it costs is small
_UNITS_PER_CALL = 32
_NEWEST = 0.2  # weight of the newest unit in the average pace
_EARLY_BYTES = 2**30  # sums of one image that may wait for a missing one
_EARLY_AT_LEAST = 8
_NOBODY = -1


@dataclass
class _Progress:
    """One inspected image; `is_torn` while its reduction takes something in, where Ctrl-C may come."""

    inspection: Inspection
    reduction: Reduction
    seconds: float
    is_torn: bool = False


class Ledger:
    """The state of a job's images.

    Args:
        images: listed lazily; little more than one image per worker is in memory at a time.
        spec: decides the units.
        batch_size: masked images per call of the model; may be set once the model is built.
        saved: gives the sums of an image that an earlier run had begun, by its `image_id`.

    Attributes:
        batch_size: of new calls; may be lowered on the way.
        kept: see `Bookkeeping`.
    """

    def __init__(
        self,
        images: Iterable[ImageRef],
        spec: ExplainSpec,
        batch_size: int = DEFAULT_BATCH_SIZE,
        saved: Callable[[str], Saved | None] = lambda image_id: None,
    ) -> None:
        self.batch_size = batch_size
        self.kept = 0
        self._images: Iterator[ImageRef] = iter(images)
        self._spec = spec
        self._saved = saved
        self._unit_masks = len(unit(spec, 0))
        self._seconds_per_mask = 0.0
        self._at_work_on: dict[int, ImageRef] = {}  # by worker
        self._next: dict[int, ImageRef] = {}  # by worker: being inspected, or ready for it
        self._inspecting: dict[ImageRef, int] = {}  # and the worker that does
        self._inspectors: set[int] = set()
        self._open: dict[ImageRef, _Progress] = {}
        self._available: OrderedDict[ImageRef, _Progress] = OrderedDict()  # open, with units to hand out
        self._reserved: dict[int, ImageRef] = {}  # by worker: read ahead
        self._given_back: deque[ImageRef] = deque()  # reserved by workers that ended
        self._ownerless: OrderedDict[ImageRef, None] = OrderedDict()  # perhaps available, and nobody's own
        self._again: deque[Call] = deque()
        self._attempts: dict[Task, int] = {}
        self._listed_all = False

    @property
    def finished(self) -> bool:
        """Nothing is left to hand out or to wait for."""
        return self._listed_all and not (self._inspecting or self._open or self._reserved or self._given_back)

    @property
    def has_work(self) -> bool:
        """Whether some worker can be given something now."""
        return bool(
            self._again or self._available or self._reserved or self._given_back or not self._listed_all
        )

    @property
    def seconds_per_unit(self) -> float:
        """Recent pace; 0 before anything came back."""
        return self._seconds_per_mask * self._unit_masks

    @property
    def embedded(self) -> int:
        """None: what is embedded has a ledger of its own."""
        return 0

    def successor(self) -> None:
        """Explaining is the end of a job."""

    def next_call(self, worker: int) -> Call | None:
        """The next piece of work for a worker; None where it has to wait for others, or all is handed out."""
        while self._again:
            call = self._again.popleft()
            if call.tasks[0].image in self._inspecting or call.tasks[0].image in self._open:
                return call
        image = self._turn_to(worker)
        if worker not in self._next and (image is None or self._left(image) <= self._units_per_call):
            task = self._take_next(worker)
            if task is not None:
                short = unit_count(self._spec) <= self._units_per_call
                return Call((task,), self.batch_size, self._reserve(worker) if short else None)
            image = image or self._turn_to(worker)
        if image is None and worker not in self._inspectors:
            image = next(iter(self._available), None)
        if image is None:
            return None
        self._at_work_on[worker] = image
        tasks = self._work_of(image)
        soon = worker not in self._next and self._left(image) <= self._units_per_call
        return Call(tasks, self.batch_size, self._reserve(worker) if soon else None)

    def returned(self, call: Call, outcomes: Iterable[Outcome]) -> list[Ended]:
        """Take in what became of a call; whatever concerns an image that ended meanwhile is dropped."""
        outcomes = list(outcomes)
        self._learn_pace(call, outcomes)
        ended = []
        for task, outcome in zip(call.tasks, outcomes, strict=True):
            self._attempts.pop(task, None)
            assert not isinstance(task, EmbedTask)
            end = (
                self._inspected(task, outcome) if isinstance(task, InspectTask) else self._ran(task, outcome)
            )
            if end is not None:
                ended.append(end)
        return ended

    def requeue(self, call: Call, *, strike: bool, halve: bool = False) -> None:
        """Hand the tasks of a lost call out again, one by one, so that a bad one stands alone next time.

        Args:
            call: that was lost.
            strike: count the loss against its first task, the one that was running; it comes before all
                others then, so that it is the same one again and again that is tried, until it is done or
                given up.
            halve: use half the batch of the lost call for them.
        """
        batch_size = max(1, call.batch_size // 2) if halve else call.batch_size
        calls = [Call((task,), batch_size) for task in call.tasks]
        if strike:
            self._attempts[call.tasks[0]] = self.attempts(call) + 1
            self._again.extendleft(reversed(calls))
        else:
            self._again.extend(calls)
        for task in call.tasks:
            self._inspectors.discard(self._inspecting.get(task.image, _NOBODY))

    def attempts(self, call: Call) -> int:
        """How often the first task of a call has been struck before."""
        return self._attempts.get(call.tasks[0], 0)

    def give_up(self, call: Call, failure: Failure) -> list[Ended]:
        """The image of a call's first task fails; its other tasks go back."""
        first, *others = call.tasks
        self._again.extend(Call((task,), call.batch_size) for task in others)
        return self.returned(Call((first,), call.batch_size), [failure])

    def forget(self, worker: int) -> None:
        """A worker has ended; its calls are requeued by whoever knows them."""
        for owned in (self._at_work_on, self._next):
            image = owned.pop(worker, None)
            if image is not None:
                self._ownerless[image] = None
        reserved = self._reserved.pop(worker, None)
        if reserved is not None:
            self._given_back.append(reserved)
        self._inspectors.discard(worker)

    def unfinished(self) -> Iterator[tuple[ImageRef, Saved]]:
        """Sums of the images in work, for an interrupted job to go on from."""
        for image, progress in self._open.items():
            state = progress.reduction.state()
            if not (state.is_empty or progress.is_torn):
                yield image, Saved(progress.inspection, state, progress.seconds)

    @property
    def _units_per_call(self) -> int:
        unit_seconds = self.seconds_per_unit
        wanted = math.ceil(_SECONDS_PER_CALL / unit_seconds) if unit_seconds else 1
        return min(max(wanted, 1), _UNITS_PER_CALL)

    def _learn_pace(self, call: Call, outcomes: Sequence[Outcome]) -> None:
        """From a call as a whole: while one unit is finished, the next is under way already."""
        seconds = sum(outcome.seconds for outcome in outcomes if isinstance(outcome, Done))
        if call.masks and seconds:
            pace, old = seconds / call.masks, self._seconds_per_mask
            self._seconds_per_mask += _NEWEST * (pace - old) if old else pace

    def _left(self, image: ImageRef) -> int:
        """Units that an image has to hand out now."""
        progress = self._available.get(image)
        return 0 if progress is None else progress.reduction.left

    def _turn_to(self, worker: int) -> ImageRef | None:
        """The image that a worker goes on with: its own while that has units, nobody's, the next that is its
        own; None where none of these has any.
        """
        image = self._at_work_on.get(worker)
        while image not in self._available and self._ownerless:
            image, _ = self._ownerless.popitem(last=False)
        if image not in self._available and self._next.get(worker) not in self._inspecting:
            image = self._next.pop(worker, None)
        if image is None or image not in self._available:
            return None
        self._at_work_on[worker] = image
        return image

    def _take_next(self, worker: int) -> InspectTask | None:
        """Give a worker another image of the list, to inspect where that has not been done."""
        image = self._reserved.pop(worker, None) or self._next_listed()
        if image is None and not self._available and self._reserved:
            image = self._reserved.pop(next(iter(self._reserved)))  # better now than when its turn comes
        if image is None:
            return None
        self._next[worker] = image
        saved = self._saved(image.image_id)
        # Of a gallery that has grown or was mended meanwhile, other images may be the matches.
        if saved is None or (isinstance(image, Query) and not image.has(saved.inspection.targets)):
            self._inspecting[image] = worker
            self._inspectors.add(worker)
            return InspectTask(image)
        self.kept += saved.state.masks(self._spec)
        self._begin(image, saved.inspection, saved.seconds, saved.state)
        return None

    def _next_listed(self) -> ImageRef | None:
        image = self._given_back.popleft() if self._given_back else next(self._images, None)
        if image is None:
            self._listed_all = True
        return image

    def _reserve(self, worker: int) -> ImageRef | None:
        """The image that a worker begins with next, chosen ahead of its turn."""
        if worker not in self._reserved:
            image = self._next_listed()
            if image is None:
                return None
            self._reserved[worker] = image
        return self._reserved[worker]

    def _begin(
        self, image: ImageRef, inspection: Inspection, seconds: float, state: State | None = None
    ) -> None:
        targets = [target.index for target in inspection.targets]
        score = np.array([target.score for target in inspection.targets])
        reduction = Reduction(self._spec, targets, score, inspection.size, state)
        progress = self._open[image] = self._available[image] = _Progress(inspection, reduction, seconds)
        self._update_available(image, progress)

    def _work_of(self, image: ImageRef) -> tuple[WorkTask, ...]:
        """The next units of an image, as many as make a call worth its cost."""
        progress = self._available[image]
        count = self._units_per_call
        targets = tuple(target.index for target in progress.inspection.targets)
        tasks: list[WorkTask] = []
        while len(tasks) < count and not progress.reduction.concludes:
            work = progress.reduction.next_work()
            if work is None:
                break
            tasks.append(WorkTask(image, targets, work))
        self._update_available(image, progress)
        return tuple(tasks)

    def _update_available(self, image: ImageRef, progress: _Progress) -> None:
        """An image offers units while few of its sums wait for a missing one: those that do take memory."""
        reduction = progress.reduction
        if reduction.concludes:  # the rest of the image waits for it, so it goes before everything else
            targets = tuple(target.index for target in progress.inspection.targets)
            work = reduction.next_work()
            assert work is not None
            self._again.append(Call((WorkTask(image, targets, work),), self.batch_size))
        waiting_limit = max(_EARLY_AT_LEAST, _EARLY_BYTES // reduction.nbytes)
        if not reduction.is_ready or reduction.waiting > waiting_limit:
            self._available.pop(image, None)
        elif image not in self._available:
            self._available[image] = progress
            self._available.move_to_end(image, last=False)
            self._ownerless[image] = None  # whoever was at work on it may have moved on

    def _inspected(self, task: InspectTask, outcome: Outcome) -> Failed | None:
        image = task.image
        worker = self._inspecting.pop(image, None)
        if worker is None:
            return None
        self._inspectors.discard(worker)
        mine = self._next.get(worker) == image
        if isinstance(outcome, Failure):
            if mine:
                del self._next[worker]
            return Failed(image, outcome)
        if not mine:
            self._ownerless[image] = None
        assert isinstance(outcome, Inspection)
        self._begin(image, outcome, outcome.seconds)
        return None

    def _ran(self, task: WorkTask, outcome: Outcome) -> Ended | None:
        image = task.image
        progress = self._open.get(image)
        if progress is None:
            return None
        if isinstance(outcome, Failure):
            self._close(image)
            return Failed(image, outcome)
        assert isinstance(outcome, Done)
        progress.seconds += outcome.seconds
        progress.is_torn = True
        progress.reduction.take(task.work, outcome.result)
        progress.is_torn = False
        if progress.reduction.explanation is None:
            self._update_available(image, progress)
            return None
        self._close(image)
        return Finished(image, progress.inspection, progress.reduction.explanation, progress.seconds)

    def _close(self, image: ImageRef) -> None:
        del self._open[image]
        self._available.pop(image, None)
