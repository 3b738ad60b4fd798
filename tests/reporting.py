"""A reporter for tests that remembers what it was told."""

from __future__ import annotations

from mcrise_ray.progress import Quiet


class Silent(Quiet):
    """Says nothing."""

    def __init__(self) -> None:
        self.masks = 0
        self.notes: list[str] = []

    def masks_done(self, masks: int) -> None:
        self.masks += masks

    def image_failed(self, image_id: str, stage: str, message: str) -> None:
        self.notes.append(f"error: {message}")

    def retried(self, reason: str, text: str) -> None:
        self.notes.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)
