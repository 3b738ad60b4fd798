"""Sums of images that an interrupted job had begun, in `OUT/partial/`: it goes on from them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

import numpy as np

from mcrise_ray.estimators import Scored, scores_of
from mcrise_ray.guide import Choice, Guide, Picked
from mcrise_ray.masks import Masks
from mcrise_ray.reduction import State
from mcrise_ray.saliency import Partial
from mcrise_ray.store import Store, file_name
from mcrise_ray.tasks import Inspection, Saved, Target
from mcrise_ray.variates import Fit

_FOLDER, _SUFFIX = "partial", ".npz"
_VERSION = 10  # to be raised when `plan` or what is learnt changes: sums of two versions do not fit together
Part = TypeVar("Part", Partial, Fit, Guide, Masks)


class Checkpoints:
    """The sums that an output holds of unfinished images; read one by one, as the images come up, and `note`
    is told of those that cannot be gone on with.
    """

    def __init__(self, store: Store, note: Callable[[str], None] = lambda text: None) -> None:
        self._store, self._note = store, note
        self._present = {file for file in store.files(_FOLDER) if file.endswith(_SUFFIX)}

    def take(self, image_id: str) -> Saved | None:
        """What an earlier run summed of an image; None where there is nothing that can be read."""
        path = _path(image_id)
        if path not in self._present:
            return None
        content = self._store.read(path) or b""
        try:
            return _parse(content)
        except Exception:  # noqa: BLE001 - numpy, zipfile and tokenize fail in a dozen ways
            self.delete(image_id)
            self._note(f"{image_id} starts anew: its saved sums are of another version, or damaged")
            return None

    def write(self, image_id: str, saved: Saved) -> None:
        """Replace the sums kept of an image.

        Raises:
            StoreError: they cannot be written.
        """
        state = saved.state
        picked = [scored for scored in state.scores if isinstance(scored, Picked)]
        header = {
            "version": _VERSION,
            "inspection": asdict(saved.inspection),
            "seconds": saved.seconds,
            "look": state.look,
            "units": state.units,
            "scored": [len(scores_of(scored)) for scored in state.scores],
            "stage": state.stage,
            "picked": len(picked),
            "candidates": [len(one.bend) for one in picked],
        }
        arrays: dict[str, np.ndarray] = {}
        if state.scores:
            arrays["scores"] = np.concatenate([scores_of(scored) for scored in state.scores])
        for field in fields(Choice) if picked else ():
            arrays[f"picked.{field.name}"] = np.concatenate([getattr(one, field.name) for one in picked])
        guide = state.guide
        centres = None if guide is None else guide.centres
        parts = (("total", state.total), ("fit", state.fit), ("guide", guide), ("centres", centres))
        for name, part in parts:
            for field in fields(part) if part is not None else ():
                value = getattr(part, field.name)
                if not isinstance(value, Masks):
                    arrays[f"{name}.{field.name}"] = np.asarray(value)
        file = io.BytesIO()
        np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
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
    return f"{_FOLDER}/{file_name(image_id)}{_SUFFIX}"


def _parse(content: bytes) -> Saved:
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = dict(stored)
    header = json.loads(arrays["header"].tobytes())
    if header["version"] != _VERSION:
        raise ValueError(f"expected version {_VERSION}, found {header['version']}")
    about = header["inspection"]
    inspection = Inspection(
        targets=tuple(Target(**target) for target in about["targets"]),
        size=tuple(about["size"]),
        seconds=about["seconds"],
        original_size=tuple(about["original_size"]),
    )
    total = _part(Partial, "total", arrays)
    fit = _part(Fit, "fit", arrays) if "fit.masks" in arrays else None
    guide = None
    if "guide.scale" in arrays:
        centres = _part(Masks, "centres", arrays)
        guide = _part(Guide, "guide", arrays | {"guide.centres": centres})
    scores = _scores(arrays, header)
    state = State(header["look"], scores, fit, total, header["units"], header["stage"], guide)
    return Saved(inspection, state, header["seconds"])


def _scores(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> tuple[Scored, ...]:
    """The scores of each unit: first of those whose masks nobody picked, then of the others."""
    counts = header["scored"]
    if not counts:
        return ()
    scores = np.split(arrays["scores"], np.cumsum(counts)[:-1])
    plain = len(counts) - header["picked"]
    if plain == len(counts):
        return tuple(scores)
    lengths = {"bend": header["candidates"]}
    parts: dict[str, list[np.ndarray]] = {
        field.name: np.split(
            arrays[f"picked.{field.name}"], np.cumsum(lengths.get(field.name, counts[plain:]))[:-1]
        )
        for field in fields(Choice)
    }
    picked = [
        Picked(**{name: part[place] for name, part in parts.items()}, scores=scores[plain + place])
        for place in range(header["picked"])
    ]
    return (*scores[:plain], *picked)


def _part(kind: type[Part], name: str, arrays: Mapping[str, np.ndarray | Masks]) -> Part:
    """A dataclass of arrays, numbers and pairs of them."""
    values: dict[str, Any] = {}
    for field in fields(kind):
        value: Any = arrays[f"{name}.{field.name}"]
        if not isinstance(value, Masks) and "np.ndarray" not in str(field.type):
            value = tuple(value.tolist()) if value.ndim else value.item()
        values[field.name] = value
    return kind(**values)
