"""Crops of people for tests: a gallery and queries named as in Market-1501, good ones and bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import mcrise_ray as mr
from mcrise_ray.identity import UNKNOWN, Identities
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.loading import ModelSpec

SIZE = (16, 8)
PRECISE = {"precision": "float32", "batch_size": 8}  # bits are compared


def person(seed: int, shade: int = 0) -> np.ndarray:
    """A picture of a person, a little different for each shade."""
    colours = np.random.default_rng(seed).integers(30, 200, (4, 1, 3))
    pixels = np.repeat(np.repeat(colours, 5, axis=0), 10, axis=1) + shade
    return pixels.astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make(root: Path, people: int = 4, shots: int = 6) -> Path:
    """`people` queries on camera 1, and `shots` gallery images of each on cameras 1 to 3."""
    for pid in range(1, people + 1):
        save(root / f"query/{pid:04d}_c1s1_000001_00.png", person(pid))
        for shot in range(shots):
            name = f"gallery/{pid:04d}_c{shot % 3 + 1}s1_{shot:06d}_00.png"
            save(root / name, person(pid, 4 + 5 * shot))
    return root


def identities(pids: list[int | None], camids: list[int | None]) -> Identities:
    """Of some images; None where nobody told."""
    known = ([UNKNOWN if value is None else value for value in values] for values in (pids, camids))
    return Identities(*(np.array(values, np.int64) for values in known))


def one_colour(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((20, 10, 3), colour, np.uint8)


def job(root: Path, output: Path | str, **changes: Any) -> JobSpec:
    """A job of kind reid over such a folder; `reid`, `explain` and `args` are merged into the defaults."""
    reid = {"gallery": (str(root / "gallery"),), "matches": "correct+wrong", **changes.pop("reid", {})}
    explain = {"masks": 256, "grid": (4, 2), **changes.pop("explain", {})}
    args = changes.pop("args", {})
    settings = {"images": (str(root / "query"),), "actors": 0, "figures": 0, **PRECISE, **changes}
    return JobSpec(
        kind="reid",
        model=ModelSpec(
            model="blackboxes:halves",
            args=args,
            preprocessing={"size": SIZE, "input_range": "0-1"},
            device="cpu",
        ),
        output=str(output),
        reid=reid,
        explain=explain,
        **settings,
    )


def content(output: Path | str) -> dict[tuple[str, str], tuple[Any, ...]]:
    """Everything that rows hold besides seconds, each row once."""
    rows: dict[tuple[str, str], tuple[Any, ...]] = {}
    for row in mr.read_results(str(output)):
        values = {name: value for name, value in vars(row).items() if name != "seconds"}
        for name in ("map", "baseline", "standard_error"):
            values[name] = None if values[name] is None else values[name].tobytes()
        key = (row.image_id, row.target_role)
        assert key not in rows, f"{key} twice"
        rows[key] = tuple(values.items())
    return rows
