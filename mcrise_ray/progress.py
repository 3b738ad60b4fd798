"""How long work shows itself: a bar on a terminal, plain lines or JSON objects in a log."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Protocol, TextIO, TypeVar, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from mcrise_ray.errors import SpecError
from mcrise_ray.files import shown

LOG_VARIABLE: Final = "MCRISE_LOG"
"""The environment variable that chooses how a job logs: `plain` or `json`."""

GALLERY: Final = "gallery"
"""The stage of error rows that are about images of a gallery, which are none of those that are explained."""

LogFormat = Literal["plain", "json"]

_LOG_EVERY = 5.0  # seconds


@runtime_checkable
class Reporter(Protocol):
    """Told about progress by a running job; says nothing of its own accord."""

    def start(self, images: int | None, masks_per_image: int | None, done: int = 0) -> None:
        """Work begins; the number of images may be unknown, or that of masks, where images end when they have
        enough, and some images done by an earlier run.
        """
        ...

    def masks_done(self, masks: int) -> None:
        """Some masks have been scored."""
        ...

    def masks_kept(self, masks: int) -> None:
        """So many masks, in all, of images that are gone on with had been scored by earlier runs."""
        ...

    def image_done(self, masks: int) -> None:
        """An image has been explained by so many masks."""
        ...

    def image_failed(self, image_id: str, stage: str, message: str) -> None:
        """An image has got an error row."""
        ...

    def retried(self, reason: str, text: str) -> None:
        """A call is handed out again; reasons are few and fixed, the text is a line about it."""
        ...

    def actors_alive(self, actors: int) -> None:
        """So many actors hold the model now; 0 at the end."""
        ...

    def relative_error(self, error: float) -> None:
        """The median over the images of late, of each its worst map's."""
        ...

    def note(self, text: str) -> None:
        """A line worth keeping."""
        ...

    def outlook(self) -> dict[str, Any]:
        """`images_total` and `seconds_left`, None where unknown: for those who read the progress file."""
        ...

    def job_ended(self, state: str, facts: dict[str, Any]) -> None:
        """The job is `done`, `stopped` or `failed`; what has become of it in numbers."""
        ...


class Quiet:
    """A reporter that says nothing."""

    def start(self, images: int | None, masks_per_image: int | None, done: int = 0) -> None:
        """See `Reporter`."""

    def masks_done(self, masks: int) -> None:
        """See `Reporter`."""

    def masks_kept(self, masks: int) -> None:
        """See `Reporter`."""

    def image_done(self, masks: int) -> None:
        """See `Reporter`."""

    def image_failed(self, image_id: str, stage: str, message: str) -> None:
        """See `Reporter`."""

    def retried(self, reason: str, text: str) -> None:
        """See `Reporter`."""

    def actors_alive(self, actors: int) -> None:
        """See `Reporter`."""

    def relative_error(self, error: float) -> None:
        """See `Reporter`."""

    def note(self, text: str) -> None:
        """See `Reporter`."""

    def outlook(self) -> dict[str, Any]:
        """See `Reporter`."""
        return {"images_total": None, "seconds_left": None}

    def job_ended(self, state: str, facts: dict[str, Any]) -> None:
        """See `Reporter`."""


@dataclass
class _Pace:
    """What a reporter has been told, and what follows from it."""

    began: float
    images: int | None = None
    masks_per_image: int | None = 0
    earlier: int = 0
    masks: int = 0
    kept: int = 0
    done_masks: int = 0
    first: float = 0.0
    first_masks: int = 0
    done: int = 0
    failed: int = 0
    gallery_failed: int = 0
    retries: int = 0
    actors: int = 0
    relative_error: float | None = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def ended(self) -> int:
        """Images, in earlier runs too."""
        return self.earlier + self.done + self.failed

    @property
    def rate(self) -> float:
        """Masks per second, since the first ones: what came before them were models on their way."""
        took = time.monotonic() - self.first
        if self.masks > self.first_masks and took > 0:
            return (self.masks - self.first_masks) / took
        return self.masks / self.elapsed if self.elapsed > 0 else 0.0

    def score(self, masks: int) -> None:
        if not self.masks:
            self.first, self.first_masks = time.monotonic(), masks
        self.masks += masks

    @property
    def usual_masks(self) -> float | None:
        """Of an image: the mean of those that are done; None where there are none yet and nobody can tell."""
        return self.done_masks / self.done if self.done else self.masks_per_image

    @property
    def ended_masks(self) -> float:
        """Of the images of this run, those that images with errors will not need among them."""
        return self.masks + self.kept + self.failed * (self.usual_masks or 0)

    @property
    def all_masks(self) -> float | None:
        """Of the images of this run, as far as can be told."""
        each = self.usual_masks
        return (self.images - self.earlier) * each if self.images is not None and each else None

    @property
    def seconds_left(self) -> float | None:
        """At the pace since the first masks, once that has shown."""
        each, has_pace = self.usual_masks, self.masks > self.first_masks
        if self.images is None or each is None or not has_pace or time.monotonic() - self.first < _LOG_EVERY:
            return None
        to_do = (self.images - self.earlier - self.failed) * each - self.masks - self.kept
        return max(to_do, 0) / self.rate


_Kind = TypeVar("_Kind", bound="_Tracking")


class _Tracking(ABC):
    """A reporter that keeps count; how it shows is up to its kinds."""

    def __init__(self) -> None:
        self._shown = time.monotonic()
        self._pace = _Pace(self._shown)
        self._end: Callable[[], None] = lambda: None

    def __enter__(self: _Kind) -> _Kind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self.close()

    def start(self, images: int | None, masks_per_image: int | None, done: int = 0) -> None:
        """See `Reporter`."""
        self._shown = time.monotonic()
        self._pace = _Pace(self._shown, images, masks_per_image, done)
        self.tell("start", images_total=images, images_done=done, masks_per_image=masks_per_image)
        self._show()

    def masks_done(self, masks: int) -> None:
        """See `Reporter`."""
        self._pace.score(masks)
        self._show()

    def masks_kept(self, masks: int) -> None:
        """See `Reporter`."""
        self._pace.kept = masks

    def image_done(self, masks: int) -> None:
        """See `Reporter`."""
        self._pace.done += 1
        self._pace.done_masks += masks
        self._show()

    def image_failed(self, image_id: str, stage: str, message: str) -> None:
        """See `Reporter`."""
        if stage == GALLERY:
            self._pace.gallery_failed += 1
        else:
            self._pace.failed += 1
        text = message if f"{shown(image_id)}:" in message else f"{image_id}: {message}"
        self.tell("error_row", f"error: {text}", "error", image_id=image_id, stage=stage)
        self._show()

    def retried(self, reason: str, text: str) -> None:
        """See `Reporter`."""
        self._pace.retries += 1
        self.tell("retry", text, "warning", reason=reason)

    def actors_alive(self, actors: int) -> None:
        """See `Reporter`."""
        self._pace.actors = actors

    def relative_error(self, error: float) -> None:
        """See `Reporter`."""
        self._pace.relative_error = error

    def note(self, text: str) -> None:
        """See `Reporter`."""
        self.tell("note", text)

    def outlook(self) -> dict[str, Any]:
        """See `Reporter`."""
        return {"images_total": self._pace.images, "seconds_left": self._pace.seconds_left}

    def job_ended(self, state: str, facts: dict[str, Any]) -> None:
        """See `Reporter`; told at the exit, because figures are drawn after it."""
        level = {"done": "info", "stopped": "warning"}.get(state, "error")
        self._end = partial(self.tell, state, level=level, seconds=round(self._pace.elapsed, 3), **facts)

    @abstractmethod
    def tell(self, event: str, text: str | None = None, level: str = "info", **facts: Any) -> None:
        """Show that something has happened: as text where it has one, and as facts for machines."""

    @abstractmethod
    def _show(self) -> None:
        """Show how far the job is, if it is time to."""

    @abstractmethod
    def close(self) -> None:
        """Leave the console in order."""

    def _is_time(self) -> bool:
        """Once every few seconds."""
        if time.monotonic() - self._shown < _LOG_EVERY:
            return False
        self._shown = time.monotonic()
        return True


class ConsoleReporter(_Tracking):
    """Progress on a console: images, masks per second, actors, errors, retries, time left."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._bar: Progress | None = None

    def tell(self, event: str, text: str | None = None, level: str = "info", **facts: Any) -> None:
        """Print the text on one line; what has none is said elsewhere, by the bar or by who runs the job."""
        if text is not None:
            self._console.print(shown(text), highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the console in order."""
        if self._bar is not None:
            self._bar.stop()

    def line(self) -> str:
        """The state in words."""
        pace = self._pace
        images = f"{pace.ended}/{pace.images}" if pace.images is not None else str(pace.ended)
        parts = [f"{images} images", f"{pace.masks:,} masks", f"{pace.rate:,.0f} masks/s"]
        if pace.actors > 1:
            parts.append(f"{pace.actors} actors")
        if pace.relative_error is not None:
            parts.append(f"relative error {pace.relative_error:.2g}")
        if errors := pace.failed + pace.gallery_failed:
            parts.append(f"{errors} errors")
        if pace.retries:
            parts.append(f"{pace.retries} retries")
        left = pace.seconds_left
        if left is not None:
            end = time.strftime("%a %H:%M", time.localtime(time.time() + left))
            share = f"{min(pace.ended_masks / pace.all_masks, 1):.1%}, " if pace.all_masks else ""
            parts.append(f"{share}{duration(left)} left (until {end})")
        return ", ".join(parts)

    def _show(self) -> None:
        pace = self._pace
        if self._console.is_terminal:
            if self._bar is None:
                words = TextColumn("{task.description}", table_column=Column())  # it wraps
                self._bar = Progress(BarColumn(20), words, console=self._console)
                self._task = self._bar.add_task("", total=None)
                self._bar.start()
            total, completed = pace.all_masks, pace.ended_masks
            self._bar.update(self._task, total=total, completed=completed, description=self.line())
        elif self._is_time():
            self.tell("progress", self.line())


class JsonReporter(_Tracking):
    """One JSON object per line: `time`, `level`, `event`, and what belongs to it.

    Events are `start`, `progress`, `retry`, `error_row`, `note`, `error`, and how the job ends: `done`,
    `stopped` or `failed`, which is said last, after what is told of figures.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def tell(self, event: str, text: str | None = None, level: str = "info", **facts: Any) -> None:
        """Write one line."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        message = {} if text is None else {"message": text}
        line = {"time": now, "level": level, "event": event, **message, **facts}
        print(json.dumps(line), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is left to do: every line was flushed."""

    def _show(self) -> None:
        if self._is_time():
            pace, left = self._pace, self._pace.seconds_left
            self.tell(
                "progress",
                images_total=pace.images,
                images_done=pace.earlier + pace.done,
                errors=pace.failed + pace.gallery_failed,
                masks_done=pace.masks,
                masks_per_second=round(pace.rate, 1),
                seconds_left=None if left is None else round(left, 1),
                actors=pace.actors,
                retries=pace.retries,
                relative_error=pace.relative_error,
            )


def log_format(text: str) -> LogFormat:
    """`plain` or `json`; `SpecError` for anything else."""
    formats: dict[str, LogFormat] = {"plain": "plain", "json": "json"}
    if text not in formats:
        raise SpecError(f"--log, {LOG_VARIABLE}: expected plain or json, found {text!r}")
    return formats[text]


def reporter_for(log: LogFormat, console: Console) -> ConsoleReporter | JsonReporter:
    """The reporter of a format: `plain` on the console, or `json` on standard output."""
    return JsonReporter(sys.stdout) if log == "json" else ConsoleReporter(console)


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
