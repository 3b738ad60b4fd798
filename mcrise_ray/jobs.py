"""A job: many images, one model, one spec, one output; in this process or on Ray."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np

from mcrise_ray import files
from mcrise_ray.access import refuse_secrets
from mcrise_ray.checkpoints import Checkpoints
from mcrise_ray.dispatch import Ledger
from mcrise_ray.engine import Engine, Executor
from mcrise_ray.errors import ImageError, SpecError, StoreError
from mcrise_ray.faults import Limits
from mcrise_ray.identity import Retrieval
from mcrise_ray.images import ImageRef, ImageSource, read_image
from mcrise_ray.jobspec import JobSpec, differences
from mcrise_ray.lease import Lease
from mcrise_ray.precision import Execution
from mcrise_ray.preprocess import Preprocessing
from mcrise_ray.progress import GALLERY, Quiet, Reporter
from mcrise_ray.recorder import Counts, Recorder
from mcrise_ray.reidjob import ReidJob, tell_changes
from mcrise_ray.results import Results, read_results
from mcrise_ray.rows import MapRow, MatchRow
from mcrise_ray.store import Committed, Store, figure_name
from mcrise_ray.targets import check_source
from mcrise_ray.tuning import as_named
from mcrise_ray.worker import Built, InProcess, Setup, Worker

_COUNTED = 1000  # shorter lists are counted before the start, for the progress bar
_COUNT_FOR = 0.5  # seconds
_TELL_EVERY = 5.0  # seconds of drawing


@dataclass(frozen=True)
class Summary:
    """What a job did, over all its runs where it was resumed.

    Attributes:
        images: explained.
        errors: images with an error row.
        rows: of `maps/`, one per image and target.
        masks: scored by this run.
        seconds: of this run, from the first task to the last result.
        earlier: images that earlier runs had committed.
        retries: calls handed out again, by reason.
        replaced: actors that were replaced.
        halved: calls repeated with half the batch for lack of memory; the last bits of their images may
            differ from those of an undisturbed run.
        missed: images of this run whose maps have a larger relative error than was asked for.
        unpicked: images of this run whose masks were not picked, though the estimator is `importance` and
            there were enough of them.
        retrieval: how well the queries of a ReID job were matched, where people are known.
    """

    images: int
    errors: int
    rows: int
    masks: int
    seconds: float
    earlier: int = 0
    retries: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    halved: int = 0
    missed: int = 0
    unpicked: int = 0
    retrieval: Retrieval | None = None


def run_job(
    job: JobSpec,
    reporter: Reporter | None = None,
    *,
    overwrite: bool = False,
    retry_errors: bool = False,
    address: str | None = None,
) -> Summary:
    """Run a job to its end; every image ends up in `maps/` or in `errors/`.

    Where the output holds results of the same job, finished or not, the job goes on from what is committed.
    Figures are not part of it: see `draw_figures`.

    Args:
        job: what to do.
        reporter: is told about progress; nobody by default.
        overwrite: replace results that are there; they stay if this job cannot even start.
        retry_errors: try again what has an error row by an earlier run; a job that is stopped meanwhile goes
            on so.
        address: of a Ray cluster; `auto` is one that runs on this machine. None starts one of our own.

    Raises:
        MCRiseError: the job cannot run at all: no images, no model, no output, no Ray; the output belongs to
            another job; or `overwrite` and `retry_errors` are both given.
    """
    if overwrite and retry_errors:
        raise SpecError("expected overwrite or retry_errors, found both; one removes what the other needs")
    refuse_secrets(job.model_dump(mode="json"))
    source = ImageSource(job.images)
    check_source(job.targets, source)
    reporter = Quiet() if reporter is None else reporter
    images, count = _count_if_short(source)
    store = Store(job.output)
    there = store.read_json("job.json")
    if there is not None and "identity" not in there:
        raise StoreError(
            f"expected an output of this job's own, found a job.json in {job.output} that no job of mcrise "
            "has written; choose another output"
        )
    lease = Lease(store)
    try:
        committed = Committed.nothing() if overwrite else committed_of(job, store)
        earlier: dict[str, Any] = (None if overwrite else store.read_json("job.json")) or {}
        if earlier:
            store.tidy()
        # A job that was stopped while it tried again has not finished that.
        retry_errors = retry_errors or bool(earlier.get("retry_errors"))
        trying_again = retry_errors and bool(committed.failed)
        if trying_again:
            reporter.note(f"trying {len(committed.failed)} images with errors again")
            committed = committed.without_errors()
        left = (image for image in images if image.image_id not in committed)
        first = next(left, None)
        if first is None and earlier.get("state") == "done" and not trying_again:
            reporter.note(f"all {len(committed)} images are done already in {job.output}")
            if job.reid is not None:
                tell_changes(job, None, reporter.note)
            summary = Summary(
                images=len(committed.explained),
                errors=len(committed.failed),
                rows=committed.rows,
                masks=0,
                seconds=0.0,
                earlier=len(committed),
                retrieval=Retrieval(**earlier["retrieval"]) if "retrieval" in earlier else None,
            )
            reporter.job_ended("done", {key: getattr(summary, key) for key in asdict(Counts())})
            return summary
        if len(committed):
            reporter.note(f"going on in {job.output}: {len(committed)} images are done")
        each = job.explain.masks if job.explain.relative_error is None else None
        # Error rows of a gallery are about none of the images that are counted here.
        of_gallery = sum(name.startswith(f"{GALLERY}:") for name in committed.failed) if job.reid else 0
        reporter.start(count, each, len(committed) - of_gallery)
        execution = _settled(job, earlier)
        setup = _setup(job, count, first or next(iter(source)))  # what is left may be no image
        if execution is not None:  # sessions of ONNX Runtime take their threads while the model is built
            setup = replace(setup, threads=execution.threads)
        begun = [] if first is None else [first]
        work = (
            chain(begun, left) if job.reid is None else ReidJob(job, committed, reporter.note, retry_errors)
        )
        if job.actors == 0:
            alone = InProcess(Worker(setup), execution)
            return _run(job, store, lease, committed, work, reporter, alone, overwrite, trying_again)
        from mcrise_ray import cluster

        with cluster.connect(job, setup, execution, address) as executor:
            return _run(job, store, lease, committed, work, reporter, executor, overwrite, trying_again)
    finally:
        lease.release()


def _run(
    job: JobSpec,
    store: Store,
    lease: Lease,
    committed: Committed,
    work: Iterator[ImageRef] | ReidJob,
    reporter: Reporter,
    executor: Executor,
    overwrite: bool,
    forget_errors: bool,
) -> Summary:
    """Run the engine, and leave the output in order however that ends."""
    began = time.monotonic()
    checkpoints = Checkpoints(store, reporter.note)
    saved = (lambda _: None) if overwrite else checkpoints.take
    reid = work if isinstance(work, ReidJob) else None
    ledger = work.ledger(saved) if isinstance(work, ReidJob) else Ledger(work, job.explain, saved=saved)
    recorder = Recorder(
        job,
        store,
        lease,
        checkpoints,
        committed,
        ledger,
        reporter,
        clear=overwrite,
        forget_errors=forget_errors,
        check=lambda built: _check_model(built, None if overwrite else store.read_json("job.json"), reid),
        on_built=(lambda _: None) if reid is None else lambda built: reid.begin(built.facts),
    )
    engine = Engine(ledger, executor, recorder, Limits(max_retries=job.max_retries, deadline=job.deadline))
    tally = engine.tally
    try:
        engine.run()
    except BaseException as error:
        state = "stopped" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        with suppress(StoreError):  # the store may be what failed; either way `error` is what to tell
            recorder.close(state, faults=asdict(tally), error=str(error))
        raise
    finally:
        if reid is not None:
            reid.close()
    retrieval = None if reid is None else reid.retrieval
    told = {} if retrieval is None else {"retrieval": asdict(retrieval)}
    recorder.close("done", faults=asdict(tally), **told)
    counts = recorder.counts
    return Summary(
        **vars(counts),
        seconds=time.monotonic() - began,
        retries=tally.retries,
        replaced=tally.replaced,
        halved=tally.halved,
        retrieval=retrieval,
    )


def committed_of(job: JobSpec, store: Store) -> Committed:
    """What earlier runs of this very job have committed.

    Raises:
        StoreError: the output belongs to a job with other settings, or to nobody knows which.
    """
    there = store.read_json("job.json")
    if there is None:
        if store.parts("maps") or store.parts("errors"):
            raise StoreError(
                f"expected a job.json beside the results in {job.output}, found none: nobody knows of which "
                "job they are; choose another --output, or say --overwrite where the job is not submitted"
            )
        return Committed.nothing()
    differing = differences(there.get("identity", {}), job.identity)
    if differing:
        raise StoreError(
            f"expected an output without results or with those of the same job, found in {job.output} a job "
            f"with other settings ({'; '.join(differing)}); choose another --output, or say "
            "--overwrite where the job is not submitted"
        )
    return store.committed()


def _check_model(built: Built, there: dict[str, Any] | None, reid: ReidJob | None) -> None:
    """Results that are there, unless older than probes, come from this model: its file may hold another."""
    if reid is not None:
        reid.check(built.facts)
    elif there is not None and not built.facts.is_model_of(there["model"].get("probe", built.facts.probe)):
        raise StoreError(
            "expected the model that made the results in --output, found one whose answers to noise are "
            "others; take the weights of then, choose another --output, or say --overwrite"
        )


def _settled(job: JobSpec, earlier: dict[str, Any]) -> Execution | None:
    """How the model is asked: as by an earlier run, or where the job leaves nothing to try."""
    if "execution" in earlier:
        return Execution.model_validate(earlier["execution"])
    if job.precision == "auto" or job.batch_size == "auto" or job.actors == 0:
        return None
    return as_named(job.precision, job.batch_size, job.explain, job.cpus_per_actor)


def _setup(job: JobSpec, images: int | None, sample: ImageRef) -> Setup:
    masks = None if images is None else images * job.explain.masks // max(1, job.fewest_actors)
    threads = None if job.actors == 0 else job.cpus_per_actor
    return Setup(
        model=job.model,
        spec=job.explain,
        targets=job.targets,
        decode=job.decode,
        precision=job.precision,
        batch_size=job.batch_size,
        threads=threads,
        masks=masks,
        sample=sample,
        reid=job.reid,
        gpus=job.gpus_per_actor,
    )


def draw_figures(job: JobSpec, reporter: Reporter) -> list[str]:
    """Draw the first `job.figures` images of a finished job beside its maps, from what was committed.

    Images are read once more; one that cannot be read now has no figure, which the reporter is told. Figures
    that are there stay: they go with their maps, which never change.

    Returns:
        Where the figures are.
    """
    from mcrise_ray import render

    drawn: list[str] = []
    without_glyphs = 0
    told = time.monotonic()
    store = Store(job.output)
    there = set(store.files("figures"))
    results = read_results(job.output)
    prepare = Preprocessing(**results.job["model"]["preprocessing"]).prepare

    def shown(uri: str) -> np.ndarray:
        image = read_image(uri, job.decode)
        return image if job.original_size else prepare(image)

    for image_id, rows in islice(_by_image(results), job.figures):
        name = figure_name(image_id)
        if name in there:
            drawn.append(name)
            continue
        try:
            image = shown(rows[0].uri)
            matches = [_match(row, shown) for row in rows[: render.MOST_LINES]]
        except ImageError as error:
            reporter.note(f"no figure of {image_id}: {error}")
            continue
        lines = [
            render.FigureRow(_title(row), row.method, row.colors, row.map, row.relative_error, match)
            for row, match in zip_longest(rows, matches)
        ]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            png = render.to_png(render.draw(image, lines))
        without_glyphs += any("missing from font" in str(warning.message) for warning in caught)
        store.write_figure(image_id, png)
        drawn.append(name)
        if time.monotonic() - told > _TELL_EVERY:
            told = time.monotonic()
            reporter.note(f"{len(drawn)} figures drawn, of {job.figures} at most")
    if without_glyphs:
        reporter.note(
            f"names in {without_glyphs} figures have characters that their font lacks; name a font that has "
            "them in font.family of a matplotlibrc"
        )
    return [files.join(job.output, name) for name in drawn]


def _count_if_short(source: ImageSource) -> tuple[Iterator[ImageRef], int | None]:
    """The images, and how many there are where that is soon known: a job starts before its list ends."""
    images = iter(source)
    first = list(islice(images, 1))  # for which modules are loaded, and sources opened
    until = time.monotonic() + _COUNT_FOR
    for image in images:
        first.append(image)
        if len(first) > _COUNTED or time.monotonic() > until:
            return chain(first, images), None
    if not first:
        raise ImageError(f"expected images, found none in {', '.join(map(files.shown, source.sources))}")
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


def _match(row: MapRow, shown: Callable[[str], np.ndarray]) -> tuple[str, np.ndarray] | None:
    """The picture beside a query."""
    if not isinstance(row, MatchRow):
        return None
    place = f"rank {row.rank}, distance {row.distance:.3g}"
    return f"{row.target_role}\n{row.match_id[-30:]}\n{place}", shown(row.match_uri)


def _title(row: MapRow) -> str:
    if isinstance(row, MatchRow):
        return f"query\n{row.image_id[-30:]}\nscore {row.score:.3g}"
    name = f"{row.target_name}\n" if row.target_name else ""
    return f"{row.target_role}, class {row.target}\n{name}score {row.score:.3g}"
