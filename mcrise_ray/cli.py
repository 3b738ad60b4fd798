"""The command `mcrise`. Everything heavy is imported inside commands, so that `--help` answers at once."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcrise_ray import cli_options as option
from mcrise_ray.arguments import actor_count, key_value, label, one_line_errors, pair, triple
from mcrise_ray.benchcli import bench
from mcrise_ray.cli_jobs import cluster_app, job_app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcrise_ray.jobs import Summary
    from mcrise_ray.jobspec import JobSpec

app = typer.Typer(
    help="Which pixels, and which colours, a vision model needs: RISE, debiased RISE and MC-RISE.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(job_app, name="job")
app.add_typer(cluster_app)

app.command()(bench)


@app.command()
@option.spread
def explain(options: option.JobOptions) -> None:
    """Explain a few images in this process, without Ray."""
    _run(options, actors=0)


@app.command()
@option.spread
def audit(options: option.JobOptions, ray: option.RayOptions) -> None:
    """Explain many images on Ray. Every image ends in maps/ or, with the reason, in errors/."""
    _run_on_ray(options, ray)


@app.command()
@option.spread
def reid(options: option.ReidOptions, ray: option.RayOptions) -> None:
    """Explain why queries are like their matches in a gallery. --actors 0 runs in this process."""
    with one_line_errors():
        from mcrise_ray.reidspec import ReidSpec

        of_gallery: dict[str, Any] = {
            "gallery": tuple(options.gallery),
            "gallery_store": options.gallery_store,
            "matches": options.match,
            "pairs": options.pairs,
            "d0": options.d0,
            "distance": options.distance,
        }
        spec = ReidSpec(**of_gallery)
    in_process: dict[str, Any] = {"actors": 0} if ray.actors == "0" else {}
    _run_on_ray(options, ray, kind="reid", reid=spec, **in_process)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job: YAML, JSON or TOML.")],
    address: Annotated[
        str | None,
        typer.Option(
            help="auto, or HOST:PORT, of a Ray that this machine is part of.  (default: one of its own)",
            show_default=False,
        ),
    ] = None,
    overwrite: option.Overwrite = False,
    retry_errors: option.RetryErrors = False,
    log: option.Log = "plain",
    insecure: option.Insecure = False,
) -> None:
    """Run a job file on this machine, or as part of a running Ray; see `submit` for clusters elsewhere."""
    with one_line_errors():
        from mcrise_ray.jobfiles import load_job

        _check_kept(overwrite, retry_errors=retry_errors)
        _run_and_report(load_job(file), log, overwrite, retry_errors, address, insecure)


@app.command()
def demo(
    output: option.Output = "mcrise-demo",
    masks: Annotated[int, typer.Option("--masks", "-n", help="N, the number of masks.")] = 4000,
    actors: Annotated[int, typer.Option(min=1, help="Actors that each hold the model.")] = 2,
    log: option.Log = "plain",
) -> None:
    """Explain the bundled traffic signs with the bundled classifier on local Ray."""
    with one_line_errors():
        from mcrise_ray import demo as bundled
        from mcrise_ray.errors import SpecError
        from mcrise_ray.jobspec import JobSpec
        from mcrise_ray.loading import ModelSpec
        from mcrise_ray.spec import ExplainSpec
        from mcrise_ray.store import Store

        job = JobSpec(
            images=(str(bundled.MANIFEST),),
            model=ModelSpec(
                model="mcrise_ray.demo:sign_classifier",
                weights=str(bundled.WEIGHTS),
                classes=str(bundled.CLASSES),
                preprocessing={"size": bundled.SIZE, "mean": bundled.MEAN, "std": bundled.STD},
            ),
            output=output,
            targets=("predicted", "truth"),
            explain=ExplainSpec(masks=masks),
            actors=actors,
        )
        there = (Store(output).read_json("job.json") or {}).get("spec", {}).get("model", {}).get("model")
        if there not in {None, job.model.model}:
            raise SpecError(
                f"expected an output without results or with those of the demo, found a job with the model "
                f"{there} in {output}; choose another --output"
            )
        _run_and_report(job, log, overwrite=True)


def _run_on_ray(
    options: option.JobOptions | option.ReidOptions, ray: option.RayOptions, **settings: Any
) -> None:
    _run(options, **{**vars(ray), **settings})


def _run(
    options: option.JobOptions | option.ReidOptions,
    actors: str | int,
    address: str | None = None,
    insecure: bool = False,
    **settings: Any,
) -> None:
    """Run the job that the options mean; `settings` are those of its actors, and of its kind."""
    with one_line_errors():
        from mcrise_ray.jobfiles import parse_job

        _check_kept(options.overwrite, resume=options.resume, retry_errors=options.retry_errors)
        settings["actors"] = actor_count(actors) if isinstance(actors, str) else actors
        settings["label_selector"] = dict(label(one) for one in settings.get("label_selector") or ())
        job = _job_spec(options, settings)
        # Actors of a cluster work in folders of their own; and to an output that other folders reach by the
        # same name, a relative name would be the same image from all of them.
        if address is not None or _is_reached_from_elsewhere(job.output):
            job = parse_job(job.model_dump(mode="json"))
        _run_and_report(job, options.log, options.overwrite, options.retry_errors, address, insecure)


def _is_reached_from_elsewhere(output: str) -> bool:
    from mcrise_ray.files import is_url

    return is_url(output) or Path(output).expanduser().is_absolute() or ".." in Path(output).parts


def _check_kept(overwrite: bool, **kept: bool) -> None:
    """What is removed first cannot be gone on from."""
    from mcrise_ray.errors import SpecError

    for name, given in kept.items():
        if overwrite and given:
            flag = name.replace("_", "-")
            raise SpecError(f"expected --overwrite or --{flag}, found both; one removes what the other needs")


def _job_spec(options: option.JobOptions | option.ReidOptions, settings: dict[str, Any]) -> JobSpec:
    of_classes = options if isinstance(options, option.JobOptions) else None
    from mcrise_ray.decode import DecodeOptions
    from mcrise_ray.jobspec import JobSpec
    from mcrise_ray.loading import ModelSpec
    from mcrise_ray.spec import ExplainSpec

    given = {
        "size": options.size and pair("--size", options.size),
        "resize": options.resize,
        "shorter_side": options.shorter_side,
        "interpolation": options.interpolation,
        "input_range": options.input_range,
        "mean": options.mean and triple("--mean", options.mean),
        "std": options.std and triple("--std", options.std),
        "activation": of_classes.activation if of_classes is not None else None,
    }
    model = ModelSpec(
        model=options.model,
        weights=options.weights,
        classes=of_classes.classes if of_classes is not None else None,
        args=dict(key_value(argument) for argument in options.model_arg or ()),
        preprocessing={name: value for name, value in given.items() if value is not None},
        device=options.device,
    )
    explain: dict[str, Any] = {
        "method": options.method,
        "estimator": options.estimator,
        "relative_error": options.relative_error,
        "masks": options.masks,
        "grid": pair("--grid", options.grid),
        "p_mask": options.p_mask,
        "colors": options.colors,
        "seed": options.seed,
    }
    limit = {} if options.max_pixels is None else {"max_pixels": options.max_pixels}
    job: dict[str, Any] = {
        "images": tuple(options.images),
        "model": model,
        "output": options.output,
        "decode": DecodeOptions(allow_truncated=options.allow_truncated, **limit),
        "explain": ExplainSpec(**{name: value for name, value in explain.items() if value is not None}),
        "precision": options.precision,
        "batch_size": options.batch_size,
        "standard_error": options.standard_error,
        "original_size": options.original_size,
        "figures": options.figures,
    }
    if of_classes is not None:
        job["targets"] = of_classes.target
    return JobSpec(**job, **settings)


def _run_and_report(
    job: JobSpec,
    log: str,
    overwrite: bool,
    retry_errors: bool = False,
    address: str | None = None,
    insecure: bool = False,
) -> None:
    from rich.console import Console

    from mcrise_ray.driver import joined
    from mcrise_ray.jobs import draw_figures, run_job
    from mcrise_ray.progress import log_format, reporter_for

    reporter = reporter_for(log_format(log), Console(stderr=True))
    # What a model prints, in an actor too, whose lines Ray prints here, would stand among the JSON objects.
    # Signals after Ray, which sets a handler of its own when it connects.
    with (
        redirect_stdout(sys.stderr) if log == "json" else nullcontext(),
        joined(address, insecure=insecure),
        _stopped_by_signals(job.output),
        reporter,
    ):
        summary = run_job(job, reporter, overwrite=overwrite, retry_errors=retry_errors)
        figures = draw_figures(job, reporter)
    if log == "plain":
        _tell(job, summary, figures)
    if summary.errors:
        raise typer.Exit(1)


def _tell(job: JobSpec, summary: Summary, figures: list[str]) -> None:
    from mcrise_ray.driver import remarks
    from mcrise_ray.progress import duration

    rate = summary.masks / summary.seconds if summary.seconds else 0
    earlier = f" ({summary.earlier} images by earlier runs)" if summary.earlier else ""
    print(
        f"{summary.images} images explained, {summary.errors} errors, {summary.rows} maps{earlier}, "
        f"{summary.masks:,} masks in {duration(summary.seconds)} ({rate:,.0f} masks/s)"
    )
    for line in remarks(job, summary):
        print(line)
    if summary.rows:
        print(f"results: {job.output}/maps, read with mcrise_ray.read_results({job.output!r})")
    if summary.errors:
        again = " (--retry-errors tries them again)" if summary.earlier else ""
        print(f"errors:  {job.output}/errors{again}")
    if figures:
        print(f"figures: {figures[0]}" + (f" and {len(figures) - 1} more" if len(figures) > 1 else ""))


@contextmanager
def _stopped_by_signals(output: str) -> Iterator[None]:
    """Ctrl-C, and the polite end of a cluster job, leave an output to go on from."""
    from mcrise_ray.driver import heed_signals

    heed_signals()
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped; what is done is in {output}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
