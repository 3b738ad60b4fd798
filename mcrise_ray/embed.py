"""From images as they are listed to rows of a gallery: which are embedded together, and how.

The last bits of an embedding may depend on its batch. So images are embedded in chunks, which are a function
of the listing alone, and each chunk is embedded, committed and repeated as a whole; only images that could
not be embedded may be tried again by themselves.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
from jaxtyping import Float32

from mcrise_ray import files
from mcrise_ray.decode import DecodeOptions
from mcrise_ray.embedders import Embedder
from mcrise_ray.errors import ImageError, ScoreError
from mcrise_ray.identity import identity_of_name
from mcrise_ray.images import ImageRef, read_image
from mcrise_ray.reid import embeddings_of
from mcrise_ray.rows import ErrorRow
from mcrise_ray.shards import absolute

_LEAST, _USUAL, _MOST = 64, 256, 512  # images of a chunk


@dataclass(frozen=True)
class GalleryRow:
    """One embedded image.

    Attributes:
        image_id, uri: see `ImageRef`.
        pid, camid: see `mcrise_ray.identity`; None where not known.
        embedding: `(D,)`.
    """

    image_id: str
    uri: str
    pid: int | None
    camid: int | None
    embedding: Float32[np.ndarray, " D"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive images of a listing; the name tells which, and in which order."""

    name: str
    refs: tuple[ImageRef, ...]


def chunks(refs: Iterable[ImageRef]) -> Iterator[Chunk]:
    """All images of a listing, lazily, with the person and camera of their name, and absolute URIs: a gallery
    may be used again by jobs that are started elsewhere.

    Where one chunk ends and the next begins is decided by the images themselves, so that a gallery that has
    grown, in whatever place, shares most of its chunks with what it was.
    """
    some: list[ImageRef] = []
    digests: list[bytes] = []
    for ref in refs:
        some.append(replace(identified(ref), uri=absolute(ref.uri)))
        digests.append(_digest(some[-1]))
        ends = int.from_bytes(digests[-1][:4], "big") % _USUAL == 0
        if len(some) == _MOST or (ends and len(some) >= _LEAST):
            yield _chunk(some, digests)
            some, digests = [], []
    if some:
        yield _chunk(some, digests)


def identified(ref: ImageRef) -> ImageRef:
    """An image with the person and camera of its name, where its manifest tells neither."""
    if ref.pid is not None or ref.camid is not None:
        return ref
    pid, camid = identity_of_name(ref.image_id)
    return replace(ref, pid=pid, camid=camid)


def embed(
    embedder: Embedder, refs: Sequence[ImageRef], batch_size: int, decode: DecodeOptions | None = None
) -> tuple[list[GalleryRow], list[ErrorRow]]:
    """Read and embed some images; every one ends in a row or, with the reason, in an error row.

    Raises:
        ModelError: the model fails, which would meet every image.
    """
    rows: list[GalleryRow] = []
    errors: list[ErrorRow] = []
    read: list[tuple[ImageRef, np.ndarray]] = []
    for place, ref in enumerate(refs, start=1):
        try:
            if ref.problem is not None:
                errors.append(ErrorRow(ref.image_id, ref.uri, ref.stage, ref.problem))
            else:
                read.append((identified(ref), embedder.prepare(read_image(ref.uri, decode))))
        except ImageError as error:
            errors.append(ErrorRow(ref.image_id, ref.uri, "read", str(error)))
        if len(read) == batch_size or (read and place == len(refs)):
            _embed_batch(embedder, read, rows, errors)
            read = []
    return rows, errors


def read_pairs(location: str) -> dict[str, list[str]]:
    """Named matches from a CSV with the columns `query` and `match`: `image_id`s or `uri`s.

    Raises:
        ImageError: it cannot be read, or has other columns.
    """
    try:
        opened = files.open_seekable(location)
    except ImageError as error:
        raise ImageError(f"{files.shown(location)}: {error}; check --pairs") from error
    with opened as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)  # so that a quote that never ends hides no pairs
        try:
            lines = [(reader.line_num, row) for row in reader]
        except (csv.Error, OSError) as error:
            raise ImageError(f"{location}#line={reader.line_num}: {error}; check --pairs") from error
    header = [name.strip().lower() for name in lines[0][1]] if lines else []
    if header[:2] != ["query", "match"]:
        raise ImageError(f"{location}: expected a first line with the columns query,match, found {header}")
    pairs: dict[str, list[str]] = {}
    for number, row in lines[1:]:
        if not row:
            continue
        if len(row) < 2 or not row[0] or not row[1]:
            raise ImageError(f"{location}#line={number}: expected a query and a match, found {row}")
        query, match = map(files.printable, row[:2])
        pairs.setdefault(query, []).append(match)
    return pairs


def _chunk(refs: Sequence[ImageRef], digests: Sequence[bytes]) -> Chunk:
    return Chunk(blake2b(b"".join(digests), digest_size=12).hexdigest(), tuple(refs))


def _digest(ref: ImageRef) -> bytes:
    # Two folders may hold images of the same names, and share a gallery.
    text = "\0".join(map(str, (ref.image_id, ref.uri, ref.pid, ref.camid, ref.problem)))
    return blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()


def _embed_batch(
    embedder: Embedder,
    read: Sequence[tuple[ImageRef, np.ndarray]],
    rows: list[GalleryRow],
    errors: list[ErrorRow],
) -> None:
    try:
        embeddings = embeddings_of(embedder, np.stack([image for _, image in read]))
    except ScoreError as error:
        if len(read) > 1:
            for one in read:
                _embed_batch(embedder, [one], rows, errors)
        else:
            errors.append(ErrorRow(read[0][0].image_id, read[0][0].uri, "embed", str(error)))
        return
    for (ref, _), embedding in zip(read, embeddings.astype(np.float32), strict=True):
        rows.append(GalleryRow(ref.image_id, ref.uri, ref.pid, ref.camid, embedding))
