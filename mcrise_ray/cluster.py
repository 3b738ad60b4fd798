"""Ray: how a job gets one, and its actors behind the numbers of the engine."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any
from weakref import WeakKeyDictionary

import ray
import torch
from ray._private import ray_constants
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from mcrise_ray.access import ensure_token, find_token
from mcrise_ray.engine import Event
from mcrise_ray.errors import ClusterError, MCRiseError, ModelError, SpecError
from mcrise_ray.faults import Fault, FaultKind
from mcrise_ray.guide import Guide
from mcrise_ray.jobspec import ActorRange, JobSpec
from mcrise_ray.memory import ONE_HEAP
from mcrise_ray.precision import Execution
from mcrise_ray.servers import is_server
from mcrise_ray.tasks import Call
from mcrise_ray.worker import Built, Setup, Worker

_LOOK_AT_CLUSTER_EVERY = 2.0  # seconds
_BESIDE = "beside"  # name of the thread beside the one that asks the model
_GROW_AFTER = 30.0  # seconds of work with what is there: shorter jobs are done before a machine has come
_KINDS = {
    FaultKind.UNAVAILABLE: ActorUnavailableError,
    FaultKind.HOST_MEMORY: OutOfMemoryError,
    FaultKind.LOST: ObjectLostError,
}  # any other is the death of an actor, its process or its node


@contextmanager
def connect(
    job: JobSpec, setup: Setup, execution: Execution | None, address: str | None = None
) -> Iterator[RayExecutor]:
    """Ray for one job: a cluster by its address, one that is connected already, or one of our own.

    Args:
        job: how many actors, with what each.
        setup: of every actor.
        execution: how the model is asked; None lets the first actor choose.
        address: of a cluster.

    Raises:
        ClusterError: it cannot be reached, or cannot start.
    """
    if address is None and not ray.is_initialized():
        gpus = _gpus(job, float(torch.cuda.device_count()))
        cores = os.cpu_count() or 1
        with local_ray(max(cores, job.fewest_actors * job.cpus_per_actor)):
            yield RayExecutor(job, setup, execution, gpus, may_grow=False)
        return
    ours = not ray.is_initialized()
    if ours:
        try:
            with _sigterm_kept():
                ray.init(address=address, configure_logging=False)
        except (RuntimeError, ValueError, ConnectionError, OSError) as error:
            raise ClusterError(f"cannot connect to Ray at {address}: {error}") from error
    try:
        yield RayExecutor(job, setup, execution, _gpus(job, ray.cluster_resources().get("GPU", 0.0)))
    finally:
        if ours:
            ray.shutdown()


def _gpus(job: JobSpec, there: float) -> float:
    """GPUs per actor: unless that is said, one where there are any and the model is for one."""
    if job.gpus_per_actor is not None:
        return job.gpus_per_actor
    elsewhere = job.model.device == "cpu" or is_server(job.model.model)
    return float(there > 0 and not elsewhere)


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    """A Ray of our own that only this machine can reach, and only with this user's token.

    One that is connected already is used as it is.

    Args:
        cpus: logical ones, which decide how many actors fit, not how many cores there are.

    Raises:
        ClusterError: it cannot start, or the token is useless.
    """
    if ray.is_initialized():
        yield
        return
    if find_token() is None:  # Ray would make one too, with the rights that the umask leaves
        ensure_token()
    with _loopback_only(), _private_files(), _sigterm_kept():
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                configure_logging=False,
                _node_ip_address="127.0.0.1",
            )
        except (RuntimeError, ValueError, ConnectionError, OSError) as error:
            raise ClusterError(f"cannot start Ray on this machine: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray's own handler, which it sets when it starts, would end the process in the middle of a write."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Keep Ray's servers on 127.0.0.1, which takes more than a node address.

    Ray replaces a loopback address by a reachable one unless this switch is off. It was made for Windows and
    macOS, is read when `ray` is imported, and is inherited by the processes that Ray starts.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    settings = {name: "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    before = {key: os.environ.get(key) for key in settings}
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(settings)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextmanager
def _private_files() -> Iterator[None]:
    """Files that Ray makes on its start are for this user alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


class RayExecutor:
    """Actors of Ray behind the numbers of the engine.

    Futures put what comes back into one queue, so that a turn of the loop costs the same for 2 actors and for
    1,000 (`ray.wait` looks at all its references each time).

    The first actor that is there chooses how the model is asked, unless that is known; the others build
    theirs meanwhile. It need not be the first that was asked for: that one may wait for a machine.

    Args:
        job: how many actors, with what each.
        setup: of every actor.
        execution: how the model is asked, where that is known.
        gpus: per actor.
        may_grow: whether machines may come to the cluster when actors wait for them.
    """

    def __init__(
        self, job: JobSpec, setup: Setup, execution: Execution | None, gpus: float, may_grow: bool = True
    ) -> None:
        self._job, self._setup, self._execution = job, setup, execution
        self._resources = {"CPU": float(job.cpus_per_actor)} | ({"GPU": gpus} if gpus else {})
        try:
            self._class = ray.remote(
                num_cpus=job.cpus_per_actor,
                num_gpus=gpus,
                max_restarts=0,
                max_task_retries=0,
                concurrency_groups={_BESIDE: 1},
                runtime_env={"env_vars": ONE_HEAP},  # with groups, no call runs in the main thread
                **({"label_selector": job.label_selector} if job.label_selector else {}),
            )(Worker)
        except ValueError as error:
            raise SpecError(f"--label-selector: {error}") from error
        self._handles: dict[int, ActorHandle] = {}
        self._events: SimpleQueue[Event | int] = SimpleQueue()  # a number: this actor has begun
        self._may_grow = may_grow
        self._fitting, self._fitting_since, self._looked = 0, 0.0, -math.inf
        self._choosing: int | None = None  # the actor that does
        self._held: list[int] = []  # actors that wait for it
        self._begun: set[int] = set()
        self._guides: WeakKeyDictionary[Guide, ray.ObjectRef] = WeakKeyDictionary()

    def now(self) -> float:
        """See `Executor`."""
        return time.monotonic()

    def wanted(self) -> int:
        """What was asked for, or as many as fit the cluster of the last seconds.

        Only actors that wait make a cluster grow, and they cost nothing where it cannot; they vanish with
        their driver, which a request to the autoscaler would outlive.
        """
        actors = self._job.actors
        if isinstance(actors, int):
            return actors
        self._look_at_cluster()
        wanted = max(self._job.fewest_actors, self._fitting)
        if isinstance(actors, ActorRange):
            if self._may_grow and self.now() - self._fitting_since > _GROW_AFTER:
                wanted = max(wanted, 2 * self._fitting)
            wanted = min(wanted, actors.max or wanted)
        return wanted

    def _look_at_cluster(self) -> None:
        if self.now() - self._looked > _LOOK_AT_CLUSTER_EVERY:
            self._looked = self.now()
            nodes = (_fit(node, self._resources, self._job.label_selector) for node in _alive_nodes())
            fitting = sum(nodes)
            if fitting != self._fitting:
                self._fitting, self._fitting_since = fitting, self._looked

    def start(self, actor: int) -> None:
        """See `Executor`."""
        handle = self._handles[actor] = self._class.remote(self._setup)
        # While the choice is awaited; what goes wrong here goes wrong in `load` again.
        handle.build.remote().future().add_done_callback(lambda _: self._events.put(actor))
        self._held.append(actor)
        self._load_held()

    def submit(self, actor: int, call: Call) -> None:
        """See `Executor`."""
        do = self._handles[actor].do
        if call.concludes:  # asks for no model: in a thread of its own, so that a GPU does not wait for it
            do = do.options(concurrency_group=_BESIDE)
        self._watch(actor, call, do.remote(*self._apart(call)))

    def _apart(self, call: Call) -> tuple[Call, ray.ObjectRef | None]:
        """A call and its guide, which Ray sends once to each node, not with every call, and keeps here for as
        long as its image needs it.
        """
        guide = call.guide
        if guide is None:
            return call, None
        if guide not in self._guides:
            self._guides[guide] = ray.put(guide)
        return call.with_guide(None), self._guides[guide]

    def end(self, actor: int) -> None:
        """See `Executor`."""
        ray.kill(self._handles.pop(actor))
        self._begun.discard(actor)
        if actor in self._held:
            self._held.remove(actor)
        if actor == self._choosing:
            self._choosing = None
            self._load_held()

    def wait(self, seconds: float) -> list[Event]:
        """See `Executor`."""
        came: list[Event | int] = []
        try:
            came.append(self._events.get(timeout=seconds))
            while True:
                came.append(self._events.get_nowait())
        except Empty:
            pass  # all there are
        self._begun |= {actor for actor in came if isinstance(actor, int)} & self._handles.keys()
        events = [event for event in came if isinstance(event, Event)]
        for event in events:
            if self._execution is None and isinstance(event.outcome, Built):
                self._execution = event.outcome.execution
        self._load_held()
        return events

    def _load_held(self) -> None:
        """Let actors make their model ready: one that has begun while nothing is chosen, all of them then."""
        for actor in list(self._held):
            if self._execution is None:
                if self._choosing is not None or actor not in self._begun:
                    continue
                self._choosing = actor
            self._held.remove(actor)
            self._watch(actor, None, self._handles[actor].load.remote(self._execution))

    def shortage(self) -> str:
        """See `Executor`."""
        labels, nodes = self._job.label_selector, _alive_nodes()
        there = {
            name: sum(node["Resources"].get(name, 0) for node in nodes if _has(node, labels))
            for name in self._resources
        }
        has = ", ".join(f"{amount:g} {name}" for name, amount in there.items())
        asks = ", ".join(f"{amount:g} {name}" for name, amount in self._resources.items())
        if not labels:
            return f"each asks for {asks}; the cluster has {has} in all"
        told = ", ".join(f"{name}={label}" for name, label in labels.items())
        return f"each asks for {asks} on a node with {told}; the nodes that have that label have {has} in all"

    def _watch(self, actor: int, call: Call | None, ref: ray.ObjectRef) -> None:
        ref.future().add_done_callback(
            lambda future: self._events.put(Event(actor, call, _outcome(future, building=call is None)))
        )


def _outcome(future: Future[Any], building: bool) -> Any:
    """What an actor returned, or the fault in the terms of the policy."""
    error = future.exception()
    if error is None:
        return future.result()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, MCRiseError):
            return Fault(FaultKind.BUILD, str(error.cause), error.cause)
        cause = f"{type(error.cause).__name__}: {error.cause}" if error.cause else message
        kind = FaultKind.BUILD if building else FaultKind.BROKEN
        return Fault(kind, cause, ModelError(f"cannot build the model: {cause}") if building else None)
    if isinstance(error, RuntimeEnvSetupError | ActorUnschedulableError):
        return Fault(FaultKind.BUILD, message, ClusterError(" ".join(lines)))
    if isinstance(error, RayActorError) and error.preempted:
        return Fault(FaultKind.PREEMPTED, message)
    kind = next((kind for kind, types in _KINDS.items() if isinstance(error, types)), FaultKind.DIED)
    if isinstance(error, RayActorError):
        message = lines[-1]  # after the actor's name, address and so on
    return Fault(kind, f"{type(error).__name__}: {message}"[:400])


def _alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _has(node: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a node has these; a label with an operator, such as `!A100` or `in(..)`, is Ray's to judge."""
    return all(
        node["Labels"].get(name) == label
        for name, label in labels.items()
        if "(" not in label and not label.startswith("!")
    )


def _fit(node: dict[str, Any], asked: dict[str, float], labels: dict[str, str]) -> int:
    """How many actors fit one node."""
    if not _has(node, labels):
        return 0
    # Rounded as Ray does it: five times 0.2 GPUs are one.
    have = node["Resources"]
    return int(min(round(1e4 * have.get(name, 0.0)) // round(1e4 * amount) for name, amount in asked.items()))
