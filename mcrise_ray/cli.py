"""The command `mcrise`. Everything heavy is imported inside commands, so that `--help` answers at once."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcrise_ray import cli_options as option
from mcrise_ray.arguments import key_value, one_line_errors, pair, triple
from mcrise_ray.benchcli import bench
from mcrise_ray.cli_jobs import Insecure, cluster_app, job_app

if TYPE_CHECKING:
    from collections.abc import Iterator

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
def explain(
    images: option.Sources,
    model: option.ModelName,
    weights: option.Weights = None,
    classes: option.Classes = None,
    model_arg: option.ModelArgs = None,
    size: option.Size = None,
    resize: option.Resize = None,
    shorter_side: option.ShorterSide = None,
    interpolation: option.Interpolation = None,
    input_range: option.InputRange = None,
    mean: option.Mean = None,
    std: option.Std = None,
    activation: option.Activation = None,
    device: option.Device = None,
    target: option.Targets = ["predicted"],  # noqa: B006 - typer reads it, nobody changes it
    masks: option.MaskCount = None,
    relative_error: option.RelativeError = None,
    estimator: option.Estimator = "control-variate",
    grid: option.Grid = "8x8",
    p_mask: option.PMask = 0.5,
    colors: option.Colors = None,
    method: option.Method = "mc-rise",
    seed: option.Seed = 0,
    output: option.Output = "mcrise-results",
    overwrite: option.Overwrite = False,
    resume: option.Resume = False,
    allow_truncated: option.AllowTruncated = False,
    max_pixels: option.MaxPixels = None,
    precision: option.PrecisionName = "auto",
    batch_size: option.BatchSize = "auto",
    figures: option.Figures = 100,
    standard_error: option.StandardError = False,
    original_size: option.OriginalSize = False,
) -> None:
    """Explain a few images in this process, without Ray."""
    _run(dict(locals()), actors=0)


@app.command()
def audit(
    images: option.Sources,
    model: option.ModelName,
    weights: option.Weights = None,
    classes: option.Classes = None,
    model_arg: option.ModelArgs = None,
    size: option.Size = None,
    resize: option.Resize = None,
    shorter_side: option.ShorterSide = None,
    interpolation: option.Interpolation = None,
    input_range: option.InputRange = None,
    mean: option.Mean = None,
    std: option.Std = None,
    activation: option.Activation = None,
    device: option.Device = None,
    target: option.Targets = ["predicted"],  # noqa: B006
    masks: option.MaskCount = None,
    relative_error: option.RelativeError = None,
    estimator: option.Estimator = "control-variate",
    grid: option.Grid = "8x8",
    p_mask: option.PMask = 0.5,
    colors: option.Colors = None,
    method: option.Method = "mc-rise",
    seed: option.Seed = 0,
    output: option.Output = "mcrise-results",
    overwrite: option.Overwrite = False,
    resume: option.Resume = False,
    allow_truncated: option.AllowTruncated = False,
    max_pixels: option.MaxPixels = None,
    precision: option.PrecisionName = "auto",
    batch_size: option.BatchSize = "auto",
    figures: option.Figures = 100,
    standard_error: option.StandardError = False,
    original_size: option.OriginalSize = False,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Actors that each hold the model.  [default: as many as fit]")
    ] = None,
    cpus_per_actor: Annotated[int, typer.Option(min=1, help="Cores, and torch threads, per actor.")] = 1,
    gpus_per_actor: Annotated[
        float | None, typer.Option(help="GPUs per actor, may be a fraction.  [default: 1 where there is one]")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to run on; auto for one on this machine.  [default: start one]"),
    ] = None,
    deadline: Annotated[
        float, typer.Option(help="Seconds until a call counts as stalled; more where units are slow.")
    ] = 60.0,
    max_retries: Annotated[
        int, typer.Option(min=0, help="Of a unit whose actor died, before its image gets an error row.")
    ] = 3,
) -> None:
    """Explain many images on Ray. Every image ends in maps/ or, with the reason, in errors/."""
    settings = ("actors", "cpus_per_actor", "gpus_per_actor", "deadline", "max_retries")
    given = dict(locals())
    given["actors"] = "auto" if actors is None else actors
    _run(given, address=address, **{name: given[name] for name in settings})


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job: YAML, JSON or TOML.")],
    address: Annotated[
        str | None,
        typer.Option(
            help="auto, or HOST:PORT, of a Ray that this machine is part of.  [default: one of its own]",
            show_default=False,
        ),
    ] = None,
    overwrite: option.Overwrite = False,
    insecure: Insecure = False,
) -> None:
    """Run a job file on this machine, or as part of a running Ray; see `submit` for clusters elsewhere."""
    with one_line_errors():
        from mcrise_ray.jobfiles import load_job

        _run_and_report(load_job(file), overwrite=overwrite, address=address, insecure=insecure)


@app.command()
def demo(
    output: option.Output = "mcrise-demo",
    masks: Annotated[int, typer.Option("--masks", "-n", help="N, the number of masks.")] = 4000,
    actors: Annotated[int, typer.Option(min=1, help="Actors that each hold the model.")] = 2,
) -> None:
    """Explain the bundled traffic signs with the bundled classifier on local Ray."""
    with one_line_errors():
        from mcrise_ray import demo as bundled
        from mcrise_ray.jobspec import JobSpec
        from mcrise_ray.loading import ModelSpec
        from mcrise_ray.spec import ExplainSpec

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
        _run_and_report(job, overwrite=True)


def _run(options: dict[str, Any], address: str | None = None, **settings: Any) -> None:
    """Run the job that the options mean; `settings` are those of its actors."""
    with one_line_errors():
        from mcrise_ray.errors import SpecError

        if options["overwrite"] and options["resume"]:
            raise SpecError("expected --overwrite or --resume, found both; one removes what the other needs")
        _run_and_report(_job_spec(options, settings), overwrite=options["overwrite"], address=address)


def _job_spec(options: dict[str, Any], settings: dict[str, Any]) -> JobSpec:
    from mcrise_ray.decode import DecodeOptions
    from mcrise_ray.jobspec import JobSpec
    from mcrise_ray.loading import ModelSpec
    from mcrise_ray.spec import ExplainSpec

    given = {
        "size": options["size"] and pair("--size", options["size"]),
        "resize": options["resize"],
        "shorter_side": options["shorter_side"],
        "interpolation": options["interpolation"],
        "input_range": options["input_range"],
        "mean": options["mean"] and triple("--mean", options["mean"]),
        "std": options["std"] and triple("--std", options["std"]),
        "activation": options["activation"],
    }
    model = ModelSpec(
        model=options["model"],
        weights=options["weights"],
        classes=options["classes"],
        args=dict(key_value(argument) for argument in options["model_arg"] or ()),
        preprocessing={name: value for name, value in given.items() if value is not None},
        device=options["device"],
    )
    given_too = {name: options[name] for name in ("masks", "colors") if options[name] is not None}
    spec = ExplainSpec(
        method=options["method"],
        estimator=options["estimator"],
        relative_error=options["relative_error"],
        grid=pair("--grid", options["grid"]),
        p_mask=options["p_mask"],
        seed=options["seed"],
        **given_too,
    )
    limit = {} if options["max_pixels"] is None else {"max_pixels": options["max_pixels"]}
    return JobSpec(
        images=tuple(options["images"]),
        model=model,
        output=options["output"],
        targets=options["target"],
        decode=DecodeOptions(allow_truncated=options["allow_truncated"], **limit),
        explain=spec,
        precision=options["precision"],
        batch_size=options["batch_size"],
        standard_error=options["standard_error"],
        original_size=options["original_size"],
        figures=options["figures"],
        **settings,
    )


def _run_and_report(
    job: JobSpec, overwrite: bool, address: str | None = None, insecure: bool = False
) -> None:
    from rich.console import Console

    from mcrise_ray.driver import joined
    from mcrise_ray.jobs import draw_figures, run_job
    from mcrise_ray.progress import ConsoleReporter, duration

    # Signals after Ray, which sets a handler of its own when it connects.
    with (
        joined(address, insecure=insecure),
        _stopped_by_signals(job.output),
        ConsoleReporter(Console(stderr=True)) as reporter,
    ):
        summary = run_job(job, reporter, overwrite=overwrite)
    rate = summary.masks / summary.seconds if summary.seconds else 0
    earlier = f" ({summary.earlier} images by earlier runs)" if summary.earlier else ""
    print(
        f"{summary.images} images explained, {summary.errors} errors, {summary.rows} maps{earlier}, "
        f"{summary.masks:,} masks in {duration(summary.seconds)} ({rate:,.0f} masks/s)"
    )
    if summary.replaced or summary.retries:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in summary.retries.items())
        print(f"survived: {summary.replaced} actors replaced; calls repeated: {reasons or 'none'}")
    if summary.halved:
        print(f"{summary.halved} calls ran with half their batch: the last bits of their maps may differ")
    figures: list[str] = []
    draw_figures(job, figures.append)
    print(f"results: {job.output}/maps, read with mcrise_ray.read_results({job.output!r})")
    if summary.errors:
        print(f"errors:  {job.output}/errors")
    if figures:
        print(f"figures: {figures[0]}" + (f" and {len(figures) - 1} more" if len(figures) > 1 else ""))
    if summary.errors:
        raise typer.Exit(1)


@contextmanager
def _stopped_by_signals(output: str) -> Iterator[None]:
    """Ctrl-C, and the polite end of a cluster job, leave an output to go on from."""
    import signal
    import threading

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # signals are for no other
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped; what is done is in {output}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
