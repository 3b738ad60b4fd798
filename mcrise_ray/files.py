"""Where bytes are: local files and, through `pyarrow.fs`, `s3://`, `gs://` and `hdfs://`; always streamed.

A local path is taken literally (`100%#1.png` is a file name). A URL is percent-encoded, and keeps its query:
`s3://bucket/a%20b.png?endpoint_override=localhost:9000&scheme=http`.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Final, cast
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

import pyarrow
import pyarrow.fs

from mcrise_ray.errors import ImageError

Location = str | os.PathLike[str]

SCHEMES: Final = ("s3", "gs", "hdfs", "file")

LOCK: Final = "lock.json"
"""In the output of every job, by which others know it too; see `mcrise_ray.lease`."""

_SORTED_UP_TO = 100_000  # names of one folder held in memory to sort them
_BUFFER = 1 << 20  # bytes per request to an object store


def texts(given: Location | Sequence[Location]) -> tuple[str, ...]:
    """One location, or several, as text."""
    return tuple(os.fspath(one) for one in ([given] if isinstance(given, str | os.PathLike) else given))


def is_url(location: str) -> bool:
    """Whether it has a scheme, rather than being a local path."""
    return "://" in location


def read_bytes(location: str) -> bytes:
    """All bytes of a file.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        if (path := local_path(location)) is not None:
            # Opening a pipe or a device would wait for ever.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ImageError("expected a file, found a folder or a device")
            with open(path, "rb") as file:
                return file.read()
        filesystem, remote = _remote(location)
        with filesystem.open_input_file(remote) as file:
            return cast(bytes, file.read())
    except (OSError, ValueError) as error:  # a ValueError is a path with a zero byte
        raise unreadable(error) from error


def open_seekable(location: str) -> io.BufferedReader:
    """A file to read anywhere in; of a remote one, little more than what is read travels.

    Raises:
        ImageError: it cannot be opened.
    """
    return io.BufferedReader(open_arrow(location), _BUFFER)


def open_arrow(location: str) -> pyarrow.NativeFile:
    """The same, as Arrow's readers take it.

    Raises:
        ImageError: it cannot be opened.
    """
    try:
        if (path := local_path(location)) is not None:
            return pyarrow.OSFile(os.fsencode(path))
        filesystem, remote = _remote(location)
        return filesystem.open_input_file(remote)
    except (OSError, ValueError) as error:
        raise unreadable(error) from error


def write_whole(filesystem: pyarrow.fs.FileSystem, path: str, content: bytes | pyarrow.Buffer) -> None:
    """Write a whole file or none: by renaming on a file system, by the single put of an object store.

    Raises:
        OSError: it cannot be written.
    """
    local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    folder, _, name = path.rpartition("/")
    # Hidden, so that it is not there for programs that read all of a folder, as pandas does.
    written = f"{folder}/.{name}.tmp-{os.getpid()}" if local else path
    try:
        filesystem.create_dir(folder, recursive=True)
        with filesystem.open_output_stream(written) as stream:
            stream.write(content)
        if local:
            with open(written, "rb") as file:
                os.fsync(file.fileno())
            os.replace(written, path)
    except BaseException:  # Ctrl-C as well
        if local and os.path.exists(written):
            os.unlink(written)
        raise


def kind_of(location: str) -> str:
    """`"file"`, `"folder"` or `"missing"`.

    Raises:
        ImageError: the location cannot be asked: no such bucket, no permission, a scheme that is not known.
    """
    if (path := local_path(location)) is not None:
        return "folder" if os.path.isdir(path) else "file" if os.path.lexists(path) else "missing"
    filesystem, remote = _remote(location)
    try:
        kind = filesystem.get_file_info(remote).type
    except OSError as error:
        raise unreadable(error) from error
    return {pyarrow.fs.FileType.Directory: "folder", pyarrow.fs.FileType.NotFound: "missing"}.get(
        kind, "file"
    )


def walk(folder: str) -> Iterator[tuple[str, str, str | None]]:
    """`(path below the folder, location, problem)` of every file below it, one folder in memory at a time.

    In sorted order, links to folders followed; a local folder of over 100,000 entries is not sorted to its
    end, because that would need them all in memory. Figures of a job that wrote there are passed over. A
    folder that cannot be listed comes as one entry with a problem. An object store lists one folder at a
    time, whole: name millions of objects in a manifest.
    """
    if (path := local_path(folder)) is not None:
        for relative, problem in _walk_local(path, "", frozenset()):
            yield printable(relative), location_of(os.path.join(path, relative)), problem
    else:
        filesystem, remote = _remote(folder)
        for relative, problem in _walk_remote(filesystem, remote, ""):
            yield relative, join(folder, relative), problem


def subfolders(folder: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; a local output of a job is none of them.

    Raises:
        ImageError: it cannot be listed.
    """
    try:
        if (path := local_path(folder)) is not None:
            with os.scandir(path) as entries:
                folders = [entry for entry in entries if os.path.isdir(entry.path)]
                return sorted(printable(entry.name) for entry in folders if not is_output(entry.path))
        filesystem, remote = _remote(folder)
        found = filesystem.get_file_info(pyarrow.fs.FileSelector(remote))
    except OSError as error:
        raise unreadable(error) from error
    return sorted(entry.base_name for entry in found if entry.type == pyarrow.fs.FileType.Directory)


def is_output(folder: str) -> bool:
    """Whether a job has written to a local folder, as the lock tells that it leaves there."""
    try:
        return read_bytes(os.path.join(folder, LOCK)).startswith(b'{"owner": ')
    except ImageError:
        return False


def absolute(location: str) -> str:
    """A location that means the same wherever this process was started."""
    path = local_path(location)
    return location if path is None else location_of(os.path.abspath(path))


def join(folder: str, relative: str) -> str:
    """The location of a path below a folder; a path that is absolute, or a URL, stands for itself."""
    if is_url(relative) or os.path.isabs(relative):
        return relative
    if not is_url(folder):
        return os.path.join(folder, relative)
    base, mark, query = folder.partition("?")
    return f"{base.rstrip('/')}/{quote(relative)}{mark}{query}"


def parent(location: str) -> str:
    """The folder that a file is in."""
    if not is_url(location):
        return os.path.dirname(location)
    base, mark, query = location.partition("?")
    return f"{base.rpartition('/')[0]}{mark}{query}"


def base_name(location: str) -> str:
    """The last part of a path or URL, decoded."""
    if not is_url(location):
        return os.path.basename(location)
    return unquote(location.partition("?")[0].rpartition("/")[2])


def location_of(path: str) -> str:
    """A local path as text that any program can store: a `file://` URL if its bytes are no UTF-8."""
    return path if printable(path) == path else f"file://{quote(os.fsencode(os.path.abspath(path)))}"


def printable(path: str) -> str:
    """A path with bytes that are no UTF-8 written as `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def local_path(location: str) -> str | None:
    """The path of a local file, None for a remote one."""
    if not is_url(location):
        return location
    if location.startswith("file://"):
        return os.fsdecode(unquote_to_bytes(location.removeprefix("file://")))
    return None


def shown(location: str) -> str:
    """A location on one line of an error message, whatever its name holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in location)


def unreadable(error: OSError | ValueError) -> ImageError:
    """An operating system's or an object store's error on one line, without the name of the file."""
    if isinstance(error, FileNotFoundError):
        return ImageError("no such file")
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    return ImageError(f"cannot read it: {reason}")


def _remote(location: str) -> tuple[pyarrow.fs.FileSystem, str]:
    scheme, _, rest = location.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ImageError(f"expected a local path or one of {known}, found {scheme}://")
    base, _, query = rest.partition("?")
    host, _, path = base.partition("/")
    filesystem, root = _filesystem(f"{scheme}://{host}/?{query}" if query else f"{scheme}://{host}/")
    return filesystem, f"{root.rstrip('/')}/{unquote(path)}".rstrip("/")


@lru_cache(maxsize=16)
def _filesystem(root: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if urlsplit(root).password is not None:
        raise ImageError(
            "expected no password in a URL, because URLs are stored with the results; "
            "put credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://)"
        )
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(root)
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot open {root}: {' '.join(str(error).split())}") from error
    return filesystem, path


_Walk = Iterator[tuple[str, str | None]]


def _walk_local(root: str, below: str, above: frozenset[tuple[int, int]]) -> _Walk:
    folder = os.path.join(root, below)
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link to a folder that it is in
            return
        if os.path.basename(below) == "figures" and is_output(os.path.dirname(folder)):
            return
        with os.scandir(folder) as entries:
            first = sorted(islice(entries, _SORTED_UP_TO), key=lambda entry: entry.name)
            for entry in chain(first, entries):
                relative = os.path.join(below, entry.name)
                # A folder that cannot be asked is none to `isdir`, and would vanish with all that is in it.
                if entry.is_dir(follow_symlinks=False) or os.path.isdir(entry.path):
                    yield from _walk_local(root, relative, above | {identity})
                else:
                    yield relative, None
    except OSError as error:
        yield below, str(unreadable(error))


def _walk_remote(filesystem: pyarrow.fs.FileSystem, root: str, below: str) -> _Walk:
    selector = pyarrow.fs.FileSelector(f"{root}/{below}".rstrip("/"))
    try:
        entries = filesystem.get_file_info(selector)
    except OSError as error:
        yield below, str(unreadable(error))
        return
    for entry in sorted(entries, key=lambda entry: str(entry.base_name)):
        relative = f"{below}/{entry.base_name}" if below else entry.base_name
        if entry.type == pyarrow.fs.FileType.Directory:
            yield from _walk_remote(filesystem, root, relative)
        else:
            yield relative, None
