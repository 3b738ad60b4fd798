"""What a running job tells Prometheus, through Ray's own metrics endpoint on every node.

| exported as | kind | labels of ours |
| --- | --- | --- |
| `ray_mcrise_masks_total` | counter | |
| `ray_mcrise_images_total` | counter | `outcome`: `done`, `failed`, `gallery` (could not be embedded) |
| `ray_mcrise_retries_total` | counter | `reason` |
| `ray_mcrise_actors` | gauge | |
| `ray_mcrise_relative_error` | gauge | |

The endpoint asks for no token: what is here must be fit for everyone who can reach it.
"""

from __future__ import annotations

from typing import Any, Final

from ray.util.metrics import Counter, Gauge

from mcrise_ray.progress import GALLERY, Reporter

NAMES: Final = (
    "mcrise_masks",
    "mcrise_images",
    "mcrise_retries",
    "mcrise_actors",
    "mcrise_relative_error",
)
"""As Ray knows them; it puts `ray_` before them, and `_total` behind counters."""


class MeteredReporter:
    """A reporter that counts what it is told, and tells another one.

    Make it after the process has joined a cluster: what is counted before is lost.
    """

    def __init__(self, inner: Reporter) -> None:
        self._inner = inner
        self._masks = Counter(NAMES[0], "Masked images that the model has scored.")
        self._images = Counter(NAMES[1], "Images that have ended, by outcome.", ("outcome",))
        self._retries = Counter(NAMES[2], "Units of work tried again, by reason.", ("reason",))
        self._actors = Gauge(NAMES[3], "Actors that hold the model.")
        self._relative_error = Gauge(NAMES[4], "Of late: how much of a map is noise, median.")

    def start(self, images: int | None, masks_per_image: int | None, done: int = 0) -> None:
        """See `Reporter`."""
        self._inner.start(images, masks_per_image, done)

    def masks_done(self, masks: int) -> None:
        """See `Reporter`."""
        if masks > 0:  # a counter takes no zeros
            self._masks.inc(masks)
        self._inner.masks_done(masks)

    def masks_kept(self, masks: int) -> None:
        """See `Reporter`."""
        self._inner.masks_kept(masks)

    def image_done(self, masks: int) -> None:
        """See `Reporter`."""
        self._images.inc(1, {"outcome": "done"})
        self._inner.image_done(masks)

    def image_failed(self, image_id: str, stage: str, message: str) -> None:
        """See `Reporter`."""
        # What is about a gallery is about none of the images of a job.
        self._images.inc(1, {"outcome": "gallery" if stage == GALLERY else "failed"})
        self._inner.image_failed(image_id, stage, message)

    def retried(self, reason: str, text: str) -> None:
        """See `Reporter`; each reason is a time series of its own."""
        self._retries.inc(1, {"reason": reason})
        self._inner.retried(reason, text)

    def actors_alive(self, actors: int) -> None:
        """See `Reporter`."""
        self._actors.set(actors)
        self._inner.actors_alive(actors)

    def relative_error(self, error: float) -> None:
        """See `Reporter`."""
        self._relative_error.set(error)
        self._inner.relative_error(error)

    def note(self, text: str) -> None:
        """See `Reporter`."""
        self._inner.note(text)

    def outlook(self) -> dict[str, Any]:
        """See `Reporter`."""
        return self._inner.outlook()

    def job_ended(self, state: str, facts: dict[str, Any]) -> None:
        """See `Reporter`."""
        self._inner.job_ended(state, facts)
