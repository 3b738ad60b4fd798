"""From what a user writes for "my images" to a lazy list of references, and from a reference to pixels."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any, Final

import numpy as np
from jaxtyping import UInt8

from mcrise_ray import files, shards
from mcrise_ray.decode import DecodeOptions, decode
from mcrise_ray.errors import ImageError
from mcrise_ray.seen import Seen

SUFFIXES: Final = frozenset(
    f".{name}"
    for name in (
        *("avif", "bmp", "dib", "gif", "ico", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
    )
)
"""What counts as an image in a folder or shard; a file given by name may be called anything."""

IMAGE_FOLDER: Final = "imagefolder:"

_COLUMNS: Final = ("uri", "label", "target", "pid", "camid")  # of a manifest

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class ImageRef:
    """An image by name: what the driver knows of it, and all that a worker needs to read it.

    Attributes:
        image_id: unique within a job, the same every time the same sources are listed.
        uri: where its bytes are; see `read_image`.
        label: its true class, by index or by name, where known.
        targets: the classes to explain that its manifest asks for, by index or by name.
        pid, camid: the person on it and the camera, where its manifest tells; see `mcrise_ray.identity`.
        problem: why it cannot be explained, where that is known already; it gets an error row.
        stage: at which that showed.
        class_folder: the name of the folder whose place is the label, where one is.
        class_folders: the names of all of them.
    """

    image_id: str
    uri: str
    label: int | str | None = None
    targets: tuple[int | str, ...] = ()
    pid: int | None = None
    camid: int | None = None
    problem: str | None = None
    stage: str = "list"
    class_folder: str | None = field(default=None, compare=False)
    class_folders: tuple[str, ...] = field(default=(), compare=False)

    def __hash__(self) -> int:
        """A driver looks images up all the time, and its names tell them apart."""
        return hash(self.image_id)


class ImageSource:
    """Images as users have them, listed lazily, from the start every time it is iterated.

    Args:
        sources: any of these, locally or on `s3://`, `gs://`, `hdfs://`; `{000..009}` stands for a range.

            | source | `image_id` | label |
            | --- | --- | --- |
            | a file | as given | |
            | a folder, searched recursively for `SUFFIXES` | path below the folder | |
            | `imagefolder:FOLDER` | path below the folder | place of its class folder among them, sorted |
            | `FILE.csv`, `FILE.parquet`: `uri`, perhaps `label`, `target` | `uri` as written | `label` |
            | `FILE.parquet` with encoded images `{bytes, path}` | `path`, or `row=N` | `label` |
            | `FILE.tar`, a WebDataset shard | `SHARD/MEMBER` | of its `.cls`, or `label` of its `.json` |
            | `torchvision:GTSRB?root=...&split=test` | index in the dataset | its target |

    An `image_id` that was there before in the listing gets its place in the listing behind it (`a.png#17`),
    so that images of one name neither meet nor vanish. Memory stays flat, because a Bloom filter remembers
    what was there: at 10 million names, about 1 in 100,000 gets a number that it does not need.

    Relative `uri`s start at the manifest's folder. A label or target is an index where it is written as a
    whole number, a class name otherwise; several targets are separated by `|`, or a list in Parquet.
    For re-identification a manifest has `pid` and `camid`, whole numbers.

    Whatever goes wrong in the middle of a listing (a manifest's row, a shard, a folder that cannot be read)
    comes as an `ImageRef` with a `problem`.

    Raises:
        ImageError: the first source of its kind is not there, or is not what its name says.
    """

    def __init__(self, sources: files.Location | Sequence[files.Location]) -> None:
        self.sources = files.texts(sources)
        for source in self.sources:
            try:
                _check(next(_expand(source)))
            except ImageError as error:
                raise ImageError(f"{files.shown(source)}: {error}") from error

    def __iter__(self) -> Iterator[ImageRef]:
        seen = Seen()
        expanded = chain.from_iterable(_expand(source) for source in self.sources)
        for place, ref in enumerate(chain.from_iterable(_list(source) for source in expanded), start=1):
            unique = ref
            while not seen.add(unique.image_id):
                unique = replace(unique, image_id=f"{unique.image_id}#{place}")
            yield unique

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that the labels count, from the first source that has any."""
        named = (_class_names(source) for source in self.sources)
        return next((names for names in named if names), ())

    def may_have(self, column: str) -> bool:
        """Whether any image may have a `label` or a `target`, by what is known of the sources unlisted."""
        return any(column in _columns(one) for source in self.sources for one in _expand(source))


def read_image(uri: files.Location, options: DecodeOptions | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Read and decode one image, in whatever process, from its URI alone; see `decode` for the conversion.

    Args:
        uri: a local path, a `file://`, `s3://`, `gs://` or `hdfs://` URL, or a place inside a larger file as
            `shards` writes it.
        options: what is decoded and what is refused.

    Raises:
        ImageError: missing, unreadable, refused, or no image.
    """
    uri, options = os.fspath(uri), DecodeOptions() if options is None else options
    try:
        content = shards.read_inside(uri, options)
        if isinstance(content, np.ndarray):
            return content
        return decode(files.read_bytes(uri) if content is None else content, options)
    except ImageError as error:
        raise ImageError(f"{files.shown(uri)}: {error}") from error


def _expand(source: str) -> Iterator[str]:
    """`a-{08..10}.tar` as a-08.tar, a-09.tar, a-10.tar; a file that is really called so stands for itself."""
    match = _RANGE.search(source)
    if match is None or (not files.is_url(source) and os.path.lexists(source)):
        yield source
        return
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise ImageError(f"expected a range that goes up, found {match[0]}")
    for number in range(first, last + 1):
        yield from _expand(f"{source[: match.start()]}{number:0{len(match[1])}}{source[match.end() :]}")


def _kind(source: str) -> str:
    """Which row of the table in `ImageSource` a source belongs to."""
    if source.startswith(shards.TORCHVISION):
        return "file" if re.search(r"#\d+$", source) else "torchvision"
    if source.startswith(IMAGE_FOLDER):
        return "imagefolder"
    if shards.is_inside(source):
        return "file"
    found = files.kind_of(source)
    name = files.base_name(source).lower()
    if found == "folder":
        return "folder"
    if name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".tar.bz2")):
        raise ImageError(
            "expected an uncompressed tar file, because members are read where they lie; unpack it"
        )
    suffix = os.path.splitext(name)[1]
    if found == "missing" and (suffix not in SUFFIXES or "*" in source):
        hint = "; of patterns only {000..009} is known here, others are a shell's" if "*" in source else ""
        raise ImageError(f"expected a file or a folder, found nothing there{hint}")
    return suffix[1:] if suffix in {".csv", ".parquet", ".tar"} else "file"


def _check(source: str) -> None:
    """Raise before the job starts what would meet all of a source."""
    match _kind(source):
        case "torchvision":
            shards.torchvision_dataset(source)
        case "imagefolder":
            if not files.subfolders(source.removeprefix(IMAGE_FOLDER)):
                raise ImageError("expected one folder per class, found no folders")
        case "csv":
            with files.open_seekable(source) as file:
                _csv_columns(_csv_reader(file))
        case "parquet":
            _parquet_columns(shards.open_parquet(source).schema_arrow)


def _list(source: str) -> Iterator[ImageRef]:
    """Images of one source after expansion; ends with a problem where the rest cannot be listed."""
    try:
        match _kind(source):
            case "folder":
                yield from _list_folder(source, {})
            case "imagefolder":
                folder = source.removeprefix(IMAGE_FOLDER)
                yield from _list_folder(folder, {name: i for i, name in enumerate(files.subfolders(folder))})
            case "csv":
                yield from _list_csv(source)
            case "parquet":
                yield from _list_parquet(source)
            case "tar":
                shard = files.location_of(source)
                for found in shards.list_tar(shard, SUFFIXES):
                    yield _inside(found, f"{files.printable(files.base_name(source))}/")
            case "torchvision":
                yield from map(_inside, shards.list_torchvision(source))
            case _:
                yield ImageRef(files.printable(source), files.location_of(source))
    except (ImageError, OSError) as error:
        problem = files.unreadable(error) if isinstance(error, OSError) else error
        name = files.printable(source)
        yield ImageRef(name, name, problem=f"{files.shown(name)}: {problem}")


def _list_folder(folder: str, classes: dict[str, int]) -> Iterator[ImageRef]:
    names = tuple(classes)
    for relative, location, problem in files.walk(folder):
        if problem is not None:
            image_id = relative or files.printable(folder)
            yield ImageRef(image_id, location, problem=f"{files.shown(location)}: {problem}")
        elif os.path.splitext(relative)[1].lower() in SUFFIXES:
            ref = ImageRef(relative, location)
            if (name := relative.partition("/")[0]) in classes:
                ref = replace(ref, label=classes[name], class_folder=name, class_folders=names)
            yield ref


def _inside(found: shards.Inside, prefix: str = "") -> ImageRef:
    problem = None if found.problem is None else f"{files.shown(found.uri)}: {found.problem}"
    return ImageRef(prefix + found.name, found.uri, _label_if_any(found.label), problem=problem)


def _list_csv(manifest: str) -> Iterator[ImageRef]:
    base = files.parent(manifest)
    with files.open_seekable(manifest) as file:
        reader = _csv_reader(file)
        columns = _csv_columns(reader)
        while True:
            where = f"{manifest}#line={reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield _bad_row(where, f"{error}; the row ends in line {reader.line_num}")
                continue
            if row:
                values = [row[at] if at is not None and at < len(row) else None for at in columns]
                yield _manifest_ref(where, base, *values)


def _csv_reader(file: Any) -> Any:
    # Names that are no UTF-8 survive, as they do in a folder. A quote that never ends would take in the rows
    # behind it, and nobody would miss them.
    return csv.reader(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=""), strict=True)


def _csv_columns(reader: Any) -> list[int | None]:
    try:
        header = [name.strip().lower() for name in next(reader, [])]
    except (csv.Error, OSError) as error:
        raise ImageError(f"cannot read its first line: {error}") from error
    if "uri" not in header:
        expected = "".join(f"[,{name}]" for name in _COLUMNS[1:])
        raise ImageError(f"expected a first line with the columns uri{expected}, found {header}")
    return [header.index(name) if name in header else None for name in _COLUMNS]


def _list_parquet(location: str) -> Iterator[ImageRef]:
    location = files.location_of(location)
    file = shards.open_parquet(location)
    columns = _parquet_columns(file.schema_arrow)
    if "uri" not in columns:
        yield from map(_inside, shards.list_parquet(location, columns[0]))
        return
    base = files.parent(location)
    numbers = count()
    for batch in shards.batches(file, columns):
        values = {name: batch.column(name).to_pylist() for name in columns}
        missing = [None] * len(batch)
        for row in zip(*(values.get(name, missing) for name in _COLUMNS), strict=True):
            yield _manifest_ref(f"{location}#row={next(numbers)}", base, *row)


def _parquet_columns(schema: Any) -> list[str]:
    """The columns to read: those of a manifest, or the one with encoded images."""
    if "uri" in schema.names:
        return [name for name in _COLUMNS if name in schema.names]
    column = shards.image_column(schema)
    if column is None:
        raise ImageError(
            "expected a column uri, or a column of encoded images {bytes, path}, "
            f"found {', '.join(schema.names)}"
        )
    return [column]


def _manifest_ref(where: str, base: str, uri: Any, label: Any, target: Any, pid: Any, camid: Any) -> ImageRef:
    if not isinstance(uri, str) or not uri:
        return _bad_row(where, f"expected a uri, found {uri!r}")
    location = uri if uri.startswith(shards.TORCHVISION) else files.join(base, uri)
    if not (uri.isascii() and location.isascii()):
        uri, location = files.printable(uri), files.location_of(location)
    try:
        identity = _number("pid", pid), _number("camid", camid)
        known = None if isinstance(label, list) else _label(label)  # several are no class
        return ImageRef(uri, location, known, _manifest_targets(target), *identity)
    except ValueError as error:
        return ImageRef(uri, location, problem=f"{files.shown(where)}: {error}")


def _bad_row(where: str, problem: str) -> ImageRef:
    where = files.printable(where)
    return ImageRef(where, where, problem=f"{files.shown(where)}: {problem}")


def _label(value: Any) -> int | str | None:
    """A class by index where it is written as a whole number, by name otherwise, None where empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        text = value.strip()
        number = re.fullmatch(r"([+-]?[0-9]+)(\.0*)?", text)  # pandas writes 3.0 where others are missing
        return int(number[1]) if number else files.printable(text)
    if isinstance(value, float) and math.isnan(value):
        return None  # how pandas writes a missing number
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"expected a class index or a class name, found {value!r}")
    return int(value)


def _label_if_any(value: Any) -> int | str | None:
    """None as well for what is no class, such as several: it matters only to who asks for it."""
    try:
        return _label(value)
    except ValueError:
        return None


def _number(column: str, value: Any) -> int | None:
    try:
        number = _label(value)
    except ValueError:
        number = str(value)
    if isinstance(number, str):
        raise ValueError(f"expected a whole number as {column}, found {value!r}")
    if number is not None and abs(number) >= 2**63:
        raise ValueError(f"expected a {column} below 2**63, found {number}; give people numbers from 1")
    return number


def _manifest_targets(value: Any) -> tuple[int | str, ...]:
    values = value.split("|") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return tuple(target for target in map(_label, values) if target is not None)


def _columns(source: str) -> Collection[str]:
    """What a source after expansion may tell of its images: by its name, but for manifests, whose columns are
    looked at. All there can be where that fails: its listing tells why.
    """
    suffix = os.path.splitext(files.base_name(source).lower())[1]
    if source.startswith((IMAGE_FOLDER, shards.TORCHVISION)) or suffix == ".tar":
        return ["label"]
    if suffix not in {".csv", ".parquet"} or shards.is_inside(source):
        return []
    try:
        if suffix == ".csv":
            with files.open_seekable(source) as file:
                found = _csv_columns(_csv_reader(file))
            return [name for name, place in zip(_COLUMNS, found, strict=True) if place is not None]
        names = shards.open_parquet(source).schema_arrow.names
        return [name for name in names if "uri" in names or name == "label"]
    except ImageError:
        return _COLUMNS


def _class_names(source: str) -> tuple[str, ...]:
    first = next(_expand(source))
    match _kind(first):
        case "imagefolder":
            return tuple(files.subfolders(first.removeprefix(IMAGE_FOLDER)))
        case "parquet":
            return shards.class_names(shards.open_parquet(first).schema_arrow)
        case "torchvision":
            return tuple(str(name) for name in getattr(shards.torchvision_dataset(first), "classes", ()))
    return ()
