"""One worker's share of a job, in whatever process it runs: an actor on a cluster, or the driver itself."""

from __future__ import annotations

import os
import time
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mcrise_ray.decode import DecodeOptions
from mcrise_ray.engine import Event
from mcrise_ray.errors import DeviceError, ImageError, MCRiseError
from mcrise_ray.explained import Explained, Prepared, load_explained
from mcrise_ray.explainer import perform
from mcrise_ray.faults import Fault, FaultKind
from mcrise_ray.guide import Guide
from mcrise_ray.images import ImageRef, read_image
from mcrise_ray.loading import ModelSpec
from mcrise_ray.models import ModelFacts
from mcrise_ray.precision import Execution, apply
from mcrise_ray.reduction import Conclude, conclude
from mcrise_ray.reidspec import ReidSpec
from mcrise_ray.scores import hardware_error
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.tasks import Call, Done, EmbedTask, Failure, Inspection, InspectTask, Outcome, Reply, WorkTask
from mcrise_ray.tuning import BatchSizeChoice, PrecisionChoice, settle


@dataclass(frozen=True)
class Setup:
    """What every worker of a job is given.

    Attributes:
        model, spec, targets, decode, reid: see `JobSpec`.
        precision, batch_size: what to choose where `execution` is not known yet.
        threads: of torch; None for its own choice, where no other worker shares the machine.
        gpus: of each worker, which may be a part of one; None for a whole one where there are any.
        masks: how many one worker will score, where that is known.
        sample: an image of the job, to choose by.
    """

    model: ModelSpec
    spec: ExplainSpec
    targets: tuple[int | str, ...]
    decode: DecodeOptions
    precision: PrecisionChoice
    batch_size: BatchSizeChoice
    threads: int | None
    masks: int | None
    sample: ImageRef
    reid: ReidSpec | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class Built:
    """A model that is ready: what it is, and how it is asked."""

    facts: ModelFacts
    execution: Execution


_MEMORY_SHARE = 0.5  # of what is free, for the batches of all workers that share it
_PREPARED_KEPT = 4  # images held ready: those whose units may still come


class Worker:
    """Builds the model once, decodes images itself, and returns sums.

    Errors of one image come back as a `Failure`, anything else as a `Fault` of the call.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup, self._spec = setup, setup.spec
        self._explained: Explained | None = None
        self._decode = setup.decode
        self._reader = ThreadPoolExecutor(1, "reader")
        self._ahead: dict[ImageRef, Future[np.ndarray]] = {}
        self._prepared: dict[ImageRef, Prepared] = {}

    def build(self) -> None:
        """Build the model; not in the constructor, whose errors Ray turns into text.

        Raises:
            ModelError: it cannot be built.
        """
        if self._setup.threads is not None:
            torch.set_num_threads(self._setup.threads)
        setup = self._setup
        self._explained = load_explained(setup.model, setup.spec, setup.targets, setup.reid, setup.decode)

    def load(self, execution: Execution | None = None) -> Built:
        """Make the model ready, building it first where that has not been done.

        Args:
            execution: how the job asks its model; None chooses, which one worker of a job does.

        Raises:
            ModelError: it cannot be built, or not be asked so.
        """
        if self._explained is None:
            self.build()
        setup, explained = self._setup, self._explained
        assert explained is not None
        if execution is None:
            settled = settle(
                explained.model,
                self._spec,
                self._sample(),
                scored=explained.scored,
                precision=setup.precision,
                batch_size=setup.batch_size,
                masks=setup.masks,
                memory_share=_MEMORY_SHARE * self._part(explained.facts.device),
            )
            explained.model, execution = settled.model, settled.execution
        else:
            explained.model = apply(explained.model, execution)
        return Built(explained.facts, execution)

    def _part(self, device: str) -> float:
        """Of the device or the machine that is this worker's: the rest is for others like it."""
        if device.startswith("cuda"):
            return min(1.0, self._setup.gpus or 1.0)
        threads = self._setup.threads
        return 1.0 if threads is None else min(1.0, threads / (os.cpu_count() or 1))

    def _sample(self) -> np.ndarray | None:
        """The job's sample image; None where it cannot be read, which its own turn will tell."""
        try:
            return None if self._setup.sample.problem else read_image(self._setup.sample.uri, self._decode)
        except ImageError:
            return None

    def do(self, call: Call, guide: Guide | None = None) -> Reply:
        """The outcomes of a call's tasks, up to the first that failed or met a fault.

        Args:
            call: what to do.
            guide: of the tasks, where it came apart from them.
        """
        if guide is not None:
            call = call.with_guide(guide)
        if call.upcoming is not None and call.upcoming.problem is None:
            self._read_ahead(call.upcoming)
        outcomes: list[Outcome] = []
        try:
            for outcome in self._outcomes(call):
                outcomes.append(outcome)
        except Exception as error:  # noqa: BLE001 - one image's bug must not end the job
            return Reply(tuple(outcomes), self._fault_of(error))
        return Reply(tuple(outcomes))

    def _fault_of(self, error: Exception) -> Fault:
        if isinstance(error, MemoryError | torch.OutOfMemoryError | DeviceError):
            cause: Exception | None = error
        else:
            cause = hardware_error(error, f"{type(error).__name__}: {_one_line(error)}")
        if cause is None:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {_one_line(error)} ({where.filename}:{where.lineno})"
            return Fault(FaultKind.BROKEN, text)
        self._prepared.clear()
        if isinstance(cause, DeviceError):
            self._explained = None  # to be built anew, where this process goes on
            return Fault(FaultKind.DIED, str(cause))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Fault(FaultKind.DEVICE_MEMORY, _one_line(cause))

    def _outcomes(self, call: Call) -> Iterator[Outcome]:
        first = call.tasks[0]
        assert self._explained is not None
        stage = "read"
        try:
            if isinstance(first, EmbedTask):
                yield self._explained.embed(first, call.batch_size)
                return
            if first.image.problem is not None:
                yield Failure(first.image.stage, first.image.problem)
                return
            if isinstance(first, WorkTask) and isinstance(first.work, Conclude):
                began = time.perf_counter()
                place = self._explained.facts.device
                device = torch.device("cpu" if place == "server" else place)
                yield Done(conclude(self._spec, first.work, device), time.perf_counter() - began)
                return
            began = time.perf_counter()
            pixels = self._pixels(first.image)
            stage = "explain"
            prepared = self._prepare(first.image, pixels)
            if isinstance(first, InspectTask):
                targets, seconds = prepared.choose(), time.perf_counter() - began
                yield Inspection(targets, prepared.subject.size, seconds, prepared.original_size)
                return
            works = [task.work for task in call.tasks if isinstance(task, WorkTask)]
            for _, result in perform(prepared.subject, works, first.targets, call.batch_size):
                yield Done(result, time.perf_counter() - began)
                began = time.perf_counter()
        except DeviceError:
            raise
        except MCRiseError as error:
            yield Failure(stage, str(error))

    def _pixels(self, image: ImageRef) -> np.ndarray | None:
        """An image as it was decoded; None where it is prepared already."""
        if image in self._prepared:
            return None
        reading = self._read_ahead(image)
        del self._ahead[image]
        return reading.result()

    def _prepare(self, image: ImageRef, pixels: np.ndarray | None) -> Prepared:
        """An image ready to be masked."""
        if pixels is None:
            prepared = self._prepared.pop(image)
        else:
            assert self._explained is not None
            prepared = self._explained.prepare(image, pixels)
            while len(self._prepared) >= _PREPARED_KEPT:
                del self._prepared[next(iter(self._prepared))]
        self._prepared[image] = prepared
        return prepared

    def _read_ahead(self, image: ImageRef) -> Future[np.ndarray]:
        """Decode in the one thread that does so, while this one waits for the model."""
        if image not in self._ahead:
            while len(self._ahead) >= _PREPARED_KEPT:
                del self._ahead[next(iter(self._ahead))]
            self._ahead[image] = self._reader.submit(read_image, image.uri, self._decode)
        return self._ahead[image]


@dataclass
class InProcess:
    """One worker in this process, as an executor: the engine without Ray.

    Attributes:
        worker: that does the work.
        execution: how it asks its model; None lets it choose.
    """

    worker: Worker
    execution: Execution | None
    _waiting: deque[tuple[int, Call | None]] = field(default_factory=deque)

    def now(self) -> float:
        """See `Executor`."""
        return time.monotonic()

    def wanted(self) -> int:
        """See `Executor`."""
        return 1

    def start(self, actor: int) -> None:
        """See `Executor`."""
        self._waiting.append((actor, None))

    def submit(self, actor: int, call: Call) -> None:
        """See `Executor`."""
        self._waiting.append((actor, call))

    def end(self, actor: int) -> None:
        """See `Executor`; there is nothing to kill."""
        self._waiting.clear()

    def wait(self, seconds: float) -> list[Event]:
        """Do the next call."""
        if not self._waiting:
            return []
        actor, call = self._waiting.popleft()
        outcome: Any
        try:
            if call is None:
                outcome = self.worker.load(self.execution)
                self.execution = outcome.execution
            else:
                outcome = self.worker.do(call)
        except MCRiseError as error:
            outcome = Fault(FaultKind.BUILD, str(error), error)
        return [Event(actor, call, outcome)]

    def shortage(self) -> str:
        """See `Executor`."""
        return "the model is being built in this process"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
