"""What the commands that explain can be told: each option once, with its help."""

from __future__ import annotations

from typing import Annotated

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
MaskCount = Annotated[
    int | None,
    typer.Option(
        "--masks",
        "-n",
        help="N, the number of masks; with --relative-error the most that are spent.  "
        "[default: 8000, or 100000]",
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
    typer.Option(help="control-variate: what can be predicted of a score adds no noise; paper: equation 9."),
]
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
