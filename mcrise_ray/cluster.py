"""Ray: the actor that holds the model, and the loop that keeps every actor busy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from mcrise_ray.decode import DecodeOptions
from mcrise_ray.dispatch import Failed, Finished, InspectTask, Ledger, Task, UnitTask
from mcrise_ray.errors import ClusterError, MCRiseError
from mcrise_ray.loading import ModelSpec
from mcrise_ray.models import ModelFacts
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.worker import Worker

IN_FLIGHT = 2  # tasks per actor: one runs while the next one's arguments travel


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    """A Ray of our own that only this machine can reach; one that is connected already is used as it is.

    Args:
        cpus: logical ones, which decide how many actors fit, not how many cores there are.

    Raises:
        ClusterError: it cannot start.
    """
    if ray.is_initialized():
        yield
        return
    with _loopback_only(), _private_files():
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
    """Files that Ray makes on its start, its token among them, are for this user alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def explain_images(
    ledger: Ledger,
    actors: Sequence[ActorHandle],
    on_unit: Callable[[int], None],
) -> Iterator[Finished | Failed]:
    """Keep every actor busy until the ledger is finished; yields images as they end.

    Raises:
        ModelError: the model cannot be built; the error is the model's own.
        ClusterError: an actor died.
    """
    running: dict[ray.ObjectRef, tuple[ActorHandle, Task]] = {}
    free = [actor for _ in range(IN_FLIGHT) for actor in actors]
    while True:
        while free:
            task = ledger.next_task()
            if task is None:
                break
            actor = free.pop(0)
            running[_submit(actor, task)] = (actor, task)
        if not running:
            if not ledger.finished:
                raise AssertionError("work is left, but none is handed out")
            return
        done, _ = ray.wait(list(running), num_returns=1)
        for ref in done:
            actor, task = running.pop(ref)
            free.append(actor)
            outcome = _outcome(ref)
            if isinstance(task, InspectTask):
                ended: Finished | Failed | None = ledger.inspected(task.image, outcome)
            else:
                ended = ledger.returned(task, outcome)
                on_unit(len(task.unit))
            if ended is not None:
                yield ended


def start_actors(
    count: int,
    model: ModelSpec,
    spec: ExplainSpec,
    targets: Sequence[int | str],
    decode: DecodeOptions,
    *,
    batch_size: int,
    cpus: int,
    gpus: float,
) -> tuple[list[ActorHandle], ModelFacts]:
    """Actors with the model built, and what the model is; fails fast with the model's own error.

    Raises:
        ModelError: the model cannot be built.
    """
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Worker)
    actors = [remote.remote(model, spec, targets, batch_size, cpus, decode) for _ in range(count)]
    loaded = [_outcome(actor.load.remote()) for actor in actors]
    return actors, loaded[0]


def _submit(actor: ActorHandle, task: Task) -> ray.ObjectRef:
    if isinstance(task, UnitTask):
        return actor.run.remote(task.image, task.targets, task.unit)
    return actor.inspect.remote(task.image)


def _outcome(ref: ray.ObjectRef) -> Any:
    """What an actor returned; its errors without Ray's remote traceback around them."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, MCRiseError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise ClusterError(f"an actor died: {str(error).splitlines()[0]}") from error
