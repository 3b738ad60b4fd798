"""Results in Parquet: the schema, files that appear whole or not at all, and reading them back.

OUT/maps/*.parquet     one row per image and target
OUT/errors/*.parquet   one row per image that could not be explained
OUT/job.json           the spec, versions, counts, state
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
from jaxtyping import Float32

from mcrise_ray.errors import StoreError


@dataclass(frozen=True)
class MapRow:
    """One explained (image, target).

    Attributes:
        image_id, uri: of the image.
        height, width: of the map, which has the size of the model's input, or of the image where that was
            asked for; reshape a flat `map` by them and `colors`.
        target, target_name: class index, and its name where known.
        target_role: `predicted`, `top2` and so on, `truth`, `asked` or `match`.
        score: of the unmasked image.
        method, colors: the map's M channels are the colours for MC-RISE, a single one for the RISE methods.
        masks: N.
        relative_error: `rms(standard_error) / rms(map)`; null with a single unit of masks.
        map: `(M, H, W)`.
        baseline: `(H, W)`.
        standard_error: `(M, H, W)`, or None unless asked for.
        seconds: of actors' time spent on the image.
        spec_hash: of the `ExplainSpec`.
    """

    image_id: str
    uri: str
    height: int
    width: int
    target: int
    target_name: str | None
    target_role: str
    score: float
    method: str
    colors: tuple[str, ...]
    masks: int
    relative_error: float | None
    map: Float32[np.ndarray, "M H W"]
    baseline: Float32[np.ndarray, "H W"]
    standard_error: Float32[np.ndarray, "M H W"] | None
    seconds: float
    spec_hash: str


@dataclass(frozen=True)
class ErrorRow:
    """One image that could not be explained: at which stage (`list`, `read`, `explain`), and why."""

    image_id: str
    uri: str
    stage: str
    error: str


_ERROR_SCHEMA = pa.schema([(name, pa.string()) for name in ("image_id", "uri", "stage", "error")])


def map_schema(shape: tuple[int, int, int]) -> pa.Schema:
    """Schema of `maps/` for maps of shape `(M, H, W)`."""
    tensor = pa.fixed_shape_tensor(pa.float32(), shape)
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("uri", pa.string(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("target", pa.int32(), nullable=False),
            pa.field("target_name", pa.string()),
            pa.field("target_role", pa.string(), nullable=False),
            pa.field("score", pa.float64(), nullable=False),
            pa.field("method", pa.string(), nullable=False),
            pa.field("colors", pa.list_(pa.string()), nullable=False),
            pa.field("masks", pa.int64(), nullable=False),
            pa.field("relative_error", pa.float64()),
            pa.field("map", tensor, nullable=False),
            pa.field("baseline", pa.fixed_shape_tensor(pa.float32(), shape[1:]), nullable=False),
            pa.field("standard_error", tensor),
            pa.field("seconds", pa.float64(), nullable=False),
            pa.field("spec_hash", pa.string(), nullable=False),
        ]
    )


class Store:
    """The output location of one job: a local folder, or a URL that `pyarrow.fs` knows.

    Raises:
        StoreError: the location cannot be used; every later failure to write raises it as well.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._filesystem, self._root = _resolve(location)
        self._is_local = isinstance(self._filesystem, pa.fs.LocalFileSystem)

    def write_maps(self, part: int, rows: Sequence[MapRow]) -> None:
        """Commit finished maps as one file; rows of one file share a shape."""
        schema = map_schema(rows[0].map.shape)
        columns = {
            name: _column(schema.field(name).type, [getattr(row, name) for row in rows])
            for name in schema.names
        }
        self._commit(f"maps/part-{part:06d}.parquet", _parquet(pa.table(columns, schema=schema)))

    def write_errors(self, part: int, rows: Sequence[ErrorRow]) -> None:
        """Commit error rows as one file."""
        table = pa.Table.from_pylist([asdict(row) for row in rows], schema=_ERROR_SCHEMA)
        self._commit(f"errors/part-{part:06d}.parquet", _parquet(table))

    def write_job(self, content: dict[str, Any]) -> None:
        """Replace `job.json`."""
        self._commit("job.json", pa.py_buffer(json.dumps(content, indent=2).encode()))

    def write_figure(self, image_id: str, png: bytes) -> str:
        """Write one figure; returns its path or URL."""
        name = f"figures/{_file_name(image_id)}.png"
        self._commit(name, pa.py_buffer(png))
        return f"{self.location.rstrip('/')}/{name}"

    def begin(self, content: dict[str, Any]) -> None:
        """Write the first `job.json`, after deleting what an earlier job left and nothing else."""
        try:
            for name in ("maps", "errors", "figures"):
                if self._exists(name):
                    self._filesystem.delete_dir(f"{self._root}/{name}")
            if self._exists("job.json"):
                self._filesystem.delete_file(f"{self._root}/job.json")
        except OSError as error:
            raise StoreError(f"cannot remove results from {self.location}: {error}") from error
        self.write_job(content)

    def refuse_existing(self) -> None:
        """Raise `StoreError` where an earlier job has left results."""
        if self._exists("job.json"):
            raise StoreError(
                f"expected an output without results, found job.json in {self.location}; "
                "choose another --output, or say --overwrite"
            )

    def _exists(self, name: str) -> bool:
        try:
            info = self._filesystem.get_file_info(f"{self._root}/{name}")
        except OSError as error:
            raise StoreError(f"cannot look into {self.location}: {error}; check --output") from error
        return bool(info.type != pa.fs.FileType.NotFound)

    def _commit(self, name: str, content: pa.Buffer) -> None:
        """Write a whole file or none: by renaming on a file system, by the single put of an object store."""
        path = f"{self._root}/{name}"
        written = f"{path}.tmp-{os.getpid()}" if self._is_local else path
        try:
            self._filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            with self._filesystem.open_output_stream(written) as stream:
                stream.write(content)
            if self._is_local:
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(written, path)
        except OSError as error:
            if self._is_local:
                Path(written).unlink(missing_ok=True)
            raise StoreError(f"cannot write {name} to {self.location}: {error}; check --output") from error


class Results:
    """What a job has committed so far; opening it reads no maps.

    Attributes:
        job: the content of `job.json`.
    """

    def __init__(self, location: str) -> None:
        self._filesystem, self._root = _resolve(location)
        try:
            with self._filesystem.open_input_stream(f"{self._root}/job.json") as stream:
                self.job: dict[str, Any] = json.loads(stream.read())
        except (OSError, ValueError) as error:
            raise StoreError(f"expected results in {location}, but cannot read job.json: {error}") from error

    @property
    def maps(self) -> pa.dataset.Dataset:
        """All rows of `maps/`, as an Arrow dataset to filter and scan.

        Where maps have the sizes of their images, leave `map`, `baseline` and `standard_error` out of a scan
        over several files, and iterate over the results instead.
        """
        return self._dataset("maps")

    @property
    def errors(self) -> list[ErrorRow]:
        """All rows of `errors/`."""
        dataset = self._dataset("errors")
        return [ErrorRow(**row) for row in dataset.to_table().to_pylist()] if dataset.schema.names else []

    def __len__(self) -> int:
        return int(self.maps.count_rows())

    def __iter__(self) -> Iterator[MapRow]:
        """Rows in the order they were committed, one batch in memory at a time."""
        for batch in self._batches():
            tensors = {name: _arrays(batch.column(name)) for name in ("map", "baseline", "standard_error")}
            plain = batch.drop_columns(list(tensors)).to_pylist()
            for index, row in enumerate(plain):
                row["colors"] = tuple(row["colors"])
                row.update({name: arrays[index] for name, arrays in tensors.items()})
                yield MapRow(**row)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """Some rows at a time; file by file, because maps of different files may differ in their shape."""
        for file in self._files("maps"):
            dataset = pa.dataset.dataset(file, filesystem=self._filesystem, format="parquet")
            yield from dataset.to_batches(batch_size=16, batch_readahead=1, fragment_readahead=1)

    def _dataset(self, name: str) -> pa.dataset.Dataset:
        files = self._files(name)
        if not files:
            return pa.dataset.dataset(pa.table({}))
        return pa.dataset.dataset(files, filesystem=self._filesystem, format="parquet")

    def _files(self, name: str) -> list[str]:
        selector = pa.fs.FileSelector(f"{self._root}/{name}", allow_not_found=True)
        found = self._filesystem.get_file_info(selector)
        return sorted(file.path for file in found if file.path.endswith(".parquet"))


def read_results(location: str) -> Results:
    """Open the output of a job, finished or not.

    Raises:
        StoreError: there is none at the location.
    """
    return Results(location)


def _file_name(image_id: str) -> str:
    """A flat file name for an image: readable, and distinct where two readable ones would meet."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", image_id).strip("._")[-80:]
    return (
        readable
        if readable == image_id
        else f"{readable}-{hashlib.sha256(image_id.encode()).hexdigest()[:8]}"
    )


def _resolve(location: str) -> tuple[pa.fs.FileSystem, str]:
    try:
        if "://" in location:
            filesystem, path = pa.fs.FileSystem.from_uri(location)
            return filesystem, path.rstrip("/")
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot open {location}: {error}; check --output") from error
    return pa.fs.LocalFileSystem(), os.path.abspath(location)


def _column(kind: pa.DataType, values: list[Any]) -> pa.Array:
    if not isinstance(kind, pa.FixedShapeTensorType):
        return pa.array(values, type=kind)
    width = int(np.prod(kind.shape))
    flat = np.concatenate(
        [np.zeros(width, np.float32) if v is None else np.asarray(v, np.float32).ravel() for v in values]
    )
    missing = pa.array([value is None for value in values])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat), width, mask=missing)
    return pa.ExtensionArray.from_storage(kind, storage)


def _arrays(column: pa.ExtensionArray) -> list[np.ndarray | None]:
    """Each value of a tensor column as an array of its shape; None for null."""
    return [value.to_numpy() if value.is_valid else None for value in column]


def _parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    # Maps are noise to a dictionary encoder; zstd still finds their smoothness.
    plain = ["map", "baseline", "standard_error"]
    dictionary = [name for name in table.schema.names if name not in plain]
    pa.parquet.write_table(table, sink, compression="zstd", use_dictionary=dictionary)
    return sink.getvalue()
