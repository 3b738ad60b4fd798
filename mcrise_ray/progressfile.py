"""How far a job is, as it writes it beside its results, where it outlives the process that does the work."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Final

from pydantic import AfterValidator, TypeAdapter, ValidationError

from mcrise_ray import files
from mcrise_ray.errors import ImageError

NAME: Final = "progress.json"
"""Of the file, directly in the output."""

TIME: Final = "%Y-%m-%dT%H:%M:%S%z"
"""The format of times in it."""


def _is_time(text: str) -> str:
    datetime.strptime(text, TIME)
    return text


@dataclass(frozen=True)
class Progress:
    """How far a job is, as it last said itself.

    Attributes:
        state: `running`, `done`, ...
        images_done: committed.
        images_total: None while the listing goes on.
        errors: images with an error row.
        masks_done: scored by this run, whereas images and errors are those of all runs.
        masks_per_second: since its first ones.
        seconds_left: None where nobody can tell.
        updated: when it said so, by its clock.
        relative_error: of the images of late, median, of each its worst map's.
        actors: that hold the model.
        retries: calls handed out again by this run.
        embedded: images of queries and gallery, by this run of a ReID job; none is explained before the last.
        job: the `hash` of the job that says so: one that was refused finds what another one has said.
    """

    state: str
    images_done: int
    images_total: int | None
    errors: int
    masks_done: int
    masks_per_second: float
    seconds_left: float | None
    updated: Annotated[str, AfterValidator(_is_time)]
    relative_error: float | None = None
    actors: int = 0
    retries: int = 0
    embedded: int = 0
    job: str = ""

    @property
    def seconds(self) -> float:
        """When it said so, since 1970."""
        return datetime.strptime(self.updated, TIME).timestamp()


_PROGRESS = TypeAdapter(Progress)


def read_progress(output: str) -> Progress | None:
    """How far the job that writes to an output is; None where there is nothing yet, or no way to read it."""
    try:
        return _PROGRESS.validate_json(files.read_bytes(files.join(output, NAME)))
    except (ImageError, ValidationError):
        return None
