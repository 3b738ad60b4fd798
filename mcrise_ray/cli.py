"""The command `mcrise`. Everything heavy is imported inside commands, so that `--help` answers at once."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGES...",
        help="Files, folders, imagefolder:FOLDER, manifests (CSV or Parquet: uri,label,target), Parquet "
        "with encoded images, WebDataset shards (a-{000..009}.tar), torchvision:GTSRB?root=...&split=test; "
        "also on s3://, gs://, hdfs://.",
        show_default=False,
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        help="torchvision:NAME[?num_classes=N&weights=W], timm:NAME[?num_classes=N&pretrained=true], "
        "hf:PATH_OR_ID, FILE.pt2, FILE.onnx, package.module:factory, or the URL of a model on a KServe v2 "
        "server, http(s)://HOST/v2/models/NAME[?timeout=S&max_batch=N&concurrency=N&retries=N].",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="Safetensors file, or a state dict (no pickled code is run).")
]
Classes = Annotated[str | None, typer.Option(help="Text file of class names, one per line in index order.")]
ModelArgs = Annotated[
    list[str] | None, typer.Option("--model-arg", metavar="KEY=VALUE", help="Argument of a factory.")
]
Size = Annotated[str | None, typer.Option(metavar="HxW", help="Size of the model's input.")]
Resize = Annotated[
    str | None,
    typer.Option(help="stretch (the whole image) or crop (its centre).  [default: the model's own]"),
]
ShorterSide = Annotated[int | None, typer.Option(help="Of the image before its centre is cut out.")]
Interpolation = Annotated[str | None, typer.Option(help="nearest, bilinear, bicubic or lanczos.")]
InputRange = Annotated[
    str | None, typer.Option(help="What the model reads before normalisation: 0-1 or 0-255.")
]
Mean = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Mean of the normalisation, in units of the input range.")
]
Std = Annotated[str | None, typer.Option(metavar="R,G,B", help="Its standard deviation.")]
Activation = Annotated[
    str | None, typer.Option(help="From the model's output to scores: softmax, sigmoid or none.")
]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu.  [default: a GPU where there is one]")]
Targets = Annotated[
    list[str],
    typer.Option(
        "--target",
        help="predicted, top5, truth, predicted+truth, manifest (its column target), or a class index or "
        "name (repeat for several).",
    ),
]
MaskCount = Annotated[int, typer.Option("--masks", "-n", help="N, the number of masks.")]
Grid = Annotated[str, typer.Option(metavar="hxw", help="Cells of a mask.")]
PMask = Annotated[float, typer.Option("--p-mask", help="Probability that a cell is masked.")]
Colors = Annotated[
    str | None,
    typer.Option(help="paper5, paper8, or fills such as red,#00ff80 (MC-RISE alone).  [default: paper5]"),
]
Method = Annotated[str, typer.Option(help="mc-rise, debiased-rise or rise.")]
Seed = Annotated[int, typer.Option(help="Seed of the masks.")]
Output = Annotated[str, typer.Option("--output", "-o", help="Folder of the results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove earlier results from the output first.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from what the output holds; without it too, where that is of the same job.",
    ),
]
BatchSize = Annotated[str, typer.Option(help="Masked images per call of the model: auto, or a number.")]
PrecisionName = Annotated[
    str,
    typer.Option(
        "--precision", help="auto: the fastest way to ask the model that keeps its scores; or float32."
    ),
]
AllowTruncated = Annotated[
    bool, typer.Option("--allow-truncated", help="Decode files that end too early instead of refusing them.")
]
MaxPixels = Annotated[
    int | None, typer.Option(min=1, help="Refuse larger images.  [default: 89478485]", show_default=False)
]
Figures = Annotated[int, typer.Option(help="Draw the first so many images.")]
StandardError = Annotated[
    bool, typer.Option("--standard-error", help="Store the standard error of every pixel too.")
]
OriginalSize = Annotated[
    bool,
    typer.Option("--original-size", help="Store maps at the size of each image, not of the model's input."),
]


@app.command()
def explain(
    images: Sources,
    model: ModelName,
    weights: Weights = None,
    classes: Classes = None,
    model_arg: ModelArgs = None,
    size: Size = None,
    resize: Resize = None,
    shorter_side: ShorterSide = None,
    interpolation: Interpolation = None,
    input_range: InputRange = None,
    mean: Mean = None,
    std: Std = None,
    activation: Activation = None,
    device: Device = None,
    target: Targets = ["predicted"],  # noqa: B006 - typer reads it, nobody changes it
    masks: MaskCount = 8000,
    grid: Grid = "8x8",
    p_mask: PMask = 0.5,
    colors: Colors = None,
    method: Method = "mc-rise",
    seed: Seed = 0,
    output: Output = "mcrise-results",
    overwrite: Overwrite = False,
    resume: Resume = False,
    allow_truncated: AllowTruncated = False,
    max_pixels: MaxPixels = None,
    precision: PrecisionName = "auto",
    batch_size: BatchSize = "auto",
    figures: Figures = 100,
    standard_error: StandardError = False,
    original_size: OriginalSize = False,
) -> None:
    """Explain a few images in this process, without Ray."""
    _run(dict(locals()), actors=0)


@app.command()
def audit(
    images: Sources,
    model: ModelName,
    weights: Weights = None,
    classes: Classes = None,
    model_arg: ModelArgs = None,
    size: Size = None,
    resize: Resize = None,
    shorter_side: ShorterSide = None,
    interpolation: Interpolation = None,
    input_range: InputRange = None,
    mean: Mean = None,
    std: Std = None,
    activation: Activation = None,
    device: Device = None,
    target: Targets = ["predicted"],  # noqa: B006
    masks: MaskCount = 8000,
    grid: Grid = "8x8",
    p_mask: PMask = 0.5,
    colors: Colors = None,
    method: Method = "mc-rise",
    seed: Seed = 0,
    output: Output = "mcrise-results",
    overwrite: Overwrite = False,
    resume: Resume = False,
    allow_truncated: AllowTruncated = False,
    max_pixels: MaxPixels = None,
    precision: PrecisionName = "auto",
    batch_size: BatchSize = "auto",
    figures: Figures = 100,
    standard_error: StandardError = False,
    original_size: OriginalSize = False,
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
    overwrite: Overwrite = False,
    insecure: Insecure = False,
) -> None:
    """Run a job file on this machine, or as part of a running Ray; see `submit` for clusters elsewhere."""
    with one_line_errors():
        from mcrise_ray.jobfiles import load_job

        _run_and_report(load_job(file), overwrite=overwrite, address=address, insecure=insecure)


@app.command()
def demo(
    output: Output = "mcrise-demo",
    masks: MaskCount = 4000,
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
    fills = {} if options["colors"] is None else {"colors": options["colors"]}
    spec = ExplainSpec(
        method=options["method"],
        masks=options["masks"],
        grid=pair("--grid", options["grid"]),
        p_mask=options["p_mask"],
        seed=options["seed"],
        **fills,
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
