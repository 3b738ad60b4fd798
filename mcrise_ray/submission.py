"""Jobs on a cluster, from outside: submitted, followed, stopped, submitted again, by Ray's job server.

What is submitted is the job itself, as JSON in an environment variable; the cluster runs
`python -m mcrise_ray.driver`, which reads it. How far a job is stands in `progress.json` beside its results,
where it outlives the driver.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mcrise_ray import files
from mcrise_ray.access import names_secret
from mcrise_ray.errors import ClusterError, SpecError
from mcrise_ray.jobserver import connect, errors_of
from mcrise_ray.progress import LOG_VARIABLE, LogFormat
from mcrise_ray.progressfile import Progress, read_progress
from mcrise_ray.results import Results, read_results

if TYPE_CHECKING:
    from mcrise_ray.jobspec import JobSpec

JOB_VARIABLE: Final = "MCRISE_JOB"
"""The environment variable of the driver that holds the job, as JSON."""

ENDED: Final = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})

_ENTRYPOINT: Final = "python -m mcrise_ray.driver"
_OUTPUT, _JOB, _HASH = "mcrise_output", "mcrise_job", "mcrise_hash"  # keys of the metadata
_STARTING: Final = 60.0  # seconds
_STOP_WITHIN: Final = "60"  # seconds, to commit and save before it is killed; Ray grants 3
_UNANSWERED: Final = 5  # questions in a row, before waiting for a job ends
_LONGEST: Final = 100_000  # bytes of one environment variable; Linux allows 131,072


@dataclass(frozen=True)
class JobStatus:
    """What is known of a submitted job.

    Attributes:
        id: of the submission.
        state: Ray's: `PENDING`, `RUNNING`, `STOPPED`, `SUCCEEDED` or `FAILED`.
        message: Ray's, on one line, without the last 20,000 characters of the log that it adds.
        output: where the results go.
        progress: None where there is none of its own yet, or the output cannot be read from here.
        started, ended: seconds since 1970.
    """

    id: str
    state: str
    message: str
    output: str
    progress: Progress | None
    started: float | None
    ended: float | None

    @property
    def has_ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state in ENDED


class SubmittedJob:
    """A job on a cluster: what `submit_job` and `find_job` return.

    Attributes:
        id: of the submission.
        output: where the results go.
        is_new: whether this call has submitted it; otherwise it was there already.
    """

    def __init__(self, client: Any, address: str, name: str, output: str, is_new: bool = False) -> None:
        self._client, self._address = client, address
        self.id, self.output, self.is_new = name, output, is_new

    def status(self) -> JobStatus:
        """How the job is, and how far.

        Raises:
            ClusterError: the cluster cannot be asked; so for all other methods.
        """
        with errors_of(self._address):
            return _status(self._client.get_job_info(self.id))

    def wait(self, timeout: float | None = None, *, every: float = 2.0) -> JobStatus:
        """Wait until the job has ended. A tunnel may break for a moment meanwhile.

        Raises:
            ClusterError: it has not within `timeout` seconds; it goes on.
        """
        until = None if timeout is None else time.monotonic() + timeout
        status, unanswered = self.status(), 0
        while not status.has_ended:
            if until is not None and time.monotonic() > until:
                raise ClusterError(f"expected {self.id} to end within {timeout:g} s, found it {status.state}")
            time.sleep(every)
            try:
                status, unanswered = self.status(), 0
            except ClusterError:
                unanswered += 1
                if unanswered > _UNANSWERED:
                    raise
        return status

    def logs(self) -> str:
        """All that the job has printed."""
        with errors_of(self._address):
            return str(self._client.get_job_logs(self.id))

    def follow(self) -> Iterator[str]:
        """What the job prints, from the beginning and as it comes, until it has ended."""
        loop = asyncio.new_event_loop()
        tail = self._client.tail_job_logs(self.id)
        try:
            with errors_of(self._address):
                while (lines := loop.run_until_complete(anext(tail, None))) is not None:
                    yield lines
        finally:
            # After Ctrl-C the wait for the next line is still pending, and closing would wait for it.
            pending = asyncio.all_tasks(loop)
            for task in pending:
                task.cancel()
            loop.run_until_complete(asyncio.wait(pending) if pending else asyncio.sleep(0))
            loop.run_until_complete(tail.aclose())
            loop.close()

    def stop(self, timeout: float = 90.0) -> JobStatus:
        """Stop the job and wait for its end; what it has committed stays, and submitting it again resumes.

        Raises:
            ClusterError: it has not ended within `timeout` seconds.
        """
        with errors_of(self._address):
            self._client.stop_job(self.id)
        try:
            return self.wait(timeout, every=0.5)
        except ClusterError as error:
            if self.status().state != "PENDING":
                raise
            raise ClusterError(
                f"{self.id} has not begun, and Ray stops no job that waits for what its driver asks for: it "
                "will be stopped as soon as it begins, or given up a quarter of an hour after its submission"
            ) from error

    def results(self) -> Results:
        """What the job has committed so far.

        Raises:
            StoreError: there is nothing yet, or the output cannot be read from here.
        """
        return read_results(self.output)


def submit_job(
    job: JobSpec | str | os.PathLike[str],
    address: str | None = None,
    *,
    working_dir: str | os.PathLike[str] | None = None,
    pip: Sequence[str] | None = None,
    uv: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    entrypoint_num_cpus: float | None = None,
    entrypoint_num_gpus: float | None = None,
    entrypoint_memory: int | None = None,
    entrypoint_resources: Mapping[str, float] | None = None,
    log: LogFormat = "plain",
    again: bool = False,
    retry_errors: bool = False,
    insecure: bool = False,
) -> SubmittedJob:
    """Run a job on a cluster; submitted twice it is one job.

    The id comes from the job and its output. A job that runs, or has succeeded, is returned as it is; one
    that was stopped or failed gets the next id (`-2`, `-3`) and takes up what is committed.

    Args:
        job: a `JobSpec`, or a job file.
        address: the job server's, which is the dashboard's; `RAY_API_SERVER_ADDRESS`, or port 8265 here.
        working_dir: a folder to send along; paths of the job inside it are read there.
        pip: packages to install for the job, as Ray's runtime environments do it.
        uv: the same by uv, which is faster.
        metadata: shown with the job. No place for secrets.
        entrypoint_num_cpus: what the driver takes of the cluster; by default it runs on the head node and
            takes nothing.
        entrypoint_num_gpus: the same.
        entrypoint_memory: the same, in bytes.
        entrypoint_resources: the same, of other resources.
        log: `json` has the job print one JSON object per line.
        again: run a job that has succeeded once more.
        retry_errors: try images again that have an error row, which means `again`; a job that
            is running goes on as it is.
        insecure: send it to another machine without a token, or with one in the clear.

    Raises:
        SpecError: the job holds a secret, or writes to a place that the cluster cannot know.
        ClusterError: the cluster cannot be reached or refuses, or another job writes to the same output.
    """
    # Not at the top, because they load torch, which asking for a job's status need not wait for.
    from mcrise_ray.jobfiles import load_job, parse_job
    from mcrise_ray.jobspec import JobSpec

    spec = load_job(job) if isinstance(job, str | os.PathLike) else parse_job(job.model_dump(mode="json"))
    for name in metadata or {}:
        if names_secret(name):
            raise SpecError(f"metadata: expected no secrets, because everyone sees it, found {name}")
    sent = _sent(spec, working_dir)
    content = json.dumps(sent, sort_keys=True)
    if len(content.encode()) > _LONGEST:
        raise SpecError(
            f"expected a job of at most {_LONGEST:,} bytes, found more; list images in a manifest"
        )
    client, url = connect(address, insecure)
    base = submission_id(spec)
    with errors_of(url):
        attempts = _attempts(client, base)
        _refuse_shared_output(client, base, spec.output)
        if attempts:
            number, details = attempts[-1]
            state = str(details.status.value)
            if state not in ENDED or (state == "SUCCEEDED" and not (again or retry_errors)):
                return SubmittedJob(client, url, details.submission_id, spec.output)
        name = base if not attempts else f"{base}-{number + 1}"
        given = {
            "pip": pip and list(pip),
            "uv": uv and list(uv),
            "working_dir": working_dir and str(working_dir),
        }
        variables = {JOB_VARIABLE: content, LOG_VARIABLE: log, "RAY_JOB_STOP_WAIT_TIME_S": _STOP_WITHIN}
        _start(
            client,
            base,
            entrypoint=_ENTRYPOINT + " --retry-errors" * retry_errors,
            submission_id=name,
            runtime_env={"env_vars": variables, **{k: v for k, v in given.items() if v}},
            metadata={**(metadata or {}), _OUTPUT: spec.output, _JOB: base, _HASH: JobSpec(**sent).hash},
            entrypoint_num_cpus=entrypoint_num_cpus,
            entrypoint_num_gpus=entrypoint_num_gpus,
            entrypoint_memory=entrypoint_memory,
            entrypoint_resources=dict(entrypoint_resources) if entrypoint_resources else None,
        )
    return SubmittedJob(client, url, name, spec.output, is_new=True)


def find_job(
    submission: str | os.PathLike[str], address: str | None = None, *, insecure: bool = False
) -> SubmittedJob:
    """A job that was submitted, by its id or by its file (the latest attempt).

    Raises:
        SpecError: the file cannot be read, or is no job.
        ClusterError: the cluster knows no such job.
    """
    name = os.fspath(submission)
    base = None
    if Path(name).is_file() or Path(name).suffix:  # ids have none: a misspelt file is not asked for as one
        from mcrise_ray.jobfiles import load_job

        base = submission_id(load_job(name))
    client, url = connect(address, insecure)
    with errors_of(url):
        if base is not None:
            attempts = _attempts(client, base)
            if not attempts:
                raise ClusterError(f"expected a submission of {name} ({base}) at {url}, found none")
            details = attempts[-1][1]
        else:
            details = client.get_job_info(name)
    return SubmittedJob(client, url, details.submission_id, (details.metadata or {}).get(_OUTPUT, ""))


def list_jobs(address: str | None = None, *, insecure: bool = False) -> list[JobStatus]:
    """All jobs of ours that the cluster remembers, the latest first."""
    client, url = connect(address, insecure)
    with errors_of(url):
        found = [details for details in client.list_jobs() if _OUTPUT in (details.metadata or {})]
    found.sort(key=lambda details: details.start_time or 0, reverse=True)
    return [_status(details, far=False) for details in found]


def submission_id(job: JobSpec) -> str:
    """The id of a job's first submission: the same for the same work to the same output."""
    content = json.dumps([job.identity, job.output], sort_keys=True)
    return f"mcrise-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _start(client: Any, base: str, **request: Any) -> None:
    """Submit, also to a cluster that has only just started: it answers before it can run anything."""
    until = time.monotonic() + _STARTING
    while True:
        try:
            client.submit_job(**request)
            return
        except RuntimeError as error:
            # Somebody else may have submitted the same job a moment ago: then it is theirs and ours.
            if request["submission_id"] in {details.submission_id for _, details in _attempts(client, base)}:
                return
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(1)


def _attempts(client: Any, base: str) -> list[tuple[int, Any]]:
    """The submissions of one job with their numbers, in order."""
    found = []
    for details in client.list_jobs():
        match = re.fullmatch(rf"{base}(?:-(\d+))?", details.submission_id or "")
        if match:
            found.append((int(match[1] or 1), details))
    return sorted(found, key=lambda attempt: attempt[0])


def _refuse_shared_output(client: Any, base: str, output: str) -> None:
    """Two jobs that write to one place at a time would spoil both."""
    for details in client.list_jobs():
        known = details.metadata or {}
        if known.get(_OUTPUT) == output and known.get(_JOB) != base and details.status.value not in ENDED:
            raise ClusterError(
                f"expected {output} for this job alone, found {details.submission_id} writing to it; choose "
                f"another output, or: mcrise stop {details.submission_id}"
            )


def _sent(job: JobSpec, working_dir: str | os.PathLike[str] | None) -> dict[str, Any]:
    """A job as the cluster reads it: paths that travel along are relative to the folder that holds them."""
    values: dict[str, Any] = job.model_dump(mode="json")
    if working_dir is None:
        return values
    root = os.path.abspath(working_dir)
    if not os.path.isdir(root):
        raise SpecError(f"expected a folder as working directory, found none at {root}")
    for name, place in (("output", job.output), ("reid.gallery_store", job.reid and job.reid.gallery_store)):
        if place and not files.is_url(place) and os.path.commonpath([root, place]) == root:
            raise SpecError(
                f"{name}: expected a URL or a folder that the cluster shares, found {place} in the working "
                "directory, whose copy on the cluster vanishes"
            )
    inside = re.compile(rf"(^|^imagefolder:|^hf:|[?&]root=){re.escape(root)}(?:/|(?=[?&]|$))")

    def relative(value: str | None) -> str | None:
        if value is None or inside.search(value) is None:
            return value
        return re.sub(r"(^|:|=)(?=[?&]|$)", r"\1.", inside.sub(r"\1", value), count=1)

    values["images"] = [relative(source) for source in values["images"]]
    for name in ("model", "weights", "classes"):
        values["model"][name] = relative(values["model"][name])
    if values["reid"] is not None:
        values["reid"]["gallery"] = [relative(source) for source in values["reid"]["gallery"]]
        values["reid"]["pairs"] = relative(values["reid"]["pairs"])
    return values


def _status(details: Any, *, far: bool = True) -> JobStatus:
    """What Ray knows of a job and, if asked how far it is, what the job itself has written."""
    told = details.metadata or {}
    output = told.get(_OUTPUT, "")
    state = str(details.status.value)
    started = details.start_time / 1000 if details.start_time else None
    progress = read_progress(output) if far and output else None
    if progress is not None:
        # Masks, pace and time left of the attempt before are not those of one that is about to begin.
        is_earlier = state not in ENDED and progress.seconds < int(started or 0)
        if is_earlier or progress.job != told.get(_HASH):
            progress = None
    return JobStatus(
        id=details.submission_id,
        state=state,
        message=" ".join((details.message or "").partition(", last available logs")[0].split()),
        output=output,
        progress=progress,
        started=started,
        ended=details.end_time / 1000 if details.end_time else None,
    )
