"""Actors in virtual time, with random or scripted faults: an executor that counts what it is asked."""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from mcrise_ray.engine import Event
from mcrise_ray.faults import Fault, FaultKind
from mcrise_ray.plan import Unit
from mcrise_ray.reduction import Conclude, Conclusion, ScoreUnit, WorkResult
from mcrise_ray.saliency import Partial
from mcrise_ray.tasks import (
    Call,
    Done,
    Ended,
    Failed,
    Failure,
    Inspection,
    InspectTask,
    Outcome,
    Reply,
    Target,
    Task,
    WorkTask,
)

STALL = "stall"
ORPHAN = "orphan"
Script = Callable[[int, int, Call], Fault | Reply | str | None]


def nothing_happens(actor: int, number: int, call: Call) -> None:
    """The script of an undisturbed run."""


def true_value(image_id: str, unit: Unit) -> float:
    """What a simulated unit sums up to; floating point makes the order of adding such numbers show."""
    return random.Random(f"{image_id}/{unit.index}").uniform(-1, 1) * 10.0 ** (unit.index % 7)


def partial(masks: int, value: float) -> Partial:
    """Sums that hold one number."""
    none = np.zeros((1, 0, 1, 0))
    return Partial(
        masks,
        float(masks),
        float(masks),
        (1, 1),
        np.array([value]),
        np.zeros((1, 1, 1, 1, 1, 1)),
        none,
        np.zeros(1),
        none,
    )


@dataclass
class _Actor:
    free_at: float
    dies_at: float
    free_beside: float = 0.0  # the thread that brings sums together
    calls: list[Call] = field(default_factory=list)
    number: int = 0
    stalled: bool = False


class Simulation:
    """A discrete-event simulation of a cluster.

    Args:
        actors: wanted.
        script: what happens to the `number`-th call of an actor: None for its result, `STALL` for silence
            from there on, `ORPHAN` for a result that arrives after its actor was found unreachable, a
            `Reply` with a fault in its midst, or a `Fault` instead of a result.
        seconds: of one unit.
        spread: relative, of a unit's random duration.
        deaths_per_hour: of one actor.
        start_seconds: until a new actor's model is built.
        latency: seconds from an actor to the driver.
        exact: give each unit its `true_value`, which takes time; all the same number otherwise.
        bad: images whose inspection fails.
        enough: masks at which a look ends an image.
    """

    def __init__(
        self,
        actors: int,
        script: Script = nothing_happens,
        *,
        seconds: float = 0.15,
        spread: float = 0.2,
        deaths_per_hour: float = 0.0,
        start_seconds: float = 20.0,
        latency: float = 0.002,
        exact: bool = True,
        bad: frozenset[str] = frozenset(),
        enough: int = 10**12,
        seed: int = 0,
    ) -> None:
        self.actors, self.script, self.seconds, self.spread = actors, script, seconds, spread
        self.deaths_per_hour, self.start_seconds, self.latency = deaths_per_hour, start_seconds, latency
        self.exact, self.bad, self.enough = exact, bad, enough
        self.clock = self.busy = self.own_time = 0.0
        self.events: list[tuple[float, int, Event]] = []
        self.alive: dict[int, _Actor] = {}
        self.units_run: Counter[tuple[str, int]] = Counter()
        self.calls: Counter[int] = Counter()
        self.batch_sizes: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.started: list[int] = []
        self.ended: list[int] = []
        self.builds: Callable[[int], Fault | None] = lambda actor: None
        self._random = random.Random(seed)
        self._serial = 0
        self._one = partial(64, 1.0)

    def now(self) -> float:
        return self.clock

    def wanted(self) -> int:
        return self.actors

    def start(self, actor: int) -> None:
        began = time.perf_counter()
        self.started.append(actor)
        rate = self.deaths_per_hour / 3600
        life = self._random.expovariate(rate) if rate else float("inf")
        ready = self.clock + self.start_seconds
        self.alive[actor] = _Actor(ready, self.clock + life)
        fault = self.builds(actor)
        self._push(ready, Event(actor, None, fault or "facts"))
        if self.alive[actor].dies_at < float("inf"):
            self._push(
                self.alive[actor].dies_at, Event(actor, None, Fault(FaultKind.DIED, "the node went away"))
            )
        self.own_time += time.perf_counter() - began

    def submit(self, actor: int, call: Call) -> None:
        began = time.perf_counter()
        there = self.alive[actor]
        there.number += 1
        self.calls[actor] += 1
        happens = self.script(actor, there.number, call)
        if happens == STALL:
            there.stalled = True
        if not there.stalled:
            start = max(self.clock + self.latency / 2, there.free_beside if call.concludes else there.free_at)
            took = sum(self._duration(task) for task in call.tasks)
            ends = start + took
            if call.concludes:
                there.free_beside = ends
            else:
                there.free_at = ends
            arrives = ends + self.latency / 2
            if happens == ORPHAN:
                unreachable = Fault(FaultKind.UNAVAILABLE, "cannot be reached")
                self._push(self.clock + self.latency, Event(actor, call, unreachable))
            if isinstance(happens, Fault) and happens.kind is not FaultKind.LOST:
                there.dies_at = min(there.dies_at, ends)
            if isinstance(happens, Fault):
                self._push(arrives, Event(actor, call, happens))
            elif ends <= there.dies_at:
                if isinstance(happens, Reply):
                    reply = Reply(self._outcomes(call, len(happens.outcomes), took), happens.fault)
                else:
                    reply = Reply(self._outcomes(call, len(call.tasks), took))
                self.busy += 0 if call.concludes else took
                self._push(arrives, Event(actor, call, reply))
        self.own_time += time.perf_counter() - began

    def end(self, actor: int) -> None:
        self.ended.append(actor)
        self.alive.pop(actor, None)

    def wait(self, seconds: float) -> list[Event]:
        began = time.perf_counter()
        found: list[Event] = []
        until = self.clock + seconds
        while self.events and not found and self.events[0][0] <= until:
            self.clock = max(self.clock, self.events[0][0])
            found.append(heapq.heappop(self.events)[2])
        while self.events and self.events[0][0] <= self.clock:
            found.append(heapq.heappop(self.events)[2])
        if not found:
            self.clock = until
        self.own_time += time.perf_counter() - began
        return found

    def shortage(self) -> str:
        return "the simulation is slow to start"

    def _duration(self, task: Task) -> float:
        asks_for_masks = isinstance(task, WorkTask) and task.masks
        spread = 1 + self.spread * self._random.uniform(-1, 1)
        return self.seconds * spread * (1.0 if asks_for_masks else 0.1)

    def _push(self, at: float, event: Event) -> None:
        self._serial += 1
        heapq.heappush(self.events, (at, self._serial, event))

    def _outcomes(self, call: Call, count: int, took: float) -> tuple[Outcome, ...]:
        return tuple(self._outcome(task, call, took / len(call.tasks)) for task in call.tasks[:count])

    def _outcome(self, task: Task, call: Call, took: float) -> Outcome:
        if isinstance(task, InspectTask):
            if task.image.image_id in self.bad:
                return Failure("read", "damaged")
            return Inspection((Target(0, None, "predicted", 0.5),), (1, 1), took, (1, 1))
        return Done(self._result(task, call), took)

    def _result(self, task: WorkTask, call: Call) -> WorkResult:
        work = task.work
        if isinstance(work, Conclude):
            total = work.total
            if work.scores is not None:
                total = partial(0, 0.0)
                for scores in work.scores:
                    total = total.combine(partial(len(scores), scores[0, 0]))
            assert total is not None
            if work.look and (work.last or total.masks >= self.enough):
                return Conclusion(SimpleNamespace(total=total), None, None)  # type: ignore[arg-type]
            return Conclusion(None, None, total)
        value = 1.0
        if self.exact:
            self.units_run[task.image.image_id, work.unit.index] += 1
            self.batch_sizes[task.image.image_id, work.unit.index].append(call.batch_size)
            value = true_value(task.image.image_id, work.unit)
        if isinstance(work, ScoreUnit):
            return np.full((len(work.unit), 1), value)
        return partial(len(work.unit), value) if self.exact else self._one


class Sums:
    """A sink that keeps the one number of each image."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.masks: dict[str, int] = {}
        self.failures: dict[str, Failure] = {}
        self.order: list[str] = []
        self.notes: list[str] = []
        self.built_models: list[object] = []
        self.retries: Counter[str] = Counter()
        self.alive: list[int] = []
        self.finished = 0
        self.keep = True

    def built(self, facts: object) -> None:
        self.built_models.append(facts)

    def ended(self, image: Ended) -> None:
        self.finished += 1
        if not self.keep:
            return
        name = image.image.image_id
        assert name not in self.order, f"{name} ended twice"
        self.order.append(name)
        if isinstance(image, Failed):
            self.failures[name] = image.failure
        else:
            total: Partial = image.explanation.total  # type: ignore[attr-defined]
            self.values[name] = float(total.scores[0])
            self.masks[name] = total.masks

    def masks_done(self, masks: int) -> None: ...

    def retried(self, reason: str, text: str) -> None:
        self.retries[reason] += 1
        self.notes.append(text)

    def actors_alive(self, actors: int) -> None:
        self.alive.append(actors)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def tick(self) -> None: ...
