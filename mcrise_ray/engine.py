"""The loop that keeps every actor busy, starts others for those that die, and loses nothing on the way.

It knows actors only as numbers behind an `Executor`: Ray in `cluster.py`, this process in `worker.py`, a
simulation with virtual time in the tests.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from mcrise_ray.bookkeeping import Bookkeeping
from mcrise_ray.errors import ClusterError, MCRiseError
from mcrise_ray.faults import ACTOR_GONE, Decision, Fault, FaultKind, History, Limits, Then, decide
from mcrise_ray.tasks import Call, Ended, Failure, InspectTask, Reply

_SHORT_CALL = 2.0  # seconds; an actor holds a second call in its queue only while calls are that short
_WITHOUT_MASKS = 2  # calls that an actor holds beside those with masks
_FIRST = 15  # times the deadline: how long an actor's first masks may take
_SLOW = 10  # times the slowest pace seen: then a call counts as stalled
_HALVINGS_TO_LEARN = 3  # calls that ran out of memory before all calls get half the batch
_LOOK_EVERY = 1.0  # seconds between looks for stalled calls
_WAITING_NOTE_EVERY = 30.0  # seconds
_LONGEST_PAUSE = 30.0  # seconds before another actor is tried after several that finished nothing


@dataclass(frozen=True)
class Event:
    """What an executor has to tell of an actor: what became of a call, or (no call) of building the model."""

    actor: int
    call: Call | None
    outcome: Any  # Reply of a call, what was built, or Fault


class Executor(Protocol):
    """Actors by number; nothing here waits but `wait`."""

    def now(self) -> float:
        """Seconds on a clock that only moves forward."""
        ...

    def wanted(self) -> int:
        """How many actors there should be now; may change while the cluster does."""
        ...

    def start(self, actor: int) -> None:
        """Begin to start an actor; an event without a call says that its model is built."""
        ...

    def submit(self, actor: int, call: Call) -> None:
        """Queue a call behind the others of an actor."""
        ...

    def end(self, actor: int) -> None:
        """Kill an actor, dead or alive."""
        ...

    def wait(self, seconds: float) -> list[Event]:
        """Events since the last call; at most so many seconds are spent waiting for the first."""
        ...

    def shortage(self) -> str:
        """Why actors may be waiting to start, in words."""
        ...


class Sink(Protocol):
    """Where results go, in the order in which they come."""

    def built(self, built: Any) -> None:
        """An actor has built the model; told before any call is handed out to it."""
        ...

    def ended(self, image: Ended) -> None:
        """An image is explained, or has failed."""
        ...

    def masks_done(self, masks: int) -> None:
        """Some masks have been scored."""
        ...

    def retried(self, reason: str, text: str) -> None:
        """A call is handed out again: a `FaultKind` in words, and what happened as a line."""
        ...

    def actors_alive(self, actors: int) -> None:
        """So many actors hold the model now; 0 at the end."""
        ...

    def note(self, text: str) -> None:
        """A line worth keeping."""
        ...

    def tick(self) -> None:
        """Time has passed."""
        ...


@dataclass
class Tally:
    """What went wrong and was put right.

    Attributes:
        retries: calls handed out again, by the kind of their fault.
        replaced: actors ended and replaced.
        halved: calls repeated with half their batch: the last bits of their images may differ.
    """

    retries: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    halved: int = 0


@dataclass
class _Actor:
    number: int
    calls: deque[Call] = field(default_factory=deque)  # in the order they run, or beside each other
    built: bool = False
    finished: int = 0
    scored: bool = False  # any masks
    since: float = 0.0  # when the first of `calls` began to run
    waited: float = 0.0  # how long the loop had waited by then

    @property
    def running(self) -> list[Call]:
        """The first call that asks the model, and the first that concludes, which runs beside it."""
        asks = (call for call in self.calls if not call.concludes)
        concludes = (call for call in self.calls if call.concludes)
        return [*islice(asks, 1), *islice(concludes, 1)]


class Engine:
    """One job's loop over an executor; `run` once."""

    def __init__(
        self, ledger: Bookkeeping, executor: Executor, sink: Sink, limits: Limits | None = None
    ) -> None:
        self.tally = Tally()
        self._ledger, self._executor, self._sink = ledger, executor, sink
        self._limits = limits or Limits()
        self._actors: dict[int, _Actor] = {}
        self._hungry: deque[int] = deque()  # actors that may take another call
        self._started = self._lost_starts = 0
        self._ever_built = False
        self._pause_until = self._look_at = 0.0
        self._waiting_since: float | None = None
        self._told_waiting = 0  # actors that wait
        self._slowest = 0.0  # seconds per mask
        self._waited = 0.0  # seconds: what comes back while the loop is busy is not late

    def run(self) -> Tally:
        """Work until the ledger and its successors are finished.

        Raises:
            MCRiseError: the model cannot be built; actor after actor dies; the sink fails.
        """
        try:
            while True:
                self._recruit()
                self._feed()
                if self._ledger.finished:
                    successor = self._ledger.successor()
                    if successor is None:
                        return self.tally
                    self._ledger = successor
                    continue
                began = self._executor.now()
                events = self._executor.wait(self._limits.tick)
                # More than was asked for is not waiting: this process was stopped, as by Ctrl-Z.
                self._waited += min(self._executor.now() - began, self._limits.tick)
                for event in events:
                    self._handle(event)
                self._look_at_clock()
                self._sink.tick()
        finally:
            for actor in self._actors:
                self._executor.end(actor)
            self._sink.actors_alive(0)

    def _begin(self, actor: _Actor) -> None:
        """The first of an actor's calls begins to run."""
        actor.since, actor.waited = self._executor.now(), self._waited

    def _recruit(self) -> None:
        if self._executor.now() < self._pause_until:
            return
        for _ in range(self._executor.wanted() - len(self._actors)):
            self._actors[self._started] = _Actor(self._started)
            self._executor.start(self._started)
            self._started += 1

    def _feed(self) -> None:
        """Give calls to whoever has room, as long as there are any."""
        while self._hungry and self._ledger.has_work:
            number = self._hungry.popleft()
            actor = self._actors.get(number)
            if actor is None or not self._has_room(actor):
                continue
            call = self._ledger.next_call(number)
            if call is not None:
                if not actor.calls:
                    self._begin(actor)
                actor.calls.append(call)
                self._executor.submit(number, call)
                self._hungry.append(number)
            elif not actor.calls:
                self._hungry.appendleft(number)
                return  # what is left waits for others: nobody idle could be given anything

    def _has_room(self, actor: _Actor) -> bool:
        """Whether an actor may hold another call: a second one of units waits where the first is quick, or
        the actor would idle; what asks for no masks takes no time to speak of. A call under which an actor
        has been lost before stands alone, or what is beside it would be suspected too.
        """
        if any(self._ledger.attempts(call) for call in actor.calls):
            return False
        room = 2 if 0 < self._ledger.seconds_per_unit <= _SHORT_CALL else 1
        of_units = sum(call.masks > 0 for call in actor.calls)
        return of_units < room and len(actor.calls) - of_units < _WITHOUT_MASKS

    def _handle(self, event: Event) -> None:
        actor = self._actors.get(event.actor)
        if actor is None:
            return  # ended before: what it still delivers has been handed out again
        if isinstance(event.outcome, Fault):
            if event.outcome.kind in ACTOR_GONE:
                self._lose_actor(actor, event.outcome)
            elif event.call is not None:
                actor.calls.remove(event.call)
                self._begin(actor)
                self._lose_call(event.call, event.outcome)
                self._hungry.append(actor.number)
        elif event.call is None:
            self._built(actor, event.outcome)
        else:
            self._returned(actor, event.call, event.outcome)

    def _built(self, actor: _Actor, built: Any) -> None:
        actor.built = True
        self._hungry.append(actor.number)
        self._ever_built = True
        self._sink.built(built)
        self._sink.actors_alive(self._alive())

    def _returned(self, actor: _Actor, call: Call, reply: Reply) -> None:
        took = self._executor.now() - actor.since
        done, rest = call.split(len(reply.outcomes))
        if done is not None:
            actor.finished += 1
            self._lost_starts = 0
            for ended in self._ledger.returned(done, reply.outcomes):
                self._sink.ended(ended)
            if done.masks:
                actor.scored = True
                self._slowest = max(self._slowest, took / done.masks)
                self._sink.masks_done(done.masks)
        if reply.fault is not None and reply.fault.kind in ACTOR_GONE:
            actor.calls.remove(call)
            actor.calls.appendleft(rest or call)
            self._lose_actor(actor, reply.fault)
            return
        actor.calls.remove(call)
        self._begin(actor)
        self._hungry.append(actor.number)
        if rest is not None and reply.fault is not None:
            self._lose_call(rest, reply.fault)

    def _look_at_clock(self) -> None:
        now = self._executor.now()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY
        for actor in list(self._actors.values()):
            took = self._waited - actor.waited
            # No deadline is shorter than the first of these, which is quick to compare.
            if took > self._limits.deadline and actor.calls and took > self._deadline(actor):
                self._lose_actor(actor, Fault(FaultKind.STALLED, f"no answer within {took:.0f} s"))
        self._tell_who_waits(now)

    def _tell_who_waits(self, now: float) -> None:
        """Again and again while nothing can begin; once where the job goes on with the others."""
        asked, alive = len(self._actors), self._alive()
        waiting = asked - alive
        if not waiting:
            self._waiting_since, self._told_waiting = None, 0
        elif self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since > _WAITING_NOTE_EVERY and (not alive or waiting > self._told_waiting):
            self._waiting_since, self._told_waiting = now, waiting
            who = f"{waiting} of {asked}" if alive else f"{asked}"
            self._sink.note(f"waiting for {who} actors to start: {self._executor.shortage()}")

    def _deadline(self, actor: _Actor) -> float:
        masks = actor.calls[0].masks
        floor = self._limits.deadline * (1 if actor.scored and masks else _FIRST)
        return max(floor, _SLOW * self._slowest * masks)

    def _lose_actor(self, actor: _Actor, fault: Fault) -> None:
        """An actor is gone: its running calls are judged, those behind them go back unblamed."""
        self._executor.end(actor.number)
        del self._actors[actor.number]
        self._ledger.forget(actor.number)
        self._sink.actors_alive(self._alive())
        if not actor.finished and fault.kind is not FaultKind.PREEMPTED:
            self._lose_start(fault)
        self.tally.replaced += 1
        if actor.calls:
            running = actor.running
            for call in actor.calls:
                if call not in running:
                    self._ledger.requeue(call, strike=False)
            self._lose_call(running[0], fault, actor)
            for call in running[1:]:
                self._lose_beside(call, fault)
        elif self._decide(None, fault).then is Then.STOP:
            raise self._stop(fault)
        else:
            self._sink.note(f"{fault.kind.value}: {fault.message}; actor {actor.number} replaced")

    def _lose_beside(self, call: Call, fault: Fault) -> None:
        """Nobody knows which of two calls ended an actor. This one is suspected too, but one loss is told and
        counted once; the one that did it will be there again the next time.
        """
        decision = self._decide(call, fault)
        if decision.then is Then.SKIP:
            self._lose_call(call, fault)
        else:
            self._ledger.requeue(call, strike=decision.strike)

    def _alive(self) -> int:
        return sum(actor.built for actor in self._actors.values())

    def _lose_start(self, fault: Fault) -> None:
        """Count actors that end together once, and wait before the next: what ended them may pass."""
        now = self._executor.now()
        if now >= self._pause_until:
            self._lost_starts += 1
            pause = 2.0 ** (self._lost_starts - 1) * (5 if fault.kind is FaultKind.HOST_MEMORY else 1)
            self._pause_until = now + min(pause, _LONGEST_PAUSE)

    def _lose_call(self, call: Call, fault: Fault, actor: _Actor | None = None) -> None:
        decision = self._decide(call, fault)
        if decision.then is Then.STOP:
            raise self._stop(fault)
        image = call.tasks[0].image.image_id
        replaced = f"actor {actor.number} replaced, " if actor is not None else ""
        text = f"{fault.kind.value}: {fault.message}; {replaced}{image} {decision.then.value}"
        if decision.then is Then.SKIP:
            self._sink.note(text)
            attempts = self._ledger.attempts(call)
            times = f", after {attempts} retries" if attempts else ""
            failure = Failure("explain", f"{fault.kind.value}{times}: {fault.message}")
            for ended in self._ledger.give_up(call, failure):
                self._sink.ended(ended)
            return
        self._sink.retried(fault.kind.value, text)
        halve = decision.then is Then.HALVE
        self.tally.retries[fault.kind.value] = self.tally.retries.get(fault.kind.value, 0) + 1
        self._ledger.requeue(call, strike=decision.strike, halve=halve)
        if halve:
            self.tally.halved += 1
            if self.tally.halved % _HALVINGS_TO_LEARN == 0 and call.batch_size == self._ledger.batch_size:
                self._ledger.batch_size = max(1, self._ledger.batch_size // 2)
                self._sink.note(f"batch size {self._ledger.batch_size} from here on")

    def _decide(self, call: Call | None, fault: Fault) -> Decision:
        history = History(
            attempts=self._ledger.attempts(call) if call else 0,
            batch_size=call.batch_size if call and not _is_single(call) else 1,
            lost_starts=self._lost_starts,
            built=self._ever_built,
        )
        return decide(fault, history, self._limits)

    def _stop(self, fault: Fault) -> MCRiseError:
        if fault.error is not None:
            return fault.error
        return ClusterError(
            f"{self._lost_starts} times in a row, actors ended before they finished anything; the last: "
            f"{fault.kind.value}: {fault.message}"
        )


def _is_single(call: Call) -> bool:
    """Whether a smaller batch could not help a call."""
    return call.concludes or isinstance(call.tasks[0], InspectTask)
