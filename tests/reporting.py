"""A reporter for tests that remembers what it was told."""

from __future__ import annotations

from typing import Any


class Silent:
    """Says nothing."""

    def __init__(self) -> None:
        self.masks = 0
        self.notes: list[str] = []

    def start(self, images: int | None, masks_per_image: int, done: int = 0) -> None: ...

    def masks_done(self, masks: int) -> None:
        self.masks += masks

    def image_done(self, failed: bool) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def outlook(self) -> dict[str, Any]:
        return {"images_total": None, "seconds_left": None}
