"""Commands about jobs that are files, and about jobs on clusters. Heavy imports stay inside commands."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcrise_ray.forecast import Plan
    from mcrise_ray.jobs import JobSpec

job_app = typer.Typer(help="Job files: write an example, check one.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A job: YAML, JSON or TOML.", show_default=False)]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of ours as one line and exit code 2; a bug keeps its traceback."""
    from mcrise_ray.errors import MCRiseError

    try:
        yield
    except MCRiseError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


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
) -> None:
    """Validate a job and say what it will do, without running it."""
    with one_line_errors():
        from mcrise_ray import forecast
        from mcrise_ray.jobfiles import load_job

        job = load_job(file)
        plan = forecast.plan_job(job)
        for line in _plan_lines(job, plan):
            print(line)
        if probe:
            for line in _probe_lines(job, plan):
                print(line)


def _plan_lines(job: JobSpec, plan: Plan) -> Iterator[str]:
    more = "" if plan.complete else "more than "
    yield f"images       {more}{plan.images:,}"
    yield f"units        {more}{plan.units:,}"
    yield f"model calls  {more}{plan.model_calls:,} with {more}{plan.masks:,} masked images in all"
    yield f"rows         at most {plan.rows:,}" + ("" if plan.complete else " so far")
    yield f"output       {job.output}"


def _probe_lines(job: JobSpec, plan: Plan) -> Iterator[str]:
    from mcrise_ray import forecast
    from mcrise_ray.progress import duration

    probe = forecast.probe_job(job)
    more = "" if plan.complete else "more than "
    size = f"{probe.size[0]} x {probe.size[1]}"
    yield f"bytes        {more}{_bytes(forecast.output_bytes(job, plan, probe))} before compression, {size}"
    rate = f"{probe.masks_per_second:,.0f} masks/s on {probe.device}"
    for actors in sorted({1, job.actors or 1}):
        needed = duration(forecast.seconds_needed(plan, probe, actors))
        which = f"{actors} actors" if actors > 1 else "1 actor"
        yield f"time         {more}{needed} with {which} like the one here ({rate})"


def _bytes(count: float) -> str:
    power = min(int(math.log10(max(count, 1))) // 3, 4)
    unit = ("bytes", "kB", "MB", "GB", "TB")[power]
    return f"{count / 1000**power:,.{min(power, 1)}f} {unit}"
