"""Sums of images that an interrupted job had begun, in `OUT/partial/`: it goes on from them."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict

import numpy as np

from mcrise_ray.saliency import Partial
from mcrise_ray.store import Store, file_name
from mcrise_ray.tasks import Inspection, Saved, Target

_FOLDER = "partial"


class Checkpoints:
    """The sums that an output holds of unfinished images; read one by one, as the images come up."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._present = set(store.files(_FOLDER))

    def take(self, image_id: str) -> Saved | None:
        """What an earlier run summed of an image; None where there is nothing that can be read."""
        path = _path(image_id)
        if path not in self._present:
            return None
        try:
            return _parse(self._store.read(path) or b"")
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            self.delete(image_id)  # of another version, or damaged: the image starts anew
            return None

    def write(self, image_id: str, saved: Saved) -> None:
        """Replace the sums kept of an image.

        Raises:
            StoreError: they cannot be written.
        """
        header = {
            "inspection": asdict(saved.inspection),
            "units": saved.units,
            "seconds": saved.seconds,
            "summed": [saved.total.masks, saved.total.units],
        }
        file = io.BytesIO()
        np.savez(
            file,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            raw=saved.total.raw,
            baseline=saved.total.baseline,
            squares=saved.total.squares,
        )
        self._store.write(_path(image_id), file.getvalue())
        self._present.add(_path(image_id))

    def delete(self, image_id: str) -> None:
        """Forget the sums of an image whose maps are committed."""
        if _path(image_id) in self._present:
            self._store.delete(_path(image_id))
            self._present.remove(_path(image_id))

    def clear(self) -> None:
        """Forget all sums: the job is done."""
        for path in self._present:
            self._store.delete(path)
        self._present.clear()


def _path(image_id: str) -> str:
    return f"{_FOLDER}/{file_name(image_id)}.npz"


def _parse(content: bytes) -> Saved:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        header = json.loads(arrays["header"].tobytes())
        masks, units = header["summed"]
        total = Partial(masks, units, arrays["raw"], arrays["baseline"], arrays["squares"])
    stored = header["inspection"]
    inspection = Inspection(
        targets=tuple(Target(**target) for target in stored["targets"]),
        size=tuple(stored["size"]),
        seconds=stored["seconds"],
        original_size=tuple(stored["original_size"]),
    )
    return Saved(inspection, total, header["units"], header["seconds"])
