"""Reading results back: as rows, as an Arrow dataset, finished or not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs

from mcrise_ray.errors import StoreError
from mcrise_ray.rows import ErrorRow, MapRow, MatchRow
from mcrise_ray.store import is_part, reading, resolve


class Results:
    """What a job has committed so far; opening it reads no maps, and what cannot be read is a `StoreError`.

    Attributes:
        job: the content of `job.json`.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self._filesystem, self._root = resolve(os.fspath(location))
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
        with reading(f"{self._root}/errors"):
            dataset = self._dataset("errors")
            return [ErrorRow(**row) for row in dataset.to_table().to_pylist()] if dataset.schema.names else []

    def __len__(self) -> int:
        with reading(f"{self._root}/maps"):
            return int(self.maps.count_rows())

    def __iter__(self) -> Iterator[MapRow]:
        """Rows in the order they were committed, one batch in memory at a time; `MatchRow`s of a ReID job."""
        for batch in self._batches():
            tensors = {name: _arrays(batch.column(name)) for name in ("map", "baseline", "standard_error")}
            plain = batch.drop_columns(list(tensors)).to_pylist()
            for index, row in enumerate(plain):
                row["colors"] = tuple(row["colors"])
                row.update({name: arrays[index] for name, arrays in tensors.items()})
                yield MatchRow(**row) if "match_id" in row else MapRow(**row)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """Some rows at a time; file by file, because maps of different files may differ in their shape."""
        for file in self._files("maps"):
            with reading(file):
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
        return sorted(file.path for file in found if is_part(file.path))


def read_results(location: str | os.PathLike[str]) -> Results:
    """Open the output of a job, finished or not.

    Raises:
        StoreError: there is none at the location.
    """
    return Results(location)


def _arrays(column: pa.ExtensionArray) -> list[np.ndarray | None]:
    """Each value of a tensor column as an array of its shape; None for null."""
    return [value.to_numpy() if value.is_valid else None for value in column]
