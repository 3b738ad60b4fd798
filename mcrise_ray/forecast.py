"""What a job will do, before it does it: images, units, model calls, bytes, and how long it may take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

import torch

from mcrise_ray.errors import ImageError
from mcrise_ray.explainer import DEFAULT_BATCH_SIZE, explain
from mcrise_ray.files import shown
from mcrise_ray.images import ImageSource, read_image
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.models import Model, load_model
from mcrise_ray.plan import unit_count, unit_size
from mcrise_ray.spec import ExplainSpec

_TRIED = 20  # images, until one can be decoded


@dataclass(frozen=True)
class Plan:
    """What a job will do, counted without a model.

    Attributes:
        images: listed; those with a problem will have an error row.
        complete: whether the listing came to its end.
        units: pieces of work that are handed out, retried and committed.
        masks: masked images that the model scores.
        model_calls: batches of them, and one call per image for the unmasked one.
        rows: of `maps/` at most: targets of an image that coincide share a row.
    """

    images: int
    complete: bool
    units: int
    masks: int
    model_calls: int
    rows: int


@dataclass(frozen=True)
class Probe:
    """What a short trial on this machine showed.

    Attributes:
        device: where the model ran.
        size: (H, W) of the maps.
        masks_per_second: of one actor with the job's cores.
        load_seconds: to build the model.
    """

    device: str
    size: tuple[int, int]
    masks_per_second: float
    load_seconds: float


def plan_job(job: JobSpec, *, seconds: float = 20.0) -> Plan:
    """Count what a job will do.

    Args:
        job: any.
        seconds: how long to list images at most.

    Raises:
        ImageError: a source is not there, or there are no images.
    """
    until = time.monotonic() + seconds
    source = ImageSource(job.images)
    count, targets, complete = 0, 0, True
    for image in source:
        count += 1
        targets += _targets(job, len(image.targets))
        if time.monotonic() > until:
            complete = False
            break
    if not count:
        raise ImageError(f"expected images, found none in {', '.join(map(shown, source.sources))}")
    return Plan(
        images=count,
        complete=complete,
        units=count * unit_count(job.explain),
        masks=count * job.explain.masks,
        model_calls=count * (1 + _batches(job.explain, _batch_size(job))),
        rows=targets,
    )


def probe_job(job: JobSpec, *, seconds: float = 2.0) -> Probe:
    """Build the model here, and explain a little of the first image that can be read.

    Raises:
        ModelError: the model cannot be built.
        ImageError: none of the first images can be read.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(job.cpus_per_actor)
    try:
        began = time.perf_counter()
        model = load_model(job.model)
        loaded = time.perf_counter() - began
        return _probe(job, model, loaded, seconds)
    finally:
        torch.set_num_threads(threads)


def output_bytes(job: JobSpec, plan: Plan, probe: Probe) -> int:
    """Bytes of the maps before compression, which saves little: maps are noisy numbers."""
    height, width = probe.size
    maps = job.explain.K if job.explain.method == "mc-rise" else 1
    planes = maps * (1 + job.standard_error) + 1  # the baseline is one more
    return plan.rows * planes * height * width * 4


def seconds_needed(plan: Plan, probe: Probe, actors: int) -> float:
    """How long the job takes with so many actors like the one that was tried."""
    return probe.load_seconds + plan.masks / (probe.masks_per_second * actors)


def _probe(job: JobSpec, model: Model, loaded: float, seconds: float) -> Probe:
    image = None
    for ref in islice(ImageSource(job.images), _TRIED):
        try:
            image = read_image(ref.uri, job.decode)
            break
        except ImageError as error:
            problem = error
    if image is None:
        raise ImageError(f"cannot read any of the first images: {problem}")
    prepared = model.prepare(image)

    batch_size = _batch_size(job)

    def run(masks: int) -> float:
        began = time.perf_counter()
        spec = job.explain.model_copy(update={"masks": masks})
        explain(model, prepared, spec=spec, batch_size=batch_size)
        return time.perf_counter() - began

    # The first batch pays for lazy start-ups; the second tells how many fit into the time.
    batch = min(batch_size, job.explain.masks)
    run(batch)
    masks = batch * max(1, int(seconds / run(batch)))
    size = image.shape[:2] if job.original_size else prepared.shape[:2]
    return Probe(str(model.device), (int(size[0]), int(size[1])), masks / run(masks), loaded)


def _batch_size(job: JobSpec) -> int:
    """What is asked for; where that is yet to be tried, what trials begin with."""
    return DEFAULT_BATCH_SIZE if job.batch_size == "auto" else job.batch_size


def _targets(job: JobSpec, of_manifest: int) -> int:
    """Rows that one image can have."""
    count = 0
    for target in job.targets:
        if target == "manifest":
            count += of_manifest
        elif isinstance(target, str) and target.startswith("top") and target[3:].isdigit():
            count += int(target[3:])
        else:
            count += 1
    return count


def _batches(spec: ExplainSpec, batch_size: int) -> int:
    """Calls of the model for the masks of one image: units do not share a batch."""
    whole, rest = divmod(spec.masks, unit_size(spec))
    return whole * -(-unit_size(spec) // batch_size) + -(-rest // batch_size)
