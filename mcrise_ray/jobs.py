"""A job: many images, one model, one spec, one output; in this process or on Ray."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from pydantic import Field

from mcrise_ray.decode import DecodeOptions
from mcrise_ray.dispatch import Failed, Finished, Ledger, run_serially
from mcrise_ray.errors import ImageError
from mcrise_ray.explainer import DEFAULT_BATCH_SIZE, explanation
from mcrise_ray.images import ImageRef, ImageSource, read_image
from mcrise_ray.loading import ModelSpec
from mcrise_ray.models import ModelFacts
from mcrise_ray.preprocess import Preprocessing
from mcrise_ray.progress import Reporter
from mcrise_ray.spec import ExplainSpec, StrictModel
from mcrise_ray.store import ErrorRow, MapRow, Results, Store, read_results
from mcrise_ray.targets import TargetChoice
from mcrise_ray.worker import Worker

_ROWS_PER_FILE = 64
_COUNTED = 1000  # shorter lists are counted before the start, for the progress bar
_COUNT_FOR = 0.5  # seconds
_BYTES_PER_FILE = 256 * 2**20  # maps at the size of photographs are large


class JobSpec(StrictModel):
    """Everything that a job is.

    Args:
        images: files, folders, manifests, shards, datasets: see `ImageSource`.
        model: which model.
        output: folder or URL of the results.
        targets: `"predicted"`, `"top5"`, `"truth"`, `"predicted+truth"`, `"manifest"`, or class indices and
            names; see `parse_targets`. Several targets share one pass.
        decode: what is decoded and what is refused.
        explain: method, masks, fills.
        actors: Ray actors that each hold the model; 0 runs in this process without Ray; None takes one per
            GPU, or one per `cpus_per_actor` cores where there is no GPU.
        cpus_per_actor: cores, and threads of torch, per actor.
        gpus_per_actor: may be a fraction; None takes one where the machine has any.
        batch_size: masked images per call of the model.
        standard_error: store the standard error of every pixel too, at the price of twice the space.
        original_size: store maps at the size of each image instead of the model's input: bilinear, NaN where
            a centre crop cut the image off.
        figures: draw the first so many images.
    """

    images: tuple[str, ...]
    model: ModelSpec
    output: str
    targets: TargetChoice = ("predicted",)
    decode: DecodeOptions = Field(default_factory=DecodeOptions)
    explain: ExplainSpec = Field(default_factory=ExplainSpec)
    actors: int | None = Field(default=None, ge=0)
    cpus_per_actor: int = Field(default=1, ge=1)
    gpus_per_actor: float | None = Field(default=None, ge=0)
    batch_size: int = Field(default=DEFAULT_BATCH_SIZE, ge=1)
    standard_error: bool = False
    original_size: bool = False
    figures: int = Field(default=100, ge=0)


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Attributes:
        images: explained.
        errors: images with an error row.
        rows: of `maps/`, one per image and target.
        masks: scored.
        seconds: from the first task to the last result, without starting Ray and loading the model.
    """

    images: int
    errors: int
    rows: int
    masks: int
    seconds: float


def run_job(job: JobSpec, reporter: Reporter, *, overwrite: bool = False) -> Summary:
    """Run a job to its end; every image ends up in `maps/` or in `errors/`.

    Args:
        job: what to do.
        reporter: is told about progress.
        overwrite: replace results that are there; they stay if this job cannot even start.

    Raises:
        MCRiseError: the job cannot run at all: no images, no model, no output, no Ray.
    """
    images, count = _count_if_short(ImageSource(job.images))
    store = Store(job.output)
    if not overwrite:
        store.refuse_existing()
    if job.actors == 0:
        worker = Worker(job.model, job.explain, job.targets, job.batch_size, decode=job.decode)
        facts = worker.load()
        reporter.note(f"model {facts.model} on {facts.device}, in this process")
        ledger = Ledger(images, job.explain, lookahead=1)
        return _drain(job, facts, store, reporter, count, run_serially(ledger, worker, reporter.masks_done))

    from mcrise_ray import cluster

    gpus = job.gpus_per_actor if job.gpus_per_actor is not None else float(torch.cuda.is_available())
    actors = job.actors or _actors_that_fit(job.cpus_per_actor, gpus)
    with cluster.local_ray(cpus=actors * job.cpus_per_actor):
        handles, facts = cluster.start_actors(
            actors,
            job.model,
            job.explain,
            job.targets,
            job.decode,
            batch_size=job.batch_size,
            cpus=job.cpus_per_actor,
            gpus=gpus,
        )
        reporter.note(
            f"model {facts.model} on {facts.device}, {actors} actors, {job.cpus_per_actor} cores each"
        )
        ledger = Ledger(images, job.explain, lookahead=actors)
        outcomes = cluster.explain_images(ledger, handles, reporter.masks_done)
        return _drain(job, facts, store, reporter, count, outcomes)


def draw_figures(job: JobSpec, on_figure: Callable[[str], None]) -> None:
    """Draw the first `job.figures` images of a finished job beside its maps, from what was committed."""
    from mcrise_ray import render

    results = read_results(job.output)
    prepare = Preprocessing(**results.job["model"]["preprocessing"]).prepare
    for image_id, rows in islice(_by_image(results), job.figures):
        lines = [
            render.FigureRow(_title(row), row.method, row.colors, row.map, row.relative_error) for row in rows
        ]
        image = read_image(rows[0].uri, job.decode)
        picture = render.draw(image if job.original_size else prepare(image), lines)
        on_figure(Store(job.output).write_figure(image_id, render.to_png(picture)))


def _count_if_short(source: ImageSource) -> tuple[Iterator[ImageRef], int | None]:
    """The images, and how many there are where that is soon known: a job starts before its list ends."""
    until = time.monotonic() + _COUNT_FOR
    images = iter(source)
    first: list[ImageRef] = []
    for image in images:
        first.append(image)
        if len(first) > _COUNTED or time.monotonic() > until:
            return chain(first, images), None
    if not first:
        raise ImageError(f"expected images, found none in {', '.join(source.sources)}")
    return iter(first), len(first)


def _by_image(results: Results) -> Iterator[tuple[str, list[MapRow]]]:
    """Rows of one image stand together, because they are committed together."""
    rows: list[MapRow] = []
    for row in results:
        if rows and row.image_id != rows[0].image_id:
            yield rows[0].image_id, rows
            rows = []
        rows.append(row)
    if rows:
        yield rows[0].image_id, rows


def _title(row: MapRow) -> str:
    name = f"{row.target_name} ({row.target})" if row.target_name else f"class {row.target}"
    return f"{row.target_role}\n{name}\nscore {row.score:.3f}"


def _drain(
    job: JobSpec,
    facts: ModelFacts,
    store: Store,
    reporter: Reporter,
    images: int | None,
    outcomes: Iterable[Finished | Failed],
) -> Summary:
    """Commit images as they end, in files of some rows each."""
    began = time.monotonic()
    reporter.start(images, job.explain.masks)
    store.begin(_job_file(job, facts, "running", None))
    maps = _Part(store.write_maps)
    errors = _Part(store.write_errors)
    done = failed = masks = 0
    for ended in outcomes:
        if isinstance(ended, Failed):
            failed += 1
            row = ErrorRow(ended.image.image_id, ended.image.uri, ended.failure.stage, ended.failure.message)
            reporter.note(f"error: {row.error}")
            errors.add([row])
        else:
            done += 1
            masks += ended.total.masks
            maps.add(_rows(job, facts, ended))
        reporter.image_done(isinstance(ended, Failed))
    maps.flush()
    errors.flush()
    summary = Summary(done, failed, maps.rows, masks, time.monotonic() - began)
    store.write_job(_job_file(job, facts, "done", summary))
    return summary


class _Part:
    """Rows on their way into numbered files, of which each has maps of one shape."""

    def __init__(self, write: Callable[[int, list[Any]], None]) -> None:
        self._write = write
        self._waiting: list[Any] = []
        self._files = self.rows = 0

    def add(self, rows: list[Any]) -> None:
        if self._waiting and _shape(self._waiting[0]) != _shape(rows[0]):
            self.flush()
        self._waiting += rows
        self.rows += len(rows)
        held = len(self._waiting) * 4 * int(np.prod(_shape(rows[0])))
        if len(self._waiting) >= _ROWS_PER_FILE or held >= _BYTES_PER_FILE:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self._write(self._files, self._waiting)
            self._files += 1
            self._waiting = []


def _shape(row: MapRow | ErrorRow) -> tuple[int, ...]:
    return row.map.shape if isinstance(row, MapRow) else (0,)


def _rows(job: JobSpec, facts: ModelFacts, ended: Finished) -> list[MapRow]:
    targets = ended.inspection.targets
    score = np.array([target.score for target in targets])
    result = explanation(job.explain, [target.index for target in targets], score, ended.total)
    size = ended.inspection.original_size if job.original_size else ended.inspection.size

    def sized(maps: np.ndarray) -> np.ndarray:
        return facts.preprocessing.to_original(maps, size) if job.original_size else maps

    return [
        MapRow(
            image_id=ended.image.image_id,
            uri=ended.image.uri,
            height=size[0],
            width=size[1],
            target=target.index,
            target_name=target.name,
            target_role=target.role,
            score=target.score,
            method=job.explain.method,
            colors=job.explain.colors,
            masks=result.masks,
            relative_error=float(error) if np.isfinite(error) else None,
            map=sized(result.maps[place]),
            baseline=sized(result.baseline[place : place + 1])[0],
            standard_error=sized(result.standard_error[place]) if job.standard_error else None,
            seconds=ended.seconds,
            spec_hash=job.explain.hash,
        )
        for place, (target, error) in enumerate(zip(targets, result.relative_error, strict=True))
    ]


def _job_file(job: JobSpec, facts: ModelFacts, state: str, summary: Summary | None) -> dict[str, Any]:
    return {
        "state": state,
        "spec": job.model_dump(mode="json"),
        "model": {
            "model": facts.model,
            "device": facts.device,
            "classes": facts.classes,
            "preprocessing": facts.preprocessing.model_dump(mode="json"),
        },
        "spec_hash": job.explain.hash,
        "counts": asdict(summary) if summary else None,
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("mcrise-ray", "torch", "torchvision", "ray", "numpy", "pyarrow")
            },
        },
    }


def _actors_that_fit(cpus_per_actor: int, gpus_per_actor: float) -> int:
    if gpus_per_actor:
        return max(1, int(torch.cuda.device_count() / gpus_per_actor))
    return max(1, (os.cpu_count() or 1) // cpus_per_actor)
