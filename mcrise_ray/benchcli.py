"""The command `mcrise bench`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mcrise_ray.arguments import key_value, one_line_errors, pair, triple


def bench(
    model: Annotated[str, typer.Option(help="As for `mcrise explain`; weights at random do for times.")] = (
        "torchvision:resnet50?num_classes=43"
    ),
    weights: Annotated[str | None, typer.Option(help="As for `mcrise explain`.")] = None,
    model_arg: Annotated[list[str] | None, typer.Option("--model-arg", metavar="KEY=VALUE")] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Size of the model's input.")] = None,
    mean: Annotated[str | None, typer.Option(metavar="R,G,B")] = None,
    std: Annotated[str | None, typer.Option(metavar="R,G,B")] = None,
    device: Annotated[str | None, typer.Option()] = None,
    image: Annotated[str | None, typer.Option(help="What is explained.  (default: noise)")] = None,
    masks: Annotated[int, typer.Option("--masks", "-n", help="Of each run.")] = 512,
    grid: Annotated[str, typer.Option(metavar="hxw", help="Cells of a mask.")] = "8x8",
    p_mask: Annotated[float, typer.Option(help="Probability that a cell is masked.")] = 0.5,
    estimator: Annotated[str, typer.Option(help="importance, control-variate or paper.")] = "importance",
    precision: Annotated[str, typer.Option(help="auto, or as for `mcrise explain`.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="auto, or a number.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="overhead (over the bare model), fills (K = 1 to 64), targets (L = 1 to 100), rise (as "
            "published), actors (1 to 2), xaitk (needs the extra bench); repeat for several.  (default: all "
            "but xaitk)"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs of which the median is taken.")] = 5,
    seeds: Annotated[
        int,
        typer.Option(
            min=0, help="Measure standard errors with so many seeds, for times to equal error (rise, xaitk)."
        ),
    ] = 0,
    images: Annotated[int, typer.Option(min=1, help="Images of the jobs of actors.")] = 4,
    price_per_hour: Annotated[float | None, typer.Option(help="Of this machine, for costs.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="JSON file.")] = None,
) -> None:
    """Measure speed as ratios of two things run in turn: the bare model, published RISE, xaitk, ours."""
    with one_line_errors():
        from mcrise_ray.bench import BenchSpec, report
        from mcrise_ray.loading import ModelSpec
        from mcrise_ray.spec import ExplainSpec

        preprocessing = {
            "size": size and pair("--size", size),
            "mean": mean and triple("--mean", mean),
            "std": std and triple("--std", std),
        }
        asked: dict[str, Any] = {
            "model": ModelSpec(
                model=model,
                weights=weights,
                args=dict(key_value(argument) for argument in model_arg or ()),
                preprocessing={name: value for name, value in preprocessing.items() if value is not None},
                device=device,
            ),
            "image": image,
            "explain": ExplainSpec.model_validate(
                {"masks": masks, "grid": pair("--grid", grid), "p_mask": p_mask, "estimator": estimator}
            ),
            "precision": precision,
            "batch_size": batch_size,
            "threads": threads,
            "repeats": repeats,
            "seeds": seeds,
            "images": images,
            "price_per_hour": price_per_hour,
            **({"parts": only} if only else {}),
        }
        for line in report(BenchSpec(**asked), output):
            print(line, flush=True)
