"""What the commands that explain can be told: each option once, with its help.

Options that several commands have are the fields of a dataclass; `spread` makes a parameter of that type the
options themselves.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

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
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="KEY=VALUE",
        help="Argument of a factory, of the type that its annotation or default says.",
    ),
]
Size = Annotated[str | None, typer.Option(metavar="HxW", help="Size of the model's input.")]
Resize = Annotated[
    str | None,
    typer.Option(help="stretch (the whole image) or crop (its centre).  (default: the model's own)"),
]
ShorterSide = Annotated[
    int | None,
    typer.Option(
        help="Of the image before its centre is cut out.  (default: the model's own margin, or 8/7 of --size)"
    ),
]
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
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu.  (default: a GPU where there is one)")]
Targets = Annotated[
    list[str],
    typer.Option(
        "--target",
        help="predicted, top5, truth, predicted+truth, manifest (its column target), or a class index or "
        "name (repeat for several).",
    ),
]
MaskCount = Annotated[
    int | None,
    typer.Option(
        "--masks",
        "-n",
        help="N, the number of masks; with --relative-error the most that are spent.  "
        "(default: 8000, or 100000)",
    ),
]
RelativeError = Annotated[
    float | None,
    typer.Option(
        "--relative-error", help="Stop an image once its maps have this error, such as 0.1, over their size."
    ),
]
Estimator = Annotated[
    str,
    typer.Option(
        help="importance: masks are picked by how much their scores will tell; control-variate: any masks, "
        "but what can be predicted of a score adds no noise; paper: equation 9."
    ),
]
Grid = Annotated[str, typer.Option(metavar="hxw", help="Cells of a mask.")]
PMask = Annotated[float, typer.Option("--p-mask", help="Probability that a cell is masked.")]
Colors = Annotated[
    str | None,
    typer.Option(help="paper5, paper8, or fills such as red,#00ff80 (MC-RISE alone).  (default: paper5)"),
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
RetryErrors = Annotated[
    bool, typer.Option("--retry-errors", help="Try images again that have an error row by an earlier run.")
]
BatchSize = Annotated[str, typer.Option(help="Masked images per call of the model: auto, or a number.")]
PrecisionName = Annotated[
    str,
    typer.Option(
        "--precision",
        help="auto: the fastest way to ask the model that keeps its scores; float32; or what was found "
        "before, such as channels_last+bfloat16.",
    ),
]
AllowTruncated = Annotated[
    bool, typer.Option("--allow-truncated", help="Decode files that end too early instead of refusing them.")
]
MaxPixels = Annotated[
    int | None, typer.Option(min=1, help="Refuse larger images.  (default: 89478485)", show_default=False)
]
Figures = Annotated[int, typer.Option(help="Draw the first so many images.")]
StandardError = Annotated[
    bool, typer.Option("--standard-error", help="Store the standard error of every pixel too.")
]
OriginalSize = Annotated[
    bool,
    typer.Option("--original-size", help="Store maps at the size of each image, not of the model's input."),
]

Queries = Annotated[
    list[str],
    typer.Argument(metavar="QUERY...", help="Images, as for audit.", show_default=False),
]
EmbedderName = Annotated[
    str,
    typer.Option(
        "--model",
        help="A model that returns embeddings: torchreid:NAME, timm:NAME, FILE.pt2, FILE.onnx, "
        "package.module:factory, or the URL of a model on a KServe v2 server.",
        show_default=False,
    ),
]
GallerySources = Annotated[
    list[str],
    typer.Option(
        "--gallery",
        help="Images to match, as for audit (repeat for several). People and cameras: columns pid and camid "
        "of a manifest, or names such as 0001_c1s1_000151_01.jpg.",
        show_default=False,
    ),
]
Matches = Annotated[
    list[str],
    typer.Option(
        "--match",
        help="top1, top5, correct (the nearest image of the same person), wrong (of another), "
        "correct+wrong, or named (repeat for several).",
    ),
]
Pairs = Annotated[str | None, typer.Option(help="For --match named: a CSV with the columns query and match.")]
ScaleOfDistance = Annotated[
    float | None,
    typer.Option("--d0", help="Scale of the distance.  (default: that of the unmasked query to each match)"),
]
Distance = Annotated[str, typer.Option(help="euclidean or cosine.")]
GalleryPlace = Annotated[
    str | None,
    typer.Option(
        "--gallery-store",
        help="Folder or URL of the gallery's embeddings, for other jobs to use again.  "
        "(default: OUTPUT/gallery)",
    ),
]

Log = Annotated[
    str,
    typer.Option(
        metavar="plain|json",
        envvar="MCRISE_LOG",
        help="json: one object per line on standard output, and nothing else there.",
    ),
]

Actors = Annotated[
    str,
    typer.Option(
        metavar="N|MIN-MAX|auto",
        help="Actors that each hold the model. auto: as many as fit; 2-8: two, and on a cluster that grows "
        "up to eight.",
    ),
]
CpusPerActor = Annotated[int, typer.Option(min=1, help="Cores, and torch threads, per actor.")]
GpusPerActor = Annotated[
    float | None, typer.Option(help="GPUs per actor, may be a fraction.  (default: 1 where there is one)")
]
LabelSelector = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Label of Ray that an actor's node must have, such as ray.io/accelerator-type=A100 (repeat for "
        "several).",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to run on; auto for one on this machine.  (default: start one)"),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Go to another machine without a token, or with one in the clear.")
]
Deadline = Annotated[
    float, typer.Option(help="Seconds until a call counts as stalled; more where units are slow.")
]
MaxRetries = Annotated[
    int, typer.Option(min=0, help="Of a unit whose actor died, before its image gets an error row.")
]


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """How a model is asked, by masks of which kind, and where the results go."""

    model: ModelName
    weights: Weights = None
    model_arg: ModelArgs = None
    size: Size = None
    resize: Resize = None
    shorter_side: ShorterSide = None
    interpolation: Interpolation = None
    input_range: InputRange = None
    mean: Mean = None
    std: Std = None
    device: Device = None
    masks: MaskCount = None
    relative_error: RelativeError = None
    estimator: Estimator = "importance"
    grid: Grid = "8x8"
    colors: Colors = None
    method: Method = "mc-rise"
    seed: Seed = 0
    output: Output = "mcrise-results"
    overwrite: Overwrite = False
    resume: Resume = False
    retry_errors: RetryErrors = False
    allow_truncated: AllowTruncated = False
    max_pixels: MaxPixels = None
    precision: PrecisionName = "auto"
    batch_size: BatchSize = "auto"
    figures: Figures = 100
    standard_error: StandardError = False
    original_size: OriginalSize = False
    log: Log = "plain"


@dataclass(frozen=True, kw_only=True)
class JobOptions(CommonOptions):
    """Which images are explained, and which of their classes."""

    images: Sources
    classes: Classes = None
    activation: Activation = None
    target: Targets = field(default_factory=lambda: ["predicted"])
    p_mask: PMask = 0.5


@dataclass(frozen=True, kw_only=True)
class ReidOptions(CommonOptions):
    """Which queries are explained against which images of a gallery."""

    images: Queries
    model: EmbedderName
    gallery: GallerySources
    match: Matches = field(default_factory=lambda: ["top1"])
    pairs: Pairs = None
    d0: ScaleOfDistance = None
    distance: Distance = "euclidean"
    gallery_store: GalleryPlace = None
    p_mask: PMask = 0.1


@dataclass(frozen=True)
class RayOptions:
    """What a job may use, and when it gives up."""

    actors: Actors = "auto"
    cpus_per_actor: CpusPerActor = 1
    gpus_per_actor: GpusPerActor = None
    label_selector: LabelSelector = None
    address: Address = None
    insecure: Insecure = False
    deadline: Deadline = 60.0
    max_retries: MaxRetries = 3


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer reads it: parameters that are dataclasses become one option for each field."""
    kinds: dict[str, Any] = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in kinds.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _parameters(groups[name])
        else:
            parameters.append(parameter.replace(annotation=kinds[name], kind=_KEYWORD))

    @functools.wraps(command)
    def spread_command(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{option.name: given.pop(option.name) for option in fields(group)})
        command(**given)

    spread_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread_command


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _parameters(group: Any) -> list[inspect.Parameter]:
    """One parameter for each field of a dataclass."""
    kinds = get_type_hints(group, include_extras=True)
    found = []
    for option in fields(group):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        default = inspect.Parameter.empty if default is MISSING else default
        found.append(inspect.Parameter(option.name, _KEYWORD, default=default, annotation=kinds[option.name]))
    return found
