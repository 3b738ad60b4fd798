"""A gallery of embeddings in Parquet: made once, resumed where it was left, and used again by other jobs.

GALLERY/gallery.json       which model embeds it
GALLERY/rows/*.parquet     one file per chunk, one row per image: image_id, uri, pid, camid, embedding
GALLERY/errors/*.parquet   one row per image of the chunk that cannot be embedded

Axes: N gallery images; D dimensions of an embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.fs
import pyarrow.parquet
from jaxtyping import Float32, Int64

from mcrise_ray import files
from mcrise_ray.embed import GalleryRow
from mcrise_ray.errors import StoreError
from mcrise_ray.identity import UNKNOWN, Identities
from mcrise_ray.models import ModelFacts
from mcrise_ray.store import ERROR_SCHEMA, ErrorRow

_KEYS = ("image_id", "uri", "pid", "camid")
_ROWS_READ = 16384  # embeddings in memory at a time, beside those that are kept
_SAME_MODEL = 1e-2  # of a probe's norm: what devices and precisions differ by, and far less than two models


@dataclass(frozen=True)
class Gallery:
    """All embeddings of a gallery, ready to be searched, in the order of their `image_id`.

    Attributes:
        embeddings: in memory, or a memory map that all processes of a machine share.
        identities: who is on the images.
        image_ids, uris: Arrow arrays of text.
    """

    embeddings: Float32[np.ndarray, "N D"]
    identities: Identities
    image_ids: pa.Array
    uris: pa.Array

    def __len__(self) -> int:
        return len(self.image_ids)

    def own(self, uris: Sequence[str]) -> Int64[np.ndarray, " Q"]:
        """The place of each of some images in the gallery, by where it is stored; -1 for those not in it."""
        return _places([_absolute(uri) for uri in uris], self._absolute_uris)

    def find(self, names: Sequence[str]) -> Int64[np.ndarray, " n"]:
        """The places of gallery images that are named by `image_id` or `uri`; -1 for those not in it."""
        by_id = _places(names, self.image_ids)
        found: np.ndarray = np.where(by_id >= 0, by_id, self.own(names))
        return found

    @cached_property
    def _absolute_uris(self) -> pa.Array:
        return pa.array([_absolute(uri) for uri in self.uris.to_pylist()], pa.string())


class GalleryStore:
    """The stored gallery: a local folder, or a URL that `pyarrow.fs` knows.

    Args:
        location: where it is, or will be.

    Raises:
        StoreError: the location cannot be used; every later failure raises it as well.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        try:
            if files.is_url(location):
                self._filesystem, path = pa.fs.FileSystem.from_uri(location)
                self._root = path.rstrip("/")
            else:
                self._filesystem, self._root = pa.fs.LocalFileSystem(), os.path.abspath(location)
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot open {location}: {error}; check --gallery") from error

    def begin(self, facts: ModelFacts) -> None:
        """Make sure that all of the gallery is embedded by this model, or that it is empty.

        Raises:
            StoreError: it was embedded by another model, or with another preprocessing.
        """
        preprocessing = facts.preprocessing.model_dump(mode="json")
        stored = self._read_json()
        if stored is None:
            content = {
                "model": facts.model,
                "preprocessing": preprocessing,
                "dimensions": facts.classes,
                "probe": facts.probe,
            }
            self._commit("gallery.json", json.dumps(content, indent=1).encode())
            return
        advice = "take the model that it was made with, or another --gallery-store"
        for key, value in preprocessing.items():
            if stored["preprocessing"].get(key) != value:
                raise StoreError(
                    f"expected a gallery embedded with {key} {value}, found "
                    f"{stored['preprocessing'].get(key)} in {self.location}; {advice}"
                )
        theirs, ours = np.array(stored["probe"]), np.array(facts.probe)
        if len(theirs) != len(ours) or np.linalg.norm(theirs - ours) > _SAME_MODEL * np.linalg.norm(ours):
            raise StoreError(
                f"expected a gallery embedded by {facts.model}, found one by {stored['model']} with other "
                f"weights in {self.location}; {advice}"
            )

    def present(self) -> frozenset[str]:
        """Names of the chunks that are committed."""
        return frozenset(map(_chunk_of, self._files("rows")))

    def failed(self) -> frozenset[str]:
        """Names of those with images that could not be embedded, committed or not."""
        return frozenset(map(_chunk_of, self._files("errors")))

    def write(self, chunk: str, rows: Sequence[GalleryRow], errors: Sequence[ErrorRow] = ()) -> None:
        """Commit what became of a chunk's images; the same chunk again replaces itself."""
        if errors:
            self._write_errors(chunk, errors)
        self._write_rows(chunk, rows)  # last: it is what says that the chunk is done

    def mend(self, chunk: str, rows: Sequence[GalleryRow], errors: Sequence[ErrorRow] = ()) -> None:
        """Commit what became of the images of a committed chunk that could not be embedded before."""
        path, mended = f"{self._root}/rows/{chunk}.parquet", {row.image_id for row in rows}
        known = [
            GalleryRow(**row | {"embedding": np.array(row["embedding"], np.float32)})
            for batch in self._batches([path], [*_KEYS, "embedding"])
            for row in batch.to_pylist()
            if row["image_id"] not in mended
        ]
        # Errors last: an image with a row and an error is tried once more, one with neither would be lost.
        self._write_rows(chunk, [*known, *rows])
        self._write_errors(chunk, errors)

    def _write_errors(self, chunk: str, errors: Sequence[ErrorRow]) -> None:
        table = pa.Table.from_pylist([asdict(error) for error in errors], schema=ERROR_SCHEMA)
        self._write_table(f"errors/{chunk}.parquet", table)

    def _write_rows(self, chunk: str, rows: Sequence[GalleryRow]) -> None:
        embeddings = np.concatenate([np.empty(0, np.float32), *(row.embedding for row in rows)])
        table = pa.table(
            {
                "image_id": pa.array([row.image_id for row in rows], pa.string()),
                "uri": pa.array([row.uri for row in rows], pa.string()),
                "pid": pa.array([row.pid for row in rows], pa.int64()),
                "camid": pa.array([row.camid for row in rows], pa.int64()),
                "embedding": pa.FixedSizeListArray.from_arrays(
                    pa.array(embeddings, pa.float32()),
                    len(rows[0].embedding) if rows else self._dimensions(),
                ),
            }
        )
        self._write_table(f"rows/{chunk}.parquet", table)

    def errors(self, chunks: Iterable[str]) -> Iterator[ErrorRow]:
        """The images of some chunks that could not be embedded, chunk by chunk."""
        there = self.failed()
        for chunk in chunks:
            if chunk in there:
                yield from self.errors_of(chunk)

    def errors_of(self, chunk: str) -> Iterator[ErrorRow]:
        """Those of a chunk that has any."""
        for batch in self._batches([f"{self._root}/errors/{chunk}.parquet"], ERROR_SCHEMA.names):
            yield from (ErrorRow(**row) for row in batch.to_pylist())

    def load(self, chunks: Collection[str], memory_map: str | None = None) -> Gallery:
        """The images of some chunks, ordered by `image_id` whatever the order in which they were written.

        Args:
            chunks: of one listing.
            memory_map: a new local file for the bare embeddings, which then take no memory of this process's
                own.

        Raises:
            StoreError: it cannot be read.
        """
        paths = [f"{self._root}/rows/{chunk}.parquet" for chunk in chunks]
        schema = pa.schema([*((n, pa.string()) for n in _KEYS[:2]), *((n, pa.int64()) for n in _KEYS[2:])])
        keys = pa.Table.from_batches(self._batches(paths, list(_KEYS)), schema)
        order = pa.compute.sort_indices(keys, [(name, "ascending") for name in _KEYS]).to_numpy()
        keys = keys.take(pa.array(order))
        identities = Identities(*(keys.column(n).fill_null(UNKNOWN).to_numpy() for n in ("pid", "camid")))
        names = (keys.column(name).combine_chunks() for name in ("image_id", "uri"))
        shape = (len(keys), self._dimensions())
        try:
            if memory_map is None or not len(keys):
                embeddings = np.empty(shape, np.float32)
            else:
                embeddings = np.lib.format.open_memmap(memory_map, "w+", np.float32, shape)
        except OSError as error:
            raise StoreError(f"cannot write embeddings to {memory_map}: {error}; set TMPDIR") from error
        places = np.empty(len(keys), np.int64)
        places[order] = np.arange(len(keys))
        row = 0
        for batch in self._batches(paths, ["embedding"]):
            block = batch.column("embedding").flatten().to_numpy().reshape(len(batch), -1)
            embeddings[places[row : row + len(batch)]] = block
            row += len(batch)
        return Gallery(embeddings, identities, *names)

    def _dimensions(self) -> int:
        stored = self._read_json()
        if stored is None:
            raise StoreError(f"expected gallery.json in {self.location}, found none; check --gallery-store")
        return int(stored["dimensions"])

    def _batches(self, paths: Iterable[str], columns: list[str]) -> Iterator[pa.RecordBatch]:
        for path in paths:
            try:
                with self._filesystem.open_input_file(path) as stream:
                    file = pa.parquet.ParquetFile(stream)
                    yield from file.iter_batches(_ROWS_READ, columns=columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise StoreError(f"cannot read {path} of the gallery {self.location}: {error}") from error

    def _files(self, folder: str) -> list[str]:
        selector = pa.fs.FileSelector(f"{self._root}/{folder}", allow_not_found=True)
        try:
            found = self._filesystem.get_file_info(selector)
        except OSError as error:
            raise StoreError(f"cannot look into {self.location}: {error}; check --gallery") from error
        return [file.path for file in found if file.path.endswith(".parquet")]

    def _read_json(self) -> dict[str, Any] | None:
        path = f"{self._root}/gallery.json"
        try:
            if self._filesystem.get_file_info(path).type == pa.fs.FileType.NotFound:
                return None
            with self._filesystem.open_input_stream(path) as stream:
                content: dict[str, Any] = json.loads(stream.read())
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot read gallery.json in {self.location}: {error}") from error
        return content

    def _write_table(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(table, sink, compression="zstd", use_dictionary=["pid", "camid"])
        self._commit(name, sink.getvalue())

    def _commit(self, name: str, content: bytes | pa.Buffer) -> None:
        try:
            files.write_whole(self._filesystem, f"{self._root}/{name}", content)
        except OSError as error:
            raise StoreError(
                f"cannot write {name} to {self.location}: {error}; check --gallery-store"
            ) from error


def _chunk_of(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".parquet")


def _places(names: Sequence[str], among: pa.Array) -> Int64[np.ndarray, " n"]:
    found = pa.compute.index_in(pa.array(names, pa.string()), value_set=among)
    return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def _absolute(uri: str) -> str:
    path = files.local_path(uri)
    return uri if path is None else os.path.abspath(path)
