"""How fast it is: against the bare model, RISE as published and xaitk-saliency, by K, by L and by actors."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from pydantic import Field

from mcrise_ray.contenders import Apart, Contender, Name, bare_forward
from mcrise_ray.errors import StoreError
from mcrise_ray.explainer import Subject, explain
from mcrise_ray.images import read_image
from mcrise_ray.jobs import run_job
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.loading import ModelSpec
from mcrise_ray.models import Model, load_model
from mcrise_ray.plan import stages
from mcrise_ray.precision import Execution
from mcrise_ray.spec import ExplainSpec, StrictModel
from mcrise_ray.timing import Ratio, alternate, in_turn
from mcrise_ray.tuning import BatchSizeChoice, PrecisionChoice, settle

Part = Literal["overhead", "fills", "targets", "rise", "xaitk", "actors"]

FILLS = (1, 5, 16, 64)
TARGETS = (1, 10, 100)
OVERHEAD = "explain / bare forward"
IMAGE_MASKS = 8000  # the paper's N
GIB = 2**30

_MEMORY = 24 * GIB  # of a usual machine
_FEWEST = 64  # masks, with which a variance can be told


class BenchSpec(StrictModel):
    """What is measured.

    Args:
        model: which model; weights at random do for times.
        image: what is explained; noise by default.
        explain: masks and so on, for each run.
        precision, batch_size: see `mcrise_ray.tuning.settle`.
        threads: of torch; as many as there are cores by default.
        parts: in this order.
        repeats: pairs of runs, in every other of which B goes first; see `Ratio`.
        seeds: whose standard errors are taken together, for times to equal error; 0 measures none. Where most
            scores are near 0, a single one may find half the variance.
        images: of the jobs of `actors`.
        price_per_hour: of this machine, for costs.
    """

    model: ModelSpec
    image: str | None = None
    explain: ExplainSpec = ExplainSpec(masks=512)
    precision: PrecisionChoice = "auto"
    batch_size: BatchSizeChoice = "auto"
    threads: int | None = Field(default=None, ge=1)
    parts: tuple[Part, ...] = ("overhead", "fills", "targets", "rise", "actors")
    repeats: int = Field(default=5, ge=1)
    seeds: int = Field(default=0, ge=0)
    images: int = Field(default=4, ge=1)
    price_per_hour: float | None = Field(default=None, ge=0)


@dataclass(frozen=True)
class Case:
    """A model as it is asked best, and an image at its input size.

    Attributes:
        bench: what is measured.
        tuned: the model asked as `execution` says.
        execution: see `mcrise_ray.precision`.
        image: at the model's input size.
        target: its predicted class.
    """

    bench: BenchSpec
    tuned: Model
    execution: Execution
    image: UInt8[np.ndarray, "H W 3"]
    target: int

    @property
    def spec(self) -> ExplainSpec:
        """Of the masks."""
        return self.bench.explain

    @property
    def repeats(self) -> int:
        """Of each pair."""
        return self.bench.repeats

    def explain(self, spec: ExplainSpec, targets: Sequence[int]) -> object:
        """Ours."""
        return explain(self.tuned, self.image, targets, spec, batch_size=self.execution.batch_size)

    def contender(self, name: Name, spec: ExplainSpec) -> Contender:
        """Somebody who explains the same image."""
        size, threads = self.execution.batch_size, self.execution.threads
        return Contender(name, self.bench.model, self.image, spec, size, threads)


def prepare(bench: BenchSpec) -> Case:
    """Load the model, choose how it is asked, and take the image."""
    if bench.threads is not None:
        torch.set_num_threads(bench.threads)
    model = load_model(bench.model)
    noise = np.random.default_rng(0).integers(0, 256, (*model.preprocessing.size, 3), dtype=np.uint8)
    image = noise if bench.image is None else read_image(bench.image)
    prepared = model.prepare(image)
    target = int(Subject(model, prepared, bench.explain).scores().argmax())
    settled = settle(model, bench.explain, image, precision=bench.precision, batch_size=bench.batch_size)
    return Case(bench, settled.model, settled.execution, prepared, target)


def report(bench: BenchSpec, output: str | None = None) -> Iterator[str]:
    """The lines of a table, and a JSON file, as the ratios come.

    Raises:
        StoreError: the file cannot be written, which shows before anything is loaded or measured.
    """
    ratios: list[dict[str, Any]] = []
    _write(output, bench, None, ratios)
    case = prepare(bench)
    execution, price = case.execution, bench.price_per_hour
    yield f"{bench.model.model}, {case.spec.masks} masks: {execution}"
    yield from (f"  {note}" for note in execution.precision.notes)
    yield f"{'A / B, in turn':<44} {'median':>8}  (range), median seconds of A / of B"
    for ratio in measure(case):
        ratios.append(asdict(ratio))
        _write(output, bench, execution, ratios)
        yield str(ratio)
        if ratio.name == OVERHEAD:
            yield f"  {cost(case.spec.masks / ratio.first, price)}"
            if not stages(case.spec, 1) and stages(case.spec.model_copy(update={"masks": IMAGE_MASKS}), 1):
                yield f"  of {case.spec.masks} masks none are picked; --masks {IMAGE_MASKS} measures that too"


def _write(
    output: str | None, bench: BenchSpec, execution: Execution | None, ratios: Sequence[dict[str, Any]]
) -> None:
    if output is None:
        return
    content = {
        "bench": bench.model_dump(mode="json"),
        "execution": execution and execution.model_dump(mode="json"),
        "ratios": ratios,
    }
    try:
        Path(output).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {output}: {error.strerror}; check --output") from error


def cost(masks_per_second: float, price_per_hour: float | None) -> str:
    """What an image costs."""
    seconds = IMAGE_MASKS / masks_per_second
    text = f"{masks_per_second:,.1f} masks/s, {seconds:,.1f} s an image of {IMAGE_MASKS} masks"
    if price_per_hour is not None:
        text += f", which costs {seconds / 3600 * price_per_hour:.4g} at {price_per_hour:g} an hour"
    return text


def measure(case: Case) -> Iterator[Ratio]:
    """The ratios that are asked for, as they come."""
    parts: dict[Part, Callable[[Case], Iterator[Ratio]]] = {
        "overhead": overhead,
        "fills": fills,
        "targets": targets,
        "rise": rise,
        "xaitk": xaitk,
        "actors": actors,
    }
    for part in case.bench.parts:
        yield from parts[part](case)


def overhead(case: Case) -> Iterator[Ratio]:
    """Explaining over asking the same model as often, without masks."""
    bare = partial(bare_forward, case.tuned, case.image, case.spec, case.execution.batch_size)
    ours = partial(case.explain, case.spec, [case.target])
    yield alternate(OVERHEAD, ours, bare, case.repeats)


def fills(case: Case) -> Iterator[Ratio]:
    """K fills over one."""
    target = [case.target]
    one = partial(case.explain, _with_fills(case.spec, 1), target)
    for K in FILLS[1:]:
        many = partial(case.explain, _with_fills(case.spec, K), target)
        yield alternate(f"K = {K} / K = 1", many, one, case.repeats)


def _with_fills(spec: ExplainSpec, K: int) -> ExplainSpec:
    colors = [f"#{255 - 3 * k:02x}{(37 * k) % 256:02x}{(91 * k) % 256:02x}" for k in range(K)]
    return spec.model_copy(update={"method": "mc-rise", "colors": tuple(colors)})


def targets(case: Case) -> Iterator[Ratio]:
    """L targets over one."""
    one = partial(case.explain, case.spec, [0])
    for L in sorted({min(L, case.tuned.classes) for L in TARGETS} - {1}):
        yield alternate(f"L = {L} / L = 1", partial(case.explain, case.spec, range(L)), one, case.repeats)


def rise(case: Case) -> Iterator[Ratio]:
    """RISE as published over ours, at equal N; with seeds, at equal error too. Then the same where its
    process keeps what it frees, as ours does: the rest is owed to masks and to how the model is asked.
    """
    spec = _rise_spec(case.spec)
    ours = partial(case.explain, spec, [case.target])
    their_peak, our_peak = memory(case, spec, "rise"), memory(case, spec, "ours")
    remark = f"memory beyond the model's: {their_peak / GIB:.2f} GiB / {our_peak / GIB:.3f} GiB"
    fewer = _of_equal_error(case, spec)
    for name, keeps_freed in (("RISE as published", False), ("RISE with our malloc", True)):
        with Apart(replace(case.contender("rise", spec), keeps_freed=keeps_freed)) as theirs:
            yield alternate(f"{name} / ours, equal N", theirs.explain, ours, case.repeats, remark)
            yield from _at_equal_error(name, theirs, case, fewer)


@dataclass(frozen=True)
class _Fewer:
    """Ours with as many masks as come to the variance of N that are weighed as the paper does."""

    spec: ExplainSpec
    remark: str


def _of_equal_error(case: Case, spec: ExplainSpec) -> _Fewer | None:
    """None without seeds."""
    if not case.bench.seeds:
        return None
    goal = variance(case, spec.model_copy(update={"estimator": "paper"}))
    fewer = spec.model_copy(update={"masks": masks_of_variance(case, spec, goal)})
    errors = " / ".join(f"{value**0.5:.3g}" for value in (goal, variance(case, fewer)))
    return _Fewer(fewer, f"N = {spec.masks} / {fewer.masks}; standard errors {errors}")


def _at_equal_error(name: str, theirs: Apart, case: Case, fewer: _Fewer | None) -> Iterator[Ratio]:
    if fewer is not None:
        ours = partial(case.explain, fewer.spec, [case.target])
        yield alternate(f"{name} / ours, equal error", theirs.explain, ours, case.repeats, fewer.remark)


def _rise_spec(spec: ExplainSpec) -> ExplainSpec:
    kept = spec.model_dump(include={"masks", "grid", "p_mask", "seed", "estimator"})
    return ExplainSpec(method="rise", **kept)


def masks_of_variance(case: Case, spec: ExplainSpec, goal: float) -> int:
    """With how many masks, at most N, the spec's maps have that variance: it falls faster than 1 / N where
    masks are picked, so it is measured at N, N / 2 and so on, and interpolated.
    """
    above, reached = spec.masks, variance(case, spec)
    if reached >= goal:
        return spec.masks
    while above > _FEWEST:
        below, found = above // 2, variance(case, spec.model_copy(update={"masks": above // 2}))
        if found > goal:
            share = np.log(goal / reached) / np.log(found / reached)
            return round(float(above * (below / above) ** share))
        above, reached = below, found
    return above


def variance(case: Case, spec: ExplainSpec) -> float:
    """Mean squared standard error of the maps, of all pixels and seeds.

    Over a few seeds, the variance of the maps themselves would say little: the noise of a map of RISE is
    mostly one level that all pixels have in common. Standard errors are calibrated, see the tests.
    """
    size, target = case.execution.batch_size, [case.target]
    seeded = (spec.model_copy(update={"seed": seed}) for seed in range(case.bench.seeds))
    found = [explain(case.tuned, case.image, target, one, batch_size=size).standard_error for one in seeded]
    return float(np.square(found, dtype=np.float64).mean())


def xaitk(case: Case) -> Iterator[Ratio]:
    """MC-RISE of xaitk-saliency over ours at equal N, with what each needs of memory; with seeds, at equal
    error too, where p_mask is 0.5: elsewhere its weights are not the paper's, so nothing tells its error.
    """
    spec = case.spec
    ours = partial(case.explain, spec, [case.target])
    doubled = spec.model_copy(update={"masks": 2 * spec.masks})
    once, twice = (memory(case, asked, "xaitk") for asked in (spec, doubled))
    our_peak = memory(case, spec, "ours")
    fits = spec.masks * (1 + (_MEMORY - once) / max(1, twice - once))
    remark = (
        f"memory beyond the model's: {once / GIB:.2f} GiB / {our_peak / GIB:.3f} GiB; "
        f"theirs exceeds {_MEMORY / GIB:.0f} GiB at N = {fits:,.0f}, ours does not grow"
    )
    with Apart(case.contender("xaitk", spec)) as theirs:
        yield alternate("MC-RISE of xaitk / ours, equal N", theirs.explain, ours, case.repeats, remark)
        if spec.p_mask == 0.5:
            yield from _at_equal_error("MC-RISE of xaitk", theirs, case, _of_equal_error(case, spec))


def memory(case: Case, spec: ExplainSpec, name: Name) -> int:
    """Bytes that a contender takes at most beyond what its model takes."""
    with Apart(case.contender(name, spec)) as process:
        return process.memory()


def actors(case: Case) -> Iterator[Ratio]:
    """One actor over two on the same images and masks, without Ray's start but with that of the actors."""
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        for n in range(case.bench.images):
            noise = generator.integers(0, 256, case.image.shape, dtype=np.uint8)
            Image.fromarray(noise).save(Path(folder) / f"{n}.png")
        one, two = (partial(_job_seconds, case, folder, count) for count in (1, 2))
        times = in_turn(one, two, case.repeats)
    yield Ratio.of("1 actor / 2 actors", times)


def _job_seconds(case: Case, folder: str, count: int) -> float:
    job = JobSpec(
        images=(folder,),
        model=case.bench.model,
        output=f"{folder}-results",
        explain=case.spec,
        actors=count,
        batch_size=case.execution.batch_size,
        precision=cast(PrecisionChoice, case.execution.precision.steps),  # nothing is tried meanwhile
        figures=0,
    )
    try:
        return run_job(job, overwrite=True).seconds
    finally:
        shutil.rmtree(job.output, ignore_errors=True)
