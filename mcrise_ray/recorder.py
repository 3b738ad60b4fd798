"""From images as they end to committed files: rows, checkpoints, progress, without holding up the loop."""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from mcrise_ray import progressfile
from mcrise_ray.bookkeeping import Bookkeeping
from mcrise_ray.checkpoints import Checkpoints
from mcrise_ray.errors import StoreError
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.lease import Lease
from mcrise_ray.models import ModelFacts
from mcrise_ray.plan import stages
from mcrise_ray.progress import Reporter
from mcrise_ray.rows import ErrorRow, MapRow, MatchRow
from mcrise_ray.store import Committed, Store
from mcrise_ray.tasks import Ended, Failed, Finished, GalleryMatch, Query, Target
from mcrise_ray.worker import Built

_ROWS_PER_FILE = 64
_BYTES_PER_FILE = 256 * 2**20  # maps at the size of photographs are large
_COMMIT_EVERY = 30.0  # seconds that a finished image may wait for others to share its file
_SAVE_EVERY = 60.0  # seconds between looks for sums worth saving
_SAVE_AFTER = 60.0  # seconds of work on one image that are worth saving
_PROGRESS_EVERY = 5.0  # seconds
_OF_LATE = 1000  # images whose relative errors are told
_BACKLOG = 32  # finished images that may wait to be written


@dataclass
class Counts:
    """What has become of the images: `earlier` of them in runs before this one; in this one, `missed` of them
    the relative error that was asked for, and `unpicked` of them had no masks picked, which was asked for
    and for which there were masks enough.
    """

    images: int = 0
    errors: int = 0
    rows: int = 0
    masks: int = 0
    earlier: int = 0
    missed: int = 0
    unpicked: int = 0


class Recorder:
    """Where the engine's results go: implements `engine.Sink`.

    Rows are made and written in a thread of its own, in the order of arrival, so that the loop goes on
    handing out work meanwhile; what that thread raises is raised by the next call.

    Args:
        job: what is being done.
        store: where results go.
        lease: on the output; kept alive here.
        checkpoints: where sums of unfinished images go.
        committed: what earlier runs have finished.
        ledger: asked for unfinished images.
        reporter: told about progress.
        clear: delete what the output holds once the model is built.
        forget_errors: delete its error rows then.
        check: called before that; what it raises leaves the output as it is.
        on_built: called after that.
    """

    def __init__(
        self,
        job: JobSpec,
        store: Store,
        lease: Lease,
        checkpoints: Checkpoints,
        committed: Committed,
        ledger: Bookkeeping,
        reporter: Reporter,
        clear: bool,
        forget_errors: bool,
        check: Callable[[Built], None],
        on_built: Callable[[Built], None],
    ) -> None:
        self.counts = Counts(
            images=len(committed.explained),
            errors=len(committed.failed),
            rows=committed.rows,
            earlier=len(committed.explained) + len(committed.failed),
        )
        self._job, self._store, self._lease, self._checkpoints = job, store, lease, checkpoints
        self._ledger, self._reporter, self._clear = ledger, reporter, clear
        self._check, self._on_built = check, on_built
        self._forget_errors = forget_errors
        self._until_done = {"retry_errors": True} if forget_errors else {}  # a stopped job goes on so
        self._built: Built | None = None
        self._retries = self._actors = self._kept = 0
        self._relative_errors: deque[float] = deque(maxlen=_OF_LATE)
        self._maps = _Part(store.write_maps, committed.next_part)
        self._errors = _Part(store.write_errors, committed.next_part)
        self._writer = ThreadPoolExecutor(1, "writer")
        self._backlog: deque[Future[None]] = deque()
        self._saved_seconds: dict[str, float] = {}
        self._scoring: tuple[float, int] | None = None  # since when, and how many came at once then
        self._saved_at = self._progress_at = time.monotonic()

    def built(self, built: Built) -> None:
        """See `Sink`."""
        if self._built is not None:
            built.facts.check_is_model_of(self._built.facts)
            return
        self._check(built)
        self._built = built
        self._ledger.batch_size = built.execution.batch_size
        self._reporter.note(f"model {built.facts.model} on {built.facts.device}: {built.execution}")
        if self._job.model.is_untrained:
            self._reporter.note("its weights are random: give --weights, or ?weights= in --model")
        if self._job.model.guesses_normalisation:
            usual = built.facts.preprocessing
            self._reporter.note(
                f"--weights do not say how images are normalised: taken are mean {list(usual.mean)} and std "
                f"{list(usual.std)}; if they were trained with others, give --mean and --std"
            )
        if self._clear:
            self._store.clear()
        elif self._forget_errors:
            self._store.forget_errors()
        self._store.write_job(job_file(self._job, built, "running", **self._until_done))
        self._on_built(built)

    def ended(self, image: Ended) -> None:
        """See `Sink`."""
        self._write(lambda: self._record(image))
        if isinstance(image, Failed):
            self.counts.errors += 1
            failure = image.failure
            self._reporter.image_failed(image.image.image_id, failure.stage, failure.message)
            return
        self.counts.images += 1
        self.counts.rows += len(image.inspection.targets)
        self._reporter.image_done(image.explanation.masks)
        worst = float(np.max(image.explanation.relative_error))
        wanted = self._job.explain.relative_error
        errors = image.explanation.relative_error.tolist()
        self.counts.missed += wanted is not None and any(error > wanted for error in errors)
        spec = self._job.explain
        self.counts.unpicked += bool(stages(spec, 1)) and image.explanation.estimator != spec.estimator
        if np.isfinite(worst):
            self._relative_errors.append(worst)
            self._reporter.relative_error(float(np.median(self._relative_errors)))

    def masks_done(self, masks: int) -> None:
        """See `Sink`."""
        if self._scoring is None:  # what came before was no pace of masks
            self._scoring = time.monotonic(), masks
        self.counts.masks += masks
        if (taken_up := self._ledger.kept - self._kept) > 0:
            self._kept += taken_up
            self._reporter.note(
                f"{taken_up:,} masks that earlier runs scored of unfinished images are taken up"
            )
            self._reporter.masks_kept(self._kept)
        self._reporter.masks_done(masks)

    def retried(self, reason: str, text: str) -> None:
        """See `Sink`."""
        self._retries += 1
        self._reporter.retried(reason, text)

    def actors_alive(self, actors: int) -> None:
        """See `Sink`."""
        self._actors = actors
        self._reporter.actors_alive(actors)

    def note(self, text: str) -> None:
        """See `Sink`."""
        self._reporter.note(text)

    def tick(self) -> None:
        """Commit what has waited long enough, save sums of long images, tell how far the job is."""
        self._lease.renew()
        while self._backlog and self._backlog[0].done():
            self._backlog.popleft().result()
        now = time.monotonic()
        if now - self._progress_at >= _PROGRESS_EVERY:
            self._progress_at = now
            self._write(lambda: self._flush(older_than=_COMMIT_EVERY))
            self._write_progress("running")
        if now - self._saved_at >= _SAVE_EVERY:
            self._saved_at = now
            self._save(_SAVE_AFTER)

    def close(self, state: str, **more: Any) -> None:
        """Commit everything, and say in `job.json` how the job ended.

        Args:
            state: `done`, `stopped` or `failed`; unfinished images are saved unless it is done.
            more: kept in `job.json`.

        Raises:
            StoreError: the rest cannot be written, or another driver has taken over.
        """
        try:
            self._lease.renew()
            self._write(self._flush)
            if state != "done":
                self._save(0.0)
            while self._backlog:
                self._backlog.popleft().result()
            if state == "done":
                self._checkpoints.clear()
            self._write_end(state, more)
        except StoreError as error:
            failed = {"error": str(error), **more}
            self._tell_end("failed", failed)
            self._write_end("failed", failed)  # a disk that is too full for maps may have room for a line
            raise
        finally:  # nothing is being written any more when this returns, even where the store has failed
            self._writer.shutdown(cancel_futures=True)
        self._tell_end(state, more)

    def _tell_end(self, state: str, more: dict[str, Any]) -> None:
        self._reporter.job_ended(state, {**asdict(self.counts), **more})

    def _write_end(self, state: str, more: dict[str, Any]) -> None:
        self._lease.renew()  # where another driver has taken over, nothing is ours to write any more
        self._write_progress(state)
        if self._built is not None:
            kept = {} if state == "done" else self._until_done
            told = {**kept, "counts": asdict(self.counts), **more}
            self._store.write_job(job_file(self._job, self._built, state, **told))

    def _write(self, action: Callable[[], None]) -> None:
        while len(self._backlog) >= _BACKLOG:
            self._backlog.popleft().result()
        self._backlog.append(self._writer.submit(action))

    def _record(self, ended: Ended) -> None:
        if isinstance(ended, Failed):
            image, failure = ended.image, ended.failure
            self._errors.add([ErrorRow(image.image_id, image.uri, failure.stage, failure.message)])
        else:
            assert self._built is not None
            self._maps.add(map_rows(self._job, self._built.facts, ended))

    def _flush(self, older_than: float = 0.0) -> None:
        for part in (self._maps, self._errors):
            for image_id in part.flush(older_than):
                self._checkpoints.delete(image_id)

    def _save(self, after: float) -> None:
        """Save sums with at least so many seconds of work that are not saved yet."""
        open_images = list(self._ledger.unfinished())
        self._saved_seconds = {
            image.image_id: self._saved_seconds.get(image.image_id, 0.0) for image, _ in open_images
        }
        for image, saved in open_images:
            if saved.seconds - self._saved_seconds[image.image_id] > after:
                self._write(partial(self._checkpoints.write, image.image_id, saved))
                self._saved_seconds[image.image_id] = saved.seconds

    def _write_progress(self, state: str) -> None:
        since, first = self._scoring or (time.monotonic(), 0)
        seconds = time.monotonic() - since
        told = {
            "state": state,
            "job": self._job.hash,
            "images_done": self.counts.images,
            "errors": self.counts.errors,
            "masks_done": self.counts.masks,
            "masks_per_second": (self.counts.masks - first) / seconds if seconds > 0 else 0.0,
            **self._reporter.outlook(),
            **({"seconds_left": 0.0} if state == "done" else {}),  # images may have taken fewer masks
            "relative_error": float(np.median(errors)) if (errors := self._relative_errors) else None,
            "actors": self._actors,
            "retries": self._retries,
            "embedded": self._ledger.embedded,
            "updated": time.strftime(progressfile.TIME),
        }
        self._store.write_json(progressfile.NAME, told)


@dataclass
class _Part:
    """Rows on their way into numbered files, of which each has maps of one shape."""

    write: Callable[[int, list[Any]], None]
    number: int
    waiting: list[Any] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    since: float = 0.0

    def add(self, rows: Sequence[Any]) -> None:
        if self.waiting and _shape(self.waiting[0]) != _shape(rows[0]):
            self._commit()
        if not self.waiting:
            self.since = time.monotonic()
        self.waiting += rows
        held = len(self.waiting) * 4 * int(np.prod(_shape(rows[0])))
        if len(self.waiting) >= _ROWS_PER_FILE or held >= _BYTES_PER_FILE:
            self._commit()

    def flush(self, older_than: float) -> list[str]:
        """Commit rows that have waited so long; returns the images committed since the last flush."""
        if self.waiting and time.monotonic() - self.since >= older_than:
            self._commit()
        written, self.written = self.written, []
        return written

    def _commit(self) -> None:
        self.write(self.number, self.waiting)
        self.number += 1
        self.written += {row.image_id: None for row in self.waiting}
        self.waiting = []


def _shape(row: MapRow | ErrorRow) -> tuple[int, ...]:
    return row.map.shape if isinstance(row, MapRow) else (0,)


def map_rows(job: JobSpec, facts: ModelFacts, ended: Finished) -> Sequence[MapRow]:
    """The rows of one explained image, one per target."""
    image, targets, result = ended.image, ended.inspection.targets, ended.explanation
    size = ended.inspection.original_size if job.original_size else ended.inspection.size

    def sized(maps: np.ndarray) -> np.ndarray:
        return facts.preprocessing.to_original(maps, size) if job.original_size else maps

    rows = [
        MapRow(
            image_id=image.image_id,
            uri=image.uri,
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
    if not isinstance(image, Query):
        return rows
    return [match_row(*those, image) for those in zip(rows, targets, image.matches, strict=True)]


def match_row(row: MapRow, target: Target, match: GalleryMatch, query: Query) -> MatchRow:
    """The row of one explained match."""
    assert target.distance is not None
    assert target.d0 is not None
    return MatchRow(
        **vars(row),
        match_id=match.image_id,
        match_uri=match.uri,
        distance=target.distance,
        d0=target.d0,
        rank=match.rank,
        pid=query.pid,
        camid=query.camid,
        match_pid=match.pid,
        match_camid=match.camid,
    )


def job_file(job: JobSpec, built: Built, state: str, **more: Any) -> dict[str, Any]:
    """The content of `job.json`."""
    libraries = ("mcrise-ray", "torch", "torchvision", "ray", "numpy", "pyarrow")
    facts = built.facts
    return {
        "state": state,
        "spec": job.model_dump(mode="json"),
        "identity": job.identity,
        "model": {
            "model": facts.model,
            "device": facts.device,
            "classes" if job.reid is None else "dimensions": facts.classes,
            "preprocessing": facts.preprocessing.model_dump(mode="json"),
            **({"probe": facts.probe} if job.reid is None else {}),  # that of an embedder is with its gallery
        },
        "execution": built.execution.model_dump(mode="json"),
        "spec_hash": job.explain.hash,
        **more,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
    }
