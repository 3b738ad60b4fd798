"""A gallery of embeddings in Parquet: made once, resumed where it was left, and used again by other jobs.

GALLERY/gallery.json       which model embeds it
GALLERY/rows/*.parquet     one file per chunk, one row per image: image_id, uri, pid, camid, embedding; and
                           CHUNK+*.parquet of what could not be embedded at first, and was later
GALLERY/errors/*.parquet   one row per image of the chunk that could not be embedded

Axes: N gallery images; D dimensions of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
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
from mcrise_ray.rows import ERROR_SCHEMA, ErrorRow, error_table
from mcrise_ray.shards import absolute
from mcrise_ray.store import resolve

_KEYS = ("image_id", "uri", "pid", "camid")
_MENDED = "+"  # between the name of a chunk and the rest of that of a file with images of it that were mended
_ROWS_READ = 16384  # embeddings in memory at a time, beside those that are kept


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
        return _places([absolute(uri) for uri in uris], self.uris)

    def find(self, names: Sequence[str]) -> Int64[np.ndarray, " n"]:
        """The places of gallery images that are named by `image_id` or `uri`; -1 for those not in it."""
        by_id = _places(names, self.image_ids)
        found: np.ndarray = np.where(by_id >= 0, by_id, self.own(names))
        return found


class GalleryStore:
    """The stored gallery: a local folder, or a URL that `pyarrow.fs` knows.

    Args:
        location: where it is, or will be.

    Raises:
        StoreError: the location cannot be used; every later failure raises it as well.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._filesystem, self._root = resolve(location, "--gallery-store")

    def begin(self, facts: ModelFacts) -> None:
        """Say which model embeds the gallery, or make sure that it is this one.

        Raises:
            StoreError: see `check`.
        """
        if self.check(facts):
            return
        content = {
            "model": facts.model,
            "preprocessing": facts.preprocessing.model_dump(mode="json"),
            "dimensions": facts.classes,
            "probe": facts.probe,
        }
        self._commit("gallery.json", json.dumps(content, indent=1).encode())

    def check(self, facts: ModelFacts) -> bool:
        """Whether there is a gallery, which then was embedded by this model.

        Raises:
            StoreError: it was embedded by another model, or with another preprocessing.
        """
        preprocessing = facts.preprocessing.model_dump(mode="json")
        stored = self._read_json()
        if stored is None:
            return False
        advice = "take the model that it was made with, or another --gallery-store"
        for key, value in preprocessing.items():
            if stored["preprocessing"].get(key) != value:
                raise StoreError(
                    f"expected a gallery embedded with {key} {value}, found "
                    f"{stored['preprocessing'].get(key)} in {self.location}; {advice}"
                )
        if not facts.is_model_of(stored["probe"]):
            raise StoreError(
                f"expected a gallery embedded by {facts.model}, found one by {stored['model']} with other "
                f"weights in {self.location}; {advice}"
            )
        return True

    def present(self) -> frozenset[str]:
        """Names of the chunks that are committed."""
        return frozenset(self._rows())

    def write(self, chunk: str, rows: Sequence[GalleryRow], errors: Sequence[ErrorRow] = ()) -> None:
        """Commit what became of a chunk's images; the same chunk again replaces itself."""
        if errors:
            self._write_errors(chunk, errors)
        self._write_rows(chunk, rows)  # last: it is what says that the chunk is done

    def mend(self, chunk: str, rows: Sequence[GalleryRow], errors: Sequence[ErrorRow]) -> None:
        """Commit what became of images of a committed chunk that could not be embedded before.

        Several jobs may do so at a time while others read: files with rows never change, so what is mended
        has one of its own, and an error counts only where there is no row.
        """
        if rows:
            which = blake2b("\0".join(row.image_id for row in rows).encode(errors="surrogateescape"))
            self._write_rows(f"{chunk}{_MENDED}{which.hexdigest()[:24]}", rows)
        if errors:
            new = {error.image_id: error for error in errors}
            known = self._read_errors(chunk)
            self._write_errors(chunk, [new.get(error.image_id, error) for error in known])

    def _read_errors(self, chunk: str) -> list[ErrorRow]:
        batches = self._batches([f"{self._root}/errors/{chunk}.parquet"], ERROR_SCHEMA.names)
        return [ErrorRow(**row) for batch in batches for row in batch.to_pylist()]

    def _write_errors(self, chunk: str, errors: Sequence[ErrorRow]) -> None:
        self._write_table(f"errors/{chunk}.parquet", error_table(errors))

    def _write_rows(self, name: str, rows: Sequence[GalleryRow]) -> None:
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
        self._write_table(f"rows/{name}.parquet", table)

    def errors(self, chunks: Iterable[str]) -> Iterator[ErrorRow]:
        """The images of some chunks that could not be embedded, chunk by chunk."""
        of_chunk = self.errors_by_chunk()
        return chain.from_iterable(map(of_chunk, chunks))

    def errors_by_chunk(self) -> Callable[[str], list[ErrorRow]]:
        """What tells those of any chunk; the folders are listed once, now."""
        failed, rows = frozenset(map(_name_of, self._files("errors"))), self._rows()

        def of_chunk(chunk: str) -> list[ErrorRow]:
            if chunk not in failed:
                return []
            there = self._batches(rows.get(chunk, ()), ["image_id"])
            embedded = {name for batch in there for name in batch.column("image_id").to_pylist()}
            return [error for error in self._read_errors(chunk) if error.image_id not in embedded]

        return of_chunk

    def load(self, chunks: Collection[str], memory_map: str | None = None) -> Gallery:
        """The images of some chunks, ordered by `image_id` whatever the order in which they were written.

        Args:
            chunks: of one listing.
            memory_map: a new local file for the bare embeddings, which then take no memory of this process's
                own.

        Raises:
            StoreError: it cannot be read.
        """
        there = self._rows()
        paths = [
            path for chunk in chunks for path in there.get(chunk, [f"{self._root}/rows/{chunk}.parquet"])
        ]
        schema = pa.schema([*((n, pa.string()) for n in _KEYS[:2]), *((n, pa.int64()) for n in _KEYS[2:])])
        keys = pa.Table.from_batches(self._batches(paths, list(_KEYS)), schema)
        order = pa.compute.sort_indices(keys, [(name, "ascending") for name in _KEYS]).to_numpy()
        # An image that two jobs have mended at a time is there twice.
        order = order[_first_of_each(keys.column("image_id").take(pa.array(order)))]
        rows, keys = len(keys), keys.take(pa.array(order))
        identities = Identities(*(keys.column(n).fill_null(UNKNOWN).to_numpy() for n in ("pid", "camid")))
        names = (keys.column(name).combine_chunks() for name in ("image_id", "uri"))
        shape = (len(keys), self._dimensions())
        try:
            if memory_map is None or not len(keys):
                embeddings = np.empty(shape, np.float32)
            else:
                embeddings = _mapped(memory_map, shape)
        except OSError as error:
            raise StoreError(f"cannot write embeddings to {memory_map}: {error}; set TMPDIR") from error
        places = np.full(rows, -1)
        places[order] = np.arange(len(keys))
        row = 0
        for batch in self._batches(paths, ["embedding"]):
            block = batch.column("embedding").flatten().to_numpy().reshape(len(batch), -1)
            into = places[row : row + len(batch)]
            embeddings[into[into >= 0]] = block[into >= 0]
            row += len(batch)
        return Gallery(embeddings, identities, *names)

    def _rows(self) -> dict[str, list[str]]:
        """The files with rows of each chunk, those of what was mended later last."""
        found: dict[str, list[str]] = {}
        for path in sorted(self._files("rows"), key=_name_of):
            found.setdefault(_name_of(path).partition(_MENDED)[0], []).append(path)
        return found

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
            raise StoreError(f"cannot look into {self.location}: {error}; check --gallery-store") from error
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


def _mapped(path: str, shape: tuple[int, int]) -> Float32[np.ndarray, "N D"]:
    """A new file of zeros, mapped: on a full disk writing it is an error, and writing to the map of a file
    with holes would end the process.
    """
    row = bytes(4 * shape[1])
    with open(path, "wb") as file:
        for _ in range(shape[0]):
            file.write(row)
    return np.memmap(path, np.float32, "r+", shape=shape)


def _name_of(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".parquet")


def _first_of_each(names: pa.ChunkedArray) -> Int64[np.ndarray, " n"]:
    """Places of the names, which are in order, that differ from the one before."""
    if len(names) == 0:
        return np.empty(0, np.int64)
    same = pa.compute.equal(names[1:], names[:-1]).to_numpy()
    found: np.ndarray = np.flatnonzero(np.append(True, ~same.astype(bool)))
    return found


def _places(names: Sequence[str], among: pa.Array) -> Int64[np.ndarray, " n"]:
    found = pa.compute.index_in(pa.array(names, pa.string()), value_set=among)
    return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
