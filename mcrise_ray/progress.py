"""How long work shows itself: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_LOG_EVERY = 5.0  # seconds


@runtime_checkable
class Reporter(Protocol):
    """Told about progress by a running job; says nothing of its own accord."""

    def start(self, images: int | None, masks_per_image: int, done: int = 0) -> None:
        """Work begins; the number of images may be unknown, and some of them done by an earlier run."""
        ...

    def masks_done(self, masks: int) -> None:
        """Some masks have been scored."""
        ...

    def image_done(self, failed: bool) -> None:
        """An image has been committed, or has got an error row."""
        ...

    def note(self, text: str) -> None:
        """A line worth keeping."""
        ...

    def outlook(self) -> dict[str, Any]:
        """`images_total` and `seconds_left`, None where unknown: for those who read the progress file."""
        ...


class ConsoleReporter:
    """Progress on a console: masks per second, images, errors, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._images: int | None = None
        self._masks_per_image = 0
        self._masks = self._done = self._failed = self._earlier = 0
        self._began = self._logged = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> ConsoleReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, images: int | None, masks_per_image: int, done: int = 0) -> None:
        """See `Reporter`."""
        self._images, self._masks_per_image, self._earlier = images, masks_per_image, done
        self._began = self._logged = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(BarColumn(), TextColumn("{task.description}"), console=self._console)
            total = None if images is None else (images - done) * masks_per_image
            self._task = self._bar.add_task(self.line(), total=total)
            self._bar.start()

    def masks_done(self, masks: int) -> None:
        """See `Reporter`."""
        self._masks += masks
        self._show()

    def image_done(self, failed: bool) -> None:
        """See `Reporter`."""
        self._done += not failed
        self._failed += failed
        self._show()

    def note(self, text: str) -> None:
        """See `Reporter`."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def line(self) -> str:
        """The state in words."""
        elapsed = time.monotonic() - self._began
        rate = self._masks / elapsed if elapsed > 0 else 0.0
        ended = self._earlier + self._done + self._failed
        images = f"{ended}/{self._images}" if self._images is not None else str(ended)
        parts = [f"{images} images", f"{self._masks:,} masks", f"{rate:,.0f} masks/s"]
        if self._failed:
            parts.append(f"{self._failed} errors")
        left = self.outlook()["seconds_left"]
        if left is not None:
            share = elapsed / (elapsed + left)
            end = time.strftime("%a %H:%M", time.localtime(time.time() + left))
            parts.append(f"{share:.1%}, {duration(left)} left (until {end})")
        return ", ".join(parts)

    def outlook(self) -> dict[str, Any]:
        """See `Reporter`."""
        left = None
        if self._images is not None and self._masks:
            to_do = (self._images - self._earlier - self._failed) * self._masks_per_image - self._masks
            left = max(to_do, 0) * (time.monotonic() - self._began) / self._masks
        return {"images_total": self._images, "seconds_left": left}

    def _show(self) -> None:
        if self._bar is not None:
            skipped = self._failed * self._masks_per_image
            self._bar.update(self._task, completed=self._masks + skipped, description=self.line())
        elif time.monotonic() - self._logged >= _LOG_EVERY:
            self._logged = time.monotonic()
            self.note(self.line())


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
