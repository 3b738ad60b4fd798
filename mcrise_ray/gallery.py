"""A gallery of embeddings in Parquet: made once, resumed where it was left, and used again by other jobs.

GALLERY/gallery.json     which model embeds it
GALLERY/rows/*.parquet   one row per image: image_id, uri, pid, camid, embedding

Axes: N gallery images; D dimensions of an embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.fs
import pyarrow.parquet
from jaxtyping import Float32, Int64

from mcrise_ray import files
from mcrise_ray.embed import GalleryRow, identified
from mcrise_ray.embedders import Embedder
from mcrise_ray.errors import ImageError, StoreError
from mcrise_ray.identity import UNKNOWN, Identities
from mcrise_ray.images import ImageRef

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

    def find(self, names: Sequence[str]) -> list[int]:
        """The places of gallery images that are named by `image_id` or `uri`.

        Raises:
            ImageError: one is not in the gallery.
        """
        by_id, by_uri = _places(names, self.image_ids), self.own(names)
        places = np.where(by_id >= 0, by_id, by_uri)
        for name, place in zip(names, places, strict=True):
            if place < 0:
                raise ImageError(f"expected an image of --gallery, found {name!r}; check --pairs")
        return [int(place) for place in places]

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

    def exists(self) -> bool:
        """Whether there is a stored gallery."""
        return self._read_json() is not None

    def begin(self, embedder: Embedder, model: str) -> None:
        """Make sure that all of the gallery is embedded by this model, or that it is empty.

        Raises:
            StoreError: it was embedded by another model, or with another preprocessing.
        """
        preprocessing = embedder.preprocessing.model_dump(mode="json")
        stored = self._read_json()
        if stored is None:
            content = {
                "model": model,
                "preprocessing": preprocessing,
                "dimensions": embedder.dimensions,
                "probe": embedder.probe.tolist(),
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
        probe = np.array(stored["probe"])
        norm = np.linalg.norm(embedder.probe)
        if len(probe) != len(embedder.probe) or np.linalg.norm(probe - embedder.probe) > _SAME_MODEL * norm:
            raise StoreError(
                f"expected a gallery embedded by {model}, found one by {stored['model']} with other weights "
                f"in {self.location}; {advice}"
            )

    def missing(self, refs: Iterable[ImageRef]) -> Iterator[ImageRef]:
        """The images that are not embedded yet, in their order, with the person and camera of their name."""
        present = set(_digests(self._keys()))
        for ref in map(identified, refs):
            if _digest(ref.image_id, ref.uri, ref.pid, ref.camid) not in present:
                yield ref

    def write(self, rows: Sequence[GalleryRow]) -> None:
        """Commit rows as one file, whose name tells its content: the same rows again replace themselves."""
        dimensions = len(rows[0].embedding)
        table = pa.table(
            {
                "image_id": pa.array([row.image_id for row in rows], pa.string()),
                "uri": pa.array([row.uri for row in rows], pa.string()),
                "pid": pa.array([row.pid for row in rows], pa.int64()),
                "camid": pa.array([row.camid for row in rows], pa.int64()),
                "embedding": pa.FixedSizeListArray.from_arrays(
                    pa.array(np.concatenate([row.embedding for row in rows]), pa.float32()), dimensions
                ),
            }
        )
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(table, sink, compression="zstd", use_dictionary=["pid", "camid"])
        name = blake2b(digest_size=12)
        for row in rows:
            name.update(_digest(row.image_id, row.uri, row.pid, row.camid))
        self._commit(f"rows/{name.hexdigest()}.parquet", sink.getvalue())

    def load(self, refs: Iterable[ImageRef] | None = None, cache: str | None = None) -> Gallery:
        """The gallery, ordered by `image_id` whatever the order in which its files were written.

        Args:
            refs: the images that belong to it; all that are stored by default.
            cache: a local folder for a file of the bare embeddings, which all processes of this machine
                share; without it they are read into memory.

        Raises:
            StoreError: it is empty, or cannot be read.
        """
        keys = self._keys()
        places = _wanted_places(keys, refs)
        order = np.argsort(places, kind="stable")[np.count_nonzero(places < 0) :]
        if not len(order):
            raise StoreError(f"expected embeddings in {self.location}, found none of --gallery")
        kept = keys.take(pa.array(order))
        identities = Identities(*(kept.column(n).fill_null(UNKNOWN).to_numpy() for n in ("pid", "camid")))
        names = (kept.column(name).combine_chunks() for name in ("image_id", "uri"))
        return Gallery(self._embeddings(places, len(order), cache), identities, *names)

    def _embeddings(
        self, places: Int64[np.ndarray, " M"], many: int, cache: str | None
    ) -> Float32[np.ndarray, "N D"]:
        shape = (many, int(self._read_json()["dimensions"]))  # type: ignore[index]
        if cache is None:
            embeddings = np.empty(shape, np.float32)
            self._fill(embeddings, places)
            return embeddings
        name = blake2b(digest_size=12)
        name.update("".join([self.location, *self._files()]).encode())
        name.update(places.tobytes())
        path = Path(cache) / f"gallery-{name.hexdigest()}.npy"
        if not path.exists():
            written = path.with_suffix(f".tmp-{os.getpid()}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                mapped = np.lib.format.open_memmap(written, "w+", np.float32, shape)
                self._fill(mapped, places)
                mapped.flush()
                os.replace(written, path)
            except OSError as error:
                raise StoreError(f"cannot write embeddings to {path}: {error}; check the cache") from error
            finally:
                written.unlink(missing_ok=True)
        loaded: np.ndarray = np.load(path, mmap_mode="r")
        return loaded

    def _fill(self, embeddings: Float32[np.ndarray, "N D"], places: Int64[np.ndarray, " M"]) -> None:
        row = 0
        for batch in self._batches(["embedding"]):
            at = places[row : row + len(batch)]
            block = batch.column("embedding").flatten().to_numpy().reshape(len(batch), -1)
            embeddings[at[at >= 0]] = block[at >= 0]
            row += len(batch)

    def _keys(self) -> pa.Table:
        """All columns but the embeddings."""
        schema = pa.schema([*((n, pa.string()) for n in _KEYS[:2]), *((n, pa.int64()) for n in _KEYS[2:])])
        return pa.Table.from_batches(self._batches(list(_KEYS)), schema)

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for path in self._files():
            try:
                with self._filesystem.open_input_file(path) as stream:
                    file = pa.parquet.ParquetFile(stream)
                    yield from file.iter_batches(_ROWS_READ, columns=columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise StoreError(f"cannot read {path} of the gallery {self.location}: {error}") from error

    def _files(self) -> list[str]:
        selector = pa.fs.FileSelector(f"{self._root}/rows", allow_not_found=True)
        try:
            found = self._filesystem.get_file_info(selector)
        except OSError as error:
            raise StoreError(f"cannot look into {self.location}: {error}; check --gallery") from error
        return sorted(file.path for file in found if file.path.endswith(".parquet"))

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

    def _commit(self, name: str, content: bytes | pa.Buffer) -> None:
        try:
            files.write_whole(self._filesystem, f"{self._root}/{name}", content)
        except OSError as error:
            raise StoreError(
                f"cannot write {name} to {self.location}: {error}; check --gallery-store"
            ) from error


def _wanted_places(keys: pa.Table, refs: Iterable[ImageRef] | None) -> Int64[np.ndarray, " M"]:
    """For each stored row its place in the gallery; -1 for rows that are not wanted, or were there before."""
    wanted = np.ones(len(keys), bool)
    if refs is not None:
        asked = {_digest(ref.image_id, ref.uri, ref.pid, ref.camid) for ref in map(identified, refs)}
        wanted = np.fromiter((digest in asked for digest in _digests(keys)), bool, len(keys))
    # A stable sort: of two equal rows the first stays.
    order = pa.compute.sort_indices(keys, [(name, "ascending") for name in _KEYS]).to_numpy()
    again = np.arange(len(keys)) > 0
    for name in _KEYS:
        column = keys.column(name).take(pa.array(order)).combine_chunks()
        column = column.fill_null(UNKNOWN) if pa.types.is_integer(column.type) else column
        same = pa.compute.equal(column[1:], column[:-1])
        again[1:] &= same.to_numpy(zero_copy_only=False)
    kept = order[wanted[order] & ~again]
    places = np.full(len(keys), -1, np.int64)
    places[kept] = np.arange(len(kept))
    return places


def _digests(keys: pa.Table) -> Iterator[bytes]:
    for batch in keys.to_batches(_ROWS_READ):
        yield from map(_digest, *(batch.column(name).to_pylist() for name in _KEYS))


def _digest(image_id: str, uri: str, pid: int | None, camid: int | None) -> bytes:
    return blake2b(f"{image_id}\0{uri}\0{pid}\0{camid}".encode(), digest_size=16).digest()


def _places(names: Sequence[str], among: pa.Array) -> Int64[np.ndarray, " n"]:
    found = pa.compute.index_in(pa.array(names, pa.string()), value_set=among)
    return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def _absolute(uri: str) -> str:
    path = files.local_path(uri)
    return uri if path is None else os.path.abspath(path)
