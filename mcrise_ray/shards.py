"""Images inside larger files: WebDataset tar shards, Parquet with encoded images, torchvision datasets.

Each is listed in order without its pixels, and read at random from a URI alone, on whatever machine:

    shards/000.tar#offset=1536&size=20480&member=cat.jpg     the bytes at that place
    train.parquet#row=123                                    counted over the whole file
    torchvision:GTSRB?root=data/gtsrb&split=test#123         the dataset's index
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Any, Final
from urllib.parse import parse_qsl, quote

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from jaxtyping import UInt8
from PIL import Image

from mcrise_ray import files
from mcrise_ray.decode import DecodeOptions, pillow_set_to, to_rgb
from mcrise_ray.errors import ImageError
from mcrise_ray.files import open_arrow, open_seekable, printable, shown, unreadable

TORCHVISION: Final = "torchvision:"

_MEMBER = re.compile(r"(.+)#offset=(\d+)&size=(\d+)&member=(.*)", re.DOTALL)
_ROW = re.compile(r"(.+)#row=(\d+)", re.DOTALL)
_FILES_OPEN = 4  # per process and kind
_ROWS_READ = 16  # encoded images in memory at a time
_ROWS_LISTED = 8192
_TAR_READ = 2**16  # bytes


@dataclass(frozen=True)
class Inside:
    """An image found inside a larger file.

    Attributes:
        name: unique within the file where the file keeps its promises.
        uri: for `read_inside`.
        label: as stored.
        problem: why it cannot be read, where that is known already.
    """

    name: str
    uri: str
    label: Any = None
    problem: str | None = None


def read_inside(uri: str, options: DecodeOptions) -> bytes | UInt8[np.ndarray, "h w 3"] | None:
    """The encoded bytes, or for a torchvision dataset the pixels, that a URI of this module names.

    None for any other URI.

    Raises:
        ImageError: there is no such file, place, row or index.
    """
    if uri.startswith(TORCHVISION):
        name, _, index = uri.rpartition("#")
        if not index.isdecimal():
            raise ImageError("expected torchvision:NAME?root=...#INDEX for one image of a dataset")
        return _read_torchvision(name, int(index), options)
    if match := _MEMBER.fullmatch(uri):
        return _read_member(match[1], int(match[2]), int(match[3]))
    if match := _ROW.fullmatch(uri):
        return _rows_of(match[1]).bytes_of(int(match[2]))
    return None


def is_inside(uri: str) -> bool:
    """Whether a URI names an image by its place in a larger file."""
    return uri.startswith(TORCHVISION) or bool(_MEMBER.fullmatch(uri) or _ROW.fullmatch(uri))


def absolute(uri: str) -> str:
    """A URI, of this module or of a file, that means the same wherever this process was started."""
    if uri.startswith(TORCHVISION):
        return re.sub(r"([?&]root=)([^&#]*)", lambda root: root[1] + files.absolute(root[2]), uri)
    inside = _MEMBER.fullmatch(uri) or _ROW.fullmatch(uri)
    file = inside[1] if inside else uri
    return files.absolute(file) + uri[len(file) :]


# WebDataset: consecutive members with the same path up to the first dot of the last part are one sample.


def list_tar(shard: str, suffixes: frozenset[str]) -> Iterator[Inside]:
    """Images of a shard; the label is that of the sample's `.cls`, or `label` of its `.json`.

    Raises:
        ImageError: it is no tar file, or ends early.
    """
    key, images, label = "", list[tarfile.TarInfo](), None
    with open_seekable(shard) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers them all
                    if not (member.isfile() or member.islnk() or member.issym()):
                        continue
                    folder, name = os.path.split(member.name)
                    stem, _, extension = name.partition(".")
                    if key != os.path.join(folder, stem):
                        yield from _sample(shard, images, label)
                        key, images, label = os.path.join(folder, stem), [], None
                    if os.path.splitext(name)[1].lower() in suffixes:
                        images.append(member)
                    elif not member.isfile():
                        continue
                    elif extension == "cls" or (extension == "json" and label is None):
                        content = tar.extractfile(member)
                        label = _tar_label(extension, content.read() if content else b"")
                yield from _sample(shard, images, label)
                _check_end(file, tar.offset)
        except OSError as error:
            raise unreadable(error) from error
        except tarfile.TarError as error:
            raise ImageError(f"expected an uncompressed tar file, whole: {error}") from error


def _check_end(file: IO[bytes], offset: int) -> None:
    """What `tarfile` takes for the end of a shard, which is also what it cannot read, must be its end."""
    file.seek(offset)
    while block := file.read(_TAR_READ):
        if block.strip(b"\0"):
            raise ImageError(
                f"expected the end of the shard at {offset}, found more: a header is damaged, or shards were "
                "put one behind the other; what is listed before is whole"
            )


def _sample(shard: str, images: list[tarfile.TarInfo], label: Any) -> Iterator[Inside]:
    for member in images:
        name = printable(member.name)
        place = f"offset={member.offset_data}&size={member.size}&member={quote(name)}"
        yield Inside(name, f"{shard}#{place}", label, _elsewhere(member))


def _elsewhere(member: tarfile.TarInfo) -> str | None:
    """Why the bytes of a member are not all in one place, where they are not."""
    if not member.isfile():
        return (
            f"expected a file, found a link to {shown(printable(member.linkname))}; make the shard with "
            "tar --dereference --hard-dereference"
        )
    if member.issparse():
        return "expected a file, found one with holes; make the shard without tar --sparse"
    return None


def _tar_label(extension: str, content: bytes) -> Any:
    text = content.decode("utf-8", "backslashreplace").strip()
    if extension == "cls":
        return text
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values.get("label") if isinstance(values, dict) else None


def _read_member(shard: str, offset: int, size: int) -> bytes:
    try:
        with open_seekable(shard) as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise unreadable(error) from error
    if len(data) < size:
        raise ImageError(
            f"expected {size} bytes at {offset}, found {len(data)}: the shard has been cut short"
        )
    return data


# Parquet in the layout of Hugging Face: a struct column {bytes, path}, and optionally `label`.


def image_column(schema: pa.Schema) -> str | None:
    """The column that holds encoded images: `image`, which masks may stand before, else the first; None for a
    Parquet file without any.
    """
    found = [
        str(column.name)
        for column in schema
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
    ]
    return "image" if "image" in found else next(iter(found), None)


def class_names(schema: pa.Schema) -> tuple[str, ...]:
    """Names of the classes that `label` counts, which Hugging Face keeps in the schema's metadata."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = info["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(str(name) for name in names)


def open_parquet(location: str) -> pa.parquet.ParquetFile:
    """A Parquet file, of which only the footer is in memory.

    Raises:
        ImageError: it cannot be read, or is no Parquet file.
    """
    with _arrow_errors():
        return pa.parquet.ParquetFile(open_arrow(location), pre_buffer=False, buffer_size=1 << 20)


def batches(file: pa.parquet.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The columns of a Parquet file in its order, some rows in memory at a time.

    Raises:
        ImageError: the file is damaged.
    """
    with _arrow_errors():
        yield from file.iter_batches(batch_size=_ROWS_LISTED, columns=columns, use_threads=False)


def list_parquet(location: str, column: str) -> Iterator[Inside]:
    """Rows of a file with encoded images; the name is the stored path where there is one."""
    file = open_parquet(location)
    kind = file.schema_arrow.field(column).type
    named = kind.get_field_index("path") >= 0
    labelled = "label" in file.schema_arrow.names
    columns = [f"{column}.path"] * named + ["label"] * labelled
    row = 0
    if not columns:
        for row in range(file.metadata.num_rows):
            yield Inside(f"row={row}", f"{location}#row={row}")
        return
    for batch in batches(file, columns):
        paths = pa.compute.struct_field(batch.column(column), "path").to_pylist() if named else ()
        labels = batch.column("label").to_pylist() if labelled else ()
        for index in range(len(batch)):
            name = (paths[index] if named else None) or f"row={row}"
            yield Inside(name, f"{location}#row={row}", labels[index] if labelled else None)
            row += 1


@dataclass
class _Rows:
    """Encoded images of one file; reading goes on from the last row read, and skips whole row groups."""

    file: pa.parquet.ParquetFile
    column: str
    batches: Iterator[pa.RecordBatch] = field(default_factory=lambda: iter(()))
    batch: pa.Array | None = None
    start: int = 0  # row of the file that `batch` begins with
    end_of_group: int = 0

    def bytes_of(self, row: int) -> bytes:
        if row >= self.file.metadata.num_rows:
            raise ImageError(f"expected a row below {self.file.metadata.num_rows}, found row {row}")
        if self.batch is None or not self.start <= row < self.end_of_group:
            self._enter_group_of(row)
        while self.batch is None or row >= self.start + len(self.batch):
            passed = 0 if self.batch is None else len(self.batch)
            self.batch = None  # where the next one cannot be read, the group is entered anew
            with _arrow_errors():
                following = next(self.batches, None)
                if following is None:
                    raise ImageError(f"expected row {row} in its row group, found fewer rows")
                batch = pa.compute.struct_field(following.column(self.column), "bytes")
            self.start, self.batch = self.start + passed, batch
        data = self.batch[row - self.start].as_py()
        if data is None:
            raise ImageError(f"expected encoded bytes in column {self.column}, found none")
        return bytes(data)

    def _enter_group_of(self, row: int) -> None:
        metadata = self.file.metadata
        group, start = 0, 0
        while row >= start + metadata.row_group(group).num_rows:
            start += metadata.row_group(group).num_rows
            group += 1
        self.start, self.end_of_group, self.batch = start, start + metadata.row_group(group).num_rows, None
        self.batches = self.file.iter_batches(
            _ROWS_READ, row_groups=[group], columns=[f"{self.column}.bytes"], use_threads=False
        )


@lru_cache(maxsize=_FILES_OPEN)
def _rows_of(location: str) -> _Rows:
    file = open_parquet(location)
    column = image_column(file.schema_arrow)
    if column is None:
        raise ImageError(f"expected a column {{bytes, path}}, found {', '.join(file.schema_arrow.names)}")
    return _Rows(file, column)


@contextmanager
def _arrow_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ImageError(f"expected a Parquet file, whole: {' '.join(str(error).split())}") from error


# torchvision: the user's own dataset class is asked, so that its notion of a split and a label holds.


def list_torchvision(source: str) -> Iterator[Inside]:
    """Images of a torchvision dataset, in its order; the label is its target where that is a class.

    Raises:
        ImageError: see `torchvision_dataset`.
    """
    dataset = torchvision_dataset(source)
    for index in range(len(dataset)):
        label = _torchvision_label(dataset, index)
        yield Inside(str(index), f"{source}#{index}", label)


@lru_cache(maxsize=_FILES_OPEN)
def torchvision_dataset(source: str) -> Any:
    """The dataset of `torchvision:NAME?root=...&split=...`, built once per process; nothing is downloaded.

    Values of the query are `true`, `false`, whole numbers or text, as its constructor takes them.

    Raises:
        ImageError: there is no such dataset, or its files are not at `root`.
    """
    import torchvision.datasets

    name, _, query = source.removeprefix(TORCHVISION).partition("?")
    known = torchvision.datasets.__all__
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known)) or "see torchvision.datasets"
        raise ImageError(f"torchvision has no dataset {name!r}; did you mean: {near}")
    options = {key: _query_value(value) for key, value in parse_qsl(query.replace("+", "%2B"))}
    if "download" in options:
        raise ImageError("expected a dataset that is on disk: take download= out and point root= at it")
    try:
        return getattr(torchvision.datasets, name)(**options)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ImageError(
            f"cannot open torchvision dataset {name} with {options}: {reason}; "
            f"expected torchvision:{name}?root=FOLDER&split=... (nothing is downloaded)"
        ) from error


def _query_value(text: str) -> bool | int | str:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _torchvision_label(dataset: Any, index: int) -> int | None:
    """The label without decoding the image, where the dataset keeps a list of one of the usual names."""
    for name in ("targets", "_labels", "labels", "y"):
        if (labels := getattr(dataset, name, None)) is not None:
            return _class(labels[index])
    for name in ("samples", "_samples"):
        if (samples := getattr(dataset, name, None)) is not None:
            return _class(samples[index][1])
    return None


def _class(label: Any) -> int | None:
    try:
        return int(label)
    except (TypeError, ValueError):
        return None  # a box, a caption, several attributes: no class


def _read_torchvision(source: str, index: int, options: DecodeOptions) -> UInt8[np.ndarray, "h w 3"]:
    dataset = torchvision_dataset(source)
    with pillow_set_to(options):
        picture = dataset[index][0]
        if not isinstance(picture, Image.Image):
            raise ImageError(f"expected images from the dataset, found {type(picture).__name__}")
        return to_rgb(picture, options)
