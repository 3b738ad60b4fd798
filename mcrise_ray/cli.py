"""The command `mcrise`. Everything heavy is imported inside commands, so that `--help` answers at once."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcrise_ray.jobs import JobSpec
    from mcrise_ray.loading import ModelSpec
    from mcrise_ray.spec import ExplainSpec

app = typer.Typer(
    help="Which pixels, and which colours, a vision model needs: RISE, debiased RISE and MC-RISE.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
BatchSize = Annotated[int, typer.Option(help="Masked images per call of the model.")]
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
    allow_truncated: AllowTruncated = False,
    max_pixels: MaxPixels = None,
    batch_size: BatchSize = 64,
    figures: Figures = 100,
    standard_error: StandardError = False,
    original_size: OriginalSize = False,
) -> None:
    """Explain a few images in this process, without Ray."""
    _run(dict(locals()), actors=0, cpus_per_actor=1, gpus_per_actor=None)


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
    allow_truncated: AllowTruncated = False,
    max_pixels: MaxPixels = None,
    batch_size: BatchSize = 64,
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
) -> None:
    """Explain many images on Ray. Every image ends in maps/ or, with the reason, in errors/."""
    _run(dict(locals()), actors=actors, cpus_per_actor=cpus_per_actor, gpus_per_actor=gpus_per_actor)


@app.command()
def demo(
    output: Output = "mcrise-demo",
    masks: MaskCount = 4000,
    actors: Annotated[int, typer.Option(min=1, help="Actors that each hold the model.")] = 2,
) -> None:
    """Explain the bundled traffic signs with the bundled classifier on local Ray."""
    with _one_line_errors():
        from mcrise_ray import demo as bundled
        from mcrise_ray.jobs import JobSpec
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


@app.command()
def bench(
    model: ModelName = "torchvision:resnet50?num_classes=43",
    weights: Weights = None,
    model_arg: ModelArgs = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    image: Annotated[str | None, typer.Option(help="What is explained.  [default: noise]")] = None,
    masks: MaskCount = 512,
    grid: Grid = "8x8",
    p_mask: PMask = 0.5,
    colors: Colors = None,
    precision: Annotated[str, typer.Option(help="auto or float32.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="auto or a number.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="overhead, fills, targets, rise, xaitk (extra bench) or actors; repeat for several."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs of which the median is taken.")] = 5,
    seeds: Annotated[int, typer.Option(min=0, help="For variances, and so for times at equal error.")] = 0,
    images: Annotated[int, typer.Option(min=1, help="Images of the jobs of actors.")] = 4,
    price_per_hour: Annotated[float | None, typer.Option(help="Of this machine, for costs.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="JSON file.")] = None,
) -> None:
    """Measure speed, as ratios of two things run in turn: the bare model, published RISE, others, ours."""
    options = dict(locals())
    with _one_line_errors():
        from mcrise_ray.bench import BenchSpec, prepare, report

        names = (
            "image",
            "precision",
            "batch_size",
            "threads",
            "repeats",
            "seeds",
            "images",
            "price_per_hour",
        )
        given = {name: options[name] for name in names} | ({"parts": only} if only else {})
        spec = BenchSpec(model=_model_spec(options), explain=_explain_spec(options), **given)
        for line in report(prepare(spec), output):
            print(line, flush=True)


def _run(
    options: dict[str, Any], *, actors: int | None, cpus_per_actor: int, gpus_per_actor: float | None
) -> None:
    with _one_line_errors():
        job = _job_spec(options, actors, cpus_per_actor, gpus_per_actor)
        _run_and_report(job, overwrite=options["overwrite"])


def _model_spec(options: dict[str, Any]) -> ModelSpec:
    from mcrise_ray.loading import ModelSpec

    names = ("resize", "shorter_side", "interpolation", "input_range", "activation")
    size, mean, std = (options[name] for name in ("size", "mean", "std"))
    given = {
        **{name: options.get(name) for name in names},
        "size": size and _pair("--size", size),
        "mean": mean and _triple("--mean", mean),
        "std": std and _triple("--std", std),
    }
    return ModelSpec(
        model=options["model"],
        weights=options["weights"],
        classes=options.get("classes"),
        args=dict(_key_value(argument) for argument in options["model_arg"] or ()),
        preprocessing={name: value for name, value in given.items() if value is not None},
        device=options["device"],
    )


def _explain_spec(options: dict[str, Any]) -> ExplainSpec:
    from mcrise_ray.spec import ExplainSpec

    given = {name: options[name] for name in ("method", "seed") if name in options}
    fills = {} if options["colors"] is None else {"colors": options["colors"]}
    grid = _pair("--grid", options["grid"])
    return ExplainSpec(masks=options["masks"], grid=grid, p_mask=options["p_mask"], **given, **fills)


def _job_spec(
    options: dict[str, Any], actors: int | None, cpus_per_actor: int, gpus_per_actor: float | None
) -> JobSpec:
    from mcrise_ray.decode import DecodeOptions
    from mcrise_ray.jobs import JobSpec

    limit = {} if options["max_pixels"] is None else {"max_pixels": options["max_pixels"]}
    return JobSpec(
        images=tuple(options["images"]),
        model=_model_spec(options),
        output=options["output"],
        targets=options["target"],
        decode=DecodeOptions(allow_truncated=options["allow_truncated"], **limit),
        explain=_explain_spec(options),
        actors=actors,
        cpus_per_actor=cpus_per_actor,
        gpus_per_actor=gpus_per_actor,
        batch_size=options["batch_size"],
        standard_error=options["standard_error"],
        original_size=options["original_size"],
        figures=options["figures"],
    )


def _run_and_report(job: JobSpec, overwrite: bool) -> None:
    from rich.console import Console

    from mcrise_ray.jobs import draw_figures, run_job
    from mcrise_ray.progress import ConsoleReporter, duration

    with ConsoleReporter(Console(stderr=True)) as reporter:
        summary = run_job(job, reporter, overwrite=overwrite)
    rate = summary.masks / summary.seconds if summary.seconds else 0
    print(
        f"{summary.images} images explained, {summary.errors} errors, {summary.rows} maps, "
        f"{summary.masks:,} masks in {duration(summary.seconds)} ({rate:,.0f} masks/s)"
    )
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
def _one_line_errors() -> Iterator[None]:
    """Errors of ours as one line and exit code 2; a bug keeps its traceback."""
    from mcrise_ray.errors import MCRiseError

    try:
        yield
    except MCRiseError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _pair(option: str, text: str) -> tuple[int, int]:
    from mcrise_ray.errors import SpecError

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise SpecError(f"{option}: expected two whole numbers such as 96x96, found {text!r}")
    return int(parts[0]), int(parts[1])


def _triple(option: str, text: str) -> tuple[float, ...]:
    from mcrise_ray.errors import SpecError

    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise SpecError(f"{option}: expected three numbers such as 0.485,0.456,0.406, found {text!r}")
    return values


def _key_value(argument: str) -> tuple[str, str]:
    from mcrise_ray.errors import SpecError

    key, separator, value = argument.partition("=")
    if not separator or not key.isidentifier():
        raise SpecError(f"--model-arg: expected KEY=VALUE, found {argument!r}")
    return key, value
