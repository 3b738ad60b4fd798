"""What to do when something dies: a pure function from (fault, history) to a decision.

The loop acts on it elsewhere. Nothing here is about an image that cannot be explained for a reason of its own
(damaged, NaN scores): a worker returns that as a `Failure`, and the image gets its error row at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mcrise_ray.errors import MCRiseError


class FaultKind(str, Enum):
    """What happened to a call, in the terms of the policy rather than of Ray."""

    DIED = "actor died"
    UNAVAILABLE = "actor unreachable"
    PREEMPTED = "actor preempted"
    STALLED = "call stalled"
    LOST = "result lost"
    HOST_MEMORY = "out of host memory"
    DEVICE_MEMORY = "out of memory in the actor"
    BROKEN = "unexpected error"
    BUILD = "model not built"


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong: its kind, one line for people, and the error to stop the job with."""

    kind: FaultKind
    message: str
    error: MCRiseError | None = None


@dataclass(frozen=True)
class History:
    """What the decision may depend on.

    Attributes:
        attempts: how often this task was lost before through a fault that may be its own.
        batch_size: masked images per call of the model that the task ran with.
        lost_starts: times in a row that actors ended before they finished anything.
        built: whether any actor has built the model.
    """

    attempts: int = 0
    batch_size: int = 1
    lost_starts: int = 0
    built: bool = True


@dataclass(frozen=True)
class Limits:
    """When to stop trying.

    Attributes:
        max_retries: of one call whose actor died under it.
        max_lost_starts: times in a row that actors, one or several together, ended before they finished
            anything; more than `max_retries` in any case, or a single image could stop a job.
        deadline: seconds that any call may take; ten times the slowest pace seen counts where that is longer,
            and fifteen deadlines for calls without masks, whose time nothing foretells, and for an actor's
            first masks, which may compile the model.
        tick: seconds between looks at the clock while nothing comes back.
    """

    max_retries: int = 3
    max_lost_starts: int = 6
    deadline: float = 60.0
    tick: float = 1.0


class Then(str, Enum):
    """What becomes of the task."""

    REQUEUE = "requeued"
    HALVE = "requeued with half the batch"
    SKIP = "image skipped"
    STOP = "job stopped"


@dataclass(frozen=True)
class Decision:
    """What to do.

    Attributes:
        then: with the task.
        strike: count the loss against the task: its retries are bounded.
    """

    then: Then
    strike: bool = True


ACTOR_GONE = frozenset(
    {
        FaultKind.DIED,
        FaultKind.UNAVAILABLE,
        FaultKind.PREEMPTED,
        FaultKind.STALLED,
        FaultKind.HOST_MEMORY,
        FaultKind.BUILD,
    }
)
"""Faults after which the actor is ended, for an unreachable one may live, and another takes its place."""


def decide(fault: Fault, history: History, limits: Limits) -> Decision:
    """The fault policy.

    Args:
        fault: what happened to the task at the head of an actor's queue (or to the actor itself while it was
            building the model: then with a `History` without attempts).
        history: of the task and the job.
        limits: after `max_retries` of a task its image is skipped, because it may be what kills the actors;
            after `max_lost_starts` no image is to blame.
    """
    building = fault.kind is FaultKind.BUILD
    lost_starts = max(limits.max_lost_starts, limits.max_retries + 1)
    hopeless = history.lost_starts >= lost_starts and fault.kind is not FaultKind.PREEMPTED
    if (building and not history.built) or (fault.kind in ACTOR_GONE and hopeless):
        return Decision(Then.STOP)
    if building or fault.kind is FaultKind.PREEMPTED:
        return Decision(Then.REQUEUE, strike=False)
    if fault.kind in {FaultKind.HOST_MEMORY, FaultKind.DEVICE_MEMORY} and history.batch_size > 1:
        return Decision(Then.HALVE, strike=False)  # bounded by the batch size itself
    # The same code would meet the same input again: an unexpected error is not retried.
    exhausted = fault.kind is FaultKind.BROKEN or history.attempts >= limits.max_retries
    return Decision(Then.SKIP if exhausted else Then.REQUEUE)
