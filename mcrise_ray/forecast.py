"""What a job will do, before it does it: images, units, model calls, bytes, and how long it may take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import UInt8

from mcrise_ray.embed import read_pairs
from mcrise_ray.errors import ImageError
from mcrise_ray.explained import load_explained
from mcrise_ray.explainer import DEFAULT_BATCH_SIZE, explain
from mcrise_ray.files import shown
from mcrise_ray.images import ImageRef, ImageSource, read_image
from mcrise_ray.jobs import committed_of
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.plan import unit_count, unit_size
from mcrise_ray.precision import Execution
from mcrise_ray.reidspec import ReidSpec
from mcrise_ray.store import Committed, Store
from mcrise_ray.targets import check_source, summands
from mcrise_ray.tuning import settle

_TRIED = 20  # images, until one can be decoded


@dataclass(frozen=True)
class Plan:
    """What a job will do, counted without a model.

    Attributes:
        images: listed.
        complete: whether the listing came to its end.
        units: pieces of work that are handed out, retried and committed; at most, as all that follows,
            where the job asks for a relative error.
        masks: masked images that the model scores.
        model_calls: batches of them, and one call per image for the unmasked one; of a ReID job, those that
            embed as well.
        rows: of `maps/` at most: targets of an image that coincide share a row.
        gallery: images of the gallery of a ReID job.
        useless: images that cannot be explained, as their listing tells: with a problem, or without the
            label or the targets of their own that are asked for. Nothing else here counts them.
        done: images that earlier runs of the job have ended; nor them.
    """

    images: int
    complete: bool
    units: int
    masks: int
    model_calls: int
    rows: int
    gallery: int = 0
    useless: int = 0
    done: int = 0

    @property
    def left(self) -> int:
        """Images to explain."""
        return self.images - self.useless - self.done


@dataclass(frozen=True)
class Probe:
    """What a short trial on this machine showed.

    Attributes:
        device: where the model ran.
        size: (H, W) of the maps.
        masks_per_second: of one actor with the job's cores.
        load_seconds: to build the model and to choose how it is asked.
        execution: what was chosen, as the job would.
    """

    device: str
    size: tuple[int, int]
    masks_per_second: float
    load_seconds: float
    execution: Execution


def plan_job(job: JobSpec, *, overwrite: bool = False, seconds: float = 20.0) -> Plan:
    """Count what a job will do, or has left to do where its output holds some of it already.

    Args:
        job: any.
        overwrite: as `run_job` would be told.
        seconds: how long to list images at most.

    Raises:
        ImageError: a source is not there, or there are no images, or none of a gallery.
        TargetError: no image can have the label, or the targets of its own, asked for.
        StoreError: the output belongs to a job with other settings, or cannot be read.
    """
    committed = Committed.nothing() if overwrite else committed_of(job, Store(job.output))
    until = time.monotonic() + seconds
    source = ImageSource(job.images)
    check_source(job.targets, source)
    count, targets, useless, done, complete = 0, 0, 0, 0, True
    for image in source:
        count += 1
        if image.image_id in committed:
            done += 1
        elif _is_useless(job, image):
            useless += 1
        else:
            targets += _targets(job, len(image.targets))
        if time.monotonic() > until:
            complete = False
            break
    if not count:
        raise ImageError(f"expected images, found none in {', '.join(map(shown, source.sources))}")
    gallery, left = 0, count - useless - done
    if job.reid is not None:
        targets = _matches(job.reid, left)
        for _ in ImageSource(job.reid.gallery):
            gallery += 1
            if time.monotonic() > until:
                complete = False
                break
        if not gallery:
            where = ", ".join(map(shown, job.reid.gallery))
            raise ImageError(f"expected gallery images, found none in {where}; check --gallery")
    size = DEFAULT_BATCH_SIZE if job.batch_size == "auto" else job.batch_size
    return Plan(
        images=count,
        complete=complete,
        units=left * unit_count(job.explain),
        masks=left * job.explain.masks,
        model_calls=calls(job, left, size, gallery),
        rows=targets,
        gallery=gallery,
        useless=useless,
        done=done,
    )


def calls(job: JobSpec, images: int, batch_size: int, gallery: int) -> int:
    """Calls of the model for so many images, unmasked ones included: units do not share a batch."""
    embedding = 0 if job.reid is None else -(-(images + gallery) // batch_size)
    size = unit_size(job.explain)
    whole, rest = divmod(job.explain.masks, size)
    return embedding + images * (1 + whole * -(-size // batch_size) + -(-rest // batch_size))


def probe_job(job: JobSpec, *, masks: int | None = None, seconds: float = 2.0) -> Probe:
    """Build the model here, ask it as the job would, and explain a little of the first readable image.

    Args:
        job: any.
        masks: of the whole job, where that is known: trials that do not pay for so few are left out.
        seconds: of explaining, beside what it takes to choose how the model is asked.

    Raises:
        ModelError: the model cannot be built.
        ImageError: none of the first images can be read.
    """
    threads = torch.get_num_threads()
    if job.actors != 0:
        torch.set_num_threads(job.cpus_per_actor)
    try:
        return _probe(job, masks, seconds)
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
    asked = plan.masks + ((plan.images + plan.gallery) if plan.gallery else 0)  # embedded, one by one
    return probe.load_seconds + asked / (probe.masks_per_second * actors)


def _probe(job: JobSpec, masks: int | None, seconds: float) -> Probe:
    began = time.perf_counter()
    image = _first_image(job)
    explained = load_explained(job.model, job.explain, job.targets, job.reid, job.decode)
    settled = settle(
        explained.model,
        job.explain,
        image,
        scored=explained.scored,
        precision=job.precision,
        batch_size=job.batch_size,
        masks=masks and masks // max(1, job.fewest_actors),
    )
    ready = time.perf_counter()
    model, batch_size = settled.model, settled.execution.batch_size
    prepared = model.prepare(image)
    black_box = explained.scored(model, prepared)

    def run(masks: int) -> float:
        began = time.perf_counter()
        spec = job.explain.model_copy(update={"masks": masks, "relative_error": None})
        explain(black_box, prepared, spec=spec, batch_size=batch_size)
        return time.perf_counter() - began

    # The first batch pays for lazy start-ups; the second tells how many fit into the time.
    batch = min(batch_size, job.explain.masks)
    run(batch)
    tried = batch * max(1, int(seconds / run(batch)))
    size = image.shape[:2] if job.original_size else prepared.shape[:2]
    return Probe(
        str(model.device),
        (int(size[0]), int(size[1])),
        tried / run(tried),
        ready - began,
        settled.execution,
    )


def _first_image(job: JobSpec) -> UInt8[np.ndarray, "h w 3"]:
    """The first one that can be read."""
    problem = "there are none"
    for ref in islice(ImageSource(job.images), _TRIED):
        try:
            return read_image(ref.uri, job.decode)
        except ImageError as error:
            problem = str(error)
    raise ImageError(f"cannot read any of the first images: {problem}")


def _matches(reid: ReidSpec, queries: int) -> int:
    """Rows that so many queries can have."""
    named = 0 if reid.pairs is None else sum(map(len, read_pairs(reid.pairs).values()))
    nearest = max((int(word[3:]) for word in reid.matches if word.startswith("top")), default=0)
    return queries * (nearest + len({"correct", "wrong"}.intersection(reid.matches))) + named


def _is_useless(job: JobSpec, image: ImageRef) -> bool:
    """Whether it cannot be explained, as its listing tells."""
    asked = summands(job.targets)
    missing = image.label is None and "truth" in asked
    return image.problem is not None or missing or (not image.targets and "manifest" in asked)


def _targets(job: JobSpec, of_manifest: int) -> int:
    """Rows that one image can have."""
    count = 0
    for target in summands(job.targets):
        if target == "manifest":
            count += of_manifest
        elif isinstance(target, str) and target.startswith("top") and target[3:].isdigit():
            count += int(target[3:])
        else:
            count += 1
    return count
