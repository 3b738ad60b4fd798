"""Results in Parquet (see `rows`), in files that appear whole or not at all.

OUT/maps/*.parquet     one row per image and target; of a ReID job, per query and match
OUT/errors/*.parquet   one row per image that could not be explained
OUT/job.json           the spec, versions, counts, state
OUT/progress.json      how far a running job is
OUT/matched.json       of a ReID job, which listing of the gallery its queries were matched with

Other modules keep small files of their own beside these (`Store.write`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from mcrise_ray import files
from mcrise_ray.errors import StoreError
from mcrise_ray.rows import ErrorRow, MapRow, error_table, map_table


@dataclass(frozen=True)
class Committed:
    """What a job's output holds already.

    Attributes:
        explained: `image_id`s with rows in `maps/`.
        failed: `image_id`s with a row in `errors/`.
        rows: of `maps/`.
        next_part: number of the next file.
    """

    explained: frozenset[str]
    failed: frozenset[str]
    rows: int
    next_part: int

    def without_errors(self) -> Committed:
        """As if those with an error had not been tried yet."""
        return replace(self, failed=frozenset())

    @staticmethod
    def nothing() -> Committed:
        """An output without results."""
        return Committed(frozenset(), frozenset(), 0, 0)

    def __len__(self) -> int:
        return len(self.explained) + len(self.failed)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.explained or image_id in self.failed


def is_part(path: str) -> bool:
    """Whether a file in `maps/` or `errors/` is one of ours, by its name."""
    return re.search(r"/part-\d{6,}-[0-9a-f]{8}\.parquet$", path) is not None


@contextmanager
def reading(part: str) -> Iterator[None]:
    """What goes wrong in reading a file of ours, as a `StoreError` that names it among thousands."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"cannot read results in {part}: {reason}; if it is damaged, delete it and run the same job "
            "again, which does its images anew"
        ) from error


class Store:
    """The output location of one job: a local folder, or a URL that `pyarrow.fs` knows.

    Raises:
        StoreError: the location cannot be used; every later failure to write raises it as well.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._filesystem, self._root = resolve(location)
        self._is_local = isinstance(self._filesystem, pa.fs.LocalFileSystem)
        self._run = uuid.uuid4().hex[:8]

    def write_maps(self, part: int, rows: Sequence[MapRow]) -> None:
        """Commit finished maps as one file; rows of one file share a shape."""
        self.write(self._part("maps", part), _parquet(map_table(rows)))

    def write_errors(self, part: int, rows: Sequence[ErrorRow]) -> None:
        """Commit error rows as one file."""
        self.write(self._part("errors", part), _parquet(error_table(rows)))

    def write_job(self, content: dict[str, Any]) -> None:
        """Replace `job.json`."""
        self.write_json("job.json", content)

    def write_figure(self, image_id: str, png: bytes) -> None:
        """Write one figure."""
        self.write(figure_name(image_id), pa.py_buffer(png))

    def clear(self) -> None:
        """Delete what an earlier job left, and nothing else."""
        with self._failing("remove results from"):
            # Images may lie in folders of these names: embeddings in them are ours, and nothing else.
            ours = [name for name in ("queries", "gallery") if self._exists(f"{name}/gallery.json")]
            embeddings = [f"{name}/{part}" for name in ours for part in ("rows", "errors")]
            # Others keep files in folders of these names too. Figures are called as images are, so they are a
            # job's only where there was one.
            figures = ["figures"] if self._exists("job.json") else []
            for name in ("maps", "errors", "partial", *figures, *embeddings):
                self._clear_folder(name)
            told = ("job.json", "progress.json", "matched.json")
            for name in (*told, *(f"{name}/gallery.json" for name in ours)):
                if self._exists(name):
                    self._filesystem.delete_file(f"{self._root}/{name}")

    def _clear_folder(self, name: str) -> None:
        """Delete what is ours in a folder, and the folder where nothing else is in it."""
        for file in (there := self.files(name)):
            if ".tmp-" in file or _is_ours(name, file):
                self._filesystem.delete_file(f"{self._root}/{file}")
        selector = pa.fs.FileSelector(f"{self._root}/{name}", allow_not_found=True)
        if there and not self._filesystem.get_file_info(selector):
            self._filesystem.delete_dir(f"{self._root}/{name}")

    def forget_errors(self) -> None:
        """Delete all error rows: what they are about has not been tried then."""
        with self._failing("write to"):
            for file in self.parts("errors"):
                self._filesystem.delete_file(f"{self._root}/{file}")

    def tidy(self) -> None:
        """Delete what earlier runs left half written: for whoever holds the lease."""
        with self._failing("write to"):
            for name in ("maps", "errors", "partial"):
                for file in self.files(name):
                    if ".tmp-" in file:
                        self._filesystem.delete_file(f"{self._root}/{file}")

    def committed(self) -> Committed:
        """What earlier runs have finished."""
        with self._failing("look into"):
            ids: dict[str, set[str]] = {}
            rows = 0
            for name in ("maps", "errors"):
                ids[name] = set()
                for file in self.parts(name):
                    path = f"{self._root}/{file}"
                    with reading(path), self._filesystem.open_input_file(path) as source:
                        column = pa.parquet.read_table(source, columns=["image_id"]).column(0)
                    ids[name].update(column.unique().to_pylist())
                    rows += len(column) * (name == "maps")
        parts = [self.parts(name) for name in ("maps", "errors")]
        next_part = max(
            (int(re.findall(r"part-(\d+)", file)[0]) + 1 for part in parts for file in part), default=0
        )
        return Committed(frozenset(ids["maps"]), frozenset(ids["errors"]), rows, next_part)

    def files(self, folder: str) -> list[str]:
        """Names of the files of a folder, sorted; none where it does not exist."""
        selector = pa.fs.FileSelector(f"{self._root}/{folder}", allow_not_found=True)
        with self._failing("look into"):
            found = self._filesystem.get_file_info(selector)
        return sorted(f"{folder}/{file.base_name}" for file in found if file.is_file)

    def parts(self, folder: str) -> list[str]:
        """Those of them that are results: others put files there too, such as `.DS_Store`."""
        return [file for file in self.files(folder) if is_part(file)]

    def read(self, name: str) -> bytes | None:
        """A whole file; None where it does not exist."""
        if not self._exists(name):
            return None
        with (
            self._failing(f"read {name} of"),
            self._filesystem.open_input_stream(f"{self._root}/{name}") as file,
        ):
            return bytes(file.read())

    def read_json(self, name: str) -> Any:
        """A JSON file, which holds an object; None where it does not exist."""
        if (content := self.read(name)) is None:
            return None
        try:
            found = json.loads(content)
            if not isinstance(found, dict):
                raise ValueError(f"found {found!r:.40}")
        except ValueError as error:
            raise StoreError(
                f"expected a JSON object in {name} of {self.location}: {error}; restore it, or choose "
                "another output"
            ) from error
        return found

    def write_json(self, name: str, content: Any) -> None:
        """Replace a JSON file."""
        self.write(name, json.dumps(content, indent=2).encode())

    def delete(self, name: str) -> None:
        """Delete a file that may not exist."""
        with self._failing(f"delete {name} of"):
            if self._exists(name):
                self._filesystem.delete_file(f"{self._root}/{name}")

    def local_path(self, name: str) -> Path | None:
        """Where a file of a local output is; None on an object store."""
        return Path(self._root) / name if self._is_local else None

    @contextmanager
    def _failing(self, action: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"cannot {action} {self.location}: {_reason(error)}") from error

    def _part(self, folder: str, number: int) -> str:
        """Numbered in the order of writing, and never the name that another run might write."""
        return f"{folder}/part-{number:06d}-{self._run}.parquet"

    def _exists(self, name: str) -> bool:
        try:
            info = self._filesystem.get_file_info(f"{self._root}/{name}")
        except OSError as error:
            raise StoreError(f"cannot look into {self.location}: {error}; check --output") from error
        return bool(info.type != pa.fs.FileType.NotFound)

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a whole file or none."""
        try:
            files.write_whole(self._filesystem, f"{self._root}/{name}", content)
        except OSError as error:
            raise StoreError(f"cannot write {name} to {self.location}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An error with the knob to turn."""
    full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    knob = "free some space, and run the same job again: it goes on" if full else "check --output"
    return f"{error}; {knob}"


def _is_ours(folder: str, file: str) -> bool:
    if folder in {"maps", "errors"}:
        return is_part(file)
    return file.endswith({"figures": ".png", "partial": ".npz"}.get(folder, ".parquet"))


def figure_name(image_id: str) -> str:
    """Where the figure of an image is in an output."""
    return f"figures/{file_name(image_id)}.png"


def file_name(image_id: str) -> str:
    """A flat file name for an image: readable, and distinct where two readable ones would meet."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", image_id).strip("._")[-80:]
    return (
        readable
        if readable == image_id
        else f"{readable}-{hashlib.sha256(image_id.encode()).hexdigest()[:8]}"
    )


def resolve(location: str, option: str = "--output") -> tuple[pa.fs.FileSystem, str]:
    """The file system and path that a local path or URL means, which the option has named."""
    try:
        location.encode()  # Arrow knows no other names
        if "://" in location:
            filesystem, path = pa.fs.FileSystem.from_uri(location)
            return filesystem, path.rstrip("/")
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot open {location}: {error}; check {option}") from error
    return pa.fs.LocalFileSystem(), os.path.abspath(location)


def _parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    # Maps are noise to a dictionary encoder; zstd still finds their smoothness.
    plain = ["map", "baseline", "standard_error"]
    dictionary = [name for name in table.schema.names if name not in plain]
    pa.parquet.write_table(table, sink, compression="zstd", use_dictionary=dictionary)
    return sink.getvalue()
