"""A job on the cluster that this process is part of: what a submission and the scripts in `jobs/` start.

`python -m mcrise_ray.driver [--retry-errors]` runs the job of the environment variable `MCRISE_JOB`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from mcrise_ray.access import token_for
from mcrise_ray.errors import ClusterError, MCRiseError, SpecError
from mcrise_ray.jobfiles import load_job
from mcrise_ray.jobs import Summary, draw_figures, run_job
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.progress import (
    LOG_VARIABLE,
    ConsoleReporter,
    JsonReporter,
    Reporter,
    log_format,
    reporter_for,
)
from mcrise_ray.submission import JOB_VARIABLE

_AGAIN_AFTER = 0.1  # seconds


def run_here(file: str | None = None, *, retry_errors: bool = False) -> int:
    """Run a job on the cluster of this process, or on this machine where there is none.

    Args:
        file: a job file; by default the job of the environment variable `MCRISE_JOB`.
        retry_errors: try images again that have an error row by an earlier run.

    Returns:
        The exit code: 0 where every image has ended in `maps/` or `errors/`, 2 for an error, 130 where it was
        stopped.
    """
    console = Console(file=sys.stdout)
    try:
        reporter = reporter_for(log_format(os.environ.get(LOG_VARIABLE, "plain")), console)
    except SpecError as error:
        ConsoleReporter(console).tell("error", f"error: {error}", "error")
        return 2
    with reporter:
        return _run(file, reporter, retry_errors)


def _run(file: str | None, reporter: ConsoleReporter | JsonReporter, retry_errors: bool) -> int:
    try:
        job = load_job(file) if file is not None else _job_of_environment()
        address = os.environ.get("RAY_ADDRESS")
        if address:
            # Said by the cluster itself, whose settings this process has inherited.
            _connect(address)
        heed_signals()  # here, because Ray sets a handler of its own when it connects
        told = _metered(reporter) if address else reporter
        summary = run_job(job, told, retry_errors=retry_errors)
        figures = draw_figures(job, reporter)
        reporter.note(
            f"{summary.images} images explained, {summary.errors} errors, {summary.rows} maps, "
            f"{summary.masks} masks in {summary.seconds:.1f} s"
        )
        if summary.errors:
            reporter.note(f"errors are in {job.output}/errors; submit --retry-errors tries them again")
        if figures:
            reporter.note(f"{len(figures)} figures, the first {figures[0]}")
        for line in remarks(job, summary):
            reporter.note(line)
    except KeyboardInterrupt:
        reporter.tell("note", "stopped; submit the same job again to resume", "warning")
        return 130
    except MCRiseError as error:
        reporter.tell("error", f"error: {error}", "error")
        return 2
    return 0


def heed_signals() -> None:
    """Make SIGTERM, by which jobs are stopped, the `KeyboardInterrupt` that Ctrl-C is, so that it ends no
    write in its middle; and let neither be lost. Python drops what is raised while a weak reference calls
    back, as they often do in drawing: then it comes again a moment later.
    """
    before = sys.unraisablehook

    def dropped(what: Any) -> None:
        if what.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_AFTER)
        else:
            before(what)

    if threading.current_thread() is threading.main_thread():  # signals are for no other
        sys.unraisablehook = dropped
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.default_int_handler)


def remarks(job: JobSpec, summary: Summary) -> Iterator[str]:
    """What else is to be known of a job that is done, in lines for people."""
    if summary.retrieval is not None:
        found = summary.retrieval
        yield (
            f"re-identified: recall@1 {found.recall_at_1:.1%}, mAP {found.mean_average_precision:.1%} of "
            f"{found.queries:,} queries of known people"
        )
    if summary.replaced or summary.retries:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in summary.retries.items())
        yield f"survived: {summary.replaced} actors replaced; calls repeated: {reasons or 'none'}"
    if summary.missed:
        yield (
            f"{summary.missed} images have a larger relative error than {job.explain.relative_error} after "
            "as many masks as they may have: raise --masks"
        )
    if summary.unpicked:
        yield (
            f"{summary.unpicked} images were explained as by --estimator control-variate: for many targets, "
            "scores that are no probabilities, or where that promised as little noise"
        )
    if summary.halved:
        yield f"{summary.halved} calls ran with half their batch: the last bits of their maps may differ"


def join_cluster(address: str, *, insecure: bool = False) -> None:
    """Connect this process, as a driver, to a cluster that runs.

    Args:
        address: `auto`, or `HOST:PORT` of Ray itself, as `RAY_ADDRESS` has it.
        insecure: see `mcrise_ray.access.token_for`.

    Raises:
        ClusterError: it cannot be reached, or lets nobody in without its token.
    """
    if token_for("localhost" if address == "auto" else address, insecure=insecure) is not None:
        # Ray reads it on its import, so it has to stand there before.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    _connect(address)


@contextmanager
def joined(address: str | None, *, insecure: bool = False) -> Iterator[None]:
    """The same for a while, and not at all where there is no address."""
    if address is None:
        yield
        return
    join_cluster(address, insecure=insecure)
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    if address != "auto":
        _knock(address)

    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(address=address, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        # Ray hands the error itself on, or only the text of its traceback.
        if any(AuthenticationError.__name__ in repr(cause) for cause in _causes(error)):
            reason = "it lets nobody in without its token; copy it here, see: mcrise token --help"
        else:
            reason = " ".join(str(error).split())[:300]
        raise ClusterError(f"cannot join the cluster at {address}: {reason}") from error


def _knock(address: str) -> None:
    """Raise `ClusterError` where nobody listens, for which Ray would end this process, or a dashboard does,
    at which it would try for ever.
    """
    parts = urlsplit(f"//{address}")
    try:
        if parts.hostname is None or parts.port is None:
            raise ClusterError(f"expected auto or HOST:PORT as the address of a Ray, found {address}")
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as there:
            is_web_server = _speaks_http(there)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClusterError(f"cannot join the cluster at {address}: {reason}") from error
    if is_web_server:
        raise ClusterError(
            f"expected a Ray at {address}, found a web server; mcrise submit takes the address of the "
            "dashboard, Ray itself listens on another port, which is 6379 by default"
        )


def _speaks_http(there: socket.socket) -> bool:
    with suppress(OSError):  # Ray answers in other words, or hangs up
        there.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
        return there.recv(5) == b"HTTP/"
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and all that led to it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _metered(reporter: Reporter) -> Reporter:
    """The same, with metrics; imported here because Ray reads its settings as it is imported."""
    from mcrise_ray.telemetry import MeteredReporter

    return MeteredReporter(reporter)


def _job_of_environment() -> JobSpec:
    try:
        return JobSpec(**json.loads(os.environ[JOB_VARIABLE]))
    except (KeyError, ValueError) as error:
        raise SpecError(f"expected a job in the environment variable {JOB_VARIABLE}: {error!r}") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m mcrise_ray.driver", description=__doc__)
    parser.add_argument("--retry-errors", action="store_true", help="try images with errors again")
    sys.exit(run_here(retry_errors=parser.parse_args().retry_errors))
