"""Bookkeeping of images that are embedded, chunk by chunk, before any of them is explained.

It is handed to the same engine as the `Ledger` of what is explained, which follows it on the same actors.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from mcrise_ray.dispatch import Ledger
from mcrise_ray.embed import Chunk, GalleryRow
from mcrise_ray.explainer import DEFAULT_BATCH_SIZE
from mcrise_ray.images import ImageRef
from mcrise_ray.rows import ErrorRow
from mcrise_ray.tasks import Call, Embedded, EmbedTask, Ended, Failure, Outcome, Saved, Task

_BACKLOG = 16  # chunks that may wait to be written
_TELL_EVERY = 5.0  # seconds

Commit = Callable[[list[GalleryRow], list[ErrorRow]], None]


@dataclass
class _Open:
    """A chunk that is handed out: what is there of it, by place."""

    chunk: Chunk
    commit: Commit
    parts: dict[int, Embedded] = field(default_factory=dict)
    images: int = 0


class EmbeddingLedger:
    """The state of a job's chunks; implements `Bookkeeping`.

    A chunk is one task. Where it fails, or is given up, its images become tasks of their own: an image that
    takes its worker with it costs no other its row.

    Args:
        chunks: those that are missing, listed lazily, each with what commits it.
        then: the ledger that follows, for a batch size; called when every chunk is committed.
        note: told now and then how far it is.

    Attributes:
        batch_size: images per call of the model, of new calls.
        embedded: images, by this run; those that could not be are among them.
    """

    def __init__(
        self,
        chunks: Iterable[tuple[Chunk, Commit]],
        then: Callable[[int], Ledger],
        note: Callable[[str], None],
    ) -> None:
        self.batch_size = DEFAULT_BATCH_SIZE
        self._chunks = iter(chunks)
        self._then, self._note = then, note
        self._successor: Ledger | None = None
        self._open: dict[str, _Open] = {}
        self._again: deque[Call] = deque()
        self._attempts: dict[Task, int] = {}
        self._listed_all = False
        self._writer = ThreadPoolExecutor(1, "gallery")
        self._backlog: deque[Future[None]] = deque()
        self._seconds = 0.0  # of the last chunk
        self.embedded = self._errors = self._begun = 0
        self._began = self._told = time.monotonic()

    @property
    def finished(self) -> bool:
        """See `Bookkeeping`."""
        return self._listed_all and not self._open

    @property
    def has_work(self) -> bool:
        """See `Bookkeeping`."""
        return bool(self._again) or not self._listed_all

    @property
    def seconds_per_unit(self) -> float:
        """See `Bookkeeping`: a unit is a chunk."""
        return self._seconds

    @property
    def kept(self) -> int:
        """See `Bookkeeping`: those of its successor."""
        return 0 if self._successor is None else self._successor.kept

    def successor(self) -> Ledger:
        """See `Bookkeeping`; waits until every chunk is committed."""
        if self._successor is None:
            while self._backlog:
                self._backlog.popleft().result()
            self._writer.shutdown()
            if self.embedded:
                self._note(self._state())
            self._successor = self._then(self.batch_size)
        return self._successor

    def next_call(self, worker: int) -> Call | None:
        """See `Bookkeeping`."""
        if self._again:
            return self._again.popleft()
        chunk, commit = next(self._chunks, (None, None))
        if chunk is None or commit is None:
            self._listed_all = True
            return None
        self._begun += 1  # tells chunks of one name apart: queries may be the gallery
        name = f"{self._begun}:{chunk.name}"
        self._open[name] = _Open(chunk, commit)
        return Call((EmbedTask(name, 0, chunk.refs),), self.batch_size)

    def returned(self, call: Call, outcomes: Iterable[Outcome]) -> list[Ended]:
        """See `Bookkeeping`; no image of a gallery ends a job's image."""
        for task, outcome in zip(call.tasks, outcomes, strict=True):
            assert isinstance(task, EmbedTask)
            self._attempts.pop(task, None)
            if isinstance(outcome, Embedded):
                self._seconds = outcome.seconds
                self._take(task, outcome)
            else:
                assert isinstance(outcome, Failure)
                self._fail(task, call.batch_size, outcome)
        return []

    def requeue(self, call: Call, *, strike: bool, halve: bool = False) -> None:
        """See `Bookkeeping`."""
        (task,) = call.tasks
        if strike:
            self._attempts[task] = self.attempts(call) + 1
        self._again.append(Call((task,), max(1, call.batch_size // 2) if halve else call.batch_size))

    def attempts(self, call: Call) -> int:
        """See `Bookkeeping`."""
        return self._attempts.get(call.tasks[0], 0)

    def give_up(self, call: Call, failure: Failure) -> list[Ended]:
        """See `Bookkeeping`."""
        return self.returned(call, [failure])

    def forget(self, worker: int) -> None:
        """See `Bookkeeping`; a worker has nothing here but its calls."""

    def unfinished(self) -> Iterator[tuple[ImageRef, Saved]]:
        """See `Bookkeeping`: those of its successor."""
        if self._successor is not None:
            yield from self._successor.unfinished()

    def close(self) -> None:
        """Let nothing be written any more when this returns."""
        self._writer.shutdown(cancel_futures=True)

    def _take(self, task: EmbedTask, found: Embedded) -> None:
        there = self._open[task.chunk]
        if task.place in there.parts:
            return
        there.parts[task.place] = found
        there.images += len(task.refs)
        self.embedded += len(task.refs)
        self._errors += len(found.errors)
        if there.images == len(there.chunk.refs):
            del self._open[task.chunk]
            parts = [there.parts[place] for place in sorted(there.parts)]
            rows = [row for part in parts for row in part.rows]
            errors = [error for part in parts for error in part.errors]
            while len(self._backlog) >= _BACKLOG or (self._backlog and self._backlog[0].done()):
                self._backlog.popleft().result()
            self._backlog.append(self._writer.submit(there.commit, rows, errors))
        if time.monotonic() - self._told > _TELL_EVERY:
            self._told = time.monotonic()
            self._note(self._state())

    def _fail(self, task: EmbedTask, batch_size: int, failure: Failure) -> None:
        if len(task.refs) > 1:
            for place, ref in enumerate(task.refs, start=task.place):
                self._again.append(Call((EmbedTask(task.chunk, place, (ref,)),), batch_size))
        else:
            error = ErrorRow(task.image.image_id, task.image.uri, "embed", failure.message)
            self._take(task, Embedded([], [error], 0.0))

    def _state(self) -> str:
        rate = self.embedded / max(time.monotonic() - self._began, 1e-9)
        errors = f", {self._errors} errors" if self._errors else ""
        return f"embedded {self.embedded:,} images of queries and gallery ({rate:,.0f} images/s{errors})"
