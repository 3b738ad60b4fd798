"""Commands about jobs that are files, and about jobs on clusters. Heavy imports stay inside commands."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcrise_ray.arguments import one_line_errors
from mcrise_ray.cli_options import Insecure, Log, RetryErrors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcrise_ray.forecast import Plan
    from mcrise_ray.jobspec import JobSpec
    from mcrise_ray.submission import JobStatus, SubmittedJob

job_app = typer.Typer(help="Job files: write an example, check one.", no_args_is_help=True)
cluster_app = typer.Typer()

File = Annotated[Path, typer.Argument(metavar="FILE", help="A job: YAML, JSON or TOML.", show_default=False)]


Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard.  (env: RAY_API_SERVER_ADDRESS; default: http://127.0.0.1:8265)",
        show_default=False,
    ),
]
Submission = Annotated[
    str, typer.Argument(metavar="ID|FILE", help="Of a submission, or the job that was submitted.")
]


@job_app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it, as YAML.")] = Path(
        "job.yaml"
    ),
) -> None:
    """Write a commented example with every key at its default."""
    with one_line_errors():
        from mcrise_ray.errors import SpecError
        from mcrise_ray.jobfiles import example_job

        if file.suffix not in {".yaml", ".yml"}:
            raise SpecError(f"expected a name such as job.yaml, because it has comments, found {file}")
        try:
            with open(file, "x", encoding="utf-8") as written:
                written.write(example_job())
        except FileExistsError:
            raise SpecError(f"expected a new file, found {file} there already; give another name") from None
        except OSError as error:
            raise SpecError(f"cannot write {file}: {error.strerror}") from error
    print(f"{file}: edit images, model and output, then: mcrise job check {file}")


@job_app.command()
def check(
    file: File,
    probe: Annotated[
        bool, typer.Option(help="Build the model here and time a few masks, for bytes and duration.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="As if it removed earlier results from the output first.")
    ] = False,
) -> None:
    """Validate a job and say what it will do, or has left to do, without running it."""
    with one_line_errors():
        from mcrise_ray import forecast
        from mcrise_ray.jobfiles import load_job

        job = load_job(file)
        plan = forecast.plan_job(job, overwrite=overwrite)
        for line in _plan_lines(job, plan):
            print(line)
        if plan.left:
            for line in _probe_lines(job, plan) if probe else [_calls_line(job, plan, plan.model_calls)]:
                print(line)


@cluster_app.command()
def submit(
    file: File,
    address: Address = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="Folder to send along; paths of the job inside it are read there.")
    ] = None,
    pip: Annotated[
        list[str] | None, typer.Option(help="Package to install for the job (repeat for several).")
    ] = None,
    uv: Annotated[list[str] | None, typer.Option(help="The same, by uv, which is faster.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Shown with the job; no secrets.")
    ] = None,
    entrypoint_num_cpus: Annotated[
        float | None, typer.Option(help="Of the cluster, for the driver.  (default: none, on the head node)")
    ] = None,
    entrypoint_num_gpus: Annotated[float | None, typer.Option(help="The same.")] = None,
    entrypoint_memory: Annotated[int | None, typer.Option(help="The same, in bytes.")] = None,
    entrypoint_resource: Annotated[
        list[str] | None, typer.Option(metavar="NAME=AMOUNT", help="The same, of another resource.")
    ] = None,
    log: Log = "plain",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print what it prints, to its end.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Even if it has succeeded before.")] = False,
    retry_errors: RetryErrors = False,
    insecure: Insecure = False,
) -> None:
    """Run a job on a cluster. Submitted twice it is one job; one that was stopped or failed is taken up."""
    with one_line_errors():
        from mcrise_ray.progress import log_format
        from mcrise_ray.submission import submit_job

        submitted = submit_job(
            file,
            address,
            working_dir=working_dir,
            pip=pip or None,
            uv=uv or None,
            metadata=_pairs("--metadata", metadata),
            entrypoint_num_cpus=entrypoint_num_cpus,
            entrypoint_num_gpus=entrypoint_num_gpus,
            entrypoint_memory=entrypoint_memory,
            entrypoint_resources=_amounts("--entrypoint-resource", entrypoint_resource),
            log=log_format(log),
            again=again,
            retry_errors=retry_errors,
            insecure=insecure,
        )
        before = "" if submitted.is_new else f", submitted before: {submitted.status().state}"
        print(f"{submitted.id} writes to {submitted.output}{before}")
        if retry_errors and not submitted.is_new:
            print("errors are not tried again by a job that runs already; submit it again when it has ended")
        if not follow:
            ended = before.endswith("SUCCEEDED")
            others = "submit --retry-errors or --again" if ended else "logs --follow, or stop"
            print(f"next: mcrise status {submitted.id}, or {others}")
            return
        _print_log(submitted)
        last = submitted.wait()
        code = {"SUCCEEDED": 0, "STOPPED": 130}.get(last.state, 2)
        if code == 0 and last.progress is not None and last.progress.errors:
            code = 1  # as where the job runs here
        raise typer.Exit(code)


@cluster_app.command()
def status(submission: Submission, address: Address = None, insecure: Insecure = False) -> None:
    """How a submitted job is, and how far."""
    with one_line_errors():
        from mcrise_ray.submission import find_job

        for line in _status_lines(find_job(submission, address, insecure=insecure).status()):
            print(line)


@cluster_app.command()
def logs(
    submission: Submission,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended.")] = False,
    address: Address = None,
    insecure: Insecure = False,
) -> None:
    """What a submitted job has printed."""
    with one_line_errors():
        from mcrise_ray.submission import find_job

        found = find_job(submission, address, insecure=insecure)
        if follow:
            _print_log(found)
        else:
            print(found.logs(), end="")


@cluster_app.command()
def stop(submission: Submission, address: Address = None, insecure: Insecure = False) -> None:
    """Stop a submitted job; what it has committed stays, and submitting it again resumes."""
    with one_line_errors():
        from mcrise_ray.submission import find_job

        stopped = find_job(submission, address, insecure=insecure).stop()
        for line in _status_lines(stopped):
            print(line)


@cluster_app.command(name="list")
def list_submitted(address: Address = None, insecure: Insecure = False) -> None:
    """All jobs of mcrise that the cluster remembers, the latest first."""
    with one_line_errors():
        from mcrise_ray.submission import list_jobs

        jobs = list_jobs(address, insecure=insecure)
        if not jobs:
            print("no jobs")
        for found in jobs:
            print(f"{found.id:26} {found.state:10} {_when(found.started):16} {found.output}")


@cluster_app.command()
def token() -> None:
    """Make this user's token for Ray clusters, if there is none; its value is not printed.

    A cluster and everyone who submits to it need the same token. Copy the file, with mode 0600, to
    ~/.ray/auth_token on the other machine, or set RAY_AUTH_TOKEN there.
    """
    with one_line_errors():
        from mcrise_ray.access import ensure_token

        path, is_new = ensure_token()
        print(f"{path}: {'made just now' if is_new else 'there already'}, readable for this user alone")


def _print_log(submitted: SubmittedJob) -> None:
    try:
        for lines in submitted.follow():
            print(lines, end="", flush=True)
    except KeyboardInterrupt:
        typer.echo(f"\nthe job goes on; see: mcrise status {submitted.id}, or stop it", err=True)
        raise typer.Exit(130) from None


def _status_lines(status: JobStatus) -> Iterator[str]:
    from mcrise_ray.progress import duration

    yield f"id         {status.id}"
    yield f"state      {status.state}" + (f": {status.message}" if status.message else "")
    if status.state == "FAILED":
        yield f"reason     mcrise logs {status.id}"
    yield f"output     {status.output}"
    if status.started is not None:
        yield f"started    {_when(status.started)}"
    progress = status.progress
    if progress is None:
        yield "progress   none of its own yet, or the output cannot be read from here"
        return
    total = "" if progress.images_total is None else f" of {progress.images_total:,}"
    yield f"images     {progress.images_done:,}{total}, {progress.errors:,} errors"
    if progress.embedded:
        yield f"embedded   {progress.embedded:,} of queries and gallery, by this run"
    yield f"masks      {progress.masks_done:,} by this run, {progress.masks_per_second:,.0f} masks/s"
    if not status.has_ended:
        yield f"actors     {progress.actors:,}"
    if progress.retries:
        yield f"retries    {progress.retries:,}"
    if progress.seconds_left is not None and not status.has_ended:
        yield f"time left  {duration(progress.seconds_left)}"
    if progress.relative_error is not None:
        yield f"error      {progress.relative_error:.3f} of a map is noise"
    yield f"updated    {progress.updated}"


def _when(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    from mcrise_ray.errors import SpecError

    pairs = {}
    for text in given or ():
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise SpecError(f"{option}: expected KEY=VALUE, found {text!r}")
        pairs[key] = value
    return pairs


def _amounts(option: str, given: list[str] | None) -> dict[str, float]:
    from mcrise_ray.errors import SpecError

    try:
        return {name: float(amount) for name, amount in _pairs(option, given).items()}
    except ValueError:
        raise SpecError(f"{option}: expected NAME=AMOUNT with a number, found {given}") from None


def _plan_lines(job: JobSpec, plan: Plan) -> Iterator[str]:
    more, so_far = _more(job), _so_far(plan)
    useless = f", {plan.useless:,} of which cannot be explained" if plan.useless else ""
    done = f", {plan.done:,} of which are done" if plan.done else ""
    yield f"images       {plan.images:,}{useless}{done}{so_far}"
    if job.reid is not None:
        yield f"gallery      {plan.gallery:,}{so_far}"
    yield f"units        {more}{plan.units:,}{so_far}"
    yield f"masks        {more}{plan.masks:,}{so_far}"
    yield f"rows         at most {plan.rows:,}{so_far}"
    yield f"output       {job.output}"


def _more(job: JobSpec) -> str:
    """Counts are limits where each image goes on only until it is good enough."""
    return "" if job.explain.relative_error is None else "at most "


def _so_far(plan: Plan) -> str:
    return "" if plan.complete else ", of those listed so far"


def _calls_line(job: JobSpec, plan: Plan, calls: int, batch_size: int | None = None) -> str:
    batches = f" with batches of {batch_size}" if batch_size is not None else ""
    return f"model calls  {_more(job)}{calls:,}{batches}{_so_far(plan)}"


def _probe_lines(job: JobSpec, plan: Plan) -> Iterator[str]:
    from mcrise_ray import forecast
    from mcrise_ray.progress import duration

    probe = forecast.probe_job(job, masks=plan.masks if plan.complete else None)
    batch_size = probe.execution.batch_size
    yield _calls_line(job, plan, forecast.calls(job, plan.left, batch_size, plan.gallery), batch_size)
    size = f"{probe.size[0]} x {probe.size[1]}"
    yield (
        f"bytes        at most {_bytes(forecast.output_bytes(job, plan, probe))} before compression, maps of "
        f"{size}{_so_far(plan)}"
    )
    yield f"precision    {probe.execution.precision}"
    rate = f"{probe.masks_per_second:,.0f} masks/s on {probe.device}"
    most = getattr(job.actors, "max", None) or 1
    for actors in sorted({1, max(1, job.fewest_actors), most}):
        needed = duration(forecast.seconds_needed(plan, probe, actors))
        which = f"{actors} actors" if actors > 1 else "1 actor"
        yield f"time         {_more(job)}{needed} with {which} like the one here ({rate}){_so_far(plan)}"


def _bytes(count: float) -> str:
    power = min(int(math.log10(max(count, 1))) // 3, 4)
    unit = ("bytes", "kB", "MB", "GB", "TB")[power]
    return f"{count / 1000**power:,.{min(power, 1)}f} {unit}"
